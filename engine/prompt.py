"""From a text to a request: what the encoder reads and where the blanks are.

Source: CPM-2's sequence protocol; CPM-2.1's continuation; T5's sentinels.
"""

from collections.abc import Sequence

from engine.adapters import Adapter
from engine.config import ModelConfig
from engine.errors import PromptTooLong, RequestError, TokenizerError
from engine.request import Request, SamplingParams
from engine.tokenizer import Tokenizer

BLANK = "<span>"
MAX_BLANKS = 16
MAX_TOKEN_CHARS = 24  # no vocabulary has a longer piece; bounds the work on a text that cannot fit


def check_tokenizer(tokenizer: Tokenizer, config: ModelConfig) -> None:
    """Raise TokenizerError if a model cannot work with a tokenizer."""
    if tokenizer.vocab_size > config.vocab_size:
        raise TokenizerError(
            f"the tokenizer names {tokenizer.vocab_size} tokens, the model has {config.vocab_size}"
        )
    if config.continuation_sentinel is not None:
        try:
            tokenizer.sentinel_id(config.continuation_sentinel)
        except ValueError as error:
            raise TokenizerError(f"continuation_sentinel: {error}") from error


def build_request(
    prompt: str | Sequence[int],
    tokenizer: Tokenizer,
    config: ModelConfig,
    params: SamplingParams,
    request_id: str,
    *,
    fill: bool = False,
    adapter: Adapter | None = None,
    decoder_prompt: str | Sequence[int] | None = None,
) -> Request:
    """Tokenize a prompt.

    With `fill`, each `<span>` in it is a blank to fill; otherwise it is continued. The vectors of
    the adapter count towards its length. `decoder_prompt` is what the answer begins with; where it
    is empty, what the config says.

    Raises RequestError if the prompt is empty, an id is unknown, there is no blank to fill or
    blanks given as ids are out of order, or if max_tokens is above what the
    config allows; PromptTooLong if the prompt is, or decoder_prompt and max_tokens together; of a
    decoder-only model all of them together.
    """
    num_blanks = 0
    limit = config.max_prompt_tokens
    if params.max_tokens > limit:  # the cache is allocated for all of them
        raise RequestError(f"max_tokens is {params.max_tokens}; the limit is {limit}", "max_tokens")
    if fill:
        _check_can_fill(tokenizer, config)
    _check_ids(params, config)
    begin = decoder_prompt or config.answer_begin_ids
    decoder_ids = _read_decoder_prompt(begin, tokenizer, config, params)
    if isinstance(prompt, str):
        _check_chars(prompt, limit, "prompt")
        parts = prompt.split(BLANK) if fill else [prompt]
        num_blanks = len(parts) - 1
        ids = _encode_parts(parts, tokenizer)
    else:
        ids = list(prompt)
        _check_known(ids, config, "prompt")
        num_blanks = _count_blanks(ids, tokenizer) if fill else 0
    if not ids:
        raise RequestError("the prompt is empty; give at least one token", "prompt")
    most_blanks = min(MAX_BLANKS, tokenizer.num_sentinels - 1)  # one more closes the last blank
    if fill and not 1 <= num_blanks <= most_blanks:
        raise RequestError(
            f"the prompt holds {num_blanks} blanks; to fill, mark 1 to {most_blanks} with {BLANK}",
            "prompt",
        )
    ending = _ending(tokenizer, config, fill=fill)
    if isinstance(prompt, str) or ids[-len(ending) :] != ending:  # given ids may be closed already
        ids += ending
    vectors = adapter.num_vectors if adapter else 0
    if config.is_decoder_only:
        ids = _begun(ids, prompt, config)
        _check_adapter(adapter)
        _check_together(len(ids) + vectors, len(decoder_ids), params, limit)
    if len(ids) + vectors > limit:
        beside = f" beside the {vectors} of its adapter" if vectors else ""
        raise PromptTooLong(
            f"the prompt has {len(ids)} tokens{beside}; the limit is {limit}", "prompt"
        )
    return Request(
        request_id=request_id,
        encoder_ids=tuple(ids),
        params=params,
        num_blanks=num_blanks,
        adapter=adapter,
        decoder_ids=tuple(decoder_ids),
        num_held=_num_held(ids, params, config),
    )


def _check_can_fill(tokenizer: Tokenizer, config: ModelConfig) -> None:
    if config.is_decoder_only:
        raise RequestError(
            "a decoder-only model continues texts; it does not fill blanks", "prompt"
        )
    if tokenizer.num_sentinels < 2:  # one for a blank, one to close it
        raise RequestError("the model's vocabulary has no sentinels to fill blanks with", "prompt")


def _begun(ids: list[int], prompt: str | Sequence[int], config: ModelConfig) -> list[int]:
    """A text with what the tokenizer puts in front of one; a template may have written it."""
    begin = list(config.begin_token_ids)
    return ids if not isinstance(prompt, str) or ids[: len(begin)] == begin else begin + ids


def _num_held(ids: Sequence[int], params: SamplingParams, config: ModelConfig) -> int:
    """Ids that a decoder-only model does not read at first, for their scores are asked for."""
    if not config.is_decoder_only:
        return 0
    return 1 if params.prompt_logprobs is None else len(ids)


def _check_adapter(adapter: Adapter | None) -> None:
    if adapter is not None and adapter.slots.back:
        raise RequestError(
            f"the adapter {adapter.name} has vectors behind the text; a decoder-only model takes "
            "them in front of it or within",
            "adapter",
        )


def _check_together(prompt: int, given: int, params: SamplingParams, limit: int) -> None:
    if prompt + given + params.max_tokens > limit:
        parts = f"the prompt has {prompt} tokens"
        parts += f", decoder_prompt {given}" if given else ""
        raise PromptTooLong(
            f"{parts} and max_tokens is {params.max_tokens}; the limit is {limit} together",
            "prompt",
        )


def _read_decoder_prompt(
    prompt: str | Sequence[int] | None,
    tokenizer: Tokenizer,
    config: ModelConfig,
    params: SamplingParams,
) -> list[int]:
    """Ids that the answer begins with; the caches hold them beside max_tokens."""
    limit = config.max_prompt_tokens
    if isinstance(prompt, str):
        _check_chars(prompt, limit, "decoder_prompt")
        ids = tokenizer.encode(prompt)
    else:
        ids = list(prompt or ())
        _check_known(ids, config, "decoder_prompt")
    if len(ids) + params.max_tokens > limit:
        raise PromptTooLong(
            f"decoder_prompt has {len(ids)} tokens and max_tokens is {params.max_tokens}; "
            f"the limit is {limit} together",
            "decoder_prompt",
        )
    if params.grammar is not None and tokenizer.decode(ids).endswith("\ufffd"):
        text = "decoder_prompt ends in half a character, which no grammar can go on from"
        raise RequestError(text, "decoder_prompt")
    return ids


def _check_chars(prompt: str, limit: int, field: str) -> None:
    """Raise PromptTooLong for a text of which no tokenizer could make so few tokens."""
    if len(prompt) > limit * MAX_TOKEN_CHARS:
        raise PromptTooLong(
            f"the {field} has {len(prompt):,} characters; the limit is {limit} tokens", field
        )


def _check_known(ids: Sequence[int], config: ModelConfig, field: str) -> None:
    if unknown := [i for i in ids if not 0 <= i < config.vocab_size]:
        raise RequestError(
            f"token id {unknown[0]} is outside the vocabulary of {config.vocab_size}", field
        )


def _encode_parts(parts: list[str], tokenizer: Tokenizer) -> list[int]:
    ids = tokenizer.encode(parts[0])
    for index, part in enumerate(parts[1:]):
        ids += [tokenizer.sentinel_id(index), *tokenizer.encode(part)]
    return ids


def _count_blanks(ids: list[int], tokenizer: Tokenizer) -> int:
    """Number of sentinels; answers are read from sentinel 0 on, so the blanks must be in order."""
    found = [index for i in ids if (index := tokenizer.sentinel_index(i)) is not None]
    if found != list(range(len(found))):
        raise RequestError(
            "the sentinels among the token ids must be 0, 1, 2, ... in this order, each once",
            "prompt",
        )
    return len(found)


def _ending(tokenizer: Tokenizer, config: ModelConfig, *, fill: bool) -> list[int]:
    """What closes the encoder text: T5's end mark, or the sentinel after which CPM-2 goes on."""
    if config.is_decoder_only:
        return []
    if config.continuation_sentinel is None:
        return list(config.eos_token_ids[:1])
    return [] if fill else [tokenizer.sentinel_id(config.continuation_sentinel)]


def decoder_prefix(request: Request, tokenizer: Tokenizer, config: ModelConfig) -> list[int]:
    """What the decoder is given before the first free token.

    The start id, the sentinel it answers to, and what the answer begins with. A decoder-only model
    has no start id; it is given what has been held of the prompt.
    """
    if config.is_decoder_only:
        held = request.encoder_ids[len(request.encoder_ids) - request.num_held :]
        return [*held, *request.decoder_ids]
    prefix = [config.decoder_start_token_id]
    if request.num_blanks:
        prefix.append(tokenizer.sentinel_id(0))
    elif config.continuation_sentinel is not None:
        prefix.append(tokenizer.sentinel_id(config.continuation_sentinel))
    return [*prefix, *request.decoder_ids]


def _check_ids(params: SamplingParams, config: ModelConfig) -> None:
    """Raise RequestError, naming the field, if a parameter names an id that the model lacks."""
    named = {
        "logit_bias": [token_id for token_id, _ in params.logit_bias],
        "stop_token_ids": params.stop_token_ids,
        "allowed_token_ids": params.allowed_token_ids,
        "bad_words": [token_id for ids in params.bad_words for token_id in ids],
    }
    for field, ids in named.items():
        _check_known(ids, config, field)
