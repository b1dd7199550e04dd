import json
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from engine.checkpoint import save_model
from engine.config import ModelConfig
from engine.errors import ConfigError
from engine.tokenizer import ByteTokenizer
from tests.tiny import MOE, tiny_model
from tests.training_recipes import SMALL, Killed, kill_after, rows, tiny_recipe
from training.distill import (
    Teaching,
    inheritance_rate,
    match_ids,
    open_teaching,
    prepare_cache,
)
from training.distill_cache import open_cache
from training.flops import forward_flops
from training.loop import open_data, train
from training.losses import TeacherScores, inheritance_loss, keep_likeliest, label_scores
from training.recipe import DistillRecipe, read_recipe
from training.span_corruption import IGNORED
from training.vocabulary_names import Vocabulary, open_vocabulary


def teacher_folder(tmp_path, config: ModelConfig = SMALL, seed=7, name="teacher"):
    save_model(tiny_model(config, seed), tmp_path / name, dtype=torch.float32)
    return name


def random_scores(positions=5, size=11, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, positions, size, generator=generator) * 2


@pytest.mark.parametrize("temperature", [1.0, 2.0, 0.7])
def test_the_divergence_is_that_of_a_plain_loop(temperature):
    student, teacher = random_scores()
    total = 0.0
    for s, t in zip(student.tolist(), teacher.tolist(), strict=True):
        p = [2.718281828459045 ** (x / temperature) for x in t]
        q = [2.718281828459045 ** (x / temperature) for x in s]
        for a, b in zip(p, q, strict=True):
            a, b = a / sum(p), b / sum(q)
            total += a * torch.log(torch.tensor(a / b)).item()
    found = inheritance_loss(student, TeacherScores(teacher.log_softmax(-1)), temperature)
    assert found.item() == pytest.approx(total * temperature**2, rel=1e-4)


def test_all_tokens_kept_are_all_tokens():
    student, teacher = random_scores()
    student.requires_grad_()
    logs = teacher.log_softmax(-1)
    whole = inheritance_loss(student, keep_likeliest(logs, 0), 2.0)
    kept = inheritance_loss(student, keep_likeliest(logs, 11), 2.0)
    assert keep_likeliest(logs, 99).logs_NK.shape == (5, 11)
    torch.testing.assert_close(kept, whole)
    (a,) = torch.autograd.grad(whole, student)
    (b,) = torch.autograd.grad(kept, student)
    torch.testing.assert_close(a, b)


def test_the_likeliest_tokens_are_made_to_sum_to_one():
    student, teacher = random_scores()
    logs, ids = teacher.log_softmax(-1).topk(3)
    p = logs.exp() / logs.exp().sum(-1, keepdim=True)
    q = student.log_softmax(-1).gather(1, ids)
    expected = (p * (p.log() - q)).sum()
    found = inheritance_loss(student, keep_likeliest(teacher.log_softmax(-1), 3), 1.0)
    torch.testing.assert_close(found, expected)


def test_a_student_that_agrees_learns_nothing_more():
    student = random_scores()[0].requires_grad_()
    loss = inheritance_loss(student, TeacherScores(student.detach().log_softmax(-1)), 2.0)
    assert loss.item() == pytest.approx(0, abs=1e-5)
    loss.backward()
    assert student.grad.abs().max() < 1e-5


def test_schedules_of_the_inheritance_rate():
    def rates(**how):
        recipe = DistillRecipe(teachers=("t",), inherit_share=0.4, **how)
        return [inheritance_rate(step, 10, recipe) for step in range(10)]

    assert rates() == pytest.approx([1, 0.75, 0.5, 0.25, 0, 0, 0, 0, 0, 0])
    assert rates(schedule="heaviside") == [1.0] * 4 + [0.0] * 6
    assert rates(schedule="constant", rate=0.5) == [0.5] * 4 + [0.0] * 6
    none = DistillRecipe(teachers=("t",), inherit_share=0.0)
    assert inheritance_rate(0, 10, none) == 0


def test_a_rate_of_zero_is_no_teacher_bit_for_bit(tmp_path):
    distill = {"teachers": (teacher_folder(tmp_path),), "rate": 0.0, "stop_when_passed": False}
    plain = tiny_recipe(tmp_path, model=MOE)
    taught = tiny_recipe(tmp_path, model=MOE, distill=distill)
    data = open_data(plain)
    alone = train(plain, tmp_path / "alone", data)
    with_teacher = train(taught, tmp_path / "taught", data)
    assert rows(tmp_path / "alone") == rows(tmp_path / "taught")
    for a, b in zip(alone.parameters(), with_teacher.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_teacher_is_charged_and_heard(tmp_path):
    distill = {"teachers": (teacher_folder(tmp_path, MOE),), "inherit_share": 0.5}
    distill |= {"stop_when_passed": False}
    recipe = tiny_recipe(tmp_path, distill=distill)
    data = open_data(recipe)
    train(recipe, tmp_path / "run", data)
    found = rows(tmp_path / "run")
    assert [row.get("inheritance", 0) for row in found] == pytest.approx([1, 2 / 3, 1 / 3, 0, 0, 0])
    assert found[0]["teacher_flops"] == 4 * forward_flops(MOE, 48, 24).total
    assert "teacher_flops" not in found[3]
    assert found[0]["kl"] > 0
    plain = train(replace(recipe, distill=None), tmp_path / "plain", data)
    assert rows(tmp_path / "plain")[0]["loss"] == found[0]["loss"]  # the text's, whoever teaches
    assert rows(tmp_path / "plain")[5]["loss"] != found[5]["loss"]
    assert plain.config == recipe.model


def test_a_cache_says_what_the_teacher_says(tmp_path):
    name = teacher_folder(tmp_path)
    how = {"teachers": (name,), "inherit_share": 1.0, "stop_when_passed": False, "top_k": 384}
    live = tiny_recipe(tmp_path, distill=how)
    cached = tiny_recipe(tmp_path, distill=how | {"cache": "cache"})
    data = open_data(live)
    train(live, tmp_path / "live", data)
    train(cached, tmp_path / "cached", data)
    assert rows(tmp_path / "live") == rows(tmp_path / "cached")
    whole = tiny_recipe(tmp_path, distill=how | {"top_k": 0})
    train(whole, tmp_path / "whole", data)
    for a, b in zip(rows(tmp_path / "whole"), rows(tmp_path / "live"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
    before = (tmp_path / "cache" / "cache.json").stat().st_mtime_ns
    train(cached, tmp_path / "again", data)
    assert (tmp_path / "cache" / "cache.json").stat().st_mtime_ns == before
    assert not (tmp_path / "cache.partial").exists()


def test_a_cache_of_something_else_is_refused(tmp_path):
    how = {"teachers": (teacher_folder(tmp_path),), "top_k": 4, "cache": "cache"}
    recipe = tiny_recipe(tmp_path, distill=how)
    data = open_data(recipe)
    teaching = open_teaching(recipe)
    prepare_cache(teaching, recipe, data.train, 3)
    assert teaching.cache.read(2).logs_NK.shape[1] == 4
    with pytest.raises(ValueError, match="holds 3 batches, 4 are needed"):
        prepare_cache(teaching, recipe, data.train, 4)
    other = tiny_recipe(tmp_path, distill=how, seed=2)
    with pytest.raises(ValueError, match="was made of other texts, settings or teachers"):
        prepare_cache(open_teaching(other), other, data.train, 3)
    teacher_folder(tmp_path, seed=8, name="second")
    other = tiny_recipe(tmp_path, distill=how | {"teachers": ("second",)})
    with pytest.raises(ValueError, match="was made of other"):
        prepare_cache(open_teaching(other), other, data.train, 3)
    (tmp_path / "cache" / "logs.npy").write_bytes(b"short")
    with pytest.raises(ValueError, match="not a readable cache"):
        open_cache(tmp_path / "cache", "key", 1)


def test_teaching_ends_when_the_student_is_as_good(tmp_path):
    """A random teacher is soon passed; a resumed run knows that it was."""
    how = {"teachers": (teacher_folder(tmp_path),), "inherit_share": 1.0, "schedule": "constant"}
    recipe = tiny_recipe(tmp_path, distill=how | {"rate": 0.1}, learning_rate=1e-2)
    data = open_data(recipe)
    train(recipe, tmp_path / "whole", data)
    found = rows(tmp_path / "whole")
    assert found[2]["valid_loss"] <= found[2]["teacher_valid_loss"]
    assert [("kl" in row) for row in found] == [True] * 3 + [False] * 3
    for cut in (2, 3, 5):
        with pytest.raises(Killed):
            train(recipe, tmp_path / f"cut{cut}", data, kill_after(cut))
        train(recipe, tmp_path / f"cut{cut}", data)
        assert rows(tmp_path / f"cut{cut}") == found


def test_generations_name_the_run_before(tmp_path):
    first = tiny_recipe(tmp_path)
    data = open_data(first)
    model = train(first, tmp_path / "one", data)
    save_model(model, tmp_path / "one" / "model", dtype=torch.float32)
    second = tiny_recipe(tmp_path, model=replace(SMALL, d_model=24), distill={"teachers": ("one",)})
    model = train(second, tmp_path / "two", data)
    save_model(model, tmp_path / "two" / "model", dtype=torch.float32)
    third = tiny_recipe(tmp_path, distill={"teachers": ("two", "one"), "temperature": 1.0})
    train(third, tmp_path / "three", data)
    assert [row["step"] for row in rows(tmp_path / "three")] == list(range(1, 7))


@torch.no_grad()
def test_several_teachers_teach_the_mean_of_their_probabilities(tmp_path):
    names = (teacher_folder(tmp_path), teacher_folder(tmp_path, MOE, 8, "other"))
    recipe = tiny_recipe(tmp_path, distill={"teachers": names})
    batch = open_data(recipe).train.batch(1, 0)
    teaching = open_teaching(recipe)
    expected = sum(
        label_scores(tiny_model(config, seed), batch, "fp32")[0].softmax(-1)
        for config, seed in ((SMALL, 7), (MOE, 8))
    )
    torch.testing.assert_close(teaching.compute(batch).logs_NK.exp(), expected / 2)


@torch.no_grad()
def test_the_loss_that_is_to_be_passed_leaves_special_tokens_out(tmp_path):
    recipe = tiny_recipe(tmp_path, distill={"teachers": (teacher_folder(tmp_path),)})
    data = open_data(recipe)
    teaching = open_teaching(recipe)
    batch = data.valid.batch(0, 0)
    teaching.measure([batch], data.special_ids)
    logits = tiny_model(SMALL, 7)(*batch[:4])
    counted = (batch.labels_BT != IGNORED) & (batch.labels_BT < 259)
    expected = F.cross_entropy(logits[counted], batch.labels_BT[counted])
    assert teaching.valid_loss == pytest.approx(expected.item(), rel=1e-5)


def permuted_bytes(order) -> Vocabulary:
    plain = open_vocabulary(None, "bytes")
    names = tuple(plain.names[i] for i in order)
    return Vocabulary("bytes", ByteTokenizer(), names, tuple(plain.texts[i] for i in order))


@torch.no_grad()
def test_a_teacher_of_other_ids_is_read_by_string(tmp_path):
    """The same model with its rows in another order says the same."""
    recipe = tiny_recipe(tmp_path, distill={"teachers": (teacher_folder(tmp_path),)})
    batch = open_data(recipe).train.batch(1, 0)
    plain = open_teaching(recipe)
    order = torch.randperm(384, generator=torch.Generator().manual_seed(0))
    student = open_vocabulary(None, "bytes")
    ids = match_ids(student, permuted_bytes(order.tolist()), recipe.model, "other")
    model = tiny_model(SMALL, 7)
    for weight in (model.embedding.weight, model.lm_head.weight):
        weight.copy_(weight[order].clone())
    other = replace(plain.teachers[0], model=model, ids_V=ids)
    mapped = Teaching(plain.recipe, (other,), recipe.model)
    torch.testing.assert_close(mapped.compute(batch).logs_NK, plain.compute(batch).logs_NK)


def test_a_teacher_that_lacks_a_string_is_refused():
    student = open_vocabulary(None, "bytes")
    assert match_ids(student, student, SMALL, "t") is None
    with pytest.raises(ConfigError, match="lacks 1 of the student's tokens, such as '<sentinel 12"):
        match_ids(student, permuted_bytes(range(383)), SMALL, "t")


@torch.no_grad()
def test_rows_that_only_one_of_both_has_do_not_count(tmp_path):
    wide = replace(SMALL, vocab_size=400)
    recipe = tiny_recipe(tmp_path, distill={"teachers": (teacher_folder(tmp_path, wide),)})
    batch = open_data(recipe).train.batch(1, 0)
    logs = open_teaching(recipe).compute(batch).logs_NK
    assert logs.shape[1] == 384
    torch.testing.assert_close(logs.exp().sum(-1), torch.ones(len(logs)))
    recipe = tiny_recipe(
        tmp_path, model=wide, distill={"teachers": (teacher_folder(tmp_path, name="n"),)}
    )
    scores = open_teaching(recipe).compute(batch)
    assert scores.logs_NK.shape[1] == 400
    assert bool(torch.isfinite(inheritance_loss(torch.zeros(len(logs), 400), scores, 2.0)))


def test_the_table_of_a_recipe(tmp_path):
    lines = (
        "[model]\nvocab_size = 384\nd_model = 16\nd_ff = 24\nd_kv = 8\nnum_heads = 2\n"
        'num_encoder_layers = 1\nnum_decoder_layers = 1\ntokenizer = "bytes"\n'
        'eos_token_ids = [1]\n[data]\ntokenizer = "."\n[[data.sources]]\ntrain = "t"\n'
        'valid = "v"\n[train]\nsteps = 1\n[distill]\n'
    )
    path = tmp_path / "recipe.toml"
    path.write_text(lines + 'teachers = ["one", "two"]\ntop_k = 10\ncache = "c"')
    recipe = read_recipe(path)
    assert recipe.distill == DistillRecipe(teachers=("one", "two"), top_k=10, cache="c")
    assert json.loads(json.dumps(recipe.as_run()))["distill"]["teachers"] == ["one", "two"]
    for text, message in [
        ("teachers = []", "teachers is empty"),
        ("teachers = 3", "teachers is 3; expected a list of folders"),
        ("top_k = 3", r"\[distill\] lacks teachers"),
        ('teachers = ["a"]\nrate = 2.0', "rate is 2.0; allowed: 0 to 1"),
        ('teachers = ["a"]\ntemperature = 0.0', "temperature is 0.0"),
        ('teachers = ["a"]\ntop_k = -1', "top_k is -1"),
        ('teachers = ["a"]\ncache = "c"', "cache needs top_k"),
        ('teachers = ["a"]\nstop_when_passed = 1', "expected bool"),
    ]:
        path.write_text(lines + text)
        with pytest.raises(ConfigError, match=message):
            read_recipe(path)
