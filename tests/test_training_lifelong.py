import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from engine.adapters import load_adapter, model_fingerprint
from engine.checkpoint import load_model
from engine.errors import ConfigError
from tests.training_recipes import Killed, recipe_text, rows, write_texts
from training.lifelong import (
    LifelongRecipe,
    Stream,
    average_perplexity,
    keep_memory,
    perplexity_increase,
    prompt_ids,
    read_plan,
    run_lifelong,
)
from training.shards import Shard

RECIPE = recipe_text(
    names=("a", "b"),
    model={"max_positions": 64},
    train={"learning_rate": 1e-2, "eval_every": 4},
    more="""[lifelong]
replay = 0.25
memory = 0.5
recover_steps = 2
[[lifelong.domains]]
group = "a"
steps = 6
[[lifelong.domains]]
group = "b"
grow = "grow.toml"
""",
)


@pytest.fixture
def recipe_file(tmp_path):
    write_texts(tmp_path, ("a", "b"))
    (tmp_path / "grow.toml").write_text("[target]\nd_model = 24\nnum_decoder_layers = 2\n")
    path = tmp_path / "lifelong.toml"
    path.write_text(RECIPE)
    return path


def ignore(_name, _steps):
    return None


def test_a_stream_grows_recovers_and_remembers(recipe_file, tmp_path):
    plan = read_plan(recipe_file)
    seen = []
    facts = run_lifelong(plan, tmp_path / "out", lambda name, steps: seen.append((name, steps)))
    assert seen == [("a", 6), ("b: recovery", 2), ("b", 4)]
    first, second = facts
    assert list(first["perplexity"]) == ["a"]
    assert (first["ap"], first["ap_plus"]) == (pytest.approx(first["perplexity"]["a"]), 0.0)
    both = second["perplexity"]
    assert second["ap"] == pytest.approx(math.sqrt(both["a"] * both["b"]))
    assert second["ap_plus"] == pytest.approx(both["a"] - first["perplexity"]["a"])
    assert any("exact" in line for line in second["growth"])
    model = load_model(tmp_path / "out" / "2-b" / "model", torch.float32)
    assert (model.config.d_model, model.config.num_decoder_layers) == (24, 2)
    for name, token_id in zip("ab", prompt_ids(plan, Stream(plan).data.train), strict=True):
        folder = tmp_path / "out" / "2-b" / "prompts" / name
        adapter = load_adapter(
            folder, model.config, torch.float32, fingerprint=model_fingerprint(model)
        )
        torch.testing.assert_close(adapter.prompt_PD[0], model.embedding.weight[token_id].detach())
    assert run_lifelong(plan, tmp_path / "out", ignore) == facts


def test_a_killed_stream_goes_on(recipe_file, tmp_path):
    plan = read_plan(recipe_file)
    whole = run_lifelong(plan, tmp_path / "whole", ignore)

    def begin(name, _steps):
        def kill(row):
            if name == "b" and row["step"] == 3:
                raise Killed

        return kill

    with pytest.raises(Killed):
        run_lifelong(plan, tmp_path / "cut", begin)
    resumed = run_lifelong(plan, tmp_path / "cut", ignore)
    assert resumed == whole
    assert rows(tmp_path / "cut" / "2-b") == rows(tmp_path / "whole" / "2-b")


def test_replay_has_its_share_and_only_the_memory(recipe_file):
    stream = Stream(read_plan(recipe_file))
    sampler = stream.training(1).train
    assert sampler.shares.tolist() == pytest.approx([0.25, 0.75])
    whole = stream.data.train.shards[0]
    assert sampler.shards[0].num_tokens == pytest.approx(whole.num_tokens / 2, rel=0.1)
    assert sampler.shards[1] is stream.data.train.shards[1]
    assert stream.training(0).train.shares.tolist() == [1.0]
    recovery = stream.training(1, is_recovery=True).train
    assert (len(recovery.shards), recovery.shares.tolist()) == (1, [1.0])


def test_each_domain_has_its_prompt_in_front(recipe_file):
    plan = read_plan(recipe_file)
    stream = Stream(plan)
    assert stream.prompts == [382, 381]  # 383 is the one that continues
    rng = np.random.default_rng(0)
    sampler = stream.training(1).train
    for index, prompt in enumerate(stream.prompts):
        sampler.shares = np.eye(2)[index]
        for _ in range(20):
            example = sampler.example(rng)
            assert example.encoder[0] == prompt
            assert len(example.encoder) <= 48
    assert stream.validation("b").example(rng).encoder[0] == 381
    plain = Stream(replace(plan, settings=replace(plan.settings, prompts=False)))
    assert plain.prompts == []
    assert plain.training(0).train.example(rng).encoder[0] < 300


def test_prompts_need_sentinels_of_their_own(recipe_file):
    plan = read_plan(recipe_file)
    sampler = Stream(plan).data.train
    sampler.objective = replace(sampler.objective, sentinel_ids=(259, 260, 261, 262))
    with pytest.raises(ConfigError, match="are more than the 4 of the vocabulary"):
        prompt_ids(plan, sampler)


def test_memory_is_whole_documents():
    shard = Shard(np.arange(100), np.array([0, 10, 40, 100]))
    assert keep_memory(shard, 0.3).offsets.tolist() == [0, 10, 40]
    assert keep_memory(shard, 0.01).offsets.tolist() == [0, 10]
    assert keep_memory(shard, 1.0).num_tokens == 100


def test_average_perplexity_and_its_increase():
    assert average_perplexity([2.0, 8.0]) == pytest.approx(4.0)
    assert perplexity_increase([[5.0]]) == 0
    assert perplexity_increase([[5.0], [6.0, 7.0], [8.0, 6.0, 9.0]]) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("replay = 0.25", "replay = 1.0", "replay is 1.0; allowed: 0 to less than 1"),
        ("memory = 0.5", "memory = 0.0", "memory is 0.0; allowed: above 0 to 1"),
        ("recover_steps = 2", "recover_steps = -1", "recover_steps is -1"),
        ("recover_steps = 2", "recover = 2", r"\[lifelong\] has unknown keys recover"),
        ('group = "a"\nsteps', 'group = "c"\nsteps', "each group of the sources belongs there"),
        ('[[lifelong.domains]]\ngroup = "a"\nsteps = 6', "", "each group of the sources"),
        ('[[lifelong.domains]]\ngroup = "b"', "[lifelong.other]", "unknown keys other|each group"),
    ],
)
def test_mistakes_are_named(recipe_file, old, new, message):
    assert old in RECIPE
    recipe_file.write_text(RECIPE.replace(old, new))
    with pytest.raises(ConfigError, match=message):
        read_plan(recipe_file)


def test_a_recipe_without_the_table_is_no_stream(recipe_file):
    recipe_file.write_text(RECIPE[: RECIPE.index("[lifelong]")])
    with pytest.raises(ConfigError, match=r"there is no table \[lifelong\]"):
        read_plan(recipe_file)
    recipe_file.write_text(RECIPE[: RECIPE.index("[[lifelong")] + "domains = 3\n")
    with pytest.raises(ConfigError, match="lifelong.domains is no list"):
        read_plan(recipe_file)
    assert LifelongRecipe().replay == 0.1
