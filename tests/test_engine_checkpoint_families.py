"""Hugging Face directories of each family, as transformers writes them, against transformers."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from engine.checkpoint import load_model
from engine.checkpoint_any import load_any
from engine.checkpoint_hf import open_huggingface
from engine.checkpoint_mxfp4 import dequantize_mxfp4
from engine.convert import convert, inspect
from engine.errors import CheckpointError
from engine.experts import load_offloaded
from tests.hf_families import (
    MODELS,
    TRANSLATORS,
    assert_equal_to_oracle,
    make_oracle,
    ragged_prompts,
    widen,
)
from tests.json_tokenizers import train_byte_fallback
from tests.t5_oracle import assert_equal_to_oracle as assert_equal_to_translator
from tests.t5_oracle import one_thread, ragged_batch
from tests.test_engine_checkpoint_hf import change_config, change_tensors, pickled

SPARSE = (
    "mixtral",
    "phimoe",
    "qwen2_moe",
    "qwen3_moe",
    "olmoe",
    "deepseek_v2",
    "deepseek_v3",
    "gpt_oss",
    "switch",
    "nllb_moe",
)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Writes a family's directory on the first demand, and tells its oracle and where it is."""
    root, made = tmp_path_factory.mktemp("hf"), {}

    def get(name):
        if name not in made:
            made[name] = make_oracle(name)
            made[name].save_pretrained(root / name)
        return made[name], root / name

    return get


@pytest.fixture
def copied(saved, tmp_path):
    """A copy of a family's directory, to be spoilt."""

    def get(name):
        return Path(shutil.copytree(saved(name)[1], tmp_path / name))

    return get


@pytest.mark.parametrize("name", MODELS)
def test_equals_transformers(saved, name):
    oracle, directory = saved(name)
    model = load_any(directory)
    assert model.config.is_decoder_only
    assert (model.config.eos_token_ids, model.config.tokenizer) == ((2,), "tokenizer_json")
    assert model.config.pad_token_id == (2 if name == "gpt2" else 0)
    assert_equal_to_oracle(model, oracle)


@pytest.mark.parametrize("name", TRANSLATORS)
def test_encoder_decoders_equal_transformers(saved, name):
    oracle, directory = saved(name)
    model = load_any(directory)
    assert model.config.moe_layers() == ["encoder-1", "encoder-3", "decoder-1"]
    assert_equal_to_translator(model, oracle)


@torch.no_grad()
def scores(model):
    """Logits of ragged rows."""
    if model.config.is_decoder_only:
        tokens_BS, segments_BS = ragged_prompts()
        return model.logits(model.read(tokens_BS, segments_BS))
    pad = model.config.pad_token_id
    tokens_BS, tokens_BT = ragged_batch(model.config.vocab_size, pad)
    return model(tokens_BS, (tokens_BS != pad).long(), tokens_BT, torch.ones_like(tokens_BT))


@pytest.mark.parametrize("name", SPARSE)
@one_thread()
def test_converted_and_offloaded_equals_resident(saved, tmp_path, name):
    directory = saved(name)[1]
    expected = scores(load_any(directory))
    convert(directory, tmp_path / "native")
    config = open_huggingface(directory).config
    assert torch.equal(scores(load_model(tmp_path / "native")), expected)
    blob_bytes = inspect(tmp_path / "native")["experts"]["blob_bytes"]
    model, experts = load_offloaded(tmp_path / "native", None, 4 * blob_bytes)
    with experts:
        assert model.config == config
        assert torch.equal(scores(model), expected)
        assert experts.stats.evictions > 0


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_converted_dense_ones_equal(saved, tmp_path, name):
    convert(saved(name)[1], tmp_path / "native")
    assert torch.equal(scores(load_any(tmp_path / "native")), scores(load_any(saved(name)[1])))


@pytest.mark.parametrize(("name", "kind"), [("mixtral", "int8"), ("gpt_oss", "int4")])
@one_thread()
def test_experts_are_quantised_by_a_conversion(tmp_path, name, kind):
    model_class, config_class, values = MODELS[name]
    oracle = widen(model_class(config_class(**{**values, "intermediate_size": 64})))
    oracle.save_pretrained(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "native", torch.bfloat16, quantization=kind)
    assert inspect(tmp_path / "native")["experts"]["quantization"] == kind
    exact = next(iter(open_huggingface(tmp_path / "hf").experts("decoder-1")))
    stored = next(iter(load_model(tmp_path / "native").experts.stream("decoder-1", [0])))[1]
    for key, tensor in exact.items():
        off = (getattr(stored, key).float() - tensor).norm() / tensor.norm()
        assert off < (0.02 if kind == "int8" else 0.15), key
    model, experts = load_offloaded(tmp_path / "native", None, 10**8)
    with experts:  # whether they have vectors, which tell of a dtype, or not
        expected = scores(load_model(tmp_path / "native")).float()
        assert (scores(model).float() - expected).norm() < 0.1 * expected.norm()


def test_inspect_tells_of_a_family(saved):
    told = inspect(saved("qwen2_moe")[1])
    assert (told["kind"], told["config"]["router"]) == ("huggingface", "softmax")
    counts = told["parameters"]
    assert counts["one_expert"] == 3 * 24 * 32
    assert counts["experts"] == 2 * 6 * counts["one_expert"]  # layer 1 is dense
    assert counts["active"] == counts["dense"] + 2 * 3 * counts["one_expert"]
    assert counts["total"] == sum(p.numel() for p in saved("qwen2_moe")[0].parameters())


# Forms in which families are released


def test_gpt2_as_it_is_released(saved, tmp_path):
    oracle, directory = saved("gpt2")
    target = pickled(directory, tmp_path / "released")
    tensors = {
        key.removeprefix("transformer."): tensor
        for key, tensor in load_file(directory / "model.safetensors").items()
        if key != "lm_head.weight"
    }
    tensors |= {f"h.{i}.attn.bias": torch.ones(1, 1, 8, 8, dtype=torch.uint8) for i in range(3)}
    torch.save(tensors, target / "pytorch_model.bin")
    change_config(target, tie_word_embeddings="-")
    convert(target, tmp_path / "native")
    model = load_any(tmp_path / "native")
    assert model.config.tied_embeddings
    tokens_BS, segments_BS = ragged_prompts()
    oracle = oracle.transformer
    with torch.no_grad():
        hidden = model.read(tokens_BS, segments_BS)[1:2]
        expected = oracle(input_ids=tokens_BS[1:2]).last_hidden_state
    torch.testing.assert_close(hidden, expected, rtol=0, atol=1e-4)


def test_a_llama_of_old_carries_frequencies_and_a_nameless_padding(copied, saved):
    directory = copied("llama-linear")

    def add(tensors):
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)

    change_tensors(directory, add)
    change_config(
        directory,
        rope_parameters="-",
        rope_theta=100.0,
        rope_scaling={"type": "linear", "factor": 4.0},
        pad_token_id=-1,
    )
    model = load_any(directory)
    assert (model.config.pad_token_id, model.config.rotary.kind) == (2, "linear")
    assert torch.equal(scores(model), scores(load_any(saved("llama-linear")[1])))


def test_layers_that_foretell_tokens_are_left_out_if_the_config_tells_of_them(copied):
    directory = copied("deepseek_v3")
    expected = scores(load_any(directory))

    def add(tensors):
        tensors["model.layers.3.eh_proj.weight"] = torch.ones(2, 2)

    change_tensors(directory, add)
    assert torch.equal(scores(load_any(directory)), expected)
    change_config(directory, num_nextn_predict_layers=0)
    with pytest.raises(CheckpointError, match=r"deepseek_v3 does not have, first .*eh_proj"):
        load_any(directory)


def test_what_decides_between_experts_stays_in_fp32(saved, tmp_path):
    directory, name = saved("deepseek_v3")[1], "decoder.layers.2.moe.choice_bias"
    exact = load_any(directory).state_dict()[name]
    convert(directory, tmp_path / "native", torch.bfloat16)
    for model in (load_any(directory, torch.bfloat16), load_model(tmp_path / "native")):
        state = model.state_dict()
        assert state["decoder.layers.2.moe.router.weight"].dtype is torch.bfloat16
        assert torch.equal(state[name], exact)
        assert scores(model).isfinite().all()


def quantise(tensors, config, seed=0):
    """Put random MXFP4 weights of experts in the place of floats; returns those as floats."""
    generator = torch.Generator().manual_seed(seed)
    floats = {}
    for layer in range(3):
        for key, rows, inputs in (("gate_up_proj", 128, 32), ("down_proj", 32, 64)):
            full = f"model.layers.{layer}.mlp.experts.{key}"
            shape = (4, rows, inputs // 32)
            blocks = torch.randint(0, 256, (*shape, 16), generator=generator, dtype=torch.uint8)
            scales = torch.randint(123, 126, shape, generator=generator, dtype=torch.uint8)
            del tensors[full]
            tensors |= {f"{full}_blocks": blocks, f"{full}_scales": scales}
            floats[full] = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    return floats


@one_thread()
def test_gpt_oss_in_mxfp4(tmp_path):
    model_class, config_class, values = MODELS["gpt_oss"]
    oracle = widen(model_class(config_class(**{**values, "intermediate_size": 64})))
    oracle.save_pretrained(tmp_path / "m")
    path = tmp_path / "m" / "model.safetensors"
    tensors = load_file(path)
    floats = quantise(tensors, oracle.config)
    save_file(tensors, path, {"format": "pt"})
    change_config(tmp_path / "m", quantization_config={"quant_method": "mxfp4"})
    parameters = dict(oracle.named_parameters())
    with torch.no_grad():
        for key, tensor in floats.items():
            parameters[key].copy_(tensor)
    assert_equal_to_oracle(load_any(tmp_path / "m"), oracle)


def test_mxfp4_has_each_number_exactly():
    levels = [0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6]
    blocks = torch.arange(48, dtype=torch.uint8).mul(5).view(1, 3, 16)
    scales = torch.tensor([[127, 130, 100]], dtype=torch.uint8)
    found = dequantize_mxfp4(blocks, scales)
    expected = [
        levels[code] * 2.0 ** (int(scales[0, group]) - 127)
        for group in range(3)
        for byte in blocks[0, group].tolist()
        for code in (byte % 16, byte // 16)
    ]
    assert found.dtype is torch.bfloat16
    assert found.tolist() == [expected]


# Tokens and texts


def test_what_begins_and_ends_a_text(copied):
    directory = copied("llama")
    tokenizer = train_byte_fallback()
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "generation_config.json").write_text('{"eos_token_id": [7, 2]}')
    config = open_huggingface(directory).config
    assert config.begin_token_ids == tuple(tokenizer.encode("").ids) != ()
    assert config.eos_token_ids == (2, 7)
    change_config(directory, eos_token_id=None)
    assert open_huggingface(directory).config.eos_token_ids == (7, 2)
    (directory / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match="is no tokenizer.json"):
        open_huggingface(directory)


def test_windows(copied):
    directory = copied("gpt_oss")
    assert open_huggingface(directory).config.windows == (5, 0, 5)
    change_config(directory, layer_types="-")
    assert open_huggingface(directory).config.windows == (5, 0, 5)
    change_config(directory, sliding_window=128)  # as long as the longest text
    assert open_huggingface(directory).config.windows == ()
    directory = copied("qwen3_moe")
    change_config(directory, use_sliding_window=True, sliding_window=9)
    assert open_huggingface(directory).config.windows == (9, 9, 9)


def test_longrope_ends_where_other_frequencies_begin(saved):
    config = open_huggingface(saved("phimoe-longrope")[1]).config
    assert config.max_positions == 64
    assert config.rotary.attention_factor == 1.2


# What is refused


def test_an_unknown_architecture_is_refused_with_the_list_of_those_supported(copied):
    directory = copied("llama")
    change_config(directory, model_type="mamba")
    message = "'mamba' is not supported; supported: t5, .* llama, .* deepseek_v3, gpt_oss"
    with pytest.raises(CheckpointError, match=message):
        open_huggingface(directory)


YARN = {"rope_type": "yarn", "factor": 2.0, "rope_theta": 100.0}
LONGROPE = {"rope_type": "longrope", "short_factor": "x", "factor": 2.0}


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("llama", {"hidden_act": "mish"}, "hidden_act 'mish' is not supported; supported: gelu"),
        ("llama", {"num_attention_heads": 0}, "num_attention_heads is 0; it must be at least 1"),
        ("llama", {"rms_norm_eps": None}, "rms_norm_eps is None; expected a number"),
        ("llama", {"attention_bias": 1}, "attention_bias is 1; expected true or false"),
        ("llama", {"num_key_value_heads": 3}, "num_kv_heads is 3; it must divide num_heads, 4"),
        ("llama", {"head_dim": 16}, r"q_proj\.weight has shape \[32, 32\], expected \[64, 32\]"),
        (
            "llama",
            {"quantization_config": {"quant_method": "gptq"}},
            "'gptq' weights, which are not supported; supported for llama: fp8",
        ),
        (
            "gpt_oss",
            {"quantization_config": {"quant_method": "awq"}},
            "'awq' weights, which are not supported; supported for gpt_oss: fp8, mxfp4",
        ),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}},
            "'dynamic' are not supported; supported: default, linear, llama3, yarn, longrope",
        ),
        ("llama", {"rope_parameters": [1]}, r"rope_parameters is \[1\]; expected an object"),
        (
            "llama",
            {"rope_parameters": {"mrope_section": [1]}},
            "mrope_section of default rotary positions is not supported",
        ),
        (
            "llama",
            {"partial_rotary_factor": 0.5},
            r"partial_rotary_factor is 0\.5, which is not supported; supported: 1\.0",
        ),
        (
            "llama",
            {"rope_parameters": {**YARN, "original_max_position_embeddings": 1}},
            "original_max_position_embeddings is 1; it must be at least 2",
        ),
        ("llama", {"rope_parameters": LONGROPE}, "short_factor is 'x'; expected a list of numbers"),
        ("mistral", {"layer_types": [1]}, r"layer_types is \[1\]; expected a list of str"),
        ("mistral", {"layer_types": ["x"]}, "layer_types has 1 entries for 3 layers"),
        ("mistral", {"layer_types": ["full_attention", "x", "x"]}, "'x', which is not supported"),
        (
            "qwen2_moe",
            {"use_sliding_window": True},
            "use_sliding_window is True, which is not supported; supported: False",
        ),
        ("olmoe", {"sliding_window": 4}, "sliding_window is 4, which is not supported"),
        ("phimoe", {"num_experts_per_tok": 3}, "num_experts_per_tok is 3, which is not supported"),
        ("deepseek_v2", {"topk_method": "noaux_tc"}, "topk_method is 'noaux_tc', which is not"),
        ("deepseek_v2", {"norm_topk_prob": True}, "norm_topk_prob is True, which is not supported"),
        ("deepseek_v3", {"scoring_func": "softmax"}, "scoring_func is 'softmax', which is not"),
        ("deepseek_v3", {"rms_norm_eps": 1e-5}, "rms_norm_eps is 1e-05, which is not supported"),
        (
            "deepseek_v3",
            {"topk_group": 1, "num_experts_per_tok": 3},
            "hold the 3 experts of a token",
        ),
        ("gpt_oss", {"swiglu_limit": 8.0}, r"swiglu_limit is 8\.0, which is not supported"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention is True, which is not"),
        ("gpt2", {"n_head": 5}, "n_head is 5; it must divide n_embd, 32"),
        ("switch", {"router_bias": True}, "router_bias is True, which is not supported"),
        ("nllb_moe", {"second_expert_policy": "random"}, "second_expert_policy is 'random', which"),
        ("nllb_moe", {"decoder_ffn_dim": 64}, "decoder_ffn_dim is 64, which is not supported"),
        (
            "nllb_moe",
            {"encoder_attention_heads": 5, "decoder_attention_heads": 5},
            "must divide 32",
        ),
    ],
)
def test_what_a_config_may_not_tell(copied, name, change, message):
    directory = copied(name)
    change_config(directory, **change)
    with pytest.raises(CheckpointError, match=message):
        load_any(directory)


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("llama", "model.norm.weight"),
        ("mixtral", "lm_head.weight"),
        ("mixtral", "model.layers.1.block_sparse_moe.experts.3.w2.weight"),
        ("gpt_oss", "model.layers.2.mlp.experts.down_proj_bias"),
    ],
)
def test_a_missing_tensor_is_named(copied, name, key):
    directory = copied(name)
    change_tensors(directory, lambda tensors: tensors.pop(key))
    with pytest.raises(CheckpointError, match=f"{key} is missing|1 tensors missing, first {key}"):
        open_huggingface(directory)


@pytest.mark.parametrize(
    ("name", "key", "shape"),
    [
        ("qwen2_moe", "model.layers.0.mlp.experts.6.up_proj.weight", (24, 32)),
        ("olmoe", "model.layers.1.self_attn.q_proj.bias", (32,)),
    ],
)
def test_a_tensor_left_over_is_named(copied, name, key, shape):
    directory = copied(name)
    change_tensors(directory, lambda tensors: tensors.update({key: torch.ones(shape)}))
    with pytest.raises(CheckpointError, match=f"{name} does not have, first {key}"):
        open_huggingface(directory)


@pytest.mark.parametrize(
    ("name", "key", "message"),
    [
        (
            "mixtral",
            "model.layers.1.block_sparse_moe.experts.3.w2.weight",
            r"w2\.weight has shape \[31, 48\], expected \[32, 48\] by config",
        ),
        (
            "gpt_oss",
            "model.layers.0.mlp.experts.down_proj",
            r"down_proj has shape \[3, 48, 32\], expected \[4, 48, 32\] by config",
        ),
        (
            "qwen3",
            "model.layers.0.self_attn.k_proj.weight",
            r"k_proj\.weight has shape \[31, 32\], expected \[32, 32\] by config",
        ),
        (
            "deepseek_v3",
            "model.layers.0.self_attn.q_b_proj.weight",
            r"q_b_proj\.weight has shape \[47, 12\], expected \[48, 12\] by config",
        ),
    ],
)
def test_a_misshapen_tensor_is_named(copied, name, key, message):
    directory = copied(name)

    def cut(tensors):
        tensors[key] = tensors[key][:-1].clone()

    change_tensors(directory, cut)
    with pytest.raises(CheckpointError, match=message):
        load_any(directory)


def test_mxfp4_of_other_kinds_or_widths_is_refused(copied):
    directory = copied("gpt_oss")
    key = "model.layers.0.mlp.experts.gate_up_proj"

    def pack(tensors):
        for layer in range(3):
            for name, rows, groups in (("gate_up_proj", 96, 1), ("down_proj", 32, 2)):
                full = f"model.layers.{layer}.mlp.experts.{name}"
                tensors[f"{full}_blocks"] = torch.zeros(4, rows, groups, 16)
                tensors[f"{full}_scales"] = torch.zeros(4, rows, groups, dtype=torch.uint8)
                del tensors[full]

    change_tensors(directory, pack)
    with pytest.raises(CheckpointError, match="down_proj has 48 inputs; MXFP4 needs a multiple"):
        load_any(directory)
    change_config(directory, intermediate_size=64)

    def widen_biases(tensors):
        for layer in range(3):
            full = f"model.layers.{layer}.mlp.experts.gate_up_proj"
            tensors[f"{full}_bias"] = torch.zeros(4, 128)
            tensors[f"{full}_blocks"] = torch.zeros(4, 128, 1, 16)
            tensors[f"{full}_scales"] = torch.zeros(4, 128, 1, dtype=torch.uint8)

    change_tensors(directory, widen_biases)
    message = rf"{key}_blocks is torch\.float32, expected torch\.uint8"
    with pytest.raises(CheckpointError, match=message):
        load_any(directory)


def test_a_config_that_is_no_json_object_of_ids(copied):
    directory = copied("llama")
    values = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**values, "eos_token_id": "x"}))
    with pytest.raises(CheckpointError, match="eos_token_id is 'x'; expected a whole number"):
        open_huggingface(directory)
