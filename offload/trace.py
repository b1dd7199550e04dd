"""Routing traces: which experts each layer wanted, step by step, and what was guessed before.

A step is one pass through one stack: a sweep of the encoder, or the decoder over one token of each
row. Residency and transfers depend on nothing else, so a trace stands in for the model.
"""

import os
import struct
import zlib
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tokenize import TokenError
from typing import NamedTuple
from zipfile import BadZipFile, is_zipfile

import numpy as np
from numpy.typing import NDArray

VERSION = 1
DTYPES = {
    "steps": np.int64,
    "layer_ids": np.uint16,
    "wanted_ends": np.int64,
    "guess_ends": np.int64,
    "experts": np.uint16,
    "counts": np.uint32,
    "guesses": np.uint16,
}
MOST = 2**16 - 1  # layers, and experts of a layer: what 16 bits number
FOREIGN = (OSError, EOFError, LookupError, ArithmeticError, MemoryError, RuntimeError)


class LayerCall(NamedTuple):
    """One layer that was computed.

    `wanted` holds its experts as they were asked for, `counts` their tokens; `guess` is what the
    router of the layer said one layer early, and empty if nobody asked it.
    """

    step: int
    layer: str
    wanted: list[int]
    counts: list[int]
    guess: list[int]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RoutingTrace:
    """The computed layers of a model's run, in the order of time; top-1 routing.

    Per layer computed (N): its step, its layer as an index into `layers`, and where its part of
    `experts` and `counts` (tokens of each expert) and its part of `guesses` end. Steps may be
    interleaved, as when a row is decoded between two layers of a sweep.
    Raises ValueError, naming what is wrong, if the arrays do not describe a run.
    """

    layers: tuple[str, ...]
    experts_per_layer: int
    steps: NDArray[np.int64]
    layer_ids: NDArray[np.uint16]
    wanted_ends: NDArray[np.int64]
    guess_ends: NDArray[np.int64]
    experts: NDArray[np.uint16]
    counts: NDArray[np.uint32]
    guesses: NDArray[np.uint16]

    def __post_init__(self) -> None:
        _check_shapes(self)
        _check_values(self)
        _check_steps(self)

    def __len__(self) -> int:
        return len(self.steps)

    def call(self, index: int) -> LayerCall:
        """One computed layer."""
        wanted = _part(self.wanted_ends, index)
        return LayerCall(
            int(self.steps[index]),
            self.layers[self.layer_ids[index]],
            self.experts[wanted].tolist(),
            self.counts[wanted].tolist(),
            self.guesses[_part(self.guess_ends, index)].tolist(),
        )

    def calls(self) -> Iterator[LayerCall]:
        """The computed layers, one by one."""
        return map(self.call, range(len(self)))

    def following(self) -> NDArray[np.int64]:
        """For each computed layer the index of the next one of its step, or -1."""
        order = np.argsort(self.steps, kind="stable")
        is_same = np.diff(self.steps[order]) == 0
        following = np.full(len(self), -1)
        following[order[:-1][is_same]] = order[1:][is_same]
        return following


class TraceBuilder:
    """Takes computed layers one at a time, in flat arrays: some bytes for each, no objects."""

    def __init__(self, layers: Sequence[str], experts_per_layer: int) -> None:
        self.layers = tuple(layers)
        self.experts_per_layer = experts_per_layer
        self._index = {layer: i for i, layer in enumerate(self.layers)}
        self._arrays = {name: array(np.dtype(kind).char) for name, kind in DTYPES.items()}

    def add(self, call: LayerCall) -> None:
        """Append one computed layer."""
        arrays = self._arrays
        arrays["steps"].append(call.step)
        arrays["layer_ids"].append(self._index[call.layer])
        arrays["experts"].extend(call.wanted)
        arrays["counts"].extend(call.counts)
        arrays["guesses"].extend(call.guess)
        arrays["wanted_ends"].append(len(arrays["experts"]))
        arrays["guess_ends"].append(len(arrays["guesses"]))

    def __len__(self) -> int:
        return len(self._arrays["steps"])

    def build(self) -> RoutingTrace:
        """The trace of what has been added so far. Raises ValueError if it describes no run."""
        arrays = {name: np.array(self._arrays[name], kind) for name, kind in DTYPES.items()}
        return RoutingTrace(layers=self.layers, experts_per_layer=self.experts_per_layer, **arrays)


def save_trace(trace: RoutingTrace, path: Path) -> None:
    """Write a trace as .npz of plain arrays: all of it or nothing, whatever happens meanwhile."""
    arrays = {name: getattr(trace, name) for name in DTYPES}
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as file:
            np.savez_compressed(
                file,
                allow_pickle=False,
                version=np.int64(VERSION),
                layers=np.array(trace.layers, dtype=np.str_),
                experts_per_layer=np.int64(trace.experts_per_layer),
                **arrays,
            )
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def load_trace(path: Path) -> RoutingTrace:
    """Read a trace. Raises ValueError, naming file and fault, if it is none or is damaged."""
    with path.open("rb") as file:
        if not is_zipfile(file):
            raise ValueError(f"{path}: is no .npz file")
        file.seek(0)
        try:
            with np.load(file, allow_pickle=False) as archive:
                arrays = {name: archive[name] for name in archive.files}
        except (ValueError, BadZipFile, zlib.error, struct.error, TokenError, *FOREIGN) as error:
            raise ValueError(f"{path}: cannot be read: {error}") from error
    if wrong := [name for name, values in arrays.items() if not isinstance(values, np.ndarray)]:
        raise ValueError(f"{path}: {wrong[0]} is no array")  # numpy gives the bytes of such a part
    try:
        return _from_arrays(arrays)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _from_arrays(arrays: dict[str, NDArray[np.generic]]) -> RoutingTrace:
    version = arrays.get("version")
    if version is None or version.shape != () or version.item() != VERSION:
        told = "missing" if version is None else str(version)
        raise ValueError(f"version is {told}; this program reads traces of version {VERSION}")
    wrong = sorted(arrays.keys() ^ {"version", "layers", "experts_per_layer", *DTYPES})
    if wrong:
        state = "not part of a trace" if wrong[0] in arrays else "missing"
        raise ValueError(f"array {wrong[0]} is {state}")
    layers, per_layer = arrays["layers"], arrays["experts_per_layer"]
    if layers.ndim != 1 or layers.dtype.kind != "U":
        raise ValueError(f"layers is {_told(layers)}; it must be a row of names")
    if per_layer.ndim != 0 or per_layer.dtype.kind not in "iu":
        raise ValueError(f"experts_per_layer is {_told(per_layer)}; it must be a whole number")
    rest: dict[str, NDArray[np.generic]] = {name: arrays[name] for name in DTYPES}
    return RoutingTrace(
        layers=tuple(layers.tolist()),
        experts_per_layer=int(per_layer.item()),
        **rest,  # type: ignore[arg-type]  # _check_shapes looks at each
    )


def _part(ends: NDArray[np.int64], index: int) -> slice:
    return slice(int(ends[index - 1]) if index else 0, int(ends[index]))


def _told(values: NDArray[np.generic]) -> str:
    return f"{values.dtype} of shape {values.shape}"


def _check_shapes(trace: RoutingTrace) -> None:
    """Raise ValueError unless the arrays are rows of the right kinds and lengths."""
    if not trace.layers or len(set(trace.layers)) < len(trace.layers) or len(trace.layers) > MOST:
        raise ValueError(
            f"layers are {len(trace.layers)} names; they must differ, from 1 to {MOST}"
        )
    if not 1 <= trace.experts_per_layer <= MOST:
        raise ValueError(f"experts_per_layer is {trace.experts_per_layer}, not in 1..{MOST}")
    for name, kind in DTYPES.items():
        values = getattr(trace, name)
        if values.dtype != kind or values.ndim != 1:
            raise ValueError(f"{name} is {_told(values)}; it must be a row of {np.dtype(kind)}")
    lengths = {
        "layer_ids": len(trace),
        "wanted_ends": len(trace),
        "guess_ends": len(trace),
        "experts": trace.wanted_ends[-1] if len(trace.wanted_ends) else 0,
        "counts": trace.wanted_ends[-1] if len(trace.wanted_ends) else 0,
        "guesses": trace.guess_ends[-1] if len(trace.guess_ends) else 0,
    }
    for name, length in lengths.items():
        if len(getattr(trace, name)) != length:
            raise ValueError(f"{name} has {len(getattr(trace, name))} entries, not {length}")


def _check_values(trace: RoutingTrace) -> None:
    """Raise ValueError unless all numbers lie where they may and no layer names an expert twice."""
    allowed = (
        ("steps", 0, None),
        ("layer_ids", 0, len(trace.layers) - 1),
        ("experts", 0, trace.experts_per_layer - 1),
        ("counts", 1, None),
        ("guesses", 0, trace.experts_per_layer - 1),
    )
    for name, least, most in allowed:
        values = getattr(trace, name)
        if len(values) and values.min() < least:
            raise ValueError(f"{name} holds {values.min()}; the least is {least}")
        if len(values) and most is not None and values.max() > most:
            raise ValueError(f"{name} holds {values.max()}; the most is {most}")
    parts = (("experts", "wanted_ends", 1), ("guesses", "guess_ends", 0))
    for name, ends, least in parts:
        lengths = np.diff(getattr(trace, ends), prepend=0)
        if len(lengths) and lengths.min() < least:
            raise ValueError(f"{ends} gives a layer {lengths.min()} {name}; the least is {least}")
        call = np.repeat(np.arange(len(trace)), lengths)
        keys = call * trace.experts_per_layer + getattr(trace, name)
        if len(np.unique(keys)) < len(keys):
            raise ValueError(f"{name} names an expert twice in one layer")


def _check_steps(trace: RoutingTrace) -> None:
    """Raise ValueError unless each step passes layers of one stack, in their order."""
    stacks = [layer.split("-")[0] for layer in trace.layers]
    stack = np.unique(np.array(stacks), return_inverse=True)[1]
    order = np.argsort(trace.steps, kind="stable")
    layer = trace.layer_ids[order].astype(np.int64)
    same = np.diff(trace.steps[order]) == 0
    wrong = same & ((np.diff(layer) <= 0) | (np.diff(stack[layer]) != 0))
    if wrong.any():
        step = trace.steps[order][1:][wrong][0]
        raise ValueError(f"step {step} does not pass the layers of one stack in their order")
