import os
import subprocess
import sys
import textwrap

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import ConfigError
from engine.memory import (
    GpuMemory,
    HostMemory,
    gpu_budget,
    host_budget,
    host_memory,
    own_pages_bytes,
    resident_bytes,
)

GIB = 2**30
UNLIMITED = 9223372036854771712
PAGE = os.sysconf("SC_PAGE_SIZE")
MOUNTS = {
    1: "35 31 0:32 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n",
    2: "35 31 0:32 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n",
}
OWN = {1: "4:memory:/a/b\n0::/\n", 2: "0::/a/b\n"}
BASE = {1: "sys/fs/cgroup/memory", 2: "sys/fs/cgroup"}


def machine(root, version=None):
    """A /proc of 16 GiB, 10 of them available, and 100 pages for this process."""
    (root / "proc/self").mkdir(parents=True)
    info = "MemTotal:       16777216 kB\nMemFree: 1 kB\nMemAvailable:   10485760 kB\n"
    (root / "proc/meminfo").write_text(info + "HugePages_Total:       0\n")
    (root / "proc/self/statm").write_text("5000 100 50 1 0 60 0\n")
    if version:
        (root / "proc/self/cgroup").write_text(OWN[version])
        (root / "proc/self/mountinfo").write_text(MOUNTS[version])
    return root


def group(root, version, name, limit, usage=0, cache=0):
    directory = root / BASE[version] / name
    directory.mkdir(parents=True, exist_ok=True)
    if version == 1:
        texts = {"memory.limit_in_bytes": limit, "memory.usage_in_bytes": usage}
        stat = f"cache 5\ntotal_inactive_file {cache - 1}\ntotal_active_file 1\ntotal_shmem 3\n"
    else:
        texts = {"memory.max": limit, "memory.current": usage}
        stat = f"anon 5\nfile {cache + 3}\nshmem 3\ninactive_file {cache - 1}\nactive_file 1\n"
    for file, text in texts.items():
        (directory / file).write_text(f"{text}\n")
    (directory / "memory.stat").write_text(stat)


def test_pages_of_files_are_not_a_process_s_own(tmp_path):
    page = resident_bytes(machine(tmp_path)) // 100
    assert own_pages_bytes(tmp_path) == 50 * page


def test_without_groups_the_machine_is_the_limit(tmp_path):
    found = host_memory(machine(tmp_path))
    assert found == HostMemory(
        limit_bytes=16 * GIB,
        limited_by="the machine",
        available_bytes=10 * GIB,
        own_bytes=100 * PAGE,
    )
    assert found.usable_bytes == 10 * GIB + 100 * PAGE


@pytest.mark.parametrize("version", [1, 2])
def test_the_tightest_of_own_group_and_all_above_counts(tmp_path, version):
    root = machine(tmp_path, version)
    unlimited = UNLIMITED if version == 1 else "max"
    group(root, version, "a/b", 4 * GIB, usage=3 * GIB, cache=GIB)  # 2 GiB are left
    group(root, version, "a", 3 * GIB, usage=2 * GIB, cache=GIB // 2)  # 1.5 GiB are left
    if version == 1:  # the root of version 2 has no such files
        group(root, version, "", unlimited)
    found = host_memory(root)
    assert found.limit_bytes == 3 * GIB
    assert found.limited_by == f"the memory group /{BASE[version]}/a"
    assert found.available_bytes == GIB + GIB // 2
    group(root, version, "a", unlimited)
    found = host_memory(root)
    assert (found.limit_bytes, found.available_bytes) == (4 * GIB, 2 * GIB)


@pytest.mark.parametrize("version", [1, 2])
def test_no_limit_anywhere_leaves_the_machine(tmp_path, version):
    root = machine(tmp_path, version)
    group(root, version, "a/b", UNLIMITED if version == 1 else "max")
    assert host_memory(root).limited_by == "the machine"


def test_a_container_sees_its_own_group_as_the_root(tmp_path):
    root = machine(tmp_path)
    (root / "proc/self/cgroup").write_text("0::/\n")
    (root / "proc/self/mountinfo").write_text(MOUNTS[2])
    group(root, 2, "", 2 * GIB, usage=GIB)
    assert host_memory(root).limit_bytes == 2 * GIB


def test_groups_that_are_not_mounted_or_cannot_be_read_are_passed_over(tmp_path):
    root = machine(tmp_path, 1)
    assert host_memory(root).limit_bytes == 16 * GIB
    (root / "proc/self/mountinfo").write_text("")
    assert host_memory(root).limit_bytes == 16 * GIB


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("file", ["limit", "stat"])
def test_a_group_whose_files_are_odd_is_passed_over(tmp_path, version, file):
    root = machine(tmp_path, version)
    group(root, version, "a", 8 * GIB)
    group(root, version, "a/b", 2 * GIB)
    names = {"limit": {1: "memory.limit_in_bytes", 2: "memory.max"}[version], "stat": "memory.stat"}
    (root / BASE[version] / "a/b" / names[file]).write_text("word\n")
    assert host_memory(root).limit_bytes == 8 * GIB


def test_an_overfull_group_has_nothing_left(tmp_path):
    root = machine(tmp_path, 2)
    group(root, 2, "a/b", GIB, usage=2 * GIB)
    assert host_memory(root).available_bytes == 0
    assert host_memory(root).usable_bytes == 100 * PAGE


def test_without_proc_that_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        host_memory(tmp_path)


def test_this_process_on_this_machine():
    found = host_memory()
    assert 10**7 < found.own_bytes < found.limit_bytes
    assert 0 < found.usable_bytes <= found.limit_bytes
    assert abs(found.own_bytes - resident_bytes()) < 10**8


HOST = HostMemory(
    limit_bytes=8 * GIB, limited_by="the memory group /a", available_bytes=4 * GIB, own_bytes=GIB
)


def test_a_host_budget_is_what_was_asked_for_or_a_share_of_what_is_to_be_had():
    assert host_budget(8 * GIB, HOST) == 8 * GIB
    assert host_budget(None, HOST) == 4 * GIB  # 0.8 of 4 GiB and the 1 it has
    with pytest.raises(ConfigError, match=r"8\.0 GiB is more than the memory group /a allows"):
        host_budget(8 * GIB + 1, HOST)


@given(st.integers(0, 2**50), st.integers(0, 2**50), st.integers(0, 2**50))
def test_a_default_never_exceeds_the_limit(limit, available, own):
    host = HostMemory(limit_bytes=limit, limited_by="x", available_bytes=available, own_bytes=own)
    assert host_budget(None, host) <= limit


def test_a_gpu_budget_must_fit_what_is_left_of_the_gpu():
    gpu = GpuMemory(free_bytes=70 * GIB, total_bytes=80 * GIB)
    assert gpu_budget(71 * GIB, gpu, GIB) == 71 * GIB
    with pytest.raises(ConfigError, match=r"left: 71\.0 GiB of 80\.0 GiB"):
        gpu_budget(71 * GIB + 1, gpu, GIB)
    with pytest.raises(ConfigError, match=r"left: 80\.0 GiB of 80\.0 GiB"):
        gpu_budget(81 * GIB, gpu, 20 * GIB)


def test_large_blocks_are_given_back_at_once():
    """Without it glibc keeps blocks below 32 MiB once one of that size has been freed."""
    code = """
        import re, torch
        from engine.memory import return_large_blocks
        return_large_blocks()
        def rss():
            return int(re.search(r"VmRSS:\\s+(\\d+)", open("/proc/self/status").read())[1])
        torch.ones(7 * 2**20)
        before = rss()
        for _ in range(3):
            blocks = [torch.ones(6 * 2**20) for _ in range(8)]  # 24 MiB each
            fences = [torch.ones(2**16) for _ in range(8)]
            del blocks
        print(rss() - before)
    """
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True
    )
    assert int(result.stdout) < 24 * 1024  # KiB


def test_holes_between_blocks_are_given_back():
    code = """
        import re, torch
        from engine.memory import return_free_heap
        def rss():
            return int(re.search(r"VmRSS:\\s+(\\d+)", open("/proc/self/status").read())[1])
        blocks = [torch.ones(2**14) for _ in range(1000)]  # 64 KiB each, on the heap
        full = rss()
        kept = blocks[-1]
        del blocks[:-1]
        blocks = None
        return_free_heap()
        print(full - rss())
    """
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True
    )
    assert int(result.stdout) > 48 * 1024  # KiB, of 62
