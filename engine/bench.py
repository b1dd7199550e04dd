"""`infmoe bench`: how fast one request decodes, against recomputing without a cache and the memory.

The tokens of the two ways are compared; in bf16 they may differ, because sums are rounded in
another order. Decoding one token reads every weight that the token meets once, so bytes of active
weights times tokens per second, over the bandwidth that a plain read of memory reaches, is the
share of the limit.
"""

import json
import statistics
import subprocess
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import NamedTuple

import torch

from engine.checkpoint_writer import expert_file
from engine.convert import count_parameters, load_any
from engine.experts import OffloadedExperts, load_offloaded
from engine.machine import disk_rate, dram_rate
from engine.model.transformer import Transformer
from engine.prepare import prepare
from offload.pipeline import PipelineStats

REPEATS = 5
DISK_PROBE_S = 2.0


def timed(work: Callable[[], object]) -> float:
    """Seconds that a piece of work takes."""
    began = perf_counter()
    work()
    return perf_counter() - began


class DecodeBench:
    """One request of fixed lengths with random ids, decoded greedily."""

    def __init__(self, model: Transformer, source_length: int, num_tokens: int, seed: int) -> None:
        self.model = model
        self.num_tokens = num_tokens
        generator = torch.Generator().manual_seed(seed)
        high = model.config.vocab_size
        self.source = torch.randint(0, high, (1, source_length), generator=generator)
        self.ones = torch.ones_like(self.source)
        self.start = torch.tensor([[model.config.decoder_start_token_id]])

    def encode(self) -> torch.Tensor:
        """The encoder sweep."""
        return self.model.encode(self.source, self.ones)

    def cached(self, hidden: torch.Tensor) -> torch.Tensor:
        """Decode with the cache. Returns the ids (1, T)."""
        cache = self.model.start_cache(hidden, self.ones, self.num_tokens)
        tokens, made = self.start, []
        for _ in range(self.num_tokens):
            tokens = self.model.logits(self.model.step(tokens, cache)).argmax(-1)
            made.append(tokens)
        return torch.cat(made, 1)

    def recomputed(self, hidden: torch.Tensor) -> torch.Tensor:
        """Decode by running the decoder over the whole text for each token.

        Returns the ids (1, T).
        """
        tokens = self.start
        for _ in range(self.num_tokens):
            states = self.model.decode(tokens, torch.ones_like(tokens), hidden, self.ones)
            following = self.model.logits(states[:, -1:]).argmax(-1)
            tokens = torch.cat([tokens, following], 1)
        return tokens[:, 1:]


class Sample(NamedTuple):
    """Seconds and offloading counts of one text."""

    encode_s: float
    cached_s: float
    recomputed_s: float
    is_equal: bool
    decoding: PipelineStats


@torch.inference_mode()
def run_bench(
    path: Path,
    dtype: torch.dtype | None,
    source_length: int,
    num_tokens: int,
    expert_memory: int | None = None,
) -> dict[str, object]:
    """Measure a model directory: medians with minimum and maximum over REPEATS texts, one warm-up.

    With `expert_memory` (bytes) the experts are offloaded, and decoding is also held against what
    the disk gives when it is read in order.
    """
    experts = None
    if expert_memory is None:
        model = load_any(path, dtype)
    else:
        model, experts = load_offloaded(path, dtype, expert_memory)
    prepare(model)
    samples = [
        measure(DecodeBench(model, source_length, num_tokens, seed), experts)
        for seed in range(REPEATS + 1)
    ][1:]
    rates = [num_tokens / sample.cached_s for sample in samples]
    weights = decoder_bytes(model)
    bandwidth = dram_rate().per_s
    report = {
        "model": path.name,
        "dtype": str(model.embedding.weight.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "commit": commit(),
        "source_tokens": source_length,
        "decoded_tokens": num_tokens,
        "encode_ms": spread([1000 * sample.encode_s for sample in samples]),
        "decode_tokens_per_s": spread(rates),
        "speedup_over_recomputing": spread([s.recomputed_s / s.cached_s for s in samples]),
        "tokens_equal": all(sample.is_equal for sample in samples),
        "active_decoder_bytes": weights,
        "memory_gb_per_s": round(bandwidth / 1e9, 2),
        "share_of_memory_limit": round(statistics.median(rates) * weights / bandwidth, 4),
    }
    if experts is None:
        return report
    with experts:
        return report | offload_report(path, experts, samples, num_tokens)


def measure(bench: DecodeBench, experts: OffloadedExperts | None) -> Sample:
    """Time one text."""
    hidden = bench.encode()
    encode_s = timed(bench.encode)
    before = experts.stats if experts else PipelineStats()
    began = perf_counter()
    cached = bench.cached(hidden)
    cached_s = perf_counter() - began
    after = experts.stats if experts else PipelineStats()
    began = perf_counter()
    recomputed = bench.recomputed(hidden)
    recomputed_s = perf_counter() - began
    is_equal = torch.equal(cached, recomputed)
    return Sample(encode_s, cached_s, recomputed_s, is_equal, after - before)


def offload_report(
    path: Path, experts: OffloadedExperts, samples: list[Sample], num_tokens: int
) -> dict[str, object]:
    """What offloading cost while decoding, and the share of the disk's speed that it reached."""
    disk = disk_rate([path / expert_file("decoder-0")], DISK_PROBE_S).per_s
    shares = [s.decoding.read_bytes / disk / s.cached_s for s in samples]
    return {
        "expert_slots": experts.plan.num_slots,
        "experts": experts.plan.num_experts,
        "slot_bytes": experts.plan.slot_bytes,
        "pinned": len(experts.plan.pinned),
        "hit_rate": spread([s.decoding.hit_rate for s in samples]),
        "read_bytes_per_token": round(
            statistics.median(s.decoding.read_bytes for s in samples) / num_tokens
        ),
        "stall_share": spread([s.decoding.stall_s / s.cached_s for s in samples]),
        "disk_gb_per_s": round(disk / 1e9, 2),
        "share_of_disk_limit": spread(shares),
    }


def decoder_bytes(model: Transformer) -> int:
    """Bytes of weights that one decoded token meets.

    Decoder, the experts of a token in each layer, output layer; not what projects the encoder
    output, which is read once for a text.
    """
    config = model.config
    size = model.embedding.weight.dtype.itemsize
    decoder = sum(p.numel() for p in model.decoder.parameters())
    if not config.is_decoder_only:
        blocks = model.decoder.blocks()
        decoder -= sum(block.cross_attention.key_value.weight.numel() for block in blocks)
    num_moe_layers = sum(layer.startswith("decoder") for layer in config.moe_layers())
    experts = count_parameters(config)["one_expert"] * config.num_experts_per_token
    head = config.vocab_size * config.d_model
    return size * (decoder + experts * num_moe_layers + head)


def spread(values: list[float]) -> dict[str, float]:
    """Median, minimum and maximum."""
    return {
        "median": round(statistics.median(values), 3),
        "min": round(min(values), 3),
        "max": round(max(values), 3),
    }


def commit() -> str | None:
    """The checked-out commit, if this is a checkout."""
    try:
        result = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=False,
        )
    except OSError:
        return None
    return result.stdout.strip() or None


def print_report(report: dict[str, object]) -> None:
    """A table for people and, as the last line, one JSON object."""
    for key, value in report.items():
        if isinstance(value, dict):
            value = f"{value['median']} ({value['min']} to {value['max']})"
        print(f"{key:<26}{value}")
    print(json.dumps(report))
