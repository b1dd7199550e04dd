"""From a text to a request: what the encoder reads and where the blanks are.

Source: CPM-2's sequence protocol; CPM-2.1's continuation; T5's sentinels.
"""

from collections.abc import Sequence

from engine.config import ModelConfig
from engine.errors import PromptTooLong, RequestError
from engine.request import Request, SamplingParams
from engine.tokenizer import Tokenizer

BLANK = "<span>"
MAX_BLANKS = 16
LENGTH_FACTOR = 4  # relative positions reach further than training did, but not without end
MAX_TOKEN_CHARS = 24  # no vocabulary has a longer piece; bounds the work on a text that cannot fit


def build_request(
    prompt: str | Sequence[int],
    tokenizer: Tokenizer,
    config: ModelConfig,
    params: SamplingParams,
    request_id: str,
    *,
    fill: bool = False,
) -> Request:
    """Tokenize a prompt.

    With `fill`, each `<span>` in it is a blank to fill; otherwise it is continued.

    Raises RequestError if the prompt is empty, an id is unknown or there is no blank to fill, and
    PromptTooLong above LENGTH_FACTOR times the length that the model was trained on.
    """
    num_blanks = 0
    limit = config.max_positions * LENGTH_FACTOR
    if isinstance(prompt, str):
        if len(prompt) > limit * MAX_TOKEN_CHARS:
            raise PromptTooLong(
                f"the prompt has {len(prompt):,} characters; the limit is {limit} tokens", "prompt"
            )
        parts = prompt.split(BLANK) if fill else [prompt]
        num_blanks = len(parts) - 1
        ids = _encode_parts(parts, tokenizer)
    else:
        ids = list(prompt)
        if unknown := [i for i in ids if not 0 <= i < config.vocab_size]:
            raise RequestError(
                f"token id {unknown[0]} is outside the vocabulary of {config.vocab_size}", "prompt"
            )
        num_blanks = sum(tokenizer.sentinel_index(i) is not None for i in ids) if fill else 0
    if not ids:
        raise RequestError("the prompt is empty; give at least one token", "prompt")
    if fill and not 1 <= num_blanks <= min(MAX_BLANKS, tokenizer.num_sentinels - 1):
        raise RequestError(
            f"the prompt holds {num_blanks} blanks; to fill, mark 1 to {MAX_BLANKS} with {BLANK}",
            "prompt",
        )
    ids += _ending(tokenizer, config, fill=fill)
    if len(ids) > limit:
        raise PromptTooLong(f"the prompt has {len(ids)} tokens; the limit is {limit}", "prompt")
    return Request(
        request_id=request_id, encoder_ids=tuple(ids), params=params, num_blanks=num_blanks
    )


def _encode_parts(parts: list[str], tokenizer: Tokenizer) -> list[int]:
    ids = tokenizer.encode(parts[0])
    for index, part in enumerate(parts[1:]):
        ids += [tokenizer.sentinel_id(index), *tokenizer.encode(part)]
    return ids


def _ending(tokenizer: Tokenizer, config: ModelConfig, *, fill: bool) -> list[int]:
    """What closes the encoder text: T5's end mark, or the sentinel after which CPM-2 goes on."""
    if config.continuation_sentinel is None:
        return list(config.eos_token_ids[:1])
    return [] if fill else [tokenizer.sentinel_id(config.continuation_sentinel)]


def decoder_prefix(request: Request, tokenizer: Tokenizer, config: ModelConfig) -> list[int]:
    """What the decoder is given before the first free token.

    The start id and the sentinel it answers to.
    """
    prefix = [config.decoder_start_token_id]
    if request.num_blanks:
        prefix.append(tokenizer.sentinel_id(0))
    elif config.continuation_sentinel is not None:
        prefix.append(tokenizer.sentinel_id(config.continuation_sentinel))
    return prefix
