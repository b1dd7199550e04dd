"""Who may have how much of the caches: rows that decode, searches, outputs of the encoder."""

from collections.abc import Callable, Sequence

from torch import Tensor

from engine.batch import MAX_PREFIX, Batch
from engine.demands import row_bytes
from engine.encoder_cache import EncoderCache
from engine.footprint import output_bytes
from engine.model.transformer import Transformer
from engine.request import Request
from engine.scheduler import Demand, Limits
from engine.tasks import Courses

TEXTS_SHARE = 1 / 8  # of the limit: one pass is made at a time, and more texts only wait for it


class Room:
    """Batch, tasks and kept outputs, together within the bytes of the limits; None: no limit.

    Kept outputs have a part of their own, and make room for a request that needs more than the
    rest. So have texts that scores and vectors hold, from the first such request on. Rows have what
    searches leave. What they have been given they may fill at any time, so it changes only while
    there is no row: where searches have ended and rows have too little, or too much for a search
    that is next, nobody is let in until the rows have gone.
    """

    def __init__(
        self, model: Transformer, limits: Limits, on_error: Callable[[Exception], None]
    ) -> None:
        self._model = model
        self._on_error = on_error
        self._limit = limits.cache_bytes
        self._kept_bytes = limits.encoder_cache_bytes
        if self._limit is not None:
            self._kept_bytes = min(self._kept_bytes, self._limit // 2)
        self._rows_bytes = None if self._limit is None else self._limit - self._kept_bytes
        self._max_rows = limits.max_rows
        self._texts_bytes = 0  # set aside for texts of tasks, which come and go beside rows
        self._is_emptying = False
        self.batch = Batch(model, self._rows_bytes, on_error)
        self.courses = Courses(on_error)
        self.known = EncoderCache(self._kept_bytes)

    def admits(self, pending: Sequence[Demand], demands: Sequence[Demand]) -> bool:
        """Whether requests may come in beside those that run and those that are let in already."""
        together = [*pending, *demands]
        rows = [demand for demand in together if demand.is_row]
        if self._limit is None:
            return not rows or self._has_rows(rows)
        if any(demand.held_bytes for demand in demands):
            self._texts_bytes = self._most_texts_bytes(self._limit)
        if len(together) == 1 and not len(self.batch) and not len(self.courses):
            self._resize_for(demands[0])
            return True
        if len(self.batch) or any(demand.is_row for demand in pending):
            return self._admits_beside(rows, together)
        free = self._free(together)
        before = self._rows_bytes, self.batch
        if free >= 0:
            self._resize(free)
            if self._has_rows(rows):
                return True
            self._rows_bytes, self.batch = before  # as was good for those let in already
        return False

    def keep(self, request: Request, encoded_SD: Tensor) -> None:
        """Keep what the encoder made of a request's text, as far as there is room."""
        self._fit_known()
        self.known.keep(request, encoded_SD)

    def _admits_beside(self, rows: Sequence[Demand], together: Sequence[Demand]) -> bool:
        """The same while there are rows, and their bytes cannot change."""
        assert self._rows_bytes is not None
        if self._is_emptying or self._rows_bytes > self._free(together):
            return False
        if self._has_rows(rows):
            return True
        self._is_emptying = self._rows_bytes < self._free(())
        return False

    def _has_rows(self, rows: Sequence[Demand]) -> bool:
        """Whether the batch has room for rows; without searches it may be one that is too long."""
        if not rows:
            return True
        sources = [demand.source_tokens for demand in rows]
        targets = [demand.max_tokens for demand in rows]
        if self._limit is not None and len(self.batch) + len(rows) == 1:
            assert self._rows_bytes is not None
            needed = row_bytes(self._model, 1, sources[0], MAX_PREFIX + targets[0])
            return needed <= self._rows_bytes
        return self.batch.has_room(sources, targets)

    def _free(self, demands: Sequence[Demand]) -> int:
        """Bytes for rows, if what tasks `demands` bring comes in."""
        assert self._limit is not None
        texts = self.courses.held_bytes
        searches = self.courses.nbytes - texts + sum(demand.own_bytes for demand in demands)
        texts += sum(demand.held_bytes for demand in demands)
        return self._limit - self._kept_bytes - searches - max(texts, self._texts_bytes)

    def _most_texts_bytes(self, limit: int) -> int:
        """What is set aside for texts: as many of the longest as there are rows, within a share."""
        config, dtype = self._model.config, self._model.embedding.weight.dtype
        longest = output_bytes(config, dtype, config.max_prompt_tokens)
        return min(self._max_rows * longest, int(limit * TEXTS_SHARE))

    def _resize_for(self, demand: Demand) -> None:
        """Make room for one request alone, which may take all there is."""
        assert self._limit is not None
        needed = 0
        if demand.is_row:
            target = MAX_PREFIX + demand.max_tokens
            needed = row_bytes(self._model, 1, demand.source_tokens, target)
        free, own_bytes = self._free((demand,)), demand.own_bytes + demand.held_bytes
        self._resize(min(max(free, needed), self._limit - own_bytes))
        self._fit_known(own_bytes)

    def _resize(self, rows_bytes: int) -> None:
        """Give rows so much, while there are none."""
        self._is_emptying = False
        rows_bytes = max(rows_bytes, 0)
        if rows_bytes != self._rows_bytes:
            self._rows_bytes = rows_bytes
            self.batch = Batch(self._model, rows_bytes, self._on_error)

    def _fit_known(self, more_bytes: int = 0) -> None:
        if self._limit is None or self._rows_bytes is None:
            return
        taken = max(self._rows_bytes, self.batch.nbytes) + self.courses.nbytes + more_bytes
        self.known.resize(max(min(self._kept_bytes, self._limit - taken), 0))
