"""Translating with NLLB-MoE: codes of languages before the text and before the answer."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from transformers import NllbTokenizer

from engine.checkpoint_any import load_any
from engine.checkpoint_hf import open_huggingface
from engine.convert import convert
from engine.errors import CheckpointError, ConfigError
from engine.generation import generate
from engine.prompt import build_request
from engine.request import Piece, SamplingParams
from engine.scoring import make_question, score
from engine.tokenizer import open_tokenizer
from tests.hf_families import make_oracle
from tests.test_engine_checkpoint_hf import change_config

WORDS = ["\u2581", "\u2581a", "\u2581b", *"abcdefghijklmnopqrstuvwxyz", "zz"]
TEXT = "ab c da bd"


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """A tiny translator with transformers' own tokenizer, and both."""
    directory = tmp_path_factory.mktemp("nllb") / "m"
    marks = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3}
    vocab = marks | {word: 4 + index for index, word in enumerate(WORDS)}
    merges = [("\u2581", "a"), ("\u2581", "b")]
    tokenizer = NllbTokenizer(vocab=vocab, merges=merges, src_lang="eng_Latn")
    oracle = make_oracle("nllb_moe", vocab_size=len(tokenizer))
    with torch.no_grad():  # codes of languages, which we never let out, are never the best either
        words = oracle.lm_head.weight[4:19].clone()
        oracle.lm_head.weight.zero_()
        oracle.lm_head.weight[4:34] = torch.cat([words, -words])
    oracle.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return oracle, tokenizer, directory


def answer(directory, prompt, decoder_prompt=""):
    """The tokens of a request, with what the answer begins with."""
    model = load_any(directory)
    tokenizer = open_tokenizer(directory, model.config.tokenizer)
    params = SamplingParams(max_tokens=12, temperature=0.0)
    request = build_request(
        prompt, tokenizer, model.config, params, "r", decoder_prompt=decoder_prompt
    )
    events = generate(model, tokenizer, request)
    return [*request.decoder_ids, *(i for e in events if isinstance(e, Piece) for i in e.token_ids)]


@torch.no_grad()
def expected(oracle, tokenizer, language):
    """What transformers answers in a language; the end of a text is no end."""
    inputs = tokenizer(TEXT, return_tensors="pt")
    forced = tokenizer.convert_tokens_to_ids(language)
    ids = oracle.generate(
        **inputs,
        forced_bos_token_id=forced,
        max_new_tokens=13,
        do_sample=False,
        eos_token_id=None,
    )
    return ids[0, 1:].tolist()


@pytest.mark.parametrize("language", ["fra_Latn", "zho_Hans"])
def test_the_request_names_both_languages(released, language):
    oracle, tokenizer, directory = released
    ours = open_tokenizer(directory, "tokenizer_json")
    assert [*ours.encode(f"eng_Latn {TEXT}"), 2] == tokenizer(TEXT).input_ids
    found = answer(directory, f"eng_Latn {TEXT}", language)
    assert found == expected(oracle, tokenizer, language)
    assert found[0] == ours.encode(language)[0]


def test_the_config_may_tell_what_an_answer_begins_with(released, tmp_path):
    oracle, tokenizer, _ = released
    directory = shutil.copytree(released[2], tmp_path / "m")
    forced = tokenizer.convert_tokens_to_ids("fra_Latn")
    told = {"forced_bos_token_id": forced}
    (directory / "generation_config.json").write_text(json.dumps(told))
    found = answer(directory, f"eng_Latn {TEXT}")
    assert found == expected(oracle, tokenizer, "fra_Latn")
    other = answer(directory, f"eng_Latn {TEXT}", "zho_Hans")  # the request goes first
    assert other == expected(oracle, tokenizer, "zho_Hans") != found
    convert(directory, tmp_path / "native")
    assert answer(tmp_path / "native", f"eng_Latn {TEXT}") == found


def test_choices_are_scored_after_what_the_config_tells(released):
    _, tokenizer, directory = released
    ids = (tokenizer.convert_tokens_to_ids("fra_Latn"),)
    model, ours = load_any(directory), open_tokenizer(directory, "tokenizer_json")

    def scores(begin, decoder_prompt):
        config = replace(model.config, answer_begin_ids=begin)
        request = build_request(
            f"eng_Latn {TEXT}",
            ours,
            config,
            SamplingParams(max_tokens=1),
            "r",
            decoder_prompt=decoder_prompt,
        )
        return score(model, ours, [make_question(request, [(4, 5), (6,)], ours)])

    assert scores(ids, "") == scores((), list(ids)) == scores((7,), "fra_Latn")
    assert scores(ids, "") != scores((), "")


def test_a_language_that_is_no_token(released, tmp_path):
    oracle, _, _ = released
    oracle.save_pretrained(tmp_path)
    change_config(tmp_path, forced_bos_token_id="fra_Latn")
    with pytest.raises(
        CheckpointError, match="forced_bos_token_id is 'fra_Latn'; expected a whole"
    ):
        open_huggingface(tmp_path)
    change_config(tmp_path, forced_bos_token_id="-")
    config = open_huggingface(tmp_path).config
    with pytest.raises(ConfigError, match="token id 10000 is outside the vocabulary"):
        replace(config, answer_begin_ids=(10000,))
