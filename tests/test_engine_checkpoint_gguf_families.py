"""GGUF files of GPT-2, Phi-MoE, gpt-oss and DeepSeek, against transformers and their folders."""

import gguf
import numpy as np
import pytest
import torch

from engine.checkpoint_any import load_any
from engine.checkpoint_gguf import open_gguf
from engine.checkpoint_hf import open_huggingface
from engine.checkpoint_prepared import prepare_experts
from engine.convert import inspect
from engine.errors import CheckpointError
from engine.experts import load_offloaded
from tests.gguf_families import deepseek, gpt2, gpt_oss, phimoe, write_other
from tests.gguf_files import saved_state, write_gguf
from tests.hf_families import (
    LATENT,
    LOCAL,
    MODELS,
    PHI,
    SIZES,
    YARN,
    assert_equal_to_oracle,
    ragged_prompts,
    widen,
)
from tests.t5_oracle import one_thread

Kind = gguf.GGMLQuantizationType
V2 = {
    **LATENT,
    "q_lora_rank": None,
    "n_shared_experts": 2,
    "routed_scaling_factor": 1.5,
    "rope_parameters": {**YARN, "mscale": 0.707, "mscale_all_dim": 0.707},
}
V3 = {**MODELS["deepseek_v3"][2], "n_shared_experts": 1}
BIASES = {"attention_bias": True, "lm_head_bias": True}
CASES = {  # name -> family, values of the config, architecture in GGUF, how its file is made
    "gpt2": ("gpt2", MODELS["gpt2"][2], "gpt2", gpt2, {}),
    "gpt2-tied": ("gpt2", {**MODELS["gpt2"][2], "tie_word_embeddings": True}, "gpt2", gpt2, {}),
    "phimoe": ("phimoe", {**SIZES, **LOCAL, **BIASES}, "phimoe", phimoe, {}),
    "phimoe-longrope": (
        "phimoe",
        {**SIZES, **LOCAL, "rope_parameters": {**PHI, "long_mscale": 1.2}},
        "phimoe",
        phimoe,
        {},
    ),
    "gpt_oss": ("gpt_oss", MODELS["gpt_oss"][2], "gpt-oss", gpt_oss, {}),
    "deepseek_v2": ("deepseek_v2", V2, "deepseek2", deepseek, {}),
    "deepseek_v2-old": ("deepseek_v2", V2, "deepseek2", deepseek, {"splits": False}),
    "deepseek_v3": ("deepseek_v3", V3, "deepseek2", deepseek, {}),
}
SPARSE = [name for name in CASES if not name.startswith("gpt2")]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Writes a family's folder and file on the first demand, and tells its oracle too."""
    root, made = tmp_path_factory.mktemp("gguf"), {}

    def get(name):
        if name not in made:
            family, values, architecture, make, options = CASES[name]
            model_class, config_class, _ = MODELS[family]
            with one_thread():
                oracle = widen(model_class(config_class(**values, attn_implementation="eager")))
            directory = root / name
            file = write_other(directory, architecture, make, oracle, **options)
            made[name] = oracle, directory / "folder", file
        return made[name]

    return get


@pytest.mark.parametrize("name", CASES)
def test_a_file_holds_what_its_folder_holds(written, name):
    _, folder, file = written(name)
    expected, found = open_huggingface(folder), open_gguf(file)
    assert found.config == expected.config
    tensors = dict(found.dense())
    assert tensors.keys() == dict(expected.dense()).keys()
    for key, tensor in expected.dense():
        torch.testing.assert_close(tensors[key], tensor, rtol=0, atol=0, msg=key)
    for layer in expected.config.moe_layers():
        pairs = list(zip(found.experts(layer), expected.experts(layer), strict=True))
        assert len(pairs) == expected.config.num_experts
        for ours, theirs in pairs:
            assert ours.keys() == theirs.keys()
            assert all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize("name", [name for name in CASES if name != "gpt2-tied"])
def test_equals_transformers(written, name):
    oracle, _, file = written(name)
    assert_equal_to_oracle(load_any(file), oracle)


@pytest.mark.parametrize("name", SPARSE)
@one_thread()
@torch.no_grad()
def test_offloaded_equals_resident(written, tmp_path, monkeypatch, name):
    file, (tokens_BS, segments_BS) = written(name)[2], ragged_prompts()
    resident = load_any(file)
    expected = resident.logits(resident.read(tokens_BS, segments_BS))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    native = prepare_experts(file, torch.float32, lambda _: None)
    blob_bytes = inspect(native)["experts"]["blob_bytes"]
    model, experts = load_offloaded(native, None, 4 * blob_bytes)
    with experts:
        assert torch.equal(model.logits(model.read(tokens_BS, segments_BS)), expected)
        assert experts.stats.evictions > 0


MXFP4_LEVELS = (0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6)


def of_mxfp4(blocks):
    """The numbers of a row of blocks, the slow way. Source: ggml's block_mxfp4."""
    result = []
    for start in range(0, len(blocks), 17):
        scale, halves = 2.0 ** (blocks[start] - 127), blocks[start + 1 : start + 17]
        codes = [byte & 15 for byte in halves] + [byte >> 4 for byte in halves]
        result += [MXFP4_LEVELS[code] * scale for code in codes]
    return result


def test_gpt_oss_in_mxfp4(tmp_path):
    model_class, config_class, values = MODELS["gpt_oss"]
    with one_thread():
        oracle = widen(model_class(config_class(**{**values, "intermediate_size": 64})))
    names = [f"blk.{i}.ffn_{part}_exps.weight" for i in range(3) for part in ("gate", "up", "down")]
    kinds = dict.fromkeys(names, Kind.MXFP4)
    file = write_other(tmp_path, "gpt-oss", gpt_oss, oracle, kinds)
    source = open_gguf(file)
    assert source.dtype == torch.bfloat16
    place = gguf.GGUFReader(file)
    stored = {tensor.name: tensor.data for tensor in place.tensors}
    parts = {"wi_0": "gate", "wi_1": "up", "wo": "down"}
    for expert, found in enumerate(source.experts("decoder-1")):
        for ours, part in parts.items():
            rows = stored[f"blk.1.ffn_{part}_exps.weight"][expert]
            expected = torch.tensor([of_mxfp4(row.tolist()) for row in rows])
            assert torch.equal(found[ours].float(), expected)


@pytest.mark.parametrize(
    ("name", "drop", "reason"),
    [
        ("gpt2", "position_embd.weight", "1 tensors missing, first transformer.wpe.weight"),
        ("deepseek_v2", "blk.1.attn_v_b.weight", "a tensor blk.1.attn_k_b.weight, which no deep"),
        ("gpt_oss", "blk.0.ffn_up_exps.bias", "a tensor blk.0.ffn_gate_exps.bias, which no gpt_"),
        ("phimoe", "blk.2.attn_norm.bias", "missing, first model.layers.2.input_layernorm.bias"),
        ("deepseek_v3", "blk.2.exp_probs_b.bias", "first model.layers.2.mlp.gate.e_score_corr"),
    ],
)
def test_a_tensor_that_is_missing(written, tmp_path, name, drop, reason):
    oracle, folder, _ = written(name)
    _, _, architecture, make, options = CASES[name]
    tensors, sizes = make(saved_state(folder), oracle.config, **options)
    del tensors[drop]
    arrays = {key: np.ascontiguousarray(array) for key, array in tensors.items()}
    file = write_gguf(tmp_path / "it.gguf", architecture, sizes, arrays)
    with pytest.raises(CheckpointError, match=reason):
        open_gguf(file)
