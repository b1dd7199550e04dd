import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from engine.checkpoint import load_model
from engine.errors import ConfigError
from tests.tiny import MOE
from tests.training_recipes import SMALL, rows, tiny_recipe
from training.distributed import ALONE, Workers, open_workers
from training.loop import open_data, train
from training.recipe import read_recipe

ROOT = Path(__file__).parents[1]
PAIR = Workers(0, 2)
RECIPE = """
[model]
vocab_size = 384
d_model = 16
d_ff = 24
d_kv = 8
num_heads = 2
num_encoder_layers = 1
num_decoder_layers = 1
num_experts = {experts}
router = "base_layer"
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
[[data.sources]]
train = "a-train.txt"
valid = "a-valid.txt"
[train]
steps = {steps}
rows = 2
accumulation = 2
learning_rate = 3e-3
precision = "fp32"
schedule = "constant"
eval_every = 2
eval_batches = 2
checkpoint_every = 2
"""


def start_pair(recipe: Path, run: Path) -> list[subprocess.Popen]:
    """Two processes with what torchrun tells its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    told = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
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
    found = []
    for process in start_pair(recipe, run):
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err[-2000:]
        found.append(out.strip())
    return found


@pytest.mark.parametrize("experts", [0, 2])
def test_two_processes_have_the_losses_of_one(tmp_path, experts):
    """One half of the run is done by two processes, the other by one; each goes on as the other."""
    tiny_recipe(tmp_path)
    path = tmp_path / "recipe.toml"
    path.write_text(RECIPE.format(experts=experts, steps=4))
    recipe = read_recipe(path)
    data = open_data(recipe)
    alone = train(recipe, tmp_path / "alone", data)
    run = tmp_path / "run"
    if experts:
        first = replace(recipe, train=replace(recipe.train, steps=2))
        train(first, run, data)
        assert train_pair(path, run) == [str(run / "model"), ""]
        model = load_model(run / "model", torch.float32)
        tolerance = {"rtol": 1e-2, "atol": 1e-3}  # it is written in bf16
    else:
        path.write_text(RECIPE.format(experts=experts, steps=2))
        train_pair(path, run)
        model, tolerance = train(recipe, run, data), {"rtol": 1e-3, "atol": 1e-5}
    for a, b in zip(rows(tmp_path / "alone"), rows(run), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["norm"] == pytest.approx(b["norm"], rel=1e-3)
        assert a.get("valid_loss", 0) == pytest.approx(b.get("valid_loss", 0), rel=1e-5)
    for p, q in zip(model.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(p.detach(), q.detach(), **tolerance)


def test_what_several_processes_cannot_share_is_refused(tmp_path):
    recipe = tiny_recipe(tmp_path, model=replace(SMALL, num_experts=MOE.num_experts))
    PAIR.check(recipe)
    for change, message in [
        ({"accumulation": 3}, "accumulation is 3; the 2 processes share"),
        ({"optimizer": "muon"}, "train with optimizer adamw and without ema"),
        ({"ema": 0.9}, "train with optimizer adamw and without ema"),
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
