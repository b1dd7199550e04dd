import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from engine.checkpoint_experts import expert_layout
from engine.config import CPM2_MOE_198B
from engine.errors import ConfigError
from engine.model.quantized import (
    MAX_PACKED_ROWS,
    Int4Matrix,
    int4_fallback,
    int8_fallback,
    pack_int4,
)
from engine.quantize import group_size, quantize_int4, quantize_int8, stored_tensors
from tests.tiny import DENSE, MOE

ROOT = Path(__file__).parents[1]
KINDS = ("int8", "int4")
AVX512 = torch.backends.cpu.get_cpu_capability() == "AVX512"


def random_weight(outputs, inputs, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(outputs, inputs, generator=generator) * scale


def quantize(kind, weight, group=32):
    return quantize_int8(weight) if kind == "int8" else quantize_int4(weight, group)


# Rounding


weights = st.builds(
    random_weight,
    st.integers(1, 9),
    st.sampled_from([1, 3, 16, 100]),
    st.integers(0, 2**31),
    st.sampled_from([1e-6, 0.02, 1.0, 3e4]),
)


@settings(max_examples=100)
@given(weight=weights, is_half=st.booleans())
def test_int8_is_off_by_half_a_level_at_most(weight, is_half):
    weight = weight.bfloat16() if is_half else weight
    matrix = quantize_int8(weight)
    scale_N1 = matrix.scale_N.float().unsqueeze(1)
    assert matrix.scale_N.dtype == torch.bfloat16
    assert ((matrix.dequantize() - weight.float()).abs() <= scale_N1 * 0.50001).all()
    assert (matrix.q_NK.abs().amax(1) == 127).all()


@settings(max_examples=100)
@given(
    outputs=st.integers(1, 40).map(lambda n: 2 * n),
    groups=st.integers(1, 3),
    group=st.sampled_from([32, 64, 128]),
    seed=st.integers(0, 2**31),
    shift=st.sampled_from([0.0, 0.3, -2.0]),
)
def test_int4_takes_the_nearest_level_and_clips_to_gain(outputs, groups, group, seed, shift):
    weight = random_weight(outputs, groups * group, seed) + shift
    matrix = quantize_int4(weight, group)
    scale_NG1, zero_NG1 = matrix.scale_zero_GN2.float().transpose(0, 1).split(1, dim=-1)
    wide_NGC = weight.view(outputs, groups, group)
    levels = (torch.arange(-8, 8) * scale_NG1 + zero_NG1).unsqueeze(2)  # (N, G, 1, 16)
    best_NGC = (levels - wide_NGC.unsqueeze(-1)).abs().amin(-1)
    error_NGC = (matrix.dequantize().view(wide_NGC.shape) - wide_NGC).abs()
    torch.testing.assert_close(error_NGC, best_NGC, rtol=1e-3, atol=1e-5)
    is_inside = (wide_NGC >= levels[..., 0]) & (wide_NGC <= levels[..., -1])
    assert (error_NGC[is_inside] <= (scale_NG1 / 2 * 1.0001).expand_as(error_NGC)[is_inside]).all()
    # no worse than spreading the levels over the whole range of the group
    low, high = wide_NGC.aminmax(dim=-1, keepdim=True)
    step = ((high - low) / 15).bfloat16().float()
    zero = ((low + high) / 2 + step / 2).bfloat16().float()
    plain = ((wide_NGC - zero) / step).round().clamp(-8, 7) * step + zero
    assert error_NGC.square().sum() <= (plain - wide_NGC).square().sum() * 1.0001


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_zeros_and_of_one_value(kind):
    weight = torch.zeros(64, 64)
    weight[1] = 0.375
    weight[2] = -1e-30
    weight[3, 5] = 2.0
    matrix = quantize(kind, weight)
    torch.testing.assert_close(matrix.dequantize(), weight, rtol=0.01, atol=0.01)
    assert not matrix.dequantize()[4:].any()
    product = matrix.linear(torch.ones(1, 64, dtype=torch.bfloat16))
    torch.testing.assert_close(product.float()[0], weight.sum(1), rtol=0.02, atol=0.2)


def test_int4_does_not_lose_a_group_to_an_outlier():
    weight = random_weight(8, 128)
    weight[:, 7] = 30.0
    error = (quantize_int4(weight, 128).dequantize() - weight).abs()
    assert error.mean() < 0.6


def test_int4_bytes_are_the_same_on_every_machine():
    """Four rows of 32: three kinds of numbers without any chance in them, and one row of zeros."""
    row = (torch.arange(32) * 37 % 101 - 50) / 64
    matrix = quantize_int4(torch.stack([row, row.flip(0) * 3, row**3, torch.zeros(32)]), 32)
    assert matrix.packed.numpy().tobytes().hex() == GOLDEN_BYTES
    assert matrix.scale_zero_GN2.view(torch.int16).tolist() == GOLDEN_SCALES


GOLDEN_BYTES = (
    "5080f587ab884183e7878d8a2386c9886e8d1487ba885081f6879c893284d888"
    "8d8b2386c9886f8e0587ab884182e6879c893285d8887e8c1487ba885f8f0587"
)
GOLDEN_SCALES = [[[15819, 15691], [16024, 15896], [15735, 15607], [0, 0]]]


# Order of bytes


def test_order_of_packed_bytes():
    """As the module tells: a block of 64 outputs, then one of 32, by 2 inputs."""
    q_NK = torch.arange(96 * 2).view(96, 2).mul(7).remainder(16).to(torch.uint8)
    packed = pack_int4(q_NK).flatten().tolist()
    expected = [q_NK[j, k] + 16 * q_NK[j + 32, k] for k in range(2) for j in range(32)]
    expected += [
        q_NK[64 + 2 * j, k] + 16 * q_NK[65 + 2 * j, k] for k in range(2) for j in range(16)
    ]
    assert packed == expected


@settings(max_examples=50)
@given(outputs=st.integers(1, 110), inputs=st.integers(1, 20), seed=st.integers(0, 2**31))
def test_unpacking_gives_back_what_was_packed(outputs, inputs, seed):
    generator = torch.Generator().manual_seed(seed)
    shape = (2 * outputs, 2 * inputs)
    q_NK = torch.randint(0, 16, shape, generator=generator, dtype=torch.uint8)
    one = torch.tensor([1.0, 8.0], dtype=torch.bfloat16).expand(1, shape[0], 2)
    assert torch.equal(Int4Matrix(pack_int4(q_NK), one).dequantize(), q_NK.float())


@pytest.mark.skipif(not AVX512, reason="torch packs in this order where vectors have 512 bits")
@pytest.mark.parametrize("outputs", [16, 32, 48, 64, 80, 96, 112, 128, 160, 240])
@pytest.mark.parametrize("inputs", [32, 96, 128])
def test_order_is_that_of_torch(outputs, inputs):
    q_NK = torch.randint(0, 16, (outputs, inputs), dtype=torch.uint8)
    theirs = torch.ops.aten._convert_weight_to_int4pack_for_cpu(q_NK.int(), 1)
    assert torch.equal(pack_int4(q_NK), theirs)


# Products


@settings(max_examples=60)
@given(
    kind=st.sampled_from(KINDS),
    outputs=st.integers(1, 9).map(lambda n: 32 * n),
    inputs=st.integers(1, 4).map(lambda n: 32 * n),
    rows=st.sampled_from([1, 2, 5, 16, 17, 64, 65]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 2**31),
)
def test_product_is_that_of_the_dequantised_matrix(kind, outputs, inputs, rows, dtype, seed):
    matrix = quantize(kind, random_weight(outputs, inputs, seed, inputs**-0.5))
    x = random_weight(rows, inputs, seed + 1).to(dtype)
    product = matrix.linear(x)
    expected = F.linear(x.float(), matrix.dequantize())
    assert product.dtype == dtype
    torch.testing.assert_close(product.float(), expected, rtol=0.02, atol=0.03)
    assert matrix.dequantize(dtype).dtype == dtype


@pytest.mark.parametrize("kind", KINDS)
def test_few_and_many_rows_agree(kind):
    matrix = quantize(kind, random_weight(96, 128, scale=128**-0.5))
    limit = MAX_PACKED_ROWS[kind]
    x = random_weight(limit + 1, 128).bfloat16()
    few, many = matrix.linear(x[:limit]), matrix.linear(x)[:limit]
    torch.testing.assert_close(few.float(), many.float(), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("kind", KINDS)
def test_scales_too_small_for_fp16_are_kept(kind):
    weight = random_weight(64, 64, scale=1e-6)
    x = random_weight(70, 64).half() * 1000
    expected = F.linear(x.float(), weight)
    error = quantize(kind, weight).linear(x).float() - expected
    assert error.norm() < 0.12 * expected.norm()


def test_a_product_that_overflows_fp16_on_the_way_is_right():
    weight = torch.full((32, 64), 1e-3)
    x = torch.full((40, 64), 1000.0, dtype=torch.float16)
    assert (quantize_int8(weight).linear(x) - 64.0).abs().max() < 1


@pytest.mark.skipif(not AVX512, reason="on other processors int4 falls back")
def test_nothing_falls_back_here():
    assert int8_fallback() is None
    assert int4_fallback() is None


FALLBACK = """
import torch, logging
from tests.test_engine_quantize import *
print(int4_fallback(), int4_fallback(), sep="\\n")
matrix = quantize_int4(random_weight(96, 64), 32)
x = random_weight(3, 64).bfloat16()
torch.testing.assert_close(
    matrix.linear(x).float(), F.linear(x.float(), matrix.dequantize()), rtol=0.02, atol=0.1
)
"""


def test_another_order_of_torch_is_found_out():
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": "default"}
    command = [sys.executable, "-c", FALLBACK]
    run = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    reason = "torch packs them in another order on this CPU (DEFAULT)"
    assert run.stdout == f"{reason}\n{reason}\n"
    warning = f"int4 experts are dequantised for every product: {reason}"
    assert run.stderr.count(warning) == 1


@pytest.fixture
def probing():
    """Lets the probes run again, and forgets what they found."""
    for probe in (int8_fallback, int4_fallback):
        probe.cache_clear()
    yield
    for probe in (int8_fallback, int4_fallback):
        probe.cache_clear()


def refuse(*_):
    raise NotImplementedError("not on this backend")


@pytest.mark.parametrize(
    ("operation", "replacement", "probe", "reason"),
    [
        ("_weight_int8pack_mm", refuse, int8_fallback, "does not multiply them: not on this"),
        ("_convert_weight_to_int4pack_for_cpu", refuse, int4_fallback, "does not pack them: not"),
        (
            "_weight_int8pack_mm",
            lambda x, q, scale: F.linear(x, q.to(x.dtype)),
            int8_fallback,
            "torch's packed product is wrong",
        ),
    ],
)
def test_a_torch_that_cannot_is_found_out(
    monkeypatch, probing, caplog, operation, replacement, probe, reason
):
    monkeypatch.setattr(torch.ops.aten, operation, replacement)
    assert reason in probe()
    assert reason in caplog.text
    assert probe() is not None
    assert caplog.text.count(reason) == 1
    x = random_weight(2, 64).bfloat16()
    for kind in KINDS:
        matrix = quantize(kind, random_weight(32, 64, scale=0.1))
        expected = F.linear(x.float(), matrix.dequantize())
        torch.testing.assert_close(matrix.linear(x).float(), expected, rtol=0.02, atol=0.02)


# Sizes


def test_sizes_that_cannot_be():
    for config, kind, message in [
        (replace(MOE, d_ff=40), "int8", "d_ff is 40; int8 experts need .* multiples of 16"),
        (replace(MOE, d_model=24), "int8", "d_model is 24; int8 experts"),
        (MOE, "int4", "d_ff is 48; int4 experts need d_model and d_ff that are multiples of 32"),
        (DENSE, "int8", "the model is dense; it has no experts to be stored as int8"),
    ]:
        with pytest.raises(ConfigError, match=message):
            expert_layout(config, torch.bfloat16, kind)


@pytest.mark.parametrize(
    ("d_model", "d_ff", "group"), [(4096, 10240, 128), (192, 256, 64), (160, 256, 32)]
)
def test_group_size_fits_both_widths(d_model, d_ff, group):
    assert group_size(replace(MOE, d_model=d_model, d_ff=d_ff)) == group


def test_what_is_stored():
    assert stored_tensors(CPM2_MOE_198B, "F16", "int8") == {
        "norm": ("F16", (4096,)),
        "wi_0": ("I8", (10240, 4096)),
        "wi_0_scale": ("BF16", (10240,)),
        "wi_1": ("I8", (10240, 4096)),
        "wi_1_scale": ("BF16", (10240,)),
        "wo": ("I8", (4096, 10240)),
        "wo_scale": ("BF16", (4096,)),
    }
    int4 = stored_tensors(CPM2_MOE_198B, "F16", "int4")
    assert int4["wo"] == ("U8", (4096, 5120))
    assert int4["wo_scale_zero"] == ("BF16", (80, 4096, 2))
    assert expert_layout(CPM2_MOE_198B, torch.float16, "int4").blob_bytes == 66_854_912


@pytest.mark.parametrize("kind", KINDS)
def test_matrices_of_any_source_dtype_and_order(kind):
    weight = random_weight(64, 96)
    for same in (weight.double(), weight.T.contiguous().T):
        assert torch.equal(quantize(kind, same).dequantize(), quantize(kind, weight).dequantize())
    half = weight.half()
    expected = quantize(kind, half.float()).dequantize()
    assert torch.equal(quantize(kind, half).dequantize(), expected)
