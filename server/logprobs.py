"""Log-probabilities as OpenAI's completions tell them: four lists with an entry for each token."""

from collections.abc import Callable, Sequence

from engine.request import TokenLogprob
from server.schemas import Logprobs

LOWEST = -9999.0  # JSON has no infinity

NameToken = Callable[[int], str]


def tell_logprobs(entries: Sequence[TokenLogprob], offset: int, name_token: NameToken) -> Logprobs:
    """The lists for some tokens, whose text begins at character `offset`.

    The chosen token is always in its map, with the very number that is in `token_logprobs`; of two
    tokens of one name the likelier one is kept.
    """
    told = Logprobs(tokens=[], token_logprobs=[], top_logprobs=[], text_offset=[])
    for entry in entries:
        likeliest: dict[str, float] = {}
        for token_id, logprob in (*entry.top, (entry.token_id, entry.logprob)):
            name = name_token(token_id)
            likeliest[name] = max(likeliest.get(name, LOWEST), logprob)
        told.tokens.append(name_token(entry.token_id))
        told.token_logprobs.append(max(entry.logprob, LOWEST))
        told.top_logprobs.append(likeliest)
        told.text_offset.append(offset)
    return told


def join_logprobs(parts: Sequence[Logprobs]) -> Logprobs | None:
    """The lists of several pieces, one after the other; None if there are none."""
    if not parts:
        return None
    return Logprobs(
        tokens=[token for part in parts for token in part.tokens],
        token_logprobs=[value for part in parts for value in part.token_logprobs],
        top_logprobs=[likeliest for part in parts for likeliest in part.top_logprobs],
        text_offset=[offset for part in parts for offset in part.text_offset],
    )
