"""LongRoPE in texts beyond the length that a model was trained on, against transformers."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from engine.checkpoint import open_native
from engine.checkpoint_any import load_any
from engine.checkpoint_hf import open_huggingface
from engine.config import config_from_dict, read_config
from engine.convert import convert, inspect
from engine.errors import ConfigError
from engine.experts import load_offloaded
from engine.footprint import Workload, largest_workload
from engine.loading import load_within, read_storage
from engine.long_texts import lengthen
from server.__main__ import main
from tests.hf_families import assert_equal_to_oracle, make_oracle, ragged_prompts
from tests.json_tokenizers import train_byte_level
from tests.t5_oracle import one_thread

LONG = (70, 90, 66)  # beyond 64, for which it was trained, and with their answers within 128
LOAD = Workload(source_tokens=128, target_tokens=32)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Writes a family's directory on the first demand, and tells its oracle and where it is."""
    root, made = tmp_path_factory.mktemp("hf"), {}

    def get(name):
        if name not in made:
            made[name] = make_oracle(name)
            made[name].save_pretrained(root / name)
            if name == "phimoe-longrope":
                # That of transformers 5.23 asks for frequencies without telling the length, and so
                # gets those for short texts, with the magnitude for long ones.
                positions = made[name].model.rotary_emb
                positions.rope_init_fn = partial(positions.rope_init_fn, seq_len=128)
        return made[name], root / name

    return get


@pytest.mark.parametrize("name", ["llama-longrope", "phimoe-longrope"])
def test_long_texts_equal_transformers(saved, name):
    oracle, directory = saved(name)
    loaded = load_within(directory, torch.float32, None, None, workload=LOAD, max_model_len=128)
    assert loaded.model.config.max_positions == 128
    assert_equal_to_oracle(loaded.model, oracle, lengths=LONG)
    loaded.close()


def test_texts_within_the_length_are_read_as_before_where_longer_ones_are_not_wanted(saved):
    oracle, directory = saved("llama-longrope")
    loaded = load_within(directory, torch.float32, None, None, workload=LOAD, max_model_len=64)
    assert loaded.model.config.max_positions == 64
    assert_equal_to_oracle(loaded.model, oracle)
    loaded.close()


@one_thread()
@torch.no_grad()
def test_offloaded_equals_resident(saved, tmp_path):
    directory = saved("phimoe-longrope")[1]
    convert(directory, tmp_path / "native")
    config = read_storage(directory, max_model_len=128).config
    assert read_storage(tmp_path / "native", max_model_len=128).config == config
    tokens_BS, segments_BS = ragged_prompts(lengths=LONG)
    resident = load_any(directory, config=config)
    expected = resident.logits(resident.read(tokens_BS, segments_BS))
    stored = load_any(tmp_path / "native", config=config)
    assert torch.equal(stored.logits(stored.read(tokens_BS, segments_BS)), expected)
    blob_bytes = inspect(tmp_path / "native")["experts"]["blob_bytes"]
    model, experts = load_offloaded(tmp_path / "native", None, 4 * blob_bytes, config=config)
    with experts:
        assert torch.equal(model.logits(model.read(tokens_BS, segments_BS)), expected)
        assert experts.stats.evictions > 0
    short = load_any(directory)
    assert not torch.allclose(short.logits(short.read(tokens_BS, segments_BS)), expected, atol=1e-2)


def test_how_long_it_becomes(saved):
    config = open_huggingface(saved("phimoe-longrope")[1]).config
    assert lengthen(config, 0) is lengthen(config, 64) is config
    longer = lengthen(config, 100)
    assert (longer.max_positions, longer.max_prompt_tokens) == (100, 100)
    assert longer.rotary == config.long_rotary != config.rotary
    assert (config.rotary.attention_factor, longer.rotary.attention_factor) == (1.2, 1.3)
    assert lengthen(config, 1000).max_positions == 128
    assert largest_workload(longer).source_tokens > largest_workload(config).source_tokens
    other = open_huggingface(saved("llama")[1]).config
    assert lengthen(other, 10**6) is other


def test_it_is_kept_by_a_conversion(saved, tmp_path):
    config = open_huggingface(saved("llama-longrope")[1]).config
    convert(saved("llama-longrope")[1], tmp_path / "native")
    assert open_native(tmp_path / "native").config == config
    assert read_config(tmp_path / "native" / "config.json").long_positions == 128


def test_one_does_not_go_without_the_other(saved):
    config = open_huggingface(saved("llama-longrope")[1]).config
    with pytest.raises(ConfigError, match="one is there without the other"):
        replace(config, long_rotary=None)
    with pytest.raises(ConfigError, match="long_rotary is 3; expected an object"):
        config_from_dict({"long_rotary": 3})


def test_commands_read_long_texts_on_demand(tmp_path, capsys):
    make_oracle("llama-longrope", vocab_size=300).save_pretrained(tmp_path)
    train_byte_level(300).save(str(tmp_path / "tokenizer.json"))
    text = "1" * 80
    for command in (["generate", "--max-tokens", "4"], ["score", "--choice", "a", "--choice", "b"]):
        for options, code in (([], 1), (["--max-model-len", "128"], 0)):
            with pytest.raises(SystemExit) as caught:
                main([*command, *options, str(tmp_path), text])
            assert (caught.value.code or 0) == code
            out, err = capsys.readouterr()
            assert bool(out) == (code == 0)
            assert ("the limit is 64" in err) == (code == 1)
        with pytest.raises(SystemExit):
            main([*command, "--max-model-len", "90", str(tmp_path), text * 2])
        assert "the limit is 90" in capsys.readouterr().err
    choices = ["--choice", "a", "--choice", "2" * 20]
    with pytest.raises(SystemExit):
        main(["score", *choices, "--max-model-len", "90", str(tmp_path), text])
    assert "a choice has 100 tokens; the limit is 90" in capsys.readouterr().err
