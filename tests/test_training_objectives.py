from dataclasses import replace

import numpy as np
import pytest
import torch

from engine.errors import ConfigError
from tests.training_recipes import tiny_recipe
from training.loop import open_data
from training.objectives import MODE_TOKENS, make_denoisers
from training.recipe import DataRecipe
from training.span_corruption import IGNORED, Objective

OBJECTIVE = Objective(sentinel_ids=tuple(range(259, 384)), start_id=0, end_id=1, pad_id=0)
MODES = {"R": 300, "S": 301, "X": 302}


def restore(example):
    """The document that an example was made of, sentinels replaced by what they stand for."""
    spans, current = {}, None
    for token in example.targets.tolist():
        if token >= 259:
            current = token
            spans[current] = []
        else:
            spans[current].append(token)
    whole = []
    for token in example.encoder.tolist():
        whole += spans[token] if token >= 259 else [token]
    return whole


@pytest.mark.parametrize("name", ["prefix_lm", "ul2"])
def test_no_token_is_lost(name):
    document = np.arange(3, 120)
    for denoiser in make_denoisers(name, OBJECTIVE):
        for seed in range(5):
            example = denoiser.make(document, np.random.default_rng(seed), is_end=False)
            assert restore(example) == document.tolist()


def test_the_mixture_of_ul2():
    denoisers = make_denoisers("ul2", OBJECTIVE, MODES)
    assert [d.kind for d in denoisers] == ["R", "R", "X", "X", "X", "X", "S"]
    assert sum(d.share for d in denoisers) == pytest.approx(1)
    document = np.arange(3, 203)
    taken = []
    for denoiser in denoisers:
        examples = [
            denoiser.make(document, np.random.default_rng(seed), is_end=False) for seed in range(60)
        ]
        assert all(example.encoder[0] == MODES[denoiser.kind] for example in examples)
        text = [int((example.targets < 259).sum()) for example in examples]
        taken.append(float(np.mean(text)) / len(document))
    assert taken[:6] == pytest.approx([0.15, 0.15, 0.5, 0.5, 0.15, 0.5], abs=0.01)
    assert taken[6] == pytest.approx(0.25, abs=0.05)


def test_spans_are_as_long_as_the_denoiser_says():
    document = np.arange(3, 203)
    rng = np.random.default_rng(0)
    spans = []
    for denoiser in make_denoisers("ul2", OBJECTIVE)[:6]:
        example = denoiser.make(document, rng, is_end=True)
        spans.append(int((example.targets >= 259).sum()) - 1)  # and the closing one
    assert spans == [10, 4, 33, 12, 1, 2]


def test_a_continued_text_ends_only_where_it_ends():
    (denoiser,) = make_denoisers("prefix_lm", OBJECTIVE)
    document = np.arange(3, 43)
    rng = np.random.default_rng(0)
    assert denoiser.make(document, rng, is_end=True).targets[-1] == 1
    assert denoiser.make(document, rng, is_end=False).targets[-1] != 1
    (*_, suffix) = make_denoisers("ul2", OBJECTIVE)
    example = suffix.make(document, rng, is_end=True)
    assert (example.encoder[-1], example.targets[0], example.targets[-1]) == (383, 383, 1)
    alone = suffix.make(document[:1], rng, is_end=False)
    assert (alone.encoder.tolist(), alone.targets.tolist()) == ([3, 383], [383])


@pytest.mark.parametrize("modes", [None, MODES])
def test_what_a_window_asks_for_always_fits(modes):
    for name in ("prefix_lm", "ul2"):
        for denoiser in make_denoisers(name, OBJECTIVE, modes):
            length = denoiser.longest(100, 24)
            for seed in range(5):
                document = np.arange(3, 3 + length)
                example = denoiser.make(document, np.random.default_rng(seed), is_end=True)
                assert len(example.targets) <= 24
                assert len(example.encoder) <= 100


def test_mode_tokens_are_those_of_the_paper():
    assert MODE_TOKENS == {"R": "[NLU]", "S": "[S2S]", "X": "[NLG]"}


@pytest.mark.parametrize("name", ["prefix_lm", "ul2"])
def test_a_recipe_trains_on_it(tmp_path, name):
    recipe = tiny_recipe(tmp_path, data={"objective": name})
    data = open_data(recipe)
    batch = data.train.batch(1, 0)
    assert torch.equal(batch.labels_BT, data.train.batch(1, 0).labels_BT)
    assert int((batch.labels_BT != IGNORED).sum()) > 10
    kinds = {denoiser.kind for denoiser in data.valid.denoisers}
    assert kinds == ({"S"} if name == "prefix_lm" else {"R"})


def test_spans_are_left_to_the_sampler(tmp_path):
    assert make_denoisers("spans", OBJECTIVE) == ()
    assert open_data(tiny_recipe(tmp_path)).train.denoisers == ()


def test_continuation_belongs_to_spans(tmp_path):
    data = tiny_recipe(tmp_path).data
    with pytest.raises(ConfigError, match="it belongs to objective spans"):
        replace(data, objective="ul2", continuation_share=0.5)
    assert isinstance(data, DataRecipe)


def test_mode_tokens_of_a_vocabulary_are_used(tmp_path):
    special = ["<unk>", "<s>", "</s>", "\u2583", "<sep>", "<pad>", "<mask>", "<go>", "<eod>"]
    letters = [chr(c) for c in range(97, 123)]
    tokens = [*special, "\u2581", ",", "\u2582", *MODE_TOKENS.values()]
    tokens += letters + ["##" + c for c in letters] + [f"<s_{i}>" for i in range(20)]
    (tmp_path / "vocab.txt").write_text("".join(t + "\n" for t in tokens), encoding="utf-8")
    recipe = tiny_recipe(tmp_path, data={"objective": "ul2"})
    config = replace(
        recipe.model, vocab_size=len(tokens), tokenizer="cpm2_zh_en", eos_token_ids=(8,)
    )
    data = open_data(replace(recipe, model=config))
    prefixes = {denoiser.kind: denoiser.prefix for denoiser in data.train.denoisers}
    assert prefixes == {"R": (12,), "S": (13,), "X": (14,)}
    assert set(data.train.batch(1, 0).encoder_BS[:, 0].tolist()) <= {12, 13, 14}
