"""The state of a run on disk: weights, optimiser, step; safetensors only, written atomically.

One process writes one file, several write a folder of shards. Each number of processes reads both.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from engine.checkpoint_writer import sync
from training.distributed import ALONE, Workers, sharded_like
from training.state_shards import (
    find_shards,
    read_shards,
    remove_shards,
    save_shards,
    shards_step,
)

STATE_FILE = "state.safetensors"
MOMENTS = ("exp_avg", "exp_avg_sq")  # of AdamW: the states of several processes


def save_state(
    run: Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    average: Mapping[str, Tensor] | None = None,
    workers: Workers = ALONE,
    **more: object,
) -> None:
    """Write the state after `step` steps, replacing the last one; all processes come here.

    `average` holds averaged weights, `more` are facts that the run wants back.
    Raises OSError if the disk is full; the last state is still there then.
    """
    facts = {"step": step, "optimizer": type(optimizer).__name__, **more}
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    for index, values in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": torch.as_tensor(v) for name, v in values.items()}
    tensors |= {f"average.{name}": value for name, value in (average or {}).items()}
    if workers.size == 1:
        write_state(run, facts, tensors)
        remove_shards(run)
        return
    save_shards(run, facts, tensors, workers)
    if workers.is_first:
        (run / STATE_FILE).unlink(missing_ok=True)


def write_state(run: Path, facts: Mapping[str, object], tensors: Mapping[str, Tensor]) -> None:
    """Write the tensors of a state, named as `save_state` does, replacing the last one.

    Raises OSError if the disk is full; the last state is still there then.
    """
    contiguous = {name: value.detach().contiguous() for name, value in tensors.items()}
    partial = run / (STATE_FILE + ".partial")
    try:
        save_file(contiguous, partial, metadata={"infmoe": json.dumps(facts)})
        sync(partial)
    except (SafetensorError, OSError) as error:
        partial.unlink(missing_ok=True)
        raise OSError(
            f"{partial}: cannot be written ({error}); the state before it is kept: make room and "
            "start the same command again"
        ) from error
    partial.replace(run / STATE_FILE)
    sync(run)


def load_state(
    run: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    average: dict[str, Tensor] | None = None,
    more: dict[str, Any] | None = None,
) -> int:
    """Restore a run; returns the number of steps done, 0 if there is no state yet.

    Fills in `average` and `more`, where given, with what `save_state` was given; `more` also before
    an error, as far as the state could be read.
    Raises ValueError if the state is damaged or belongs to another model or optimiser.
    """
    path = find_state(run)
    if path is None:
        return 0
    try:
        own = model.state_dict()
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        models = [own.get(names.get(id(p), ""), p) for p in parameters]  # cut as the moments are
        facts, tensors = _read(path, own, models)
        if more is not None:
            more.update(facts)
        step, kind = int(facts["step"]), type(optimizer).__name__
        if facts.get("optimizer", kind) != kind:
            raise ValueError(f"it was made by {facts['optimizer']}, the recipe has {kind}")
        weights = _part(tensors, "model.")
        model.load_state_dict({n: sharded_like(t, own.get(n, t)) for n, t in weights.items()})
        template = optimizer.state_dict()
        state = _optimizer_state(_part(tensors, "optimizer."))
        template["state"] = {
            index: {key: sharded_like(t, models[index]) for key, t in values.items()}
            for index, values in state.items()
        }
        optimizer.load_state_dict(template)
        if average is not None and step:  # a state that was grown begins a new average
            found = _part(tensors, "average.")
            average.update({name: found[name] for name in average})
    except (SafetensorError, KeyError, TypeError, RuntimeError, ValueError, IndexError) as error:
        raise ValueError(
            f"{path}: cannot be resumed with this recipe ({error}); "
            "give another run folder or delete it"
        ) from error
    return step


def find_state(run: Path) -> Path | None:
    """The last state of a run, a file or a folder of shards; None if it has none.

    Both are there if a run was killed right after it had written one of them.
    Raises ValueError if the file is damaged.
    """
    path, shards = run / STATE_FILE, find_shards(run)
    if shards is None or not path.exists():
        return shards or (path if path.exists() else None)
    try:
        return path if int(read_facts(path)["step"]) >= shards_step(shards) else shards
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path}: is damaged ({error}); delete it to go on from {shards}"
        ) from error


def _read(
    path: Path, weights: Mapping[str, Tensor], models: list[Tensor]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read a state, of shards only what this process needs."""
    if not path.is_dir():
        return read_state(path)
    like = {f"model.{name}": tensor for name, tensor in weights.items()}
    for index, model in enumerate(models):
        like |= {f"optimizer.{index}.{key}": model for key in MOMENTS}
    return read_shards(path, like)


def read_facts(path: Path) -> dict[str, Any]:
    """What a state file tells of itself. Raises as `read_state`."""
    with safe_open(path, framework="pt") as file:
        facts: dict[str, Any] = json.loads(file.metadata()["infmoe"])
        return facts


def read_state(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What a state tells of itself, and its tensors by name, whole.

    Raises SafetensorError, KeyError, TypeError or ValueError if it is damaged.
    """
    if path.is_dir():
        return read_shards(path)
    with safe_open(path, framework="pt") as file:
        facts = json.loads(file.metadata()["infmoe"])
        return facts, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def _optimizer_state(tensors: dict[str, Tensor]) -> dict[int, dict[str, Tensor]]:
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = value
    return state
