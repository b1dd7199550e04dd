"""Choosing the next token of a row: penalties on its history, filters of the unlikely, the draw.

Order and definitions are those of transformers' generation, which the tests hold this to.
"""

from collections.abc import Mapping, Sequence
from operator import is_

import torch
from torch import Tensor

from engine.errors import EngineError
from engine.request import SamplingParams, TokenLogprob

# Tokens that typical-p looks at before it sorts all: 250,112 take 3 ms where they are enough, else
# 26.
NEAREST = 1024
MIN_TEMPERATURE = 1e-6  # below it scores overflow fp32, and long before it only the best is drawn


def choose_token(
    logits_V: Tensor,
    params: SamplingParams,
    generator: torch.Generator,
    counts: Mapping[int, int] | None = None,
) -> int:
    """Draw one token from scores (V,); `counts` tells how often each id stands in the row so far.

    Penalties and biases, temperature, top-k, top-p, min-p, typical-p, in this order; temperature 0
    is greedy. Banned tokens have the score -inf and never come. The lowest id wins a greedy tie.

    Raises EngineError if the best score is not finite: the model overflowed, or all is banned.
    """
    scores_V = penalize(logits_V, params, counts or {})
    best = scores_V.max(-1)  # of NaN it takes the NaN, of a tie the first
    if not best.values.isfinite():
        raise EngineError("the model gave scores that are not finite")
    if params.temperature == 0:
        return int(best.indices)
    probs_V = filter_scores(scores_V.float(), params).softmax(-1)
    return draw(probs_V, generator)


def draw(probs_V: Tensor, generator: torch.Generator) -> int:
    """An id, each as often as its probability (V,) says; never one of probability 0.

    One number is drawn, and looked up in the sums. `torch.multinomial` draws one for each id: of
    250,112 that takes 5 ms, this 0.6.
    """
    place = torch.rand(1, dtype=torch.float64, device=probs_V.device, generator=generator)
    return find_place(probs_V, place)


def find_place(probs_V: Tensor, place: Tensor) -> int:
    """The id at a place (1,) of 0 to 1, where ids take up as much as they are likely (V,).

    Raises EngineError if they are not finite.
    """
    sums_V = probs_V.cumsum(-1, dtype=torch.float64)
    total = sums_V[-1:]
    below = torch.nextafter(total, torch.zeros_like(total))  # a product may be rounded up to it
    found = int(torch.searchsorted(sums_V, torch.minimum(place * total, below), right=True))
    if found == len(sums_V):  # beyond all: so it is with NaN
        raise EngineError("scores over the temperature are not finite")
    return found


class GreedyChoice:
    """The greedy tokens of many rows in one go: for each what `choose_token` gives for it alone."""

    def __init__(self) -> None:
        self._bans: list[Tensor] = []
        self._bans_BV: Tensor | None = None

    def choose(self, logits_BV: Tensor, bans: Sequence[Tensor]) -> list[int | None]:
        """Best tokens by scores (B, V) under bans (V,) of each row; None if the best is not finite.

        The scores are overwritten. Bans are known by what they are, not by what is in them: the
        same rows again are not stacked again.
        """
        is_same = len(bans) == len(self._bans) and all(map(is_, bans, self._bans))
        if self._bans_BV is None or not is_same:
            self._bans, self._bans_BV = list(bans), torch.stack(list(bans))
        best = logits_BV.masked_fill_(self._bans_BV, -torch.inf).max(-1)
        ids = best.indices.masked_fill(~best.values.isfinite(), -1).tolist()
        return [None if token_id < 0 else token_id for token_id in ids]


def penalize(logits_V: Tensor, params: SamplingParams, counts: Mapping[int, int]) -> Tensor:
    """Scores (V,) changed by what the row holds already, and by the biases of its request.

    repetition: positive scores of ids that occurred are divided by it, negative ones multiplied;
    presence: subtracted once from the score of each id that occurred; frequency: as often as it
    occurred. An id that was only given to be gone on from has a count of 0, and is repeated if it
    comes, but not present yet. The argument is left as it is.
    Source: CTRL (arXiv:1909.05858) s4.1 for repetition; OpenAI's API reference for the others.
    """
    if not (params.has_penalties and counts) and not params.logit_bias:
        return logits_V
    scores_V = logits_V.float().clone()
    if counts and params.has_penalties:
        ids = torch.tensor(list(counts), device=scores_V.device)
        times = torch.tensor(list(counts.values()), device=scores_V.device)
        seen = scores_V[ids]
        by = params.repetition_penalty
        seen = torch.where(seen < 0, seen * by, seen / by)
        presence = params.presence_penalty * (times > 0)
        scores_V[ids] = seen - presence - params.frequency_penalty * times
    if params.logit_bias:
        biased, biases = zip(*params.logit_bias, strict=True)
        ids = torch.tensor(biased, device=scores_V.device)
        scores_V.index_add_(0, ids, torch.tensor(biases, device=scores_V.device).to(scores_V.dtype))
    return scores_V


def filter_scores(scores_V: Tensor, params: SamplingParams) -> Tensor:
    """Scores (V,), fp32, over the temperature, with -inf where a filter drops the token."""
    scores_V = scores_V / max(params.temperature, MIN_TEMPERATURE)
    if 0 < params.top_k < len(scores_V):
        scores_V = keep_top_k(scores_V, params.top_k)
    if params.top_p < 1:
        scores_V = keep_top_p(scores_V, params.top_p)
    if params.min_p > 0:
        scores_V = keep_min_p(scores_V, params.min_p)
    if params.typical_p < 1:
        scores_V = keep_typical(scores_V, params.typical_p)
    return scores_V


def keep_top_k(scores_V: Tensor, top_k: int) -> Tensor:
    """Keep the k best, and all that tie with the k-th."""
    smallest_kept = scores_V.topk(top_k).values[-1]
    return scores_V.masked_fill(scores_V < smallest_kept, -torch.inf)


def keep_top_p(scores_V: Tensor, top_p: float) -> Tensor:
    """Keep the smallest set of the likeliest tokens whose probabilities reach top_p; at least one.

    Source: nucleus sampling (arXiv:1904.09751).
    """
    probs_V = scores_V.softmax(-1)
    # those below it are not needed: all together they have less than the rest, 1 - top_p
    needless = min((1 - top_p) / len(probs_V), float(probs_V.max()) / 2)
    likely = probs_V[probs_V > needless].sort(descending=True).values
    # a top_p below 1e-45 is 0 in fp32
    num_kept = max(int((likely.cumsum(-1) - likely < top_p).sum()), 1)
    least = likely[num_kept - 1]
    is_out_V = probs_V < least
    num_ties = num_kept - int((likely > least).sum())
    ties = (probs_V == least).nonzero().squeeze(-1)  # the lowest ids are kept
    return scores_V.masked_fill(is_out_V, -torch.inf).index_fill(-1, ties[num_ties:], -torch.inf)


def keep_min_p(scores_V: Tensor, min_p: float) -> Tensor:
    """Keep tokens at least min_p times as likely as the likeliest.

    Source: arXiv:2407.01082.
    """
    probs_V = scores_V.softmax(-1)
    return scores_V.masked_fill(probs_V < min_p * probs_V.max(), -torch.inf)


def keep_typical(scores_V: Tensor, typical_p: float) -> Tensor:
    """Keep the tokens whose surprise is nearest to the entropy, until they weigh typical_p.

    Source: locally typical sampling (arXiv:2202.00666).
    """
    log_probs_V = scores_V.log_softmax(-1)
    probs_V = log_probs_V.exp()
    entropy = -(log_probs_V * probs_V).nansum()
    distance_V = (-log_probs_V - entropy).abs()
    distances, ids = distance_V.topk(min(NEAREST, len(scores_V)), largest=False)
    total = probs_V[ids].cumsum(-1)
    if total[-1] < typical_p:
        distances, ids = distance_V.sort(stable=True)
        total = scores_V[ids].softmax(-1).cumsum(-1)
    last = min(int((total < typical_p).sum()), len(total) - 1)
    return scores_V.masked_fill(distance_V > distances[last], -torch.inf)


def tell_logprob(logits_V: Tensor, token_id: int, num_top: int) -> TokenLogprob:
    """Log-probabilities by the model's own scores, before anything is done to them, in fp32.

    The chosen token and the likeliest ones are read from the same numbers.
    """
    log_probs_V = logits_V.float().log_softmax(-1)
    values, ids = log_probs_V.topk(min(num_top, len(log_probs_V)))
    top = tuple(zip(ids.tolist(), values.tolist(), strict=True))
    return TokenLogprob(token_id, float(log_probs_V[token_id]), top)
