"""Offloaded experts: the one place that knows both a model and a slot."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from engine.checkpoint import load_model, open_expert_stores, open_native
from engine.checkpoint_experts import expert_weights, layout_dtype
from engine.checkpoint_tensors import DTYPES
from engine.config import ModelConfig
from engine.errors import CheckpointError, ConfigError
from engine.model.layers import FeedForwardWeights
from engine.model.moe import count_tokens
from engine.model.quantized import int4_fallback, int8_fallback
from engine.model.topk import AnyMoE
from engine.model.transformer import Transformer
from engine.progress import OnBytes, ignore_bytes
from engine.units import format_bytes
from offload.bank import fill_bank
from offload.device import Bytes, Device, IsCancelled, open_host_device
from offload.errors import StoreError
from offload.layout import BlobLayout
from offload.pipeline import ExpertPipeline, Guess, PipelineStats
from offload.planner import BudgetTooSmall, ExpertPlan, plan_experts
from offload.slots import Key
from offload.store import ExpertStore

logger = logging.getLogger(__name__)

OnPreload = Callable[[int, int], None]

BUFFERED = "the file system cannot read directly; reads of experts are buffered"


class OffloadedExperts:
    """An `ExpertSource` over stores on disk and slots of a fixed number in memory.

    The weights are views of a slot, valid for the loop body only. Results equal those of resident
    experts bit for bit: the same bytes go through the same code.
    """

    def __init__(
        self, stores: dict[str, ExpertStore], pipeline: ExpertPipeline, plan: ExpertPlan
    ) -> None:
        self._stores = stores
        self._pipeline = pipeline
        self._following: dict[str, AnyMoE] = {}
        self._guess: Guess | None = None
        self.plan = plan

    def attach(self, model: Transformer) -> None:
        """Learn the routers of a model, so that `foresee` can ask the next layer's."""
        layers = model.moe_layers()
        self._following = {
            layer.name: following
            for layer, following in pairwise(layers)
            if layer.name.split("-")[0] == following.name.split("-")[0]
        }

    def foresee(self, layer: str, x_ND: Tensor) -> None:
        """Guess what the next layer of the stack will want: its own router, one layer early."""
        following = self._following.get(layer)
        self._guess = None
        if following is None or not self._pipeline.wants_guess(following.name):
            return
        with torch.no_grad():
            counts_E = count_tokens(following.choose(x_ND), self.plan.experts_per_layer)
        experts = sorted(
            filter(counts_E.__getitem__, range(len(counts_E))), key=lambda e: -counts_E[e]
        )
        self._guess = Guess(following.name, experts)

    def stream(self, layer: str, wanted: Sequence[int]) -> Iterator[tuple[int, FeedForwardWeights]]:
        """Yield the wanted experts, those in memory first.

        Raises CheckpointError if an expert cannot be read or is damaged.
        """
        layout = self._stores[layer].layout
        guess, self._guess = self._guess, None
        try:
            for expert, blob in self._pipeline.stream(layer, wanted, guess):
                yield expert, expert_weights(blob, layout)
        except StoreError as error:
            raise CheckpointError(str(error)) from error

    def summary(self) -> str:
        """Plan and counts in a line."""
        plan, stats = self.plan, self.stats
        return (
            f"experts: {plan.num_slots} slots for {plan.num_experts} "
            f"({format_bytes(plan.arena_bytes)}, {len(plan.pinned)} pinned), {len(plan.host)} in "
            f"host memory; {stats.hits} hits, {stats.misses} misses ({stats.hit_rate:.1%} hit), "
            f"{format_bytes(stats.read_bytes)} read, {stats.stall_s:.2f} s waited; "
            f"{stats.prefetched} fetched ahead, {stats.prefetch_used} of them used"
        )

    @property
    def stats(self) -> PipelineStats:
        """Hits, misses, bytes and stalls since the start."""
        return self._pipeline.stats

    @property
    def fallbacks(self) -> tuple[str, ...]:
        """What works in a slower way than it should, and why."""
        stores = self._stores.values()
        buffered = None if all(store.is_direct for store in stores) else BUFFERED
        kinds = {store.layout.quantization for store in stores}
        own = (
            buffered,
            int8_fallback() if "int8" in kinds else None,
            int4_fallback() if "int4" in kinds else None,
        )
        return (*filter(None, own), *self._pipeline.fallbacks)

    def close(self) -> None:
        """End the readers and close the files."""
        self._pipeline.close()
        _close(self._stores)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_offloaded(
    directory: Path,
    config: ModelConfig,
    dtype: torch.dtype,
    budget_bytes: int,
    on_preload: OnPreload | None = None,
    *,
    host_bytes: int = 0,
    rows: int = 1,
    make_device: Callable[[int, int], Device] = open_host_device,
) -> OffloadedExperts:
    """Plan budgets for a native directory's experts and `rows` at once, allocate, read what stays.

    `budget_bytes` are for the slots of the device, which `make_device` makes of the bytes of a slot
    and their number; `host_bytes` for experts that wait in host memory beside them. `on_preload` is
    given the experts read so far and their number.
    Raises ConfigError if the model is dense, the budget too small, the memory not to be had or
    `dtype` not the stored one, CheckpointError if a store is missing or damaged.
    """
    if not config.moe_layers():
        raise ConfigError(f"{directory}: is a dense model; it has no experts to offload")
    stores = open_expert_stores(directory, config)
    with ExitStack() as opened:
        opened.callback(_close, stores)
        for store in stores.values():
            store.bypass_cache()
        layout = _common_layout(directory, stores, dtype)
        try:
            layers = config.moe_layers()
            plan = plan_experts(
                layout.blob_bytes, layers, config.num_experts, budget_bytes, host_bytes, rows
            )
        except BudgetTooSmall as error:
            raise ConfigError(f"{directory}: {error}") from error
        try:
            device = make_device(plan.slot_bytes, plan.num_slots)
            opened.callback(device.close)
            experts = _preload(stores, plan, device, on_preload)
        except MemoryError as error:
            raise ConfigError(f"{directory}: no memory for experts: {error}") from error
        opened.pop_all()
    for fallback in experts.fallbacks:
        logger.warning("%s: %s", directory, fallback)
    return experts


def _common_layout(
    directory: Path, stores: dict[str, ExpertStore], dtype: torch.dtype
) -> BlobLayout:
    """The one layout of all stores. Raises ConfigError if they differ or are of another dtype."""
    layout = next(iter(stores.values())).layout
    has_dtype = layout.quantization == "none" or any(len(s.shape) == 1 for s in layout.tensors)
    stored = DTYPES[layout_dtype(layout)] if has_dtype else dtype
    if stored != dtype or any(store.layout != layout for store in stores.values()):
        raise ConfigError(
            f"{directory}: experts are stored as {stored}, and offloading does not convert; "
            f"run `infmoe convert --dtype` to have them as {dtype}"
        )
    return layout


def _preload(
    stores: dict[str, ExpertStore],
    plan: ExpertPlan,
    device: Device,
    on_preload: OnPreload | None,
) -> OffloadedExperts:
    """Read the experts that wait in host memory, then the pinned ones."""
    total = len(plan.pinned) + len(plan.host)

    def read(key: Key, out: Bytes, is_cancelled: IsCancelled = lambda: False) -> object:
        return stores[key.layer].read_blob(key.expert, out, is_cancelled)

    def report(done: int) -> None:
        if on_preload:
            on_preload(done, total)

    try:
        bank = None
        if plan.host:
            bank = fill_bank(plan.host, plan.slot_bytes, read, device, report)
        pipeline = ExpertPipeline(device, plan, read, bank)
        pipeline.preload(lambda done: report(len(plan.host) + done))
    except StoreError as error:
        raise CheckpointError(str(error)) from error
    return OffloadedExperts(stores, pipeline, plan)


def load_offloaded(  # noqa: PLR0913  what may be said of a load, each with a default
    directory: Path,
    dtype: torch.dtype | None,
    budget_bytes: int,
    on_preload: OnPreload | None = None,
    *,
    host_bytes: int = 0,
    rows: int = 1,
    device: str = "cpu",
    on_bytes: OnBytes = ignore_bytes,
    config: ModelConfig | None = None,
) -> tuple[Transformer, OffloadedExperts]:
    """Build the model of a native directory with its experts offloaded; dtype None: as stored.

    `config` is the model's own, maybe for longer texts.
    With `device` cuda the rest of the model and the slots lie on the GPU.
    Raises ConfigError or CheckpointError as `open_offloaded` and `load_model` do.
    """
    source = open_native(directory)
    dtype = dtype or source.dtype
    experts = open_offloaded(
        directory,
        source.config,
        dtype,
        budget_bytes,
        on_preload,
        host_bytes=host_bytes,
        rows=rows,
        make_device=open_host_device if device == "cpu" else _open_cuda,
    )
    try:
        model = load_model(directory, dtype, experts, on_bytes, config).to(device)
    except BaseException:
        experts.close()
        raise
    experts.attach(model)
    return model, experts


def _open_cuda(slot_bytes: int, num_slots: int) -> Device:
    from offload.cuda import open_cuda_device

    return open_cuda_device(slot_bytes, num_slots)


def _close(stores: dict[str, ExpertStore]) -> None:
    for store in stores.values():
        store.close()
