"""`infmoe bench-engine`: our engine against transformers' `generate` and CTranslate2.

Two cases on each model of random weights, greedy, with a fixed number of tokens for each text:

fixed    batches of equal texts that are all there at once
uneven   texts of uneven lengths that arrive unevenly: ours lets them in and out at each step,
         transformers takes static batches of whoever has arrived, in order

Each contender has a process of its own; they take turns, another one first each time, and the first
round warms up. Tokens are compared with ours of the same type: in fp32 they should be equal, in
bf16 sums are rounded in another order. Tokens per second count from the arrival of the first text
to the end of the last; decoding alone counts from the first token on. Decoding a token at batch 1
reads every weight that the token meets once, so

    share of the memory limit = bytes of those weights x decoded tokens/s / bandwidth

Where asked for, ours runs in batch-invariant mode as well: what that costs is the ratio of ours
over invariant. And 64 texts are read with 64 adapters and with one, which should take as long.

The bandwidth is what a plain read of a large array reaches, the better of before and after. Where
the last cache holds the weights, the share can come out above 1.
"""

import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from engine.bench import commit, spread
from engine.bench_engine_child import Child, Start, open_child
from engine.bench_engine_contenders import (
    INVARIANT,
    KINDS,
    MAX_ROWS,
    Answer,
    Kind,
    Text,
    is_installed,
)
from engine.bench_engine_model import SIZES, make_t5
from engine.bench_engine_report import Run, compare_tokens, make_row, ratios
from engine.bench_offload import BUSY, cpu_name, tell
from engine.config import ModelConfig
from engine.machine import dram_rate

STATIC_ROWS = 8
OURS = "ours-bf16"
UNEVEN = (OURS, INVARIANT, "transformers-bf16")
FIRST_ID = 3  # after padding, end and unknown
LAST_ARRIVAL_S = {"tiny": 0.05, "mid": 1.0}


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What to measure. The models are written into `folder`, if they are not there.

    `invariant` adds the contender of that name, `adapters` is how many are read at once; 0: none.
    """

    folder: Path
    sizes: tuple[str, ...] = ("tiny", "mid")
    skip: tuple[str, ...] = ()
    batches: tuple[int, ...] = (1, 8, MAX_ROWS)
    source_tokens: int = 64
    decode_tokens: int = 24
    uneven_texts: int = 32
    repeats: int = 5
    invariant: bool = False
    adapters: int = 0

    def __post_init__(self) -> None:
        for given, known in ((self.sizes, SIZES), (self.skip, KINDS)):
            if unknown := set(given) - set(known):
                raise ValueError(f"{min(unknown)!r} is unknown; known: {', '.join(known)}")
        if not 1 <= min(self.batches) <= max(self.batches) <= MAX_ROWS:
            raise ValueError(f"batches {self.batches} are not within 1 to {MAX_ROWS}")


def even_texts(settings: Settings, config: ModelConfig, batch: int, seed: int) -> list[Text]:
    """Texts of one length with random ids."""
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, settings.source_tokens)
    ids = torch.randint(FIRST_ID, config.vocab_size, shape, generator=generator).tolist()
    return [Text(tuple(row), settings.decode_tokens) for row in ids]


def uneven_texts(
    settings: Settings, config: ModelConfig, last_arrival_s: float, seed: int
) -> list[Text]:
    """Texts from a quarter of the usual lengths to twice as long, with exponential gaps.

    The first one arrives at 0, the last one at `last_arrival_s`.
    """
    generator = torch.Generator().manual_seed(seed)
    count = settings.uneven_texts

    def lengths(usual: int) -> list[int]:
        low = max(usual // 4, 2)
        numbers: list[int] = torch.randint(
            low, 2 * usual + 1, (count,), generator=generator
        ).tolist()
        return numbers

    gaps = torch.empty(count).exponential_(generator=generator)
    gaps[0] = 0
    arrivals = (gaps.cumsum(0) * (last_arrival_s / gaps.sum())).tolist()
    texts = []
    for source, target, arrival in zip(
        lengths(settings.source_tokens), lengths(settings.decode_tokens), arrivals, strict=True
    ):
        ids = torch.randint(FIRST_ID, config.vocab_size, (source,), generator=generator)
        texts.append(Text(tuple(ids.tolist()), target, arrival))
    return texts


def run_bench(settings: Settings) -> dict[str, object]:
    """Measure all sizes. Raises ValueError if a folder holds another model."""
    load = os.getloadavg()[0]
    if load > BUSY:
        tell(f"the machine is busy (load average {load:.1f}): its times will not be worth much")
    return {
        "commit": commit(),
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "source_tokens": settings.source_tokens,
        "decode_tokens": settings.decode_tokens,
        "uneven_texts": settings.uneven_texts,
        "static_rows": STATIC_ROWS,
        "repeats": settings.repeats,
        "models": {size: measure_size(settings, size) for size in settings.sizes},
        "load_average_before": round(load, 2),
        "load_average_after": round(os.getloadavg()[0], 2),
    }


def measure_size(settings: Settings, size: str) -> dict[str, object]:
    """Load every contender with the model of that size and let them take turns."""
    directory, config = make_t5(settings.folder / size, SIZES[size]), SIZES[size]
    notes = find_obstacles(settings)
    children = dict[str, Child]()
    share: dict[str, object] = {}
    bandwidth = dram_rate().per_s
    with ExitStack() as stack:
        for name in KINDS:
            if name not in notes:
                tell(f"{size}: loading {name}")
                start = Start(name, directory, torch.get_num_threads())
                children[name] = stack.enter_context(open_child(start))
        runs = measure_children(settings, size, children)
        if settings.adapters and OURS in children:
            tell(f"{size}: {settings.adapters} adapters")
            texts = even_texts(settings, config, settings.adapters, 0)
            share["adapters"] = children[OURS].measure_adapters(texts, settings.repeats)
    bandwidth = max(bandwidth, dram_rate().per_s)
    measured = [run for run in runs if run.seed]
    rows = {name: make_row(name, notes.get(name), measured) for name in KINDS}
    if OURS in children and (loaded := children[OURS].loaded):
        share |= memory_share(loaded.decoder_bytes, measured, bandwidth)
    return {
        "rows": rows,
        "tokens_equal": compare_tokens(runs),
        "ratios": ratios(measured),
        "memory_gb_per_s": round(bandwidth / 1e9, 2),
        **share,
    }


def measure_children(settings: Settings, size: str, children: Mapping[str, Child]) -> list[Run]:
    """All cases, round by round; the round of seed 0 is to be left out of what is reported."""
    config, runs = SIZES[size], list[Run]()
    for seed in range(settings.repeats + 1):
        tell(f"{size}: round {seed} of {settings.repeats}")
        for batch in settings.batches:
            texts = even_texts(settings, config, batch, seed)
            work = {name: partial(child.generate, texts) for name, child in children.items()}
            runs += take_turns(work, str(batch), seed)
        texts = uneven_texts(settings, config, LAST_ARRIVAL_S[size], seed)
        work = {
            name: partial(child.generate, texts, STATIC_ROWS)
            for name, child in children.items()
            if name in UNEVEN
        }
        runs += take_turns(work, "uneven", seed)
    return runs


def find_obstacles(settings: Settings, kinds: Mapping[str, Kind] = KINDS) -> dict[str, str]:
    """The contenders that are not to run, or cannot, and why."""
    notes = {
        name: f"not installed: {kind.package}; pip install {kind.package}"
        for name, kind in kinds.items()
        if not is_installed(kind)
    }
    if INVARIANT in kinds and not settings.invariant:
        notes[INVARIANT] = "not asked for: --invariant"
    return notes | dict.fromkeys(settings.skip, "skipped")


def take_turns(work: Mapping[str, Callable[[], list[Answer]]], case: str, seed: int) -> list[Run]:
    """Let every contender do its work, another one first with each seed."""
    names = list(work)
    order = [names[(seed + turn) % len(names)] for turn in range(len(names))]
    return [Run(name, case, seed, work[name]()) for name in order]


def memory_share(weights: int, runs: list[Run], bandwidth: float) -> dict[str, object]:
    """How much of the memory's speed ours reached at batch 1, with so many bytes for a token."""
    speeds = [run.decode_tokens_per_s for run in runs if (run.contender, run.case) == (OURS, "1")]
    return {
        "active_decoder_bytes": weights,
        "share_of_memory_limit": spread([speed * weights / bandwidth for speed in speeds]),
    }
