import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from engine.checkpoint import load_model
from engine.errors import CheckpointError, ConfigError, TokenizerError
from engine.model.initial import initialize
from engine.model.moe import assign_greedy
from engine.model.transformer import Transformer
from server.__main__ import main
from tests.training_recipes import tiny_recipe
from training.evaluate import FillReport, evaluate_fill, unigram_log_probs
from training.loop import open_data, train, train_step
from training.optimizers import build_optimizer, learning_rate
from training.progress import PrepareProgress, TrainProgress
from training.recipe import TrainRecipe, read_recipe
from training.run_lock import LOCK, locked
from training.span_corruption import IGNORED
from training.state import load_state, save_state

ROOT = Path(__file__).parents[1]
SENTENCES = ["the cat sat on the mat", "a dog ran in the park", "the sun is warm today"]


@pytest.fixture
def recipe_file(tmp_path):
    for part in ("train", "valid"):
        lines = [f"{SENTENCES[i % 3]} and {SENTENCES[(i + 1) % 3]}" for i in range(30)]
        (tmp_path / f"{part}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    path = tmp_path / "recipe.toml"
    path.write_text(
        """
[model]
vocab_size = 384
d_model = 16
d_ff = 24
d_kv = 8
num_heads = 2
num_encoder_layers = 1
num_decoder_layers = 1
num_experts = 2
tokenizer = "bytes"
pad_token_id = 0
decoder_start_token_id = 0
eos_token_ids = [1]

[data]
tokenizer = "."
source_length = 48
target_length = 24
window = 48
mean_span = 3
continuation_share = 0.2
[[data.sources]]
train = "train.txt"
valid = "valid.txt"

[train]
steps = 6
rows = 2
accumulation = 2
learning_rate = 3e-3
precision = "fp32"
balanced_until = 0.5
eval_every = 3
eval_batches = 2
checkpoint_every = 2
""",
        encoding="utf-8",
    )
    return path


def losses(run: Path) -> list[dict]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


class Killed(Exception):
    pass


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
@pytest.mark.parametrize("cut", [1, 3, 4])
def test_a_resumed_run_equals_the_uninterrupted_one(recipe_file, tmp_path, optimizer, cut):
    recipe = read_recipe(recipe_file)
    recipe = replace(recipe, train=replace(recipe.train, optimizer=optimizer))
    data = open_data(recipe)
    whole = train(recipe, tmp_path / "whole", data)

    def kill(row):
        if row["step"] == cut:
            raise Killed

    with pytest.raises(Killed):
        train(recipe, tmp_path / "cut", data, kill)
    resumed = train(recipe, tmp_path / "cut", data)
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    assert [row["step"] for row in losses(tmp_path / "cut")] == [1, 2, 3, 4, 5, 6]
    for a, b in zip(resumed.parameters(), whole.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_torn_line_of_metrics_does_not_stop_a_resumed_run(recipe_file, tmp_path):
    recipe = read_recipe(recipe_file)
    data = open_data(recipe)
    train(recipe, tmp_path / "run", data)
    whole = losses(tmp_path / "run")
    path = tmp_path / "run" / "metrics.jsonl"
    for torn in ('{"step": 7, "lo', ""):
        path.write_text(path.read_text() + torn)
        train(recipe, tmp_path / "run", data)
        assert losses(tmp_path / "run") == whole
    assert not path.with_name("metrics.jsonl.partial").exists()


def test_a_gradient_that_is_no_number_is_never_saved(recipe_file, tmp_path, monkeypatch):
    """Clipping by an infinite norm makes the weights NaN, one step before the loss tells."""
    recipe = read_recipe(recipe_file)
    recipe = replace(recipe, train=replace(recipe.train, checkpoint_every=1))
    infinite = torch.tensor(float("inf"))
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *_: infinite)
    with pytest.raises(FloatingPointError, match="gradient norm inf at step 0"):
        train(recipe, tmp_path / "run", open_data(recipe))
    assert not (tmp_path / "run" / "state.safetensors").exists()


def test_all_labels_of_a_step_weigh_the_same(recipe_file):
    """Also where the micro-batches have different numbers of them."""
    recipe = read_recipe(recipe_file)
    data = open_data(recipe)
    few, many = data.train.batch(1, 0), data.train.batch(1, 1)
    few.labels_BT[:, 4:] = IGNORED
    model = Transformer(recipe.model)
    initialize(model, 0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    loss, _ = train_step(model, optimizer, [few, many], replace(recipe, train=unclipped(recipe)))
    found = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    logits = [model(*batch[:4]).flatten(0, 1) for batch in (few, many)]
    labels = [batch.labels_BT.flatten() for batch in (few, many)]
    pooled = F.cross_entropy(torch.cat(logits), torch.cat(labels), ignore_index=IGNORED)
    model.zero_grad()
    pooled.backward()
    assert loss == pytest.approx(pooled.item(), rel=1e-5)
    expected = [p.grad for p in model.parameters() if p.grad is not None]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def unclipped(recipe):
    return replace(recipe.train, clip=1e9)


def test_a_run_leaves_its_records_and_learns(recipe_file, tmp_path):
    recipe = read_recipe(recipe_file)
    longer = replace(recipe.train, steps=60, learning_rate=1e-2, eval_every=30, checkpoint_every=60)
    recipe = replace(recipe, train=longer)
    model = train(recipe, tmp_path / "run", open_data(recipe))
    rows = losses(tmp_path / "run")
    assert rows[-1]["loss"] < 0.7 * rows[0]["loss"]
    assert rows[-1]["valid_loss"] < rows[-1]["unigram_loss"]
    assert (tmp_path / "run" / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "run" / "recipe.json").read_text())["train"]["steps"] == 60
    assert all(layer.assign is assign_greedy for layer in model.moe_layers())
    assert not model.training


def test_a_loss_that_is_no_number_stops_the_run(recipe_file, tmp_path):
    recipe = read_recipe(recipe_file)
    recipe = replace(recipe, train=replace(recipe.train, learning_rate=1e30, clip=1e30))
    with pytest.raises(FloatingPointError, match="lower learning_rate"):
        train(recipe, tmp_path / "run", open_data(recipe))


def test_a_state_of_another_model_is_refused(recipe_file, tmp_path):
    recipe = read_recipe(recipe_file)
    model = Transformer(recipe.model)
    initialize(model, 0)
    save_state(tmp_path, 3, model, build_optimizer(model, recipe.train))
    other = Transformer(replace(recipe.model, d_ff=32))
    with pytest.raises(ValueError, match="cannot be resumed with this recipe"):
        load_state(tmp_path, other, build_optimizer(other, recipe.train))
    other = build_optimizer(model, replace(recipe.train, optimizer="adafactor"))
    with pytest.raises(ValueError, match="it was made by AdamW, the recipe has Adafactor"):
        load_state(tmp_path, model, other)
    (tmp_path / "state.safetensors").write_bytes(b"short")
    with pytest.raises(ValueError, match="cannot be resumed"):
        load_state(tmp_path, model, build_optimizer(model, recipe.train))


def test_of_a_run_that_goes_on_otherwise_a_warning_tells(tmp_path, caplog):
    recipe = tiny_recipe(tmp_path, steps=2)
    data = open_data(recipe)
    train(recipe, tmp_path / "run", data)
    more = replace(recipe, train=replace(recipe.train, steps=4, eval_every=1))
    train(more, tmp_path / "run", data)
    assert not caplog.messages
    other = replace(more, train=replace(more.train, steps=5, seed=7))
    other = replace(other, data=replace(other.data, density=0.2))
    train(other, tmp_path / "run", data)
    (told,) = caplog.messages
    assert "its first 4 steps were taken with another [data] density, [train] seed" in told
    train(replace(other, train=replace(other.train, steps=3)), tmp_path / "run", data)
    assert "has taken 5 steps already, more than the 3" in caplog.messages[1]
    (tmp_path / "run" / "recipe.json").write_text("[1]")
    train(other, tmp_path / "run", data)
    assert len(caplog.messages) == 2


def test_a_model_of_other_sizes_is_told_by_its_field(tmp_path):
    recipe = tiny_recipe(tmp_path, steps=2)
    data = open_data(recipe)
    train(recipe, tmp_path / "run", data)
    other = replace(recipe, model=replace(recipe.model, d_ff=32))
    with pytest.raises(ValueError, match="its state is of a model with d_ff 24, .model. has 32"):
        train(other, tmp_path / "run", data)


def test_one_process_at_a_time_is_in_a_run(tmp_path):
    recipe = tiny_recipe(tmp_path, steps=2)
    data, run = open_data(recipe), tmp_path / "run"
    run.mkdir()
    with (
        locked(run / LOCK, str(run)),
        pytest.raises(CheckpointError, match="run: another process is at work there"),
    ):
        train(recipe, run, data)
    (run / LOCK).touch()  # what a killed one leaves
    train(recipe, run, data)
    assert not (run / LOCK).exists()


def test_a_vocabulary_that_does_not_fit_is_refused(recipe_file):
    recipe = read_recipe(recipe_file)
    with pytest.raises(ValueError, match="names 384 tokens; vocab_size is only 383"):
        open_data(replace(recipe, model=replace(recipe.model, vocab_size=383)))
    with pytest.raises(ValueError, match="eos_token_ids is empty"):
        open_data(replace(recipe, model=replace(recipe.model, eos_token_ids=())))
    with pytest.raises(TokenizerError, match="vocab.txt"):
        open_data(replace(recipe, model=replace(recipe.model, tokenizer="cpm2_zh_en")))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("[model]", "[modell]", "tables are .*; needed: model, data, train"),
        ("steps = 6", "stepps = 6", r"\[train\] has unknown keys stepps"),
        ("steps = 6", "", r"\[train\] lacks steps"),
        ("steps = 6", "steps = 0", "steps is 0; it must be at least 1"),
        ("steps = 6", "steps = 'six'", r"\[train\] steps is 'six'; expected int"),
        ("steps = 6", "steps = 6\nschedule = 'cosine'", "schedule is 'cosine'; allowed: constant"),
        ("steps = 6", "steps = 6\nwarmup = 2.0", "warmup is 2.0; allowed: 0 to 1"),
        ("steps = 6", "steps = 6\nclip = 0.0", "learning_rate and clip must be above 0"),
        ("window = 48", "window = 49", "window is 49; allowed: 16 to source_length 48"),
        ('train = "train.txt"', 'train = "t"\nweight = 0', "weight is 0; it must be above 0"),
        ('train = "train.txt"', 'train = "t"\nweight = inf', "weight is inf; it must be above 0"),
        ("learning_rate = 3e-3", "learning_rate = inf", "learning_rate and clip must be above 0"),
        ("steps = 6", "steps = 6\nweight_decay = nan", "weight_decay not below 0"),
        ("steps = 6", "steps = 6\nseed = -1", "seed is -1; it must be at least 0"),
        ("[[data.sources]]", "[data.sources]", r"data.sources is no list; write \[\[data.sources"),
        ('train = "train.txt"', "", r"\[data.sources\] lacks train"),
        ("d_kv = 8", "d_kv = 0", "d_kv is 0"),
        ("steps = 6", "steps = ", "cannot be read as TOML"),
    ],
)
def test_mistakes_in_a_recipe_are_named(recipe_file, old, new, message):
    text = recipe_file.read_text(encoding="utf-8")
    assert old in text
    recipe_file.write_text(text.replace(old, new), encoding="utf-8")
    with pytest.raises(ConfigError, match=message) as caught:
        read_recipe(recipe_file)
    assert str(recipe_file) in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model = 3\n[data]\n[train]", r"model is 3; expected a table \[model\]"),
        ("data = 3\n[model]\n[train]", r"data is 3; expected a table \[data\]"),
        ("[model]\n[train]\n[data]\nsources = [1]", r"data.sources is 1; expected a table"),
    ],
)
def test_a_value_in_place_of_a_table_is_named(recipe_file, text, message):
    recipe_file.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=message):
        read_recipe(recipe_file)


def test_a_recipe_without_sources_or_file(recipe_file):
    text = recipe_file.read_text(encoding="utf-8")
    start, end = text.index("[[data.sources]]"), text.index("[train]")
    recipe_file.write_text(text[:start] + text[end:], encoding="utf-8")
    with pytest.raises(ConfigError, match=r"\[\[data.sources\]\] is empty"):
        read_recipe(recipe_file)
    with pytest.raises(ConfigError, match="nowhere.toml"):
        read_recipe(recipe_file.with_name("nowhere.toml"))


def test_the_demo_recipe_is_valid_and_fits_its_size():
    recipe = read_recipe(ROOT / "training" / "recipes" / "demo.toml")
    assert recipe.model.num_experts >= 2
    assert recipe.model.router == "cpm_2"


def rates(**changes):
    recipe = TrainRecipe(steps=100, learning_rate=1.0, warmup=0.1, **changes)
    return [learning_rate(step, recipe) for step in range(100)]


def test_schedules():
    for name in ("constant", "linear", "wsd"):
        assert rates(schedule=name)[:10] == pytest.approx([i / 10 for i in range(1, 11)])
    assert set(rates(schedule="constant")[10:]) == {1.0}
    linear = rates(schedule="linear")
    assert linear[54] == pytest.approx(46 / 90)
    assert linear[99] == pytest.approx(1 / 90)
    wsd = rates(schedule="wsd", decay=0.2)
    assert set(wsd[10:80]) == {1.0}
    assert wsd[90] == pytest.approx(0.5)
    noam = rates(schedule="noam")
    assert noam[9] == pytest.approx(10**-0.5)
    assert noam[4] == pytest.approx(10**-0.5 / 2)
    assert noam[99] == pytest.approx(0.1)


def test_norms_do_not_decay_those_of_experts_neither(recipe_file):
    recipe = read_recipe(recipe_file)
    model = Transformer(recipe.model)
    decaying, steady = build_optimizer(model, recipe.train).param_groups
    assert (decaying["weight_decay"], steady["weight_decay"]) == (0.01, 0)
    names = {id(p): name for name, p in model.named_parameters()}
    steady_names = {names[id(p)] for p in steady["params"]}
    assert "experts.layers.encoder-0.norm" in steady_names
    assert all("norm" in name for name in steady_names)
    assert not any("norm" in names[id(p)] for p in decaying["params"])
    trained = sum(p.requires_grad for p in model.parameters())
    assert len(decaying["params"]) + len(steady["params"]) == trained


@torch.no_grad()
def test_the_fill_report_counts_span_tokens_only(recipe_file):
    recipe = read_recipe(recipe_file)
    data = open_data(recipe)
    model = Transformer(recipe.model)
    initialize(model, 0)
    batch = data.valid.batch(0, 0)
    report = evaluate_fill(model, [batch], data.unigram_V, data.special_ids)
    special = set(data.special_ids)
    total, hits, base, count = 0.0, 0, 0.0, 0
    logits = model(*batch[:4]).log_softmax(-1)
    for row, column in zip(*torch.where(batch.labels_BT != IGNORED), strict=True):
        label = int(batch.labels_BT[row, column])
        if label not in special:
            total -= float(logits[row, column, label])
            hits += int(logits[row, column].argmax()) == label
            base -= float(data.unigram_V[label])
            count += 1
    assert report.tokens == count
    assert report.loss == pytest.approx(total / count, rel=1e-4)
    assert report.accuracy == pytest.approx(hits / count)
    assert report.unigram_loss == pytest.approx(base / count, rel=1e-4)
    assert report.perplexity == pytest.approx(2.718281828**report.loss)
    assert report.unigram_perplexity == pytest.approx(2.718281828**report.unigram_loss)


def test_the_fill_report_says_it_in_a_line():
    report = FillReport(2.0, 0.25, 5.0, 0.125, 1000)
    assert report.summary() == (
        "span filling, 1,000 validation tokens: loss 2.000 (perplexity 7), accuracy 25.0%; "
        "unigram baseline: loss 5.000 (perplexity 148), accuracy 12.5%"
    )


def test_nothing_to_evaluate_is_an_error(recipe_file):
    data = open_data(read_recipe(recipe_file))
    with pytest.raises(ValueError, match="no span token to evaluate"):
        evaluate_fill(Transformer(read_recipe(recipe_file).model), [], data.unigram_V, ())


def test_unigram_probabilities_sum_to_one(recipe_file):
    data = open_data(read_recipe(recipe_file))
    assert data.unigram_V.exp().sum() == pytest.approx(1.0, abs=1e-4)
    again = unigram_log_probs(data.train.shards, [1.0], 384)
    assert torch.equal(again, data.unigram_V)


def test_progress_prints_plain_lines_where_there_is_no_terminal(capsys):
    with PrepareProgress() as preparing:
        preparing.report("a.txt", 5, 10)
    row = {"step": 1, "loss": 2.0, "rate": 0.1, "norm": 1.0, "tokens": 100, "seconds": 0.5}
    row |= {"valid_loss": 1.5, "unigram_loss": 3.0, "valid_accuracy": 0.25}
    with TrainProgress(4) as progress:
        progress.report(row)
    shown = capsys.readouterr().err
    assert "tokenizing a.txt: 50%" in shown
    assert "step 1/4 loss 2.000" in shown
    assert "fill loss 1.500 against unigram 3.000, accuracy 25.0% 200 tok/s" in shown


def run(capsys, *arguments):
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    return caught.value.code or 0, *capsys.readouterr()


def test_the_command_writes_a_model_with_its_tokenizer_files(recipe_file, tmp_path, capsys):
    (tmp_path / "spiece.model").write_bytes(b"not read by the tokenizer of bytes")
    code, out, err = run(capsys, "train", recipe_file, tmp_path / "run")
    assert (code, out) == (0, f"{tmp_path / 'run' / 'model'}\n"), err
    assert (tmp_path / "run" / "model" / "spiece.model").exists()
    assert load_model(tmp_path / "run" / "model").config == read_recipe(recipe_file).model


def test_a_diverging_run_ends_in_one_line(recipe_file, tmp_path, capsys):
    text = recipe_file.read_text(encoding="utf-8")
    recipe_file.write_text(
        text.replace("learning_rate = 3e-3", "learning_rate = 1e30\nclip = 1e30")
    )
    code, out, err = run(capsys, "train", recipe_file, tmp_path / "run")
    assert (code, out) == (1, "")
    assert err.splitlines()[-1].startswith("infmoe: error: loss is ")
    assert "Traceback" not in err


def infmoe(*arguments, **options):
    command = [sys.executable, "-m", "server", *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, text=True, stderr=subprocess.PIPE, **options)


@pytest.mark.slow
def test_a_killed_command_resumes_and_writes_a_model(recipe_file, tmp_path):
    text = recipe_file.read_text(encoding="utf-8")
    recipe_file.write_text(text.replace("steps = 6", "steps = 60"), encoding="utf-8")
    run = tmp_path / "run"
    first = infmoe("train", recipe_file, run, "--threads", 1)
    while not (run / "state.safetensors").exists():
        assert first.poll() is None, first.stderr.read()
        time.sleep(0.005)
    os.kill(first.pid, signal.SIGKILL)
    first.communicate()
    second = infmoe("train", recipe_file, run, "--threads", 1, stdout=subprocess.PIPE)
    out, err = second.communicate(timeout=300)
    assert second.returncode == 0, err
    assert out.strip() == str(run / "model")
    assert [row["step"] for row in losses(run)] == list(range(1, 61))
    model = load_model(run / "model")
    assert model.config == read_recipe(recipe_file).model
