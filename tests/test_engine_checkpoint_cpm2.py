import dataclasses
import json
import logging
import subprocess

import pytest
import torch
from transformers import T5Config, T5ForConditionalGeneration

from engine.checkpoint import build_model
from engine.checkpoint_cpm2 import open_cpm2
from engine.checkpoint_ranks import Cut, find_iteration, merge
from engine.errors import CheckpointError
from engine.model.transformer import Transformer
from tests.cpm2_files import (
    TINY,
    deepspeed_content,
    rank_state,
    tiny_model,
    write_rank_files,
    write_vocabulary,
)
from tests.t5_oracle import assert_equal_to_oracle, ragged_batch

MOE = dataclasses.replace(TINY, num_experts=4)
KEY = "encoder.blocks.1.self_attn.self_attn.project.weight"


def build(source):
    return build_model("test", source.config, source.dtype, source.dense(), source.experts)


def assert_same(model, expected):
    assert model.config == expected.config
    assert model.state_dict().keys() == expected.state_dict().keys()
    for key, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, expected.state_dict()[key], rtol=0, atol=0, msg=key)


def test_merge_puts_queries_keys_and_values_of_all_ranks_together():
    rank_0, rank_1 = (torch.tensor([[rank + part] for part in (0, 10, 20)]) for rank in (0, 1))
    assert merge([rank_0, rank_1], Cut(0, 3)).flatten().tolist() == [0, 1, 10, 11, 20, 21]
    assert merge([rank_0, rank_1], Cut(0)).flatten().tolist() == [0, 10, 20, 1, 11, 21]
    assert merge([rank_0, rank_1], Cut(1)).tolist() == [[0, 1], [10, 11], [20, 21]]
    assert merge([rank_0, rank_1], Cut(None)) is rank_0


@pytest.mark.parametrize("zip_format", [True, False])
@pytest.mark.parametrize("mp", [1, 2, 4, 8])
def test_dense_from_any_number_of_ranks(tmp_path, mp, zip_format):
    model = tiny_model().half()
    write_rank_files(model, tmp_path, mp, zip_format=zip_format)
    source = open_cpm2(tmp_path)
    assert source.dtype is torch.float16
    assert len(source.files) == mp
    assert source.tokenizer_files == {"vocab.txt": tmp_path / "vocab.txt"}
    assert_same(build(source), model)


@pytest.mark.parametrize("mp", [1, 2, 8])
def test_moe_from_a_file_per_expert_and_rank(tmp_path, mp, caplog):
    model = tiny_model(MOE).half()
    write_rank_files(model, tmp_path, mp, by_expert=True)
    source = open_cpm2(tmp_path)
    assert len(source.files) == 4 * mp
    assert_same(build(source), model)
    assert caplog.records == []


def to_moe_start(rank, state, num_experts=32):
    """What the released script makes of a dense model: copies of one expert, random centroids."""
    for key in [key for key in state if ".ff." in key]:
        state[key.replace(".ff.", ".ff.expert_network.")] = state.pop(key)
    for stack in ("encoder", "decoder"):
        for index in range(2):
            centroids = torch.empty(num_experts, 32)
            generator = torch.Generator().manual_seed(index)
            torch.nn.init.orthogonal_(centroids, gain=0.01, generator=generator)
            state[f"{stack}.blocks.{index}.ff.expert_centroids"] = centroids.half()


def test_moe_start_computes_what_the_dense_model_does(tmp_path):
    dense = tiny_model()
    write_rank_files(dense, tmp_path, 8, change=to_moe_start)
    source = open_cpm2(tmp_path)
    assert len(source.files) == 8
    assert source.config == dataclasses.replace(TINY, num_experts=32)
    model = build(source).requires_grad_(False)
    tokens_BS, tokens_BT = ragged_batch(96, pad=5)
    inputs = (tokens_BS, (tokens_BS != 5).long(), tokens_BT, torch.ones_like(tokens_BT))
    torch.testing.assert_close(model(*inputs), dense(*inputs))
    first = model.state_dict()["experts.layers.decoder-1.wo"][0]
    assert torch.equal(first, dense.state_dict()["decoder.layers.1.feed_forward.wo.weight"])


def hugging_face_twin(model: Transformer):
    """The same weights in transformers' T5, by the mapping of the CPM-2 notebooks."""
    config = model.config
    twin = T5ForConditionalGeneration(
        T5Config(
            vocab_size=config.vocab_size,
            d_model=config.d_model,
            d_kv=config.d_kv,
            d_ff=config.d_ff,
            num_layers=config.num_encoder_layers,
            num_heads=config.num_heads,
            feed_forward_proj="gated-gelu",
            tie_word_embeddings=False,
            pad_token_id=5,
            decoder_start_token_id=1,
            eos_token_id=7,
        )
    ).eval()
    ours = model.state_dict()
    theirs = {"shared.weight": ours["embedding.weight"], "lm_head.weight": ours["lm_head.weight"]}
    for stack, last in (("encoder", 1), ("decoder", 2)):
        theirs[f"{stack}.embed_tokens.weight"] = ours["embedding.weight"]
        theirs[f"{stack}.final_layer_norm.weight"] = ours[f"{stack}.norm.weight"]
        theirs[f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"] = ours[
            f"{stack}.relative_bias.weight"
        ]
        for index in range(config.num_layers(stack)):
            mine, block = f"{stack}.layers.{index}", f"{stack}.block.{index}.layer"
            own = f"{mine}.self_attention"
            for letter, part in zip("qkv", ours[f"{own}.qkv.weight"].chunk(3), strict=True):
                theirs[f"{block}.0.SelfAttention.{letter}.weight"] = part
            theirs[f"{block}.0.SelfAttention.o.weight"] = ours[f"{own}.out.weight"]
            theirs[f"{block}.0.layer_norm.weight"] = ours[f"{own}.norm.weight"]
            if stack == "decoder":
                cross, name = f"{mine}.cross_attention", f"{block}.1.EncDecAttention"
                theirs[f"{name}.q.weight"] = ours[f"{cross}.query.weight"]
                keys, values = ours[f"{cross}.key_value.weight"].chunk(2)
                theirs |= {f"{name}.k.weight": keys, f"{name}.v.weight": values}
                theirs[f"{name}.o.weight"] = ours[f"{cross}.out.weight"]
                theirs[f"{block}.1.layer_norm.weight"] = ours[f"{cross}.norm.weight"]
            theirs[f"{block}.{last}.layer_norm.weight"] = ours[f"{mine}.feed_forward.norm.weight"]
            for name in ("wi_0", "wi_1", "wo"):
                theirs[f"{block}.{last}.DenseReluDense.{name}.weight"] = ours[
                    f"{mine}.feed_forward.{name}.weight"
                ]
    twin.lm_head.weight = torch.nn.Parameter(ours["lm_head.weight"].clone())
    twin.load_state_dict(theirs)
    return twin


def test_equals_transformers(tmp_path):
    write_rank_files(tiny_model(), tmp_path, 4)
    model = build(open_cpm2(tmp_path))
    assert_equal_to_oracle(model, hugging_face_twin(model))


# The vocabulary and the released config


def test_vocabulary_tells_language_and_marks(tmp_path):
    write_rank_files(tiny_model(), tmp_path, 1)
    assert open_cpm2(tmp_path).config == TINY
    write_vocabulary(tmp_path / "other.txt", 96, bilingual=True)
    config = open_cpm2(tmp_path, tmp_path / "other.txt").config
    assert (config.tokenizer, config.eos_token_ids) == ("cpm2_zh_en", (8,))
    assert (config.pad_token_id, config.decoder_start_token_id) == (5, 1)


def test_vocabulary_beside_the_rank_files_and_with_a_final_newline(tmp_path):
    folder = write_rank_files(tiny_model(), tmp_path, 1)
    path = (tmp_path / "vocab.txt").rename(folder / "vocab.txt")
    path.write_text(path.read_text("utf-8") + "\n", "utf-8")
    assert open_cpm2(tmp_path).tokenizer_files == {"vocab.txt": path}
    assert open_cpm2(folder).config == TINY


def test_vocabulary_with_carriage_returns_and_a_bare_prefix(tmp_path):
    """Read as the tokenizer reads it, to which "##" alone is no piece of a bilingual one."""
    write_rank_files(tiny_model(), tmp_path, 1)
    path = tmp_path / "vocab.txt"
    text = path.read_text("utf-8").replace("\u4e00", "##")
    path.write_bytes(text.replace("\n", "\r\n").encode())
    assert open_cpm2(tmp_path).config == TINY


def test_wrong_vocabulary(tmp_path):
    write_rank_files(tiny_model(), tmp_path, 1)
    path = tmp_path / "vocab.txt"
    good = path.read_text("utf-8")
    path.write_text(good + "\nmore", "utf-8")
    with pytest.raises(CheckpointError, match=r"vocab\.txt: has 97 lines, the model has 96$"):
        open_cpm2(tmp_path)
    path.write_text("".join(f"x{index}\n" for index in range(52736)), "utf-8")
    with pytest.raises(CheckpointError, match="outdated file that fits no released model"):
        open_cpm2(tmp_path)
    path.write_text(good.replace("<eod>", "<end>"), "utf-8")
    with pytest.raises(CheckpointError, match="has no token <eod>"):
        open_cpm2(tmp_path)
    path.write_text(good.replace("<mask>", "<sep>"), "utf-8")
    with pytest.raises(CheckpointError, match=r"vocab\.txt:7: '<sep>' is on line 5 already"):
        open_cpm2(tmp_path)
    path.write_bytes(good.encode("utf-16"))
    with pytest.raises(CheckpointError, match=r"vocab\.txt:1: .* is not UTF-8"):
        open_cpm2(tmp_path)
    path.unlink()
    with pytest.raises(CheckpointError, match=r"vocab\.txt is missing: put the one of 96 lines"):
        open_cpm2(tmp_path)
    with pytest.raises(CheckpointError, match=r"elsewhere\.txt: .*No such file"):
        open_cpm2(tmp_path, tmp_path / "elsewhere.txt")


def test_released_sizes_are_known_without_a_vocabulary(tmp_path):
    small = dataclasses.replace(TINY, vocab_size=26240, d_model=8, num_heads=2, d_ff=8)
    write_rank_files(tiny_model(small), tmp_path, 2)
    (tmp_path / "vocab.txt").unlink()
    source = open_cpm2(tmp_path)
    assert source.config == small
    assert source.tokenizer_files == {}


RELEASED = {
    "d_model": 32,
    "d_ff": 48,
    "d_kv": 4,
    "num_heads": 8,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "dropout_rate": 0.0,
    "feed_forward_proj": "relu",
    "layer_norm_epsilon": 1e-5,
    "max_position_embeddings": 512,
}


def test_released_config_is_compared(tmp_path, caplog):
    write_rank_files(tiny_model(), tmp_path, 1)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(RELEASED))
    assert open_cpm2(tmp_path).config == dataclasses.replace(TINY, norm_eps=1e-5)
    assert caplog.records == []
    path.write_text(json.dumps({**RELEASED, "num_decoder_layers": 12}))
    with caplog.at_level(logging.WARNING):
        assert open_cpm2(tmp_path).config.num_decoder_layers == 2
    assert "num_decoder_layers 12 is ignored" in caplog.text
    for change, message in [
        ({"d_ff": 64}, "d_ff is 64, the tensors tell 48"),
        ({"num_layers": 3}, "num_layers is 3, the tensors tell 2"),
        ({"layer_norm_epsilon": "tiny"}, "layer_norm_epsilon is 'tiny'; expected a number"),
        ({"layer_norm_epsilon": float("nan")}, "norm_eps is nan; it must lie"),
    ]:
        path.write_text(json.dumps({**RELEASED, **change}))
        with pytest.raises(CheckpointError, match=message):
            open_cpm2(tmp_path)
    for text in ("{", "[1]", "[" * 100_000):
        path.write_text(text)
        with pytest.raises(CheckpointError, match=r"config\.json: is no JSON"):
            open_cpm2(tmp_path)


# What stands beside the weights


def test_prompt_is_offered_separately(tmp_path):
    prompt = torch.randn(10, 32)

    def add(rank, state):
        state["encoder.prompt_embeds.weight"] = prompt

    write_rank_files(tiny_model(), tmp_path / "with", 2, change=add)
    source = open_cpm2(tmp_path / "with")
    assert torch.equal(source.prompt(), prompt)
    assert_same(build(source), tiny_model())
    write_rank_files(tiny_model(), tmp_path / "without", 2)
    assert open_cpm2(tmp_path / "without").prompt() is None


def test_copies_of_the_embedding_may_lack_but_not_differ(tmp_path):
    key = "decoder.word_embeds.weight"
    write_rank_files(tiny_model(), tmp_path / "a", 2, change=lambda _, state: state.pop(key))
    assert_same(build(open_cpm2(tmp_path / "a")), tiny_model())

    def spoil(rank, state):
        state[key][0, 0] += rank

    write_rank_files(tiny_model(), tmp_path / "b", 2, change=spoil)
    with pytest.raises(
        CheckpointError, match=r"mp_rank_01_.*: decoder\.word_embeds\.weight differs"
    ):
        open_cpm2(tmp_path / "b")


def test_warns_if_the_norms_of_experts_differ(tmp_path, caplog):
    model = tiny_model(MOE)
    model.experts.layers["decoder-1"]["norm"][2] += 1
    write_rank_files(model, tmp_path, 1, by_expert=True)
    assert_same(build(open_cpm2(tmp_path)), model)
    assert [record.getMessage() for record in caplog.records] == [
        "decoder-1: norms differ from that of expert 0: experts [2]"
    ]


# What can be wrong


def drop(rank, state):
    del state[KEY]


def drop_words(rank, state):
    for key in [key for key in state if key.endswith("word_embeds.weight")]:
        del state[key]


def add(rank, state):
    state["encoder.position_embeds.weight"] = torch.ones(2)


def misshape(rank, state):
    if rank == 1:
        state[KEY] = state[KEY][:-1]


def misshape_all(rank, state):
    state[KEY] = state[KEY][:-1]


def narrow_all(rank, state):
    state[KEY] = state[KEY][:, :-1].clone()


def flatten_columns(rank, state):
    key = "decoder.blocks.1.cross_attn.cross_attn.dense.weight"
    state[key] = state[key].flatten()


def scalar_rows(rank, state):
    state["lm_head.weight"] = torch.tensor(1.0)


def odd_heads(rank, state):
    for key in [key for key in state if key.endswith("relative_attention_bias.weight")]:
        state[key] = torch.ones(32, 3)


def lose_a_layer(rank, state):
    for key in [key for key in state if key.startswith("decoder.blocks.0.")]:
        del state[key]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop, rf"mp_rank_00_model_states\.pt: 1 tensors are missing, first {KEY}"),
        (drop_words, r"has no matrix word_embeds\.weight; this is no CPM-2"),
        (add, r"CPM-2 has no tensor encoder\.position_embeds\.weight"),
        (misshape, rf"mp_rank_01.*: {KEY} has shape \[47, 32\], expected \[48, 32\]"),
        (misshape_all, rf"mp_rank_00.*: {KEY} has shape \[47, 32\].* rows dividing by 3"),
        (narrow_all, r"self_attention\.qkv\.weight has shape \[96, 31\], expected \[96, 32\]"),
        (flatten_columns, r"cross_attn\.dense\.weight has shape \[512\], expected a matrix"),
        (scalar_rows, r"lm_head\.weight has shape \[\], expected a matrix"),
        (odd_heads, "32 attention columns do not divide by 6 heads"),
        (lose_a_layer, r"first decoder\.blocks\.0\."),
    ],
)
def test_wrong_tensors(tmp_path, change, message):
    write_rank_files(tiny_model(), tmp_path, 2, change=change)
    with pytest.raises(CheckpointError, match=message):
        build(open_cpm2(tmp_path))


def test_one_expert_is_no_mixture(tmp_path):
    def change(rank, state):
        to_moe_start(rank, state, num_experts=1)

    write_rank_files(tiny_model(), tmp_path, 1, change=change)
    with pytest.raises(CheckpointError, match="num_experts is 1"):
        open_cpm2(tmp_path)


def test_missing_rank_or_expert(tmp_path):
    folder = write_rank_files(tiny_model(), tmp_path / "dense", 4)
    (folder / "mp_rank_02_model_states.pt").unlink()
    with pytest.raises(CheckpointError, match=r"mp_rank_02_model_states\.pt is missing"):
        open_cpm2(tmp_path / "dense")
    folder = write_rank_files(tiny_model(MOE), tmp_path / "moe", 2, by_expert=True)
    (folder / "mp_rank_01_01_model_states.pt").unlink()
    with pytest.raises(CheckpointError, match=r"mp_rank_01_01_model_states\.pt is missing"):
        open_cpm2(tmp_path / "moe")
    for path in [*folder.glob("mp_rank_01*"), *folder.glob("mp_rank_02*"), *folder.glob("*_03_*")]:
        path.unlink()
    with pytest.raises(CheckpointError, match="has files of 1 experts, mp_rank_00_00.* tells of 4"):
        open_cpm2(tmp_path / "moe")


def test_expert_file_without_its_expert(tmp_path):
    folder = write_rank_files(tiny_model(MOE), tmp_path, 1, by_expert=True)
    key = "encoder.blocks.0.ff.expert_network.dense_relu_dense.wo.weight"
    state = rank_state(tiny_model(MOE), 0, 1, 3)
    del state[key]
    torch.save({"model": state}, folder / "mp_rank_03_00_model_states.pt")
    with pytest.raises(CheckpointError, match=rf"mp_rank_03_00_model_states\.pt: has no {key}"):
        build(open_cpm2(tmp_path))


def test_mixed_layouts(tmp_path):
    folder = write_rank_files(tiny_model(), tmp_path, 1)
    (folder / "mp_rank_00_00_model_states.pt").write_bytes(b"")
    with pytest.raises(CheckpointError, match="mixes rank files"):
        open_cpm2(tmp_path)


def test_pointer_to_the_iteration(tmp_path):
    folder = write_rank_files(tiny_model(), tmp_path, 1)
    latest = tmp_path / "latest_checkpointed_iteration.txt"
    assert find_iteration(tmp_path) == folder
    assert find_iteration(folder) == folder
    for text in ("99", "../x", "", "release"):
        latest.write_text(text)
        with pytest.raises(CheckpointError, match="which is no folder beside it"):
            find_iteration(tmp_path)
    latest.unlink()
    assert find_iteration(tmp_path) is None
    assert find_iteration(tmp_path / "absent") is None
    with pytest.raises(CheckpointError, match="has neither latest_checkpointed_iteration"):
        open_cpm2(tmp_path)
    (tmp_path / "5").mkdir()
    latest.write_text("5")
    with pytest.raises(CheckpointError, match="5: has no rank files"):
        open_cpm2(tmp_path)


@pytest.mark.parametrize("zip_format", [True, False])
def test_truncated_rank_file(tmp_path, zip_format):
    folder = write_rank_files(tiny_model(), tmp_path, 2, zip_format=zip_format)
    path = folder / "mp_rank_01_model_states.pt"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"mp_rank_01_model_states\.pt: truncated"):
        open_cpm2(tmp_path)


class Touch:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return subprocess.call, (["touch", str(self.path)],)


def test_malicious_rank_file_is_not_run(tmp_path):
    folder = write_rank_files(tiny_model(), tmp_path, 2)
    content = deepspeed_content(rank_state(tiny_model(), 1, 2))
    torch.save(
        {**content, "optimizer": Touch(tmp_path / "pwned")}, folder / "mp_rank_01_model_states.pt"
    )
    with pytest.raises(CheckpointError, match=r"mp_rank_01.*: refused: .*\.call"):
        open_cpm2(tmp_path)
    assert not (tmp_path / "pwned").exists()
