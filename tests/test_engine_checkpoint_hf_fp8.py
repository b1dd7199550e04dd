"""Hugging Face directories whose weights are fp8 by blocks, against the numbers that they hold."""

import pytest
import torch
from transformers import DeepseekV3ForCausalLM, FineGrainedFP8Config

from engine.checkpoint import load_model
from engine.checkpoint_any import load_any
from engine.checkpoint_hf import open_huggingface
from engine.checkpoint_hf_fp8 import dequantize_fp8
from engine.convert import convert, inspect
from engine.errors import CheckpointError
from engine.experts import load_offloaded
from tests.hf_families import assert_equal_to_oracle, make_oracle, ragged_prompts
from tests.t5_oracle import one_thread
from tests.test_engine_checkpoint_hf import change_config, change_tensors

FP8 = torch.float8_e4m3fn
SCALES = "_scale_inv"
LARGEST = 448.0
KEPT = ("embed_tokens", "lm_head", "mlp.gate.")  # which are released in bf16


def each_block(weight, block):
    """The blocks of a matrix, those at its edges smaller, and where they are."""
    for i, top in enumerate(range(0, weight.shape[0], block[0])):
        for j, left in enumerate(range(0, weight.shape[1], block[1])):
            yield (i, j), weight[top : top + block[0], left : left + block[1]]


def quantise(tensors, block, scale_dtype):
    """Put fp8 in the place of matrices, the slow way; returns what they then are, in fp32."""
    exact = {}
    for key in [*tensors]:
        if tensors[key].ndim != 2 or any(part in key for part in KEPT):
            continue
        weight = tensors[key].clone()
        grid = [-(-size // step) for size, step in zip(weight.shape, block, strict=True)]
        scales, rounded = torch.empty(grid), torch.empty(weight.shape, dtype=FP8)
        places = each_block(rounded, block)
        for (place, part), (_, target) in zip(each_block(weight, block), places, strict=True):
            scale = (part.abs().max() / LARGEST).log2().ceil().exp2()
            scales[place] = scale
            target.copy_((part / scale).to(FP8))
            part.copy_(target.float() * scale)
        exact[key] = weight
        tensors |= {key: rounded, key + SCALES: scales.to(scale_dtype)}
    return exact


def write(directory, name, block, scale_dtype=torch.float32):
    """A family's directory with fp8 weights, and transformers' model of the same numbers."""
    oracle = make_oracle(name)
    oracle.save_pretrained(directory)
    exact = {}
    change_tensors(directory, lambda tensors: exact.update(quantise(tensors, block, scale_dtype)))
    quantization = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [*block]}
    change_config(directory, quantization_config={**quantization, "activation_scheme": "dynamic"})
    plain = directory.with_name(f"{directory.name}-plain")
    oracle.save_pretrained(plain)
    change_tensors(plain, lambda tensors: tensors.update(exact))
    return type(oracle).from_pretrained(plain).eval()


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """A DeepSeek-V3 in blocks that do not divide its matrices, and what it holds."""
    directory = tmp_path_factory.mktemp("fp8") / "m"
    return write(directory, "deepseek_v3", (7, 10)), directory


def test_deepseek_v3_equals_transformers_with_the_same_numbers(released):
    oracle, directory = released
    source = open_huggingface(directory)
    assert source.dtype == torch.float32  # that of the embedding
    assert_equal_to_oracle(load_any(directory, torch.float32), oracle)


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16])
def test_equals_what_transformers_reads(tmp_path, scale_dtype):
    write(tmp_path / "m", "deepseek_v3", (4, 2), scale_dtype)  # it reads whole blocks only
    config = FineGrainedFP8Config(weight_block_size=(4, 2), dequantize=True)
    oracle = DeepseekV3ForCausalLM.from_pretrained(
        tmp_path / "m", dtype=torch.float32, quantization_config=config
    )
    assert_equal_to_oracle(load_any(tmp_path / "m", torch.float32), oracle.eval())


@pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
def test_other_families(tmp_path, name):
    oracle = write(tmp_path / "m", name, (16, 16))
    assert_equal_to_oracle(load_any(tmp_path / "m", torch.float32), oracle)


@one_thread()
@torch.no_grad()
def test_offloaded_equals_resident(released, tmp_path):
    tokens_BS, segments_BS = ragged_prompts()
    resident = load_any(released[1], torch.bfloat16)
    expected = resident.logits(resident.read(tokens_BS, segments_BS))
    convert(released[1], tmp_path / "native", torch.bfloat16)
    stored = load_model(tmp_path / "native")
    assert torch.equal(stored.logits(stored.read(tokens_BS, segments_BS)), expected)
    blob_bytes = inspect(tmp_path / "native")["experts"]["blob_bytes"]
    model, experts = load_offloaded(tmp_path / "native", None, 4 * blob_bytes)
    with experts:
        assert torch.equal(model.logits(model.read(tokens_BS, segments_BS)), expected)
        assert experts.stats.evictions > 0


@pytest.mark.parametrize("shape", [(1, 1), (256, 128), (130, 300), (5, 129)])
def test_dequantised_block_by_block(shape):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator).to(FP8)
    scales = torch.rand(-(-shape[0] // 128), -(-shape[1] // 128), generator=generator)
    expected = weight.float()
    for place, part in each_block(expected, (128, 128)):
        part.mul_(scales[place])
    assert torch.equal(dequantize_fp8(weight, scales, (128, 128)), expected)


def test_a_block_larger_than_the_matrix():
    weight, scales = torch.ones(3, 5).to(FP8), torch.full((1, 1), 0.5)
    assert torch.equal(dequantize_fp8(weight, scales, (2**60, 2**60)), torch.full((3, 5), 0.5))


ROUTED = "model.layers.1.mlp.experts.0.up_proj.weight"


@pytest.mark.parametrize(
    ("key", "tensor", "message"),
    [
        (ROUTED + SCALES, torch.ones(4, 3), r"inv has shape \[4, 3\], expected \[4, 4\]"),
        (ROUTED + SCALES, torch.ones(4, 4, dtype=torch.int32), "is torch.int32, expected one of"),
        (ROUTED + SCALES, None, r"up_proj.weight is torch.float8_e4m3fn, expected one of float64"),
        (ROUTED + SCALES, torch.full((4, 4), torch.nan), "up_proj.weight or its scales hold what"),
        (ROUTED + SCALES, torch.full((4, 4), torch.inf), "up_proj.weight or its scales hold what"),
        (ROUTED, torch.full((24, 32), torch.nan).to(FP8), "up_proj.weight or its scales hold what"),
        (ROUTED + SCALES, torch.ones(0, 4), r"inv has shape \[0, 4\], expected \[4, 4\]"),
        (ROUTED, torch.ones(24, 32), r"up_proj.weight is torch.float32, expected torch.float8_e4m"),
        ("model.norm.weight" + SCALES, torch.ones(1), r"norm.weight has scales, and shape \[32\]"),
        ("model.norm.bias" + SCALES, torch.ones(1), "does not have, first model.norm.bias_scale"),
    ],
)
def test_weights_and_scales_that_do_not_fit(tmp_path, key, tensor, message):
    write(tmp_path / "m", "deepseek_v3", (7, 10))

    def change(tensors):
        tensors.pop(key, None) if tensor is None else tensors.update({key: tensor})

    change_tensors(tmp_path / "m", change)
    with pytest.raises(CheckpointError, match=message):
        load_any(tmp_path / "m")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fmt": "e5m2"}, "format 'e5m2' are not supported; e4m3 are"),
        ({"weight_block_size": None}, "weight_block_size None are not supported; it must be two"),
        ({"weight_block_size": [128]}, r"weight_block_size \[128\] are not supported"),
        ({"weight_block_size": [0, 128]}, r"is \[0, 128\]; it must be at least 1 by 1"),
        ({"weight_block_size": "x"}, "weight_block_size is 'x'; expected a list of int"),
    ],
)
def test_other_kinds_of_fp8_are_refused(tmp_path, change, message):
    make_oracle("llama").save_pretrained(tmp_path)
    told = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128], **change}
    change_config(tmp_path, quantization_config=told)
    with pytest.raises(CheckpointError, match=message):
        open_huggingface(tmp_path)
