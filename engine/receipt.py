"""What an answer came from: enough to ask the same again, and to tell why it came out otherwise."""

import hashlib
from dataclasses import asdict, fields

from engine.adapters import Adapter
from engine.checkpoint_tensors import raw_bytes
from engine.grammar import Grammar
from engine.request import BeamParams, Finished, Request, SamplingParams

FILTERS = frozenset(("top_k", "top_p", "min_p", "typical_p"))  # a greedy choice has no use for them
# What a search goes by; it draws nothing, and neither penalties nor biases take part.
SEARCHED = frozenset(("max_tokens", "min_tokens", "ignore_eos", "allowed_token_ids")) | frozenset(
    ("stop", "stop_token_ids", "include_stop")
)


def make_receipt(
    request: Request, finished: Finished, *, model_fingerprint: str, is_batch_invariant: bool
) -> dict[str, object]:
    """A receipt, ready for JSON; `model_fingerprint` is that of `engine.adapters`.

    A task has no seed, and of the parameters of sampling a search alone has some.
    """
    adapter, task = request.adapter, request.task
    parameters = effective_parameters(request.params)
    if task is not None:
        used = SEARCHED if isinstance(task, BeamParams) else frozenset[str]()
        parameters = {name: value for name, value in parameters.items() if name in used}
    return {
        "seed": finished.seed if task is None else None,
        "parameters": parameters,
        "num_blanks": request.num_blanks,
        "task": None if task is None else {"name": type(task).__name__, **asdict(task)},
        "adapter": None if adapter is None else adapter.reference,
        "adapter_checksum": None if adapter is None else adapter_checksum(adapter),
        "adapter_base_fingerprint": None if adapter is None else adapter.base_fingerprint,
        "model_fingerprint": model_fingerprint,
        "is_batch_invariant": is_batch_invariant,
    }


def effective_parameters(params: SamplingParams) -> dict[str, object]:
    """The parameters that changed anything, max_tokens and temperature in any case.

    The seed is left out: the one that was used is told by the end of the request. A grammar is
    told by its kind and a checksum.
    """
    told: dict[str, object] = {}
    for field in fields(params):
        value = getattr(params, field.name)
        is_idle = value == field.default or (field.name in FILTERS and params.temperature == 0)
        if field.name in ("max_tokens", "temperature") or not is_idle:
            told[field.name] = _describe(value)
    told.pop("seed", None)
    return told


def adapter_checksum(adapter: Adapter) -> str:
    """SHA-256 of an adapter's slots and vectors, as this process holds them."""
    digest = hashlib.sha256(repr(adapter.slots).encode())
    digest.update(raw_bytes(adapter.prompt_PD.contiguous()).data)
    return digest.hexdigest()


def _describe(value: object) -> object:
    if isinstance(value, Grammar):
        return {"kind": value.kind, "sha256": hashlib.sha256(value.spec.encode()).hexdigest()}
    if isinstance(value, tuple):
        return [_describe(part) for part in value]
    return value
