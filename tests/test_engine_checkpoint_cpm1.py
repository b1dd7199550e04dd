import dataclasses
import json

import pytest
import torch

from engine.checkpoint import build_model, load_model
from engine.checkpoint_any import detect_kind
from engine.checkpoint_cpm1 import open_ranks
from engine.checkpoint_cpm2 import Cpm2Source
from engine.convert import convert, inspect, load_any
from engine.errors import CheckpointError
from engine.generation import generate
from engine.prompt import build_request, check_tokenizer
from engine.request import Finished, SamplingParams
from engine.tokenizer import open_tokenizer
from tests import cpm2_files
from tests.cpm1_files import TINY, rank_state, tiny_model, vocabulary, write_rank_files
from tests.t5_oracle import one_thread

KEY = "transformer.layers.1.attention.query_key_value"


def build(source):
    return build_model("test", source.config, source.dtype, source.dense(), source.experts)


def assert_same(model, expected):
    assert model.config == expected.config
    assert model.state_dict().keys() == expected.state_dict().keys()
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, expected.state_dict()[key]), key


@pytest.mark.parametrize("zip_format", [True, False])
@pytest.mark.parametrize("mp", [1, 2, 4])
def test_from_any_number_of_ranks(tmp_path, mp, zip_format):
    model = tiny_model().half()
    folder = write_rank_files(model, tmp_path, mp, zip_format=zip_format)
    source = open_ranks(tmp_path)
    assert (source.kind, source.dtype, len(source.files)) == ("cpm1", torch.float16, mp)
    assert source.tokenizer_files == {"chinese_vocab.model": tmp_path / "chinese_vocab.model"}
    assert_same(build(source), model)
    (tmp_path / "config.json").rename(folder / "config.json")
    (tmp_path / "chinese_vocab.model").rename(folder / "chinese_vocab.model")
    assert open_ranks(folder).config == TINY


def test_weights_under_the_other_name(tmp_path):
    folder = write_rank_files(tiny_model(), tmp_path, 1)
    torch.save({"model": rank_state(tiny_model(), 0, 1)}, folder / "mp_rank_00_model_states.pt")
    assert_same(build(open_ranks(tmp_path)), tiny_model())


def hugging_face_twin(model):
    """The same weights in transformers' GPT-2, whose products are stored turned."""
    transformers = pytest.importorskip("transformers", reason="the oracle")
    config = model.config
    twin = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=config.vocab_size,
            n_embd=config.d_model,
            n_inner=config.d_ff,
            n_head=config.num_heads,
            n_layer=config.num_decoder_layers,
            n_positions=config.max_positions,
            bos_token_id=7,
            eos_token_id=7,
        )
    ).eval()
    theirs = rank_state(model, 0, 1)
    state = {"transformer.wte.weight": theirs["word_embeddings.weight"]}
    state["lm_head.weight"] = state["transformer.wte.weight"]
    state["transformer.wpe.weight"] = theirs["position_embeddings.weight"]
    names = {
        "input_layernorm": "ln_1",
        "attention.query_key_value": "attn.c_attn",
        "attention.dense": "attn.c_proj",
        "post_attention_layernorm": "ln_2",
        "mlp.dense_h_to_4h": "mlp.c_fc",
        "mlp.dense_4h_to_h": "mlp.c_proj",
    }
    for part in ("weight", "bias"):
        state[f"transformer.ln_f.{part}"] = theirs[f"transformer.final_layernorm.{part}"]
        for index in range(config.num_decoder_layers):
            for mine, name in names.items():
                tensor = theirs[f"transformer.layers.{index}.{mine}.{part}"]
                state[f"transformer.h.{index}.{name}.{part}"] = (
                    tensor.T if tensor.ndim == 2 else tensor
                )
    twin.load_state_dict(state)
    return twin


@one_thread()
@torch.no_grad()
def test_converted_it_equals_transformers_and_goes_on_with_a_text(tmp_path):
    write_rank_files(tiny_model(), tmp_path / "ranks", 2)
    convert(tmp_path / "ranks", tmp_path / "native")
    model = load_model(tmp_path / "native").eval()
    assert_same(model, tiny_model())
    twin = hugging_face_twin(model)
    tokenizer = open_tokenizer(tmp_path / "native", "cpm1")
    check_tokenizer(tokenizer, model.config)
    text = "今天天气不错\n我们去公园 吧"
    request = build_request(
        text, tokenizer, TINY, SamplingParams(max_tokens=20, temperature=0), "q"
    )
    assert list(request.encoder_ids) == tokenizer.encode(text)  # nothing is put before or after
    events = list(generate(model, tokenizer, request))
    assert isinstance(events[-1], Finished)
    ours = [i for event in events for i in getattr(event, "token_ids", ())]
    whole = torch.tensor([[*request.encoder_ids, *ours]])
    logits = twin(input_ids=whole).logits
    ours_logits = model.logits(model.read(whole, torch.ones_like(whole)))
    torch.testing.assert_close(ours_logits, logits, rtol=0, atol=1e-4)
    told = logits[0, len(request.encoder_ids) - 1 : -1].clone()
    unnamed = range(tokenizer.vocab_size, TINY.vocab_size)
    told[:, [*(tokenizer.control_ids - {7}), *unnamed]] = -torch.inf
    assert ours == told.argmax(-1).tolist()


def test_kinds_and_what_is_told(tmp_path):
    write_rank_files(tiny_model(), tmp_path / "one", 2)
    facts = inspect(tmp_path / "one")
    assert (facts["kind"], facts["dtype"]) == ("cpm1", "float32")
    assert facts["tokenizer_files"] == ["chinese_vocab.model"]
    assert [file["name"] for file in facts["files"]] == [
        f"80000/mp_rank_0{rank}_model_states.pt" for rank in (0, 1)
    ]
    assert detect_kind(tmp_path / "one") == "cpm"
    with pytest.raises(CheckpointError, match="holds pickles; run `infmoe convert`"):
        load_any(tmp_path / "one")
    with pytest.raises(CheckpointError, match="CPM-1 has no experts, so none of decoder-0"):
        open_ranks(tmp_path / "one").experts("decoder-0")
    cpm2_files.write_rank_files(cpm2_files.tiny_model(), tmp_path / "two", 1)
    assert isinstance(open_ranks(tmp_path / "two"), Cpm2Source)
    with pytest.raises(CheckpointError, match="has neither latest_checkpointed_iteration"):
        open_ranks(tmp_path)


# The vocabulary and the heads


def test_vocabulary_is_named_or_known(tmp_path):
    write_rank_files(tiny_model(), tmp_path / "a", 1)
    path = (tmp_path / "a" / "chinese_vocab.model").rename(tmp_path / "words")
    with pytest.raises(CheckpointError, match="is missing: put the one for 96 words beside"):
        open_ranks(tmp_path / "a")
    assert open_ranks(tmp_path / "a", path).config == TINY
    convert(tmp_path / "a", tmp_path / "native", vocab=path)
    assert open_tokenizer(tmp_path / "native", "cpm1").encode("天气")
    path.write_bytes(vocabulary(["<sep>", "<mask>"]))
    with pytest.raises(CheckpointError, match="words: lacks <pad> or <eod>"):
        open_ranks(tmp_path / "a", path)
    path.write_bytes(b"none")
    with pytest.raises(CheckpointError, match="words: not a SentencePiece model"):
        open_ranks(tmp_path / "a", path)
    small = dataclasses.replace(TINY, vocab_size=40)
    write_rank_files(tiny_model(small), tmp_path / "b", 1)
    with pytest.raises(CheckpointError, match=r"has \d+ pieces, the model has 40"):
        open_ranks(tmp_path / "b")
    released = dataclasses.replace(TINY, vocab_size=30000, d_model=8, d_kv=1, d_ff=8)
    write_rank_files(tiny_model(released), tmp_path / "c", 2)
    (tmp_path / "c" / "chinese_vocab.model").unlink()
    config = open_ranks(tmp_path / "c").config
    assert (config.pad_token_id, config.eos_token_ids) == (5, (7,))
    with pytest.raises(CheckpointError, match=r"chinese_vocab.model is missing; put it there"):
        convert(tmp_path / "c", tmp_path / "out")


def test_heads_are_those_of_the_released_model_so_wide(tmp_path):
    small = dataclasses.replace(
        TINY, d_model=768, d_kv=64, num_heads=12, num_decoder_layers=1, attention_scale=0.125
    )
    write_rank_files(tiny_model(small), tmp_path, 2)
    path = tmp_path / "config.json"
    path.unlink()
    assert open_ranks(tmp_path).config == small
    for heads in (5, "12", 0):
        path.write_text(json.dumps({"num_attention_heads": heads}))
        with pytest.raises(CheckpointError, match="it must divide the width 768"):
            open_ranks(tmp_path)


def test_heads_of_other_widths_are_asked_for(tmp_path):
    write_rank_files(tiny_model(), tmp_path, 1)
    (tmp_path / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r'write \{"num_attention_heads": N\} into config'):
        open_ranks(tmp_path)


# What can be wrong


def drop(rank, state):
    del state[f"{KEY}.bias"]


def add(rank, state):
    state["lm_head.weight"] = torch.ones(2)


def misshape(rank, state):
    if rank == 1:
        state[f"{KEY}.weight"] = state[f"{KEY}.weight"][:-1].clone()


def thicken(rank, state):
    state[f"{KEY}.bias"] = state[f"{KEY}.bias"].unsqueeze(0)


def shorten(rank, state):
    state["transformer.final_layernorm.bias"] = torch.ones(31)


def lose_positions(rank, state):
    del state["position_embeddings.weight"]


def lose_all_positions(rank, state):
    state["position_embeddings.weight"] = torch.ones(0, 32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop, rf"mp_rank_00_model_states\.pt: 1 tensors are missing, first {KEY}\.bias"),
        (add, r"CPM-1 has no tensor lm_head\.weight"),
        (misshape, rf"mp_rank_01.*: {KEY}\.weight has shape \[47, 32\], expected \[48, 32\]"),
        (thicken, rf"{KEY}\.bias has shape \[1, 48\], expected a vector"),
        (shorten, r"decoder\.norm\.bias has shape \[31\], expected \[32\]"),
        (lose_positions, r"has no matrix position_embeddings\.weight; this is no CPM-1"),
        (lose_all_positions, "max_positions is 0"),
    ],
)
def test_wrong_tensors(tmp_path, change, message):
    write_rank_files(tiny_model(), tmp_path, 2, change=change)
    with pytest.raises(CheckpointError, match=message):
        build(open_ranks(tmp_path))


def test_missing_rank(tmp_path):
    folder = write_rank_files(tiny_model(), tmp_path, 2)
    (folder / "mp_rank_00_model_states.pt").unlink()
    with pytest.raises(CheckpointError, match=r"mp_rank_00_model_states\.pt is missing"):
        open_ranks(tmp_path)
