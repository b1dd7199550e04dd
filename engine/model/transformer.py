"""The transformer: one readable module that trains and serves, dense or mixture-of-experts.

An encoder-decoder, or a decoder alone, which reads the prompt itself: what it keeps of it, keys and
values of all layers (`context`), takes the place of the encoder's output everywhere.

Shape letters: B batch, S source length, T target length, D model width, H heads, K head width, V
vocabulary. Segments number the documents packed into one row, from 1; 0 is padding. A mask is a row
with one document.
"""

import math
from collections.abc import Generator
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from engine.config import ModelConfig
from engine.model.blocks import (
    DecoderCache,
    StackModule,
    StepKernels,
    SweepKernels,
    document_lengths,
    real_positions,
)
from engine.model.context import (
    Context,
    Past,
    arena_of,
    context_width,
    document_positions,
    join_past,
)
from engine.model.layers import Bias, FeedForward, Linear
from engine.model.masks import MASK_QUERIES, CausalMask, mask_bias
from engine.model.moe import ExpertSource, ResidentExperts
from engine.model.positions import PositionTable
from engine.model.rotary import RotaryTable, Turn
from engine.model.spans import Span, make_spans, round_up_keys
from engine.model.tiles import STEP_ROWS, SWEEP_ROWS, in_tiles
from engine.model.topk import AnyMoE

R = TypeVar("R")


class Transformer(nn.Module):
    """CPM-2, T5, Llama, Mixtral and their like, as the config tells; pre-norm.

    `experts` is the source of expert weights; without one, a MoE config gets ResidentExperts of its
    own. `set_invariant` sets `is_invariant`. `kernels` are for serving: they compute steps of as
    many rows as they are fast for, of all in invariant mode; `sweep_kernels` contexts of texts.
    """

    is_invariant = False
    kernels: StepKernels | None = None
    sweep_kernels: SweepKernels | None = None

    def __init__(self, config: ModelConfig, experts: ExpertSource | None = None) -> None:
        super().__init__()
        self.config = config
        # not nn.Embedding(V, D): to draw numbers for it, on `meta` too, loads all of torch.compile
        table_VD = torch.empty(config.vocab_size, config.d_model)
        self.embedding: nn.Embedding = nn.Embedding.from_pretrained(  # type: ignore[no-untyped-call]
            table_VD, freeze=False
        )
        if config.positions in ("learned", "sinusoidal"):
            self.positions = PositionTable(config)
        if not config.is_decoder_only:
            self.encoder = StackModule(config, "encoder")
        self.decoder = StackModule(config, "decoder")
        if not config.tied_embeddings:
            self.lm_head = Linear(config.d_model, config.vocab_size, config.head_bias)
        if config.num_experts and experts is None:
            experts = ResidentExperts(config)
        self.experts = experts if config.num_experts else None
        self._rotary = RotaryTable(config.rotary) if config.rotary is not None else None

    def moe_layers(self) -> list[AnyMoE]:
        """The MoE layers in the order of computation."""
        return [module for module in self.modules() if isinstance(module, AnyMoE)]

    def _embed(
        self, tokens_BT: Tensor, position_BT: Tensor, longest: int, x_BTD: Tensor | None = None
    ) -> tuple[Tensor, Turn | None]:
        """What the first layer reads at positions, all below `longest`; and how heads turn there.

        `x_BTD` is read instead of the embeddings of the tokens, where it is given.
        """
        if x_BTD is None:
            x_BTD = self.embedding(tokens_BT)
        if self.config.embedding_scale != 1:
            x_BTD = x_BTD * self.config.embedding_scale
        if hasattr(self, "positions"):
            x_BTD = x_BTD + self.positions(position_BT).to(x_BTD.dtype)
        if self._rotary is None:
            return x_BTD, None
        return x_BTD, self._rotary.turn(position_BT, longest, x_BTD.dtype)

    def encode(self, tokens_BS: Tensor, segments_BS: Tensor, x_BSD: Tensor | None = None) -> Tensor:
        """Run the encoder. Returns (B, S, D), normed; rows of padding hold no meaning.

        `x_BSD` is read instead of the embeddings of the tokens, where it is given. A decoder-only
        model reads with its decoder, and returns its context, (B, S, `context_width`).
        """
        return _run(self.encode_layers(tokens_BS, segments_BS, x_BSD))

    def encode_layers(
        self, tokens_BS: Tensor, segments_BS: Tensor, x_BSD: Tensor | None = None
    ) -> Generator[None, None, Tensor]:
        """The same, layer by layer: yields after each, so that others may compute in between."""
        if self.config.is_decoder_only:
            _, context_BSW = yield from self._read_layers(tokens_BS, segments_BS, x_BSD)
            return context_BSW
        length = tokens_BS.shape[1]
        position_BS = document_positions(segments_BS)
        x_BSD, turn = self._embed(tokens_BS, position_BS, length, x_BSD)
        positions_S = torch.arange(length, device=tokens_BS.device)
        same_B1SS = (segments_BS.unsqueeze(1) == segments_BS.unsqueeze(2)).unsqueeze(1)
        relative = self.encoder.relate(positions_S, positions_S, x_BSD.dtype)
        bias = self._laid_out(relative, same_B1SS, segments_BS, segments_BS)
        real_BS = real_positions(segments_BS)
        for block in self.encoder.blocks():
            x_BSD = block.transform(block.self_attention(x_BSD, bias, turn), self.experts, real_BS)
            yield
        return self.encoder.norm(x_BSD)  # type: ignore[no-any-return]

    def read(self, tokens_BS: Tensor, segments_BS: Tensor, x_BSD: Tensor | None = None) -> Tensor:
        """Run a decoder-only model over whole rows, of several documents maybe.

        `x_BSD`: as for `encode`. Returns (B, S, D), normed.
        """
        x_BSD, _ = _run(self._read_layers(tokens_BS, segments_BS, x_BSD, keeps=False))
        return self.decoder.norm(x_BSD)  # type: ignore[no-any-return]

    def go_on_layers(
        self, tokens_BS: Tensor, segments_BS: Tensor, past: Past
    ) -> Generator[None, None, Tensor]:
        """Read on after a context, layer by layer, not in invariant mode; one document per row.

        Returns the context of what is new.
        """
        _, context_BSW = yield from self._read_layers(tokens_BS, segments_BS, None, past)
        return context_BSW

    def _read_layers(
        self,
        tokens_BS: Tensor,
        segments_BS: Tensor,
        x_BSD: Tensor | None,
        past: Past | None = None,
        *,
        keeps: bool = True,
    ) -> Generator[None, None, tuple[Tensor, Tensor]]:
        """The context of whole rows if it is to be kept, else what the decoder makes of them."""
        length = tokens_BS.shape[1]
        position_BS = document_positions(segments_BS)
        if past is not None:
            position_BS = position_BS + past.lengths_B.unsqueeze(1)
            length += past.capacity
        x_BSD, turn = self._embed(tokens_BS, position_BS, length, x_BSD)
        if keeps and self._suits_sweep(segments_BS):
            context_BSW = yield from self._sweep(x_BSD, segments_BS, past)
            return x_BSD, context_BSW
        context = Context(self.config, x_BSD if keeps else x_BSD[:0])
        if not tokens_BS.numel():
            return x_BSD, context.flat()
        biases = self._causal_biases(segments_BS, position_BS, past, x_BSD.dtype)
        real_BS = real_positions(segments_BS)
        kept = () if past is None else past.layers(self.config)
        for index, block in enumerate(self.decoder.blocks()):
            q_BHSK, k_BHSK, v_BHSK = block.self_attention.project(x_BSD, turn)
            if keeps:
                context.write(index, k_BHSK, v_BHSK)
                if index + 1 == self.config.num_decoder_layers:  # nobody reads on behind it
                    yield
                    break
            if kept:
                k_BHSK, v_BHSK = join_past(kept[index], k_BHSK, v_BHSK)
            bias = biases[self._window(index)]
            x_BSD = x_BSD + block.self_attention.mix(q_BHSK, k_BHSK, v_BHSK, bias)
            x_BSD = block.transform(x_BSD, self.experts, real_BS)
            yield
        return x_BSD, context.flat()

    def _suits_sweep(self, segments_BS: Tensor) -> bool:
        """Whether rows are for the kernels: of one document each then."""
        if self.sweep_kernels is None or torch.is_grad_enabled() or not segments_BS.numel():
            return False
        if segments_BS.max() > 1:
            return False
        return bool((segments_BS[:, 1:] <= segments_BS[:, :-1]).all())  # with padding behind them

    def _sweep(
        self, x_BSD: Tensor, segments_BS: Tensor, past: Past | None
    ) -> Generator[None, None, Tensor]:
        """The context of rows, layer by layer, by kernels."""
        assert self.sweep_kernels is not None
        shape = (*x_BSD.shape[:2], context_width(self.config))
        context_BSW = x_BSD.new_zeros(shape, dtype=self.embedding.weight.dtype)
        x_ND, lengths = x_BSD[segments_BS == 1], document_lengths(segments_BS)
        yield from self.sweep_kernels.read_layers(x_ND, lengths, context_BSW, past)
        return context_BSW

    def _window(self, index: int) -> int:
        return self.config.windows[index] if self.config.windows else 0

    def _causal_biases(
        self, segments_BS: Tensor, position_BS: Tensor, past: Past | None, dtype: torch.dtype
    ) -> dict[int, Bias]:
        """The mask of whole rows of documents, for each window; keys of the past come first.

        A short one is made once for all layers, a long one in parts in each.
        """
        past_B, num_past = (None, 0) if past is None else (past.lengths_B, past.capacity)
        biases, length = dict[int, Bias](), segments_BS.shape[1]
        lengths = document_lengths(segments_BS) if self.is_invariant else []
        for window in self._windows():
            mask = CausalMask(segments_BS, position_BS, past_B, num_past, window, dtype)
            if self.is_invariant:
                rows = [(slice(i, i + 1), n, n, mask.of_row(i, n)) for i, n in enumerate(lengths)]
                biases[window] = [Span(*row) for row in rows if row[1]]
            else:
                biases[window] = mask.bias(slice(0, length)) if length <= MASK_QUERIES else mask
        return biases

    def _windows(self) -> set[int]:
        return set(self.config.windows) or {0}

    def decode(
        self, tokens_BT: Tensor, segments_BT: Tensor, encoded_BSD: Tensor, segments_BS: Tensor
    ) -> Tensor:
        """Run the decoder over whole rows, without a cache (training, scoring).

        A decoder-only model goes on after a context, one document per row. Returns (B, T, D),
        normed.
        """
        if self.config.is_decoder_only:
            lengths_B = (segments_BS > 0).sum(-1)
            if torch.is_grad_enabled():  # a cache is written in place
                past = Past(encoded_BSD, lengths_B)
                layers = self._read_layers(tokens_BT, segments_BT, None, past, keeps=False)
                return self.decoder.norm(_run(layers)[0])  # type: ignore[no-any-return]
            cache = self.start_cache(encoded_BSD, segments_BS, tokens_BT.shape[1])
            return self.read_on(tokens_BT, cache)
        length = tokens_BT.shape[1]
        x_BTD, turn = self._embed(tokens_BT, document_positions(segments_BT), length)
        positions_T = torch.arange(length, device=tokens_BT.device)
        same_BTT = segments_BT.unsqueeze(1) == segments_BT.unsqueeze(2)
        causal_TT = positions_T.unsqueeze(1) >= positions_T
        relative = self.decoder.relate(positions_T, positions_T, x_BTD.dtype)
        visible_B1TT = (same_BTT & causal_TT).unsqueeze(1)
        bias = self._laid_out(relative, visible_B1TT, segments_BT, segments_BT)
        cross_B1TS = (segments_BT.unsqueeze(2) == segments_BS.unsqueeze(1)).unsqueeze(1)
        nothing = relative.new_zeros(1)
        cross_bias = self._laid_out(nothing, cross_B1TS, segments_BT, segments_BS)
        real_BT = real_positions(segments_BT)
        for block in self.decoder.blocks():
            x_BTD = block.self_attention(x_BTD, bias, turn)
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
        """Project the encoder output for all layers and allocate `capacity` positions per row.

        A context is copied, and has its positions beside those. Its rows are of one document.
        """
        config, blocks = self.config, self.decoder.blocks()
        rows, source = encoded_BSD.shape[:2]
        kept = source if config.is_decoder_only else 0
        shape = (config.num_decoder_layers, 2, rows, kept + capacity, config.kv_heads, config.d_kv)
        arena = encoded_BSD.new_zeros(shape)
        layers = range(config.num_decoder_layers)
        keys, values = ([arena[i, j].transpose(1, 2) for i in layers] for j in (0, 1))
        lengths_B = torch.zeros(rows, dtype=torch.int64, device=encoded_BSD.device)
        if config.is_decoder_only:
            arena[:, :, :, :kept] = arena_of(encoded_BSD, config)
            lengths_B += (segments_BS > 0).sum(-1)
            nothing = encoded_BSD.new_zeros(rows, 1, 1, 0)
            return DecoderCache(keys, values, [], [], nothing, lengths_B, kept)
        cross = [block.cross_attention.project(encoded_BSD) for block in blocks]
        return DecoderCache(
            keys,
            values,
            [part.contiguous() for part, _ in cross],
            [part.contiguous() for _, part in cross],
            mask_bias((segments_BS > 0)[:, None, None, :], encoded_BSD.dtype),
            lengths_B,
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
        if num_new == 1 and self.kernels is not None and self._suits(self.kernels, len(tokens_BT)):
            return self.kernels.step(tokens_BT[:, 0], cache).unsqueeze(1)
        new_T = torch.arange(num_new, device=tokens_BT.device)
        position_BT = cache.lengths_B.unsqueeze(1) + new_T
        row_B1 = torch.arange(len(tokens_BT), device=tokens_BT.device).unsqueeze(1)
        x_BTD, turn = self._embed(tokens_BT, position_BT, needed)
        own_biases, cross_bias = self._step_biases(position_BT, needed, cache, x_BTD.dtype)
        for index, block in enumerate(self.decoder.blocks()):
            q_BHTK, k_BHTK, v_BHTK = block.self_attention.project(x_BTD, turn)
            keys, values = cache.self_keys[index], cache.self_values[index]
            keys.transpose(1, 2)[row_B1, position_BT] = k_BHTK.transpose(1, 2)
            values.transpose(1, 2)[row_B1, position_BT] = v_BHTK.transpose(1, 2)
            own_bias = own_biases[self._window(index)]
            x_BTD = x_BTD + block.self_attention.mix(
                q_BHTK, keys[:, :, :needed], values[:, :, :needed], own_bias
            )
            if cache.cross_keys:
                x_BTD = block.cross_attention(
                    x_BTD, cache.cross_keys[index], cache.cross_values[index], cross_bias
                )
            x_BTD = block.transform(x_BTD, self.experts)
        cache.lengths_B += num_new
        cache.longest = needed
        return self.decoder.norm(x_BTD)  # type: ignore[no-any-return]

    def read_on(self, tokens_BT: Tensor, cache: DecoderCache) -> Tensor:
        """The same for many tokens, some at a time: each step makes a mask of its own."""
        parts = [self.step(part, cache) for part in torch.split(tokens_BT, MASK_QUERIES, 1)]
        return torch.cat(parts, 1) if len(parts) > 1 else parts[0]

    def _step_biases(
        self, position_BT: Tensor, needed: int, cache: DecoderCache, dtype: torch.dtype
    ) -> tuple[dict[int, Bias], Bias]:
        """The biases (B, H or 1, T, S) of a step, by window, and the mask of the cache.

        In invariant mode a row attends to as many keys as it has, rounded up. On a CPU it does not
        matter then which rows of one query each go together.
        """
        key_pos_S = torch.arange(needed, device=position_BT.device)
        relative = self.decoder.relate(position_BT, key_pos_S, dtype)
        back_BTS = position_BT.unsqueeze(-1) - key_pos_S
        own, num_new = dict[int, Tensor](), position_BT.shape[1]
        for window in self._windows():
            visible_BTS = (back_BTS >= 0) & (back_BTS < window) if window else back_BTS >= 0
            own[window] = relative + mask_bias(visible_BTS.unsqueeze(1), relative.dtype)
        if not self.is_invariant:
            return {window: bias.contiguous() for window, bias in own.items()}, cache.cross_bias
        queries = [num_new] * len(position_BT)
        keys = [round_up_keys(length + num_new) for length in cache.lengths_B.tolist()]
        sources = [round_up_keys(n) for n in (cache.cross_bias == 0).flatten(1).sum(-1).tolist()]
        together = num_new == 1 and position_BT.device.type == "cpu"
        cross_bias = cache.cross_bias.expand(-1, -1, num_new, -1)
        return (
            {
                window: make_spans(bias, queries, keys, together=together)
                for window, bias in own.items()
            },
            make_spans(cross_bias, queries, sources, together=together),
        )

    def _suits(self, kernels: StepKernels, rows: int) -> bool:
        return self.is_invariant or rows <= kernels.most_rows

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores (..., V) of the next token for normed decoder states (..., D)."""
        rows = math.prod(hidden.shape[:-1])
        if self.kernels is not None and self._suits(self.kernels, rows):
            scores_NV = self.kernels.logits(hidden.reshape(-1, hidden.shape[-1]))
            return scores_NV.view(*hidden.shape[:-1], scores_NV.shape[-1])
        hidden = hidden.to(self.embedding.weight.dtype)
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


def _run(layers: Generator[None, None, R]) -> R:
    """Run to the end at once."""
    while True:
        try:
            next(layers)
        except StopIteration as end:
            result: R = end.value
            return result


def step_rows(model: Transformer) -> int:
    """Rows of a tile of a decoder step in invariant mode."""
    return STEP_ROWS.get(model.embedding.weight.dtype, max(STEP_ROWS.values()))


def set_invariant(model: Transformer) -> None:
    """Let every later result of a row be the same bit for bit, alone and in any batch.

    Sweeps are computed in tiles of fixed numbers of rows, as are steps without kernels; attention
    at each row's own length. `infmoe bench-engine --invariant` tells what it costs.
    """
    model.is_invariant = True
    stacks = [(model.decoder, step_rows(model))]
    if not model.config.is_decoder_only:
        stacks.append((model.encoder, SWEEP_ROWS))
    for stack, rows in stacks:
        for module in stack.modules():
            if isinstance(module, Linear | FeedForward | AnyMoE):
                module.tile_rows = rows
    for block in model.decoder.blocks():
        if not model.config.is_decoder_only:
            block.cross_attention.key_value.tile_rows = SWEEP_ROWS
    if not model.config.tied_embeddings:
        model.lm_head.tile_rows = step_rows(model)
