"""What queries may see: as a bias, or made part by part where it would be as wide as it is long.

Shape letters: B rows, T queries, P positions read before, S keys.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

MASK_QUERIES = 512  # whose mask is made at once


def mask_bias(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """Additive mask: 0 where visible, else the lowest finite number (no NaN in a row of no key)."""
    return torch.zeros_like(visible, dtype=dtype).masked_fill_(~visible, torch.finfo(dtype).min)


class CausalMask(NamedTuple):
    """Queries of whole rows see the keys before them in their document, `window` of them or all.

    With a past, `past` keys stand in front, of which row b sees the first `past_B[b]`.
    """

    segments_BS: Tensor
    position_BS: Tensor
    past_B: Tensor | None
    past: int
    window: int
    dtype: torch.dtype

    @property
    def num_queries(self) -> int:
        """Queries of a row."""
        return self.segments_BS.shape[1]

    def of_row(self, row: int, length: int) -> "CausalMask":
        """The mask of the first queries of one row."""
        here = slice(row, row + 1)
        segments, position = self.segments_BS[here, :length], self.position_BS[here, :length]
        past_B = None if self.past_B is None else self.past_B[here]
        return self._replace(segments_BS=segments, position_BS=position, past_B=past_B)

    def parts(self) -> Iterator[tuple[slice, int, Tensor]]:
        """Queries, how many keys they have at most, and their bias (B, 1, T, S), in order."""
        for begin in range(0, self.num_queries, MASK_QUERIES):
            some = slice(begin, min(begin + MASK_QUERIES, self.num_queries))
            yield some, self.past + some.stop, self.bias(some)

    def bias(self, some: slice) -> Tensor:
        """The bias of some queries (B, 1, T, S) for the keys up to the last of them."""
        position_BT1 = self.position_BS[:, some].unsqueeze(2)
        back_BTS = position_BT1 - self.position_BS[:, None, : some.stop]
        visible_BTS = back_BTS >= 0
        segments_BT1 = self.segments_BS[:, some].unsqueeze(2)
        visible_BTS &= segments_BT1 == self.segments_BS[:, None, : some.stop]
        if self.window:
            visible_BTS &= back_BTS < self.window
        if self.past_B is not None:
            visible_BTS = torch.cat([self._past_visible(position_BT1), visible_BTS], 2)
        return mask_bias(visible_BTS.unsqueeze(1), self.dtype)

    def _past_visible(self, position_BT1: Tensor) -> Tensor:
        assert self.past_B is not None
        key_P = torch.arange(self.past, device=position_BT1.device)
        visible_BTP = (key_P < self.past_B.view(-1, 1, 1)).expand(-1, position_BT1.shape[1], -1)
        return visible_BTP & (position_BT1 - key_P < self.window) if self.window else visible_BTP
