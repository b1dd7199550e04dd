"""`infmoe bench-gpu`: decoding and the encoder sweep of a model as large as it is, without a file.

Dense weights are random. Experts are a few random blobs again and again, in the slots and the rows
of host memory that a real model would have; those for which there is no memory share the blobs. So
bytes move as they would, from host memory, and nothing is read from a disk. What is fed is random,
too: a model of random weights that reads its own words soon goes round in circles.
"""

import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from time import perf_counter
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from engine.bench import commit, spread
from engine.checkpoint_experts import expert_bytes, expert_layout, expert_weights
from engine.config import PRESETS, ModelConfig
from engine.errors import ConfigError
from engine.footprint import Workload, dense_bytes
from engine.loading import make_storage, plan_loading
from engine.machine import dram_rate, hbm_rate, link_rate
from engine.memory import gpu_memory
from engine.model.initial import random_weight
from engine.model.layers import FeedForwardWeights
from engine.model.transformer import Transformer
from offload.bank import HostBank, fill_bank
from offload.cuda import missing_for_cuda, open_cuda_device
from offload.device import Bytes, Device, map_rows, open_host_device
from offload.layout import BlobLayout, Quantization
from offload.pipeline import ExpertPipeline, PipelineStats
from offload.planner import ExpertPlan
from offload.slots import Key

DeviceName = Literal["cuda", "host"]

REPEATS = 5  # after one that warms up
NUM_BLOBS = 2
GPU_SHARE = 0.9  # of what is free, if no budget is given
PROBE_BYTES = 2**26
DTYPE = torch.bfloat16
TINY = ModelConfig(
    vocab_size=512,
    d_model=64,
    d_ff=128,
    d_kv=16,
    num_heads=4,
    num_encoder_layers=2,
    num_decoder_layers=2,
    num_experts=4,
)
CONFIGS = {name: config for name, config in PRESETS.items() if config.num_experts}
CONFIGS["tiny"] = TINY  # to try the command out
COLUMNS = ("tokens_per_s", "ms_per_pass", "link_gb_per_s", "hit_rate", "share_of_roofline")


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What is measured: `tokens` steps of 1 and of `batch` rows, a sweep of `batch` texts."""

    config: ModelConfig
    quantization: Quantization
    device: DeviceName
    tokens: int = 32
    batch: int = 32
    source_tokens: int = 128

    @property
    def torch_device(self) -> torch.device:
        """Where torch computes."""
        return torch.device("cuda" if self.device == "cuda" else "cpu")

    @property
    def workload(self) -> Workload:
        """The most that is computed at once."""
        return Workload(
            rows=self.batch, source_tokens=self.source_tokens, target_tokens=self.tokens
        )


class Rates(NamedTuple):
    """Bytes per second: from host memory to slots, and of the memory that slots lie in."""

    link: float
    memory: float


class Round(NamedTuple):
    """One measurement: passes through a stack, tokens in each, seconds in all, what experts did."""

    passes: int
    tokens: int
    seconds: float
    experts: PipelineStats


class BenchExperts:
    """An `ExpertSource` over a pipeline alone. It does not look ahead."""

    def __init__(self, pipeline: ExpertPipeline, layout: BlobLayout) -> None:
        self._pipeline = pipeline
        self._layout = layout

    def foresee(self, layer: str, x_ND: Tensor) -> None:
        """Nothing: random routers have nothing to tell."""

    def stream(self, layer: str, wanted: Sequence[int]) -> Iterator[tuple[int, FeedForwardWeights]]:
        """Yield the wanted experts, those in slots first."""
        for expert, blob in self._pipeline.stream(layer, wanted):
            yield expert, expert_weights(blob, self._layout)


class SharedBank(HostBank):
    """A bank in which experts without a row of their own share a few blobs."""

    def __init__(self, own: HostBank | None, blobs: Bytes) -> None:
        self._own = own
        self._blobs = blobs

    def get(self, key: Key) -> Bytes | None:
        """The bytes of an expert."""
        found = self._own.get(key) if self._own else None
        return self._blobs[key.expert % len(self._blobs)] if found is None else found

    def __len__(self) -> int:
        return len(self._own or ()) + len(self._blobs)


def plan_bench(settings: Settings, memory: int | None, gpu_memory_bytes: int | None) -> ExpertPlan:
    """Share out budgets in bytes, all told, as for a real model; None: most of what is free.

    Raises ConfigError if a budget is too small, or the GPU is asked for but not there, or not used.
    """
    if settings.device == "host" and gpu_memory_bytes is not None:
        raise ConfigError("--gpu-memory is for --device cuda; leave it out with --device host")
    if settings.device == "cuda":
        if (reason := missing_for_cuda()) is not None:
            raise ConfigError(f"--device cuda cannot be: {reason}; --device host needs no GPU")
        free = gpu_memory()
        assert free is not None
        gpu_memory_bytes = gpu_memory_bytes or int(GPU_SHARE * free.free_bytes)
    storage = make_storage(settings.config, DTYPE, settings.quantization)
    plan = plan_loading(storage, memory, gpu_memory_bytes, settings.workload).experts
    if plan is None:
        raise ConfigError("the model is dense; there are no experts to measure")
    return plan


@torch.inference_mode()
def run_bench(
    settings: Settings, plan: ExpertPlan, on_phase: Callable[[str], None] = lambda _: None
) -> dict[str, object]:
    """Build the model, measure all, and return the report."""
    on_phase("measuring bandwidths")
    rates = measure_rates(settings.device)
    on_phase("making experts")
    layout = expert_layout(settings.config, DTYPE, settings.quantization)
    blobs = random_blobs(settings.config, layout)
    make_device = open_cuda_device if settings.device == "cuda" else open_host_device
    device: Device = make_device(plan.slot_bytes, plan.num_slots)
    with closing(device):
        on_phase(f"filling {len(plan.host)} rows of host memory and {len(plan.pinned)} slots")
        pipeline = open_pipeline(plan, device, blobs)
        on_phase("making dense weights")
        experts = BenchExperts(pipeline, layout)
        model = random_model(settings.config, experts, settings.torch_device)
        phases = measure(settings, Bench(model, pipeline, settings), on_phase)
        report = {
            "gpu": torch.cuda.get_device_name() if settings.device == "cuda" else None,
            "threads": torch.get_num_threads(),
            "commit": commit(),
            **describe(settings, plan),
            "link_gb_per_s": round(rates.link / 1e9, 2),
            "memory_gb_per_s": round(rates.memory / 1e9, 2),
            "fallbacks": list(pipeline.fallbacks),
        }
    dense = dense_bytes(settings.config, DTYPE)
    for name, rounds in phases.items():
        dense_pass = dense.sweep if name == "encode" else dense.step
        report[name] = summarize(rounds, plan.slot_bytes, dense_pass, rates)
    return report


def describe(settings: Settings, plan: ExpertPlan) -> dict[str, object]:
    """Sizes, and how many experts have memory of their own."""
    return {
        "device": settings.device,
        "experts": "bf16" if settings.quantization == "none" else settings.quantization,
        "repeats": REPEATS,
        "decode_tokens": settings.tokens,
        "batch": settings.batch,
        "source_tokens": settings.source_tokens,
        "slot_bytes": plan.slot_bytes,
        "num_layers": len(plan.layers),
        "num_experts": plan.num_experts,
        "slots": plan.num_slots,
        "pinned": len(plan.pinned),
        "in_host_memory": len(plan.host),
        "sharing_memory": plan.num_disk,
    }


def measure_rates(device: DeviceName) -> Rates:
    """Bandwidths of this machine, now."""
    if device == "cuda":
        rates = Rates(link_rate().per_s, hbm_rate().per_s)
        torch.cuda.empty_cache()  # the slots need the room
        return rates
    source, target = np.ones(PROBE_BYTES, np.uint8), np.zeros(PROBE_BYTES, np.uint8)
    times = []
    for _ in range(REPEATS):
        began = perf_counter()
        np.copyto(target, source)
        times.append(perf_counter() - began)
    return Rates(PROBE_BYTES / min(times), dram_rate().per_s)


def random_blobs(config: ModelConfig, layout: BlobLayout) -> Bytes:
    """A few experts (NUM_BLOBS, blob_bytes) as they would be stored."""
    blobs = map_rows(NUM_BLOBS, layout.blob_bytes)
    generator = torch.Generator().manual_seed(0)
    for blob in blobs:
        tensors = {
            name: random_weight(f".{name}", shape, config, generator)
            for name, shape in config.expert_shapes().items()
        }
        stored = expert_bytes("random weights", tensors, config, DTYPE, layout.quantization)
        for spec in layout.tensors:
            blob[spec.offset : spec.offset + spec.nbytes] = stored[spec.name]
    return blobs


def open_pipeline(plan: ExpertPlan, device: Device, blobs: Bytes) -> ExpertPipeline:
    """Fill the rows of host memory and the pinned slots from the blobs."""

    def read(key: Key, out: Bytes, *_: object) -> None:
        out[:] = blobs[key.expert % len(blobs)]

    device.adopt(blobs)
    own = fill_bank(plan.host, plan.slot_bytes, read, device) if plan.host else None
    pipeline = ExpertPipeline(device, plan, read, SharedBank(own, blobs))
    pipeline.preload()
    return pipeline


def random_model(config: ModelConfig, experts: BenchExperts, device: torch.device) -> Transformer:
    """A model with random dense weights, made where it stays."""
    with torch.device("meta"):
        model = Transformer(config, experts).to(DTYPE)
    model.to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    with device:
        for name, weight in model.state_dict().items():
            weight.copy_(random_weight(name, tuple(weight.shape), config, generator, 1.0))
    return model.eval()


class Bench:
    """A model and what is timed of it."""

    def __init__(self, model: Transformer, pipeline: ExpertPipeline, settings: Settings) -> None:
        self._model = model
        self._pipeline = pipeline
        self._settings = settings
        self._generator = torch.Generator().manual_seed(1)

    def ids(self, rows: int, length: int) -> Tensor:
        """Random ids, (rows, length)."""
        high = self._settings.config.vocab_size
        ids = torch.randint(0, high, (rows, length), generator=self._generator)
        return ids.to(self._settings.torch_device)

    def encode(self) -> Round:
        """Time one sweep of all texts of a batch."""
        source = self.ids(self._settings.batch, self._settings.source_tokens)
        ones = torch.ones_like(source)
        return self._timed(1, source.numel(), lambda: self._model.encode(source, ones))

    def decode(self, rows: int) -> Round:
        """Time decoding; the best token of each row is brought to the host, as sampling would."""
        steps, length = self._settings.tokens, self._settings.source_tokens
        where = self._settings.torch_device
        hidden = torch.randn(rows, length, self._settings.config.d_model, device=where).to(DTYPE)
        ones = torch.ones(rows, length, dtype=torch.int64, device=where)
        cache = self._model.start_cache(hidden, ones, steps)
        fed = self.ids(rows, steps)

        def run() -> None:
            for step in range(steps):
                states = self._model.step(fed[:, step : step + 1], cache)
                self._model.logits(states).argmax(-1).tolist()

        return self._timed(steps, rows, run)

    def _timed(self, passes: int, tokens: int, work: Callable[[], object]) -> Round:
        self._settle()
        before, began = self._pipeline.stats, perf_counter()
        work()
        self._settle()
        seconds = perf_counter() - began
        return Round(passes, tokens, seconds, self._pipeline.stats - before)

    def _settle(self) -> None:
        if self._settings.device == "cuda":
            torch.cuda.synchronize()


def measure(
    settings: Settings, bench: Bench, on_phase: Callable[[str], None]
) -> dict[str, list[Round]]:
    """Time all phases; the first round of each warms up and does not count."""
    work: dict[str, Callable[[], Round]] = {"decode_1": lambda: bench.decode(1)}
    if settings.batch > 1:
        work[f"decode_{settings.batch}"] = lambda: bench.decode(settings.batch)
    work["encode"] = bench.encode
    phases = {}
    for name, run in work.items():
        on_phase(f"timing {name}")
        phases[name] = [run() for _ in range(REPEATS + 1)][1:]
    return phases


def summarize(
    rounds: Sequence[Round], slot_bytes: int, dense_pass: int, rates: Rates
) -> dict[str, object]:
    """What a phase took, and the share of the time that the bytes alone would take at best.

    At best, copies hide behind computing or computing behind copies: the longer of the two counts.
    """
    bounds = []
    for round_ in rounds:
        wanted = round_.experts.hits + round_.experts.misses
        memory_bytes = wanted * slot_bytes + round_.passes * dense_pass
        bounds.append(max(round_.experts.copied_bytes / rates.link, memory_bytes / rates.memory))
    copied = statistics.median(r.experts.copied_bytes / r.passes for r in rounds)
    shares = [bound / r.seconds for r, bound in zip(rounds, bounds, strict=True)]
    return {
        "passes": rounds[0].passes,
        "tokens_per_pass": rounds[0].tokens,
        "tokens_per_s": spread([r.tokens * r.passes / r.seconds for r in rounds]),
        "ms_per_pass": spread([1000 * r.seconds / r.passes for r in rounds]),
        "link_gb_per_s": spread([r.experts.copied_bytes / r.seconds / 1e9 for r in rounds]),
        "copied_bytes_per_pass": round(copied),
        "hit_rate": spread([r.experts.hit_rate for r in rounds]),
        "share_of_roofline": spread(shares),
    }


def print_report(report: dict[str, object]) -> None:
    """The facts, a table of phases, and, as the last line, one JSON object."""
    phases = {name: value for name, value in report.items() if isinstance(value, dict)}
    for name, value in report.items():
        if name not in phases:
            print(f"{name:<18}{value}")
    if report["sharing_memory"]:
        print(
            f"no memory for {report['sharing_memory']} experts, which share that of others: a real "
            "model would read them from disk"
        )
    print(f"\n{'median (min to max)':<20}" + "".join(f"{name:<32}" for name in COLUMNS).rstrip())
    for name, phase in phases.items():
        cells = (phase[column] for column in COLUMNS)
        shown = (f"{c['median']} ({c['min']} to {c['max']})" for c in cells)
        print(f"{name:<20}" + "".join(f"{cell:<32}" for cell in shown).rstrip())
    print(json.dumps(report))
