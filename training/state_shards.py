"""The state of a run of several processes: each writes its own shards, any number can read them.

A folder `state-00000040` in the run folder, of safetensors files through torch's distributed
checkpoints. It is written under another name and renamed when all shards are on the disk, so a
half-written one is never read. Functions import what torch has for it: it takes over a second.
"""

import json
import re
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.checkpoint_writer import sync
from training.distributed import ALONE, Workers

FACTS = "facts.json"
PARTIAL = ".partial"
FOLDER = re.compile(r"state-(\d{8})")


def save_shards(
    run: Path, facts: Mapping[str, Any], tensors: Mapping[str, Tensor], workers: Workers = ALONE
) -> Path:
    """Write a state after `facts["step"]` steps; all processes come here. Older ones are removed.

    Raises OSError if the disk is full; the last state is still there then.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    folder = run / f"state-{facts['step']:08d}"
    partial = folder.with_name(folder.name + PARTIAL)
    if workers.is_first:
        _clear(partial)
        partial.mkdir()
    workers.wait()
    # the format slices what it reads, and a scalar has no slices
    scalars = {name: tensor.item() for name, tensor in tensors.items() if tensor.ndim == 0}
    arrays = {name: tensor.detach() for name, tensor in tensors.items() if tensor.ndim}
    writer = HuggingFaceStorageWriter(str(partial), save_distributed=True)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
            save(arrays, storage_writer=writer, no_dist=workers.size == 1)
        if workers.is_first:
            noted = {"facts": dict(facts), "scalars": scalars, "shards": workers.size}
            (partial / FACTS).write_text(json.dumps(noted), encoding="utf-8")
            sync(partial / FACTS, partial)
    except (CheckpointException, OSError) as error:
        if workers.is_first:
            _clear(partial)
        raise OSError(
            f"{partial}: cannot be written ({_reason(error)}); the state before it is kept: make "
            "room and start the same command again"
        ) from error
    if workers.is_first:
        _clear(folder)
        partial.replace(folder)
        sync(run)
        remove_shards(run, but=folder)
    workers.wait()
    return folder


def find_shards(run: Path) -> Path | None:
    """The complete state after the most steps; None if there is none."""
    found = [path for path in run.glob("state-*") if FOLDER.fullmatch(path.name)]
    return max(found, key=shards_step, default=None)


def shards_step(folder: Path) -> int:
    """After how many steps the state of a folder is."""
    match = FOLDER.fullmatch(folder.name)
    assert match is not None
    return int(match[1])


def remove_shards(run: Path, but: Path | None = None) -> None:
    """Remove the states of a run, half-written ones too, but for one."""
    for path in run.glob("state-*"):
        if path != but and FOLDER.fullmatch(path.name.removesuffix(PARTIAL)):
            _clear(path)


def read_shards(
    folder: Path, like: Mapping[str, Tensor] | None = None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What a state tells of itself, and its tensors by name.

    A tensor that `like` names is cut as that one, if the shapes agree, and each process reads its
    part; others are whole. Raises ValueError or KeyError if the state is damaged.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata
    from torch.distributed.checkpoint.state_dict_loader import load

    noted = json.loads((folder / FACTS).read_bytes())
    count = len(list(folder.glob("*.safetensors")))
    if count != noted["shards"]:
        raise ValueError(f"it has {count} of {noted['shards']} files of shards")
    reader = HuggingFaceStorageReader(str(folder))
    tensors: dict[str, Tensor] = {}
    for name, about in reader.read_metadata().state_dict_metadata.items():
        assert isinstance(about, TensorStorageMetadata)  # nothing else is saved
        model = (like or {}).get(name)
        if model is None or model.shape != about.size:
            model = torch.empty(about.size, dtype=about.properties.dtype)
        tensors[name] = torch.empty_like(model, requires_grad=False)
    is_alone = not torch.distributed.is_initialized()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
            load(tensors, storage_reader=reader, no_dist=is_alone)
    except CheckpointException as error:
        raise ValueError(f"its shards cannot be read: {_reason(error)}") from error
    scalars = {name: torch.tensor(float(value)) for name, value in noted["scalars"].items()}
    return noted["facts"], tensors | scalars


def _clear(path: Path) -> None:
    if path.exists():
        shutil.rmtree(path)


def _reason(error: BaseException) -> str:
    """What went wrong, and in which process; torch's own text has every call before it."""
    failures = getattr(error, "failures", {})
    found = [f"process {rank}: {failure[0]}" for rank, failure in failures.items()]
    return "; ".join(found) or str(error)
