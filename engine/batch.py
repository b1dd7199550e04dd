"""The decode lane: rows that join and leave at any step; each step makes one token for each."""

import logging
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from time import perf_counter

import torch
from torch import Tensor

from engine.cache import RowCache
from engine.errors import EngineError
from engine.generation import Generation, tell_prompt
from engine.model.masks import MASK_QUERIES
from engine.model.transformer import Transformer
from engine.request import Event, Failed, Finished, Request, TokenLogprob
from engine.sampling import GreedyChoice, choose_token, tell_logprob
from engine.tokenizer import Tokenizer
from offload.pipeline import PipelineStats

logger = logging.getLogger(__name__)

MAX_PREFIX = 2  # a start mark and a sentinel, before the ids of a request
READ_TOKENS = MASK_QUERIES  # of prefixes that rows read together, for their mask
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
    cached_tokens: int = 0  # that the encoder need not read
    token_id: int = -1  # the newest, which the next step reads
    began: float = field(default_factory=perf_counter)

    @property
    def request(self) -> Request:
        """What it answers."""
        return self.generation.request

    @property
    def is_plain(self) -> bool:
        """Whether its next token is the best that it has not banned once and for all."""
        params = self.request.params
        return (
            params.temperature == 0
            and not params.has_penalties
            and not params.logit_bias
            and params.logprobs is None
            and self.generation.has_fixed_bans
        )

    @property
    def wants_prompt(self) -> bool:
        """Whether it is still to be told how likely its decoder ids are."""
        return self.request.params.prompt_logprobs is not None and not self.generation.num_tokens

    def push(self, token_id: int, logprob: TokenLogprob | None = None) -> list[Event]:
        """Take the chosen token; returns what may be told now."""
        self.token_id = token_id
        events: list[Event] = [*self.generation.push(token_id, logprob)]
        if self.generation.finish is not None:
            events.append(self._finished(*self.generation.finish))
        return events

    def cut_short(self, detail: str) -> list[Event]:
        """End it as it is; returns what had been held back, and the end."""
        events: list[Event] = [*self.generation.cut_short(detail)]
        assert self.generation.finish is not None
        return [*events, self._finished(*self.generation.finish)]

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
            cached_tokens=self.cached_tokens,
        )


def make_row(request: Request, model: Transformer, tokenizer: Tokenizer) -> Row:
    """A row for a request, with a generator of its own: batching never changes what is drawn."""
    seed = request.params.seed
    seed = secrets.randbits(48) if seed is None else seed
    generator = torch.Generator(model.embedding.weight.device).manual_seed(seed)
    return Row(Generation(request, tokenizer, model.config), generator, seed)


class Batch:
    """Rows that decode together; row i of the cache is that of `rows[i]`.

    `on_error` is told of each error, also of those that a second try may mend.
    """

    def __init__(
        self,
        model: Transformer,
        cache_bytes: int | None = None,
        on_error: Callable[[Exception], None] = lambda _: None,
    ) -> None:
        self._model = model
        self._on_error = on_error
        self._cache = RowCache(model, cache_bytes)
        self._greedy = GreedyChoice()
        self.rows: list[Row] = []

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def nbytes(self) -> int:
        """Bytes of the caches."""
        return self._cache.nbytes

    def has_room(self, sources: list[int], targets: list[int]) -> bool:
        """Whether rows of those lengths can join within the bytes that the caches may take.

        Targets count what the decoder is given by its request, and what it may make.
        """
        return self._cache.has_room(sources, [MAX_PREFIX + number for number in targets])

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
                encoded_BSD,
                [row.request.source.num_positions for row in rows],
                [len(row.generation.prefix) + row.request.params.max_tokens for row in rows],
                which,
            )
        except ROW_ERRORS as error:
            self._on_error(error)
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
        for length, group in groupby(rows, key=lambda row: len(row.generation.prefix)):
            prefixes = [row.generation.prefix for row in group]
            at_once = max(READ_TOKENS // length, 1)
            for first in range(0, len(prefixes), at_once):
                some = prefixes[first : first + at_once]
                outcomes += self._advance(begin, some)
                begin += len(some)
        self._let_go(outcomes)
        return outcomes

    def step(self, at_once: int | None = None) -> list[tuple[Row, list[Event]]]:
        """Make one token for each row. Returns what each may tell; those that ended have left.

        All rows together, or `at_once` where there is no memory for more.
        """
        size = at_once or max(len(self.rows), 1)
        outcomes: list[tuple[Row, list[Event]]] = []
        for begin in range(0, len(self.rows), size):
            some = self.rows[begin : begin + size]
            outcomes += self._advance(begin, [[row.token_id] for row in some])
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
        """Feed each of the rows from `begin` on its tokens, all as many, and choose the next.

        What fails together is tried alone.
        """
        rows = self.rows[begin : begin + len(tokens)]
        made = self._feed(begin, tokens)
        if isinstance(made, Failed):
            return [(rows[0], [made])]
        if made is None:  # not in `except`: the error keeps alive what the step had made
            alone = enumerate(tokens, begin)
            return [outcome for i, few in alone for outcome in self._advance(i, [few])]
        return list(zip(rows, self._choose_all(rows, *made), strict=True))

    def _feed(self, begin: int, tokens: list[list[int]]) -> tuple[Tensor, Tensor] | Failed | None:
        """States (B, T, D) and scores (B, V) of rows; None if several failed."""
        end = begin + len(tokens)
        tokens_BT = torch.tensor(tokens, device=self._model.embedding.weight.device)
        cache = self._cache.view(begin, end)
        lengths_B = cache.lengths_B.clone()
        try:
            states_BTD = self._model.read_on(tokens_BT, cache)
            scores_BV = self._model.logits(states_BTD[:, -1])
        except ROW_ERRORS as error:
            self._on_error(error)
            cache.lengths_B.copy_(lengths_B)
            if len(tokens) > 1:
                return None
            logger.exception("%s failed", self.rows[begin].request.request_id)
            return _failed(error)
        self._cache.advance(begin, end, tokens_BT.shape[1])
        return states_BTD, scores_BV

    def _choose_all(
        self, rows: Sequence[Row], states_BTD: Tensor, scores_BV: Tensor
    ) -> list[list[Event]]:
        """Choose a token for each row: for all that are plain at once, one by one for others."""
        plain = [i for i, row in enumerate(rows) if row.is_plain and not row.wants_prompt]
        chosen: dict[int, int | None] = {}
        if plain:
            try:
                plain_BV = scores_BV if len(plain) == len(rows) else scores_BV[plain]
                shape = plain_BV.shape[1], plain_BV.device
                bans = [rows[i].generation.fixed_bans(*shape) for i in plain]
                chosen = dict(zip(plain, self._greedy.choose(plain_BV, bans), strict=True))
            except ROW_ERRORS as error:  # each goes alone then
                self._on_error(error)
        return [
            self._guard(row, partial(row.push, token_id))
            if (token_id := chosen.get(i)) is not None
            else self._choose(row, states_BTD[i], scores_BV[i])
            for i, row in enumerate(rows)
        ]

    def _choose(self, row: Row, states_TD: Tensor, scores_V: Tensor) -> list[Event]:
        generation, params = row.generation, row.request.params
        asked = params.logprobs

        def choose() -> list[Event]:
            told = [tell_prompt(self._model, generation, states_TD)] if row.wants_prompt else []
            banned_V = generation.ban(scores_V)
            token_id = choose_token(banned_V, params, row.generator, generation.counts)
            logprob = None if asked is None else tell_logprob(scores_V, token_id, asked)
            return [*told, *row.push(token_id, logprob)]

        return self._guard(row, choose)

    def _guard(self, row: Row, work: Callable[[], list[Event]]) -> list[Event]:
        """Do what may fail for one row, and say so if it does."""
        try:
            return work()
        except EngineError as error:
            return [Failed(f"the engine could not go on: {error}")]
        except ROW_ERRORS as error:
            self._on_error(error)
            logger.exception("%s failed in the sampler", row.request.request_id)
            return [_failed(error)]

    def _let_go(self, outcomes: list[tuple[Row, list[Event]]]) -> None:
        for row, events in outcomes:
            if events and isinstance(events[-1], Failed):
                self._cache.wipe(self.rows.index(row))  # what made it fail may not be finite
            if events and isinstance(events[-1], Finished | Failed):
                self.leave(row)


def _failed(error: Exception) -> Failed:
    return Failed(f"the engine could not go on: {type(error).__name__}")
