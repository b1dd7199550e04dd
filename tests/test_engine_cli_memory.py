import json
import re

import pytest
import torch

from engine.checkpoint import save_model
from engine.planning import plan_from_json
from engine.random_model import write_random_model
from server.__main__ import main
from tests.tiny import DENSE, MOE, tiny_model

GIVEN = ["--disk", "3GB/s", "--dram", "200GB/s", "--link", "50GB/s", "--hbm", "2800GB/s"]
BIG = ["cpm2-moe-198b", "--dtype", "int4", "--gpu-memory", "64GiB", "--memory", "112GiB"]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache/infmoe"


@pytest.fixture
def model_dir(tmp_path):
    save_model(tiny_model(seed=4), tmp_path / "model")
    return tmp_path / "model"


def run(capsys, *arguments) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `infmoe plan`."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        main(["plan", *map(str, arguments)])
    out, err = capsys.readouterr()
    return caught.value.code or 0, out, err


def values_of(capsys, *arguments) -> dict:
    code, out, err = run(capsys, *arguments, "--json")
    assert (code, err, out.count("\n")) == (0, "", 1)
    return json.loads(out)


def test_a_plan_for_a_machine_that_one_does_not_have(capsys):
    """Of 805 slots 8 are for the sweep; the others hold the decoder (768) and 29 of the encoder.

    The sweep moves the other 739 of the encoder over the link: 46.0 GiB at 50 GB/s.
    """
    code, out, err = run(capsys, *BIG, *GIVEN, "--batch", "1")
    assert (code, err) == (0, "")
    lines = dict(re.findall(r"^ {0,2}(\S.*?)(?: {2,})(.*)$", out, re.M))
    assert out.startswith("cpm2-moe-198b: 1536 experts of 63.8 MiB (int4), the rest bfloat16\n")
    assert lines["pinned in slots"].split()[:2] == ["768", "29"]
    assert lines["slots for decoding"].split()[:2] == ["0", "0"]
    assert lines["slots for the sweep"].split()[:2] == ["0", "8"]
    assert lines["in host memory"].split()[:2] == ["0", "739"]
    assert lines["only on disk"].split() == ["0", "0", "0", "B"]
    assert lines["GPU context"] == "640.0 MiB  assumed"
    assert lines["the link to the GPU"] == "50.00 GB/s  given"
    assert "\nmemory\n" in out
    assert "\nGPU memory\n" in out
    assert re.search(r"in all +64\.0 GiB  of 64\.0 GiB", out)
    assert re.search(r"^batch 1 +330 tokens/s, bound by the memory bandwidth of the GPU", out, re.M)
    assert re.search(r"^sweep of 2048 0\.988 to 1\.01 s, bound by the link to", out, re.M)
    _, out, _ = run(capsys, *BIG, *GIVEN, "--gpu-memory", "40GiB")
    assert re.search(r"^batch 1 +\d+\.\d to \d+ tokens/s, bound by the link to the", out, re.M)


def test_json_holds_the_plan_and_what_the_simulator_reads(capsys):
    values = values_of(capsys, *BIG, *GIVEN, "--batch", "1")
    plan = plan_from_json(values)
    assert plan.num_experts == 1536
    assert values["experts"]["pinned"] == {"decoder": 768, "encoder": len(plan.pinned) - 768}
    assert values["experts"]["sweep"] == {"encoder": plan.num_sweep}
    assert values["bandwidths"]["disk"] == {"bytes_per_s": 3e9, "origin": "given"}
    assert values["budget_bytes"] == {"host": 112 * 2**30, "gpu": 64 * 2**30}
    assert all(values["planned_bytes"][k] <= size for k, size in values["budget_bytes"].items())
    (prediction,) = values["predictions"]
    for name in ("step", "sweep"):
        assert prediction[name]["tier_bytes"].keys() == {"disk", "link", "hbm"}
        assert prediction[name]["wanted_experts"] > 0
    low, high = prediction["tokens_per_s"]
    assert 0 < low <= high


def test_batches_are_predicted_beside_a_single_row(capsys):
    short = ["--source-tokens", 128, "--target-tokens", 64]
    values = values_of(capsys, *BIG, *GIVEN, "--batch", 64, *short)
    assert [prediction["rows"] for prediction in values["predictions"]] == [1, 64]
    assert (values["rows"], values["source_tokens"], values["target_tokens"]) == (64, 128, 64)
    _, out, _ = run(capsys, *BIG, *GIVEN, "--batch", 64, *short)
    assert re.search(r"^batch 64 ", out, re.M)
    assert re.search(r"^sweep of 8192 ", out, re.M)


def test_a_directory_is_planned_as_serve_would(capsys, model_dir, cache):
    code, out, _ = run(capsys, model_dir)
    assert code == 0
    assert f"{model_dir}: 16 experts of 20.0 KiB (float32), the rest float32" in out
    assert "all fit: all are resident" in out
    assert re.search(r"^the disk +[\d,.]+ GB/s  measured now, (direct|buffered) reads", out, re.M)
    assert re.search(r"^the memory bandwidth +[\d,.]+ GB/s  measured now, sum of an", out, re.M)
    assert len(list(cache.iterdir())) == 1
    assert "measured earlier, " in run(capsys, model_dir)[1]
    assert "measured now, " in run(capsys, model_dir, "--measure")[1]


def test_a_directory_in_little_memory(capsys, tmp_path):
    path = tmp_path / "int8"
    write_random_model(path, MOE, torch.bfloat16, quantization="int8")
    code, _, err = run(capsys, path, "--memory", 1000)
    assert code == 1
    assert err.startswith("infmoe: error: memory of 1,000 bytes (1000 B) is too small; needed at")
    assert err.count("\n") == 1


def test_a_dense_model(capsys, tmp_path):
    save_model(tiny_model(DENSE), tmp_path / "dense")
    code, out, _ = run(capsys, tmp_path / "dense", "--dram", "10GB/s")
    assert (code, "slots" in out) == (0, False)
    assert out.startswith(f"{tmp_path / 'dense'}: dense, float32\n")
    assert values_of(capsys, tmp_path / "dense", "--dram", "10GB/s")["expert_plan"] is None


def test_bandwidths_that_are_not_known_are_asked_for(capsys):
    _, out, _ = run(capsys, "cpm2-moe-198b", "--memory", "40GiB", "--dram", "30GB/s")
    assert re.search(r"^batch 1 +not known: give --disk$", out, re.M)
    assert re.search(r"^sweep of 2048 not known: give --disk$", out, re.M)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["cpm3"], "no preset; presets: cpm2-11b, cpm2-moe-198b"),
        (["cpm2-11b", "--dtype", "int8"], "the model is dense"),
        (["cpm2-11b", "--memory", "much"], "'much' is no size in bytes"),
        (["cpm2-11b", "--memory", "99GiB", "--disk", "fast"], "'fast' is no bandwidth"),
        ([*BIG, "--batch", "64"], "GPU memory of 68,719,476,736 bytes (64.0 GiB) is too small"),
    ],
)
def test_what_cannot_be_planned_gives_one_line(capsys, arguments, message):
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (1, "")
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("option", [["--batch", "0"], ["--dtype", "int3"]])
def test_wrong_usage(capsys, option):
    assert run(capsys, "cpm2-11b", *option)[0] == 2


def test_without_a_batch_the_plan_is_the_server_s(capsys):
    """All rows where everything fits beside them, fewer where they would cost slots."""
    small = values_of(capsys, "cpm2-moe-198b", "--dtype", "int4", "--memory", "2TiB", *GIVEN)
    assert (small["resident"], small["rows"]) == (True, 32)
    big = values_of(capsys, *BIG, *GIVEN)
    assert not big["resident"]
    assert big["rows"] == 2  # of 2,048 + 2,050 tokens each
