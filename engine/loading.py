"""Loading a model of any kind within a budget: resident if it fits, else offloaded, or refused."""

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from engine.checkpoint import open_native
from engine.checkpoint_any import detect_kind, load_any, open_foreign
from engine.checkpoint_experts import expert_layout
from engine.checkpoint_prepared import find_prepared, prepare_experts
from engine.checkpoint_writer import expert_file
from engine.config import PRESETS, ModelConfig, read_config
from engine.convert import Progress
from engine.errors import CheckpointError, ConfigError
from engine.experts import OffloadedExperts, load_offloaded
from engine.footprint import Workload, dense_bytes, largest_workload
from engine.long_texts import lengthen
from engine.memory import (
    HostMemory,
    gpu_budget,
    gpu_memory,
    host_budget,
    host_memory,
    own_pages_bytes,
    return_free_heap,
    return_large_blocks,
)
from engine.model.dtypes import DTYPES
from engine.model.transformer import Transformer, set_invariant
from engine.model_paths import find_gguf, find_model
from engine.planning import (
    CUDA_HOST_BYTES,
    GPU_CONTEXT_BYTES,
    RUNTIME_BYTES,
    SERVER_BYTES,
    Budgets,
    MemoryPlan,
    Storage,
    choose_rows,
    plan_memory,
)
from engine.prepare import load_kernels, prepare
from engine.progress import LoadProgress
from engine.quantize import check_sizes
from offload.cuda import missing_for_cuda
from offload.layout import QUANTIZATIONS, Quantization, round_up

logger = logging.getLogger(__name__)

# What a process has varies by pages from run to run: without steps, a budget of the bytes that a
# refusal asked for is refused once more.
OWN_STEP_BYTES = 16 * 2**20
CONVERT_DTYPE = "run `infmoe convert --dtype`: stored in another dtype, experts are not offloaded"


class Loaded(NamedTuple):
    """A model, its experts if they are offloaded, and the plan that it was loaded by."""

    model: Transformer
    experts: OffloadedExperts | None
    plan: MemoryPlan

    def close(self) -> None:
        """Close the files of offloaded experts, and end their readers."""
        if self.experts is not None:
            self.experts.close()


def make_storage(
    config: ModelConfig,
    dtype: torch.dtype,
    quantization: Quantization = "none",
    only_resident: str = "",
) -> Storage:
    """How a model of that config lies in memory if its experts are stored so.

    Raises ConfigError if they cannot be.
    """
    check_sizes(config, quantization)
    slot_bytes = expert_layout(config, dtype, quantization).blob_bytes if config.num_experts else 0
    return Storage(
        config=config,
        dtype=dtype,
        slot_bytes=slot_bytes,
        quantization=quantization,
        only_resident=only_resident if config.num_experts else "",
    )


def read_storage(
    path: Path, dtype: torch.dtype | None = None, max_model_len: int | None = None
) -> Storage:
    """Tell how the model of a directory lies in memory; dtype None: as stored.

    Only headers are read. `max_model_len`: see `lengthen`. Raises CheckpointError if it is damaged
    or holds pickles, ConfigError if its experts are quantised and `dtype` is not the stored one.
    """
    storage = _read_storage(path, dtype)
    return replace(storage, config=lengthen(storage.config, max_model_len or 0))


def _read_storage(path: Path, dtype: torch.dtype | None) -> Storage:
    kind = detect_kind(path)
    if kind == "cpm":
        raise CheckpointError(f"{path}: holds pickles; run `infmoe convert` on it first")
    if kind != "native":
        foreign = open_foreign(path)
        return make_storage(foreign.config, dtype or foreign.dtype)
    source = open_native(path)
    layout, dtype = source.expert_layout(), dtype or source.dtype
    if layout is None:
        return make_storage(source.config, dtype)
    if dtype != source.dtype and layout.quantization == "none":
        return make_storage(source.config, dtype, only_resident=CONVERT_DTYPE)
    if dtype != source.dtype:
        raise ConfigError(
            f"{path}: has {layout.quantization} experts beside {_short(source.dtype)}, and cannot "
            f"be loaded as {_short(dtype)}; leave --dtype out, or convert the original with it"
        )
    return make_storage(source.config, dtype, layout.quantization)


def find_storage(model: str, name: str | None) -> tuple[Storage, list[Path]]:
    """How a model is stored, and its files that the disk can be measured with.

    `model` is a directory, a GGUF file, a config.json or a preset. Models tell themselves how they
    are stored; else `name` does (int8, int4: of the experts, beside bf16), or it is bf16.
    Raises ConfigError if there is no such model, or a directory is stored otherwise than `name`.
    """
    path = find_model(model)
    if path.is_dir() or find_gguf(path) is not None:
        storage = read_storage(path)
        stored = _name(storage)
        if name is not None and name != stored:
            raise ConfigError(
                f"{model} is stored as {stored}, and that counts; to plan for {name}, give its "
                "config.json, or convert it"
            )
        return storage, _disk_files(path, storage)
    if model not in PRESETS and not path.is_file():
        raise ConfigError(
            f"{model} is no directory, no GGUF file, no config.json and no preset; presets: "
            f"{', '.join(PRESETS)}"
        )
    config = PRESETS.get(model) or read_config(path)
    dtype = torch.bfloat16 if name is None else DTYPES.get(name, torch.bfloat16)
    quantization = next((kind for kind in QUANTIZATIONS if kind == name), QUANTIZATIONS[0])
    return make_storage(config, dtype, quantization), []


def _disk_files(path: Path, storage: Storage) -> list[Path]:
    """Stores of experts, or what they would be made of where there are none yet."""
    stores = [expert_file(layer) for layer in storage.config.moe_layers()]
    if stores and detect_kind(path) != "native":
        prepared = find_prepared(path, storage.dtype)
        if prepared is None:
            return list(open_foreign(path).files)
        path = prepared
    return [path / name for name in stores if (path / name).exists()]


def _name(storage: Storage) -> str:
    return _short(storage.dtype) if storage.quantization == "none" else storage.quantization


def _short(dtype: torch.dtype) -> str:
    return next((name for name, known in DTYPES.items() if known == dtype), str(dtype))


def plan_loading(
    storage: Storage,
    memory: int | None,
    gpu_memory_bytes: int | None,
    workload: Workload,
    max_rows: int = 1,
    beside_bytes: int = 0,
) -> MemoryPlan:
    """Plan for this machine and this process as they are now. Budgets in bytes.

    With `max_rows` above those of the workload, for as many as `choose_rows` allows.
    `beside_bytes` of the budget are taken by other processes.
    Raises ConfigError if a budget is too small for the model or too large for the machine.
    """
    budget = None
    if gpu_memory_bytes is not None:
        if (reason := missing_for_cuda()) is not None:
            raise ConfigError(f"a GPU budget is given, but {reason}; without one the CPU computes")
        budget = gpu_budget(gpu_memory_bytes, gpu_memory(), GPU_CONTEXT_BYTES)
    host = host_memory()
    budgets = Budgets(host_bytes=host_budget(memory, host), gpu_bytes=budget)
    if budgets.host_bytes > host.usable_bytes:
        logger.warning(
            "the memory budget of %d bytes is more than is free now: %d bytes",
            budgets.host_bytes,
            host.usable_bytes,
        )
    process = process_bytes(host, on_gpu=budget is not None) + beside_bytes
    return _plan_rows(storage, workload, budgets, process, max_rows)


def _plan_rows(
    storage: Storage, workload: Workload, budgets: Budgets, process: int, max_rows: int
) -> MemoryPlan:
    if max_rows <= workload.rows:
        return plan_memory(storage, workload, budgets, process)
    return choose_rows(
        lambda rows: plan_memory(storage, replace(workload, rows=rows), budgets, process), max_rows
    )


def plan_elsewhere(
    storage: Storage,
    memory: int | None,
    gpu_memory_bytes: int | None,
    workload: Workload,
    max_rows: int = 1,
) -> MemoryPlan:
    """Plan for a server with budgets that this machine need not have; memory None: as it would.

    `max_rows` as for `plan_loading`. Raises ConfigError if a budget is too small.
    """
    if gpu_memory_bytes is None:
        load_kernels()  # as `load_within` does before it plans
    host = host_memory()
    budgets = Budgets(
        host_bytes=host_budget(None, host) if memory is None else memory,
        gpu_bytes=gpu_memory_bytes,
    )
    # as `infmoe serve` does: within a budget it takes one process
    server = gateway_bytes() if memory is None else SERVER_BYTES
    process = process_bytes(host, on_gpu=gpu_memory_bytes is not None) + server
    return _plan_rows(storage, workload, budgets, process, max_rows)


def process_bytes(host: HostMemory, *, on_gpu: bool) -> int:
    """What this process takes beside the model: what it has, and what its libraries will take."""
    is_cuda_open = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]  # torch's own
    cuda = CUDA_HOST_BYTES if on_gpu and not is_cuda_open else 0
    return round_up(host.own_bytes, OWN_STEP_BYTES) + RUNTIME_BYTES + cuda


def gateway_bytes() -> int:
    """What this process takes as the gateway of an engine that has a process of its own.

    The pages of libraries are counted by the engine, which maps the same.
    """
    return round_up(own_pages_bytes(), OWN_STEP_BYTES) + SERVER_BYTES


def load_within(  # noqa: PLR0913  what may be said of a load, each with a default
    path: Path,
    dtype: torch.dtype | None,
    memory: int | None,
    gpu_memory_bytes: int | None,
    on_phase: Callable[[str], None] = lambda _: None,
    on_plan: Callable[[MemoryPlan], None] = lambda _: None,
    workload: Workload | None = None,
    progress: LoadProgress | None = None,
    *,
    max_rows: int = 1,
    invariant: bool = False,
    beside_bytes: int = 0,
    max_model_len: int | None = None,
) -> Loaded:
    """Plan for budgets in bytes, tell the plan, and load the model by it.

    memory None: a share of what is to be had; gpu_memory_bytes None: no GPU; workload None: the
    longest requests that are accepted. As many rows are planned for as `choose_rows` allows, up to
    `max_rows`. `beside_bytes`: see `plan_loading`; `invariant`: see `set_invariant`;
    `max_model_len`: see `lengthen`. The model is for serving: its weights may be packed, which can
    be neither read nor saved.
    Raises ConfigError if a budget is too small or too large, or there is no GPU; nothing has been
    loaded then. Raises CheckpointError if the model is damaged.
    """
    storage = read_storage(path, dtype, max_model_len)
    load = workload or largest_workload(storage.config)
    if gpu_memory_bytes is None:
        load_kernels()  # before memory is planned
    plan = plan_loading(storage, memory, gpu_memory_bytes, load, max_rows, beside_bytes)
    on_plan(plan)
    on_phase("reading weights")
    loaded = load_planned(path, plan, on_phase, progress)
    if invariant:
        set_invariant(loaded.model)
    return loaded


def bytes_to_read(path: Path, plan: MemoryPlan) -> int:
    """Bytes that loading by a plan reads: sizes of files, and of the experts it loads of stores."""
    kind = detect_kind(path)
    if kind == "gguf":  # as they come, dequantised
        return dense_bytes(plan.storage.config, torch.float32).total
    if kind == "huggingface":
        return sum(file.stat().st_size for file in open_foreign(path).files)
    source = open_native(path)
    stores = {expert_file(layer) for layer in source.config.moe_layers()}
    num_experts = source.config.num_experts * len(stores)
    if plan.experts is not None and plan.is_offloaded:
        num_experts = len(plan.experts.pinned) + len(plan.experts.host)
    layout = source.expert_layout()
    dense = sum(file.stat().st_size for file in source.files if file.name not in stores)
    return dense + (num_experts * layout.blob_bytes if layout else 0)


def load_planned(
    path: Path,
    plan: MemoryPlan,
    on_phase: Callable[[str], None],
    progress: LoadProgress | None = None,
) -> Loaded:
    """Load a model as a plan says, to be served: see `prepare`."""
    return_large_blocks()
    progress = progress or LoadProgress()
    if plan.is_offloaded and detect_kind(path) != "native":
        path = _prepare(path, plan.storage.dtype, on_phase, progress)
    progress.begin(bytes_to_read(path, plan))
    loaded = _load_planned(path, plan, on_phase, progress)
    if plan.budgets.gpu_bytes is None:
        on_phase("preparing kernels")  # at the first time, they are compiled
        prepare(loaded.model)
    return_free_heap()
    progress.finish()
    return loaded


def _prepare(
    path: Path, dtype: torch.dtype, on_phase: Callable[[str], None], progress: LoadProgress
) -> Path:
    """The directory that experts of a released checkpoint are read from; see `prepare_experts`."""
    done_bytes = 0

    def report(done: Progress) -> None:
        nonlocal done_bytes
        if not done_bytes:
            progress.begin(done.total_bytes)
        progress.add(done.done_bytes - done_bytes)
        done_bytes = done.done_bytes
        on_phase(f"writing experts once: {done.done_bytes * 100 // done.total_bytes} %")

    def wait() -> None:
        progress.add(0)  # nothing hangs: another one writes
        on_phase("waiting for another process that writes experts once")

    result = prepare_experts(path, dtype, report, wait)
    return_free_heap()
    return result


def _load_planned(
    path: Path, plan: MemoryPlan, on_phase: Callable[[str], None], progress: LoadProgress
) -> Loaded:
    num_read = 0

    def report(done: int, total: int) -> None:
        nonlocal num_read
        progress.add((done - num_read) * plan.storage.slot_bytes)
        num_read = done
        on_phase(f"reading expert {done} of {total}")

    dtype, on_gpu = plan.storage.dtype, plan.budgets.gpu_bytes is not None
    if plan.experts is None or not plan.is_offloaded:
        model = load_any(path, dtype, progress.add, plan.storage.config)
        return Loaded(model.to("cuda") if on_gpu else model, None, plan)
    loaded = load_offloaded(
        path,
        dtype,
        plan.experts.arena_bytes,
        report,
        host_bytes=plan.experts.host_bytes,
        rows=plan.workload.rows,
        device="cuda" if on_gpu else "cpu",
        on_bytes=progress.add,
        config=plan.storage.config,
    )
    return Loaded(*loaded, plan)
