"""One request from first token to last: what is allowed, which text is final, when to end."""

import secrets
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from time import perf_counter

import torch
from torch import Tensor

from engine.config import ModelConfig
from engine.detokenizer import Detokenizer, StopMatcher
from engine.errors import RequestError
from engine.model.transformer import Transformer
from engine.prompt import decoder_prefix
from engine.request import Event, Finished, FinishReason, Piece, Request, TokenLogprob
from engine.sampling import choose_token, tell_logprob
from engine.sources import gather
from engine.tokenizer import Tokenizer


class Generation:
    """The state of one row.

    Feed it every token; it tells what is banned, what is text, and when it is over.

    While filling, only the sentinel of the next blank is allowed, and only after a token of the
    present one; the sentinel after the last blank, or an end id in the last blank, ends the
    request. While continuing, any end id ends it, and any sentinel of a model that continues after
    one. A stop string ends it in any blank; the blanks after it stay empty.
    """

    def __init__(self, request: Request, tokenizer: Tokenizer, config: ModelConfig) -> None:
        self.request = request
        self.tokenizer = tokenizer
        self.config = config
        self.prefix = decoder_prefix(request, tokenizer, config)
        self.counts = Counter(self.prefix)  # of all ids that the decoder has read or made
        self.num_tokens = 0
        self.blank = 0
        self.blank_tokens = 0
        self.finish: tuple[FinishReason, str | int | None] | None = None
        self._sentinels = [tokenizer.sentinel_id(i) for i in range(tokenizer.num_sentinels)]
        self._ends = set(config.eos_token_ids)
        unnamed = range(tokenizer.vocab_size, config.vocab_size)
        marks = {config.pad_token_id, config.decoder_start_token_id, *tokenizer.control_ids}
        self._never = sorted((marks | set(unnamed)) - self._ends)
        self._bans: tuple[Tensor, Tensor] | None = None
        self._stop_ids = set(request.params.stop_token_ids)
        self._closing = sorted(self._ends.union(self._closing_sentinels()))
        self._open_blank()

    @property
    def closing(self) -> frozenset[int]:
        """Ids that end a text that is continued."""
        return frozenset(self._closing)

    def _closing_sentinels(self) -> list[int]:
        """Sentinels that end the request, not only a blank of it."""
        if self.request.num_blanks:
            return [self._sentinels[self.request.num_blanks]]
        return self._sentinels if self.config.continuation_sentinel is not None else []

    def _open_blank(self) -> None:
        self._detokenizer = Detokenizer(self.tokenizer)
        self._matcher = StopMatcher(self.request.params.stop)
        self.blank_tokens = 0

    def ban(self, logits_V: Tensor) -> Tensor:
        """Scores (V,) with -inf at the tokens that must not come next."""
        if self._bans is None:  # once: lists of ids may be as long as the vocabulary
            never_V, early_V = self._forbidden(len(logits_V))
            self._bans = never_V.to(logits_V.device), early_V.to(logits_V.device)
        never_V, early_V = self._bans
        is_early = self.num_tokens < self.request.params.min_tokens
        logits_V = logits_V.masked_fill(early_V if is_early else never_V, -torch.inf)
        if self.request.num_blanks:
            closing = self._sentinels[self.blank + 1]
            keep = logits_V[closing].clone()
            logits_V[self._sentinels] = -torch.inf
            if self.blank_tokens:
                logits_V[closing] = keep
            if not self.blank_tokens or self.blank + 1 < self.request.num_blanks:
                logits_V[list(self._ends)] = -torch.inf
        return logits_V

    def _forbidden(self, num_scores: int) -> tuple[Tensor, Tensor]:
        """Which tokens, two (V,) of bool, may never come in this row, and before its least length.

        The second holds the first.
        """
        params = self.request.params
        if params.allowed_token_ids:
            never_V = torch.ones(num_scores, dtype=torch.bool)
            never_V[list(params.allowed_token_ids)] = False
        else:
            never_V = torch.zeros(num_scores, dtype=torch.bool)
        never_V[self._never] = True
        if params.ignore_eos:
            never_V[self._closing] = True
        early_V = never_V.clone()
        early_V[[*self._closing, *self._stop_ids]] = True
        return never_V, early_V

    def push(self, token_id: int, logprob: TokenLogprob | None = None) -> list[Piece]:
        """Take the chosen token; returns the text that is final now."""
        pieces = self._take(token_id)
        if logprob is None:
            return pieces
        if not pieces:  # an end mark has no text, but somebody asked how likely it was
            return [Piece("", (), self.blank, (logprob,))]
        return [replace(pieces[0], logprobs=(logprob,)), *pieces[1:]]

    def _take(self, token_id: int) -> list[Piece]:
        self.num_tokens += 1
        self.counts[token_id] += 1
        if token_id in self._ends or token_id in self._stop_ids:
            return self._end("stop", token_id)
        if (index := self._mark(token_id)) is not None:
            pieces = self._close_blank(index, token_id)
        else:
            self.blank_tokens += 1
            text = self._matcher.push(self._detokenizer.push(token_id))
            pieces = [Piece(text, (token_id,), self.blank)]
            self._note_match()
        if self.finish is None and self.num_tokens >= self.request.params.max_tokens:
            pieces += self._end("length", None)
        return pieces

    def _close_blank(self, index: int, token_id: int) -> list[Piece]:
        if not self.request.num_blanks:
            return self._end("stop", token_id)
        if index == self.request.num_blanks:
            return self._end("stop", None)
        pieces = self._flush()
        if self.finish is None:
            self.blank += 1
            self._open_blank()
        return pieces

    def _mark(self, token_id: int) -> int | None:
        """Index of a sentinel that ends something; a T5 that continues a text may print them."""
        if self.request.num_blanks or self.config.continuation_sentinel is not None:
            return self.tokenizer.sentinel_index(token_id)
        return None

    def _flush(self) -> list[Piece]:
        text = self._matcher.push(self._detokenizer.flush())
        if self._matcher.matched is None:
            text += self._matcher.flush()
        self._note_match()  # half a character is U+FFFD at the end, and may complete a stop string
        return [Piece(text, (), self.blank)] if text else []

    def _note_match(self) -> None:
        if self._matcher.matched is not None:
            self.finish = ("stop", self._matcher.matched)

    def _end(self, reason: FinishReason, detail: str | int | None) -> list[Piece]:
        self.finish = (reason, detail)
        return self._flush()


def require_choice(request: Request, tokenizer: Tokenizer, config: ModelConfig) -> None:
    """Raise RequestError if the parameters of a request ban every token.

    What may come first may always come: no state bans more than the first one.
    """
    params = request.params
    if not params.allowed_token_ids and not params.stop_token_ids:
        return
    scores_V = Generation(request, tokenizer, config).ban(torch.zeros(config.vocab_size))
    if scores_V.max().isneginf():
        field = "allowed_token_ids" if params.allowed_token_ids else "stop_token_ids"
        raise RequestError(
            f"{field} leaves no token that may come first: marks never may, an end neither before "
            "min_tokens nor with ignore_eos nor in an empty blank",
            field,
        )


@torch.inference_mode()
def generate(
    model: Transformer, tokenizer: Tokenizer, request: Request, *, queued_s: float = 0.0
) -> Iterator[Event]:
    """Carry out one request: encode once, then one decoder step per token. Ends with `Finished`."""
    row = Generation(request, tokenizer, model.config)
    params = request.params
    seed = params.seed if params.seed is not None else secrets.randbits(48)
    device = model.embedding.weight.device
    generator = torch.Generator(device).manual_seed(seed)
    began = perf_counter()
    source = gather(model, [request.source])
    hidden_BSD = model.encode(*source)
    cache = model.start_cache(hidden_BSD, source.segments_BS, len(row.prefix) + params.max_tokens)
    encoded = perf_counter()
    tokens_BT = torch.tensor([row.prefix], device=device)
    while row.finish is None:
        hidden_BTD = model.step(tokens_BT, cache)
        logits_V = model.logits(hidden_BTD[0, -1])
        token_id = choose_token(row.ban(logits_V), params, generator, row.counts)
        asked = params.logprobs
        yield from row.push(
            token_id, None if asked is None else tell_logprob(logits_V, token_id, asked)
        )
        tokens_BT = torch.tensor([[token_id]], device=device)
    yield Finished(
        *row.finish,
        prompt_tokens=len(request.encoder_ids),
        completion_tokens=row.num_tokens,
        seed=seed,
        queued_s=queued_s,
        encode_s=encoded - began,
        decode_s=perf_counter() - encoded,
    )
