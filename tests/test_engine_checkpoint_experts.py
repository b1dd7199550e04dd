"""What is stored of experts: blobs and their weights, directories of quantised experts."""

from contextlib import ExitStack
from dataclasses import replace

import numpy as np
import pytest
import torch

from engine.checkpoint import load_model, open_expert_stores, open_native, save_model
from engine.checkpoint_experts import expert_bytes, expert_layout, expert_weights, float_tensors
from engine.convert import convert, inspect
from engine.errors import CheckpointError
from engine.model.layers import FeedForwardWeights, feed_forward, linear
from engine.quantize import quantize_int4, quantize_int8
from server.__main__ import main
from tests.tiny import MOE, random_ids, tiny_model

CONFIG = replace(MOE, d_ff=64)
KINDS = ("int8", "int4")


def quantize(kind, weight, group=32):
    return quantize_int8(weight) if kind == "int8" else quantize_int4(weight, group)


def random_weight(rows, columns, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator) * scale


def random_expert(config=CONFIG, seed=0):
    shapes = config.expert_shapes().items()
    return {
        name: random_weight(shape[0], shape[-1], seed + i, shape[-1] ** -0.5).view(*shape)
        if name != "norm"
        else random_weight(1, shape[0], seed).view(shape)
        for i, (name, shape) in enumerate(shapes)
    }


# Blobs


def blob_of(config, kind, dtype=torch.float32, seed=0):
    layout = expert_layout(config, dtype, kind)
    stored = expert_bytes("here", random_expert(config, seed), config, dtype, kind)
    blob = np.zeros(layout.blob_bytes, np.uint8)
    for spec in layout.tensors:
        blob[spec.offset : spec.offset + spec.nbytes] = stored[spec.name]
    return blob, layout


@pytest.mark.parametrize("kind", ["none", *KINDS])
@pytest.mark.parametrize("gated", [True, False])
def test_weights_are_views_of_the_blob(kind, gated):
    config = replace(CONFIG, gated=gated)
    blob, layout = blob_of(config, kind)
    arena = torch.zeros(3, layout.blob_bytes, dtype=torch.uint8)
    arena[1] = torch.from_numpy(blob)
    tensors = random_expert(config)
    for row in (blob, arena[1]):
        weights = expert_weights(row, layout)
        assert (weights.wi_1 is not None) == gated
        torch.testing.assert_close(weights.norm, tensors["norm"], rtol=0, atol=0)
        floats = float_tensors(row, layout)
        assert floats.keys() == tensors.keys()
        for name in floats.keys() - {"norm"}:
            expected = tensors[name]
            if kind != "none":
                expected = quantize(kind, expected).dequantize()
            torch.testing.assert_close(floats[name], expected, rtol=0, atol=0)
        row[:] = 0
        assert not weights.norm.any()
        x = torch.eye(config.d_model)
        assert not linear(x, weights.wi_0).any()


@pytest.mark.parametrize("kind", KINDS)
def test_a_feed_forward_of_packed_weights(kind):
    blob, layout = blob_of(CONFIG, kind, torch.bfloat16)
    x = random_weight(5, CONFIG.d_model).bfloat16()
    packed = feed_forward(x, expert_weights(blob, layout), CONFIG)
    expected = feed_forward(x, FeedForwardWeights(**float_tensors(blob, layout)), CONFIG)
    assert packed.dtype == torch.bfloat16
    torch.testing.assert_close(packed.float(), expected.float(), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_refused(kind, value):
    tensors = random_expert()
    tensors["wo"][3, 4] = value
    with pytest.raises(CheckpointError, match=f"here: wo has infinite values or NaN, which {kind}"):
        expert_bytes("here", tensors, CONFIG, torch.float32, kind)


@pytest.mark.parametrize("kind", KINDS)
def test_other_devices_than_the_cpu_get_no_operation_of_the_cpu(kind, monkeypatch):
    """A tensor without memory stands for one in a GPU's."""

    def refuse(*_):
        raise AssertionError("an operation of the CPU")

    for operation in ("_weight_int8pack_mm", "_weight_int4pack_mm_for_cpu"):
        monkeypatch.setattr(torch.ops.aten, operation, refuse)
    blob, layout = blob_of(CONFIG, kind, torch.bfloat16)
    weights = expert_weights(torch.from_numpy(blob).to("meta"), layout)
    x = torch.empty(3, CONFIG.d_model, dtype=torch.float16, device="meta")
    result = linear(x, weights.wi_0)
    assert (result.shape, result.dtype) == ((3, CONFIG.d_ff), torch.float16)
    assert feed_forward(x.bfloat16(), weights, CONFIG).shape == x.shape


# Directories


class PackedExperts:
    """An ExpertSource that reads every expert anew and multiplies with what is stored."""

    def __init__(self, stores):
        self.stores = stores

    def stream(self, layer, wanted):
        store = self.stores[layer]
        for expert in wanted:
            yield expert, expert_weights(store.read_blob(expert), store.layout)

    def foresee(self, layer, x_ND):
        pass


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def original(request, tmp_path):
    save_model(tiny_model(CONFIG, seed=2), tmp_path / "original", dtype=request.param)
    return tmp_path / "original"


def logits_of(model, seed=0):
    source, target = random_ids(2, 9, seed), random_ids(2, 5, seed + 100)
    with torch.inference_mode():
        ones = torch.ones_like
        return model(source, ones(source), target, ones(target)).float()


@pytest.mark.parametrize("kind", KINDS)
def test_resident_experts_are_those_of_the_original_rounded(original, tmp_path, kind):
    convert(original, tmp_path / kind, quantization=kind)
    loaded, expected = load_model(tmp_path / kind), load_model(original)
    assert loaded.embedding.weight.dtype == expected.embedding.weight.dtype
    for name, tensor in loaded.state_dict().items():
        before = expected.state_dict()[name]
        if name.startswith("experts.") and not name.endswith("norm"):
            rounded = [quantize(kind, part).dequantize(before.dtype) for part in before]
            before = torch.stack(rounded)
        torch.testing.assert_close(tensor, before, rtol=0, atol=0, msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_packed_experts_compute_what_resident_ones_do(original, tmp_path, kind):
    convert(original, tmp_path / kind, quantization=kind)
    resident = load_model(tmp_path / kind)
    stores = open_expert_stores(tmp_path / kind, CONFIG)
    with ExitStack() as opened:
        for store in stores.values():
            opened.enter_context(store)
        packed = load_model(tmp_path / kind, experts=PackedExperts(stores))
        whole = load_model(original)
        errors, losses = [], []
        for seed in range(7):
            expected, got = logits_of(resident, seed), logits_of(packed, seed)
            errors.append((got - expected).norm() / expected.norm())
            losses.append((got - logits_of(whole, seed)).norm() / expected.norm())
    # the median: a token on the edge between two experts may go to the other one
    assert sorted(errors)[3] < 0.02
    assert sorted(losses)[3] < (0.03 if kind == "int8" else 0.25)


@pytest.mark.parametrize("kind", KINDS)
def test_converting_back_gives_the_dequantised_experts(original, tmp_path, kind, caplog):
    convert(original, tmp_path / kind, quantization=kind)
    convert(tmp_path / kind, tmp_path / "back")
    assert inspect(tmp_path / "back")["experts"]["quantization"] == "none"
    expected = load_model(tmp_path / kind).state_dict()
    for name, tensor in load_model(tmp_path / "back").state_dict().items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=0, msg=name)
    assert "quantised already" not in caplog.text
    convert(tmp_path / kind, tmp_path / "again", quantization="int8")
    assert "original: experts are quantised already" not in caplog.text
    assert f"{kind}: experts are quantised already; errors add up: convert" in caplog.text


@pytest.mark.parametrize("kind", ["none", *KINDS])
def test_what_is_told_of_experts(original, tmp_path, kind):
    steps = []
    convert(original, tmp_path / "m", torch.float16, steps.append, quantization=kind)
    facts = inspect(tmp_path / "m")
    layout = expert_layout(CONFIG, torch.float16, kind)
    assert facts["experts"] == {"quantization": kind, "blob_bytes": layout.blob_bytes}
    assert facts["dtype"] == "float16"
    assert open_native(tmp_path / "m").expert_layout() == layout
    stored = sum(path.stat().st_size for path in (tmp_path / "m").glob("experts-*"))
    headers = 4 * 4096
    done = [step.done_bytes for step in steps]
    assert stored - headers == done[-1] - done[-5]
    assert {step.total_bytes for step in steps} == {done[-1]}


def test_a_directory_of_another_quantisation_than_its_first_layer_still_loads(tmp_path, original):
    """Each store tells for itself; only offloading asks for one layout."""
    convert(original, tmp_path / "m", quantization="int8")
    name = "experts-decoder-1.safetensors"
    (tmp_path / "m" / name).write_bytes((original / name).read_bytes())
    state, expected = load_model(tmp_path / "m").state_dict(), load_model(original).state_dict()
    key = "experts.layers.decoder-1.wo"
    assert torch.equal(state[key], expected[key])


# Commands


def run(capsys, *arguments):
    """Exit code, stdout and stderr of the command."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return caught.value.code or 0, out, err


@pytest.mark.parametrize("kind", KINDS)
def test_commands_write_and_tell_quantised_experts(capsys, tmp_path, original, kind):
    converted, random = tmp_path / "converted", tmp_path / "random"
    assert run(capsys, "convert", original, converted, "--experts", kind)[0] == 0
    sizes = ["--d-model", 64, "--d-ff", 128, "--layers", 1, "--experts", 2]
    assert run(capsys, "make-random", random, *sizes, "--expert-dtype", kind)[0] == 0
    for path in (converted, random):
        layout = open_native(path).expert_layout()
        assert layout.quantization == kind
        out = run(capsys, "inspect", path)[1]
        assert f"experts         quantization {kind}\n" in out
        assert f"experts         blob_bytes {layout.blob_bytes:,}\n" in out
        assert torch.isfinite(logits_of(load_model(path))).all()


def test_a_wish_that_cannot_be_gives_one_line(capsys, tmp_path):
    save_model(tiny_model(MOE), tmp_path / "m")
    code, out, err = run(capsys, "convert", tmp_path / "m", tmp_path / "out", "--experts", "int4")
    assert (code, out) == (1, "")
    assert "infmoe: error: d_ff is 48; int4 experts need d_model and d_ff" in err
    assert run(capsys, "convert", tmp_path / "m", tmp_path / "out", "--experts", "int3")[0] == 2
