"""The decode lane: rows that join and leave at any step; each step makes one token for each."""

import logging
import secrets
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import groupby
from time import perf_counter

import torch
from torch import Tensor

from engine.cache import RowCache
from engine.errors import EngineError
from engine.generation import Generation
from engine.model.transformer import Transformer
from engine.request import Event, Failed, Finished, Request, TokenLogprob
from engine.sampling import choose_token, tell_logprob
from engine.tokenizer import Tokenizer
from offload.pipeline import PipelineStats

logger = logging.getLogger(__name__)

MAX_PREFIX = 2  # a start mark and a sentinel
# What one row may be blamed for; anything else is our own mistake and ends the engine.
ROW_ERRORS = (EngineError, RuntimeError, MemoryError)


@dataclass(slots=True, eq=False)
class Row:
    """One generation that is decoding. Times in seconds.

    `moved_before` is what had been counted of experts when its encoding began.
    """

    generation: Generation
    generator: torch.Generator
    seed: int
    queued_s: float = 0.0
    encode_s: float = 0.0
    moved_before: PipelineStats | None = None
    token_id: int = -1  # the newest, which the next step reads
    began: float = field(default_factory=perf_counter)

    @property
    def request(self) -> Request:
        """What it answers."""
        return self.generation.request

    def push(self, token_id: int, logprob: TokenLogprob | None) -> list[Event]:
        """Take the chosen token; returns what may be told now."""
        self.token_id = token_id
        events: list[Event] = [*self.generation.push(token_id, logprob)]
        if self.generation.finish is not None:
            events.append(self._finished(*self.generation.finish))
        return events

    def _finished(self, reason: str, detail: str | int | None) -> Finished:
        return Finished(
            reason,  # type: ignore[arg-type]  # generation.finish has it so
            detail,
            prompt_tokens=len(self.request.encoder_ids),
            completion_tokens=self.generation.num_tokens,
            seed=self.seed,
            queued_s=self.queued_s,
            encode_s=self.encode_s,
            decode_s=perf_counter() - self.began,
        )


def make_row(request: Request, model: Transformer, tokenizer: Tokenizer) -> Row:
    """A row for a request, with a generator of its own: batching never changes what is drawn."""
    seed = request.params.seed
    seed = secrets.randbits(48) if seed is None else seed
    generator = torch.Generator(model.embedding.weight.device).manual_seed(seed)
    return Row(Generation(request, tokenizer, model.config), generator, seed)


class Batch:
    """Rows that decode together; row i of the cache is that of `rows[i]`."""

    def __init__(self, model: Transformer, cache_bytes: int | None = None) -> None:
        self._model = model
        self._cache = RowCache(model, cache_bytes)
        self.rows: list[Row] = []

    def __len__(self) -> int:
        return len(self.rows)

    def has_room(self, sources: list[int], max_tokens: list[int]) -> bool:
        """Whether rows of those lengths can join within the bytes that the caches may take."""
        return self._cache.has_room(sources, [MAX_PREFIX + number for number in max_tokens])

    def join(
        self, rows: list[Row], encoded_BSD: Tensor, which: list[int]
    ) -> list[tuple[Row, list[Event]]]:
        """Take in rows and make the first token of each; row i reads `encoded_BSD[which[i]]`.

        Returns what each may tell. Those that ended, or failed, have left already. Rows for which
        there is no memory together are tried one by one.
        """
        order = sorted(range(len(rows)), key=lambda i: len(rows[i].generation.prefix))
        rows, which = [rows[i] for i in order], [which[i] for i in order]
        begin = len(self.rows)
        try:
            self._cache.append(
                encoded_BSD[torch.tensor(which, device=encoded_BSD.device)],
                [row.request.source.num_positions for row in rows],
                [len(row.generation.prefix) + row.request.params.max_tokens for row in rows],
            )
        except ROW_ERRORS as error:
            if len(rows) == 1:
                logger.exception("%s has no room in the caches", rows[0].request.request_id)
                return [(rows[0], [_failed(error)])]
        else:
            self.rows += rows
        outcomes: list[tuple[Row, list[Event]]] = []
        if begin == len(self.rows):  # not in `except`: the error keeps alive what was half made
            for row, i in zip(rows, which, strict=True):
                outcomes += self.join([row], encoded_BSD, [i])
            return outcomes
        for _, group in groupby(rows, key=lambda row: len(row.generation.prefix)):
            prefixes = [row.generation.prefix for row in group]
            outcomes += self._advance(begin, prefixes)
            begin += len(prefixes)
        self._let_go(outcomes)
        return outcomes

    def step(self) -> list[tuple[Row, list[Event]]]:
        """Make one token for each row. Returns what each may tell; those that ended have left."""
        if not self.rows:
            return []
        outcomes = self._advance(0, [[row.token_id] for row in self.rows])
        self._let_go(outcomes)
        return outcomes

    def leave(self, row: Row) -> None:
        """Let a row go whose answer nobody wants any more."""
        index = self.rows.index(row)
        self._cache.remove(index)
        last = self.rows.pop()
        if last is not row:
            self.rows[index] = last

    def _advance(self, begin: int, tokens: list[list[int]]) -> list[tuple[Row, list[Event]]]:
        """Feed each of the rows from `begin` on its tokens, all as many, and choose the next."""
        rows = self.rows[begin : begin + len(tokens)]
        return [
            (row, self._choose(row, scores))
            for row, scores in zip(rows, self._scores(begin, tokens), strict=True)
        ]

    def _scores(self, begin: int, tokens: list[list[int]]) -> Iterator[Tensor | Exception]:
        """Scores (V,) for each row, or why there are none. What fails together is tried alone."""
        end = begin + len(tokens)
        tokens_BT = torch.tensor(tokens, device=self._model.embedding.weight.device)
        cache = self._cache.view(begin, end)
        lengths_B = cache.lengths_B.clone()
        scores_BV: Tensor | None = None
        try:
            hidden_BTD = self._model.step(tokens_BT, cache)
            scores_BV = self._model.logits(hidden_BTD[:, -1])
        except ROW_ERRORS as error:
            cache.lengths_B.copy_(lengths_B)
            if len(tokens) == 1:
                logger.exception("%s failed", self.rows[begin].request.request_id)
                yield error
                return
        if scores_BV is None:  # not in `except`: the error keeps alive what the step had made
            for index, row_tokens in enumerate(tokens, begin):
                yield from self._scores(index, [row_tokens])
            return
        self._cache.advance(begin, end, tokens_BT.shape[1])
        yield from scores_BV

    def _choose(self, row: Row, scores_V: Tensor | Exception) -> list[Event]:
        if isinstance(scores_V, Exception):
            return [_failed(scores_V)]
        generation, params = row.generation, row.request.params
        asked = params.logprobs
        try:
            banned_V = generation.ban(scores_V)
            token_id = choose_token(banned_V, params, row.generator, generation.counts)
            logprob = None if asked is None else tell_logprob(scores_V, token_id, asked)
        except EngineError as error:
            return [Failed(f"the engine could not go on: {error}")]
        except ROW_ERRORS as error:
            logger.exception("%s failed in the sampler", row.request.request_id)
            return [_failed(error)]
        return row.push(token_id, logprob)

    def _let_go(self, outcomes: list[tuple[Row, list[Event]]]) -> None:
        for row, events in outcomes:
            if events and isinstance(events[-1], Failed):
                self._cache.wipe(self.rows.index(row))  # what made it fail may not be finite
            if events and isinstance(events[-1], Finished | Failed):
                self.leave(row)


def _failed(error: Exception) -> Failed:
    return Failed(f"the engine could not go on: {type(error).__name__}")
