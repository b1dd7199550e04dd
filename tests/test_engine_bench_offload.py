import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from engine.bench_child import open_child
from engine.bench_contenders import (
    Answer,
    Loaded,
    OurRunner,
    Sample,
    expert_files,
    make_text,
    open_mapped,
    open_ours,
    time_text,
    total_bytes,
)
from engine.bench_disk import DiskProbe, drop_cache
from engine.bench_offload import (
    CONTENDERS,
    NUM_TEXTS,
    Settings,
    find_obstacles,
    make_model,
    make_switch,
    run_bench,
)
from engine.bench_report import Result, disk_speed, make_row, print_report, ratios, tokens_equal
from engine.bench_switch import (
    SwitchRunner,
    device_map,
    is_switch_of,
    open_switch,
    switch_values,
    write_switch,
)
from engine.cgroup import LimitUnavailable, find_place, limited_group
from engine.checkpoint import load_model, open_native
from engine.random_model import write_random_model
from server.__main__ import main
from tests.tiny import DENSE, MOE

MIB = 2**20


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A working folder with a model and the Switch model that is its equivalent."""
    path = tmp_path_factory.mktemp("work")
    write_random_model(path / "model", MOE, torch.bfloat16, seed=3)
    write_switch(path / "switch", MOE, torch.bfloat16)
    return path


def settings(folder, **changes) -> Settings:
    values = {"expert_memory": 40_000, "source_tokens": 9, "decode_tokens": 5, "probe_s": 0.01}
    return Settings(model=folder / "model", folder=folder, **(values | changes))


# contenders


@torch.inference_mode()
@pytest.mark.parametrize("rows", [1, 3])
def test_offloaded_mapped_and_resident_make_the_same_tokens(folder, rows):
    job = settings(folder, rows=rows).job("offload")
    resident = OurRunner(load_model(job.model))
    with open_ours(job.model, job.expert_memory) as offloaded, open_mapped(job.model) as mapped:
        for seed in range(4):
            text = make_text(job, seed)
            samples = [time_text(runner, text) for runner in (resident, offloaded, mapped)]
            assert samples[0].tokens == samples[1].tokens == samples[2].tokens
            assert len(samples[0].tokens) == 5 * rows
            assert min(min(s.encode_s, s.decode_s) for s in samples) > 0


def test_texts_are_the_same_for_the_same_seed_and_cover_the_vocabulary(folder):
    job = replace(settings(folder).job("mmap"), source_tokens=2000)
    first, again, other = (make_text(job, seed) for seed in (1, 1, 2))
    assert torch.equal(first.source, again.source)
    assert torch.equal(first.fed, again.fed)
    assert not torch.equal(first.source, other.source)
    assert 300 < first.source.max() < MOE.vocab_size


@pytest.mark.parametrize("gated", [True, False])
def test_an_expert_of_the_switch_model_has_the_bytes_of_ours(tmp_path, gated):
    config = replace(MOE, gated=gated)
    write_switch(tmp_path / "switch", config, torch.bfloat16)
    ours = sum(2 * torch.Size(s).numel() for n, s in config.expert_shapes().items() if n != "norm")
    files = sorted((tmp_path / "switch").glob("model-*.safetensors"))[1:]  # the first is dense
    assert len(files) == 4 * 4  # every layer is sparse
    for file in files:
        tensors = load_file(file)
        assert sum(tensor.nbytes for tensor in tensors.values()) == ours
        assert len(tensors) == 2


def test_an_expert_that_cannot_be_made_equal_is_refused():
    with pytest.raises(ValueError, match="d_ff 49 is odd"):
        switch_values(replace(MOE, d_ff=49), torch.bfloat16)


@torch.inference_mode()
def test_the_switch_model_on_disk_equals_itself_in_memory(folder):
    from transformers import SwitchTransformersForConditionalGeneration

    in_memory = SwitchTransformersForConditionalGeneration.from_pretrained(
        folder / "switch", dtype=torch.bfloat16
    )
    oracle, text = SwitchRunner(in_memory), make_text(settings(folder).job("mmap"), 0)
    with open_switch(folder / "switch") as runner:
        assert time_text(runner, text).tokens == time_text(oracle, text).tokens
        weights = dict(runner.model.named_parameters())
        assert {w.device.type for n, w in weights.items() if ".experts." in n} == {"meta"}
        assert {w.device.type for n, w in weights.items() if ".experts." not in n} == {"cpu"}


def test_a_model_without_experts_goes_to_memory():
    assert device_map(torch.nn.Sequential(torch.nn.Linear(1, 1)), "x") == {"x": "cpu"}


# the parent


def test_a_model_and_its_equivalent_are_made_once(tmp_path):
    first = make_model(tmp_path, MOE)
    before = first.stat().st_ino
    assert make_model(tmp_path, MOE).stat().st_ino == before
    source = open_native(first)
    make_switch(tmp_path, source)
    assert is_switch_of(tmp_path / "switch", MOE, torch.bfloat16)
    make_switch(tmp_path, source)
    write_random_model(tmp_path / "other", replace(MOE, d_ff=64), torch.bfloat16)
    with pytest.raises(ValueError, match="is no equivalent of this model"):
        make_switch(tmp_path, open_native(tmp_path / "other"))


def test_too_small_a_disk_is_told_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match=r"are to be written .* name a folder with --work"):
        make_model(tmp_path, replace(MOE, d_ff=2**40))
    assert list(tmp_path.iterdir()) == []


def test_a_missing_accelerate_is_told(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "accelerate", None)
    notes = find_obstacles(settings(folder, skip=("mmap",)))
    assert notes == {
        "mmap": "skipped",
        "accelerate": "not installed: accelerate; install infmoe[bench]",
    }


def test_an_unknown_contender_cannot_be_skipped(folder):
    with pytest.raises(ValueError, match="cannot skip 'vllm'; known: offload, resident"):
        settings(folder, skip=("vllm",))


def test_a_child_that_fails_tells_why_and_is_asked_no_more(folder):
    with open_child() as child:
        child.load(replace(settings(folder).job("offload"), expert_memory=10))
        assert "10 bytes hold 0 experts" in child.note
        child.time_text(0)
        assert (child.loaded, child.answers, child.is_alive) == (None, [], False)


def test_the_disk_is_read_for_as_long_as_it_is_told(folder):
    files = expert_files(folder / "model")
    drop_cache(folder / "model")
    probe = DiskProbe(files, 0.02)
    assert probe.measure() > 0
    assert probe.measure() > 0
    assert total_bytes(files) > 16 * 3 * 2 * 32 * 48


# what is told


def results() -> dict[str, Result]:
    """Two texts of 10 tokens each; ours decodes them in 1 and 2 s, plain and mmap in 4."""

    def sample(seed, decode_s, token=7):
        return Sample(seed, 0.5, decode_s, 3000, 1000, [token] * 10)

    loaded = Loaded(1.5, MIB)
    ours = [Answer([sample(seed, seed)], 2 * MIB) for seed in (1, 2)]
    both = [Answer([sample(seed, 4.2), sample(seed, 4.0)], 9 * MIB) for seed in (1, 2)]
    mapped = [Answer([sample(seed, 4.0)], MIB) for seed in (1, 2)]
    other = [Answer([sample(1, 4.0, token=8)], MIB)]
    return {
        "offload": Result("", loaded, ours, (1000.0, 2000.0), 5 * MIB, 4 * MIB),
        "resident": Result("", loaded, both),
        "mmap": Result("page cache not limited: why", loaded, mapped, (1000.0, 2000.0)),
        "accelerate": Result("ended with -9", loaded, other, (1000.0, 2000.0), 5 * MIB, 5 * MIB),
    }


def test_rows_hold_medians_shares_of_the_disk_and_the_overhead():
    rows = {name: make_row(result) for name, result in results().items()}
    ours = rows["offload"]
    assert ours["decode_tokens_per_s"] == {"median": 7.5, "min": 5.0, "max": 10.0}
    assert (ours["read_bytes_per_token"], ours["encode_read_bytes"]) == (100, 3000)
    # 1000 bytes in 1 s where the disk gives 1000 a second; 1000 in 2 s where it gives 2000
    assert ours["decode_share_of_disk"] == {"median": 0.625, "min": 0.25, "max": 1.0}
    assert (ours["memory_limit_bytes"], ours["peak_group_bytes"]) == (5 * MIB, 4 * MIB)
    assert rows["resident"]["decode_overhead"] == 0.05
    assert "decode_share_of_disk" not in rows["resident"]
    assert "decode_overhead" not in rows["mmap"]
    assert rows["mmap"]["memory_limit_bytes"] is None
    assert rows["accelerate"]["note"] == "ended with -9"
    assert make_row(Result("no", None, []))["note"] == "no"


def test_ratios_are_of_medians_and_only_of_what_ran():
    found = results()
    assert ratios(found) == {
        "decode_ours_over_mmap": 2.667,
        "encode_ours_over_mmap": 1.0,
        "decode_ours_over_accelerate": 2.667,
        "encode_ours_over_accelerate": 1.0,
    }
    assert ratios({"mmap": found["mmap"]}) == {}
    assert ratios({"offload": found["offload"], "mmap": Result("no", None, [])}) == {}


def test_tokens_are_compared_within_our_model_only():
    found = results()
    assert tokens_equal(found) is True
    wrong = Sample(2, 1.0, 1.0, 0, 0, [1] * 10)
    assert tokens_equal(found | {"mmap": Result("", None, [Answer([wrong], 0)])}) is False
    assert tokens_equal({"mmap": found["mmap"], "accelerate": found["accelerate"]}) is None


def test_the_table_has_a_line_for_each_and_the_last_line_is_json(capsys):
    rows = {name: make_row(result) for name, result in results().items()}
    rows["accelerate"] = {"note": "skipped"}
    disk = disk_speed({"offload": Result("", None, [], (1e9, 2e9))})
    report = {"model": "m", "disk_gb_per_s": disk, "rows": rows, "ratios": ratios(results())}
    print_report(report)
    lines = capsys.readouterr().out.splitlines()
    assert json.loads(lines[-1]) == report
    table = {line.split()[0]: line for line in lines if line.strip()}
    assert table["disk_gb_per_s"].endswith("1.50 (1.00 to 2.00)")
    assert "7.50 (5.00 to 10.00)" in table["offload"]
    assert "62.5%" in table["offload"]
    assert "+5.0% to decode" in table["resident"]
    assert table["mmap"].endswith("page cache not limited: why")
    assert table["accelerate"].split() == ["accelerate", "skipped"]


# the memory group


@pytest.fixture
def group():
    try:
        with limited_group(128 * MIB) as made:
            yield made
    except LimitUnavailable as error:
        pytest.skip(str(error))


def run_in(group, code: str) -> int:
    """Exit code of a Python process in the group; it waits until it is in there."""
    command = [sys.executable, "-c", f"input()\n{code}"]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as process:
        group.add(process.pid)
        process.communicate(b"\n")
        return process.returncode


def test_a_group_counts_what_its_process_holds(group):
    assert run_in(group, f"data = b'1' * {60 * MIB}") == 0
    assert 60 * MIB < group.peak_bytes() < 128 * MIB


def test_a_process_that_wants_more_than_the_limit_is_killed(group):
    assert run_in(group, f"data = b'1' * {200 * MIB}") == -9
    assert group.peak_bytes() <= 128 * MIB


def test_the_page_cache_gives_way_at_the_limit(group, tmp_path):
    path = tmp_path / "file"
    with path.open("wb") as file:
        for _ in range(200):
            file.write(bytes(MIB))
        os.fsync(file.fileno())
    drop_cache(path)
    assert run_in(group, f"f = open({str(path)!r}, 'rb')\nwhile f.read({MIB}): pass") == 0
    assert group.peak_bytes() <= 128 * MIB


def test_a_group_is_removed_whatever_happens():
    seen = []
    try:
        with limited_group(64 * MIB) as made:
            seen.append(made.directory)
            raise KeyError
    except LimitUnavailable as error:
        pytest.skip(str(error))
    except KeyError:
        assert not seen[0].exists()


def test_a_child_that_is_killed_at_the_limit_is_told(folder):
    with open_child(40 * MIB) as child:
        if not child.is_limited:
            assert child.note.startswith("page cache not limited: ")
            pytest.skip(child.note)
        child.load(settings(folder).job("mmap"))
        assert child.note == "ended with -9, killed: most likely out of memory"


V1 = "35 31 0:32 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory\n"
V2 = "30 23 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n"
NAMELESS = "63 43 0:39 / /tmp/x rw,relatime - tmpfs  rw\n"  # mount -t tmpfs "" /tmp/x
PARTS = "40 31 0:32 /docker/abc /sys/fs/cgroup/memory ro - cgroup cgroup rw,memory\n"


@pytest.mark.parametrize(
    ("groups", "mounts", "expected"),
    [
        ("4:memory:/a/b\n0::/\n", V1 + V2, ("/sys/fs/cgroup/memory/a/b", 1)),
        ("3:cpu:/\n0::/user.slice/x\n", V2, ("/sys/fs/cgroup/user.slice/x", 2)),
        ("4:cpu,memory:/docker/abc\n", PARTS, ("/sys/fs/cgroup/memory", 1)),
        ("4:memory:/elsewhere\n", PARTS, None),
        ("0::/x\n", NAMELESS + V2, ("/sys/fs/cgroup/x", 2)),
        ("4:memory:/a\n", V2, None),
        ("1:cpu:/\n", V1, None),
    ],
)
def test_the_group_of_a_process_is_found(groups, mounts, expected):
    found = find_place(groups, mounts)
    assert found == (None if expected is None else (Path(expected[0]), expected[1]))


# all together


def command(capsys, *arguments) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as caught:
        main(["bench-offload", *map(str, arguments)])
    out, err = capsys.readouterr()
    return caught.value.code or 0, out, err


def test_a_run_that_skips_all_tells_so(capsys, folder):
    skip = [word for name in CONTENDERS for word in ("--skip", name)]
    code, out, _ = command(capsys, folder / "model", "--work", folder, *skip)
    report = json.loads(out.splitlines()[-1])
    assert code == 0
    assert report["rows"] == {name: {"note": "skipped"} for name in CONTENDERS}
    assert (report["tokens_equal"], report["ratios"]) == (None, {})
    parts = [report[key] for key in ("expert_memory_bytes", "process_bytes", "headroom_bytes")]
    assert report["memory_limit_bytes"] == sum(parts)


def test_mistakes_give_one_line_and_exit_1(capsys, folder, tmp_path):
    write_random_model(tmp_path / "dense", DENSE, torch.bfloat16)
    config = replace(MOE, d_model=64, d_ff=128)
    write_random_model(tmp_path / "int8", config, torch.bfloat16, quantization="int8")
    for arguments, message in (
        ([tmp_path / "dense"], "is a dense model; it has no experts to offload"),
        ([tmp_path / "int8"], "has quantised experts, which only ours can run"),
        ([folder / "model", "--skip", "vllm"], "cannot skip 'vllm'"),
        ([folder / "model", "--expert-memory", "lots"], "'lots' is no size"),
        ([tmp_path / "nowhere"], "does not exist"),
    ):
        code, out, err = command(capsys, *arguments, "--work", tmp_path)
        assert (code, out) == (1, "")
        assert message in err
        assert err.count("\n") == 1


@pytest.mark.slow  # starts six processes
def test_all_contenders_run(capsys, folder):
    report = run_bench(settings(folder))
    print_report(report)
    out, err = capsys.readouterr()
    assert json.loads(out.splitlines()[-1]) == report
    assert f"text {NUM_TEXTS} of {NUM_TEXTS}" in err
    assert report["tokens_equal"] is True
    assert len(report["ratios"]) == 4
    assert min(report["ratios"].values()) > 0
    assert report["disk_gb_per_s"]["median"] > 0
    for name, row in report["rows"].items():
        assert row["decode_tokens_per_s"]["median"] > 0
        if name != "resident":
            limited = row["memory_limit_bytes"] == report["memory_limit_bytes"]
            assert limited or row["note"].startswith("page cache not limited: ")
            assert not limited or row["peak_group_bytes"] <= report["memory_limit_bytes"]
    assert not any(path.name.endswith(".partial") for path in folder.iterdir())
