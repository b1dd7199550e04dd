import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from engine.checkpoint import save_model
from engine.random_model import write_random_model
from offload.trace import load_trace
from server.__main__ import main
from tests.cpm2_files import write_rank_files
from tests.tiny import DENSE, MOE, tiny_model


@pytest.fixture
def model_dir(tmp_path) -> Path:
    path = tmp_path / "model"
    save_model(tiny_model(seed=4), path)
    return path


def run(capsys, *arguments) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of the command."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return caught.value.code or 0, out, err


def test_generate_prints_the_same_text_for_the_same_seed(capsys, model_dir):
    options = ["--max-tokens", 12, "--temperature", 1.5, "--seed", 3]
    code, out, err = run(capsys, "generate", model_dir, "hello", *options)
    assert (code, out) == run(capsys, "generate", model_dir, "hello", *options)[:2]
    assert code == 0
    assert out.strip()
    assert err.startswith("memory: process ")
    assert err.endswith("; all 16 experts are resident\n")
    assert err.count("\n") == 1


def test_generate_reads_standard_input(capsys, model_dir, monkeypatch, tmp_path):
    (tmp_path / "text").write_text("hello")
    with (tmp_path / "text").open() as file:
        monkeypatch.setattr("sys.stdin", file)
        piped = run(capsys, "generate", model_dir, "-", "--seed", 1, "--temperature", 1)
    given = run(capsys, "generate", model_dir, "hello", "--seed", 1, "--temperature", 1)
    assert piped[:2] == given[:2]


def test_fill_prints_a_line_for_each_blank(capsys, model_dir):
    for seed in range(20):
        options = ["--fill", "--temperature", 2, "--seed", seed, "--max-tokens", 60]
        code, out, _ = run(capsys, "generate", model_dir, "a <span> b <span> c", *options)
        assert code == 0
        if out.count("\n") >= 2:  # both blanks were reached
            return
    raise AssertionError("no seed reached the second blank")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max-tokens", 0], "max_tokens is 0"),
        (["--temperature", "nan"], "temperature is nan"),
        (["--fill"], "holds 0 blanks"),
    ],
)
def test_bad_options_give_one_line_and_exit_1(capsys, model_dir, arguments, message):
    code, out, err = run(capsys, "generate", model_dir, "hello", *arguments)
    assert (code, out) == (1, "")
    assert err.startswith("infmoe: error: ")
    assert message in err
    assert err.count("\n") == 1


def test_a_wrong_dtype_is_wrong_usage(capsys, model_dir):
    assert run(capsys, "generate", model_dir, "hello", "--dtype", "int3")[0] == 2


def test_a_trace_that_cannot_be_written_is_refused_before_anything_is_loaded(capsys, model_dir):
    trace = model_dir / "none" / "trace.npz"
    code, out, err = run(capsys, "generate", model_dir, "hello", "--record-routing", trace)
    assert (code, out) == (1, "")
    assert "the routing cannot be written there" in err


def test_beams_find_an_answer_and_do_not_fill_blanks(capsys, model_dir):
    code, out, _ = run(capsys, "generate", model_dir, "hello", "--beams", 3, "--max-tokens", 6)
    assert code == 0
    assert out == run(capsys, "generate", model_dir, "hello", "--beams", 3, "--max-tokens", 6)[1]
    options = ["--fill", "--beams", 3]
    code, _, err = run(capsys, "generate", model_dir, "a <span>", *options)
    assert code == 1
    assert "does not fill blanks" in err


def test_the_routing_of_a_text_is_recorded(capsys, model_dir, tmp_path):
    trace = tmp_path / "trace.npz"
    options = ["--max-tokens", 5, "--temperature", 1.5, "--seed", 3]
    plain = run(capsys, "generate", model_dir, "hello", *options)
    options += ["--record-routing", trace]
    assert run(capsys, "generate", model_dir, "hello", *options)[:2] == plain[:2]
    recorded = load_trace(trace)
    assert recorded.layers == tuple(MOE.moe_layers())
    assert len(recorded.steps) >= 4  # the sweep, and a step or more


def test_offloading_gives_the_same_text_and_tells_what_it_cost(capsys, tmp_path):
    """Sizes of this process vary by some MiB from one run to the next; half of the experts do."""
    model = tmp_path / "wide"
    wide = replace(MOE, d_model=256, d_ff=1024, num_experts=8)  # 32 experts of 1.5 MiB
    write_random_model(model, wide, torch.bfloat16)
    options = ["--max-tokens", 12, "--temperature", 1.5, "--seed", 3]
    _, expected, _ = run(capsys, "generate", model, "hello", *options)
    code, out, refused = run(capsys, "generate", model, "hello", *options, "--memory", "8KB")
    assert (code, out) == (1, "")
    assert refused.startswith("infmoe: error: memory of 8,000 bytes (7.8 KiB) is too small; needed")
    least = int(re.search(r"give (\d+) bytes or more", refused)[1])
    options += ["--memory", least + 20 * 2**20]
    code, out, err = run(capsys, "generate", model, "hello", *options)
    assert (code, out) == (0, expected)
    plan, counts = err.splitlines()
    assert re.search(r"; \d+ slots for 32 experts: \d+ pinned, ", plan)
    assert re.match(r"experts: \d+ slots for 32 .* [1-9]\d* misses", counts)


def test_a_budget_beyond_the_machine_is_refused_in_one_line(capsys, model_dir):
    code, _, err = run(capsys, "generate", model_dir, "hello", "--memory", "9000TiB")
    assert (code, err.count("\n")) == (1, 1)
    assert "is more than the " in err
    if not torch.cuda.is_available():
        code, _, err = run(capsys, "generate", model_dir, "hello", "--gpu-memory", "1GiB")
        assert (code, err.count("\n")) == (1, 1)
        assert "a GPU budget is given, but torch finds no NVIDIA GPU" in err


def test_tokenize_shows_ids_and_pieces(capsys, model_dir):
    assert run(capsys, "tokenize", model_dir, "hi") == (0, "107\t'h'\n108\t'i'\n", "")


def test_inspect_tells_what_is_there(capsys, model_dir):
    code, out, _ = run(capsys, "inspect", model_dir, "--json")
    facts = json.loads(out)
    assert (code, facts["kind"], facts["config"]["num_experts"]) == (0, "native", 4)
    code, out, _ = run(capsys, "inspect", model_dir)
    assert "experts-encoder-0.safetensors" in out
    assert f"{facts['parameters']['total']:,}" in out


def test_convert_narrows_and_generate_takes_the_result(capsys, model_dir, tmp_path):
    half = tmp_path / "half"
    assert run(capsys, "convert", model_dir, half, "--dtype", "bf16") == (0, f"{half}\n", "")
    facts = json.loads(run(capsys, "inspect", half, "--json")[1])
    assert facts["dtype"] == "bfloat16"
    assert run(capsys, "generate", half, "hello", "--max-tokens", 3)[0] == 0


def test_bench_ends_in_one_json_line(capsys, model_dir):
    code, out, _ = run(capsys, "bench", model_dir, "--source-tokens", 8, "--decode-tokens", 4)
    report = json.loads(out.splitlines()[-1])
    assert code == 0
    assert report["tokens_equal"] is True
    assert report["share_of_memory_limit"] > 0
    inner, one = 4 * 8, 32 + 3 * 32 * 48
    attention = 4 * 32 * inner + 2 * 32 * inner  # all of self-attention; query and out of cross-
    layer = 2 * 32 + attention + 4 * 32 + 32 + one  # norms, attentions, centroids, router norm
    final = 32 + 32 * 4  # norm, relative bias
    assert report["active_decoder_bytes"] == 4 * (2 * (layer - 32) + final + 384 * 32)


def test_bench_of_offloaded_experts_tells_what_the_disk_did(capsys, model_dir):
    options = ["--source-tokens", 8, "--decode-tokens", 4, "--expert-memory", "100KB"]
    code, out, _ = run(capsys, "bench", model_dir, *options)
    report = json.loads(out.splitlines()[-1])
    assert code == 0
    assert report["tokens_equal"] is True
    assert (report["expert_slots"], report["experts"], report["pinned"]) == (4, 16, 0)
    assert 0 <= report["hit_rate"]["median"] < 1
    assert report["share_of_disk_limit"]["median"] > 0
    assert report["read_bytes_per_token"] % 1 == 0


def truncate(directory: Path) -> None:
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def truncate_experts(directory: Path) -> None:
    path = directory / "experts-decoder-1.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def flip_a_bit(directory: Path) -> None:
    path = directory / "experts-encoder-1.safetensors"
    data = bytearray(path.read_bytes())
    data[-5000] ^= 1
    path.write_bytes(data)


def lose_a_layer(directory: Path) -> None:
    (directory / "experts-encoder-1.safetensors").unlink()


def change_the_width(directory: Path) -> None:
    path = directory / "config.json"
    path.write_text(path.read_text().replace('"d_ff": 48', '"d_ff": 64'))


def empty(directory: Path) -> None:
    shutil.rmtree(directory)
    directory.mkdir()


def remove(directory: Path) -> None:
    shutil.rmtree(directory)


def lose_the_vocabulary(directory: Path) -> None:
    path = directory / "config.json"
    path.write_text(path.read_text().replace('"bytes"', '"cpm2_zh"'))


def lose_an_id(directory: Path) -> None:
    path = directory / "config.json"
    path.write_text(
        path.read_text().replace('"continuation_sentinel": 0', '"continuation_sentinel": 125')
    )


DAMAGES = [
    (truncate, "model.safetensors"),
    (truncate_experts, "experts-decoder-1.safetensors"),
    (flip_a_bit, "experts-encoder-1.safetensors"),
    (lose_a_layer, "experts-encoder-1.safetensors"),
    (change_the_width, "the config tells of"),
    (empty, "is empty"),
    (remove, "model"),
    (lose_the_vocabulary, "vocab.txt"),
    (lose_an_id, "there is no sentinel 125"),
]


@pytest.mark.parametrize(("damage", "named"), DAMAGES, ids=[d.__name__ for d, _ in DAMAGES])
def test_a_damaged_model_gives_one_line_and_exit_1(capsys, model_dir, damage, named):
    damage(model_dir)
    code, out, err = run(capsys, "generate", model_dir, "hello")
    assert (code, out) == (1, "")
    *plan, error = err.splitlines()
    assert error.startswith("infmoe: error: ")
    assert named in error
    assert [line.partition(" ")[0] for line in plan] in ([], ["memory:"])


def test_the_tiny_config_is_what_the_tests_think(model_dir):
    assert json.loads((model_dir / "config.json").read_text())["d_model"] == MOE.d_model


class Attack:
    """Unpickled without restriction, this creates a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return Path.touch, (self.target,)


def test_converting_a_malicious_checkpoint_gives_one_line_and_runs_nothing(capsys, tmp_path):
    source, target = tmp_path / "cpm2", tmp_path / "pwned"
    (source / "7").mkdir(parents=True)
    (source / "latest_checkpointed_iteration.txt").write_text("7")
    torch.save({"module": Attack(target)}, source / "7" / "mp_rank_00_model_states.pt")
    code, out, err = run(capsys, "convert", source, tmp_path / "out")
    assert (code, out) == (1, "")
    assert "mp_rank_00_model_states.pt: refused" in err
    assert err.count("\n") == 1
    assert not target.exists()
    assert not (tmp_path / "out").exists()


def test_converting_with_a_vocabulary_of_the_wrong_size_names_both_sizes(capsys, tmp_path):
    config = replace(DENSE, vocab_size=128, tokenizer="cpm2_zh", eos_token_ids=(7,))
    write_rank_files(tiny_model(config), tmp_path / "cpm2", 2)
    marks = ["<unk>", "<s>", "</s>", "\u2583", "<sep>", "<pad>", "<mask>", "<eod>", "\u2582"]
    vocabulary = [*marks, *(f"<s_{i}>" for i in range(20))]
    (tmp_path / "vocab.txt").write_text("\n".join(vocabulary), encoding="utf-8")
    arguments = ["convert", tmp_path / "cpm2", tmp_path / "out", "--vocab", tmp_path / "vocab.txt"]
    code, _, err = run(capsys, *arguments)
    assert code == 1
    assert "29" in err
    assert "128" in err
    assert err.count("\n") == 1


def scored(out):
    return [json.loads(line) for line in out.splitlines()]


def test_score_tells_how_likely_each_choice_is(capsys, model_dir):
    options = ["--choice", "x", "--choice", "yes"]
    code, out, err = run(capsys, "score", model_dir, "hello", *options)
    assert (code, err) == (0, "")
    (report,) = scored(out)
    means = [entry["mean"] for entry in report["scores"]]
    assert [entry["choice"] for entry in report["scores"]] == ["x", "yes"]
    assert report["best"] == means.index(max(means))
    assert report["scores"][1]["total"] == pytest.approx(3 * means[1], abs=1e-3)
    _, by_sum, _ = run(capsys, "score", model_dir, "hello", *options, "--by", "total")
    totals = [entry["total"] for entry in scored(by_sum)[0]["scores"]]
    assert scored(by_sum)[0]["best"] == totals.index(max(totals))


def test_score_counts_right_answers_of_a_file(capsys, model_dir, tmp_path):
    lines = [
        {"text": "a <span> b", "choices": ["x", "yy", "zzz"], "answer": 1},
        {"text": "hello", "choices": ["x", "\u4f60"]},
    ]
    file = tmp_path / "data.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    code, out, err = run(capsys, "score", model_dir, "--data", file)
    assert code == 0
    first, second = scored(out)
    assert first["right"] == (first["best"] == 1)
    assert "right" not in second
    assert err == f"right: {int(first['right'])} of 1 ({float(first['right']):.1%})\n"


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("", "holds no line"),
        ("[]", 'line 1: expected {"text"'),
        ('{"text": "a", "choices": ["b"], "label": 1}', "line 1: unknown field 'label'"),
        ('{"text": "a", "choices": "b"}', "line 1: choices is no list of texts"),
        ('{"text": "a", "choices": ["b"], "answer": 1}', "line 1: answer is 1"),
        ('{"text": "a", "choices": []}', "give at least one choice"),
        ("{", "line 1: "),
    ],
)
def test_bad_data_to_score_is_told(capsys, model_dir, tmp_path, line, reason):
    file = tmp_path / "data.jsonl"
    file.write_text(line)
    code, out, err = run(capsys, "score", model_dir, "--data", file)
    assert (code, out) == (1, "")
    assert reason in err


def test_score_needs_a_text_or_a_file(capsys, model_dir):
    assert run(capsys, "score", model_dir)[0] == 2
