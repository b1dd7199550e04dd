"""Log-probabilities as the different routes tell them."""

from collections.abc import Sequence
from math import isnan

from engine.request import TokenLogprob
from engine.tokenizer import Tokenizer
from server.parts import Spot
from server.schemas_chat import ChatLogprobs, ChatToken, ChatTop
from server.schemas_completions import Logprobs, PromptLogprob, TokenInfo

LOWEST = -9999.0  # JSON has no infinity


class TokenNames:
    """Names of tokens in log-probabilities: their text, which two may share, or their id."""

    def __init__(self, tokenizer: Tokenizer, *, as_ids: bool = False) -> None:
        self._tokenizer = tokenizer
        self._as_ids = as_ids

    def name(self, token_id: int) -> str:
        """The text of a token; an end mark has none and goes by its id."""
        by_id = f"token_id:{token_id}"
        return by_id if self._as_ids else self._tokenizer.decode([token_id]) or by_id

    def spell(self, token_id: int) -> list[int] | None:
        """The bytes of a token, which may be a part of a character; None if it has none."""
        spelled, _ = self._tokenizer.spell(token_id, 0)
        return list(spelled) or None


def tell_logprobs(spots: Sequence[Spot], names: TokenNames) -> Logprobs | None:
    """The four lists of OpenAI's completions; None without tokens.

    The chosen token is always in its map, with the very number that is in `token_logprobs`; of two
    tokens of one name the likelier one is kept. What nothing stands before has no log-probability.
    """
    if not spots:
        return None
    told = Logprobs(tokens=[], token_logprobs=[], top_logprobs=[], text_offset=[])
    for spot in spots:
        token = spot.token
        told.tokens.append(names.name(token.token_id))
        told.text_offset.append(spot.offset)
        if isnan(token.logprob):
            told.token_logprobs.append(None)
            told.top_logprobs.append(None)
            continue
        likeliest: dict[str, float] = {}
        for token_id, logprob in (*token.top, (token.token_id, token.logprob)):
            name = names.name(token_id)
            likeliest[name] = max(likeliest.get(name, LOWEST), logprob)
        told.token_logprobs.append(max(token.logprob, LOWEST))
        told.top_logprobs.append(likeliest)
    return told


def tell_chat_logprobs(spots: Sequence[Spot], names: TokenNames) -> ChatLogprobs | None:
    """The entries of OpenAI's chat completions, with the bytes of each token."""

    def tell(token_id: int, logprob: float) -> dict[str, object]:
        return {
            "token": names.name(token_id),
            "logprob": max(logprob, LOWEST),
            "bytes": names.spell(token_id),
        }

    if not spots:
        return None
    content = []
    for spot in spots:
        top = [ChatTop.model_validate(tell(*pair)) for pair in spot.token.top]
        chosen = tell(spot.token.token_id, spot.token.logprob)
        content.append(ChatToken.model_validate({**chosen, "top_logprobs": top}))
    return ChatLogprobs(content=content)


def tell_tokens(tokens: Sequence[TokenLogprob], names: TokenNames) -> list[TokenInfo]:
    """The entries of our own route: ids and texts."""
    return [
        TokenInfo(
            id=token.token_id,
            token=names.name(token.token_id),
            logprob=None if isnan(token.logprob) else max(token.logprob, LOWEST),
            top=[(token_id, max(logprob, LOWEST)) for token_id, logprob in token.top],
        )
        for token in tokens
    ]


def tell_prompt_logprobs(
    tokens: Sequence[TokenLogprob], names: TokenNames
) -> list[dict[str, PromptLogprob] | None]:
    """A map by id for each token of a prompt; the chosen one is in it. None for the very first."""
    return [
        None
        if isnan(token.logprob)
        else {
            str(token_id): PromptLogprob(
                logprob=max(logprob, LOWEST), decoded_token=names.name(token_id)
            )
            for token_id, logprob in (*token.top, (token.token_id, token.logprob))
        }
        for token in tokens
    ]
