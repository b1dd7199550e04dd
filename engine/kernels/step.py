"""The decoder step of a model as a program: one token per row.

Shape letters: B rows, D model width, H heads, P positions, V vocabulary.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from engine.config import ModelConfig
from engine.kernels import ops
from engine.kernels.builder import Builder
from engine.kernels.moe import StepBuffers, StepMixture, can_route
from engine.kernels.processor import has_tiles, has_wide_vectors
from engine.kernels.team import the_team
from engine.model.attention import CrossAttention, SelfAttention
from engine.model.blocks import DecoderCache
from engine.model.layers import FeedForward
from engine.model.moe import ResidentExperts
from engine.model.rotary import make_table
from engine.model.topk import AnyMoE
from engine.model.transformer import Transformer

LEAST_ROWS, FEW_ROWS, MOST_ROWS = 2, 32, 64
POSITION_STEP = 256  # positions for which tables are made at once
MARGIN = 16  # positions beyond the longest row that scores have room for


class Buffers:
    """What rows become on the way, in fp32."""

    def __init__(self, config: ModelConfig, rows: int) -> None:
        inner = config.num_heads * config.d_kv
        self.rows = rows
        self.x = torch.zeros(rows, config.d_model)
        self.qkv = torch.zeros(rows, inner + 2 * config.kv_heads * config.d_kv)
        self.mixed = torch.zeros(rows, inner)
        self.hidden = torch.zeros(rows, config.d_ff)
        self.gate = torch.zeros(rows, config.d_ff)
        self.out = torch.zeros(rows, config.d_model)
        self.sources = torch.zeros(rows, dtype=torch.int64)


class StepProgram:
    """Steps and scores of a model in fp32, of weights and caches as they are stored.

    In invariant mode a row gets the same bits alone and among others; else rows are rounded to bf16
    where many are multiplied. For one thread at a time.
    """

    def __init__(self, model: Transformer) -> None:
        self._model, self._config = model, model.config
        self._dtype = model.embedding.weight.dtype
        self._positions = 0
        self._head: Builder | None = None
        self._build(1, POSITION_STEP)

    @property
    def most_rows(self) -> int:
        """Rows up to which this is faster than torch."""
        if self._dtype == torch.bfloat16 and has_tiles():
            return MOST_ROWS
        return FEW_ROWS if has_wide_vectors() else LEAST_ROWS

    @torch.no_grad()
    def step(self, tokens_B: Tensor, cache: DecoderCache) -> Tensor:
        """Append a token to every row of the cache, which has room. Returns (B, D), normed."""
        rows, needed = len(tokens_B), cache.longest + 1
        if (
            rows > self._buffers.rows
            or needed > self._positions
            or self._builder.is_exact != self._model.is_invariant
        ):
            self._build(max(rows, self._buffers.rows), max(needed, self._positions))
        self._embed(tokens_B, cache.lengths_B)
        self._point(cache)
        longest = max(needed, cache.cross_bias.shape[-1]) + MARGIN
        group = self._config.num_heads // self._config.kv_heads
        some = max(group * longest, self._config.num_experts)
        scratch_bytes = max(self._builder.scratch_bytes(rows), 4 * some)
        team, begin = the_team(), 0
        for end, stop in self._stops:
            if end > begin:
                team.run(self._table[begin:end], rows, scratch_bytes)
            if stop is not None:
                stop(rows)
            begin = end
        cache.lengths_B += 1
        cache.longest = needed
        return self._buffers.out[:rows].clone()

    @torch.no_grad()
    def logits(self, hidden_BD: Tensor) -> Tensor:
        """Scores (B, V) of the next token for normed states."""
        x_BD = hidden_BD.float().contiguous()
        if self._config.scale_logits:
            x_BD = x_BD * self._config.d_model**-0.5
        if self._head is None or self._head.is_exact != self._model.is_invariant:
            self._head = self._make_head()
        scores_BV = torch.empty(len(x_BD), self._config.vocab_size)
        table = self._head.table()
        table[0, ops.P_X], table[0, ops.P_OUT] = x_BD.data_ptr(), scores_BV.data_ptr()
        the_team().run(table, len(x_BD), self._head.scratch_bytes(len(x_BD)))
        return scores_BV

    def _make_head(self) -> Builder:
        """The product that makes scores, still without states and room."""
        model, config = self._model, self._config
        builder = Builder(config, self._dtype, is_exact=model.is_invariant)
        is_tied = config.tied_embeddings
        weight = model.embedding.weight if is_tied else model.lm_head.weight
        x_1D, scores_1V = torch.zeros(1, config.d_model), torch.zeros(1, config.vocab_size)
        bias = None if is_tied else model.lm_head.bias
        builder.product(x_1D, weight, scores_1V, bias_O=bias)
        return builder

    def _embed(self, tokens_B: Tensor, lengths_B: Tensor) -> None:
        out_BD = self._buffers.x[: len(tokens_B)]
        out_BD.copy_(self._model.embedding(tokens_B))
        if self._config.embedding_scale != 1:
            out_BD *= self._config.embedding_scale
        if hasattr(self._model, "positions"):
            out_BD += self._model.positions(lengths_B)

    def _point(self, cache: DecoderCache) -> None:
        """Tell the program where a cache lies."""
        self._point_at(self._own, cache.self_keys, cache.self_values)
        self._table[self._own, ops.A_LENGTHS] = cache.lengths_B.data_ptr()
        if self._cross:
            sources_B = (cache.cross_bias == 0).flatten(1).sum(-1)
            self._buffers.sources[: len(sources_B)] = sources_B
            self._point_at(self._cross, cache.cross_keys, cache.cross_values)

    def _point_at(self, rows: list[int], keys: list[Tensor], values: list[Tensor]) -> None:
        """Does nothing if they all lie where those of the step before lay."""
        assert keys[0].dtype == self._dtype
        keys_at, values_at = ([part.data_ptr() for part in parts] for parts in (keys, values))
        place = (keys_at, values_at, keys[0].stride())  # layers of beams move one by one
        if self._places.get(rows[0]) == place:
            return
        self._places[rows[0]] = place
        table, size = self._table, keys[0].element_size()
        table[rows, ops.A_KEYS], table[rows, ops.A_VALUES] = keys_at, values_at
        of_row, of_head, of_position, _ = keys[0].stride()
        table[rows, ops.A_ROW_STRIDE] = of_row * size
        table[rows, ops.A_POSITION_STRIDE] = of_position * size
        table[rows, ops.A_HEAD_STRIDE] = of_head * size

    @torch.inference_mode(mode=False)  # its buffers are written in other modes as well
    @torch.no_grad()
    def _build(self, rows: int, positions: int) -> None:
        """Make the program, for so many rows and positions at most."""
        config, model = self._config, self._model
        self._positions = -(-positions // POSITION_STEP) * POSITION_STEP
        self._buffers = Buffers(config, rows)
        self._builder = Builder(config, self._dtype, is_exact=model.is_invariant)
        rotary, is_relative = config.rotary, config.positions == "relative"
        self._turns = None if rotary is None else make_table(rotary, self._positions)
        self._relative = self._by_distance() if is_relative else None
        self._own: list[int] = []
        self._cross: list[int] = []
        self._places: dict[int, tuple[object, ...]] = {}
        self._stops: list[tuple[int, Callable[[int], None] | None]] = []
        mixtures = StepBuffers(config, rows) if config.num_experts else None
        for index, block in enumerate(model.decoder.blocks()):
            assert isinstance(block.self_attention, SelfAttention)  # see attach_kernels
            self._add_self_attention(block.self_attention, index)
            if not config.is_decoder_only:
                self._add_cross_attention(block.cross_attention)
            if hasattr(block, "feed_forward"):
                self._add_feed_forward(block.feed_forward)
            else:
                assert mixtures is not None
                self._add_mixture(block.moe, mixtures)
        self._builder.norm(self._buffers.x, model.decoder.norm, self._buffers.out)
        self._stops.append((len(self._builder), None))
        self._table = self._builder.table()

    def _by_distance(self) -> Tensor:
        """The relative bias (H, P) of keys 0 .. P - 1 positions back."""
        last_1 = torch.tensor([self._positions - 1])
        bias_H1P = self._model.decoder.relative_bias(last_1, torch.arange(self._positions))
        distances_HP: Tensor = bias_H1P.detach()[:, 0].float().flip(-1).contiguous()
        return distances_HP

    def _add_self_attention(self, layer: SelfAttention, index: int) -> None:
        config, buffers, builder = self._config, self._buffers, self._builder
        builder.linear(buffers.x, layer.qkv, buffers.qkv, norm=layer.norm)
        if config.query_key_norm == "width" or config.clip_qkv:
            builder.width_fix(buffers.qkv, layer)
        self._own.append(len(builder))
        row = builder.attention(buffers.qkv, config.kv_heads, buffers.mixed)
        builder.put_attention(row, layer, index, self._turns)
        if self._relative is not None:
            row[ops.A_RELATIVE] = builder.address(self._relative)
            row[ops.A_RELATIVE_STRIDE] = 4 * self._positions
        builder.linear(buffers.mixed, layer.out, buffers.x, adds=True)

    def _add_cross_attention(self, layer: CrossAttention) -> None:
        buffers, builder = self._buffers, self._builder
        builder.linear(buffers.x, layer.query, buffers.qkv, norm=layer.norm)
        self._cross.append(len(builder))
        row = builder.attention(buffers.qkv, self._config.num_heads, buffers.mixed)
        row[ops.A_IS_CROSS], row[ops.A_LENGTHS] = 1, builder.address(buffers.sources)
        builder.linear(buffers.mixed, layer.out, buffers.x, adds=True)

    def _add_mixture(self, layer: AnyMoE, buffers: StepBuffers) -> None:
        """Experts in memory are computed by the program, others at a stop of it."""
        experts, x_RD = self._model.experts, self._buffers.x
        assert experts is not None
        if not can_route(layer):
            self._stops.append((len(self._builder), partial(self._run_layer, layer)))
            return
        mixture = StepMixture(self._builder, layer, buffers, x_RD)
        if isinstance(experts, ResidentExperts):
            mixture.add_experts(experts)
        else:
            stop = mixture.make_stop(experts)
            self._stops.append((len(self._builder), stop))
        mixture.add_sum()

    def _run_layer(self, layer: AnyMoE, rows: int) -> None:
        x_BD = self._buffers.x[:rows]
        x_BD.copy_(layer(x_BD.to(self._dtype), self._model.experts))

    def _add_feed_forward(self, layer: FeedForward) -> None:
        buffers, builder = self._buffers, self._builder
        gate = None
        if self._config.gated:
            gate = (layer.wi_1.weight, layer.wi_1.bias, buffers.gate)
        builder.product(
            buffers.x,
            layer.wi_0.weight,
            buffers.hidden,
            bias_O=layer.wi_0.bias,
            norm=layer.norm,
            activation=self._config.activation,
            gate=gate,
        )
        builder.linear(buffers.hidden, layer.wo, buffers.x, adds=True)
