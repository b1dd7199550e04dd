"""The encoder-decoder: one readable module that trains and serves, dense or mixture-of-experts.

Shape letters: B batch, S source length, T target length, D model width, H heads, K head width, V
vocabulary. Segments number the documents packed into one row, from 1; 0 is padding. A mask is a row
with one document.
"""

from collections.abc import Generator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from engine.config import ModelConfig, Stack
from engine.model.layers import (
    Bias,
    CrossAttention,
    FeedForward,
    Linear,
    RelativeBias,
    RMSNorm,
    SelfAttention,
    attend,
    mask_bias,
)
from engine.model.moe import ExpertSource, MoELayer, ResidentExperts
from engine.model.spans import make_spans, round_up_keys
from engine.model.tiles import STEP_ROWS, SWEEP_ROWS, in_tiles


class Block(nn.Module):
    """One layer of a stack: self-attention, in the decoder cross-attention, feed-forward or MoE."""

    def __init__(self, config: ModelConfig, stack: Stack, index: int) -> None:
        super().__init__()
        self.self_attention = SelfAttention(config)
        if stack == "decoder":
            self.cross_attention = CrossAttention(config)
        if config.num_experts:
            self.moe = MoELayer(config, f"{stack}-{index}")
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
        if experts is None:
            return self.feed_forward(x)  # type: ignore[no-any-return]
        return self.moe(x, experts)  # type: ignore[no-any-return]


class StackModule(nn.Module):
    """The blocks of encoder or decoder, their shared relative bias and the final norm."""

    def __init__(self, config: ModelConfig, stack: Stack) -> None:
        super().__init__()
        self.relative_bias = RelativeBias(config, bidirectional=stack == "encoder")
        self.layers = nn.ModuleList(
            Block(config, stack, i) for i in range(config.num_layers(stack))
        )
        self.norm = RMSNorm(config.d_model, config.norm_eps)

    def blocks(self) -> list[Block]:
        """The layers, typed."""
        return list(self.layers)  # type: ignore[arg-type]


@dataclass(slots=True)
class DecoderCache:
    """Keys and values of B decoder rows.

    Self-attention tensors are allocated once for `capacity` positions.

    lengths_B counts the positions that each row has filled, `longest` those of the fullest row.
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


class Transformer(nn.Module):
    """CPM-2, T5 and mT5: pre-norm, RMS norm, relative positions, no biases.

    `experts` is the source of expert weights; without one, a MoE config gets ResidentExperts of its
    own. `set_invariant` sets `is_invariant`.
    """

    is_invariant = False

    def __init__(self, config: ModelConfig, experts: ExpertSource | None = None) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.encoder = StackModule(config, "encoder")
        self.decoder = StackModule(config, "decoder")
        if not config.tied_embeddings:
            self.lm_head = Linear(config.d_model, config.vocab_size)
        if config.num_experts and experts is None:
            experts = ResidentExperts(config)
        self.experts = experts if config.num_experts else None

    def moe_layers(self) -> list[MoELayer]:
        """The MoE layers in the order of computation."""
        return [module for module in self.modules() if isinstance(module, MoELayer)]

    def encode(self, tokens_BS: Tensor, segments_BS: Tensor, x_BSD: Tensor | None = None) -> Tensor:
        """Run the encoder. Returns (B, S, D), normed; rows of padding hold no meaning.

        `x_BSD` is read instead of the embeddings of the tokens, where it is given.
        """
        layers = self.encode_layers(tokens_BS, segments_BS, x_BSD)
        while True:
            try:
                next(layers)
            except StopIteration as end:
                encoded_BSD: Tensor = end.value
                return encoded_BSD

    def encode_layers(
        self, tokens_BS: Tensor, segments_BS: Tensor, x_BSD: Tensor | None = None
    ) -> Generator[None, None, Tensor]:
        """The same, layer by layer: yields after each, so that others may compute in between."""
        if x_BSD is None:
            x_BSD = self.embedding(tokens_BS)
        positions_S = torch.arange(tokens_BS.shape[1], device=tokens_BS.device)
        same_B1SS = (segments_BS.unsqueeze(1) == segments_BS.unsqueeze(2)).unsqueeze(1)
        relative = self.encoder.relative_bias(positions_S, positions_S)
        bias = self._laid_out(relative, same_B1SS, segments_BS, segments_BS)
        real_BS = real_positions(segments_BS)
        for block in self.encoder.blocks():
            x_BSD = block.transform(block.self_attention(x_BSD, bias), self.experts, real_BS)
            yield
        return self.encoder.norm(x_BSD)  # type: ignore[no-any-return]

    def decode(
        self, tokens_BT: Tensor, segments_BT: Tensor, encoded_BSD: Tensor, segments_BS: Tensor
    ) -> Tensor:
        """Run the decoder over whole rows, without a cache (training, scoring).

        Returns (B, T, D), normed.
        """
        x_BTD = self.embedding(tokens_BT)
        positions_T = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)
        same_BTT = segments_BT.unsqueeze(1) == segments_BT.unsqueeze(2)
        causal_TT = positions_T.unsqueeze(1) >= positions_T
        relative = self.decoder.relative_bias(positions_T, positions_T)
        visible_B1TT = (same_BTT & causal_TT).unsqueeze(1)
        bias = self._laid_out(relative, visible_B1TT, segments_BT, segments_BT)
        cross_B1TS = (segments_BT.unsqueeze(2) == segments_BS.unsqueeze(1)).unsqueeze(1)
        nothing = relative.new_zeros(1)
        cross_bias = self._laid_out(nothing, cross_B1TS, segments_BT, segments_BS)
        real_BT = real_positions(segments_BT)
        for block in self.decoder.blocks():
            x_BTD = block.self_attention(x_BTD, bias)
            keys, values = block.cross_attention.project(encoded_BSD)
            x_BTD = block.cross_attention(x_BTD, keys, values, cross_bias)
            x_BTD = block.transform(x_BTD, self.experts, real_BT)
        return self.decoder.norm(x_BTD)  # type: ignore[no-any-return]

    def _laid_out(
        self, relative: Tensor, visible: Tensor, segments_BT: Tensor, segments_BS: Tensor
    ) -> Bias:
        """The masked bias (B, H or 1, T, S) as attention reads it; row by row in invariant mode."""
        bias = relative + mask_bias(visible, relative.dtype)
        if self.is_invariant:
            return make_spans(bias, document_lengths(segments_BT), document_lengths(segments_BS))
        return bias.contiguous()  # else attention copies it in each layer

    def start_cache(self, encoded_BSD: Tensor, segments_BS: Tensor, capacity: int) -> DecoderCache:
        """Project the encoder output for all layers and allocate `capacity` positions per row."""
        blocks = self.decoder.blocks()
        cross = [block.cross_attention.project(encoded_BSD) for block in blocks]
        shape = (len(encoded_BSD), capacity, self.config.num_heads, self.config.d_kv)
        return DecoderCache(
            [encoded_BSD.new_zeros(shape).transpose(1, 2) for _ in blocks],
            [encoded_BSD.new_zeros(shape).transpose(1, 2) for _ in blocks],
            [keys.contiguous() for keys, _ in cross],
            [values.contiguous() for _, values in cross],
            mask_bias((segments_BS > 0)[:, None, None, :], encoded_BSD.dtype),
            torch.zeros(len(encoded_BSD), dtype=torch.int64, device=encoded_BSD.device),
        )

    def step(self, tokens_BT: Tensor, cache: DecoderCache) -> Tensor:
        """Append T tokens to every row of the cache. Returns (B, T, D), normed.

        Row b's new tokens stand at positions lengths_B[b] .. lengths_B[b] + T - 1.
        Raises ValueError if a row would outgrow the capacity of the cache.
        """
        num_new = tokens_BT.shape[1]
        needed = cache.longest + num_new
        if needed > cache.capacity:
            raise ValueError(f"{needed} positions do not fit the cache of {cache.capacity}")
        new_T = torch.arange(num_new, device=tokens_BT.device)
        position_BT = cache.lengths_B.unsqueeze(1) + new_T
        row_B1 = torch.arange(len(tokens_BT), device=tokens_BT.device).unsqueeze(1)
        key_pos_S = torch.arange(needed, device=tokens_BT.device)
        bias = self.decoder.relative_bias(position_BT, key_pos_S)
        visible_B1TS = (key_pos_S <= position_BT.unsqueeze(-1)).unsqueeze(1)
        bias = bias + mask_bias(visible_B1TS, bias.dtype)
        own_bias, cross_bias = self._step_biases(bias, cache)
        x_BTD = self.embedding(tokens_BT)
        for index, block in enumerate(self.decoder.blocks()):
            q_BHTK, k_BHTK, v_BHTK = block.self_attention.project(x_BTD)
            keys, values = cache.self_keys[index], cache.self_values[index]
            keys.transpose(1, 2)[row_B1, position_BT] = k_BHTK.transpose(1, 2)
            values.transpose(1, 2)[row_B1, position_BT] = v_BHTK.transpose(1, 2)
            mixed = attend(q_BHTK, keys[:, :, :needed], values[:, :, :needed], own_bias)
            x_BTD = x_BTD + block.self_attention.out(mixed)
            x_BTD = block.cross_attention(
                x_BTD, cache.cross_keys[index], cache.cross_values[index], cross_bias
            )
            x_BTD = block.transform(x_BTD, self.experts)
        cache.lengths_B += num_new
        cache.longest = needed
        return self.decoder.norm(x_BTD)  # type: ignore[no-any-return]

    def _step_biases(self, bias: Tensor, cache: DecoderCache) -> tuple[Bias, Bias]:
        """The biases of a step, (B, H, T, S) and the mask of the cache, as attention reads them.

        In invariant mode a row attends to as many keys as it has, rounded up. On a CPU it does not
        matter then which rows of one query each go together.
        """
        if not self.is_invariant:
            return bias.contiguous(), cache.cross_bias
        num_new = bias.shape[2]
        queries = [num_new] * len(bias)
        own = [round_up_keys(length + num_new) for length in cache.lengths_B.tolist()]
        sources = [round_up_keys(n) for n in (cache.cross_bias == 0).flatten(1).sum(-1).tolist()]
        together = num_new == 1 and bias.device.type == "cpu"
        cross_bias = cache.cross_bias.expand(-1, -1, num_new, -1)
        return (
            make_spans(bias, queries, own, together=together),
            make_spans(cross_bias, queries, sources, together=together),
        )

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores (..., V) of the next token for normed decoder states (..., D)."""
        if self.config.scale_logits:
            hidden = hidden * self.config.d_model**-0.5
        if not self.config.tied_embeddings:
            return self.lm_head(hidden)  # type: ignore[no-any-return]
        if not self.is_invariant:
            return F.linear(hidden, self.embedding.weight)
        product = partial(F.linear, weight=self.embedding.weight)
        return in_tiles(product, hidden, step_rows(self))

    def forward(
        self, tokens_BS: Tensor, segments_BS: Tensor, tokens_BT: Tensor, segments_BT: Tensor
    ) -> Tensor:
        """Teacher-forced logits (B, T, V)."""
        encoded_BSD = self.encode(tokens_BS, segments_BS)
        return self.logits(self.decode(tokens_BT, segments_BT, encoded_BSD, segments_BS))


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


def step_rows(model: Transformer) -> int:
    """Rows of a tile of a decoder step in invariant mode."""
    return STEP_ROWS.get(model.embedding.weight.dtype, max(STEP_ROWS.values()))


def set_invariant(model: Transformer) -> None:
    """Let every later result of a row be the same bit for bit, alone and in any batch.

    Products are computed in tiles of fixed numbers of rows, attention at each row's own length. A
    T5 of 248 million parameters in bf16 takes 1.4, 1.3 and 1.3 times as long with 1, 8 and 32 rows
    (one thread, packed weights; `infmoe bench-engine --invariant`).
    """
    model.is_invariant = True
    for stack, rows in ((model.encoder, SWEEP_ROWS), (model.decoder, step_rows(model))):
        for module in stack.modules():
            if isinstance(module, Linear | FeedForward | MoELayer):
                module.tile_rows = rows
    for block in model.decoder.blocks():
        block.cross_attention.key_value.tile_rows = SWEEP_ROWS
    if not model.config.tied_embeddings:
        model.lm_head.tile_rows = step_rows(model)


def num_parameters(model: nn.Module) -> int:
    """Number of parameters, shared ones counted once; works on the meta device."""
    return sum(parameter.numel() for parameter in model.parameters())


def random_weight(
    name: str,
    shape: tuple[int, ...],
    config: ModelConfig,
    generator: torch.Generator,
    centroid_gain: float = 0.01,
) -> Tensor:
    """A random start for the parameter of that name: T5's scales, orthogonal centroids, norms of 1.

    Without the 1/sqrt(K) scale in attention, queries start smaller by that factor.
    Source: T5 (mesh-tensorflow) initialisers; CPM-2's orthogonal 0.01 centroids.
    """
    if name.endswith(("norm", "norm.weight")):
        return torch.ones(shape)
    if name.endswith("centroids"):
        return nn.init.orthogonal_(torch.empty(shape), gain=centroid_gain, generator=generator)
    inner = config.num_heads * config.d_kv
    wide = config.d_ff**-0.5
    scales = {"out.weight": inner**-0.5, "wo.weight": wide, ".wo": wide, "embedding.weight": 1.0}
    std = next((scale for end, scale in scales.items() if name.endswith(end)), config.d_model**-0.5)
    weight = torch.empty(shape).normal_(0.0, std, generator=generator)
    if name.endswith("qkv.weight"):
        weight[:inner].mul_(config.d_kv**-0.5)
    elif name.endswith("query.weight"):
        weight.mul_(config.d_kv**-0.5)
    return weight


@torch.no_grad()
def initialize(model: Transformer, seed: int, centroid_gain: float = 0.01) -> None:
    """Fill a model with random weights, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        start = random_weight(name, tuple(weight.shape), model.config, generator, centroid_gain)
        weight.copy_(start)
