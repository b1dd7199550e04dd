import json
import random
import resource
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from engine.checkpoint import load_model, save_model
from engine.errors import ConfigError
from engine.model.moe import assign_greedy
from tests.tiny import DENSE, MOE, tiny_model
from tests.training_recipes import (
    SMALL,
    Killed,
    kill_after,
    recipe_text,
    rows,
    tiny_recipe,
)
from training.averages import Average
from training.checkpointing import checkpointed
from training.loop import open_data, train
from training.losses import balance_penalty, label_scores, router_z_penalty, z_penalty
from training.recipe import TrainRecipe, read_recipe
from training.router_options import noisy_assign, router_options
from training.state import load_state, save_state, write_state

GATED = replace(MOE, router="base_layer")
ROOT = Path(__file__).parents[1]
RECIPE = recipe_text(
    train={"steps": 60, "ema": 0.9, "eval_every": 20, "checkpoint_every": 7},
    more="""[distill]
teachers = ["teacher"]
top_k = 4
cache = "cache"
""",
)
EVERYTHING = {
    "ema": 0.9,
    "checkpointing": True,
    "z_loss": 1e-4,
    "balance_loss": 0.01,
    "router_z_loss": 0.001,
    "router_noise": 0.1,
    "expert_drop": 0.1,
}


@pytest.mark.parametrize("optimizer", ["adafactor_hf", "muon"])
@pytest.mark.parametrize("cut", [1, 3, 5])
def test_a_resumed_run_equals_the_whole_with_all_options(tmp_path, optimizer, cut):
    save_model(tiny_model(SMALL, 7), tmp_path / "teacher", dtype=torch.float32)
    distill = {"teachers": ("teacher",), "inherit_share": 0.7, "top_k": 5, "cache": "cache"}
    recipe = tiny_recipe(tmp_path, model=GATED, distill=distill, optimizer=optimizer, **EVERYTHING)
    data = open_data(recipe)
    whole = train(recipe, tmp_path / "whole", data)
    with pytest.raises(Killed):
        train(recipe, tmp_path / "cut", data, kill_after(cut))
    resumed = train(recipe, tmp_path / "cut", data)
    assert rows(tmp_path / "cut") == rows(tmp_path / "whole")
    for a, b in zip(resumed.parameters(), whole.parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_average_is_what_is_evaluated_and_returned(tmp_path):
    recipe = tiny_recipe(tmp_path, learning_rate=0.05)
    data = open_data(recipe)
    plain = train(recipe, tmp_path / "plain", data)
    averaged = train(replace(recipe, train=replace(recipe.train, ema=0.9)), tmp_path / "ema", data)
    assert not torch.equal(plain.embedding.weight, averaged.embedding.weight)
    a, b = rows(tmp_path / "plain"), rows(tmp_path / "ema")
    assert [row["loss"] for row in a] == [row["loss"] for row in b]
    assert a[-1]["valid_loss"] != b[-1]["valid_loss"]


def test_the_average_of_a_plain_loop():
    model = torch.nn.Linear(2, 2, bias=False)
    average = Average(model, 0.5)
    expected = model.weight.detach().clone()
    for step, decay in enumerate([0.1, 2 / 11, 3 / 12, 4 / 13]):
        with torch.no_grad():
            model.weight.add_(1.0)
        average.update(model, step)
        expected = decay * expected + (1 - decay) * model.weight.detach()
    torch.testing.assert_close(average.weights["weight"], expected)
    own = model.weight.detach().clone()
    with average.applied(model):
        torch.testing.assert_close(model.weight.detach(), expected)
    assert torch.equal(model.weight, own)


def saved_bytes(model, batch):
    seen = {}

    def keep(tensor):
        seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logits, labels = label_scores(model, batch, "fp32")
    F.cross_entropy(logits, labels).backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return sum(seen.values()), gradients


@pytest.mark.parametrize("config", [DENSE, MOE])
def test_checkpointing_keeps_less_and_changes_nothing(tmp_path, config):
    batch = open_data(tiny_recipe(tmp_path)).train.batch(1, 0)
    model = tiny_model(config)
    plain_bytes, plain = saved_bytes(model, batch)
    with checkpointed(model):
        fewer_bytes, again = saved_bytes(model, batch)
    assert fewer_bytes < 0.7 * plain_bytes
    assert plain.keys() == again.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(again[name], gradient)
    assert "forward" not in vars(model.encoder.blocks()[0].self_attention)
    assert "transform" not in vars(model.encoder.blocks()[0])


def test_bf16_is_close_to_fp32(tmp_path):
    recipe = tiny_recipe(tmp_path)
    data = open_data(recipe)
    train(recipe, tmp_path / "a", data)
    half = replace(recipe, train=replace(recipe.train, precision="bf16"))
    train(half, tmp_path / "b", data)
    for a, b in zip(rows(tmp_path / "a"), rows(tmp_path / "b"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=0.02)


def test_penalties_of_a_plain_loop():
    scores = torch.randn(7, 3, generator=torch.Generator().manual_seed(0))
    chosen = scores.argmax(-1)
    probabilities = scores.exp() / scores.exp().sum(-1, keepdim=True)
    expected = sum(3 * (chosen == e).float().mean() * probabilities[:, e].mean() for e in range(3))
    torch.testing.assert_close(balance_penalty(scores, chosen), expected)
    squares = scores.exp().sum(-1).log() ** 2
    torch.testing.assert_close(router_z_penalty(scores), squares.mean())
    torch.testing.assert_close(z_penalty(scores), squares.sum())
    even = balance_penalty(torch.zeros(6, 3), torch.arange(6) % 3)
    assert even.item() == pytest.approx(1)


def test_a_balance_loss_teaches_the_router(tmp_path):
    """All tokens at first go to one expert; with the loss they spread."""
    shares = {}
    for weight in (0.0, 0.5):
        folder = tmp_path / str(weight)
        folder.mkdir()
        recipe = tiny_recipe(
            folder,
            model=GATED,
            steps=15,
            learning_rate=1e-2,
            balanced_until=0.0,
            balance_loss=weight,
        )
        data = open_data(recipe)
        model = train(recipe, folder / "run", data)
        seen = []
        hook = model.moe_layers()[1].register_forward_pre_hook(
            lambda layer, inputs, seen=seen: seen.append(layer.scores(inputs[0].flatten(0, -2)))
        )
        with torch.no_grad():
            label_scores(model, data.train.batch(9, 9), "fp32")
        hook.remove()
        counts = torch.bincount(torch.cat(seen).argmax(-1), minlength=4)
        shares[weight] = float(counts.max() / counts.sum())
    assert shares[0.5] < shares[0.0]


def test_noise_is_the_same_for_the_same_batch_and_ends_with_it():
    model = tiny_model(MOE)
    recipe = TrainRecipe(steps=1, router_noise=5.0)
    layer = model.moe_layers()[0]
    scores = torch.zeros(50, 4)
    with router_options(model, recipe, 3):
        first = layer.assign(scores)
        assert torch.equal(first, layer.assign(scores))
        assert len(first.unique()) == 4
        other = model.moe_layers()[1].assign(scores)
    assert layer.assign is assign_greedy
    assert not torch.equal(first, other)
    with router_options(model, recipe, 4):
        assert not torch.equal(first, layer.assign(scores))
    assert torch.equal(noisy_assign(assign_greedy, 0.0, 1)(scores), assign_greedy(scores))


def test_dropped_experts_leave_a_token_as_it_is():
    model = tiny_model(MOE)
    layer = model.moe_layers()[0]
    x = torch.randn(200, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        plain = layer(x, model.experts)
        with router_options(model, TrainRecipe(steps=1, expert_drop=0.25), 0):
            dropped = layer(x, model.experts)
    same = (dropped == x).all(-1)
    assert 0.15 < same.float().mean() < 0.35
    torch.testing.assert_close(
        (dropped - x)[~same], (plain - x)[~same] / 0.75, rtol=1e-4, atol=1e-5
    )


def test_options_that_do_not_fit_the_model_are_refused(tmp_path):
    for how, message in [
        ({"router_noise": 0.1}, "need a model with experts"),
        ({"expert_drop": 0.1}, "need a model with experts"),
        ({"model": MOE, "balance_loss": 0.1}, "cpm_2 and default are not trained"),
        ({"model": MOE, "expert_parallel": 3}, "expert_parallel is 3; it must divide num_experts"),
        ({"expert_parallel": 2}, "expert_parallel is 2; it must divide num_experts, 0"),
        ({"expert_parallel": 0}, "expert_parallel is 0; it must be at least 1"),
        ({"submodel_until": 1.5}, "submodel_until is 1.5; allowed: 0 to 1"),
        ({"ema": 1.0}, "ema is 1.0; allowed: 0 to less than 1"),
        ({"z_loss": -1.0}, "z_loss is -1.0; it must be 0 or more"),
    ]:
        with pytest.raises(ConfigError, match=message):
            tiny_recipe(tmp_path, **how)


def test_groups_are_evaluated_apart(tmp_path):
    recipe = tiny_recipe(tmp_path, names=("a", "b"))
    train(recipe, tmp_path / "run", open_data(recipe))
    row = rows(tmp_path / "run")[-1]
    losses = [row["valid_loss_a"], row["valid_loss_b"]]
    assert losses[0] != losses[1]
    assert min(losses) - 0.1 < row["valid_loss"] < max(losses) + 0.1


def test_a_full_disk_stops_cleanly(tmp_path):
    """The kernel refuses to let a file grow, as a full disk does; then there is room again."""
    recipe = tiny_recipe(tmp_path)
    data = open_data(recipe)
    train(recipe, tmp_path / "whole", data)
    with pytest.raises(Killed):
        train(recipe, tmp_path / "run", data, kill_after(3))
    state = (tmp_path / "run" / "state.safetensors").read_bytes()
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(state) // 2, old[1]))
    try:
        with pytest.raises(OSError, match="the state before it is kept"):
            train(recipe, tmp_path / "run", data)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert (tmp_path / "run" / "state.safetensors").read_bytes() == state
    assert not (tmp_path / "run" / "state.safetensors.partial").exists()
    train(recipe, tmp_path / "run", data)
    assert rows(tmp_path / "run") == rows(tmp_path / "whole")


def test_a_loss_that_is_no_number_leaves_the_last_state(tmp_path):
    recipe = tiny_recipe(tmp_path)
    data = open_data(recipe)
    with pytest.raises(Killed):
        train(recipe, tmp_path / "run", data, kill_after(3))
    path = tmp_path / "run" / "state.safetensors"
    state = path.read_bytes()
    wild = replace(recipe, train=replace(recipe.train, learning_rate=1e30, clip=1e30))
    with pytest.raises(FloatingPointError, match="lower learning_rate"):
        train(wild, tmp_path / "run", data)
    assert path.read_bytes() == state


def test_a_grown_state_begins_a_new_average(tmp_path):
    model = tiny_model(SMALL)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    tensors = {f"model.{name}": t for name, t in model.state_dict().items()}
    write_state(tmp_path, {"step": 0, "optimizer": "SGD"}, tensors)
    average = Average(model, 0.5)
    assert load_state(tmp_path, model, optimizer, average.weights) == 0
    save_state(tmp_path, 2, model, optimizer, None, note="kept")
    facts = {}
    with pytest.raises(ValueError, match="cannot be resumed with this recipe"):
        load_state(tmp_path, model, optimizer, average.weights)
    assert load_state(tmp_path, model, optimizer, None, facts) == 2
    assert facts["note"] == "kept"


def test_the_record_of_a_run_names_its_folder(tmp_path):
    recipe = tiny_recipe(tmp_path)
    model = train(recipe, tmp_path / "run", open_data(recipe))
    save_model(model, tmp_path / "run" / "model", dtype=torch.float32)
    assert load_model(tmp_path / "run" / "model").config == SMALL
    record = json.loads((tmp_path / "run" / "recipe.json").read_text())
    assert record["folder"] == str(tmp_path.resolve())


def start_training(recipe, run):
    command = [sys.executable, "-m", "server", "train", str(recipe), str(run), "--threads", "1"]
    return subprocess.Popen(
        command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


@pytest.mark.slow
def test_kills_at_random_points_change_nothing(tmp_path):
    """kill -9 at any instant, with a teacher, its cache and averaged weights."""
    tiny_recipe(tmp_path)  # for its texts
    save_model(tiny_model(SMALL, 7), tmp_path / "teacher", dtype=torch.float32)
    path = tmp_path / "recipe.toml"
    path.write_text(RECIPE)
    recipe = read_recipe(path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # sums are split the same way as in the command
    try:
        whole = train(recipe, tmp_path / "whole", open_data(recipe))
    finally:
        torch.set_num_threads(threads)
    chance = random.Random(5)
    metrics = tmp_path / "run" / "metrics.jsonl"
    for _ in range(3):
        process = start_training(path, tmp_path / "run")
        known = metrics.stat().st_size if metrics.exists() else 0
        wanted = known + chance.randrange(1, 4000)
        while not metrics.exists() or metrics.stat().st_size < wanted:
            if process.poll() is not None:
                break
            time.sleep(0.002)
        process.kill()
        process.communicate()
    process = start_training(path, tmp_path / "run")
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert rows(tmp_path / "run") == rows(tmp_path / "whole")
    model = load_model(tmp_path / "run" / "model", torch.float32)
    for a, b in zip(model.parameters(), whole.parameters(), strict=True):
        assert torch.equal(a, b.detach().to(torch.bfloat16).float())
