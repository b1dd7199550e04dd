"""`infmoe bench-offload`: a model whose experts exceed memory, run in four ways on one machine.

offload     ours: experts read into slots within a budget of bytes
resident    ours with a budget that holds all experts, in turn with plain resident parameters: what
            the pipeline itself costs; no limit
mmap        our model, its experts in mapped files: page faults and the page cache
accelerate  the equivalent Hugging Face model with its experts on accelerate's disk

Each runs in a process of its own. offload, mmap and accelerate run under one limit, which counts
the page cache: the budget, plus what a process holds that has loaded the part that is no expert,
plus HEADROOM_BYTES and one expert. They start with none of their files in the page cache and take
each text in turn, so that what disturbs the machine disturbs all. All get the same random ids (see
engine/bench_contenders.py); random weights route almost uniformly, so that no cache can do much
better than the share of the experts that it holds. The first text warms up.

Share of the disk limit, for decoding and for the encoder sweep of a text:

    share = bytes read from the disk / (disk bandwidth x seconds)

The bytes are those that the kernel counts for the process, direct reads and page faults alike. The
bandwidth is the mean of two looks of PROBE_S seconds, before and after the text has gone round, at
what plain direct reads of the expert files give. 1 means that the disk was never idle: only reading
less could be faster. Reading that was of no use counts as well; so the share tells how busy the
disk was, and tokens per second what came of it. A disk that lends speed for short bursts can give
more than 1.
"""

import os
import shutil
import statistics
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch

from engine.bench import commit
from engine.bench_child import open_child
from engine.bench_contenders import Job, expert_files, total_bytes
from engine.bench_disk import DiskProbe, drop_cache, read_ahead_kb
from engine.bench_report import Result, disk_speed, make_row, ratios, tokens_equal
from engine.bench_switch import is_switch_of, missing_packages, write_switch
from engine.checkpoint import NativeSource, open_expert_stores, open_native
from engine.config import ModelConfig
from engine.convert import count_parameters
from engine.random_model import write_random_model
from engine.tokenizer import ByteTokenizer
from engine.units import format_bytes

LIMITED = ("offload", "mmap", "accelerate")
CONTENDERS = ("offload", "resident", "mmap", "accelerate")
ROUNDS = 3  # how often each text is run where all is resident
NUM_TEXTS = 5  # after one that warms up
PROBE_S = 3.0
HEADROOM_BYTES = 64 * 2**20  # activations, caches of keys and values, the packages of an opponent
BUSY = 0.5  # load average of a machine that has other things to do
DEFAULT_MODEL = ModelConfig(  # 4.2 GiB of experts of 15 MiB in bf16
    vocab_size=ByteTokenizer.vocab_size,
    d_model=1024,
    d_ff=2560,
    d_kv=64,
    num_heads=16,
    num_encoder_layers=6,
    num_decoder_layers=6,
    num_experts=24,
    tokenizer="bytes",
    pad_token_id=0,
    decoder_start_token_id=0,
    eos_token_ids=(1,),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What to measure. The equivalent model is written into `folder`, if it is not there."""

    model: Path
    folder: Path
    expert_memory: int
    source_tokens: int
    decode_tokens: int
    rows: int = 1
    skip: tuple[str, ...] = ()
    probe_s: float = PROBE_S

    def __post_init__(self) -> None:
        if unknown := set(self.skip) - set(CONTENDERS):
            raise ValueError(f"cannot skip {min(unknown)!r}; known: {', '.join(CONTENDERS)}")

    def job(self, contender: str) -> Job:
        """What a child is to do."""
        return Job(
            contender=contender,
            model=self.model,
            switch=self.folder / "switch",
            expert_memory=self.expert_memory,
            source_tokens=self.source_tokens,
            decode_tokens=self.decode_tokens,
            rows=self.rows,
        )


def make_model(folder: Path, config: ModelConfig = DEFAULT_MODEL) -> Path:
    """A model of random weights in bf16 below a folder; one that is there already is used."""
    directory = folder / "model"
    if not directory.exists():
        size = 2 * count_parameters(config)["total"]
        check_space(folder, size)
        tell(f"writing a model of {format_bytes(size)}")
        write_random_model(directory, config, torch.bfloat16)
    return directory


def make_switch(folder: Path, source: NativeSource) -> None:
    """Write the equivalent Switch model below a folder, if it is not there.

    Raises ValueError if there is the Switch model of another one.
    """
    directory = folder / "switch"
    if not directory.exists():
        size = source.dtype.itemsize * count_parameters(source.config)["total"]
        check_space(folder, size)
        tell(f"writing the equivalent Hugging Face model of {format_bytes(size)}")
        write_switch(directory, source.config, source.dtype)
    elif not is_switch_of(directory, source.config, source.dtype):
        raise ValueError(f"{directory}: is no equivalent of this model; remove it")


def check_space(folder: Path, size: int) -> None:
    """Raise ValueError unless a disk has room for that many bytes."""
    free = shutil.disk_usage(folder).free
    if free < size:
        raise ValueError(
            f"{folder}: {format_bytes(size)} are to be written and {format_bytes(free)} are free; "
            "name a folder with --work"
        )


def run_bench(settings: Settings) -> dict[str, object]:
    """Run all contenders. Raises ValueError if the model is none that all of them could run."""
    source, load = open_model(settings.model), os.getloadavg()[0]
    if load > BUSY:
        tell(f"the machine is busy (load average {load:.1f}): its times will not be worth much")
    notes = find_obstacles(settings)
    if "accelerate" not in notes:
        make_switch(settings.folder, source)
    process_bytes = measure_process(settings)
    headroom = HEADROOM_BYTES + expert_bytes(source)
    limit = settings.expert_memory + process_bytes + headroom
    results: dict[str, Result] = {}
    if "resident" not in notes:
        tell("running resident")
        results["resident"] = run_resident(settings)
    drop_cache(settings.model)  # what was read without a limit must not serve those that have one
    drop_cache(settings.folder / "switch")
    if names := [name for name in LIMITED if name not in notes]:
        results |= run_limited(settings, names, limit)
    rows: dict[str, object] = {name: {"note": note} for name, note in notes.items()}
    rows |= {name: make_row(result) for name, result in results.items()}
    return {
        **facts(settings, source),
        "load_average_before": round(load, 2),
        "memory_limit_bytes": limit,
        "process_bytes": process_bytes,
        "headroom_bytes": headroom,
        "disk_gb_per_s": disk_speed(results),
        "rows": {name: rows[name] for name in CONTENDERS},
        "tokens_equal": tokens_equal(results),
        "ratios": ratios(results),
    }


def open_model(directory: Path) -> NativeSource:
    """Open a native model. Raises ValueError if it is dense, or its experts are quantised."""
    source = open_native(directory)
    if not source.config.num_experts:
        raise ValueError(f"{directory}: is a dense model; it has no experts to offload")
    with ExitStack() as opened:
        for store in open_expert_stores(directory, source.config).values():
            opened.callback(store.close)
            if store.layout.quantization != "none":
                raise ValueError(f"{directory}: has quantised experts, which only ours can run")
    return source


def find_obstacles(settings: Settings) -> dict[str, str]:
    """The contenders that are not to run, or cannot, and why."""
    notes = dict.fromkeys(settings.skip, "skipped")
    if "accelerate" not in notes and (missing := missing_packages()):
        notes["accelerate"] = f"not installed: {', '.join(missing)}; install infmoe[bench]"
    needed, free = 2 * total_bytes(expert_files(settings.model)), available_memory()
    if "resident" not in notes and needed + HEADROOM_BYTES > free:
        notes["resident"] = f"needs {format_bytes(needed)} of memory, {format_bytes(free)} are free"
    return notes


def available_memory() -> int:
    """Bytes that can be allocated without swapping."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    values = dict(line.split(":") for line in lines)
    return 1024 * int(values["MemAvailable"].split()[0])


def measure_process(settings: Settings) -> int:
    """Memory that a process holds that has loaded all that is no expert."""
    with open_child() as child:
        child.load(settings.job("mmap"))
        if child.loaded is None:
            raise ValueError(f"{settings.model}: {child.note}")
        return child.loaded.rss_bytes


def run_resident(settings: Settings) -> Result:
    """Time ours and resident parameters, text by text in one process."""
    with open_child() as child:
        child.load(settings.job("resident"))
        for seed in range(NUM_TEXTS + 1):
            for _ in range(ROUNDS):
                child.time_text(seed)
        return Result(child.note, child.loaded, child.answers[ROUNDS:])


def run_limited(settings: Settings, names: list[str], limit: int) -> dict[str, Result]:
    """Time contenders text by text in turn, so that what disturbs one disturbs all."""
    probe = DiskProbe(expert_files(settings.model), settings.probe_s)
    with ExitStack() as stack:
        children = {name: stack.enter_context(open_child(limit)) for name in names}
        for name, child in children.items():
            tell(f"loading {name}")
            child.load(settings.job(name))
        disk = [probe.measure()]
        for seed in range(NUM_TEXTS + 1):
            tell(f"text {seed} of {NUM_TEXTS}")
            for turn in range(len(names)):
                children[names[(seed + turn) % len(names)]].time_text(seed)
            disk.append(probe.measure())
        around = tuple(statistics.mean(pair) for pair in pairwise(disk))[1:]
        return {
            name: Result(
                child.note,
                child.loaded,
                child.answers[1:],
                around,
                limit if child.is_limited else None,
                child.peak_group_bytes,
            )
            for name, child in children.items()
        }


def facts(settings: Settings, source: NativeSource) -> dict[str, object]:
    """What was run, and on what."""
    config = source.config
    one = expert_bytes(source)
    return {
        "model": settings.model.name,
        "dtype": str(source.dtype).removeprefix("torch."),
        "commit": commit(),
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "read_ahead_kb": read_ahead_kb(settings.model),
        "source_tokens": settings.source_tokens,
        "decode_tokens": settings.decode_tokens,
        "rows": settings.rows,
        "texts": NUM_TEXTS,
        "experts": config.num_experts * len(config.moe_layers()),
        "expert_bytes": one,
        "all_expert_bytes": one * config.num_experts * len(config.moe_layers()),
        "expert_bytes_per_token": one * config.num_decoder_layers,
        "expert_memory_bytes": settings.expert_memory,
    }


def expert_bytes(source: NativeSource) -> int:
    """Bytes of the weights of one expert."""
    return source.dtype.itemsize * count_parameters(source.config)["one_expert"]


def cpu_name() -> str | None:
    """The processor, as the kernel calls it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":")[1].strip() for line in lines if "model name" in line), None)


def tell(text: str) -> None:
    """Say what is going on; results alone go to standard output."""
    print(text, file=sys.stderr, flush=True)
