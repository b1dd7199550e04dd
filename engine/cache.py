"""Keys and values of all rows that decode together, in two arenas that grow with their content."""

import torch
from torch import Tensor

from engine.model.transformer import DecoderCache, Transformer

STEP = 64  # positions by which the arenas grow


class RowCache:
    """Rows 0 .. num_rows - 1 are in use, without gaps: a row that leaves is replaced by the last.

    Arenas: self-attention (L, 2, R, H, T, K), cross-attention (L, 2, R, H, S, K); 2 is keys and
    values. They double when rows run out and grow by STEP positions when one is longer than any.
    """

    def __init__(self, model: Transformer) -> None:
        self._model = model
        self._device = model.embedding.weight.device
        self._dtype = model.embedding.weight.dtype
        self._self = self._arena(0, 0)
        self._cross = self._arena(0, 0)
        self._bias = self._mask(0, 0)
        self._lengths = torch.zeros(0, dtype=torch.int64, device=self._device)
        self._capacities: list[int] = []
        self._sources: list[int] = []

    def __len__(self) -> int:
        return len(self._sources)

    @property
    def nbytes(self) -> int:
        """Bytes of the arenas."""
        return self._self.nbytes + self._cross.nbytes

    def append(self, encoded_BSD: Tensor, sources: list[int], capacities: list[int]) -> None:
        """Add B rows: encoder outputs, of which row b has `sources[b]` real positions.

        `capacities` are the decoder positions that each may fill.
        """
        begin, end = len(self), len(self) + len(sources)
        longest = max(sources)
        self._reserve(end, max(capacities), longest)
        for layer, block in enumerate(self._model.decoder.blocks()):
            keys_BHSK, values_BHSK = block.cross_attention.project(encoded_BSD[:, :longest])
            self._cross[layer, 0, begin:end, :, :longest] = keys_BHSK
            self._cross[layer, 1, begin:end, :, :longest] = values_BHSK
        hidden = torch.finfo(self._dtype).min
        for row, source in enumerate(sources, begin):
            self._bias[row, ..., :source] = 0
            self._bias[row, ..., source:] = hidden
        self._lengths[begin:end] = 0
        self._sources += sources
        self._capacities += capacities

    def remove(self, row: int) -> None:
        """Let a row go; the last one takes its number."""
        last = len(self) - 1
        if row != last:
            length, source = int(self._lengths[last]), self._sources[last]
            self._self[:, :, row, :, :length] = self._self[:, :, last, :, :length]
            self._cross[:, :, row, :, :source] = self._cross[:, :, last, :, :source]
            self._bias[row] = self._bias[last]
            self._lengths[row] = length
            self._sources[row], self._capacities[row] = source, self._capacities[last]
        del self._sources[last], self._capacities[last]

    def view(self, begin: int = 0, end: int | None = None) -> DecoderCache:
        """Rows begin .. end - 1 as a cache for `Transformer.step`; it writes into the arenas."""
        rows = slice(begin, len(self) if end is None else end)
        source = max(self._sources[rows])
        own, cross = self._self[:, :, rows], self._cross[:, :, rows, :, :source]
        return DecoderCache(
            list(own[:, 0]),
            list(own[:, 1]),
            list(cross[:, 0]),
            list(cross[:, 1]),
            self._bias[rows, ..., :source],
            self._lengths[rows],
        )

    def _reserve(self, rows: int, capacity: int, source: int) -> None:
        old_rows, old_capacity, old_source = (
            self._self.shape[2],
            self._self.shape[4],
            self._cross.shape[4],
        )
        new_rows = old_rows if rows <= old_rows else max(rows, 2 * old_rows)
        new_capacity = max(old_capacity, -(-capacity // STEP) * STEP)
        new_source = max(old_source, -(-source // STEP) * STEP)
        if (new_rows, new_capacity) != (old_rows, old_capacity):
            self._self = _grown(self._self, self._arena(new_rows, new_capacity))
        if (new_rows, new_source) != (old_rows, old_source):
            self._cross = _grown(self._cross, self._arena(new_rows, new_source))
            self._bias = _grown(self._bias, self._mask(new_rows, new_source))
        if new_rows != old_rows:
            self._lengths = torch.cat([self._lengths, self._lengths.new_zeros(new_rows - old_rows)])

    def _arena(self, rows: int, positions: int) -> Tensor:
        config = self._model.config
        shape = (config.num_decoder_layers, 2, rows, config.num_heads, positions, config.d_kv)
        # zeros: what is masked is multiplied by nought, which does not help against NaN
        return torch.zeros(shape, dtype=self._dtype, device=self._device)

    def _mask(self, rows: int, positions: int) -> Tensor:
        lowest = torch.finfo(self._dtype).min
        return torch.full((rows, 1, 1, positions), lowest, dtype=self._dtype, device=self._device)


def _grown(old: Tensor, new: Tensor) -> Tensor:
    """Copy an arena into the corner of a larger one."""
    new[tuple(slice(size) for size in old.shape)] = old
    return new
