"""Choosing the next token of a row."""

import torch
from torch import Tensor

from engine.errors import EngineError
from engine.request import SamplingParams

MIN_TEMPERATURE = 1e-6  # below it scores overflow fp32, and long before it only the best is drawn


def choose_token(logits_V: Tensor, params: SamplingParams, generator: torch.Generator) -> int:
    """Draw one token from scores (V,).

    Temperature, then top-k, then top-p; temperature 0 is greedy.

    Banned tokens have the score -inf. The lowest id wins a greedy tie; top-k keeps all that tie
    with the k-th. Top-p keeps the smallest set of the most likely tokens whose probabilities reach
    top_p, at least one.

    Raises EngineError if the best score is not finite: the model overflowed, or all is banned.
    """
    if not logits_V.max().isfinite():  # of NaN, max and argmax alike take the NaN
        raise EngineError("the model gave scores that are not finite")
    if params.temperature == 0:
        return int(logits_V.argmax())
    scores_V = logits_V.float() / max(params.temperature, MIN_TEMPERATURE)
    if 0 < params.top_k < len(scores_V):
        smallest_kept = scores_V.topk(params.top_k).values[-1]
        scores_V = scores_V.masked_fill(scores_V < smallest_kept, -torch.inf)
    probs_V = scores_V.softmax(-1)
    if params.top_p < 1:
        sorted_V, ids_V = probs_V.sort(descending=True, stable=True)
        before_V = sorted_V.cumsum(-1) - sorted_V
        probs_V[ids_V[before_V >= params.top_p]] = 0.0
    return int(torch.multinomial(probs_V, 1, generator=generator))
