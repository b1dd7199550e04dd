"""Upcycling on the disk: expert by expert what growing in memory gives, and dense at first."""

import weakref
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

import training.upcycling as upcycling
from engine.checkpoint import load_model, open_native, save_model
from engine.checkpoint_any import load_any
from engine.checkpoint_streamed import open_streamed
from engine.errors import CheckpointError, ConfigError
from engine.experts import load_offloaded
from engine.generation import generate
from engine.prompt import build_request
from engine.request import Piece, SamplingParams
from engine.tokenizer import open_tokenizer
from server.__main__ import main
from tests.gguf_files import byte_level_metadata
from tests.growth_cases import build, random_model
from tests.hf_families import SIZES
from tests.json_tokenizers import train_byte_level
from tests.test_engine_checkpoint_gguf import make_family, write_family
from tests.tiny import DENSE, LLAMA, byte_tokenizer, random_ids
from training.growth import grow, prepare_growth
from training.growth_files import grow_directory
from training.growth_recipes import mixture_target, read_target
from training.growth_record import read_steps

TOKENIZER = byte_tokenizer()
ROWS = torch.ones(2, 24, dtype=torch.int64)
DEEP = replace(LLAMA, num_decoder_layers=12)  # layer 10 comes before layer 2 in a file
NOISY = """
[target]
num_experts = 3
router = "{}"
[experts]
layers = "{}"
noise = 0.1
drop = 0.3
"""


def save(path, config=LLAMA, dtype=torch.float32):
    save_model(random_model(config).to(dtype), path)
    return path


@torch.no_grad()
def logits(model):
    if model.config.is_decoder_only:
        return model.logits(model.read(random_ids(2, 24), ROWS))
    return model(random_ids(2, 24), ROWS, random_ids(2, 24, 1), ROWS)


def answer(model, tokenizer=TOKENIZER):
    request = build_request("tell me", tokenizer, model.config, SamplingParams(max_tokens=24), "x")
    events = generate(model, tokenizer, request)
    return [token for e in events if isinstance(e, Piece) for token in e.token_ids]


def test_a_llama_becomes_a_mixture_that_answers_the_same(tmp_path):
    small = save(tmp_path / "small")
    receipt = grow_directory(small, mixture_target(4), tmp_path / "moe")
    dense, sparse = load_model(small), load_model(tmp_path / "moe")
    assert receipt.step.is_exact
    assert receipt.step.receipt["max_logit_difference"] <= 1e-5
    assert receipt.step.receipt["parameters"] == sum(p.numel() for p in sparse.parameters())
    assert float((logits(dense) - logits(sparse)).abs().max()) <= 1e-5
    assert answer(dense) == answer(sparse)
    config = sparse.config
    assert (config.router, config.num_experts_per_token, config.normalize_gates) == (
        "softmax",
        2,
        True,
    )
    assert read_steps(tmp_path / "moe") == [receipt.step]

    blob = open_native(tmp_path / "moe").expert_layout().blob_bytes
    offloaded, experts = load_offloaded(tmp_path / "moe", None, 3 * blob)  # of 12 experts
    with experts:
        assert torch.equal(logits(offloaded), logits(sparse))
        assert answer(offloaded) == answer(sparse)
        assert experts.stats.misses > 0
    with open_streamed(tmp_path / "moe", config) as streamed:
        assert torch.equal(logits(streamed), logits(sparse))


@pytest.mark.parametrize(
    ("config", "router", "layers"),
    [
        (DEEP, "softmax", "all"),
        (replace(LLAMA, norm="layer", norm_bias=True), "sigmoid", "every_second"),
        (DENSE, "cpm_2", "decoder"),
        (replace(DENSE, gated=False), "base_layer", "all"),
    ],
)
def test_one_by_one_is_what_growing_in_memory_gives(tmp_path, config, router, layers):
    small = save(tmp_path / "small", config)
    (tmp_path / "t.toml").write_text(NOISY.format(router, layers))
    target = read_target(tmp_path / "t.toml")
    grow_directory(small, target, tmp_path / "moe")
    growth = prepare_growth(config, target.plan(config))
    state = grow(load_model(small).state_dict(), growth)
    found = load_model(tmp_path / "moe").state_dict()
    assert found.keys() == build(growth.target, state).state_dict().keys()
    for name, tensor in state.items():
        assert torch.equal(found[name], tensor), name


def test_one_expert_at_a_time_is_in_memory(tmp_path, monkeypatch):
    made, most = [], []
    make = upcycling._make_expert

    def recorded(*args):
        most.append(sum(one() is not None for one in made))
        expert = make(*args)
        made.append(weakref.ref(expert["wi_0"]))
        return expert

    monkeypatch.setattr(upcycling, "_make_expert", recorded)
    grow_directory(save(tmp_path / "small"), mixture_target(8), tmp_path / "moe")
    assert len(made) == 3 * 8
    assert max(most) <= 1  # the one that the next one replaces


def test_experts_keep_the_stored_format(tmp_path):
    small = save(tmp_path / "small", dtype=torch.bfloat16)
    receipt = grow_directory(small, mixture_target(4), tmp_path / "moe")
    assert receipt.step.receipt["max_logit_difference"] <= 1e-5  # of what is stored, in fp32
    dense, sparse = load_model(small), load_model(tmp_path / "moe")
    assert {p.dtype for p in sparse.parameters()} == {torch.bfloat16}
    torch.testing.assert_close(logits(sparse), logits(dense), rtol=0.02, atol=0.02)
    grow_directory(small, mixture_target(4), tmp_path / "wide", torch.float32)
    assert load_model(tmp_path / "wide").embedding.weight.dtype == torch.float32


def test_a_source_that_lacks_a_tensor_is_refused(tmp_path):
    small = save(tmp_path / "small")
    tensors = load_file(small / "model.safetensors")
    del tensors["decoder.layers.1.feed_forward.wi_1.weight"]
    save_file(tensors, small / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"1 tensors are missing, first decoder\.layers\.1"):
        grow_directory(small, mixture_target(4), tmp_path / "moe")
    assert not (tmp_path / "moe").exists()


def test_the_command_grows_a_gguf_file_with_its_tokenizer(tmp_path, capsys):
    metadata = byte_level_metadata(train_byte_level(300), "gpt-2")
    values = {**SIZES, "vocab_size": 300, "tie_word_embeddings": True}
    file = write_family(tmp_path, "llama", "llama", make_family("llama", values), **metadata)
    out = tmp_path / "moe"
    with pytest.raises(SystemExit) as done:
        main(["grow", str(file), "--experts", "4", "--out", str(out)])
    assert not done.value.code
    assert "experts 4, router softmax" in capsys.readouterr().err
    dense, sparse = load_any(file).eval(), load_any(out).eval()
    assert sparse.config.num_experts == 4
    tokenizer = open_tokenizer(out, "tokenizer_json")
    assert tokenizer.encode("the sea") == open_tokenizer(file, "tokenizer_json").encode("the sea")
    assert answer(sparse, tokenizer) == answer(dense, tokenizer)
    assert (out / "tokenizer_config.json").exists()


def test_the_command_wants_a_file_or_a_number(tmp_path, capsys):
    small = save(tmp_path / "small")
    (tmp_path / "t.toml").write_text("[target]\nnum_experts = 4\n")
    for more in ([], [str(tmp_path / "t.toml"), "--experts", "4"]):
        with pytest.raises(SystemExit):
            main(["grow", str(small), *more, "--out", str(tmp_path / "moe")])
        assert "give a TOML file, or sizes such as" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="--experts: num_experts is 1; it must be 0"):
        grow_directory(small, mixture_target(1), tmp_path / "moe")
