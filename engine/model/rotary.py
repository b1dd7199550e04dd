"""Rotary positions: pairs of numbers of queries and keys, turned by an angle per position.

Shape letters: B rows, T positions, H heads, K head width, R half of the width that turns.
"""

import math
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from engine.config_parts import Rotary

TABLE_STEP = 256  # positions by which a table grows, so that it is the same however it grew


class Turn(NamedTuple):
    """Cosine and sine (B, 1, T, R) of the positions of queries and new keys."""

    cos: Tensor
    sin: Tensor


class RotaryTable:
    """Cosines and sines of positions, made once for as many as were asked for."""

    def __init__(self, rotary: Rotary) -> None:
        self._rotary = rotary
        self._tables: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def turn(self, position_BT: Tensor, longest: int, dtype: torch.dtype) -> Turn:
        """The turn of positions, all below `longest`."""
        key = (position_BT.device, dtype)
        table_2PR = self._tables.get(key)
        if table_2PR is None or table_2PR.shape[1] < longest:
            size = -(-longest // TABLE_STEP) * TABLE_STEP
            with torch.inference_mode(mode=False):  # training may use it as well
                table_2PR = make_table(self._rotary, size).to(key[0], key[1])
            self._tables[key] = table_2PR
        cos_BTR, sin_BTR = table_2PR[:, position_BT]
        return Turn(cos_BTR.unsqueeze(1), sin_BTR.unsqueeze(1))


def make_table(rotary: Rotary, num_positions: int) -> Tensor:
    """Cosines and sines (2, P, R) in fp32."""
    frequency_R = frequencies(rotary)
    parts = []
    for positions in torch.split(torch.arange(num_positions).float(), TABLE_STEP):
        angle = positions.unsqueeze(1) * frequency_R
        parts.append(torch.stack([angle.cos(), angle.sin()]) * rotary.attention_factor)
    return torch.cat(parts, 1)


@lru_cache(maxsize=8)
def frequencies(rotary: Rotary) -> Tensor:
    """Angle per position of each pair, (R,), fp32, as `Rotary.kind` scales them.

    Source: see `Rotary`.
    """
    exponent_R = torch.arange(0, rotary.width, 2).float() / rotary.width
    plain_R: Tensor = 1.0 / (rotary.theta**exponent_R)
    if rotary.kind == "linear":
        return plain_R / rotary.factor
    if rotary.kind == "longrope":
        return 1.0 / (torch.tensor(rotary.divisors) * rotary.theta**exponent_R)
    if rotary.kind == "llama3":
        return _llama3(rotary, plain_R)
    return _yarn(rotary, plain_R) if rotary.kind == "yarn" else plain_R


def _llama3(rotary: Rotary, plain_R: Tensor) -> Tensor:
    """Long waves are stretched, short ones not, those between in part."""
    wavelength_R = 2 * math.pi / plain_R
    original = rotary.original_positions
    longest, shortest = original / rotary.low_factor, original / rotary.high_factor
    share_R = (original / wavelength_R - rotary.low_factor) / (
        rotary.high_factor - rotary.low_factor
    )
    between_R = (1 - share_R) * plain_R / rotary.factor + share_R * plain_R
    stretched_R = torch.where(wavelength_R > longest, plain_R / rotary.factor, plain_R)
    is_between_R = (wavelength_R >= shortest) & (wavelength_R <= longest)
    return torch.where(is_between_R, between_R, stretched_R)


def _yarn(rotary: Rotary, plain_R: Tensor) -> Tensor:
    """Waves that turned less than `beta_slow` times in training are stretched, a ramp between."""

    def dimension(turns: float) -> float:
        positions = rotary.original_positions / (turns * 2 * math.pi)
        return rotary.width * math.log(positions) / (2 * math.log(rotary.theta))

    low, high = dimension(rotary.beta_fast), dimension(rotary.beta_slow)
    if rotary.truncates:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotary.width - 1)
    if low == high:
        high += 0.001  # as the definition has it, against a division by nought
    ramp_R = ((torch.arange(rotary.width // 2).float() - low) / (high - low)).clamp(0, 1)
    return plain_R / rotary.factor * ramp_R + plain_R * (1 - ramp_R)


def rotate(x_BHTK: Tensor, turn: Turn) -> Tensor:
    """Turn the first 2 R numbers of each head; what is beyond stays."""
    half = turn.cos.shape[-1]
    widths = [half, half, x_BHTK.shape[-1] - 2 * half]
    first, second, rest = torch.split(x_BHTK, widths, -1)
    parts = [first * turn.cos - second * turn.sin, second * turn.cos + first * turn.sin]
    return torch.cat([*parts, rest] if rest.shape[-1] else parts, -1)
