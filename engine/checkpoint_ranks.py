"""Files of model-parallel ranks, as CPM-1 and CPM-2 were released: finding, reading, merging them.

    ROOT/latest_checkpointed_iteration.txt         names ITER
    ROOT/ITER/mp_rank_{MM}_model_states.pt         or mp_rank_{EE}_{MM}: expert EE, rank MM

The cuts are those of Megatron-LM (arXiv:1909.08053).
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from engine.checkpoint_tensors import Shape, translated
from engine.errors import CheckpointError
from engine.pickles import load_state

LATEST = "latest_checkpointed_iteration.txt"
RANK_FILE = re.compile(r"mp_rank_(?:(\d{2,})_)?(\d{2,})_model_states\.pt")
PLACES = ("module", "model")  # DeepSpeed's name, and that of the MoE training code
State = dict[str, Tensor]


class Ranks(NamedTuple):
    """The rank files: one row per expert, or one row in all. `rows[e][m]` is of rank m."""

    rows: list[list[Path]]
    is_by_expert: bool


class Cut(NamedTuple):
    """How a tensor is cut over the ranks: along `dim` (None: every rank has all of it).

    `parts` 3: each rank holds its rows of q, of k and of v, one below the other.
    """

    dim: int | None
    parts: int = 1


WHOLE, ROWS, COLUMNS = Cut(None), Cut(0), Cut(1)
Names = dict[str, tuple[str, Cut]]


def find_iteration(root: Path) -> Path | None:
    """The folder of rank files that a checkpoint folder points to, or is itself; None if neither.

    Raises CheckpointError if it points to nothing.
    """
    latest = root / LATEST
    if latest.is_file():
        with translated(latest, "read"):
            text = latest.read_bytes()[:100].decode("utf-8", "replace").strip()
        if not text.isdecimal() or not (root / text).is_dir():
            raise CheckpointError(f"{latest}: names {text!r}, which is no folder beside it")
        return root / text
    with translated(root, "listed"):
        names = [path.name for path in root.iterdir()] if root.is_dir() else []
    return root if any(RANK_FILE.fullmatch(name) for name in names) else None


def find_ranks(folder: Path) -> Ranks:
    """List the rank files. Raises CheckpointError if one is missing."""
    found: dict[tuple[int, int], Path] = {}
    is_by_expert = False
    with translated(folder, "listed"):
        matches = [(path, RANK_FILE.fullmatch(path.name)) for path in sorted(folder.iterdir())]
    for path, match in matches:
        if match is None:
            continue
        if found and is_by_expert != (match[1] is not None):
            raise CheckpointError(f"{folder}: mixes rank files with and without an expert number")
        is_by_expert = match[1] is not None
        found[int(match[1] or 0), int(match[2])] = path
    if not found:
        raise CheckpointError(f"{folder}: has no rank files mp_rank_*_model_states.pt")
    num_rows, num_ranks = (1 + max(place[axis] for place in found) for axis in (0, 1))
    for row in range(num_rows):
        for rank in range(num_ranks):
            if (row, rank) not in found:
                name = f"mp_rank_{row:02d}_{rank:02d}" if is_by_expert else f"mp_rank_{rank:02d}"
                raise CheckpointError(f"{folder}: {name}_model_states.pt is missing; copy it again")
    rows = [[found[row, rank] for rank in range(num_ranks)] for row in range(num_rows)]
    return Ranks(rows, is_by_expert)


def read_state(path: Path) -> State:
    """Read the tensors of a rank. Raises CheckpointError if there is anything else."""
    return load_state(path, PLACES)


def merge(shards: Sequence[Tensor], cut: Cut) -> Tensor:
    """Put the shards of all ranks together.

    Two ranks with rows [q0 k0 v0] and [q1 k1 v1], 3 parts: [q0 q1 k0 k1 v0 v1].
    """
    if cut.dim is None:
        return shards[0]
    pieces = [shard.chunk(cut.parts, cut.dim) for shard in shards]
    return torch.cat([piece[part] for part in range(cut.parts) for piece in pieces], cut.dim)


def merged_shape(shard: Shape, cut: Cut, num_ranks: int) -> Shape:
    """Shape of the merged tensor, of which each rank holds an equal shard."""
    return tuple(size * num_ranks if dim == cut.dim else size for dim, size in enumerate(shard))


def merge_ranks(row: Sequence[Path], states: Sequence[State], key: str, cut: Cut) -> Tensor:
    """Merge a tensor of all ranks, whose files are `row`.

    Raises CheckpointError if a rank lacks it, or its share has another shape than the first's.
    """
    for path, state in zip(row, states, strict=True):
        if key not in state:
            raise CheckpointError(f"{path}: has no {key}")
        found, expected = state[key].shape, states[0][key].shape
        num_dims, what = (1, "a vector") if key.endswith(".bias") else (2, "a matrix")
        if cut.dim is not None and len(found) != num_dims:
            raise CheckpointError(f"{path}: {key} has shape {list(found)}, expected {what}")
        if found != expected or (cut.parts > 1 and found[0] % cut.parts):
            raise CheckpointError(
                f"{path}: {key} has shape {list(found)}, expected {list(expected)} "
                f"as in {row[0].name}, rows dividing by {cut.parts}"
            )
    return merge([state[key] for state in states], cut)
