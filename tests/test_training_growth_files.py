"""`infmoe grow` and `infmoe adapter grow`: from directory to directory, and what is refused."""

import io
import json
import resource
import tomllib
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.adapters import Slots, load_adapter, model_fingerprint
from engine.adapters_manifest import check_manifest, measure_files
from engine.checkpoint import load_model, save_model
from engine.errors import CheckpointError, ConfigError, TokenizerError
from engine.generation import generate
from engine.prompt import build_request
from engine.request import Piece, SamplingParams
from server.__main__ import main
from tests.growth_cases import random_model
from tests.tiny import DENSE, LLAMA, byte_tokenizer
from training.growth_adapters import grow_adapter
from training.growth_files import grow_directory
from training.growth_losses import check_texts, measure_losses
from training.growth_recipes import doublings, progressive_targets, read_target, sizes_target
from training.growth_record import read_fingerprint, read_steps
from training.loop import open_data, train
from training.optimizers import build_optimizer
from training.recipe import TrainRecipe, read_recipe
from training.run_lock import locked
from training.state import load_state, save_state

TOKENIZER = byte_tokenizer()
SOURCE = replace(DENSE, num_encoder_layers=1, num_decoder_layers=1)
BIG = """
[target]
d_model = 40
d_ff = 56
num_heads = 5
num_encoder_layers = 2
num_decoder_layers = 3
"""
EXPERTS = "num_experts = 3\n"


@pytest.fixture
def source(tmp_path):
    save_model(random_model(SOURCE), tmp_path / "small")
    return tmp_path / "small"


def target(path, text=BIG):
    path.write_text(text, encoding="utf-8")
    return path


def grow_with(source, tmp_path, text=BIG, out="big", **how):
    wanted = read_target(target(tmp_path / "target.toml", text))
    return grow_directory(source, wanted, tmp_path / out, **how)


def write_adapter(path, model, slots, base=True, width=SOURCE.d_model):
    path.mkdir()
    count = slots.num_vectors
    peft = {
        "peft_type": "PROMPT_TUNING",
        "task_type": "SEQ_2_SEQ_LM",
        "num_virtual_tokens": count,
        "num_transformer_submodules": 2,
        "token_dim": width,
    }
    ours = {"slots": {"front": slots.front, "back": slots.back}, "version": "3"}
    if base:
        ours["base_fingerprint"] = model_fingerprint(model)
    (path / "adapter_config.json").write_text(json.dumps(peft))
    (path / "infmoe_adapter.json").write_text(json.dumps(ours))
    vectors = torch.randn(2 * count, width, generator=torch.Generator().manual_seed(5)) * 3
    save_file({"prompt_embeddings": vectors}, path / "adapter_model.safetensors")
    return path


def answer(model, adapter, text="tell me"):
    loaded = load_adapter(
        adapter, model.config, torch.float32, fingerprint=model_fingerprint(model)
    )
    params = SamplingParams(max_tokens=20)
    request = build_request(text, TOKENIZER, model.config, params, "x", adapter=loaded)
    events = generate(model, TOKENIZER, request)
    return [i for event in events if isinstance(event, Piece) for i in event.token_ids]


# --- models


@pytest.mark.parametrize("experts", ["", EXPERTS])
def test_a_grown_directory_is_loaded_and_answers_as_before(source, tmp_path, experts):
    receipt = grow_with(source, tmp_path, BIG + experts)
    small, big = load_model(source), load_model(tmp_path / "big")
    assert big.config.d_model == 40
    assert big.config.num_experts == (3 if experts else 0)
    assert receipt.step.is_exact
    assert receipt.step.receipt["max_logit_difference"] <= 1e-5
    request = build_request("hello", TOKENIZER, DENSE, SamplingParams(max_tokens=24), "x")
    answers = [
        [e.token_ids for e in generate(m, TOKENIZER, request) if isinstance(e, Piece)]
        for m in (small, big)
    ]
    assert answers[0] == answers[1]
    (step,) = read_steps(tmp_path / "big")
    assert step == receipt.step
    assert step.source_fingerprint == model_fingerprint(small) == read_fingerprint(source)
    assert step.fingerprint == model_fingerprint(big) == read_fingerprint(tmp_path / "big")
    assert [operator["operator"] for operator in step.operators][:3] == [
        "pad",
        "identity",
        "identity",
    ]
    assert not list(tmp_path.glob("*.growing*"))
    lines = "\n".join(receipt.summary())
    assert "(exact)" in lines
    assert f"{step.receipt['parameters']:,}" in lines


def test_another_dtype_is_measured_as_it_is_written(source, tmp_path):
    receipt = grow_with(source, tmp_path, dtype=torch.bfloat16)
    assert load_model(tmp_path / "big").embedding.weight.dtype == torch.bfloat16
    assert 1e-4 < receipt.step.receipt["max_logit_difference"] < 0.2
    model = load_model(source)
    with torch.no_grad():
        model.lm_head.weight[3, 3] = 1e6
    save_model(model, tmp_path / "large")
    with pytest.raises(CheckpointError, match="values too large for torch.float16"):
        grow_with(tmp_path / "large", tmp_path, dtype=torch.float16, out="half")
    assert not (tmp_path / "half").exists()


def test_losses_before_and_after_are_in_the_wider_type(source, tmp_path):
    """The source is stored in bf16, the result in fp32: rounding is no change by growth."""
    save_model(load_model(source), tmp_path / "half", dtype=torch.bfloat16)
    grow_with(tmp_path / "half", tmp_path)
    text = target(tmp_path / "text.txt", "the cat sat on the mat and a dog ran in the park\n" * 9)
    found = measure_losses(tmp_path / "half", tmp_path / "big", [text], is_other_vocabulary=False)
    assert found.after == pytest.approx(found.before, abs=1e-5)
    assert found.summary()[0].endswith(f"on {found.tokens:,} tokens filled in")
    assert found.masked is None


def test_growth_in_steps_keeps_the_record_of_all(source, tmp_path):
    grow_with(source, tmp_path)
    grow_with(tmp_path / "big", tmp_path, "[target]\nd_model = 48\n", out="bigger")
    first, second = read_steps(tmp_path / "bigger")
    assert first.fingerprint == second.source_fingerprint


def test_recipes_have_names_and_a_file_may_change_them(source, tmp_path):
    text = '[target]\nd_model = 64\nd_ff = 96\nnum_encoder_layers = 2\n[growth]\nrecipe = "{}"\n'
    plans = {
        name: read_target(target(tmp_path / "t.toml", text.format(name))).plan(SOURCE)
        for name in ("net2net", "stacking_bert", "bert2bert")
    }
    assert [(p.width, p.depth) for p in plans.values()] == [
        ("fpi", "identity"),
        ("pad", "stack"),
        ("aki", "stack"),
    ]
    assert plans["net2net"].noise == 0.01
    changed = text.format("net2net") + "noise = 0.0\n"
    receipt = grow_with(source, tmp_path, changed)
    assert receipt.step.receipt["max_logit_difference"] <= 1e-5
    assert any("without split or noise" in line for line in receipt.summary())
    inexact = grow_with(source, tmp_path, text.format("bert2bert"), out="aki")
    assert inexact.step.receipt["max_logit_difference"] > 1e-2
    assert "not exact" in "\n".join(inexact.summary())


def test_progressive_stacking_doubles():
    assert doublings(3, 12) == [3, 6, 12]
    with pytest.raises(ConfigError, match="3 layers doubled become 12, not 9; choose 12 or 6"):
        doublings(3, 9)
    big = replace(DENSE, num_encoder_layers=8, num_decoder_layers=4)
    source = replace(DENSE, num_decoder_layers=1)
    stages = progressive_targets(source, big)
    assert [(c.num_encoder_layers, c.num_decoder_layers) for c in stages] == [
        (2, 1),
        (4, 2),
        (8, 4),
    ]
    with pytest.raises(ConfigError, match="the encoder doubles 2 times, the decoder 1"):
        progressive_targets(DENSE, big)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[target]\nd_model = 16\n", "d_model is 16, less than the model's 32; growth only adds"),
        ("[target]\nwidth = 16\n", "target.toml: unknown keys width"),
        ("[target]\nd_model = 'x'\n", "d_model is 'x'; expected int"),
        ("[tarte]\n", "unknown tables tarte; known: target, growth, experts, vocabulary"),
        ("target = 3\n", "target is 3; expected a table"),
        ("[growth]\nwidth = 'wide'\n", "width is 'wide'; allowed: pad, isometric"),
        ("[growth]\nspeed = 1\n", "unknown keys speed; known: width, split"),
        ("[growth]\nnoise = 'much'\n", "noise is 'much'; expected float"),
        ("[growth]\nrecipe = 'x'\n", "recipe is 'x'; allowed: net2net"),
        ("[experts]\ndrop = 2\n", "drop is 2; allowed: 0 to 1"),
        ("[vocabulary]\nkind = 'bytes'\n", r"\[vocabulary\] lacks tokenizer"),
        ("[growth", "cannot be read as TOML"),
    ],
)
def test_a_target_that_makes_no_sense_is_refused_before_any_work(source, tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        grow_with(source, tmp_path, text)
    assert not (tmp_path / "big").exists()


def test_a_place_that_is_taken_is_refused(source, tmp_path):
    (tmp_path / "big").mkdir()
    (tmp_path / "big" / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="is there already; choose another directory"):
        grow_with(source, tmp_path)
    (tmp_path / "big" / "notes.txt").unlink()
    grow_with(source, tmp_path)  # an empty one may be there
    with pytest.raises(CheckpointError, match="is there already"):
        grow_with(source, tmp_path)


def test_a_model_that_is_not_there_or_of_pickles_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="does not exist"):
        grow_with(tmp_path / "none", tmp_path)
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "5").mkdir()
    (tmp_path / "old" / "latest_checkpointed_iteration.txt").write_text("5")
    with pytest.raises(CheckpointError, match="holds pickles; run `infmoe convert`"):
        grow_with(tmp_path / "old", tmp_path)


def test_what_a_killed_run_left_does_not_matter(source, tmp_path):
    for left in ("big.growing", "big.growing.partial"):
        (tmp_path / left).mkdir()
        (tmp_path / left / "half").write_text("x")
    grow_with(source, tmp_path)
    assert (tmp_path / "big" / "growth.json").exists()
    assert not list(tmp_path.glob("*.growing*"))


@pytest.mark.parametrize("text", [BIG, "[target]\nnum_experts = 3\n"])
def test_a_full_disk_leaves_nothing(source, tmp_path, text):
    """The kernel refuses to let a file grow, as a full disk does."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, old[1]))
    try:
        with pytest.raises((CheckpointError, OSError), match="cannot be written"):
            grow_with(source, tmp_path, text)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["small", "target.toml"]
    grow_with(source, tmp_path, text)


@pytest.mark.parametrize("text", [BIG, "[target]\nnum_experts = 3\n"])
def test_two_that_grow_into_one_place_do_not_meet(source, tmp_path, text):
    with locked(tmp_path / ".big.lock", "big"):
        with pytest.raises(CheckpointError, match="big: another process is at work there"):
            grow_with(source, tmp_path, text)
        assert (tmp_path / ".big.lock").exists()
    grow_with(source, tmp_path, text)
    assert not (tmp_path / ".big.lock").exists()


def test_another_vocabulary_comes_with_its_file(source, tmp_path):
    tokens = ["<unk>", "<s>", "<pad>", "<eod>", "\u2582", "\u2583", "a", "b", "ab", "##c", "<s_0>"]
    (tmp_path / "vocabulary").mkdir()
    (tmp_path / "vocabulary" / "vocab.txt").write_text("\n".join(tokens), encoding="utf-8")
    wanted = '[vocabulary]\ntokenizer = "vocabulary"\nkind = "cpm2_zh_en"\n'
    with pytest.raises(ConfigError, match="eos_token_ids: the new vocabulary has no </s>"):
        grow_with(source, tmp_path, wanted)
    given = "[target]\ndecoder_start_token_id = 1\neos_token_ids = [{}]\nvocab_size = 16\n"
    with pytest.raises(ConfigError, match="token id 12 has no token in the new vocabulary of 11"):
        grow_with(source, tmp_path, given.format(12) + wanted)
    with pytest.raises(TokenizerError, match="vocabulary cannot be read"):
        grow_with(source, tmp_path, (given + wanted).format(3).replace('"vocabulary"', '"none"'))
    receipt = grow_with(source, tmp_path, given.format(3) + wanted)
    big = load_model(tmp_path / "big")
    assert (big.config.vocab_size, big.config.pad_token_id) == (16, 2)
    assert (tmp_path / "big" / "vocab.txt").exists()
    first = receipt.step.operators[0]
    assert (first["operator"], first["matched"], first["pieces"]) == ("vocabulary", 3, 6)
    assert receipt.step.receipt["max_logit_difference"] <= 1e-5


# --- runs


RECIPE = """
[model]
{model}
[data]
tokenizer = "."
source_length = 48
target_length = 24
window = 48
mean_span = 3
[[data.sources]]
train = "text.txt"
valid = "text.txt"
[train]
steps = 2
rows = 2
precision = "fp32"
eval_every = 2
eval_batches = 1
checkpoint_every = 2
{more}
"""


def write_recipe(path, config, more=""):
    values = json.loads(config.to_json())
    del values["format"], values["version"]
    values = {key: value for key, value in values.items() if value is not None}
    model = "\n".join(f"{key} = {json.dumps(value)}" for key, value in values.items())
    text = RECIPE.format(model=model, more=more)
    assert tomllib.loads(text)
    path.write_text(text)
    lines = "the cat sat on the mat and a dog ran in the park\n" * 20
    (path.parent / "text.txt").write_text(lines)
    return read_recipe(path)


def test_training_starts_from_a_grown_model(source, tmp_path):
    grow_with(source, tmp_path)
    big = load_model(tmp_path / "big")
    path = tmp_path / "recipe.toml"
    recipe = write_recipe(path, big.config, 'start = "big"')
    path.write_text(path.read_text().split("[data]", 1)[1].join(["[data]", ""]))
    assert read_recipe(path) == recipe  # [model] may be left out
    recipe = replace(recipe, train=replace(recipe.train, learning_rate=1e-12))
    trained = train(recipe, tmp_path / "run", open_data(recipe))
    (tmp_path / "big").rename(tmp_path / "moved")
    more = replace(recipe, train=replace(recipe.train, steps=recipe.train.steps + 1))
    train(more, tmp_path / "run", open_data(more))  # what it goes on from is in its state
    with pytest.raises(CheckpointError, match="big: does not exist"):
        train(more, tmp_path / "new", open_data(more))
    (tmp_path / "moved").rename(tmp_path / "big")
    for name, tensor in trained.state_dict().items():
        assert torch.allclose(tensor, big.state_dict()[name], atol=1e-6), name
    other = replace(recipe, model=replace(big.config, norm_eps=1e-6))
    with pytest.raises(ValueError, match="start big has norm_eps"):
        train(other, tmp_path / "other", open_data(recipe))
    path.write_text(path.read_text().replace('start = "big"', ""))
    with pytest.raises(ConfigError, match=r"without one, \[train\] needs a start"):
        read_recipe(path)


@pytest.mark.parametrize("moments", ["carry", "scale", "reset"])
def test_a_run_grows_with_its_optimiser_and_goes_on(source, tmp_path, capsys, moments):
    model = load_model(source)
    with torch.no_grad():
        model.lm_head.weight.add_(0.01)  # what the directory has is rounded
    optimizer = build_optimizer(model, TrainRecipe(steps=1))
    model(*[torch.ones(1, 4, dtype=torch.int64)] * 4).sum().backward()
    optimizer.step()
    (tmp_path / "run").mkdir()
    save_state(tmp_path / "run", 1, model, optimizer)
    target(tmp_path / "t.toml")
    how = ["--run", str(tmp_path / "run"), "--run-out", str(tmp_path / "next")]
    how += ["--moments", moments, "--out", str(tmp_path / "big")]
    invoke("grow", str(source), str(tmp_path / "t.toml"), *how)
    big = load_model(tmp_path / "big")
    assert torch.equal(big.state_dict()["lm_head.weight"][:, :32], model.lm_head.weight)
    recipe = write_recipe(tmp_path / "recipe.toml", big.config)
    resumed = build_optimizer(big, recipe.train)
    assert load_state(tmp_path / "next", big, resumed) == 0
    assert bool(resumed.state_dict()["state"]) == (moments != "reset")
    other = replace(recipe, model=replace(big.config, norm_eps=1e-6))
    with pytest.raises(ValueError, match=r"state is of a model with norm_eps .*, \[model\] has"):
        train(other, tmp_path / "next", open_data(recipe))
    train(recipe, tmp_path / "next", open_data(recipe))
    failed = invoke("grow", str(source), str(tmp_path / "t.toml"), *how[:-1], str(tmp_path / "c"))
    assert "holds the state of a run" in failed


# --- commands


def invoke(*arguments):
    """What a command writes to stdout, or the message that it fails with."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        try:
            main(list(arguments))
        except SystemExit as end:
            if end.code:
                return err.getvalue()
    return out.getvalue()


def test_the_commands_grow_a_model_and_its_adapter(source, tmp_path):
    (tmp_path / "text.txt").write_text("the cat sat on the mat and a dog ran in the park\n" * 9)
    file = target(tmp_path / "t.toml")
    how = ["--out", str(tmp_path / "big"), "--text", str(tmp_path / "text.txt")]
    assert invoke("grow", str(source), str(file), *how).strip() == str(tmp_path / "big")
    old = write_adapter(tmp_path / "task", load_model(source), Slots(front=2))
    grown = ["--model", str(tmp_path / "big"), "--out", str(tmp_path / "task2")]
    assert invoke("adapter", "grow", str(old), *grown).strip() == str(tmp_path / "task2")
    assert "is there already" in invoke("adapter", "grow", str(old), *grown)
    none = invoke("adapter", "grow", str(tmp_path / "none"), *grown[:-1], str(tmp_path / "task3"))
    assert "none: does not exist; name the folder of an adapter" in none


def test_wrong_usage_is_told(source, tmp_path):
    file = str(target(tmp_path / "t.toml"))
    out = ["--out", str(tmp_path / "big")]
    assert "go together" in invoke("grow", str(source), file, *out, "--run", "x")
    failed = invoke("grow", str(source), file, *out, "--text", str(tmp_path / "none.txt"))
    assert "none.txt: is no file" in failed
    short = target(tmp_path / "short.txt", "a\n")
    failed = invoke("grow", str(source), file, *out, "--text", str(short))
    assert "no document of at least" in failed
    for name, size in (("--d-model", 2**21), ("--d-ff", 2**21), ("--experts", 10**8)):
        assert "allowed: " in invoke("grow", str(source), *out, name, str(size))
    failed = invoke("grow", str(source), *out, "--d-model", "1000000", "--d-ff", "1000000")
    assert "GiB in fp32, in which it is made, and the machine" in failed
    failed = invoke("grow", str(source), *out, "--vocab", str(tmp_path / "none"))
    assert "holds no vocab.txt or spiece.model" in failed
    assert "less than the model's 4" in invoke("grow", str(source), *out, "--heads", "1")
    assert not (tmp_path / "big").exists()  # all is checked before any work


def test_sizes_may_be_options(source, tmp_path):
    sizes = ["--d-model", "40", "--d-ff", "56", "--heads", "5", "--layers", "2", "--experts", "3"]
    out = ["--out", str(tmp_path / "big")]
    assert invoke("grow", str(source), *sizes, *out).strip() == str(tmp_path / "big")
    config = load_model(tmp_path / "big").config
    assert (config.d_model, config.d_ff, config.num_heads) == (40, 56, 5)
    assert (config.num_encoder_layers, config.num_decoder_layers, config.num_experts) == (2, 2, 3)
    (step,) = read_steps(tmp_path / "big")
    assert step.is_exact
    assert step.receipt["max_logit_difference"] <= 1e-5


def test_layers_of_a_decoder_only_model_are_those_of_its_decoder():
    assert sizes_target(LLAMA, {}, layers=3).target == {"num_decoder_layers": 3}
    with pytest.raises(ConfigError, match="filling blanks, which this model cannot"):
        check_texts(Path(), LLAMA, [])


# --- adapters


@pytest.mark.parametrize("width", ["pad", "isometric"])
def test_a_grown_adapter_answers_as_before(source, tmp_path, width):
    small = load_model(source)
    grow_with(source, tmp_path, BIG + EXPERTS + f'[growth]\nwidth = "{width}"\n')
    grow_with(tmp_path / "big", tmp_path, "[target]\nd_model = 50\n", out="bigger")
    slots = Slots(front=3, back=1)
    old = write_adapter(tmp_path / "task", small, slots)
    before = answer(small, old)
    plain = SamplingParams(max_tokens=20)
    without = build_request("tell me", TOKENIZER, small.config, plain, "x")
    bare = [e.token_ids for e in generate(small, TOKENIZER, without) if isinstance(e, Piece)]
    assert before != [i for ids in bare for i in ids]
    for name in ("big", "bigger"):
        big = load_model(tmp_path / name)
        grown = grow_adapter(old, tmp_path / name, tmp_path / f"task-{name}")
        assert (grown.version, grown.slots) == ("3", slots)
        assert answer(big, tmp_path / f"task-{name}") == before
        check_manifest(tmp_path / f"task-{name}", measure_files(tmp_path / f"task-{name}"))
    vectors = load_file(tmp_path / "task-bigger" / "adapter_model.safetensors")
    assert vectors["prompt_embeddings"].shape == (4, 50)  # of two sub-modules the one that is read


def test_an_adapter_that_does_not_tell_its_base_is_taken_for_the_last_one(source, tmp_path, caplog):
    small = load_model(source)
    grow_with(source, tmp_path)
    old = write_adapter(tmp_path / "task", small, Slots(front=2), base=False)
    grow_adapter(old, tmp_path / "big", tmp_path / "task2")
    assert "does not tell its base" in caplog.text
    assert answer(load_model(tmp_path / "big"), tmp_path / "task2") == answer(small, old)


def test_growth_that_was_not_exact_is_a_warning(source, tmp_path, caplog):
    grow_with(source, tmp_path, BIG + '[growth]\ndepth = "stack"\n')
    old = write_adapter(tmp_path / "task", load_model(source), Slots(front=2))
    grow_adapter(old, tmp_path / "big", tmp_path / "task2")
    assert "stack changed the model, so answers change too" in caplog.text.replace(
        "pad, stack, ", ""
    )


def test_an_adapter_of_another_model_is_refused(source, tmp_path):
    grow_with(source, tmp_path)
    stranger = write_adapter(tmp_path / "task", random_model(SOURCE, 7), Slots(front=2))
    with pytest.raises(CheckpointError, match="from which this model has not grown"):
        grow_adapter(stranger, tmp_path / "big", tmp_path / "out")
    big = load_model(tmp_path / "big")
    own = write_adapter(tmp_path / "own", big, Slots(front=2), width=40)
    with pytest.raises(CheckpointError, match="belongs to the grown model already"):
        grow_adapter(own, tmp_path / "big", tmp_path / "out")
    with pytest.raises(CheckpointError, match="has no growth.json"):
        grow_adapter(stranger, source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_model_that_was_trained_since_is_refused(source, tmp_path):
    grow_with(source, tmp_path)
    record = (tmp_path / "big" / "growth.json").read_text()
    (tmp_path / "big" / "growth.json").unlink()
    big = load_model(tmp_path / "big")
    with torch.no_grad():
        big.embedding.weight.mul_(1.5)
    save_model(big, tmp_path / "big")
    (tmp_path / "big" / "growth.json").write_text(record)
    old = write_adapter(tmp_path / "task", load_model(source), Slots(front=2))
    with pytest.raises(CheckpointError, match="the weights here have changed since"):
        grow_adapter(old, tmp_path / "big", tmp_path / "out")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda values: values | {"version": 9}, "is no record of growth of version 1"),
        (lambda values: {**values, "steps": [{}]}, "is damaged"),
        (lambda values: {**values, "steps": [values["steps"][0] | {"origin": [99]}]}, "is damaged"),
        (
            lambda values: {
                **values,
                "steps": [values["steps"][0] | {"origin": [99], "weight": [1.0]}],
            },
            "origin leaves the 32 dimensions",
        ),
    ],
)
def test_a_damaged_record_is_refused(source, tmp_path, spoil, message):
    grow_with(source, tmp_path)
    path = tmp_path / "big" / "growth.json"
    path.write_text(json.dumps(spoil(json.loads(path.read_text()))))
    with pytest.raises(CheckpointError, match=message):
        read_steps(tmp_path / "big")


def test_the_example_is_a_plan(tmp_path):
    example = Path(__file__).parents[1] / "training" / "recipes" / "grow.toml"
    wanted = read_target(example)
    assert wanted.plan(SOURCE).target.d_model == 512
    lines = example.read_text().splitlines()
    every = read_target(target(tmp_path / "all.toml", "\n".join(uncomment(lines))))
    assert every.vocabulary is not None
    assert every.growth["split"] == "uneven"


def uncomment(lines):
    """The example with all that it leaves out."""
    plain = [line.removeprefix("# ") for line in lines]
    kept = [line for line in plain if " = " in line or line.startswith("[")]
    return [line for line in kept if "`" not in line]
