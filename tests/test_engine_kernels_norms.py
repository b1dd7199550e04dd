"""Norms, and numbers as weights and caches store them."""

import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("numba")

from engine.kernels.memory import add_stored, multiply_by, store, stored
from engine.kernels.norms import LAYER, normalize, scale
from engine.kernels.ops import BF16, FP32

KINDS = {torch.bfloat16: BF16, torch.float32: FP32}
RMS, EPS, GAP = 1, 1e-5, 3


def weights(count, dtype, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, generator=generator).to(dtype)


def normed(x, norm, weight, bias=None, eps=EPS):
    out = torch.full((len(x) + GAP,), 7.0)
    before, kind = x.clone(), KINDS[weight.dtype]
    bias_at = 0 if bias is None else bias.data_ptr()
    normalize(x.data_ptr(), out.data_ptr(), len(x), norm, weight.data_ptr(), bias_at, kind, eps)
    assert torch.equal(x.view(torch.int32), before.view(torch.int32))  # NaN as well
    assert (out[-GAP:] == 7).all()
    return out[:-GAP]


@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize("count", [1, 5, 16, 33, 576])
def test_norms_equal_torch(dtype, count):
    x = 3 * weights(count, torch.float32, seed=2) + 1
    weight, bias = weights(count, dtype), weights(count, dtype, seed=3)
    wide = x.double(), (count,)
    expected = F.rms_norm(*wide, weight.double(), EPS).float()
    torch.testing.assert_close(normed(x, RMS, weight), expected, rtol=1e-5, atol=1e-5)
    scale(x.data_ptr(), count, weight.data_ptr(), KINDS[dtype], EPS)
    torch.testing.assert_close(x, expected, rtol=1e-5, atol=1e-5)
    x = 3 * weights(count, torch.float32, seed=2) + 1
    for own in (None, bias):
        wider = None if own is None else own.double()
        expected = F.layer_norm(x.double(), (count,), weight.double(), wider, EPS).float()
        torch.testing.assert_close(normed(x, LAYER, weight, own), expected, rtol=1e-4, atol=1e-4)


def test_norms_of_odd_rows():
    ones = torch.ones(20)
    assert not normed(torch.zeros(20), RMS, ones).any()
    assert not normed(torch.full((20,), 5.0), LAYER, ones).any()
    assert normed(torch.full((20,), torch.nan), RMS, ones).isnan().all()
    assert normed(torch.full((20,), torch.inf), RMS, ones).isnan().all()
    assert not normed(torch.full((20,), 1e30), RMS, ones).any()  # as torch: the square is infinite


def as_stored(x, dtype):
    out = torch.full((len(x) + GAP,), 7.0, dtype=dtype)
    store(x.data_ptr(), len(x), out.data_ptr(), KINDS[dtype])
    assert (out[-GAP:] == 7).all()
    return out[:-GAP]


def test_numbers_are_rounded_to_bf16_as_torch_does():
    generator = torch.Generator().manual_seed(1)
    bits = torch.randint(-(2**31), 2**31, (50_000,), generator=generator)
    ties = torch.arange(-(2**15), 2**15).repeat_interleave(3) << 16
    ties += torch.tensor([0x7FFF, 0x8000, 0x8001]).repeat(2**16)
    x = torch.cat([bits, ties]).to(torch.int32).view(torch.float32)
    found, expected = as_stored(x, torch.bfloat16), x.bfloat16()
    is_nan = x.isnan()
    assert 0 < is_nan.sum() < len(x)
    assert found[is_nan].isnan().all()
    assert torch.equal(found[~is_nan].view(torch.int16), expected[~is_nan].view(torch.int16))
    assert (x.abs() < torch.finfo().tiny).sum() > 100  # subnormal ones as well
    assert (found.isinf() & x.isfinite()).any()  # and what is rounded up to infinity
    whole = as_stored(x, torch.float32)
    assert torch.equal(whole.view(torch.int32), x.view(torch.int32))


@pytest.mark.parametrize("dtype", KINDS)
def test_stored_numbers_are_read_as_they_are(dtype):
    kind = KINDS[dtype]
    other = torch.cat([weights(30, dtype), torch.tensor([1e-40, -0.0, 3e38, torch.inf]).to(dtype)])
    for i in (0, 7, 33):
        assert stored(other.data_ptr(), kind, i) == other[i].item()
    x = weights(34, torch.float32, seed=4)
    added, times = x.clone(), x.clone()
    add_stored(added.data_ptr(), 34, other.data_ptr(), kind)
    assert torch.equal(added, x + other.float())
    multiply_by(times.data_ptr(), 34, 0.5, other.data_ptr(), kind)
    assert torch.equal(times, x * 0.5 * other.float())
