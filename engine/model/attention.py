"""Attention of all kinds: with relative, rotary or no positions, grouped heads, latents, sinks.

Shape letters: B batch, S key length, T query length, D model width, H heads, K head width.
"""

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from engine.config import ModelConfig
from engine.model.layers import Bias, Linear, RMSNorm, make_norm
from engine.model.masks import CausalMask
from engine.model.rotary import Turn, rotate
from engine.model.spans import attend_spans

Projected = tuple[Tensor, Tensor, Tensor]


class SelfAttention(nn.Module):
    """The self-attention sublayer: x + out(attend(norm(x)))."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        inner, shared = config.num_heads * config.d_kv, config.kv_heads * config.d_kv
        self.config = config
        self.norm = make_norm(config)
        self.qkv = Linear(config.d_model, inner + 2 * shared, config.qkv_bias)
        self.out = Linear(inner, config.d_model, config.out_bias)
        if config.query_key_norm != "none":
            is_wide = config.query_key_norm == "width"
            self.query_norm = RMSNorm(inner if is_wide else config.d_kv, config.norm_eps)
            self.key_norm = RMSNorm(shared if is_wide else config.d_kv, config.norm_eps)
        if config.attention_sinks:
            self.sinks = nn.Parameter(torch.zeros(config.num_heads))

    def project(self, x_BTD: Tensor, turn: Turn | None = None) -> Projected:
        """Queries (B, H, T, K), keys and values of normed x; with `turn` as positions ask."""
        config = self.config
        projected_BTI = self.qkv(self.norm(x_BTD))
        if config.query_key_norm != "none":
            projected_BTI = self._normed(projected_BTI)
        if config.clip_qkv:
            projected_BTI = projected_BTI.clamp(-config.clip_qkv, config.clip_qkv)
        heads_BHTK = split_heads(projected_BTI, config.num_heads + 2 * config.kv_heads)
        turning = config.num_heads + config.kv_heads
        if turn is None:
            return torch.split(heads_BHTK, [config.num_heads, config.kv_heads, config.kv_heads], 1)  # type: ignore[return-value]
        q_and_k = rotate(heads_BHTK[:, :turning], turn)
        return (
            q_and_k[:, : config.num_heads],
            q_and_k[:, config.num_heads :],
            heads_BHTK[:, turning:],
        )

    def _normed(self, projected_BTI: Tensor) -> Tensor:
        width = self.config.d_kv
        inner, shared = self.config.num_heads * width, self.config.kv_heads * width
        q, k, v = torch.split(projected_BTI, [inner, shared, shared], -1)
        if self.config.query_key_norm == "width":
            return torch.cat([self.query_norm(q), self.key_norm(k), v], -1)
        q, k = (torch.unflatten(part, -1, (-1, width)) for part in (q, k))
        return torch.cat([self.query_norm(q).flatten(-2), self.key_norm(k).flatten(-2), v], -1)

    def mix(self, q_BHTK: Tensor, k_BHSK: Tensor, v_BHSK: Tensor, bias: Bias) -> Tensor:
        """Attend, and what the sublayer adds to x, (B, T, D)."""
        sinks_H = self.sinks if self.config.attention_sinks else None
        scale = self.config.attention_scale
        mixed: Tensor = self.out(attend(q_BHTK, k_BHSK, v_BHSK, bias, scale, sinks_H))
        return mixed

    def forward(self, x_BTD: Tensor, bias: Bias, turn: Turn | None = None) -> Tensor:
        """Attend over x itself; the bias holds relative positions and mask."""
        return x_BTD + self.mix(*self.project(x_BTD, turn), bias)


class LatentSelfAttention(nn.Module):
    """Self-attention whose keys and values come through a narrow vector (`LatentAttention`).

    Keys and values are cached as every other's; values are filled up to the width of keys.
    Source: DeepSeek-V2 (arXiv:2405.04434) s2.1.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        assert config.latent is not None
        assert config.rotary is not None
        self.config, self.latent, self.turning = config, config.latent, config.rotary.width
        latent, heads = config.latent, config.num_heads
        self.norm = make_norm(config)
        if latent.query_rank:
            self.query_down = Linear(config.d_model, latent.query_rank, config.qkv_bias)
            self.query_norm = RMSNorm(latent.query_rank, config.norm_eps)
            self.query_up = Linear(latent.query_rank, heads * config.d_kv)
        else:
            self.query = Linear(config.d_model, heads * config.d_kv)
        self.key_value_down = Linear(config.d_model, latent.rank + self.turning, config.qkv_bias)
        self.key_value_norm = RMSNorm(latent.rank, config.norm_eps)
        wide = latent.plain_width + latent.value_width
        self.key_value_up = Linear(latent.rank, heads * wide)
        self.out = Linear(heads * latent.value_width, config.d_model, config.out_bias)

    def project(self, x_BTD: Tensor, turn: Turn | None = None) -> Projected:
        """Queries, keys and values of normed x, each (B, H, T, K)."""
        assert turn is not None
        latent, heads = self.latent, self.config.num_heads
        x_BTD = self.norm(x_BTD)
        if latent.query_rank:
            q_BTI = self.query_up(self.query_norm(self.query_down(x_BTD)))
        else:
            q_BTI = self.query(x_BTD)
        widths = [latent.plain_width, self.turning]
        q_plain, q_turning = torch.split(split_heads(q_BTI, heads), widths, -1)
        narrow, k_turning = torch.split(self.key_value_down(x_BTD), [latent.rank, self.turning], -1)
        wide_BHTI = split_heads(self.key_value_up(self.key_value_norm(narrow)), heads)
        k_plain, v_BHTI = torch.split(wide_BHTI, [latent.plain_width, latent.value_width], -1)
        k_turning = rotate(k_turning.unsqueeze(1), turn).expand(-1, heads, -1, -1)
        q_BHTK = torch.cat([q_plain, rotate(q_turning, turn)], -1)
        k_BHTK = torch.cat([k_plain, k_turning], -1)
        return q_BHTK, k_BHTK, F.pad(v_BHTI, (0, self.config.d_kv - latent.value_width))

    def mix(self, q_BHTK: Tensor, k_BHSK: Tensor, v_BHSK: Tensor, bias: Bias) -> Tensor:
        """Attend, and what the sublayer adds to x, (B, T, D)."""
        mixed_BTI = attend(q_BHTK, k_BHSK, v_BHSK, bias, self.config.attention_scale)
        filled = torch.unflatten(mixed_BTI, -1, (self.config.num_heads, -1))
        mixed: Tensor = self.out(filled[..., : self.latent.value_width].flatten(-2))
        return mixed

    def forward(self, x_BTD: Tensor, bias: Bias, turn: Turn | None = None) -> Tensor:
        """Attend over x itself; the bias is the mask."""
        return x_BTD + self.mix(*self.project(x_BTD, turn), bias)


class CrossAttention(nn.Module):
    """Cross-attention sublayer.

    Keys and values of the encoder output are computed once per request.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        inner = config.num_heads * config.d_kv
        self.num_heads = config.num_heads
        self.scale = config.attention_scale
        self.norm = make_norm(config)
        self.query = Linear(config.d_model, inner, config.qkv_bias)
        self.key_value = Linear(config.d_model, 2 * inner, config.qkv_bias)
        self.out = Linear(inner, config.d_model, config.out_bias)

    def project(self, encoded_BSD: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of the encoder output, each (B, H, S, K)."""
        k, v = self.key_value(encoded_BSD).chunk(2, dim=-1)
        return split_heads(k, self.num_heads), split_heads(v, self.num_heads)

    def forward(self, x_BTD: Tensor, k_BHSK: Tensor, v_BHSK: Tensor, bias: Bias) -> Tensor:
        """Attend over projected encoder output; the bias (B, 1, T or 1, S) is the mask."""
        q_BHTK = split_heads(self.query(self.norm(x_BTD)), self.num_heads)
        mixed: Tensor = self.out(attend(q_BHTK, k_BHSK, v_BHSK, bias, self.scale))
        return x_BTD + mixed


def split_heads(x_BTI: Tensor, num_heads: int) -> Tensor:
    """(B, T, H*K) to (B, H, T, K)."""
    rows, length, inner = x_BTI.shape
    return x_BTI.view(rows, length, num_heads, inner // num_heads).transpose(1, 2)


def attend(
    q_BHTK: Tensor,
    k_BHSK: Tensor,
    v_BHSK: Tensor,
    bias: Bias,
    scale: float = 1.0,
    sinks_H: Tensor | None = None,
) -> Tensor:
    """Attention with an additive bias that broadcasts to (B, H, T, S), in parts or in spans.

    Neighbouring heads of queries may share a head of keys and values. Returns (B, T, H*K).
    """
    if isinstance(bias, list):
        some = partial(attend, scale=scale, sinks_H=sinks_H)
        return attend_spans(some, q_BHTK, k_BHSK, v_BHSK, bias)
    if isinstance(bias, CausalMask):
        parts = [
            attend(
                q_BHTK[:, :, some], k_BHSK[:, :, :keys], v_BHSK[:, :, :keys], part, scale, sinks_H
            )
            for some, keys, part in bias.parts()
        ]
        return torch.cat(parts, 1)
    bias = bias.to(q_BHTK.dtype)
    if sinks_H is not None:
        k_BHSK, v_BHSK, bias = _with_sinks(q_BHTK, k_BHSK, v_BHSK, bias, sinks_H)
    heads, length = q_BHTK.shape[1:3]
    group = heads // k_BHSK.shape[1]
    if group > 1:  # one product for all queries that share keys
        q_BHTK = torch.unflatten(q_BHTK, 1, (-1, group)).flatten(2, 3)
        bias = _grouped(bias, group, length)
    out_BHTK = F.scaled_dot_product_attention(q_BHTK, k_BHSK, v_BHSK, attn_mask=bias, scale=scale)
    if group > 1:
        out_BHTK = torch.unflatten(out_BHTK, 2, (group, length)).flatten(1, 2)
    return out_BHTK.transpose(1, 2).flatten(2)


def _grouped(bias: Tensor, group: int, length: int) -> Tensor:
    """The bias (B, 1 or H, T or 1, S) of queries that stand group by group below one another."""
    if bias.shape[1] == 1:
        return bias if length == 1 or bias.shape[2] == 1 else bias.repeat(1, 1, group, 1)
    bias = bias.expand(-1, -1, length, -1)
    return torch.unflatten(bias, 1, (-1, group)).flatten(2, 3)


def _with_sinks(
    q_BHTK: Tensor, k_BHSK: Tensor, v_BHSK: Tensor, bias: Tensor, sinks_H: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """One key more, which is nought and has a head's sink for its bias, and whose value is nought.

    Source: StreamingLLM (arXiv:2309.17453); gpt-oss (arXiv:2508.10925).
    """
    rows, heads, length = q_BHTK.shape[:3]
    shape = (rows, heads, length, 1)
    sink = sinks_H.to(bias.dtype).view(1, -1, 1, 1).expand(shape)
    bias = torch.cat([bias.expand(rows, heads, length, -1), sink], -1)
    return F.pad(k_BHSK, (0, 0, 0, 1)), F.pad(v_BHSK, (0, 0, 0, 1)), bias
