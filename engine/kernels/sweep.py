"""Reading whole texts with a decoder-only model, as programs: layer by layer, all rows at once.

Rows are the tokens of all texts, one after the other, without padding.

Shape letters: B texts, S positions, N rows, D model width, W numbers kept of a position.
"""

from collections import deque
from collections.abc import Callable, Generator, Sequence
from contextlib import suppress
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from engine.kernels import ops
from engine.kernels.builder import Builder
from engine.kernels.moe import SweepBuffers, SweepMixture, can_route
from engine.kernels.panel_builder import (
    add_feed_forward,
    add_linear,
    add_pack,
    fits_panels,
    make_panels,
    one_group,
    panel_scratch_bytes,
    set_rows,
)
from engine.kernels.processor import has_tiles
from engine.kernels.sweep_attention import BLOCK, look_bytes
from engine.kernels.team import the_team
from engine.kernels.tiles import DEPTH, ROWS
from engine.model.attention import SelfAttention
from engine.model.blocks import Block
from engine.model.context import Past, context_width
from engine.model.layers import FeedForward
from engine.model.moe import ResidentExperts
from engine.model.rotary import make_table
from engine.model.topk import AnyMoE
from engine.model.transformer import Transformer

ROW_STEP, TEXT_STEP, POSITION_STEP = 256, 16, 256  # by which room grows
SLOT_STEP = 64


class Size(NamedTuple):
    """What there is room for: rows, slots of keys, texts, positions of a text."""

    rows: int
    slots: int
    texts: int
    positions: int

    def holds(self, other: "Size") -> bool:
        """Whether there is room for another."""
        return all(own >= asked for own, asked in zip(self, other, strict=True))


class Text(NamedTuple):
    """One text: its past and new positions, and where they are kept."""

    past: int
    length: int
    context: int
    past_at: int


class SweepProgram:
    """Contexts of texts, by programs for bf16 and the matrix unit; rows are computed in fp32.

    A row gets the same bits alone and among others.
    """

    def __init__(self, model: Transformer) -> None:
        self._model = model
        # the memory plan knows of one: what a second pass at the same time had is let go
        self._idle: deque[Room] = deque(maxlen=1)

    @torch.no_grad()
    def read_layers(
        self, x_ND: Tensor, lengths: Sequence[int], context_BSW: Tensor, past: Past | None
    ) -> Generator[None, None, None]:
        """Write contexts of texts, given what the first layer reads of all rows.

        Yields after each layer.
        """
        if not len(x_ND):
            return
        if past is not None:
            past = _laid_out(past, context_BSW.dtype)
        texts = self._texts(lengths, context_BSW, past)
        room = self._take(texts)
        try:
            room.begin(x_ND, texts)
            for layer in range(self._model.config.num_decoder_layers):
                room.run(layer)
                yield
        finally:
            self._idle.append(room)

    def _texts(self, lengths: Sequence[int], context_BSW: Tensor, past: Past | None) -> list[Text]:
        size, texts = context_BSW.element_size(), []
        kept = [0] * len(lengths) if past is None else past.lengths_B.tolist()
        for index, (length, before) in enumerate(zip(lengths, kept, strict=True)):
            past_at = 0
            if past is not None:
                past_at = past.context_BPW.data_ptr() + size * index * past.context_BPW.stride(0)
            at = context_BSW.data_ptr() + size * index * context_BSW.stride(0)
            texts.append(Text(before, length, at, past_at))
        return texts

    def _take(self, texts: list[Text]) -> "Room":
        """Room that is not in use, or new."""
        whole = [-(-(text.past + text.length) // BLOCK) * BLOCK for text in texts]
        rows = sum(text.length for text in texts)
        asked = Size(rows, sum(whole), len(texts), max(whole))
        with suppress(IndexError):  # there is none, or another thread has it
            room = self._idle.pop()
            if room.size.holds(asked) and room.threads == the_team().threads:
                return room
            del room  # before there is another
        steps = (ROW_STEP, SLOT_STEP, TEXT_STEP, POSITION_STEP)
        asked = Size(*(-(-n // step) * step for n, step in zip(asked, steps, strict=True)))
        with torch.inference_mode(mode=False):  # written in other modes as well
            return Room(self._model, asked)


def _laid_out(past: Past, dtype: torch.dtype) -> Past:
    """A past as programs read it: what is kept of positions side by side, in the dtype of all."""
    longest = int(past.lengths_B.max())
    if longest > past.capacity:
        raise ValueError(f"{longest} positions of a past do not fit its context of {past.capacity}")
    return past._replace(context_BPW=past.context_BPW.to(dtype).contiguous())


def can_sweep(model: Transformer) -> bool:
    """Whether a model is one whose sweeps are computed here."""
    config = model.config
    weight = model.embedding.weight
    if not (config.is_decoder_only and weight.dtype == torch.bfloat16 and has_tiles()):
        return False
    if config.d_kv % DEPTH or config.positions == "relative" or config.latent is not None:
        return False
    shapes = config.expert_shapes() if config.num_experts else {}
    wide = [torch.empty(shape, device="meta") for shape in shapes.values() if len(shape) > 1]
    for block in model.decoder.blocks():
        assert isinstance(block.self_attention, SelfAttention)
        wide += [block.self_attention.qkv.weight, block.self_attention.out.weight]
        dense = [getattr(block, "feed_forward", None), getattr(block, "moe", None)]
        for layer in (dense[0], getattr(dense[1], "shared", None)):
            if layer is not None:
                wide += [layer.wi_0.weight, layer.wo.weight]
    return all(map(fits_panels, wide))


class Room:
    """The programs of all layers, with room for so many rows."""

    def __init__(self, model: Transformer, size: Size) -> None:
        config = model.config
        self.size, self.threads = size, the_team().threads
        self._model, self._config = model, config
        inner, shared = config.num_heads * config.d_kv, config.kv_heads * config.d_kv
        rows, bf16 = size.rows, torch.bfloat16
        # not a power of two: values stand that far apart
        self._slots = size.slots + BLOCK
        self._keys = torch.zeros(config.kv_heads, self._slots, config.d_kv, dtype=bf16)
        self._values = torch.zeros(config.kv_heads, config.d_kv, self._slots, dtype=bf16)
        self._x = torch.zeros(rows, config.d_model)
        self._qkv = torch.zeros(rows, inner + 2 * shared)
        self._mixed = torch.zeros(rows, inner)
        self._normed = make_panels(rows, config.d_model)
        self._heads = make_panels(rows, inner)
        has_dense = any(hasattr(block, "feed_forward") for block in model.decoder.blocks())
        self._hidden = make_panels(rows if has_dense else 0, config.d_ff)
        self._mixtures = SweepBuffers(config, rows) if config.num_experts else None
        self._rows = one_group()
        whole = torch.int64
        self._sequences = torch.zeros(size.texts, ops.SEQUENCE, dtype=whole)
        self._keep_blocks = torch.zeros(size.slots // BLOCK + size.texts, 2, dtype=whole)
        self._look_blocks = torch.zeros(rows // ROWS + size.texts, 2, dtype=whole)
        self._turns = None
        if config.rotary is not None:
            self._turns = make_table(config.rotary, size.positions)
        self._builder = Builder(config, bf16, is_exact=False)
        self._stops: list[list[tuple[int, Callable[[int], None] | None]]] = []
        self._begins: list[int] = []
        self._build()

    def _build(self) -> None:
        """Add all layers; of the last one only what is kept: nobody reads on behind it."""
        builder, blocks = self._builder, self._model.decoder.blocks()
        for index, block in enumerate(blocks):
            self._begins.append(len(builder))
            self._stops.append([])
            assert isinstance(block.self_attention, SelfAttention)
            self._add_keys(block.self_attention, index)
            if index + 1 < len(blocks):
                self._add_attention(block.self_attention, index)
                self._add_transform(block)
            self._stops[-1].append((len(builder), None))
        self._table = builder.table()
        codes = self._table[:, 0]
        self._keeps, self._looks = codes == ops.KEEP, codes == ops.LOOK

    def begin(self, x_ND: Tensor, texts: list[Text]) -> None:
        """Begin with the first layer, of rows of texts."""
        self._num_rows = len(x_ND)
        self._x[: self._num_rows].copy_(x_ND)
        set_rows(self._rows, self._num_rows)
        row, slot = 0, 0
        keeps, looks = list[tuple[int, int]](), list[tuple[int, int, int]]()
        sequences = []
        for index, (past, length, context, past_at) in enumerate(texts):
            sequences.append((row, past, length, slot, context, past_at))
            end = past + length
            keeps += [(index, first) for first in range(0, end, BLOCK)]
            looks += [(-past - first, index, first) for first in range(0, length, ROWS)]
            row, slot = row + length, slot + -(-end // BLOCK) * BLOCK
        looks.sort()  # those with most to see first
        self._sequences[: len(texts)] = torch.tensor(sequences)
        self._keep_blocks[: len(keeps)] = torch.tensor(keeps)
        self._look_blocks[: len(looks)] = torch.tensor([block[1:] for block in looks])
        self._table[self._keeps, ops.A_NUM_BLOCKS] = len(keeps)
        self._table[self._looks, ops.A_NUM_BLOCKS] = len(looks)
        longest = max(text.past + text.length for text in texts) + BLOCK
        widest = max(self._config.d_model, self._config.num_heads * self._config.d_kv)
        self._scratch_bytes = max(
            panel_scratch_bytes(widest),
            look_bytes(longest, self._config.d_kv),
            4 * self._config.num_experts,
        )

    def run(self, layer: int) -> None:
        """Compute a layer."""
        begin = self._begins[layer]
        for end, stop in self._stops[layer]:
            if end > begin:
                the_team().run(self._table[begin:end], self._num_rows, self._scratch_bytes)
            if stop is not None:
                stop(self._num_rows)
            begin = end

    def _add_keys(self, layer: SelfAttention, index: int) -> None:
        builder, config = self._builder, self._config
        add_pack(builder, self._rows, self._x, self._normed, norm=layer.norm)
        add_linear(builder, self._rows, self._normed, layer.qkv, self._qkv, how=ops.WRITES)
        if config.query_key_norm == "width" or config.clip_qkv:
            builder.width_fix(self._qkv, layer)
        self._add_attention_part(ops.KEEP, layer, index, self._keep_blocks)

    def _add_attention(self, layer: SelfAttention, index: int) -> None:
        builder = self._builder
        self._add_attention_part(ops.LOOK, layer, index, self._look_blocks)
        add_pack(builder, self._rows, self._mixed, self._heads)
        add_linear(builder, self._rows, self._heads, layer.out, self._x, how=ops.ADDS)

    def _add_attention_part(
        self, code: int, layer: SelfAttention, index: int, blocks: Tensor
    ) -> None:
        config, builder = self._config, self._builder
        row = builder.attention(self._qkv, config.kv_heads, self._mixed, code=code)
        builder.put_attention(row, layer, index, self._turns)
        row[ops.A_KEYS] = builder.address(self._keys)
        row[ops.A_VALUES] = builder.address(self._values)
        row[ops.A_SLOTS], row[ops.A_SEQUENCES] = self._slots, builder.address(self._sequences)
        row[ops.A_BLOCKS] = builder.address(blocks)
        own = 2 * 2 * config.kv_heads * config.d_kv  # bytes of a layer's key and value
        row[ops.A_CONTEXT], row[ops.A_POSITION_STRIDE] = index * own, 2 * context_width(config)

    def _add_transform(self, block: Block) -> None:
        if hasattr(block, "feed_forward"):
            self._add_feed_forward(block.feed_forward)
        else:
            self._add_mixture(block.moe)

    def _add_feed_forward(self, layer: FeedForward) -> None:
        builder, rows = self._builder, self._rows
        add_pack(builder, rows, self._x, self._normed, norm=layer.norm)
        add_feed_forward(builder, rows, self._normed, layer, self._hidden, self._x, how=ops.ADDS)

    def _add_mixture(self, layer: AnyMoE) -> None:
        """Experts in memory are computed by the program, others at a stop of it."""
        experts, stops = self._model.experts, self._stops[-1]
        assert experts is not None
        assert self._mixtures is not None
        if not can_route(layer):
            stops.append((len(self._builder), partial(self._run_layer, layer)))
            return
        mixture = SweepMixture(self._builder, layer, self._mixtures, self._x, self._rows)
        if isinstance(experts, ResidentExperts):
            mixture.add_experts(experts)
        else:
            stop = mixture.make_stop(experts)
            stops.append((len(self._builder), stop))
        mixture.add_sum()

    def _run_layer(self, layer: AnyMoE, rows: int) -> None:
        x_ND = self._x[:rows]
        x_ND.copy_(layer(x_ND.to(torch.bfloat16), self._model.experts))
