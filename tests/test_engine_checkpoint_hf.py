import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    MT5Config,
    MT5ForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
)

from engine.checkpoint import build_model
from engine.checkpoint_hf import is_huggingface, open_huggingface
from engine.errors import CheckpointError
from tests.t5_oracle import assert_equal_to_oracle

SIZES = {
    "vocab_size": 96,
    "d_model": 32,
    "d_kv": 6,
    "d_ff": 48,
    "num_layers": 2,
    "num_decoder_layers": 3,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}
V11 = {**SIZES, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}


def widen(oracle, *, untie):
    """Random weights large enough that the greedy tokens vary (tiny tied T5s repeat <pad>)."""
    generator = torch.Generator().manual_seed(0)
    if untie:  # transformers 5 ties every T5 that it builds
        oracle.lm_head.weight = torch.nn.Parameter(torch.empty(96, 32))
    with torch.no_grad():
        for name, weight in oracle.named_parameters():
            if weight.ndim == 1:
                weight.uniform_(0.5, 1.5, generator=generator)
            else:  # small embeddings, as a tied head favours the token that just came in
                std = {"shared.weight": 0.3, "lm_head.weight": 1.0}.get(name, 0.5)
                weight.normal_(0, std, generator=generator)
    return oracle.eval()


def t5_v10():
    return widen(T5ForConditionalGeneration(T5Config(**SIZES)), untie=False)


def t5_v11():
    return widen(T5ForConditionalGeneration(T5Config(**V11)), untie=True)


def mt5():
    return widen(MT5ForConditionalGeneration(MT5Config(**SIZES)), untie=True)


def t5_v11_tied():
    return widen(T5ForConditionalGeneration(T5Config(**V11)), untie=False)


FAMILIES = {"t5-v1.0": t5_v10, "t5-v1.1": t5_v11, "mt5": mt5, "t5-v1.1-tied": t5_v11_tied}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """One directory per family, as transformers 5 writes it."""
    root = tmp_path_factory.mktemp("hf")
    for name, make in FAMILIES.items():
        make().save_pretrained(root / name)
    return root


@pytest.fixture
def directory(saved, tmp_path):
    """A T5 v1.1 to be spoilt."""
    return Path(shutil.copytree(saved / "t5-v1.1", tmp_path / "t5"))


def load(directory, **options):
    source = open_huggingface(directory, **options)
    config = source.config
    return build_model(str(directory), config, torch.float32, source.dense(), source.experts)


def change_config(directory, **change):
    path = directory / "config.json"
    values = {**json.loads(path.read_text()), **change}
    path.write_text(json.dumps({key: value for key, value in values.items() if value != "-"}))


def change_tensors(directory, change):
    path = directory / "model.safetensors"
    tensors = {key: tensor.clone() for key, tensor in load_file(path).items()}
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


@pytest.mark.parametrize("name", FAMILIES)
def test_equals_transformers(saved, name):
    model = load(saved / name)
    assert_equal_to_oracle(model, FAMILIES[name]())
    config = model.config
    assert (config.num_encoder_layers, config.num_decoder_layers) == (2, 3)
    assert (config.activation, config.gated) == (
        ("relu", False) if name == "t5-v1.0" else ("gelu_tanh", True)
    )
    assert config.tied_embeddings == (name in ("t5-v1.0", "t5-v1.1-tied"))
    assert config.scale_logits == (name == "t5-v1.0")
    assert (config.tokenizer, config.continuation_sentinel) == ("sentencepiece", None)
    assert (config.pad_token_id, config.decoder_start_token_id, config.eos_token_ids) == (
        0,
        0,
        (1,),
    )
    assert open_huggingface(saved / name).dtype is torch.float32


def test_shards(saved, tmp_path):
    t5_v11().save_pretrained(tmp_path / "m", max_shard_size="20KB")
    source = open_huggingface(tmp_path / "m")
    assert len(source.files) > 2
    for (name, one), (_, other) in zip(
        source.dense(), open_huggingface(saved / "t5-v1.1").dense(), strict=True
    ):
        assert torch.equal(one, other), name
    source.files[1].unlink()
    with pytest.raises(CheckpointError, match=f"{source.files[1].name}: is missing"):
        open_huggingface(tmp_path / "m")


def pickled(directory, target, num_shards=1):
    """The same directory with the weights as transformers 4 pickled them."""
    tensors = load_file(directory / "model.safetensors")
    target.mkdir()
    shutil.copy(directory / "config.json", target)
    if num_shards == 1:
        torch.save(tensors, target / "pytorch_model.bin")
        return target
    names = sorted(tensors)
    weight_map = {}
    for shard in range(num_shards):
        file = f"pytorch_model-{shard + 1:05d}-of-{num_shards:05d}.bin"
        part = {name: tensors[name] for name in names[shard::num_shards]}
        torch.save(part, target / file)
        weight_map |= dict.fromkeys(part, file)
    index = target / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    return target


@pytest.mark.parametrize("num_shards", [1, 3])
def test_pickles_are_read_only_if_allowed(saved, tmp_path, num_shards):
    target = pickled(saved / "t5-v1.1", tmp_path / "m", num_shards)
    with pytest.raises(CheckpointError, match="weights as pickles only; run `infmoe convert`"):
        open_huggingface(target)
    model, expected = load(target, allow_pickles=True), load(saved / "t5-v1.1")
    assert model.config == expected.config
    for name, tensor in expected.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name])
    source = open_huggingface(target, allow_pickles=True)
    assert len(source.files) == num_shards
    assert source.dtype is torch.float32


def test_malicious_pickle_is_not_run(saved, tmp_path):
    class Touch:
        def __reduce__(self):
            return subprocess.call, (["touch", str(tmp_path / "pwned")],)

    target = pickled(saved / "t5-v1.1", tmp_path / "m")
    torch.save({"shared.weight": Touch()}, target / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin: refused: .*\.call"):
        open_huggingface(target, allow_pickles=True)
    assert not (tmp_path / "pwned").exists()


def test_pickled_integers_are_refused(saved, tmp_path):
    target = pickled(saved / "t5-v1.1", tmp_path / "m")
    torch.save({"shared.weight": torch.ones(2, dtype=torch.int64)}, target / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"shared\.weight is torch\.int64, expected floats"):
        open_huggingface(target, allow_pickles=True)


def test_tokenizer_files(directory):
    assert list(open_huggingface(directory).tokenizer_files) == ["generation_config.json"]
    (directory / "spiece.model").write_bytes(b"x")
    assert len(open_huggingface(directory).tokenizer_files) == 2


def test_a_dense_model_has_no_experts(directory):
    with pytest.raises(ValueError, match="encoder-0 has no experts"):
        next(open_huggingface(directory).experts("encoder-0"))


# What config.json may say


def test_configs_as_transformers_4_wrote_them(directory, saved):
    change_config(directory, scale_decoder_outputs="-", tie_word_embeddings=False)
    config = open_huggingface(directory).config
    assert (config.scale_logits, config.tied_embeddings) == (False, False)
    path = Path(shutil.copytree(saved / "t5-v1.0", directory.parent / "t5-v1.0"))
    for tie in (True, "-"):
        change_config(path, scale_decoder_outputs="-", tie_word_embeddings=tie)
        config = open_huggingface(path).config
        assert (config.scale_logits, config.tied_embeddings) == (True, True)


def test_a_head_equal_to_the_embedding_is_tied(directory):
    def equal(tensors):
        tensors["lm_head.weight"] = tensors["shared.weight"].clone()

    change_tensors(directory, equal)
    assert open_huggingface(directory).config.tied_embeddings
    change_config(directory, tie_word_embeddings=False)
    assert not open_huggingface(directory).config.tied_embeddings


def test_defaults_and_generation_config(directory):
    change_config(
        directory,
        decoder_start_token_id=None,
        pad_token_id="-",
        eos_token_id=[1, 7],
        num_decoder_layers=3,
        relative_attention_max_distance="-",
        n_positions=1024,
    )
    (directory / "generation_config.json").write_text('{"decoder_start_token_id": 4}')
    config = open_huggingface(directory).config
    assert (config.decoder_start_token_id, config.pad_token_id) == (4, 0)
    assert (config.eos_token_ids, config.max_positions) == ((1, 7), 1024)
    (directory / "generation_config.json").unlink()
    assert open_huggingface(directory).config.decoder_start_token_id == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "umt5"}, "model_type 'umt5' is not supported; supported: t5, mt5, "),
        ({"model_type": "-"}, "model_type None is not supported"),
        ({"feed_forward_proj": "gated-silu"}, "'gated-silu' is not supported; supported: relu"),
        ({"tokenizer_class": "ByT5Tokenizer"}, "ByT5 is not supported"),
        ({"d_model": "wide"}, "d_model is 'wide'; expected a whole number"),
        ({"d_ff": "-"}, "d_ff is None; expected a whole number"),
        ({"d_kv": 0}, "d_kv is 0; it must be"),
        ({"eos_token_id": ["x"]}, "eos_token_id is 'x'; expected a whole number"),
        ({"eos_token_id": 96}, "token id 96 is outside the vocabulary"),
        ({"layer_norm_epsilon": "x"}, "layer_norm_epsilon is 'x'; expected a number"),
        ({"layer_norm_epsilon": 10**400}, "norm_eps is 10+; it must lie between 0 and 1"),
        ({"layer_norm_epsilon": float("nan")}, "norm_eps is nan; it must lie between 0 and 1"),
        ({"feed_forward_proj": []}, r"feed_forward_proj \[\] is not supported"),
        ({"feed_forward_proj": "relu"}, r"tensors missing, first .*DenseReluDense\.wi\.weight"),
        ({"num_layers": 1}, r"tensors that this t5 does not have, first encoder\.block\.1\."),
        ({"num_layers": 4}, r"tensors missing, first encoder\.block\.2\."),
        ({"vocab_size": 97}, r"shared\.weight has shape \[96, 32\], expected \[97, 32\]"),
    ],
)
def test_wrong_config(directory, change, message):
    change_config(directory, **change)
    with pytest.raises(CheckpointError, match=message):
        load(directory)


def test_config_is_no_json(directory):
    for text, message in [
        ("{", "is no JSON"),
        ("[1]", "is no JSON object"),
        ("[" * 100_000, "is no JSON: maximum recursion depth"),
    ]:
        (directory / "config.json").write_text(text)
        with pytest.raises(CheckpointError, match=rf"config\.json: {message}"):
            open_huggingface(directory)
        assert not is_huggingface(directory)
    (directory / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json: cannot be read: No such file"):
        open_huggingface(directory)
    assert not is_huggingface(directory)


# What the tensors may be


def test_copies_of_the_embedding(directory):
    expected = load(directory).state_dict()

    def copy(tensors):
        tensors["encoder.embed_tokens.weight"] = tensors["shared.weight"].clone()
        tensors["decoder.embed_tokens.weight"] = tensors.pop("shared.weight")
        bias = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
        tensors[bias] = torch.ones(32, 4)  # early T5 files have this leftover

    change_tensors(directory, copy)
    for name, tensor in load(directory).state_dict().items():
        assert torch.equal(tensor, expected[name])

    def spoil(tensors):
        tensors["decoder.embed_tokens.weight"][0, 0] += 1

    change_tensors(directory, spoil)
    with pytest.raises(
        CheckpointError, match=r"decoder\.embed_tokens\.weight differs from encoder"
    ):
        load(directory)


def test_embedding_stored_as_the_head_alone(saved, tmp_path):
    directory = Path(shutil.copytree(saved / "t5-v1.0", tmp_path / "t5"))
    expected = load(directory).state_dict()

    def rename(tensors):
        tensors["lm_head.weight"] = tensors.pop("shared.weight")

    change_tensors(directory, rename)
    for name, tensor in load(directory).state_dict().items():
        assert torch.equal(tensor, expected[name])


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("shared.weight", "1 tensors missing, first shared.weight"),
        ("decoder.final_layer_norm.weight", "1 tensors missing, first decoder.final_layer_norm"),
        ("lm_head.weight", "lm_head.weight is missing, and the config says not to tie it"),
    ],
)
def test_missing_tensors(directory, key, message):
    change_config(directory, tie_word_embeddings=False)
    change_tensors(directory, lambda tensors: tensors.pop(key))
    with pytest.raises(CheckpointError, match=message):
        load(directory)


def test_unknown_or_misshapen_tensors(directory):
    key = "encoder.block.0.layer.0.SelfAttention.q.weight"

    def misshape(tensors):
        tensors[key] = tensors[key][:-1].clone()

    change_tensors(directory, misshape)
    with pytest.raises(
        CheckpointError, match=r"\.q\.weight has shape \[23, 32\], expected \[24, 32"
    ):
        load(directory)

    for spoil, message in [
        (lambda t: t[:, :-1].clone(), r"\.q\.weight has shape \[23, 31\], expected \[24, 32\]"),
        (lambda t: t[0].clone(), r"\.q\.weight has shape \[31\], expected \[24, 32\]"),
        (lambda t: torch.ones(24, 32, dtype=torch.int8), r"\.q\.weight is torch\.int8"),
    ]:
        change_tensors(directory, lambda tensors, f=spoil: tensors.update({key: f(tensors[key])}))
        with pytest.raises(CheckpointError, match=message):
            load(directory)

    def add(tensors):
        tensors["encoder.bias"] = torch.ones(2)

    change_tensors(directory, add)
    with pytest.raises(
        CheckpointError, match=r"1 tensors that this t5 does not have, first encoder\.bias"
    ):
        load(directory)


def test_damaged_files(directory):
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: truncated or no safetensors"):
        load(directory)
    path.unlink()
    with pytest.raises(CheckpointError, match=r"has no weights; expected model\.safetensors or"):
        load(directory)
    with pytest.raises(CheckpointError, match="absent: does not exist"):
        load(directory.parent / "absent")
