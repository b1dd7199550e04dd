import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from engine.checkpoint import load_model
from engine.errors import ConfigError
from tests.ports import free_port
from tests.tiny import MOE
from tests.training_recipes import SMALL, recipe_text, rows, tiny_recipe
from training.distributed import ALONE, Workers, open_workers
from training.loop import open_data, train
from training.recipe import read_recipe
from training.state import STATE_FILE, read_state

ROOT = Path(__file__).parents[1]
PAIR = Workers(0, 2)
TRAIN = {"accumulation": 2, "learning_rate": 3e-3, "schedule": "constant"}


def write_recipe(path: Path, steps: int, *, experts: int = 0, **train):
    """A recipe of 2 x 2 rows a step, and what it reads."""
    model = {"num_experts": experts, "router": "base_layer"}
    path.write_text(recipe_text(model=model, train=TRAIN | {"steps": steps} | train))
    return read_recipe(path)


def start_pair(recipe: Path, run: Path) -> list[subprocess.Popen]:
    """Two processes with what torchrun tells its own."""
    told = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    command = [sys.executable, "-m", "server", "train", str(recipe), str(run), "--threads", "1"]
    return [
        subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ | told | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]


def train_pair(recipe: Path, run: Path) -> list[str]:
    found, processes = [], start_pair(recipe, run)
    try:
        for process in processes:
            out, err = process.communicate(timeout=300)
            assert process.returncode == 0, err[-2000:]
            found.append(out.strip())
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return found


def compare_rows(found: Path, wanted: Path) -> None:
    for a, b in zip(rows(found), rows(wanted), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["norm"] == pytest.approx(b["norm"], rel=1e-3)
        assert a.get("valid_loss", 0) == pytest.approx(b.get("valid_loss", 0), rel=1e-5)


def test_two_processes_have_the_losses_of_one_and_each_goes_on_as_the_other(tmp_path):
    tiny_recipe(tmp_path)
    path, run, other = tmp_path / "recipe.toml", tmp_path / "run", tmp_path / "other"
    recipe = write_recipe(path, 4)
    data = open_data(recipe)
    alone = train(recipe, tmp_path / "alone", data)
    write_recipe(path, 2)
    train_pair(path, run)
    assert not (run / STATE_FILE).exists()
    assert sorted(p.name for p in run.glob("state-*")) == ["state-00000002"]
    shards = list((run / "state-00000002").glob("*.safetensors"))
    assert len(shards) == 2
    assert all(shard.stat().st_size > 1000 for shard in shards)  # neither has all
    shutil.copytree(run, other)
    write_recipe(path, 4)
    train_pair(path, run)
    for p, q in zip(train(recipe, other, data).parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(p.detach(), q.detach(), rtol=1e-3, atol=1e-5)
    assert (other / STATE_FILE).exists()
    assert not list(other.glob("state-*"))  # of two states the last one counts, and stays
    assert sorted(p.name for p in run.glob("state-*")) == ["state-00000004"]
    for found in (run, other):
        compare_rows(found, tmp_path / "alone")
    _, tensors = read_state(run / "state-00000004")
    for name, value in read_state(other / STATE_FILE)[1].items():
        torch.testing.assert_close(tensors[name], value, rtol=1e-3, atol=1e-5)


def test_experts_on_two_processes_learn_as_on_one(tmp_path):
    """The first half of the run is one process's; then tokens travel, and gradients back."""
    tiny_recipe(tmp_path)
    path, run = tmp_path / "recipe.toml", tmp_path / "run"
    how = {"experts": 4, "balanced_until": 0.5, "expert_parallel": 2, "checkpointing": True}
    recipe = write_recipe(path, 4, **how)
    data = open_data(recipe)
    train(recipe, tmp_path / "alone", data)
    first = replace(recipe.train, steps=2, balanced_until=1.0)
    train(replace(recipe, train=first), run, data)
    assert train_pair(path, run) == [str(run / "model"), ""]
    compare_rows(run, tmp_path / "alone")
    expected = read_state(tmp_path / "alone" / STATE_FILE)[1]
    _, tensors = read_state(run / "state-00000004")
    assert tensors.keys() == expected.keys()
    for name, value in expected.items():  # first moments are sums of gradients
        bound = 1e-3 * float(value.abs().max()) + 1e-9
        assert float((tensors[name] - value).abs().max()) <= bound, name
    model = load_model(run / "model", torch.float32)
    for name, value in model.state_dict().items():  # it is written in bf16
        torch.testing.assert_close(value, expected[f"model.{name}"], rtol=1e-2, atol=1e-3)
    more = replace(recipe, train=replace(recipe.train, steps=5))
    train(more, run, data)
    assert len(rows(run)) == 5


def test_what_several_processes_cannot_share_is_refused(tmp_path):
    recipe = tiny_recipe(tmp_path, model=replace(SMALL, num_experts=MOE.num_experts))
    PAIR.check(recipe)
    for change, message in [
        ({"accumulation": 3}, "accumulation is 3; the 2 processes share"),
        ({"optimizer": "muon"}, "train with optimizer adamw and without ema"),
        ({"ema": 0.9}, "train with optimizer adamw and without ema"),
        ({"submodel_until": 0.5, "submodel_layers": 1}, "sub-models train in one process"),
        ({"expert_parallel": 4}, "expert_parallel is 4; it must divide the number of processes, 2"),
    ]:
        changed = replace(recipe, train=replace(recipe.train, **change))
        with pytest.raises(ConfigError, match=message):
            PAIR.check(changed)
        ALONE.check(changed)


def test_each_process_takes_its_share():
    shares = [Workers(rank, 3).share(range(7)) for rank in range(3)]
    assert shares == [[0, 3, 6], [1, 4], [2, 5]]
    assert [Workers(rank, 3).is_first for rank in range(3)] == [True, False, False]


def test_one_process_needs_no_communication(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with open_workers() as workers:
        assert workers == ALONE
        workers.wait()
        assert workers.sum(3.0) == 3.0
        model = torch.nn.Linear(2, 2)
        assert workers.shard(model) is model
        assert workers.gather(model) is model
