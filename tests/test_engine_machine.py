import json
import os
import tempfile
from pathlib import Path

import pytest

from engine.machine import (
    Bandwidth,
    Bandwidths,
    Rate,
    cache_file,
    cache_folder,
    disk_rate,
    dram_rate,
    file_system,
    find_bandwidths,
    machine_facts,
    parse_bandwidth,
    read_cache,
    write_cache,
)

FACTS = {"cpu": "x", "cpus": 2}
RATES = {"dram": Rate(3e10, "sum of an array"), "disk-1": Rate(1e9, "direct reads")}


@pytest.fixture
def files(tmp_path) -> list[Path]:
    paths = [tmp_path / f"experts-{i}" for i in range(2)]
    for path in paths:
        path.write_bytes(os.urandom(3 * 2**20))
    return paths


@pytest.mark.parametrize(
    ("text", "per_s"),
    [("3GB/s", 3e9), ("3 GB", 3e9), ("50GiB/s", 50 * 2**30), ("900MB/s ", 9e8), ("4096", 4096)],
)
def test_bandwidths_as_people_write_them(text, per_s):
    assert parse_bandwidth(text) == Bandwidth(per_s=per_s, origin="given")


@pytest.mark.parametrize("text", ["fast", "3GB/h", "", "0", "0GB/s", "-1GB/s"])
def test_what_is_no_bandwidth(text):
    with pytest.raises(ValueError, match="is no bandwidth; write 900MB/s"):
        parse_bandwidth(text)


@pytest.mark.parametrize("per_s", [0, -1, float("nan")])
def test_a_bandwidth_is_more_than_nothing(per_s):
    with pytest.raises(ValueError, match="must be more than 0"):
        Bandwidth(per_s=per_s, origin="given")


def test_the_disk_is_read_past_the_page_cache_or_that_is_told(files):
    rate = disk_rate(files, least_s=0.05)
    assert rate.per_s > 0
    assert rate.how.startswith(("direct reads", "buffered reads"))


def test_a_file_system_without_direct_reads_is_told():
    rate = disk_rate([Path("/proc/cpuinfo")], least_s=0.01)
    assert rate.per_s > 0
    assert rate.how == "buffered reads, so the page cache had a part in it"


def test_files_that_cannot_be_measured_with(tmp_path, files):
    with pytest.raises(FileNotFoundError):
        disk_rate([tmp_path / "none"], least_s=0.01)
    files[0].write_bytes(b"")
    with pytest.raises(ValueError, match="is empty; the disk cannot be measured"):
        disk_rate(files[:1], least_s=0.01)


def test_memory_is_no_slower_than_it_was_decades_ago():
    assert dram_rate().per_s > 1e8


def test_what_is_measured_is_kept_and_found_again(tmp_path, files):
    first = find_bandwidths(files, {}, tmp_path / "cache")
    assert first.disk.origin.startswith("measured now, ")
    assert (first.link, first.hbm) == (None, None) or machine_facts()["gpu"]
    (kept,) = (tmp_path / "cache").iterdir()
    again = find_bandwidths(files, {}, tmp_path / "cache")
    assert again.disk.per_s == first.disk.per_s
    assert again.disk.origin.startswith("measured earlier, ")
    assert again.dram.per_s == first.dram.per_s
    values = json.loads(kept.read_text())
    values["rates"]["dram"] = [1.0, "x"]
    kept.write_text(json.dumps(values))
    assert find_bandwidths(files, {}, tmp_path / "cache").dram.per_s == 1.0
    afresh = find_bandwidths(files, {}, tmp_path / "cache", measure_again=True)
    assert afresh.dram.origin.startswith("measured now, ")
    assert find_bandwidths(files, {}, tmp_path / "cache").dram.per_s == afresh.dram.per_s


def test_what_is_given_is_not_measured(tmp_path):
    given = {tier: Bandwidth(per_s=1e9, origin="given") for tier in ("disk", "dram", "link", "hbm")}
    found = find_bandwidths([], given, tmp_path / "cache")
    assert found == Bandwidths(**given)
    assert not (tmp_path / "cache").exists()
    assert found.to_json()["link"] == {"bytes_per_s": 1e9, "origin": "given"}


def test_without_files_the_disk_stays_unknown(tmp_path):
    given = {"dram": Bandwidth(per_s=1e9, origin="given")}
    found = find_bandwidths([], given, tmp_path)
    assert found.disk is None
    assert found.to_json()["disk"] is None


def test_a_cache_is_read_back(tmp_path):
    path = cache_file(tmp_path / "a" / "b", FACTS)
    write_cache(path, FACTS, RATES)
    assert read_cache(path, FACTS) == RATES
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "[" * 100_000,
        '{"version": 2, "machine": {"cpu": "x", "cpus": 2}, "rates": {}}',
        '{"version": 1, "machine": {"cpu": "y", "cpus": 2}, "rates": {"dram": [1e9, "x"]}}',
        '{"version": 1, "machine": {"cpu": "x", "cpus": 2}, "rates": {"dram": "fast"}}',
        '{"version": 1, "machine": {"cpu": "x", "cpus": 2}, "rates": {"dram": ["fast", "x"]}}',
        '{"version": 1, "machine": {"cpu": "x", "cpus": 2}, "rates": {"dram": [0, "x"]}}',
        '{"version": 1, "machine": {"cpu": "x", "cpus": 2}, "rates": [1]}',
        '{"version": 1, "machine": {"cpu": "x", "cpus": 2}}',
    ],
)
def test_a_damaged_or_foreign_cache_counts_for_nothing(tmp_path, text):
    path = tmp_path / "bandwidths.json"
    path.write_text(text)
    assert read_cache(path, FACTS) == {}
    assert read_cache(tmp_path / "none", FACTS) == {}


def test_a_cache_that_cannot_be_written_is_told(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    write_cache(tmp_path / "file" / "x.json", FACTS, RATES)
    assert "bandwidths are not kept" in caplog.text


def test_where_measurements_are_kept(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/x/y")
    assert cache_folder() == Path("/x/y/infmoe")
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert cache_folder() == Path.home() / ".cache/infmoe"
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", {}.__getitem__)  # a user that the system does not know
    assert cache_folder() == Path(tempfile.gettempdir()) / f"infmoe-{os.getuid()}"


def test_machines_and_file_systems_have_names(tmp_path):
    assert cache_file(tmp_path, FACTS) != cache_file(tmp_path, {**FACTS, "cpus": 3})
    assert machine_facts() == machine_facts()
    assert file_system(tmp_path) == file_system(tmp_path.parent)
    assert file_system(Path("/proc")) != file_system(tmp_path)
