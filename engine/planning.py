"""The plan of the whole memory: what each part takes, and who lives where, before anything is read.

A plan is made for budgets in bytes, one of host memory and, with a GPU, one of its memory. It never
exceeds them; where they are too small it says so, with the sum and the least that would do.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch

from engine.config import ModelConfig
from engine.errors import ConfigError
from engine.footprint import (
    Workload,
    cache_bytes,
    dense_bytes,
    packing_bytes,
    workspace_bytes,
)
from engine.units import format_bytes
from offload.cuda import NUM_STAGING
from offload.layout import Quantization
from offload.planner import MIN_STREAMING, ExpertPlan, plan_experts
from offload.slots import Key

CACHES = "decoder caches"
WORKSPACE = "workspace"
# Of a budget in which not all experts fit, what decoding more rows together may cost in slots.
ROWS_SHARE = 1 / 8

Place = Literal["host", "gpu", "disk"]

# Taken while a model is built and used first: modules of torch 76 MiB, kernels and threads 27 MiB.
RUNTIME_BYTES = 128 * 2**20
SERVER_BYTES = 96 * 2**20  # web framework 21 MiB and a dictionary of Chinese 62 MiB, where they are
# Not measured; by common report. Context, code of kernels and workspace of cuBLAS on the device:
GPU_CONTEXT_BYTES = 640 * 2**20
CUDA_HOST_BYTES = 2**30  # what the CUDA libraries take in host memory
BUDGET_NAMES: dict[Place, str] = {"host": "memory", "gpu": "GPU memory"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Storage:
    """How a model is stored: dtype of what is not an expert, bytes of a slot for one expert.

    Without experts slot_bytes is 0. `only_resident` tells why its experts cannot be offloaded, and
    what to do; empty if they can.
    """

    config: ModelConfig
    dtype: torch.dtype
    slot_bytes: int
    quantization: Quantization = "none"
    only_resident: str = ""

    @property
    def num_experts(self) -> int:
        """Experts of all layers."""
        return self.config.num_experts * len(self.config.moe_layers())

    @property
    def least_slots(self) -> int:
        """Slots without which nothing works."""
        return self.num_experts if self.only_resident else min(MIN_STREAMING, self.num_experts)


@dataclass(frozen=True, slots=True, kw_only=True)
class Budgets:
    """What may be taken, in bytes. `gpu_bytes` None: the CPU computes."""

    host_bytes: int
    gpu_bytes: int | None = None

    def by_place(self) -> dict[Place, int]:
        """The budgets that there are."""
        host: dict[Place, int] = {"host": self.host_bytes}
        return host if self.gpu_bytes is None else {**host, "gpu": self.gpu_bytes}

    @property
    def compute_place(self) -> Place:
        """Where experts compute."""
        return "host" if self.gpu_bytes is None else "gpu"


class Line(NamedTuple):
    """One part of the memory that a plan shares out."""

    part: str
    place: Place
    nbytes: int
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """Who takes what. `experts` is None for a dense model."""

    storage: Storage
    workload: Workload
    budgets: Budgets
    lines: tuple[Line, ...]
    experts: ExpertPlan | None

    @property
    def is_resident(self) -> bool:
        """Whether all experts stay where they are computed."""
        return self.experts is None or len(self.experts.pinned) == self.experts.num_experts

    @property
    def is_offloaded(self) -> bool:
        """Whether experts are read into slots, rather than with the rest of the model."""
        can = self.experts is not None and not self.storage.only_resident
        must = not self.is_resident or self.storage.quantization != "none"
        return can and (must or self.budgets.gpu_bytes is not None)

    def total(self, place: Place) -> int:
        """Bytes of all parts in one place."""
        return sum(line.nbytes for line in self.lines if line.place == place)

    def parts(self) -> dict[str, int]:
        """Bytes of each part, by its name."""
        return {line.part: line.nbytes for line in self.lines}

    def residence(self) -> dict[str, Counter[str]]:
        """Experts or slots of 'pinned', 'decode', 'sweep', 'host' and 'disk', by stack.

        Slots that experts take in turns count for the stack that they serve.
        """
        if self.experts is None:
            return {}
        plan = self.experts
        pinned, host = (_by_stack(keys) for keys in (plan.pinned, plan.host))
        per_layer = plan.experts_per_layer
        every = Counter({s: n * per_layer for s, n in _layers_by_stack(plan).items()})
        return {
            "pinned": pinned,
            "decode": Counter(decoder=plan.num_decode),
            "sweep": Counter(encoder=plan.num_sweep),
            "host": host,
            "disk": every - pinned - host,
        }

    def summary(self) -> list[str]:
        """The plan in a line per budget."""
        lines = []
        for place, budget in self.budgets.by_place().items():
            parts = [line for line in self.lines if line.place == place]
            terms = " + ".join(f"{line.part} {format_bytes(line.nbytes)}" for line in parts)
            sum_ = f"{format_bytes(self.total(place))} of {format_bytes(budget)}"
            lines.append(f"{BUDGET_NAMES[place]}: {terms} = {sum_}")
        lines[0] += f"; {self._whereabouts()}"
        return lines

    def _whereabouts(self) -> str:
        if self.experts is None:
            return "the model is dense"
        plan = self.experts
        if self.is_resident:
            return f"all {plan.num_experts} experts are resident"
        return (
            f"{plan.num_slots} slots for {plan.num_experts} experts: {len(plan.pinned)} pinned, "
            f"{plan.num_decode} for decoding, {plan.num_sweep} for the encoder; "
            f"{len(plan.host)} wait in host memory, {plan.num_disk} on disk"
        )

    def facts(self) -> dict[str, object]:
        """The plan in JSON's types, without the lists of experts."""
        plan = self.experts
        return {
            "dtype": str(self.storage.dtype).removeprefix("torch."),
            "quantization": self.storage.quantization,
            "rows": self.workload.rows,
            "source_tokens": self.workload.source_tokens,
            "target_tokens": self.workload.target_tokens,
            "budget_bytes": dict(self.budgets.by_place()),
            "planned_bytes": {place: self.total(place) for place in self.budgets.by_place()},
            "lines": [
                {"part": line.part, "place": line.place, "bytes": line.nbytes, "note": line.note}
                for line in self.lines
            ],
            "resident": self.is_resident,
            "slot_bytes": plan.slot_bytes if plan else 0,
            "num_experts": plan.num_experts if plan else 0,
            "experts": {where: dict(counts) for where, counts in self.residence().items()},
        }

    def to_json(self) -> dict[str, object]:
        """The plan in JSON's types, whole: `plan_from_json` rebuilds its ExpertPlan."""
        if self.experts is None:
            return {**self.facts(), "expert_plan": None}
        plan = self.experts
        whole = {
            "slot_bytes": plan.slot_bytes,
            "layers": list(plan.layers),
            "experts_per_layer": plan.experts_per_layer,
            "num_decode": plan.num_decode,
            "num_sweep": plan.num_sweep,
            "pinned": [list(key) for key in plan.pinned],
            "host": [list(key) for key in plan.host],
        }
        return {**self.facts(), "expert_plan": whole}


def plan_from_json(values: Mapping[str, object]) -> ExpertPlan:
    """Rebuild the plan of experts from what `infmoe plan --json` printed.

    Raises ConfigError if there is none in it.
    """
    found = values.get("expert_plan")
    if not isinstance(found, dict):
        raise ConfigError("there is no plan of experts in this JSON: the model is dense?")
    try:
        pinned, host = ([Key(str(k[0]), int(k[1])) for k in found[n]] for n in ("pinned", "host"))
        numbers = {name: int(found[name]) for name in PLAN_NUMBERS}
        layers = tuple(map(str, found["layers"]))
    except (LookupError, TypeError, ValueError) as error:
        raise ConfigError(f"the plan of experts is damaged: {error!r}") from error
    return ExpertPlan(**numbers, layers=layers, pinned=tuple(pinned), host=tuple(host))


PLAN_NUMBERS = ("slot_bytes", "experts_per_layer", "num_decode", "num_sweep")


def plan_memory(
    storage: Storage, workload: Workload, budgets: Budgets, process_bytes: int
) -> MemoryPlan:
    """Share budgets out. `process_bytes` is what the process takes before it loads anything.

    Raises ConfigError, with the whole sum and the least budget that would do, if one is too small.
    """
    fixed = fixed_lines(storage, workload, process_bytes, on_gpu=budgets.gpu_bytes is not None)
    least = Line("expert slots", budgets.compute_place, storage.least_slots * storage.slot_bytes)
    for place, budget in budgets.by_place().items():
        _check(storage, [*fixed, least], place, budget)
    if not storage.num_experts:
        return _make_plan(storage, workload, budgets, fixed, None)
    left = {place: size - _sum(fixed, place) for place, size in budgets.by_place().items()}
    experts = plan_experts(
        storage.slot_bytes,
        storage.config.moe_layers(),
        storage.config.num_experts,
        left[budgets.compute_place],
        left["host"] if budgets.gpu_bytes is not None else 0,
        rows=workload.rows,
    )
    return _make_plan(storage, workload, budgets, fixed, experts)


def choose_rows(plan_rows: Callable[[int], MemoryPlan], most: int) -> MemoryPlan:
    """Of the plans for so many rows, their half, its half and so on down to 1: the first that fits.

    One row must fit. More must leave all experts resident, or else take no more than ROWS_SHARE of
    the budget: slots are worth more than rows to a model that is larger than its memory.
    Raises ConfigError if one row does not fit.
    """
    rows = most
    while rows > 1:
        try:
            plan = plan_rows(rows)
        except ConfigError:
            pass  # fewer may fit
        else:
            place = plan.budgets.compute_place
            parts = plan.parts()
            taken = parts[CACHES] + parts[WORKSPACE]
            if plan.is_resident or taken <= ROWS_SHARE * plan.budgets.by_place()[place]:
                return plan
        rows //= 2
    return plan_rows(1)


def _make_plan(
    storage: Storage,
    workload: Workload,
    budgets: Budgets,
    fixed: Sequence[Line],
    experts: ExpertPlan | None,
) -> MemoryPlan:
    lines = [*fixed]
    if experts is not None:
        note = f"{experts.num_slots} of {format_bytes(experts.slot_bytes)}"
        lines.append(Line("expert slots", budgets.compute_place, experts.arena_bytes, note))
        if budgets.gpu_bytes is not None:
            note = f"{len(experts.host)} experts"
            lines.append(Line("waiting experts", "host", experts.host_bytes, note))
        on_disk = experts.num_disk * experts.slot_bytes
        lines.append(Line("only on disk", "disk", on_disk, f"{experts.num_disk} experts"))
    return MemoryPlan(
        storage=storage, workload=workload, budgets=budgets, lines=tuple(lines), experts=experts
    )


def fixed_lines(
    storage: Storage, workload: Workload, process_bytes: int, *, on_gpu: bool
) -> list[Line]:
    """The parts whose size does not depend on a budget."""
    config, dtype = storage.config, storage.dtype
    place: Place = "gpu" if on_gpu else "host"
    quantized_on_gpu = None if storage.quantization == "none" else on_gpu
    dense = dense_bytes(config, dtype).total
    filling, largest = (0, 0) if on_gpu else packing_bytes(config, dtype)
    shown = f"{workload.rows} x ({workload.source_tokens} source + {workload.target_tokens} target)"
    workspace = workspace_bytes(config, dtype, workload, quantized_on_gpu=quantized_on_gpu)
    workspace = max(workspace, largest)  # packing is over before anything is computed
    lines = [
        Line("process", "host", process_bytes, "Python, torch and their libraries"),
        Line("dense weights", place, dense + filling, str(dtype).removeprefix("torch.")),
        Line(CACHES, place, cache_bytes(config, dtype, workload), shown),
        Line(WORKSPACE, place, workspace, "upper estimate"),
    ]
    if workload.adapter_bytes:
        lines.append(Line("adapters", place, workload.adapter_bytes, "soft prompts, at most"))
    return [*lines, *_gpu_lines(storage, dense)] if on_gpu else lines


def _gpu_lines(storage: Storage, dense: int) -> list[Line]:
    """What a GPU asks for in addition.

    A model is built in host memory and moved: what is not offloaded must fit there for a moment.
    """
    context = Line("GPU context", "gpu", GPU_CONTEXT_BYTES, "assumed")
    if not storage.num_experts or storage.only_resident:
        whole = dense + storage.num_experts * storage.slot_bytes
        return [context, Line("loading", "host", whole, "all weights, on their way to the GPU")]
    return [
        context,
        Line("loading", "host", dense, "dense weights, on their way to the GPU"),
        Line(
            "staging",
            "host",
            NUM_STAGING * storage.slot_bytes,
            f"{NUM_STAGING} of {format_bytes(storage.slot_bytes)}, pinned",
        ),
    ]


def _check(storage: Storage, lines: Sequence[Line], place: Place, budget: int) -> None:
    """Raise ConfigError if what must be in a place exceeds its budget."""
    parts = [line for line in lines if line.place == place and line.nbytes]
    least = _sum(parts, place)
    if least <= budget:
        return
    terms = " + ".join(f"{line.part} {line.nbytes:,}" for line in parts)
    slots = f", {storage.least_slots} expert slots among it" if storage.num_experts else ""
    raise ConfigError(
        f"{BUDGET_NAMES[place]} of {budget:,} bytes ({format_bytes(budget)}) is too small; needed "
        f"at least{slots}: {terms} = {least:,} bytes ({format_bytes(least)}); give {least} bytes "
        f"or more{_advice(storage)}"
    )


def _advice(storage: Storage) -> str:
    """What else would help."""
    if storage.only_resident:
        return f", or {storage.only_resident}"
    ways = []
    if storage.dtype.itemsize > 2:
        ways.append("in bf16 (--dtype) the model takes half")
    if storage.num_experts and storage.quantization == "none":
        ways.append("`infmoe convert --experts int4` makes experts smaller")
    return "".join(f"; {way}" for way in ways)


def _sum(lines: Sequence[Line], place: Place) -> int:
    return sum(line.nbytes for line in lines if line.place == place)


def _by_stack(keys: Sequence[Key]) -> Counter[str]:
    return Counter(key.layer.split("-")[0] for key in keys)


def _layers_by_stack(plan: ExpertPlan) -> Counter[str]:
    return Counter(layer.split("-")[0] for layer in plan.layers)
