"""What a request asks of the engine before it runs: whether it can be, how many rows and bytes."""

import torch

from engine.batch import MAX_PREFIX
from engine.beam import require_no_blanks
from engine.config import ModelConfig
from engine.errors import RequestError
from engine.footprint import Workload, cache_bytes, output_bytes
from engine.model.transformer import Transformer
from engine.request import MAX_LOGPROBS, BeamParams, Continuations, Pooling, Request
from engine.scheduler import Demand


def make_demand(request: Request, model: Transformer, arrived: float = 0.0) -> Demand:
    """What the scheduler must know of a request that came at a time of `perf_counter`."""
    deadline_s = request.deadline_s
    return Demand(
        source_tokens=request.source.num_positions,
        max_tokens=target_tokens(request),
        arrived=arrived,
        key=request.key,
        adapter=request.adapter.name if request.adapter else "",
        priority=request.priority,
        deadline=None if deadline_s is None else arrived + deadline_s,
        rows=num_rows(request),
        own_bytes=search_bytes(request, model),
        held_bytes=held_bytes(request, model),
        is_row=request.task is None,
    )


def check_task(request: Request, config: ModelConfig) -> None:
    """Raise RequestError if a request cannot do what it asks for."""
    task = request.task
    if isinstance(task, BeamParams):
        require_no_blanks(request)
    if isinstance(task, Pooling) and config.is_decoder_only:
        text = "a decoder-only model has no encoder whose output would be a vector of a text"
        raise RequestError(f"{text}: embeddings are there for models with an encoder", "input")
    if not isinstance(task, Continuations):
        return
    if not task.choices or not all(task.choices):
        raise RequestError("give at least one choice, and no empty one", "choices")
    if unknown := [i for ids in task.choices for i in ids if not 0 <= i < config.vocab_size]:
        raise RequestError(
            f"token id {unknown[0]} is outside the vocabulary of {config.vocab_size}", "choices"
        )
    limit = config.max_prompt_tokens
    longest = max(map(len, task.choices)) + len(request.decoder_ids)
    if config.is_decoder_only:
        longest += request.num_prompt_positions
    if longest > limit:
        raise RequestError(f"a choice has {longest} tokens; the limit is {limit}", "choices")
    if not 0 <= task.top <= MAX_LOGPROBS:
        raise RequestError(f"top is {task.top}; allowed: 0 to {MAX_LOGPROBS}", "logprobs")


def check_request(
    request: Request, config: ModelConfig, dtype: torch.dtype, limit_bytes: int | None
) -> None:
    """Raise RequestError if a request could never be carried out.

    `limit_bytes` is what caches may take, None for no limit; `dtype` that of the model.
    """
    check_task(request, config)
    needed = beam_bytes(request, config, dtype)
    if limit_bytes is not None and needed > limit_bytes:
        raise RequestError(
            f"a search of {num_rows(request)} beams takes {needed:,} bytes of caches for this text "
            f"and max_tokens; there are {limit_bytes:,}: ask for less, or give more memory",
            "num_beams",
        )


def cost_of(request: Request) -> int:
    """Tokens that a request may take in all, as its `Demand` tells them."""
    return request.source.num_positions + num_rows(request) * target_tokens(request)


def num_rows(request: Request) -> int:
    """Rows of the batch that a request takes."""
    return request.task.num_beams if isinstance(request.task, BeamParams) else 1


def target_tokens(request: Request) -> int:
    """Tokens that the decoder reads or makes for each row of a request, but for its start."""
    task, given = request.task, len(request.decoder_ids) + request.num_held
    if isinstance(task, Continuations):
        return sum(given + len(choice) for choice in task.choices)
    return 0 if isinstance(task, Pooling) else given + request.params.max_tokens


def search_bytes(request: Request, model: Transformer) -> int:
    """Bytes of caches that a search takes for itself; 0 for any other request."""
    return beam_bytes(request, model.config, model.embedding.weight.dtype)


def beam_bytes(request: Request, config: ModelConfig, dtype: torch.dtype) -> int:
    """The same, for a model of that config and dtype.

    As many rows as it has beams: they share what they read of the text, but are copied in between.
    One more of a decoder-only model, of which all are copies at first. And what was made of the
    text, which stays until the end.
    """
    if not isinstance(request.task, BeamParams):
        return 0
    source_tokens = max(request.source.num_positions, 1)
    target = MAX_PREFIX + target_tokens(request)
    rows = num_rows(request) + int(config.is_decoder_only)
    load = Workload(rows=rows, source_tokens=source_tokens, target_tokens=target)
    return cache_bytes(config, dtype, load) + output_bytes(config, dtype, source_tokens)


def held_bytes(request: Request, model: Transformer) -> int:
    """Bytes of what was made of its text that a score, or a vector, holds until it is through."""
    if request.task is None or isinstance(request.task, BeamParams):
        return 0
    dtype = model.embedding.weight.dtype
    return output_bytes(model.config, dtype, request.source.num_positions)


def row_bytes(model: Transformer, rows: int, source_tokens: int, target_tokens: int) -> int:
    """Bytes of the caches of rows of those lengths."""
    load = Workload(rows=rows, source_tokens=max(source_tokens, 1), target_tokens=target_tokens)
    return cache_bytes(model.config, model.embedding.weight.dtype, load)
