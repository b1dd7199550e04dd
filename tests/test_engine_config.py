import json
from dataclasses import asdict, replace

import pytest

from engine.checkpoint_hf_config import head_scale
from engine.config import CPM2_MOE_198B, config_from_dict, read_config
from engine.config_parts import LatentAttention, Rotary
from engine.errors import ConfigError
from tests.tiny import DENSE, MOE


def test_a_config_survives_its_file(tmp_path):
    path = tmp_path / "config.json"
    for config in (DENSE, MOE, CPM2_MOE_198B, replace(DENSE, continuation_sentinel=None)):
        path.write_text(config.to_json(), encoding="utf-8")
        assert read_config(path) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"d_model": 0}, "d_model is 0; it must be a whole number of at least 1"),
        ({"d_ff": True}, "d_ff is True"),
        ({"router": "top9"}, "router is 'top9'; allowed: cpm_2, base_layer, default"),
        ({"num_experts": 1}, r"num_experts is 1; it must be 0 \(dense\) or at least 2"),
        ({"relative_buckets": 30}, "relative_buckets 30 must divide by 4"),
        ({"relative_max_distance": 16}, "relative_max_distance 16"),
        ({"norm_eps": 0.0}, "norm_eps is 0.0; it must lie between 0 and 1"),
        ({"norm_eps": float("nan")}, "norm_eps is nan"),
        ({"pad_token_id": 384}, "token id 384 is outside the vocabulary of 384"),
        ({"eos_token_ids": (-1,)}, "token id -1 is outside"),
        ({"norm_eps": -1.0}, "norm_eps is -1.0; it must lie between 0 and 1"),
        ({"norm_eps": float("inf")}, "norm_eps is inf; it must lie"),
        ({"num_decoder_layers": 2**31}, "num_decoder_layers is 2147483648; allowed: up to 10000"),
        ({"vocab_size": 2**63}, "would be 9223372036854775808 by 32, more than 281474976710656"),
        ({"d_model": 2**48}, "would be 384 by 281474976710656"),
        ({"d_kv": 2**24, "num_heads": 2**24}, "would be 281474976710656 by 32"),
        ({"num_experts": 2**10, "d_ff": 2**40}, "would be 1125899906842624 by 32"),
        ({"num_experts": 2**32}, "there are 17179869184 experts in all layers; allowed: 1000000"),
    ],
)
def test_impossible_values_are_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        replace(DENSE, **change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"d_modell": 4}, "unknown keys d_modell; known: activation"),
        ({"norm_eps": "tiny"}, "norm_eps is 'tiny'; expected float"),
        ({"vocab_size": 1.5}, "vocab_size is 1.5; expected int"),
        ({"vocab_size": True}, "vocab_size is True; expected int"),
        ({"gated": 1}, "gated is 1; expected bool"),
        ({"eos_token_ids": "1"}, "eos_token_ids is '1'; expected a list"),
        ({"continuation_sentinel": "first"}, "continuation_sentinel is 'first'"),
        ({"norm_eps": -1}, "norm_eps is -1; it must lie"),
        ({"norm_eps": float("nan")}, "norm_eps is nan; it must lie"),
    ],
)
def test_wrong_keys_and_types_are_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        config_from_dict({**asdict(DENSE), **change})


def test_a_missing_key_is_named():
    values = asdict(DENSE)
    del values["d_kv"]
    with pytest.raises(ConfigError, match="'d_kv'"):
        config_from_dict(values)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read as JSON"),
        ("{", "cannot be read as JSON"),
        ("[" * 100_000, "cannot be read as JSON: maximum recursion depth"),
        ("[]", 'no "format": "infmoe"'),
        ('{"model_type": "t5"}', 'no "format": "infmoe"'),
        ('{"format": "infmoe", "version": 99}', "version 99 is not 1"),
        ('{"format": "infmoe", "version": 1, "x": 1}', "config.json: unknown keys x"),
    ],
)
def test_a_bad_file_is_named(tmp_path, content, message):
    path = tmp_path / "config.json"
    if content is not None:
        path.write_text(content, encoding="utf-8")
    with pytest.raises(ConfigError, match=message) as caught:
        read_config(path)
    assert str(path) in str(caught.value)


def test_layers_and_shapes_of_experts():
    assert MOE.moe_layers() == ["encoder-0", "encoder-1", "decoder-0", "decoder-1"]
    assert DENSE.moe_layers() == []
    assert list(MOE.expert_shapes()) == ["norm", "wi_0", "wi_1", "wo"]
    assert "wi_1" not in replace(MOE, gated=False).expert_shapes()
    assert json.loads(MOE.to_json())["format"] == "infmoe"


@pytest.mark.parametrize("number", [0.0, -1.0, float("nan"), float("inf")])
def test_positions_of_a_damaged_file_are_refused(number):
    divisors = {"kind": "longrope", "divisors": (1.0, number)}
    for change in ({"theta": number}, {"factor": number}, {"attention_factor": number}, divisors):
        with pytest.raises(ConfigError, match=r"rotary: .* is .*; it must be a number above"):
            Rotary(**{"width": 4, **change})


def test_a_rank_of_a_damaged_file_is_refused():
    with pytest.raises(ConfigError, match="a rank is above 65536; the file is damaged"):
        LatentAttention(rank=2**17, plain_width=4, value_width=4)


@pytest.mark.parametrize("width", [0, -1, 10**400])
def test_heads_of_a_damaged_file_are_refused(width):
    assert head_scale(64) == 0.125
    with pytest.raises(ConfigError, match="heads are -?[01]+ wide; it must be at least 1"):
        head_scale(width)
