"""Experts that are read from disk, in steps by kernels."""

import copy
from dataclasses import replace

import pytest
import torch

pytest.importorskip("numba")

from engine.checkpoint import load_model, save_model
from engine.checkpoint_any import load_any
from engine.convert import convert, inspect
from engine.errors import CheckpointError
from engine.experts import load_offloaded
from engine.kernels.attach import attach_kernels
from engine.model.transformer import Transformer
from engine.quantize import quantize_int4, quantize_int8
from tests.hf_families import make_oracle, widen
from tests.tiny import MIXTRAL, MOE, random_ids, tiny_model

CONFIGS = {
    "cpm_2": replace(MOE, num_experts=6),
    "base_layer": replace(MOE, num_experts=6, router="base_layer"),
    "mixtral": replace(MIXTRAL, num_experts=6, shared_d_ff=24, shared_gate=True),
    "biases": replace(MIXTRAL, expert_bias=True, activation="clamped_swiglu"),
}
WIDE = {name: replace(config, d_ff=64) for name, config in CONFIGS.items()}  # int4 is in groups


@torch.inference_mode()
def scores(model, rows, steps=5):
    """Scores of given tokens over a cache."""
    source, fed = random_ids(rows, 6, seed=3), random_ids(rows, steps, seed=4)
    cache = model.start_cache(
        model.encode(source, torch.ones_like(source)), torch.ones_like(source), steps
    )
    found = [model.logits(model.step(part, cache)) for part in torch.split(fed, 1, 1)]
    return torch.cat(found, 1)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Writes the model of a config and a dtype on the first demand."""
    root, made = tmp_path_factory.mktemp("models"), {}

    def get(name, dtype):
        path = root / f"{name}-{dtype}"
        if path not in made:
            save_model(widen(tiny_model(CONFIGS[name])), path, dtype=dtype)
            made[path] = inspect(path)["experts"]["blob_bytes"]
        return path, made[path]

    return get


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", CONFIGS)
def test_offloaded_equals_resident_bit_for_bit(saved, name, dtype):
    path, blob_bytes = saved(name, dtype)
    resident = load_model(path)
    assert attach_kernels(resident)
    expected = {rows: scores(resident, rows) for rows in (1, 5)}
    for slots in (2, 5, 100):
        model, experts = load_offloaded(path, None, slots * blob_bytes)
        with experts:
            assert attach_kernels(model)
            for rows, scores_of_all in expected.items():
                assert torch.equal(scores(model, rows), scores_of_all)
            assert slots == 100 or experts.stats.misses > 0


def test_a_family_with_biases_and_sinks_offloaded_equals_resident(tmp_path):
    make_oracle("gpt_oss").save_pretrained(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "native")
    resident = load_any(tmp_path / "hf")
    model, experts = load_offloaded(
        tmp_path / "native", None, 3 * inspect(tmp_path / "native")["experts"]["blob_bytes"]
    )
    with experts:
        assert attach_kernels(resident)
        assert attach_kernels(model)
        source = random_ids(3, 4) % resident.config.vocab_size
        with torch.inference_mode():
            cache = resident.start_cache(
                resident.encode(source, torch.ones_like(source)), torch.ones_like(source), 4
            )
            own = copy.deepcopy(cache)
            for column in range(4):
                tokens = source[:, column : column + 1]
                assert torch.equal(model.step(tokens, own), resident.step(tokens, cache))
        assert experts.stats.misses > 0


@pytest.mark.parametrize("quantization", ["int8", "int4"])
@pytest.mark.parametrize("name", ["cpm_2", "base_layer"])
def test_quantized_experts_are_as_near_as_without_kernels(tmp_path, name, quantization):
    model = widen(tiny_model(WIDE[name]))
    save_model(model, tmp_path / "whole", dtype=torch.bfloat16)
    convert(tmp_path / "whole", tmp_path / "small", quantization=quantization)
    budget = 3 * inspect(tmp_path / "small")["experts"]["blob_bytes"]
    exact = load_model(tmp_path / "whole").float()
    model, experts = load_offloaded(tmp_path / "small", None, budget)
    with experts:
        plain = load_model(tmp_path / "small", experts=experts)
        assert attach_kernels(model)
        for rows in (1, 4):
            expected, theirs = scores(exact, rows), scores(plain, rows).float()
            ours = scores(model, rows)
            assert ours.isfinite().all()
            their_error, our_error = (theirs - expected).abs(), (ours - expected).abs()
            assert our_error.mean() <= 1.2 * their_error.mean()
            assert (ours - theirs).abs().mean() < 0.5 * expected.std()
        assert experts.stats.misses > 0


class Quantized:
    """Lends the experts of another source as int8 or int4."""

    def __init__(self, experts, quantization):
        self.experts, self.quantization = experts, quantization

    def foresee(self, layer, x_ND):
        """Nothing to do."""

    def stream(self, layer, wanted):
        for expert, weights in self.experts.stream(layer, wanted):
            matrices = {name: getattr(weights, name) for name in ("wi_0", "wi_1", "wo")}
            small = {
                name: quantize_int8(matrix)
                if self.quantization == "int8"
                else quantize_int4(matrix, 32)
                for name, matrix in matrices.items()
            }
            yield expert, weights._replace(**small)


@pytest.mark.parametrize("quantization", ["int8", "int4"])
@pytest.mark.parametrize("name", ["mixtral", "biases"])
def test_quantized_experts_of_top_k_layers_are_as_near_as_without_kernels(name, quantization):
    model = widen(tiny_model(WIDE[name])).bfloat16()
    lending = Transformer(WIDE[name], Quantized(model.experts, quantization)).bfloat16().eval()
    state = {k: v for k, v in model.state_dict().items() if not k.startswith("experts.")}
    lending.load_state_dict(state)
    expected = scores(model.float(), 4)
    model.bfloat16()
    theirs = scores(lending, 4).float()
    assert attach_kernels(lending)
    ours = scores(lending, 4)
    assert (ours - expected).abs().mean() <= 1.2 * (theirs - expected).abs().mean()
    assert (ours - theirs).abs().mean() < 0.5 * expected.std()


def test_a_damaged_expert_fails_its_step_and_the_next_one_is_right(saved, tmp_path):
    """What a step has written before it failed is written anew."""
    path, blob_bytes = saved("mixtral", torch.float32)
    copied = tmp_path / "copied"
    copied.mkdir()
    for file in path.iterdir():
        (copied / file.name).write_bytes(file.read_bytes())
    file = copied / "experts-decoder-2.safetensors"
    whole = file.read_bytes()
    damaged = bytearray(whole)
    for expert in range(6):
        damaged[-1000 - expert * blob_bytes] ^= 4
    expected = scores(load_with_kernels(path), 2)
    model, experts = load_offloaded(copied, None, 2 * blob_bytes)
    with experts:
        assert attach_kernels(model)
        source, fed = random_ids(2, 6, seed=3), random_ids(2, 5, seed=4)
        ones = torch.ones_like(source)
        with torch.inference_mode():
            cache = model.start_cache(model.encode(source, ones), ones, 5)
            file.write_bytes(damaged)
            with pytest.raises(CheckpointError, match="damaged"):
                model.step(fed[:, :1], cache)
            assert (cache.lengths_B == 6).all()
            file.write_bytes(whole)
            parts = torch.split(fed, 1, 1)
            found = [model.logits(model.step(part, cache)) for part in parts]
    assert torch.equal(torch.cat(found, 1), expected)


def load_with_kernels(path):
    model = load_model(path)
    assert attach_kernels(model)
    return model
