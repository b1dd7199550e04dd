"""Writes models as released CPM-1 rank files: the inverse of the loader, kept apart from it."""

import io
import json
from collections.abc import Callable
from pathlib import Path

import torch
from sentencepiece import SentencePieceTrainer

from engine.config import ModelConfig
from engine.model.initial import initialize
from engine.model.transformer import Transformer
from tests.cpm2_files import State, deepspeed_content, split_columns, split_rows

LINES = [
    "今天 天气 不错 ， 我们 去 公园 吧 。",
    "这 是 关于 体育 的 文章 ： 他 跑 得 很快 。",
    "红色 是 对 的 也许 错 了 ？",
]
MARKS = ["\u2583", "<sep>", "<pad>", "<mask>", "<eod>", "\u2582"]
TINY = ModelConfig(
    vocab_size=96,
    d_model=32,
    d_ff=48,
    d_kv=4,
    num_heads=8,
    num_encoder_layers=0,
    num_decoder_layers=2,
    positions="learned",
    attention_scale=0.5,
    activation="gelu_tanh",
    gated=False,
    norm="layer",
    norm_bias=True,
    qkv_bias=True,
    out_bias=True,
    ff_bias=True,
    norm_eps=1e-5,
    tied_embeddings=True,
    max_positions=64,
    pad_token_id=5,
    decoder_start_token_id=5,
    eos_token_ids=(7,),
    continuation_sentinel=None,
    tokenizer="cpm1",
)


def tiny_model(config: ModelConfig = TINY, seed: int = 0) -> Transformer:
    """A random model whose biases and norms are not those that a model begins with."""
    model = Transformer(config)
    initialize(model, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.ndim == 1:
                low = 0.5 if name.endswith("norm.weight") else -0.5
                tensor.uniform_(low, low + 1, generator=generator)
    return model.requires_grad_(False)


def vocabulary(marks: list[str] = MARKS) -> bytes:
    """A SentencePiece model whose marks have the ids of the released one."""
    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(LINES * 20),
        model_writer=model,
        vocab_size=80,
        hard_vocab_limit=False,
        minloglevel=2,
        user_defined_symbols=marks,
    )
    return model.getvalue()


def rank_state(model: Transformer, rank: int, mp: int) -> State:
    """What rank `rank` of `mp` holds."""
    ours, state = model.state_dict(), State()
    state["word_embeddings.weight"] = split_rows(ours["embedding.weight"], rank, mp)
    state["position_embeddings.weight"] = ours["positions.weight"]
    for name in ("weight", "bias"):
        state[f"transformer.final_layernorm.{name}"] = ours[f"decoder.norm.{name}"]
        for index in range(model.config.num_decoder_layers):
            mine, theirs = f"decoder.layers.{index}", f"transformer.layers.{index}"
            own, ff = f"{mine}.self_attention", f"{mine}.feed_forward"
            state[f"{theirs}.input_layernorm.{name}"] = ours[f"{own}.norm.{name}"]
            state[f"{theirs}.post_attention_layernorm.{name}"] = ours[f"{ff}.norm.{name}"]
            qkv, wide = ours[f"{own}.qkv.{name}"], ours[f"{ff}.wi_0.{name}"]
            state[f"{theirs}.attention.query_key_value.{name}"] = split_rows(qkv, rank, mp, 3)
            state[f"{theirs}.mlp.dense_h_to_4h.{name}"] = split_rows(wide, rank, mp)
            for key, narrow in (
                ("attention.dense", f"{own}.out"),
                ("mlp.dense_4h_to_h", f"{ff}.wo"),
            ):
                tensor = ours[f"{narrow}.{name}"]
                is_cut = name == "weight"
                state[f"{theirs}.{key}.{name}"] = (
                    split_columns(tensor, rank, mp) if is_cut else tensor
                )
    return {key: tensor.clone() for key, tensor in state.items()}


def write_rank_files(
    model: Transformer,
    root: Path,
    mp: int,
    *,
    zip_format: bool = True,
    change: Callable[[int, State], None] | None = None,
) -> Path:
    """Write a checkpoint of `mp` ranks with its vocabulary. Returns ROOT/ITER.

    `change` may spoil the state of a rank before it is written.
    """
    folder = root / "80000"
    folder.mkdir(parents=True)
    (root / "latest_checkpointed_iteration.txt").write_text("80000")
    (root / "chinese_vocab.model").write_bytes(vocabulary())
    (root / "config.json").write_text(json.dumps({"num_attention_heads": model.config.num_heads}))
    for rank in range(mp):
        state = rank_state(model, rank, mp)
        if change is not None:
            change(rank, state)
        torch.save(
            deepspeed_content(state),
            folder / f"mp_rank_{rank:02d}_model_states.pt",
            _use_new_zipfile_serialization=zip_format,
        )
    return folder
