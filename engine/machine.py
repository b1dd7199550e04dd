"""How fast this machine moves bytes: disk, host memory, link to the GPU, memory of the GPU.

Measured in about a second, and kept for the next time in a file per machine.
"""

import hashlib
import json
import logging
import mmap
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields
from itertools import cycle
from pathlib import Path
from time import perf_counter
from typing import NamedTuple

import torch

from engine.units import parse_bytes

logger = logging.getLogger(__name__)

VERSION = 1
DISK_PROBE_S = 0.5
DRAM_PROBE_S = 0.25
BLOCK_BYTES = 8 * 2**20
ARRAY_BYTES = 2**28  # larger than the caches
REPEATS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Bandwidth:
    """Bytes per second, and where the number comes from."""

    per_s: float
    origin: str

    def __post_init__(self) -> None:
        if not self.per_s > 0:  # NaN fails as well
            raise ValueError(f"a bandwidth is {self.per_s} bytes/s; it must be more than 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class Bandwidths:
    """What is known of a machine; None: not known.

    `disk` reads of expert files, `dram` reads of host memory, `link` copies from pinned host memory
    to the GPU, `hbm` reads and writes of the GPU's memory.
    """

    disk: Bandwidth | None = None
    dram: Bandwidth | None = None
    link: Bandwidth | None = None
    hbm: Bandwidth | None = None

    def by_tier(self) -> dict[str, Bandwidth | None]:
        """All of them by name, known or not."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def to_json(self) -> dict[str, dict[str, object] | None]:
        """The numbers in JSON's types."""
        return {
            tier: None if found is None else {"bytes_per_s": found.per_s, "origin": found.origin}
            for tier, found in self.by_tier().items()
        }


class Rate(NamedTuple):
    """A measured bandwidth in bytes per second, and how it was measured."""

    per_s: float
    how: str


class Probe(NamedTuple):
    """A measurement, and the name under which its result is kept."""

    key: str
    measure: Callable[[], Rate]


def parse_bandwidth(text: str) -> Bandwidth:
    """Read '3GB/s', '50 GiB' or '900000000'. Raises ValueError if it is none of the kind."""
    try:
        return Bandwidth(per_s=parse_bytes(text.strip().removesuffix("/s")), origin="given")
    except ValueError as error:
        raise ValueError(
            f"{text!r} is no bandwidth; write 900MB/s, 3GB/s or 50GiB/s, more than 0"
        ) from error


def find_bandwidths(
    files: Sequence[Path],
    given: Mapping[str, Bandwidth],
    folder: Path,
    *,
    measure_again: bool = False,
) -> Bandwidths:
    """The bandwidths that are given; the others as kept in `folder`, or measured.

    `files` are those that the disk is measured with; without any, its bandwidth stays unknown.
    Raises OSError if they cannot be read.
    """
    facts = machine_facts()
    path = cache_file(folder, facts)
    kept = {} if measure_again else read_cache(path, facts)
    fresh: dict[str, Rate] = {}
    found = dict(given)
    for tier, probe in find_probes(files).items():
        if tier in given:
            continue
        if probe.key not in kept:
            fresh[probe.key] = probe.measure()
        rate = (kept | fresh)[probe.key]
        age = "measured now" if probe.key in fresh else "measured earlier"
        found[tier] = Bandwidth(per_s=rate.per_s, origin=f"{age}, {rate.how}")
    if fresh:
        write_cache(path, facts, read_cache(path, facts) | fresh)
    return Bandwidths(**found)


def find_probes(files: Sequence[Path]) -> dict[str, Probe]:
    """What can be measured here, by tier."""
    probes = {"dram": Probe("dram", dram_rate)}
    if files:
        probes["disk"] = Probe(file_system(files[0]), lambda: disk_rate(files))
    if torch.cuda.is_available():
        probes |= {"link": Probe("link", link_rate), "hbm": Probe("hbm", hbm_rate)}
    return probes


def disk_rate(files: Sequence[Path], least_s: float = DISK_PROBE_S) -> Rate:
    """Read files in order, again and again for `least_s` seconds, past the page cache if possible.

    Raises OSError if a file cannot be read, ValueError if all are empty.
    """
    block = mmap.mmap(-1, BLOCK_BYTES)  # page-aligned, as direct reads ask for
    is_direct, done = True, 0
    began = perf_counter()
    for path in cycle(files):
        with ExitStack() as opened:
            file, direct = _open_direct(path, opened)
            is_direct &= direct
            done += _read_through(file, block, began + least_s)
        if perf_counter() - began >= least_s:
            break
    if not done:
        raise ValueError(f"{files[0]}: is empty; the disk cannot be measured with it")
    how = "direct reads" if is_direct else "buffered reads, so the page cache had a part in it"
    return Rate(done / (perf_counter() - began), how)


def dram_rate() -> Rate:
    """Sum an array that no cache holds, for DRAM_PROBE_S; the best of all tries."""
    data = torch.ones(ARRAY_BYTES // 4)
    began, times = perf_counter(), list[float]()
    while perf_counter() - began < DRAM_PROBE_S:
        times.append(_timed(data.sum))
    return Rate(ARRAY_BYTES / min(times), "sum of an array")


def link_rate() -> Rate:
    """Copy pinned host memory to the GPU; the best of a few."""
    source = torch.empty(ARRAY_BYTES, dtype=torch.uint8, pin_memory=True)
    target = torch.empty_like(source, device="cuda")
    return Rate(_best_copy(target, source), "copy of pinned memory")


def hbm_rate() -> Rate:
    """Copy inside the GPU; each byte is read and written."""
    source = torch.empty(4 * ARRAY_BYTES, dtype=torch.uint8, device="cuda")
    return Rate(2 * _best_copy(torch.empty_like(source), source), "copy on the device")


def machine_facts() -> dict[str, object]:
    """What tells one machine from another, as far as bandwidths go."""
    cpus = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        if line.startswith("model name")
    ]
    return {
        "cpu": cpus[0] if cpus else None,
        "cpus": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "pages": os.sysconf("SC_PHYS_PAGES"),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def file_system(path: Path) -> str:
    """A name for the file system of a file. Raises OSError if there is no such file."""
    found = os.statvfs(path)
    return f"disk-{path.stat().st_dev:x}-{found.f_fsid:x}-{found.f_blocks:x}"


def cache_folder() -> Path:
    """Where measurements are kept."""
    home = os.environ.get("XDG_CACHE_HOME")
    if home:
        return Path(home) / "infmoe"
    try:
        return Path.home() / ".cache/infmoe"
    except RuntimeError:  # neither HOME nor an entry in the list of users, as in some containers
        return Path(tempfile.gettempdir()) / f"infmoe-{os.getuid()}"


def cache_file(folder: Path, facts: Mapping[str, object]) -> Path:
    """The file that measurements of a machine are kept in."""
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    return folder / f"bandwidths-{digest[:16]}.json"


def read_cache(path: Path, facts: Mapping[str, object]) -> dict[str, Rate]:
    """What is kept of a machine; nothing if the file is missing, damaged or of another machine."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values["version"] != VERSION or values["machine"] != facts:
            return {}
        rates = {
            str(key): Rate(float(per_s), str(how)) for key, (per_s, how) in values["rates"].items()
        }
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return {}
    return {key: rate for key, rate in rates.items() if rate.per_s > 0}


def write_cache(path: Path, facts: Mapping[str, object], rates: Mapping[str, Rate]) -> None:
    """Keep measurements, all or nothing; a folder that cannot be written is told and no failure."""
    text = json.dumps({"version": VERSION, "machine": facts, "rates": rates})
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        Path(file.name).replace(path)
    except OSError as error:
        logger.warning("%s: bandwidths are not kept: %s", path, error.strerror)


def _open_direct(path: Path, opened: ExitStack) -> tuple[int, bool]:
    """Open a file for reading past the page cache, or through it where that is not possible."""
    try:
        file, is_direct = os.open(path, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC), True
    except OSError:
        file, is_direct = os.open(path, os.O_RDONLY | os.O_CLOEXEC), False
    opened.callback(os.close, file)
    return file, is_direct


def _read_through(file: int, block: mmap.mmap, until_s: float) -> int:
    """Read a file to its end, or until it is time. Returns the bytes read."""
    done = 0
    while True:
        read = os.preadv(file, [block], done)
        done += read
        if read < BLOCK_BYTES or perf_counter() >= until_s:  # a shorter read was the last
            return done


def _best_copy(target: torch.Tensor, source: torch.Tensor) -> float:
    """Bytes per second of the fastest of a few copies, timed on the device."""
    times_ms: list[float] = []
    for _ in range(REPEATS):
        begin, end = (
            torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]  # torch's own
            for _ in range(2)
        )
        begin.record()
        target.copy_(source, non_blocking=True)
        end.record()
        end.synchronize()
        times_ms.append(begin.elapsed_time(end))
    return 1000 * len(source) / min(times_ms)


def _timed(work: Callable[[], object]) -> float:
    began = perf_counter()
    work()
    return perf_counter() - began
