"""Beam search for a text: the likeliest of many ways to go on, not the greediest.

CPM-2's translation uses 4 beams. The definition is that of transformers' generation (without
sampling), which the tests hold this to. Shape letters: W beams, V vocabulary.
"""

from collections.abc import Generator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from engine.config import ModelConfig
from engine.errors import EngineError, RequestError
from engine.generation import Generation
from engine.model.blocks import DecoderCache
from engine.model.transformer import Transformer
from engine.request import Answer, BeamParams, Request
from engine.sources import gather
from engine.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Hypothesis:
    """A complete answer, its end mark included, and its score; higher is better."""

    token_ids: tuple[int, ...]
    score: float


@dataclass(slots=True)
class _Finished:
    """The best complete answers so far, at most as many as there are beams."""

    params: BeamParams
    kept: list[Hypothesis] = field(default_factory=list)

    def add(self, token_ids: tuple[int, ...], logprob: float) -> None:
        score = logprob / len(token_ids) ** self.params.length_penalty
        self.kept.append(Hypothesis(token_ids, score))
        self.kept.sort(key=lambda hypothesis: -hypothesis.score)
        del self.kept[self.params.num_beams :]

    @property
    def is_full(self) -> bool:
        return len(self.kept) == self.params.num_beams

    def is_beyond(self, best_logprob: float, length: int) -> bool:
        """Whether no open beam, of which the best is given, will get among the kept any more."""
        if not self.is_full:
            return False
        hoped = best_logprob / length**self.params.length_penalty
        return self.params.stops_early or hoped <= self.kept[-1].score


@torch.inference_mode()
def beam_search(
    model: Transformer, tokenizer: Tokenizer, request: Request, params: BeamParams
) -> list[Hypothesis]:
    """The best answers to a request, best first; up to `num_beams`.

    Penalties, biases and filters of the request's sampling do not take part; bans, end marks and
    max_tokens do.
    Raises RequestError for blanks to fill, EngineError if the model's scores are not finite.
    """
    require_no_blanks(request)
    row = Generation(request, tokenizer, model.config)
    steps = search(model, row, model.encode(*gather(model, [request.source])), params)
    while True:
        try:
            next(steps)
        except StopIteration as end:
            found: list[Hypothesis] = end.value
            return found


def require_no_blanks(request: Request) -> None:
    """Raise RequestError for blanks to fill."""
    if request.num_blanks:
        raise RequestError("beam search continues texts; it does not fill blanks", "num_beams")


def search(
    model: Transformer, row: Generation, encoded_1SD: Tensor, params: BeamParams
) -> Generator[None, None, list[Hypothesis]]:
    """The same for a text that was encoded: yields after each step, so that others may compute.

    `row` tells what the decoder begins with, what is banned and what ends a text. Raises
    EngineError if the model's scores are not finite.
    """
    request = row.request
    cache = _start(model, row, encoded_1SD, params.num_beams)
    finished, closing = _Finished(params), row.closing
    beams: list[tuple[int, ...]] = [()] * params.num_beams
    logprobs_W = torch.full((params.num_beams,), -1e9)
    logprobs_W[0] = 0.0  # all beams are alike at first: only one may go on
    tokens = [list(row.prefix)] * params.num_beams
    for length in range(1, request.params.max_tokens + 1):
        row.num_tokens = length - 1  # of each beam; before min_tokens none may end
        steps_WV = _next_logprobs(model, cache, tokens, row)
        picked = _pick(logprobs_W, steps_WV, (1 + max(1, len(closing))) * params.num_beams)
        is_last = length == request.params.max_tokens
        still_open: list[tuple[float, int, int]] = []
        for rank, (logprob, beam, token_id) in enumerate(picked):
            if token_id in closing or is_last:
                if rank < params.num_beams:
                    finished.add((*beams[beam], token_id), logprob)
            elif len(still_open) < params.num_beams:
                still_open.append((logprob, beam, token_id))
        if is_last or not still_open or finished.is_beyond(still_open[0][0], length):
            break
        beams = [(*beams[beam], token_id) for _, beam, token_id in still_open]
        logprobs_W = torch.tensor([logprob for logprob, _, _ in still_open])
        tokens = [[token_id] for _, _, token_id in still_open]
        _reorder(cache, [beam for _, beam, _ in still_open])
        yield
    return finished.kept


def answer_text(
    request: Request, tokenizer: Tokenizer, config: ModelConfig, answer: Hypothesis
) -> str:
    """The text of an answer, without its end mark; stop strings cut it."""
    return make_answer(request, tokenizer, config, answer).text


def make_answer(
    request: Request, tokenizer: Tokenizer, config: ModelConfig, found: Hypothesis
) -> Answer:
    """What is told of a hypothesis: its text up to a stop string, and why it ended there."""
    row = Generation(request, tokenizer, config)
    pieces = []
    for token_id in found.token_ids:
        if row.finish is None:
            pieces += row.push(token_id)
    assert row.finish is not None  # it holds an end mark, or as many tokens as may be
    text = "".join(piece.text for piece in pieces)
    return Answer(text, found.token_ids, found.score, *row.finish)


def _start(
    model: Transformer, row: Generation, encoded_1SD: Tensor, num_beams: int
) -> DecoderCache:
    """Caches of W rows that read one text; its projections are there once, shared by all."""
    capacity = len(row.prefix) + row.request.params.max_tokens
    real_1S = torch.ones(encoded_1SD.shape[:2], dtype=torch.int64, device=encoded_1SD.device)
    cache = model.start_cache(encoded_1SD, real_1S, capacity)
    wide = (num_beams, -1, -1, -1)
    return DecoderCache(
        [keys.repeat(num_beams, 1, 1, 1) for keys in cache.self_keys],
        [values.repeat(num_beams, 1, 1, 1) for values in cache.self_values],
        [keys.expand(wide) for keys in cache.cross_keys],
        [values.expand(wide) for values in cache.cross_values],
        cache.cross_bias.expand(wide),
        cache.lengths_B.repeat(num_beams),
        cache.longest,
    )


def _next_logprobs(
    model: Transformer, cache: DecoderCache, tokens: Sequence[Sequence[int]], row: Generation
) -> Tensor:
    """Log-probabilities (W, V), fp32, of the next token of each beam; -inf where it is banned."""
    tokens_WT = torch.tensor(tokens, device=model.embedding.weight.device)
    scores_WV = model.logits(model.step(tokens_WT, cache)[:, -1]).float().log_softmax(-1)
    if not scores_WV.isfinite().all():
        raise EngineError("the model gave scores that are not finite")
    return torch.stack([row.ban(scores_V) for scores_V in scores_WV]).cpu()


def _pick(logprobs_W: Tensor, steps_WV: Tensor, count: int) -> list[tuple[float, int, int]]:
    """The best `count` ways to go on: log-probability, beam, token."""
    together_WV = logprobs_W.unsqueeze(1) + steps_WV
    num_scores = steps_WV.shape[1]
    values, indices = together_WV.flatten().topk(min(count, together_WV.numel()))
    return [
        (value, index // num_scores, index % num_scores)
        for value, index in zip(values.tolist(), indices.tolist(), strict=True)
        if value > -torch.inf
    ]


def _reorder(cache: DecoderCache, beams: Sequence[int]) -> None:
    """Let row w go on from what row beams[w] has read."""
    index = torch.tensor(beams, device=cache.lengths_B.device)
    for tensors in (cache.self_keys, cache.self_values):
        for layer, tensor in enumerate(tensors):
            tensors[layer] = tensor.index_select(0, index)
