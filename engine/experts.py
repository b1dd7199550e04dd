"""Offloaded experts: the one place that knows both a model and a slot."""

import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Self

import torch

from engine.checkpoint import load_model, open_expert_stores, open_native
from engine.checkpoint_tensors import DTYPES, blob_tensors
from engine.config import ModelConfig
from engine.errors import CheckpointError, ConfigError
from engine.model.layers import FeedForwardWeights
from engine.model.transformer import Transformer
from engine.units import format_bytes
from offload.device import Bytes, open_host_device
from offload.errors import StoreError
from offload.pipeline import ExpertPipeline, PipelineStats
from offload.planner import BudgetTooSmall, ExpertPlan, plan_experts
from offload.slots import Key
from offload.store import BlobLayout, ExpertStore

logger = logging.getLogger(__name__)

OnPreload = Callable[[int, int], None]


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
        self.plan = plan

    def stream(self, layer: str, wanted: Sequence[int]) -> Iterator[tuple[int, FeedForwardWeights]]:
        """Yield the wanted experts, those in memory first.

        Raises CheckpointError if an expert cannot be read or is damaged.
        """
        layout = self._stores[layer].layout
        try:
            for expert, blob in self._pipeline.stream(layer, wanted):
                yield expert, as_weights(blob, layout)
        except StoreError as error:
            raise CheckpointError(str(error)) from error

    def summary(self) -> str:
        """Plan and counts in a line."""
        plan, stats = self.plan, self.stats
        return (
            f"experts: {plan.num_slots} slots for {plan.num_experts} "
            f"({format_bytes(plan.arena_bytes)}, {len(plan.pinned)} pinned); "
            f"{stats.hits} hits, {stats.misses} misses ({stats.hit_rate:.1%} hit), "
            f"{format_bytes(stats.read_bytes)} read, {stats.stall_s:.2f} s waited"
        )

    @property
    def stats(self) -> PipelineStats:
        """Hits, misses, bytes and stalls since the start."""
        return self._pipeline.stats

    def close(self) -> None:
        """End the readers and close the files."""
        self._pipeline.close()
        for store in self._stores.values():
            store.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def as_weights(blob: Bytes, layout: BlobLayout) -> FeedForwardWeights:
    """The tensors of one expert as views of its blob."""
    tensors = blob_tensors(blob, layout)
    return FeedForwardWeights(tensors["norm"], tensors["wi_0"], tensors.get("wi_1"), tensors["wo"])


def open_offloaded(
    directory: Path,
    config: ModelConfig,
    dtype: torch.dtype,
    budget_bytes: int,
    on_preload: OnPreload | None = None,
) -> OffloadedExperts:
    """Plan a budget for the experts of a native directory, allocate it, and read the pinned share.

    `on_preload` is given the pinned experts read so far and their number.
    Raises ConfigError if the model is dense, the budget too small or `dtype` not the stored one,
    CheckpointError if a store is missing or damaged.
    """
    layers = config.moe_layers()
    if not layers:
        raise ConfigError(f"{directory}: is a dense model; it has no experts to offload")
    stores = open_expert_stores(directory, config)
    for store in stores.values():
        store.bypass_cache()
    if not all(store.is_direct for store in stores.values()):
        logger.warning("%s: the file system cannot read directly; reads are buffered", directory)
    layout = stores[layers[0]].layout
    stored = DTYPES[layout.tensors[0].dtype]
    try:
        if stored != dtype or any(store.layout != layout for store in stores.values()):
            raise ConfigError(
                f"{directory}: experts are stored as {stored}, and offloading does not convert; "
                f"run `infmoe convert --dtype` to have them as {dtype}"
            )
        plan = plan_experts(budget_bytes, layout.blob_bytes, layers, config.num_experts)
        device = open_host_device(plan.slot_bytes, plan.num_slots)
    except BudgetTooSmall as error:
        _close(stores)
        raise ConfigError(f"{directory}: {error}") from error
    except (ConfigError, MemoryError):
        _close(stores)
        raise

    def read(key: Key, out: Bytes) -> object:
        return stores[key.layer].read_blob(key.expert, out)

    pipeline = ExpertPipeline(device, plan.num_slots, plan.slot_bytes, read)
    experts = OffloadedExperts(stores, pipeline, plan)
    report = (lambda done: on_preload(done, len(plan.pinned))) if on_preload else None
    try:
        pipeline.preload(plan.pinned, report)
    except StoreError as error:
        experts.close()
        raise CheckpointError(str(error)) from error
    return experts


def load_offloaded(
    directory: Path,
    dtype: torch.dtype | None,
    budget_bytes: int,
    on_preload: OnPreload | None = None,
) -> tuple[Transformer, OffloadedExperts]:
    """Build the model of a native directory with its experts offloaded; dtype None: as stored.

    Raises ConfigError or CheckpointError as `open_offloaded` and `load_model` do.
    """
    source = open_native(directory)
    dtype = dtype or source.dtype
    experts = open_offloaded(directory, source.config, dtype, budget_bytes, on_preload)
    try:
        return load_model(directory, dtype, experts), experts
    except CheckpointError:
        experts.close()
        raise


def _close(stores: dict[str, ExpertStore]) -> None:
    for store in stores.values():
        store.close()
