"""How many threads compute: cores that are allowed, and quotas of groups, as fake files tell."""

import os
from contextlib import contextmanager

import pytest
import torch

from engine.cores import set_threads, usable_cores

MOUNTS = {
    1: "35 31 0:32 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n",
    2: "35 31 0:32 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n",
}
OWN = {1: "4:memory:/m\n3:cpu,cpuacct:/a/b\n0::/\n", 2: "0::/a/b\n"}
BASE = {1: "sys/fs/cgroup/cpu,cpuacct", 2: "sys/fs/cgroup"}


def machine(root, version):
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(OWN[version])
    (root / "proc/self/mountinfo").write_text(MOUNTS[version])
    return root


def limit(root, version, name, cores=None):
    """Give a group a quota, or none."""
    directory = root / BASE[version] / name
    directory.mkdir(parents=True, exist_ok=True)
    quota = None if cores is None else int(cores * 100_000)
    if version == 2:
        (directory / "cpu.max").write_text(f"{quota or 'max'} 100000\n")
    else:
        (directory / "cpu.cfs_quota_us").write_text(f"{quota or -1}\n")
        (directory / "cpu.cfs_period_us").write_text("100000\n")


@contextmanager
def torch_threads(number):
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def many_cores(monkeypatch):
    """64 cores, as on the machines whose quotas matter."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(("cores", "threads"), [(0.5, 1), (1, 1), (1.5, 2), (8, 8), (100, 64)])
def test_a_quota_is_rounded_up_to_cores(tmp_path, version, cores, threads):
    root = machine(tmp_path, version)
    limit(root, version, "a/b", cores)
    assert usable_cores(root) == threads


@pytest.mark.parametrize("version", [1, 2])
def test_the_tightest_of_own_group_and_all_above_counts(tmp_path, version):
    root = machine(tmp_path, version)
    limit(root, version, "a/b", 6)
    limit(root, version, "a", 3.2)
    if version == 1:  # the root of version 2 has no such file
        limit(root, version, "")
    assert usable_cores(root) == 4
    limit(root, version, "a")
    assert usable_cores(root) == 6


@pytest.mark.parametrize("version", [1, 2])
def test_without_a_quota_all_cores_count_that_are_allowed(tmp_path, version):
    root = machine(tmp_path, version)
    assert usable_cores(root) == 64  # no group is to be seen
    limit(root, version, "a/b")
    assert usable_cores(root) == 64
    (root / "proc/self/mountinfo").write_text("")
    assert usable_cores(root) == 64
    (root / "proc/self/cgroup").unlink()
    assert usable_cores(root) == 64


@pytest.mark.parametrize("content", ["", "max\n", "a b\n", "1 2 3\n", "100000 0\n"])
def test_a_quota_that_is_none_counts_as_none(tmp_path, content):
    root = machine(tmp_path, 2)
    limit(root, 2, "a", 3)
    limit(root, 2, "a/b")
    (root / BASE[2] / "a/b/cpu.max").write_text(content)
    assert usable_cores(root) == 3


def test_a_group_outside_of_the_namespace_and_a_hybrid_of_both_versions(tmp_path):
    root = machine(tmp_path, 2)
    (root / "proc/self/cgroup").write_text("0::/../a/b\n")
    limit(root, 2, "", 5)
    assert usable_cores(root) == 5
    (root / "proc/self/cgroup").write_text("1:name=systemd:/u\n3:cpu,cpuacct:/a/b\n0::/u\n")
    (root / "proc/self/mountinfo").write_text(MOUNTS[2] + MOUNTS[1])
    assert usable_cores(root) == 64
    limit(root, 1, "a/b", 2)
    assert usable_cores(root) == 2


def test_a_container_sees_its_own_group_as_the_root(tmp_path):
    root = machine(tmp_path, 2)
    (root / "proc/self/cgroup").write_text("0::/\n")
    limit(root, 2, "", 1.5)
    assert usable_cores(root) == 2


def test_threads_are_no_more_than_cores(tmp_path, caplog):
    root = machine(tmp_path, 2)
    limit(root, 2, "a/b", 1.5)
    with torch_threads(3), caplog.at_level("INFO"):
        set_threads(None, root)
        assert torch.get_num_threads() == 2
        assert "by 2 threads" in caplog.text
        torch.set_num_threads(1)  # as OMP_NUM_THREADS=1 has it: fewer than there are cores for
        set_threads(None, root)
        assert torch.get_num_threads() == 1


def test_a_number_that_is_asked_for_counts(tmp_path):
    root = machine(tmp_path, 2)
    limit(root, 2, "a/b", 1)
    with torch_threads(1):
        set_threads(3, root)
        assert torch.get_num_threads() == 3
