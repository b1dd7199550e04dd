"""What a decoder-only model has read: keys and values of all its layers, in the encoder's place.

It goes where the output of an encoder goes: into caches, beside others with padding, and cut to its
length. Shape letters: B rows, S positions, L layers, H heads of keys and values, K head width.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from engine.config import ModelConfig


class Context:
    """The keys and values of a pass, written layer by layer.

    Where gradients are kept they are joined at the end: behind writing in place autograd would copy
    the gradient of all layers for each.
    """

    def __init__(self, config: ModelConfig, x_BSD: Tensor) -> None:
        shape = (config.num_decoder_layers, 2, config.kv_heads, config.d_kv)
        self._kept = x_BSD.new_empty(*x_BSD.shape[:2], *shape)
        self._parts: list[Tensor] = []

    def write(self, layer: int, k_BHSK: Tensor, v_BHSK: Tensor) -> None:
        """Keep the keys and values of a layer, of each in turn."""
        if torch.is_grad_enabled():
            self._parts += [k_BHSK.transpose(1, 2), v_BHSK.transpose(1, 2)]
            return
        self._kept[:, :, layer, 0] = k_BHSK.transpose(1, 2)
        self._kept[:, :, layer, 1] = v_BHSK.transpose(1, 2)

    def flat(self) -> Tensor:
        """All of them, (B, S, L * 2 * H * K)."""
        return (torch.stack(self._parts, 2) if self._parts else self._kept).flatten(2)


def context_width(config: ModelConfig) -> int:
    """Numbers that are kept of a position."""
    return config.num_decoder_layers * 2 * config.kv_heads * config.d_kv


def arena_of(context_BSW: Tensor, config: ModelConfig) -> Tensor:
    """A context as caches hold it, (L, 2, B, S, H, K); a view."""
    shape = (*context_BSW.shape[:2], config.num_decoder_layers, 2, config.kv_heads, config.d_kv)
    return context_BSW.view(shape).permute(2, 3, 0, 1, 4, 5)


def document_positions(segments_BS: Tensor) -> Tensor:
    """Position of each token in its document, (B, S), of documents packed into rows."""
    index_S = torch.arange(segments_BS.shape[1], device=segments_BS.device)
    is_first_BS = torch.ones_like(segments_BS, dtype=torch.bool)
    is_first_BS[:, 1:] = segments_BS[:, 1:] != segments_BS[:, :-1]
    begin_BS = torch.where(is_first_BS, index_S, 0).cummax(1).values
    return index_S - begin_BS


class Past(NamedTuple):
    """Contexts (B, P, W) of rows that are read on, and how long each is without its padding."""

    context_BPW: Tensor
    lengths_B: Tensor

    @property
    def capacity(self) -> int:
        """Positions of the longest."""
        return self.context_BPW.shape[1]

    def layers(self, config: ModelConfig) -> tuple[Tensor, ...]:
        """Keys and values (2, B, H, P, K) of each layer; views.

        All at once: for each that is taken out alone autograd would add a gradient of all.
        """
        return arena_of(self.context_BPW, config).transpose(3, 4).unbind(0)


def join_past(kept_2BHPK: Tensor, k_BHSK: Tensor, v_BHSK: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values of a layer with those of the past in front, each (B, H, P + S, K)."""
    keys, values = kept_2BHPK.unbind(0)
    return torch.cat([keys, k_BHSK], 2), torch.cat([values, v_BHSK], 2)
