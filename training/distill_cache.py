"""What teachers say of batches, on disk: the likeliest ids and their log-probabilities.

A folder holds `ids.npy` and `logs.npy` (positions, K), read through a memory map, `offsets.npy`
(where each batch starts, and the end) and `cache.json` (the fingerprint of what made them).
"""

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from engine.checkpoint_writer import sync
from training.losses import TeacherScores

FORMAT_VERSION = 1


class CachedScores:
    """An open cache; a batch is read by its number."""

    def __init__(
        self, ids: NDArray[Any], logs: NDArray[np.float32], offsets: NDArray[np.int64]
    ) -> None:
        self.ids = ids
        self.logs = logs
        self.offsets = offsets

    def read(self, number: int) -> TeacherScores:
        """What was said of a batch."""
        here = slice(self.offsets[number], self.offsets[number + 1])
        ids = torch.from_numpy(self.ids[here].astype(np.int64))
        return TeacherScores(torch.from_numpy(self.logs[here].copy()), ids)


def write_cache(folder: Path, key: str, batches: Iterable[TeacherScores]) -> None:
    """Write the scores of batches, in order; the folder appears when it is complete."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    offsets, width = [0], 0
    raw = partial / "ids.raw", partial / "logs.raw"
    with raw[0].open("wb") as ids_file, raw[1].open("wb") as logs_file:
        for scores in batches:
            assert scores.ids_NK is not None
            count, width = scores.ids_NK.shape
            ids_file.write(scores.ids_NK.numpy().astype(np.uint32).tobytes())
            logs_file.write(scores.logs_NK.numpy().astype(np.float32).tobytes())
            offsets.append(offsets[-1] + count)
    types = (("ids", np.uint32), ("logs", np.float32))
    for path, (name, dtype) in zip(raw, types, strict=True):
        rows = np.memmap(path, dtype, "r", shape=(offsets[-1], width))
        small = name == "ids" and (not rows.size or rows.max() < 1 << 16)
        np.save(partial / f"{name}.npy", rows.astype(np.uint16) if small else rows)
        path.unlink()
    np.save(partial / "offsets.npy", np.array(offsets, np.int64))
    facts = {"version": FORMAT_VERSION, "key": key}
    (partial / "cache.json").write_text(json.dumps(facts), encoding="utf-8")
    sync(*partial.iterdir(), partial)
    partial.replace(folder)
    sync(folder.parent)


def open_cache(folder: Path, key: str, num_batches: int) -> CachedScores:
    """Open a cache. Raises ValueError if it is damaged, of something else, or too short."""
    try:
        facts = json.loads((folder / "cache.json").read_bytes())
        ids, logs = (
            np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)
            for name in ("ids", "logs")
        )
        offsets = np.load(folder / "offsets.npy", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"{folder}: not a readable cache ({error}); delete it") from error
    if facts != {"version": FORMAT_VERSION, "key": key}:
        raise ValueError(
            f"{folder}: was made of other texts, settings or teachers; delete it or name another"
        )
    if len(offsets) <= num_batches or len(ids) != offsets[-1] or len(logs) != offsets[-1]:
        raise ValueError(
            f"{folder}: holds {len(offsets) - 1} batches, {num_batches} are needed; delete it"
        )
    return CachedScores(ids, logs, offsets)
