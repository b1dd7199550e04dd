import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from engine.bench_gpu import (
    DTYPE,
    REPEATS,
    TINY,
    Rates,
    Round,
    Settings,
    SharedBank,
    plan_bench,
    random_blobs,
    run_bench,
    summarize,
)
from engine.checkpoint_experts import expert_layout, float_tensors
from engine.errors import ConfigError
from offload.bank import HostBank
from offload.pipeline import PipelineStats
from offload.planner import plan_experts
from offload.slots import Key
from server.__main__ import main
from tests.tiny import DENSE

SETTINGS = Settings(
    config=TINY, quantization="none", device="host", tokens=3, batch=4, source_tokens=9
)
WITHOUT_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


@pytest.mark.parametrize("quantization", ["none", "int8", "int4"])
def test_all_phases_are_measured_within_few_slots(quantization):
    settings = replace(SETTINGS, quantization=quantization)
    slot_bytes = expert_layout(TINY, DTYPE, quantization).blob_bytes
    plan = plan_experts(
        slot_bytes, TINY.moe_layers(), TINY.num_experts, 6 * slot_bytes, 3 * slot_bytes
    )
    told = []
    report = run_bench(settings, plan, told.append)
    assert (report["slots"], report["pinned"], report["in_host_memory"]) == (6, 2, 3)
    assert report["sharing_memory"] == 16 - 2 - 3
    assert report["fallbacks"] == []
    assert "timing encode" in told
    for name, passes, tokens in (("decode_1", 3, 1), ("decode_4", 3, 4), ("encode", 1, 36)):
        phase = report[name]
        assert (phase["passes"], phase["tokens_per_pass"]) == (passes, tokens)
        assert phase["tokens_per_s"]["min"] > 0
        assert 0 <= phase["hit_rate"]["median"] < 1
        assert phase["share_of_roofline"]["median"] >= 0
        assert phase["copied_bytes_per_pass"] % 1 == 0
    assert report["encode"]["copied_bytes_per_pass"] > 0
    json.dumps(report)


def test_a_round_is_held_against_the_longer_of_copying_and_computing():
    stats = PipelineStats(hits=6, misses=2, copied_bytes=2000)
    rounds = [Round(2, 4, seconds, stats) for seconds in (1.0, 2.0, 4.0)]
    copying = summarize(rounds, 1000, 500, Rates(link=1000.0, memory=9000.0))
    assert copying["share_of_roofline"] == {"median": 1.0, "min": 0.5, "max": 2.0}
    computing = summarize(rounds, 1000, 500, Rates(link=2000.0, memory=4500.0))
    assert computing["share_of_roofline"]["median"] == 1.0  # 8 experts and 2 * 500 dense bytes
    assert computing["tokens_per_s"] == {"median": 4.0, "min": 2.0, "max": 8.0}
    assert computing["ms_per_pass"]["median"] == 1000
    assert computing["hit_rate"]["median"] == 0.75
    assert computing["copied_bytes_per_pass"] == 1000


def test_experts_without_a_row_of_their_own_share_the_blobs():
    rows = np.arange(8, dtype=np.uint8).reshape(2, 4)
    blobs = rows + 100
    bank = SharedBank(HostBank(rows, [Key("a", 0), Key("a", 1)]), blobs)
    assert (bank.get(Key("a", 1)) == rows[1]).all()
    assert (bank.get(Key("b", 3)) == blobs[1]).all()
    alone = SharedBank(None, blobs)
    assert (alone.get(Key("a", 0)) == blobs[0]).all()
    assert (len(bank), len(alone)) == (4, 2)


@pytest.mark.parametrize("quantization", ["none", "int8", "int4"])
def test_the_blobs_are_experts_of_usual_sizes_and_differ(quantization):
    layout = expert_layout(TINY, DTYPE, quantization)
    blobs = random_blobs(TINY, layout)
    assert not (blobs[0] == blobs[1]).all()
    tensors = float_tensors(blobs[1], layout)
    assert (tensors["norm"] == 1).all()
    assert tensors["wi_0"].float().std() == pytest.approx(TINY.d_model**-0.5, rel=0.1)


def test_the_command_plans_by_budgets_and_ends_with_a_line_of_json(capsys):
    small = ["--tokens", "2", "--batch", "2", "--source-tokens", "5"]
    with pytest.raises(SystemExit) as ended:
        main(["bench-gpu", "--preset", "tiny", "--device", "host", "--experts", "int8", *small])
    assert ended.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    report = json.loads(lines[-1])
    assert (report["experts"], report["repeats"], report["pinned"]) == ("int8", REPEATS, 16)
    assert report["decode_2"]["hit_rate"]["median"] == 1
    assert any(line.startswith("decode_2 ") for line in lines)


def test_wishes_that_cannot_be_met_are_refused():
    with pytest.raises(ConfigError, match="the model is dense"):
        plan_bench(replace(SETTINGS, config=DENSE), None, None)
    with pytest.raises(ConfigError, match="too small"):
        plan_bench(SETTINGS, 1000, None)
    with pytest.raises(ConfigError, match="--gpu-memory is for --device cuda"):
        plan_bench(SETTINGS, None, 2**30)


@WITHOUT_GPU
def test_without_a_gpu_the_command_says_so(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["bench-gpu", "--preset", "tiny"])
    assert ended.value.code == 1
    assert "--device cuda cannot be: torch finds no NVIDIA GPU" in capsys.readouterr().err
