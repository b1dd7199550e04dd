"""Exponentials and activations of vectors against torch in double precision."""

import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("numba")

from engine.kernels.compiled import compiled
from engine.kernels.curves import ACTIVATIONS, activate, exponentials, largest

COUNTS = (1, 15, 16, 17, 31, 32, 37, 64)
GAP = 3


@compiled
def call_largest(x: int, count: int, least: float) -> float:
    return largest(x, count, least)


@compiled
def call_exponentials(x: int, count: int, shift: float) -> float:
    return exponentials(x, count, shift)


def clamped_swiglu(x, gate=None):
    x = x.clamp(max=7.0)
    made = x * torch.sigmoid(1.702 * x)
    return made if gate is None else made * (gate.clamp(-7.0, 7.0) + 1)


PLAIN = {
    "relu": F.relu,
    "silu": F.silu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "gelu": F.gelu,
}


def expect(name, x, gate=None):
    if name == "clamped_swiglu":
        return clamped_swiglu(x, gate)
    return PLAIN[name](x) if gate is None else PLAIN[name](x) * gate


def apply(name, x, gate=None):
    """Activate a copy; behind it is a gap that must stay as it is."""
    room = torch.cat([x, torch.full((GAP,), 7.0)])
    number = ACTIVATIONS.index(name) + 1
    activate(number, room.data_ptr(), 0 if gate is None else gate.data_ptr(), len(x))
    assert (room[-GAP:] == 7).all()
    return room[:-GAP]


def numbers(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return 5 * torch.randn(count, generator=generator)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_equal_torch(name):
    for count in COUNTS:
        x, gate = numbers(count), numbers(count, seed=1)
        expected = expect(name, x.double()).float()
        torch.testing.assert_close(apply(name, x), expected, rtol=2e-6, atol=1e-6)
        expected = expect(name, x.double(), gate.double()).float()
        torch.testing.assert_close(apply(name, x, gate), expected, rtol=2e-6, atol=1e-5)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_of_what_is_huge_tiny_or_not_finite(name):
    sizes = torch.tensor([0.0, 1e-45, 1e-38, 1e-20, 7.0, 20.0, 87.0, 89.0, 104.0, 1e4, 1e18, 3e38])
    x = torch.cat([sizes, -sizes])
    found, expected = apply(name, x), expect(name, x.double()).float()
    assert found.isfinite().all()
    assert ((found - expected).abs() <= 3e-7 * x.abs()).all()
    found = apply(name, torch.tensor([torch.nan, torch.inf, 1.0]))
    assert found[0].isnan()
    assert found[1] == torch.inf or name == "clamped_swiglu"
    assert found[2] == apply(name, torch.ones(1))[0]
    assert not apply(name, torch.tensor([-torch.inf])).nan_to_num(0.0, neginf=0.0).any()


def test_a_gate_that_is_not_finite_spoils_its_own_number_only():
    x, gate = torch.full((20,), 2.0), torch.ones(20)
    gate[3], gate[17] = torch.nan, torch.inf
    found = apply("silu", x, gate)
    assert found[3].isnan()
    assert found[17] == torch.inf
    assert len(found[[i for i in range(20) if i not in (3, 17)]].unique()) == 1


def test_exponentials_equal_torch_and_are_summed():
    for count in COUNTS:
        x = -numbers(count).abs() * 6
        room = torch.cat([x, torch.full((GAP,), 7.0)])
        total = call_exponentials(room.data_ptr(), count, 0.5)
        expected = torch.exp(x.double() - 0.5)
        assert total == pytest.approx(expected.sum().item(), rel=1e-6)
        torch.testing.assert_close(room[:-GAP], expected.float(), rtol=5e-6, atol=1e-37)
        assert (room[-GAP:] == 7).all()


def test_exponentials_are_right_to_the_last_places():
    x = torch.linspace(-87, 0, 4001)
    made = x.clone()
    call_exponentials(made.data_ptr(), len(made), 0.0)
    expected = torch.exp(x.double())
    assert ((made - expected).abs() <= 2.5e-7 * expected).all()
    assert made[-1] == 1


def test_exponentials_of_what_is_not_finite():
    x = torch.tensor([0.0, -torch.inf, -1e30, torch.nan])
    total = call_exponentials(x.data_ptr(), 3, 0.0)
    assert total == 1
    assert x[0] == 1
    assert (x[1:3] < 2e-38).all()
    assert torch.tensor(call_exponentials(x.data_ptr(), 4, 0.0)).isnan()
    assert x[3].isnan()
    nothing_else = torch.full((2,), -torch.inf)  # no score at all: no share either
    assert torch.tensor(call_exponentials(nothing_else.data_ptr(), 2, -torch.inf)).isnan()


def test_largest():
    for count in COUNTS:
        x = numbers(count, seed=count)
        assert call_largest(x.data_ptr(), count, -torch.inf) == x.max()
        assert call_largest(x.data_ptr(), count, 1e9) == 1e9
        x[count // 2] = torch.inf
        assert call_largest(x.data_ptr(), count, 0.0) == torch.inf
    assert call_largest(0, 0, 3.0) == 3
    x = torch.full((20,), -torch.inf)
    assert call_largest(x.data_ptr(), 20, -torch.inf) == -torch.inf
    x[1], x[18] = torch.nan, -5.0
    assert call_largest(x.data_ptr(), 20, -torch.inf) == -5
