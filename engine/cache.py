"""Keys and values of all rows that decode together, in two arenas that grow with their content."""

from operator import ge

import torch
from torch import Tensor

from engine.model.blocks import DecoderCache
from engine.model.context import arena_of
from engine.model.transformer import Transformer

STEP = 64  # positions by which the arenas grow
MAX_ROWS = 64  # for which room is made in advance

Shape = tuple[int, int, int]  # rows, decoder positions, source positions
Lists = tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]


class RowCache:
    """Rows 0 .. num_rows - 1 are in use, without gaps: a row that leaves is replaced by the last.

    Arenas: self-attention (L, 2, R, T, H, K), cross-attention (L, 2, R, S, H, K); 2 is keys and
    values. With positions before heads, new keys are written as they come (32 rows of 12 x 64: 12.9
    -> 8.6 us), and attention is as fast. A decoder-only model has no cross-attention; what it has
    read of a source stands in front of the other positions of its row. Arenas grow when rows run
    out or one is longer than any, to whole STEPs and more rows than are needed. Old and new ones
    together stay within `limit_bytes`, where one row alone can.
    """

    def __init__(self, model: Transformer, limit_bytes: int | None = None) -> None:
        self._model = model
        self._limit_bytes = limit_bytes
        self._device = model.embedding.weight.device
        self._dtype = model.embedding.weight.dtype
        self._self = self._arena(0, 0)
        self._cross = self._arena(0, 0)
        self._bias = self._mask(0, 0)
        self._lengths = torch.zeros(0, dtype=torch.int64, device=self._device)
        self._capacities: list[int] = []
        self._sources: list[int] = []
        self._filled: list[int] = []
        self._viewed: tuple[tuple[int, int, int], Lists] | None = None

    def __len__(self) -> int:
        return len(self._sources)

    @property
    def nbytes(self) -> int:
        """Bytes of the arenas."""
        return self._self.nbytes + self._cross.nbytes

    def has_room(self, sources: list[int], capacities: list[int]) -> bool:
        """Whether rows of those lengths can be added within the limit; the first one always can."""
        if self._limit_bytes is None or len(self) + len(sources) == 1:
            return True
        sources, capacities = self._lanes(sources, capacities)
        shape = self._shape_for(len(self) + len(sources), max(capacities), max(sources))
        return self._bytes_while_growing(shape) <= self._limit_bytes

    def append(
        self,
        encoded_BSD: Tensor,
        sources: list[int],
        capacities: list[int],
        which: list[int] | None = None,
    ) -> None:
        """Add rows: encoder outputs, of which row b has `sources[b]` real positions.

        `capacities` are the decoder positions that each may fill. Row b reads output `which[b]`, or
        its own. Where it raises, for want of memory say, nothing was added.
        """
        which = list(range(len(sources))) if which is None else which
        if self._model.config.is_decoder_only:
            self._append_context(encoded_BSD, sources, capacities, which)
            return
        encoded_BSD = encoded_BSD[torch.tensor(which, device=self._device)]
        begin, end = len(self), len(self) + len(sources)
        longest = max(sources)
        self._reserve(end, max(capacities), longest)
        for layer, block in enumerate(self._model.decoder.blocks()):
            keys_BHSK, values_BHSK = block.cross_attention.project(encoded_BSD[:, :longest])
            self._cross[layer, 0, begin:end, :longest] = keys_BHSK.transpose(1, 2)
            self._cross[layer, 1, begin:end, :longest] = values_BHSK.transpose(1, 2)
        hidden = torch.finfo(self._dtype).min
        for row, source in enumerate(sources, begin):
            self._bias[row, ..., :source] = 0
            self._bias[row, ..., source:] = hidden
        self._lengths[begin:end] = 0
        self._sources += sources
        self._capacities += capacities
        self._filled += [0] * len(sources)

    def _append_context(
        self, context_BSW: Tensor, sources: list[int], capacities: list[int], which: list[int]
    ) -> None:
        """Add rows of a decoder-only model, with what it has read of each.

        Row by row: what all have read may be as large as the arena.
        """
        begin, end = len(self), len(self) + len(sources)
        nothing, capacities = self._lanes(sources, capacities)
        self._reserve(end, max(capacities), 0)
        context = arena_of(context_BSW, self._model.config)
        for row, (i, source) in enumerate(zip(which, sources, strict=True), begin):
            self._self[:, :, row, :source] = context[:, :, i, :source]
        self._lengths[begin:end] = torch.tensor(sources, device=self._device)
        self._sources += nothing
        self._capacities += capacities
        self._filled += sources

    def _lanes(self, sources: list[int], capacities: list[int]) -> tuple[list[int], list[int]]:
        """Positions of cross-attention and of self-attention that rows take."""
        if not self._model.config.is_decoder_only:
            return sources, capacities
        together = [sum(pair) for pair in zip(sources, capacities, strict=True)]
        return [0] * len(sources), together

    def wipe(self, row: int) -> None:
        """Clear a row: NaN that is left behind a mask would spoil whoever comes to stand there."""
        self._self[:, :, row] = 0
        self._cross[:, :, row] = 0

    def remove(self, row: int) -> None:
        """Let a row go; the last one takes its number."""
        last = len(self) - 1
        if row != last:
            length, source = self._filled[last], self._sources[last]
            self._self[:, :, row, :length] = self._self[:, :, last, :length]
            self._cross[:, :, row, :source] = self._cross[:, :, last, :source]
            self._bias[row] = self._bias[last]
            self._lengths[row] = length
            self._sources[row], self._capacities[row] = source, self._capacities[last]
            self._filled[row] = length
        del self._sources[last], self._capacities[last], self._filled[last]

    def advance(self, begin: int, end: int, num_new: int) -> None:
        """Note that a step has added positions to rows begin .. end - 1 of a view."""
        self._filled[begin:end] = [length + num_new for length in self._filled[begin:end]]

    def view(self, begin: int = 0, end: int | None = None) -> DecoderCache:
        """Rows begin .. end - 1 as a cache for `Transformer.step`; it writes into the arenas."""
        rows = slice(begin, len(self) if end is None else end)
        source = max(self._sources[rows])
        key = (rows.start, rows.stop, source)
        if self._viewed is None or self._viewed[0] != key:
            self._viewed = (key, self._views(rows, source))
        bias, lengths = self._bias[rows, ..., :source], self._lengths[rows]
        return DecoderCache(*self._viewed[1], bias, lengths, max(self._filled[rows]))

    def _views(self, rows: slice, source: int) -> Lists:
        """Keys and values of all layers, of self-attention and of cross-attention."""
        own = self._self[:, :, rows].transpose(3, 4)
        keys, values = list(own[:, 0]), list(own[:, 1])
        if self._model.config.is_decoder_only:
            return keys, values, [], []
        cross = self._cross[:, :, rows, :source].transpose(3, 4)
        return keys, values, list(cross[:, 0]), list(cross[:, 1])

    def _reserve(self, rows: int, capacity: int, source: int) -> None:
        shape = self._shape_for(rows, capacity, source)
        if shape == self._shape:
            return
        new_rows, new_capacity, new_source = shape
        self._viewed = None
        if not len(self):  # nothing is kept
            self._self = self._cross = self._arena(0, 0)
            self._bias = self._mask(0, 0)
        old_rows, old_capacity, old_source = self._shape
        own, cross, bias, lengths = self._self, self._cross, self._bias, self._lengths
        if (new_rows, new_capacity) != (old_rows, old_capacity):
            own = _grown(own, self._arena(new_rows, new_capacity))
        if (new_rows, new_source) != (old_rows, old_source):
            cross = _grown(cross, self._arena(new_rows, new_source))
            bias = _grown(bias, self._mask(new_rows, new_source))
        if new_rows > len(lengths):
            lengths = _grown(lengths, lengths.new_zeros(new_rows))
        # all or none: memory may have run out on the way
        self._self, self._cross, self._bias, self._lengths = own, cross, bias, lengths

    @property
    def _shape(self) -> Shape:
        return self._self.shape[2], self._self.shape[3], self._cross.shape[3]

    def _shape_for(self, rows: int, capacity: int, source: int) -> Shape:
        """Arenas for so many rows of such lengths: with room for more, if the limit allows it."""
        old = self._shape
        if len(self) or self._limit_bytes is None:
            rows, capacity, source = map(max, zip(old, (rows, capacity, source), strict=True))
        is_allowed = self._limit_bytes is None or self._bytes_of(*old) <= self._limit_bytes
        if (len(self) or is_allowed) and all(map(ge, old, (rows, capacity, source))):
            return old
        long = (-(-capacity // STEP) * STEP, -(-source // STEP) * STEP)
        if self._limit_bytes is None:
            return (max(rows, 2 * old[0]) if rows > old[0] else rows), *long
        most = min(self._limit_bytes // self._bytes_of(1, *long), MAX_ROWS)
        ample = (max(rows, most), *long)
        is_within = self._bytes_while_growing(ample) <= self._limit_bytes
        return ample if is_within else (rows, capacity, source)

    def _bytes_while_growing(self, shape: Shape) -> int:
        """Bytes of arenas of a shape, and of those that are copied into them."""
        kept = self._bytes_of(*self._shape) if len(self) and shape != self._shape else 0
        return kept + self._bytes_of(*shape)

    def _bytes_of(self, rows: int, capacity: int, source: int) -> int:
        """Bytes of arenas of a shape, with mask and lengths."""
        config, size = self._model.config, self._dtype.itemsize
        per_position = 2 * config.num_decoder_layers * config.kv_heads * config.d_kv * size
        return rows * (per_position * (capacity + source) + source * size + 8)

    def _arena(self, rows: int, positions: int) -> Tensor:
        config = self._model.config
        shape = (config.num_decoder_layers, 2, rows, positions, config.kv_heads, config.d_kv)
        # zeros: what is masked is multiplied by nought, which does not help against NaN
        return torch.zeros(shape, dtype=self._dtype, device=self._device)

    def _mask(self, rows: int, positions: int) -> Tensor:
        lowest = torch.finfo(self._dtype).min
        return torch.full((rows, 1, 1, positions), lowest, dtype=self._dtype, device=self._device)


def _grown(old: Tensor, new: Tensor) -> Tensor:
    """Copy an arena into the corner of a larger one."""
    new[tuple(slice(size) for size in old.shape)] = old
    return new
