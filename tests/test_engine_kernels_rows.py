"""Sweeps of few rows through kernels, against torch."""

from dataclasses import replace

import pytest
import torch

from tests.tiny import DENSE, random_ids, tiny_model

pytest.importorskip("numba")

from engine.kernels.attach import attach_kernels
from engine.kernels.rows import MOST_ROWS, RowProducts

ENCODER = DENSE
DECODER = replace(
    DENSE,
    num_encoder_layers=0,
    positions="learned",
    max_positions=64,
    continuation_sentinel=None,
    norm="layer",
    norm_bias=True,
    qkv_bias=True,
    out_bias=True,
    ff_bias=True,
    gated=False,
)


class Counting(RowProducts):
    """Notes of how many rows each product was."""

    def __init__(self, config):
        super().__init__(config)
        self.rows = []

    def _run(self, builder, rows):
        self.rows.append(rows)
        super()._run(builder, rows)


def pair_of(config, dtype=torch.float32):
    """The same model with kernels for rows, and without; and what notes their use."""
    plain, fast = tiny_model(config).to(dtype), tiny_model(config).to(dtype)
    assert all(map(torch.equal, plain.parameters(), fast.parameters()))
    assert attach_kernels(fast)
    counting = Counting(config)
    for module in fast.modules():
        if isinstance(getattr(module, "kernels", None), RowProducts):
            module.kernels = counting
    return plain, fast, counting


@pytest.mark.parametrize("config", [ENCODER, DECODER], ids=["encoder", "decoder"])
def test_a_sweep_equals_torch(config):
    plain, fast, counting = pair_of(config)
    ids = random_ids(3, 17)
    segments = torch.ones_like(ids)
    segments[1, 9:] = 0
    with torch.inference_mode():
        expected, made = (model.encode(ids, segments) for model in (plain, fast))
    real = segments > 0
    torch.testing.assert_close(made[real], expected[real], rtol=1e-4, atol=1e-4)
    assert made.dtype == expected.dtype
    assert counting.rows  # it was for these
    assert set(counting.rows) <= {3 * 17, int(real.sum())}


def test_bf16_stays_bf16():
    plain, fast, counting = pair_of(ENCODER, torch.bfloat16)
    ids = random_ids(2, 9)
    with torch.inference_mode():
        expected, made = (model.encode(ids, torch.ones_like(ids)) for model in (plain, fast))
    assert made.dtype == torch.bfloat16
    assert counting.rows
    torch.testing.assert_close(made, expected, rtol=0.1, atol=0.1)


def test_many_rows_and_training_are_left_to_torch():
    plain, fast, counting = pair_of(ENCODER)
    ids = random_ids(1, MOST_ROWS + 1)
    with torch.inference_mode():
        expected, made = (model.encode(ids, torch.ones_like(ids)) for model in (plain, fast))
    assert torch.equal(made, expected)
    few = random_ids(1, 5)
    fast.encode(few, torch.ones_like(few)).sum().backward()
    assert fast.encoder.blocks()[0].self_attention.qkv.weight.grad is not None
    assert not counting.rows
