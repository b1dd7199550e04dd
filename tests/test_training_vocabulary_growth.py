"""Another vocabulary: rows go by string, and old tokens score as they did."""

import io
import logging
from dataclasses import replace

import pytest
import sentencepiece
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.checkpoint import save_model
from engine.config import ModelConfig
from engine.errors import ConfigError, TokenizerError
from engine.model.transformer import Transformer
from server.__main__ import main
from tests.growth_cases import ROWS, SMALL, build, random_model
from training.growth import GrowthPlan, describe, grow, prepare_growth
from training.growth_losses import measure_losses
from training.vocabulary_growth import map_vocabulary, regrow_rows, target_ids
from training.vocabulary_names import find_kind, open_vocabulary

ZH = ["<unk>", "<s>", "</s>", "<pad>", "<eod>", "\u2582", "\u2583"]
ZH += ["中", "国", "中国", "人", "c", "a", "t", "ca", "<s_0>", "<s_1>"]
EN = [
    "<unk>",
    "<s>",
    "</s>",
    "<sep>",
    "\u2583",
    "<pad>",
    "<eod>",
    "\u2582",
    "中国",
    "国",
    "人",
    "中",
]
EN += ["cat", "##t", "中国人", "dog", "a", "<mask>", "<s_0>", "<s_1>", "<s_2>"]
CONFIG = replace(
    SMALL,
    vocab_size=len(ZH) + 2,
    tokenizer="cpm2_zh",
    pad_token_id=ZH.index("<pad>"),
    decoder_start_token_id=ZH.index("<s>"),
    eos_token_ids=(ZH.index("<eod>"),),
)


def folder(path, tokens):
    path.mkdir()
    (path / "vocab.txt").write_text("\n".join(tokens), encoding="utf-8")
    return path


@pytest.fixture
def old(tmp_path):
    return open_vocabulary(folder(tmp_path / "zh", ZH), "cpm2_zh")


@pytest.fixture
def new(tmp_path):
    return open_vocabulary(folder(tmp_path / "en", EN), "cpm2_zh_en")


def mapped(old, new, start="mean", **given):
    target = target_ids(CONFIG, old, new, given)
    return target, map_vocabulary(old, new, target, start, seed=1)


def row(mapping, token):
    return [ZH[i] for i in mapping.rows[EN.index(token)]]


def test_tokens_are_matched_by_string_and_the_rest_is_the_mean_of_pieces(old, new):
    target, mapping = mapped(old, new)
    for token in ("中国", "a", "<pad>", "\u2582", "<s_1>", "<eod>"):
        assert row(mapping, token) == [token]
    assert row(mapping, "cat") == ["ca", "t"]
    assert row(mapping, "##t") == ["t"]
    assert row(mapping, "中国人") == ["中国", "人"]
    for token in ("dog", "<mask>", "<sep>", "<s_2>"):  # no piece is known, or no text
        assert row(mapping, token) == []
    report = mapping.report
    assert (report.matched, report.pieces, report.random, report.prefix) == (14, 3, 4, 0)
    assert report.matched + report.pieces + report.random + report.unnamed == target.vocab_size
    assert report.same_id == sum(a == b for a, b in zip(ZH, EN, strict=False))
    assert report.dropped == len(ZH) - 14  # c, t, ca
    assert "14 matched" in report.summary()


def test_cpm_2_copies_the_longest_prefix_or_a_token_at_random(old, new):
    _, mapping = mapped(old, new, "prefix")
    assert row(mapping, "cat") == ["ca"]
    assert row(mapping, "中国人") == ["中国"]
    assert len(row(mapping, "dog")) == 1
    assert (mapping.report.prefix, mapping.report.pieces) == (2, 0)


def test_random_rows_have_mean_and_deviation_of_the_old_ones(old, new):
    target, mapping = mapped(old, new, "random", vocab_size=4000)
    state = random_model(CONFIG).state_dict()
    grown = regrow_rows(state, mapping, torch.Generator().manual_seed(1))
    drawn = grown["lm_head.weight"][len(EN) :]
    assert target.vocab_size == 4000
    assert drawn.shape == (4000 - len(EN), CONFIG.d_model)
    before = state["lm_head.weight"]
    assert torch.allclose(drawn.mean(0), before.mean(0), atol=0.03)
    assert torch.allclose(drawn.std(0), before.std(0), rtol=0.1)
    assert mapping.report.random == len(EN) - mapping.report.matched


def scores(model: Transformer, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(ids[0], ROWS, ids[1], ROWS)


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    at = tmp_path_factory.mktemp("vocabularies")
    kinds = ("zh", ZH, "cpm2_zh"), ("en", EN, "cpm2_zh_en")
    return [open_vocabulary(folder(at / name, tokens), kind) for name, tokens, kind in kinds]


@given(
    st.fixed_dictionaries(
        {
            "d_model": st.integers(12, 26),
            "num_heads": st.integers(3, 6),
            "num_decoder_layers": st.integers(2, 4),
            "num_experts": st.sampled_from([0, 3]),
        }
    ),
    st.integers(0, 9),
    st.booleans(),
    st.booleans(),
    st.sampled_from(["mean", "prefix", "random"]),
    st.integers(0, 9),
)
@settings(max_examples=20)
def test_old_tokens_score_as_they_did_with_new_ids_masked(
    both, sizes, spare, tied, scaled, start, seed
):
    old, new = both
    config = replace(CONFIG, tied_embeddings=tied, scale_logits=scaled)
    model = random_model(config, seed)
    target = target_ids(config, old, new, {"vocab_size": len(EN) + spare})
    mapping = map_vocabulary(old, new, target, start, seed=seed)
    plan = GrowthPlan(target=replace(target, router="cpm_2", **sizes))
    growth = prepare_growth(config, plan, mapping)
    assert growth.is_exact
    assert describe(growth)[0]["matched"] == 14
    grown = build(growth.target, grow(model.state_dict(), growth))
    new_ids, old_ids = mapping.old_ids()
    assert [EN[i] for i in new_ids] == [ZH[i] for i in old_ids]
    picked = torch.randint(14, (2, 2, 8), generator=torch.Generator().manual_seed(3))
    before = scores(model, old_ids[picked])[..., old_ids]
    after = scores(grown, new_ids[picked])[..., new_ids]
    assert float((before - after).abs().max()) <= 1e-5
    masked = torch.full_like(scores(grown, new_ids[picked]), float("-inf"))
    masked[..., new_ids] = after
    kept = before.log_softmax(-1)
    assert torch.allclose(masked.log_softmax(-1)[..., new_ids], kept, atol=1e-5)


def test_vocabulary_alone_is_exact_to_the_bit(old, new):
    model = random_model(CONFIG)
    target, mapping = mapped(old, new)
    growth = prepare_growth(CONFIG, GrowthPlan(target=target), mapping)
    grown = build(growth.target, grow(model.state_dict(), growth))
    new_ids, old_ids = mapping.old_ids()
    for name in ("embedding.weight", "lm_head.weight"):
        assert torch.equal(grown.state_dict()[name][new_ids], model.state_dict()[name][old_ids])


def test_losses_on_the_old_language_are_told_with_and_without_new_ids(tmp_path, capsys):
    save_model(
        random_model(CONFIG), tmp_path / "small", [folder(tmp_path / "zh", ZH) / "vocab.txt"]
    )
    text = tmp_path / "text.txt"
    text.write_text("中国人中国人中国人中国人中国人c\n" * 20, encoding="utf-8")
    grow = ["grow", str(tmp_path / "small"), "--vocab", str(folder(tmp_path / "en", EN))]
    with pytest.raises(SystemExit) as done:
        main([*grow, "--text", str(text), "--out", str(tmp_path / "big")])
    told = capsys.readouterr().err
    assert not done.value.code, told
    found = measure_losses(tmp_path / "small", tmp_path / "big", [text], is_other_vocabulary=True)
    assert found.masked == pytest.approx(found.before, abs=1e-5)
    assert found.after > found.before + 1e-3  # new ids take probability away
    assert found.lost == 20  # c
    assert found.summary() == told.splitlines()[-2:]
    assert f"{found.masked:.4f} with the new ids masked" in told


def test_the_kind_of_a_vocabulary_is_found(tmp_path, old, new):
    assert find_kind(tmp_path / "zh") == "cpm2_zh"
    assert find_kind(tmp_path / "en") == "cpm2_zh_en"
    with pytest.raises(TokenizerError, match=r"holds no vocab.txt or spiece.model"):
        find_kind(tmp_path)
    (tmp_path / "spiece.model").write_bytes(b"")
    assert find_kind(tmp_path) == "sentencepiece"


def test_vocabularies_without_sentinels_in_common_are_not_compared(tmp_path):
    tokens = folder(tmp_path / "zh", ZH) / "vocab.txt"
    save_model(random_model(CONFIG), tmp_path / "small", [tokens])
    few = folder(tmp_path / "few", ["<none>" if t == "<s_1>" else t for t in ZH]) / "vocab.txt"
    save_model(random_model(CONFIG), tmp_path / "other", [few])
    with pytest.raises(ConfigError, match="share no two sentinels, such as <sentinel 0>"):
        measure_losses(tmp_path / "small", tmp_path / "other", [tokens], is_other_vocabulary=True)


def test_special_ids_go_by_name(old, new):
    target, _ = mapped(old, new)
    assert target.tokenizer == "cpm2_zh_en"
    assert target.vocab_size == len(EN)
    assert EN[target.pad_token_id] == "<pad>"
    assert EN[target.decoder_start_token_id] == "<s>"
    assert [EN[i] for i in target.eos_token_ids] == ["<eod>"]
    given, _ = mapped(old, new, vocab_size=64, pad_token_id=0)
    assert (given.vocab_size, given.pad_token_id) == (64, 0)


def test_sentinels_of_other_kinds_of_vocabulary_go_by_number(tmp_path, old):
    plain = open_vocabulary(tmp_path, "bytes")
    config = ModelConfig(**{**vars_of(CONFIG), "decoder_start_token_id": 3})
    given = {"pad_token_id": 0, "decoder_start_token_id": 0, "eos_token_ids": (1,)}
    target = target_ids(config, old, plain, given)
    mapping = map_vocabulary(old, plain, target, "mean", seed=1)
    assert mapping.rows[259] == (ZH.index("<s_0>"),)
    assert mapping.rows[260] == (ZH.index("<s_1>"),)
    assert mapping.rows[261] == ()
    assert mapping.rows[3 + ord("a")] == (ZH.index("a"),)
    assert plain.names[3] == "<0x00>"
    assert len(plain.names) == 384


def vars_of(config: ModelConfig) -> dict:
    return {name: getattr(config, name) for name in ModelConfig.__dataclass_fields__}


def test_a_special_token_that_is_missing_must_be_given(tmp_path, old):
    plain = open_vocabulary(tmp_path, "bytes")
    with pytest.raises(ConfigError, match="decoder_start_token_id: the new vocabulary has no <s>"):
        target_ids(CONFIG, old, plain, {})


def test_a_vocabulary_that_does_not_fit_is_refused(tmp_path, old, new):
    with pytest.raises(TokenizerError, match=f"names {len(EN)} tokens; vocab_size is only 20"):
        mapped(old, new, vocab_size=20)
    strange = replace_names(new, {name: f"!{i}" for i, name in enumerate(new.names)})
    with pytest.raises(TokenizerError, match="share no token"):
        map_vocabulary(old, strange, replace(CONFIG, vocab_size=64), "mean", 1)


def replace_names(vocabulary, names):
    return replace(vocabulary, names=tuple(names[name] for name in vocabulary.names))


def test_few_shared_tokens_are_a_warning(old, new, caplog):
    names = {name: f"!{i}" if i else name for i, name in enumerate(new.names)}
    with caplog.at_level(logging.WARNING):
        map_vocabulary(old, replace_names(new, names), replace(CONFIG, vocab_size=64), "mean", 1)
    assert "only 1 of 17 old tokens survive" in caplog.text


def test_pieces_of_sentencepiece_stand_for_their_text(tmp_path, old):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a cat at a cat"] * 9),
        model_writer=model,
        vocab_size=300,
        hard_vocab_limit=False,
        byte_fallback=True,
        minloglevel=2,
    )
    (tmp_path / "spiece.model").write_bytes(model.getvalue())
    pieces = open_vocabulary(tmp_path, "sentencepiece")
    ids = pieces.ids()
    assert pieces.texts[ids["\u2581cat"]] == "cat"
    assert pieces.texts[ids["<unk>"]] == pieces.texts[ids["<0x41>"]] == ""
    assert pieces.names[pieces.tokenizer.sentinel_id(0)] == "<sentinel 0>"
    given = {"vocab_size": 500, "pad_token_id": 0, "eos_token_ids": (2,)}
    target = target_ids(CONFIG, old, pieces, given)
    prefix = map_vocabulary(old, pieces, target, "mean", seed=1)
    assert prefix.rows[ids["\u2581cat"]] == (ZH.index("ca"), ZH.index("t"))
    back = map_vocabulary(pieces, old, CONFIG, "prefix", seed=1)
    assert len(back.rows[ZH.index("ca")]) == 1
