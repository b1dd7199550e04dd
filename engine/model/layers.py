"""The small parts of a T5-family block: RMS norm, feed-forward, attention with relative positions.

Shape letters: B batch, S source or key length, T target or query length, N tokens, D model width,
F feed-forward width, H heads, K head width.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from engine.config import ModelConfig
from engine.model.packed import packed_product
from engine.model.quantized import QuantizedMatrix
from engine.model.spans import Span, attend_spans
from engine.model.tiles import in_tiles, in_vectors, quantized_tile_rows

Matrix = Tensor | QuantizedMatrix
Bias = Tensor | list[Span]


class FeedForwardWeights(NamedTuple):
    """Weights of one feed-forward.

    Norm (D,), wi_0 and wi_1 (F, D), wo (D, F); wi_1 None: no gate.
    """

    norm: Tensor
    wi_0: Matrix
    wi_1: Matrix | None
    wo: Matrix


def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """Divide by the root mean square over the last dimension, in fp32, and scale; no mean, no bias.

    Source: RMSNorm (arXiv:1910.07467), as T5 and CPM-2 use it.
    """
    # torch computes it in fp32; given the weight, it would round to bf16 after it, not before
    return F.rms_norm(x, weight_D.shape, None, eps).to(weight_D.dtype) * weight_D


def linear(x: Tensor, weight: Matrix) -> Tensor:
    """Product of x and the transposed matrix, whichever way the matrix is stored."""
    if not isinstance(weight, Tensor):
        return weight.linear(x)
    return packed_product(x, weight) if weight.is_mkldnn else F.linear(x, weight)


def feed_forward(
    x_ND: Tensor, weights: FeedForwardWeights, config: ModelConfig, tile_rows: int = 0
) -> Tensor:
    """Compute FF(norm(x)) without the residual, for a dense block and for an expert alike.

    Returns (N, D); with `tile_rows`, computed in tiles of so many rows.

    The activated branch is wi_0; GELU is the tanh approximation.
    """
    if tile_rows:
        own = tile_rows if isinstance(weights.wo, Tensor) else quantized_tile_rows(tile_rows)
        activate = partial(in_vectors, partial(_activate, config=config))
        compute = partial(_feed_forward, weights=weights, config=config, activate=activate)
        return in_tiles(compute, x_ND, own)
    return _feed_forward(x_ND, weights, config, partial(_activate, config=config))


def _activate(hidden_NF: Tensor, config: ModelConfig) -> Tensor:
    if config.activation == "relu":
        return F.relu(hidden_NF)
    return F.gelu(hidden_NF, approximate="tanh")


def _feed_forward(
    x_ND: Tensor,
    weights: FeedForwardWeights,
    config: ModelConfig,
    activate: Callable[[Tensor], Tensor],
) -> Tensor:
    normed_ND = rms_norm(x_ND, weights.norm, config.norm_eps)
    hidden_NF = activate(linear(normed_ND, weights.wi_0))
    if weights.wi_1 is not None:
        hidden_NF = hidden_NF * linear(normed_ND, weights.wi_1)
    return linear(hidden_NF, weights.wo)


class Linear(nn.Linear):
    """A product without a bias, whose weight may be packed (`pack_linears`).

    With `tile_rows` it is computed in tiles of so many rows (`set_invariant`).
    """

    tile_rows = 0

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., inputs) to (..., outputs)."""
        if self.tile_rows:
            return in_tiles(lambda tile: linear(tile, self.weight), x, self.tile_rows)
        return linear(x, self.weight)


class RMSNorm(nn.Module):
    """`rms_norm` with its weight (D,)."""

    def __init__(self, d_model: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(d_model))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise over the last dimension."""
        return rms_norm(x, self.weight, self.eps)


class FeedForward(nn.Module):
    """The dense feed-forward sublayer: x + FF(norm(x))."""

    tile_rows = 0

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        self.wi_0 = Linear(config.d_model, config.d_ff)
        if config.gated:
            self.wi_1 = Linear(config.d_model, config.d_ff)
        self.wo = Linear(config.d_ff, config.d_model)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., D) to (..., D)."""
        gate = self.wi_1.weight if self.config.gated else None
        weights = FeedForwardWeights(self.norm.weight, self.wi_0.weight, gate, self.wo.weight)
        return x + feed_forward(x, weights, self.config, self.tile_rows)


class SelfAttention(nn.Module):
    """The self-attention sublayer: x + out(attend(norm(x))), without the 1/sqrt(K) scale, as T5."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        inner = config.num_heads * config.d_kv
        self.num_heads = config.num_heads
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        self.qkv = Linear(config.d_model, 3 * inner)
        self.out = Linear(inner, config.d_model)

    def project(self, x_BTD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of normed x, each (B, H, T, K)."""
        q, k, v = self.qkv(self.norm(x_BTD)).chunk(3, dim=-1)
        return tuple(split_heads(part, self.num_heads) for part in (q, k, v))  # type: ignore[return-value]

    def forward(self, x_BTD: Tensor, bias: Bias) -> Tensor:
        """Attend over x itself; the bias holds relative positions and mask."""
        q_BHTK, k_BHTK, v_BHTK = self.project(x_BTD)
        mixed: Tensor = self.out(attend(q_BHTK, k_BHTK, v_BHTK, bias))
        return x_BTD + mixed


class CrossAttention(nn.Module):
    """Cross-attention sublayer.

    Keys and values of the encoder output are computed once per request.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        inner = config.num_heads * config.d_kv
        self.num_heads = config.num_heads
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        self.query = Linear(config.d_model, inner)
        self.key_value = Linear(config.d_model, 2 * inner)
        self.out = Linear(inner, config.d_model)

    def project(self, encoded_BSD: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of the encoder output, each (B, H, S, K)."""
        k, v = self.key_value(encoded_BSD).chunk(2, dim=-1)
        return split_heads(k, self.num_heads), split_heads(v, self.num_heads)

    def forward(self, x_BTD: Tensor, k_BHSK: Tensor, v_BHSK: Tensor, bias: Bias) -> Tensor:
        """Attend over projected encoder output; the bias (B, 1, T or 1, S) is the mask."""
        q_BHTK = split_heads(self.query(self.norm(x_BTD)), self.num_heads)
        mixed: Tensor = self.out(attend(q_BHTK, k_BHSK, v_BHSK, bias))
        return x_BTD + mixed


def split_heads(x_BTI: Tensor, num_heads: int) -> Tensor:
    """(B, T, H*K) to (B, H, T, K)."""
    rows, length, inner = x_BTI.shape
    return x_BTI.view(rows, length, num_heads, inner // num_heads).transpose(1, 2)


def attend(q_BHTK: Tensor, k_BHSK: Tensor, v_BHSK: Tensor, bias: Bias) -> Tensor:
    """Unscaled attention with an additive bias that broadcasts to (B, H, T, S), or in spans.

    Returns (B, T, H*K).
    """
    if isinstance(bias, list):
        return attend_spans(attend, q_BHTK, k_BHSK, v_BHSK, bias)
    out_BHTK = F.scaled_dot_product_attention(
        q_BHTK, k_BHSK, v_BHSK, attn_mask=bias.to(q_BHTK.dtype), scale=1.0
    )
    return out_BHTK.transpose(1, 2).flatten(2)


def mask_bias(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """Additive mask: 0 where visible, else the lowest finite number (no NaN in a row of no key)."""
    return torch.zeros_like(visible, dtype=dtype).masked_fill_(~visible, torch.finfo(dtype).min)


class RelativeBias(nn.Module):
    """Learned attention bias per bucket of relative position and head, one for a whole stack."""

    def __init__(self, config: ModelConfig, *, bidirectional: bool) -> None:
        super().__init__()
        self.bidirectional = bidirectional
        self.max_distance = config.relative_max_distance
        self.weight = nn.Parameter(torch.empty(config.relative_buckets, config.num_heads))

    def forward(self, query_pos: Tensor, key_pos_S: Tensor) -> Tensor:
        """Bias (H, T, S) or (B, H, T, S) of query positions (T,) or (B, T), key positions (S,)."""
        relative = key_pos_S - query_pos.unsqueeze(-1)
        buckets = relative_buckets(
            relative, self.weight.shape[0], self.max_distance, bidirectional=self.bidirectional
        )
        return F.embedding(buckets, self.weight).movedim(-1, -3)


def relative_buckets(
    relative: Tensor, num_buckets: int, max_distance: int, *, bidirectional: bool
) -> Tensor:
    """Bucket of key position minus query position.

    Exact for near keys, logarithmic up to max_distance.

    With 32 buckets and distance 128, bidirectional: -8 -> 8, -91 -> 15, 3 -> 19; else -16 -> 16, 5
    -> 0.
    Source: T5 (arXiv:1910.10683) s2.1.
    """
    if bidirectional:
        num_buckets //= 2
        offset = (relative > 0).long() * num_buckets
        distance = relative.abs()
    else:
        offset = torch.zeros_like(relative)
        distance = (-relative).clamp(min=0)
    exact = num_buckets // 2
    span = math.log(max_distance / exact)
    far = torch.log(distance.clamp(min=1).float() / exact) / span * (num_buckets - exact)
    far = (exact + far.long()).clamp(max=num_buckets - 1)
    return offset + torch.where(distance < exact, distance, far)
