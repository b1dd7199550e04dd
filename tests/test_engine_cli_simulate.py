import json
import math
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from engine.cli_simulate import progress
from offload.trace import load_trace, save_trace
from offload.trace_kinds import Texts, generate_trace
from server.__main__ import main

FAST = ["--texts", 2, "--steps", 3, "--source-tokens", 4]
LAYERS = tuple(f"{stack}-{i}" for stack in ("encoder", "decoder") for i in range(24))
TEXTS = Texts(layers=LAYERS, experts_per_layer=32, texts=2, steps=3, source_tokens=4)
POLICIES = ["pinned+lru", "pinned+lru", "lru", "lru", "pinned", "pinned", "belady"]


def run(capsys, *arguments) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of the command."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return caught.value.code or 0, out, err


def make_plan(capsys, path: Path, *options) -> Path:
    """What `infmoe plan --json` prints for the large preset."""
    speeds = ["--disk", "1GB/s", "--dram", "29GB/s", "--link", "50GB/s", "--hbm", "2800GB/s"]
    wishes = ["--dtype", "int4", "--source-tokens", 512, "--target-tokens", 512]
    code, out, err = run(capsys, "plan", "cpm2-moe-198b", *wishes, *speeds, *options, "--json")
    assert code == 0, err
    path.write_text(out)
    return path


@pytest.fixture
def cpu_plan(capsys, tmp_path) -> Path:
    return make_plan(capsys, tmp_path / "cpu.json", "--memory", "24GiB", "--batch", "1")


@pytest.fixture
def gpu_plan(capsys, tmp_path) -> Path:
    options = ["--memory", "128GiB", "--gpu-memory", "60GiB"]
    return make_plan(capsys, tmp_path / "gpu.json", *options)


def simulate(capsys, plan, *options, trace="uniform") -> dict:
    """The JSON object of a run that works."""
    code, out, err = run(capsys, "simulate", "--trace", trace, "--plan", plan, *options)
    assert code == 0, err
    return json.loads(out.splitlines()[-1])


def refusal(capsys, plan, *options, trace="uniform") -> str:
    """The one line of a run that is refused."""
    code, out, err = run(capsys, "simulate", "--trace", trace, "--plan", plan, *options)
    assert (code, out) == (1, "")
    assert err.startswith("infmoe: error: ")
    assert err.count("\n") == 1
    return err


def test_a_table_and_a_last_line_of_json(capsys, cpu_plan):
    code, out, err = run(capsys, "simulate", "--trace", "uniform", "--plan", cpu_plan, *FAST)
    assert (code, err) == (0, "")
    *lines, last = out.splitlines()
    assert lines[0].split()[:3] == ["policy", "ahead", "pinned"]
    assert [line.split()[0] for line in lines[1:]] == POLICIES
    told = json.loads(last)
    assert [row["policy"] for row in told["policies"]] == POLICIES
    assert (told["layers"], told["experts_per_layer"]) == (48, 32)
    assert (told["computed_layers"], told["decode_tokens"]) == (2 * 24 * 4, 6)
    plan = json.loads(cpu_plan.read_text())["expert_plan"]
    first = told["policies"][0]
    slots = [first["pinned"], first["decode_slots"], first["sweep_slots"]]
    assert slots == [len(plan["pinned"]), plan["num_decode"], plan["num_sweep"]]
    assert first["tokens_per_s"] == pytest.approx(first["roofline_share"], rel=0.5)
    assert all(row["hit_rate"] <= told["policies"][-1]["hit_rate"] for row in told["policies"])


def test_json_alone_is_one_line(capsys, cpu_plan):
    code, out, _ = run(capsys, "simulate", "--trace", "zipf", "--plan", cpu_plan, *FAST, "--json")
    assert code == 0
    assert out.count("\n") == 1
    assert json.loads(out)["trace"] == "zipf"


def test_the_memory_roofline_is_bytes_over_bandwidth(capsys, cpu_plan):
    values = json.loads(cpu_plan.read_text())
    step = values["predictions"][-1]["step"]
    assert step["wanted_experts"] == pytest.approx(24)
    told = simulate(capsys, cpu_plan, *FAST)
    expected = 29e9 / step["tier_bytes"]["dram"]
    assert told["memory_roofline_tokens_per_s"] == pytest.approx(expected)
    faster = simulate(capsys, cpu_plan, *FAST, "--memory-bandwidth", "58GB/s", "--disk", "2GB/s")
    assert faster["disk_bytes_per_s"] == 2e9
    for row, other in zip(told["policies"], faster["policies"], strict=True):
        assert other["tokens_per_s"] == pytest.approx(2 * row["tokens_per_s"])


def test_a_file_gives_what_the_same_trace_made_up_gives(capsys, cpu_plan, tmp_path):
    path = tmp_path / "a.npz"
    save_trace(generate_trace("bursty", replace(TEXTS, batch=3, precision=0.5, seed=4)), path)
    options = [*FAST, "--batch", 3, "--precision", 0.5, "--seed", 4]
    made_up = simulate(capsys, cpu_plan, *options, trace="bursty")
    assert simulate(capsys, cpu_plan, trace=path)["policies"] == made_up["policies"]


def test_a_trace_without_guesses_is_replayed_without_lookahead(capsys, cpu_plan, tmp_path):
    path = tmp_path / "a.npz"
    save_trace(generate_trace("uniform", replace(TEXTS, batch=1, precision=0.0)), path)
    trace = load_trace(path)
    empty = replace(trace, guesses=trace.guesses[:0], guess_ends=trace.guess_ends * 0)
    save_trace(empty, path)
    policies = simulate(capsys, cpu_plan, trace=path)["policies"]
    assert [row.get("lookahead") for row in policies] == [False, False, False, None]


def test_steps_of_the_warm_up_do_not_count(capsys, cpu_plan):
    assert simulate(capsys, cpu_plan, *FAST, "--warm-up", 4)["decode_tokens"] == 3
    told = simulate(capsys, cpu_plan, *FAST, "--warm-up", 99)
    assert told["decode_tokens"] == 0
    assert told["memory_roofline_tokens_per_s"] is None
    assert all(row["tokens_per_s"] is None for row in told["policies"])


def test_with_a_gpu_what_waits_in_host_memory_comes_over_the_link(capsys, gpu_plan):
    told = simulate(capsys, gpu_plan, *FAST)
    assert told["link_bytes_per_s"] == 50e9
    assert {row.get("disk_bytes") for row in told["policies"][:-1]} == {0}
    assert all(row["link_bytes"] > 0 for row in told["policies"][:-1])
    slower = simulate(capsys, gpu_plan, *FAST, "--link", "5GB/s")
    assert slower["policies"][2]["sweep_s"] > 9 * told["policies"][2]["sweep_s"]


def test_experts_that_host_memory_has_no_room_for_are_read(capsys, tmp_path):
    options = ["--memory", "45GiB", "--gpu-memory", "60GiB"]
    plan = make_plan(capsys, tmp_path / "gpu.json", *options)
    pinned, lru = (simulate(capsys, plan, *FAST)["policies"][i] for i in (0, 2))
    assert pinned["disk_bytes"] < lru["disk_bytes"]


def test_the_table_is_drawn(capsys, cpu_plan, tmp_path):
    path = tmp_path / "a.png"
    code, _, err = run(
        capsys, "simulate", "--trace", "uniform", "--plan", cpu_plan, *FAST, "--plot", path
    )
    assert (code, err) == (0, f"drawn in {path}\n")
    assert path.read_bytes().startswith(b"\x89PNG")
    assert not list(tmp_path.glob("*.partial*"))


def test_without_matplotlib_the_extra_is_named(capsys, cpu_plan, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    message = refusal(capsys, cpu_plan, "--plot", tmp_path / "a.png")
    assert "infmoe[train]" in message


def test_a_trace_of_another_model_is_refused(capsys, cpu_plan, tmp_path):
    path = tmp_path / "a.npz"
    save_trace(generate_trace("uniform", replace(TEXTS, layers=LAYERS[:30])), path)
    message = refusal(capsys, cpu_plan, trace=path)
    assert f"{path}: the trace is of 30 layers (encoder-0 to decoder-5) of 32 experts" in message
    assert "the plan of 48 layers" in message


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b"(3,)", b"(3(,", "cannot be read"),  # brackets that never close
        (b"\x93NUMPY", b"\x93NUMPI", "layers is no array"),
    ],
)
def test_a_damaged_part_of_a_trace_is_told(capsys, cpu_plan, tmp_path, old, new, message):
    path = tmp_path / "a.npz"
    save_trace(generate_trace("uniform", replace(TEXTS, layers=LAYERS[:3])), path)
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in parts.items():
            archive.writestr(name, data.replace(old, new) if name == "layers.npy" else data)
    told = refusal(capsys, cpu_plan, trace=path)
    assert f"{path}: {message}" in told


def test_wishes_for_a_recorded_trace_are_refused(capsys, cpu_plan, tmp_path):
    message = refusal(capsys, cpu_plan, "--source-tokens", 3, trace=tmp_path / "a.npz")
    assert "--source-tokens is for traces that are made up: uniform, zipf, bursty" in message


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--steps", 0], "steps is 0; it must be at least 1"),
        (["--precision", 2], "precision is 2.0"),
        (["--disk", "fast"], "'fast' is no bandwidth"),
        (["--memory-bandwidth", "0"], "no bandwidth"),
        (["--link", "50GB/s"], "--link is given, but the plan is for a machine without a GPU"),
    ],
)
def test_impossible_wishes_are_refused(capsys, cpu_plan, options, message):
    assert message in refusal(capsys, cpu_plan, *options)


def test_a_missing_trace_and_a_missing_plan_are_told(capsys, cpu_plan, tmp_path):
    assert "no-such" in refusal(capsys, cpu_plan, trace=tmp_path / "no-such")
    assert "no-such" in refusal(capsys, tmp_path / "no-such.json")


def changed(values: dict, path: str, value: object) -> dict:
    """The same with the value at 'a/b' replaced, or removed if that is None."""
    *parents, last = path.split("/")
    inner = values
    for key in parents:
        inner = inner[key]
    if value is None:
        del inner[last]
    else:
        inner[last] = value
    return values


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("expert_plan", None, "there is no plan of experts"),
        ("expert_plan/pinned", [["decoder-0", 1]] * 2, "an expert is placed twice"),
        ("expert_plan/pinned", [["decoder-0", 32]], "or is not of the model"),
        ("expert_plan/slot_bytes", 0, "a size is below 1"),
        ("expert_plan/slot_bytes", math.inf, "is not what `infmoe plan --json` prints: Overflow"),
        ("expert_plan/num_decode", -1, "a number of slots below 0"),
        ("bandwidths/disk", False, "is not what `infmoe plan --json` prints"),
        ("bandwidths/disk", {}, "is not what `infmoe plan --json` prints: KeyError"),
        ("bandwidths", None, "is not what `infmoe plan --json` prints: KeyError"),
        ("predictions", [], "is not what `infmoe plan --json` prints: IndexError"),
        ("budget_bytes/host", None, "is not what `infmoe plan --json` prints: KeyError"),
    ],
)
def test_a_damaged_plan_is_refused(capsys, cpu_plan, path, value, message):
    values = changed(json.loads(cpu_plan.read_text()), path, value)
    cpu_plan.write_text(json.dumps(values))
    told = refusal(capsys, cpu_plan)
    assert str(cpu_plan) in told
    assert message in told


def test_a_prediction_below_its_experts_is_refused(capsys, cpu_plan):
    values = json.loads(cpu_plan.read_text())
    values["predictions"][-1]["step"]["tier_bytes"]["dram"] = 0
    cpu_plan.write_text(json.dumps(values))
    assert "a pass reads less than its experts" in refusal(capsys, cpu_plan)


def test_a_plan_without_a_slot_for_the_others_is_refused(capsys, cpu_plan):
    values = json.loads(cpu_plan.read_text())
    for name in ("num_decode", "num_sweep"):
        values["expert_plan"][name] = 0
    cpu_plan.write_text(json.dumps(values))
    assert "there is no slot for the experts that are not pinned" in refusal(capsys, cpu_plan)


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 100_000])
def test_what_is_no_plan_is_refused(capsys, tmp_path, text):
    path = tmp_path / "plan.json"
    path.write_text(text)
    assert str(path) in refusal(capsys, path)


@pytest.mark.parametrize(
    ("tier", "option"), [("disk", "--disk"), ("link", "--link"), ("hbm", "--memory-bandwidth")]
)
def test_a_bandwidth_that_is_not_known_must_be_given(capsys, gpu_plan, tier, option):
    values = json.loads(gpu_plan.read_text())
    values["bandwidths"][tier] = None
    gpu_plan.write_text(json.dumps(values))
    assert f"bandwidth is not known: give {option}" in refusal(capsys, gpu_plan, *FAST)
    assert simulate(capsys, gpu_plan, *FAST, option, "7GB/s")["policies"]


def test_progress_is_a_line_now_and_then_in_a_log(capsys):
    with progress(every_s=0) as report:
        report(1000, 5000)
        report(2000, 5000)
    with progress() as report:
        report(3000, 5000)
    assert capsys.readouterr().err.splitlines() == [
        "simulated 1,000 of 5,000 layers",
        "simulated 2,000 of 5,000 layers",
    ]
