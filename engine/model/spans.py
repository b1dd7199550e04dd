"""Attention in which each row is computed at its own length, whoever is in the batch beside it.

Shape letters: B rows, T queries, S keys, H heads, K head width.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from engine.model.masks import CausalMask

SPAN_STEP = 64  # keys to which a length is rounded up, so that rows of like length go together

Attend = Callable[[Tensor, Tensor, Tensor, Tensor | CausalMask], Tensor]


class Span(NamedTuple):
    """Neighbouring rows that attend together: their first queries and keys, and their bias."""

    rows: slice
    queries: int
    keys: int
    bias: Tensor | CausalMask


def make_spans(
    bias: Tensor, queries: Sequence[int], keys: Sequence[int], *, together: bool = False
) -> list[Span]:
    """Spans of rows with so many queries and keys; the bias (B or 1, H or 1, T, S) is shared out.

    `together`: neighbours of the same lengths make one span. Keys beyond the bias are masked.
    """
    spans, begin, lowest = list[Span](), 0, torch.finfo(bias.dtype).min
    while begin < len(keys):
        end, shape = begin + 1, (queries[begin], keys[begin])
        while together and end < len(keys) and (queries[end], keys[end]) == shape:
            end += 1
        rows = slice(begin, end)
        part = (bias if len(bias) == 1 else bias[rows])[:, :, : shape[0], : shape[1]]
        part = F.pad(part, (0, shape[1] - part.shape[-1]), value=lowest)
        spans.append(Span(rows, *shape, part.contiguous()))
        begin = end
    return spans


def round_up_keys(length: int) -> int:
    """The keys that a row of that length attends to, the last of them masked: 65 -> 128."""
    return -(-length // SPAN_STEP) * SPAN_STEP


def attend_spans(
    attend: Attend, q_BHTK: Tensor, k_BHSK: Tensor, v_BHSK: Tensor, spans: list[Span]
) -> Tensor:
    """Attention (B, T, H*K), span by span; zeros at the queries that are in none."""
    rows, heads, length, width = q_BHTK.shape
    out_BTI = q_BHTK.new_zeros(rows, length, heads * width)
    for span in spans:
        out_BTI[span.rows, : span.queries] = attend(
            q_BHTK[span.rows, :, : span.queries],
            _first_keys(k_BHSK[span.rows], span.keys),
            _first_keys(v_BHSK[span.rows], span.keys),
            span.bias,
        )
    return out_BTI


def _first_keys(keys_BHSK: Tensor, count: int) -> Tensor:
    missing = count - keys_BHSK.shape[2]
    return keys_BHSK[:, :, :count] if missing <= 0 else F.pad(keys_BHSK, (0, 0, 0, missing))
