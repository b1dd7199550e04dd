"""What stacks are made of, and what a decoder keeps of the rows that it has read.

Shape letters: B batch, S source length, T target length, H heads, K head width. Segments number the
documents packed into one row, from 1; 0 is padding.
"""

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from engine.config import ModelConfig, Stack
from engine.model.attention import CrossAttention, LatentSelfAttention, SelfAttention
from engine.model.context import Past
from engine.model.layers import FeedForward, RelativeBias, make_norm
from engine.model.moe import ExpertSource, MoELayer
from engine.model.topk import TopKLayer


class Block(nn.Module):
    """One layer of a stack: self-attention, in the decoder cross-attention, feed-forward or MoE."""

    def __init__(self, config: ModelConfig, stack: Stack, index: int) -> None:
        super().__init__()
        attention = SelfAttention if config.latent is None else LatentSelfAttention
        self.self_attention = attention(config)
        if stack == "decoder" and not config.is_decoder_only:
            self.cross_attention = CrossAttention(config)
        if f"{stack}-{index}" in config.moe_layers():
            layer = TopKLayer if config.is_top_k else MoELayer
            self.moe = layer(config, f"{stack}-{index}")
        else:
            self.feed_forward = FeedForward(config)

    def transform(
        self, x: Tensor, experts: ExpertSource | None, real: Tensor | None = None
    ) -> Tensor:
        """The feed-forward half of the block.

        With `real` (of x's leading dimensions, bool) the other positions, which are padding, stay
        as they are: they are not routed and cost nothing.
        """
        if real is not None:
            return x.masked_scatter(real.unsqueeze(-1), self.transform(x[real], experts))
        if hasattr(self, "feed_forward"):
            return self.feed_forward(x)  # type: ignore[no-any-return]
        return self.moe(x, experts)  # type: ignore[no-any-return]


class StackModule(nn.Module):
    """The blocks of encoder or decoder, their shared relative bias and the final norm."""

    def __init__(self, config: ModelConfig, stack: Stack) -> None:
        super().__init__()
        if config.positions == "relative":
            self.relative_bias = RelativeBias(config, bidirectional=stack == "encoder")
        self.layers = nn.ModuleList(
            Block(config, stack, i) for i in range(config.num_layers(stack))
        )
        self.norm = make_norm(config)

    def relate(self, query_pos: Tensor, key_pos_S: Tensor, dtype: torch.dtype) -> Tensor:
        """The bias of relative positions, (H, T, S) or (B, H, T, S); nought for other kinds."""
        if hasattr(self, "relative_bias"):
            return self.relative_bias(query_pos, key_pos_S)  # type: ignore[no-any-return]
        return torch.zeros((1, 1, 1), dtype=dtype, device=key_pos_S.device)

    def blocks(self) -> list[Block]:
        """The layers, typed."""
        return list(self.layers)  # type: ignore[arg-type]


@dataclass(slots=True)
class DecoderCache:
    """Keys and values of B decoder rows.

    Self-attention tensors are allocated once for `capacity` positions.

    lengths_B counts the positions that each row has filled, `longest` those of the fullest row. A
    decoder-only model has no cross-attention: S is 0, and there is nothing per layer.
    """

    self_keys: list[Tensor]  # per layer (B, H, capacity, K)
    self_values: list[Tensor]
    cross_keys: list[Tensor]  # per layer (B, H, S, K)
    cross_values: list[Tensor]
    cross_bias: Tensor  # (B, 1, 1, S)
    lengths_B: Tensor
    longest: int = 0

    @property
    def capacity(self) -> int:
        """Positions that each row can hold."""
        return self.self_keys[0].shape[2]


class StepKernels(Protocol):
    """Steps of one token per row, and their scores, computed in another way than by torch."""

    @property
    def most_rows(self) -> int:
        """Rows up to which it is faster than torch."""
        ...

    def step(self, tokens_B: Tensor, cache: DecoderCache) -> Tensor:
        """Append a token to every row of the cache, which has room. Returns (B, D), normed."""
        ...

    def logits(self, hidden_BD: Tensor) -> Tensor:
        """Scores (B, V) of normed states."""
        ...


class SweepKernels(Protocol):
    """Contexts of whole texts, computed in another way than by torch."""

    def read_layers(
        self, x_ND: Tensor, lengths: Sequence[int], context_BSW: Tensor, past: Past | None
    ) -> Generator[None, None, None]:
        """Write contexts of texts, given what the first layer reads of all rows, without padding.

        Yields after each layer.
        """
        ...


def real_positions(segments: Tensor) -> Tensor | None:
    """Where a document is and not padding, as bool; None if there is no padding."""
    real = segments > 0
    return None if bool(real.all()) else real


def document_lengths(segments: Tensor) -> list[int]:
    """Positions of the one document of each row, which begins the row.

    Raises ValueError if a row holds several, or padding before one: invariant mode is for serving.
    """
    lengths = (segments == 1).sum(-1)
    begins = torch.arange(segments.shape[1], device=segments.device) < lengths.unsqueeze(1)
    if not torch.equal(segments, begins.to(segments.dtype)):
        raise ValueError("invariant mode takes rows of one document, with padding after it")
    found: list[int] = lengths.tolist()
    return found
