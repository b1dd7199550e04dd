"""One request from first token to last: what is allowed, which text is final, when to end."""

import math
import secrets
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from time import perf_counter

import torch
from torch import Tensor

from engine.bad_words import BadWords
from engine.config import ModelConfig
from engine.detokenizer import Detokenizer, StopMatcher
from engine.errors import EngineError, RequestError
from engine.model.transformer import Transformer
from engine.prompt import decoder_prefix
from engine.request import (
    Event,
    Finished,
    FinishReason,
    Piece,
    PromptLogprobs,
    Request,
    TokenLogprob,
)
from engine.sampling import choose_token, tell_logprob
from engine.sources import gather
from engine.tokenizer import Tokenizer

SCORES_AT_ONCE = 32  # rows as wide as the vocabulary, for the log-probabilities of a prompt


class Generation:
    """The state of one row.

    Feed it every token; it tells what is banned, what is text, and when it is over.

    While filling, only the sentinel of the next blank is allowed, and only after a token of the
    present one; the sentinel after the last blank, or an end id in the last blank, ends the
    request. While continuing, any end id ends it, and any sentinel of a model that continues after
    one. A stop string ends it in any blank; the blanks after it stay empty. With a grammar ends
    come where the text may end, and no sentinel else.
    """

    def __init__(self, request: Request, tokenizer: Tokenizer, config: ModelConfig) -> None:
        self.request = request
        self.tokenizer = tokenizer
        self.config = config
        self.prefix = decoder_prefix(request, tokenizer, config)
        self.history = list(self.prefix)  # all ids that the decoder has read or made
        self.counts = Counter(self.prefix)
        if config.is_decoder_only:  # what was given has occurred, but was not said
            self.counts = Counter(dict.fromkeys((*request.encoder_ids, *self.prefix), 0))
        self.num_tokens = 0
        self.blank = 0
        self.blank_tokens = 0
        self.finish: tuple[FinishReason, str | int | None] | None = None
        self._sentinels = [tokenizer.sentinel_id(i) for i in range(tokenizer.num_sentinels)]
        self._ends = set(config.eos_token_ids)
        unnamed = range(tokenizer.vocab_size, config.vocab_size)
        marks = {config.pad_token_id, *tokenizer.control_ids}
        if not config.is_decoder_only:
            marks.add(config.decoder_start_token_id)
        self._never = sorted((marks | set(unnamed)) - self._ends)
        self._bans: tuple[Tensor, Tensor] | None = None
        self._stop_ids = set(request.params.stop_token_ids)
        self._bad_words = BadWords(request.params.bad_words)
        self._closing = sorted(self._ends.union(self._closing_sentinels()))
        self._open_blank()
        grammar = request.params.grammar
        self._grammar = grammar.start(self._detokenizer.state) if grammar else None

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
        params = self.request.params
        self._detokenizer = Detokenizer(self.tokenizer, self.request.decoder_ids)
        self._matcher = StopMatcher(params.stop, is_shown=params.include_stop)
        self.blank_tokens = 0

    @property
    def has_fixed_bans(self) -> bool:
        """Whether `fixed_bans` are all; else some depend on what the text holds."""
        is_changing = self.request.num_blanks or self._bad_words.is_changing or self._grammar
        return not is_changing

    def fixed_bans(self, num_scores: int, device: torch.device) -> Tensor:
        """Which tokens (V,), of bool, may not come now, whatever the text; not to be changed."""
        if self._bans is None:  # once: lists of ids may be as long as the vocabulary
            never_V, early_V = self._forbidden(num_scores)
            self._bans = never_V.to(device), early_V.to(device)
        never_V, early_V = self._bans
        return early_V if self.num_tokens < self.request.params.min_tokens else never_V

    def ban(self, logits_V: Tensor) -> Tensor:
        """Scores (V,) with -inf at the tokens that must not come next.

        Raises EngineError if a grammar or bad words, with all else that bans, leave none.
        """
        bans_V = self.fixed_bans(len(logits_V), logits_V.device)
        if self._grammar is not None:
            bans_V = bans_V | self._unfit(len(logits_V)).to(logits_V.device)
        logits_V = logits_V.masked_fill(bans_V, -torch.inf)
        if self._bad_words.is_changing:
            logits_V[self._bad_words.ending_after(self.history)] = -torch.inf
        if self.request.num_blanks:
            self._keep_order(logits_V)
        elif not self.has_fixed_bans and bool(logits_V.max() == -torch.inf):
            raise EngineError(
                "no token may come next: the grammar, bad_words, allowed_token_ids and min_tokens "
                "of the request together leave none"
            )
        return logits_V

    def _keep_order(self, logits_V: Tensor) -> None:
        """Ban sentinels and ends where the order of the blanks has no place for them."""
        closing = self._sentinels[self.blank + 1]
        keep = logits_V[closing].clone()
        logits_V[self._sentinels] = -torch.inf
        if self.blank_tokens:
            logits_V[closing] = keep
        if not self.blank_tokens or self.blank + 1 < self.request.num_blanks:
            logits_V[list(self._ends)] = -torch.inf

    def _unfit(self, num_scores: int) -> Tensor:
        """Which tokens (V,), of bool, do not fit the grammar; a stop id fits where it may end."""
        assert self._grammar is not None
        allowed_V = torch.from_numpy(self._grammar.allowed())
        unfit_V = torch.ones(num_scores, dtype=torch.bool)
        unfit_V[: len(allowed_V)] = ~allowed_V
        may_end = self._grammar.is_accepting
        unfit_V[self._closing] = not may_end
        if may_end:
            unfit_V[list(self._stop_ids)] = False
        return unfit_V

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
        never_V[[*self._never, *self._bad_words.single_ids]] = True
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

    def cut_short(self, detail: str) -> list[Piece]:
        """End it here, for want of time say; returns the text that was held back."""
        return self._end("length", detail)

    def _take(self, token_id: int) -> list[Piece]:
        self.num_tokens += 1
        self.counts[token_id] += 1
        self.history.append(token_id)
        if token_id in self._ends:
            return self._end("stop", token_id)
        if token_id in self._stop_ids:
            return [*self._show_stop(token_id), *self._end("stop", token_id)]
        if (index := self._mark(token_id)) is not None:
            pieces = self._close_blank(index, token_id)
        else:
            self.blank_tokens += 1
            text = self._matcher.push(self._detokenizer.push(token_id))
            pieces = [Piece(text, (token_id,), self.blank)]
            self._note_match()
            pieces += self._follow_grammar(token_id)
        if self.finish is None and self.num_tokens >= self.request.params.max_tokens:
            pieces += self._end("length", None)
        return pieces

    def _show_stop(self, token_id: int) -> list[Piece]:
        """The text of a stop id, if it has one and somebody wants it."""
        is_mark = token_id in self.tokenizer.control_ids or self._mark(token_id) is not None
        if is_mark or not self.request.params.include_stop:
            return []
        text = self._matcher.push(self._detokenizer.push(token_id))
        return [Piece(text, (token_id,), self.blank)]

    def _follow_grammar(self, token_id: int) -> list[Piece]:
        """Go on in the grammar; the end, if it may end and nothing may follow."""
        if self._grammar is None or self.finish is not None:
            return []
        self._grammar.push(token_id)
        is_complete = self._grammar.is_complete
        if is_complete or (self._grammar.is_accepting and not self._can_go_on()):
            return self._end("stop", None)
        return []

    def _can_go_on(self) -> bool:
        try:
            self.ban(torch.zeros(self.config.vocab_size))
        except EngineError:
            return False
        return True

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
    """Raise RequestError if the parameters of a request ban every token that might come first.

    Without a grammar and bad words, what may come first may always come: no state bans more.
    """
    strict = ("allowed_token_ids", "grammar", "bad_words", "stop_token_ids")
    field = next((name for name in strict if getattr(request.params, name)), None)
    if field is None:
        return
    try:
        scores_V = Generation(request, tokenizer, config).ban(torch.zeros(config.vocab_size))
        is_left = not scores_V.max().isneginf()
    except EngineError:
        is_left = False
    if not is_left:
        raise RequestError(
            f"{field} leaves no token that may come first: marks never may, an end neither before "
            "min_tokens nor with ignore_eos nor in an empty blank",
            field,
        )


def tell_prompt(model: Transformer, row: Generation, states_TD: Tensor) -> PromptLogprobs:
    """Log-probabilities of the request's decoder ids, by the states of the whole prefix (T, D).

    Of a decoder-only model those of the whole prompt; its first token has
    NaN, as nothing is known of what stands before it.
    Raises EngineError if the model's scores are not finite.
    """
    asked = row.request.params.prompt_logprobs or 0
    tokens: list[TokenLogprob] = []
    if row.config.is_decoder_only:
        ids: Sequence[int] = row.prefix[1:]
        tokens.append(TokenLogprob(row.prefix[0], math.nan, ()))
    else:
        ids = row.request.decoder_ids
    first = len(row.prefix) - len(ids) - 1  # its state tells the first of them
    for begin in range(0, len(ids), SCORES_AT_ONCE):
        some = ids[begin : begin + SCORES_AT_ONCE]
        scores_TV = model.logits(states_TD[first + begin : first + begin + len(some)])
        if not scores_TV.isfinite().all():
            raise EngineError("the model gave scores that are not finite")
        pairs = zip(scores_TV, some, strict=True)
        tokens += [tell_logprob(scores_V, token_id, asked) for scores_V, token_id in pairs]
    return PromptLogprobs(tuple(tokens))


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
        hidden_BTD = model.read_on(tokens_BT, cache)
        logits_V = model.logits(hidden_BTD[0, -1])
        if not row.num_tokens and params.prompt_logprobs is not None:
            yield tell_prompt(model, row, hidden_BTD[0])
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
