"""Released CPM-1 checkpoints: torch pickles of GPT-2-like decoders, cut over ranks by Megatron-LM.

    ROOT/latest_checkpointed_iteration.txt     names ITER (80000)
    ROOT/ITER/mp_rank_{MM}_model_states.pt     of two ranks, or of as many as it was cut again for
    ROOT/chinese_vocab.model                   put there by the user
    ROOT/config.json                           {"num_attention_heads": 8}; not for released sizes

No tensor tells the number of heads.

Source: CPM-1 (arXiv:2012.00413) and its released generation code.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from engine.checkpoint_cpm2 import Cpm2Source, open_cpm2
from engine.checkpoint_ranks import (
    COLUMNS,
    LATEST,
    ROWS,
    WHOLE,
    Cut,
    Names,
    State,
    find_iteration,
    find_ranks,
    merge_ranks,
    merged_shape,
    read_state,
)
from engine.checkpoint_tensors import Shape, read_json
from engine.config import ModelConfig
from engine.errors import CheckpointError, ConfigError, TokenizerError
from engine.tokenizer_sentencepiece import load_model

VOCABULARY = "chinese_vocab.model"
CONFIG = "config.json"
HEADS = "num_attention_heads"
WORDS = "word_embeddings.weight"
POSITIONS = "position_embeddings.weight"
FIRST = "transformer.layers.0."
RELEASED_HEADS = {768: 12, 1024: 16, 2560: 32}  # by width: small, medium, large
RELEASED_WORDS = 30000
LAYER_NORM_EPS = 1e-5
BLOCK = {  # our module -> theirs, and how its weight and its bias are cut
    "self_attention.norm": ("input_layernorm", WHOLE, WHOLE),
    "self_attention.qkv": ("attention.query_key_value", Cut(0, 3), Cut(0, 3)),
    "self_attention.out": ("attention.dense", COLUMNS, WHOLE),
    "feed_forward.norm": ("post_attention_layernorm", WHOLE, WHOLE),
    "feed_forward.wi_0": ("mlp.dense_h_to_4h", ROWS, ROWS),
    "feed_forward.wo": ("mlp.dense_4h_to_h", COLUMNS, WHOLE),
}


class Marks(NamedTuple):
    """Ids of padding and of the end of a text."""

    pad: int
    end: int


class Cpm1Source:
    """An open CPM-1 checkpoint, read one tensor at a time."""

    kind = "cpm1"

    def __init__(
        self, paths: list[Path], states: list[State], config: ModelConfig, vocab: Path | None
    ) -> None:
        self._paths = paths
        self._states = states
        self._vocab = vocab
        self.config = config

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the embedding, and so of all tensors."""
        return self._states[0][WORDS].dtype

    @property
    def tokenizer_files(self) -> dict[str, Path]:
        """The SentencePiece model, if there is one."""
        return {} if self._vocab is None else {VOCABULARY: self._vocab}

    @property
    def files(self) -> tuple[Path, ...]:
        """The rank files."""
        return tuple(self._paths)

    def dense(self) -> Iterator[tuple[str, Tensor]]:
        """Names and merged tensors of the model."""
        for name, (key, cut) in tensor_names(self.config).items():
            yield name, merge_ranks(self._paths, self._states, key, cut)

    def experts(self, layer: str) -> Iterator[State]:
        """None: the model is dense."""
        raise CheckpointError(f"{self._paths[0]}: CPM-1 has no experts, so none of {layer}")


def open_ranks(root: Path, vocab: Path | None = None) -> Cpm1Source | Cpm2Source:
    """Open rank files as those of CPM-1 or of CPM-2, as their tensors tell.

    The vocabulary is `vocab`, else the one beside the files.
    Raises CheckpointError if files or tensors are missing, left over, or disagree.
    """
    folder = find_iteration(root)
    if folder is None:
        raise CheckpointError(f"{root}: has neither {LATEST} nor rank files")
    ranks = find_ranks(folder)
    if ranks.is_by_expert:
        return open_cpm2(root, vocab)
    paths = ranks.rows[0]
    first = read_state(paths[0])
    if WORDS not in first:
        del first  # a file that cannot be mapped is in memory
        return open_cpm2(root, vocab)
    states = [first, *map(read_state, paths[1:])]
    vocab = vocab or next((p for p in (root / VOCABULARY, folder / VOCABULARY) if p.exists()), None)
    config = _read_config(root, paths[0], states, vocab)
    _check_states(paths, states, config)
    return Cpm1Source(paths, states, config, vocab)


def tensor_names(config: ModelConfig) -> Names:
    """Our name of each tensor -> its key in the rank files and its cut."""
    names: Names = {
        "embedding.weight": (WORDS, ROWS),
        "positions.weight": (POSITIONS, WHOLE),
        "decoder.norm.weight": ("transformer.final_layernorm.weight", WHOLE),
        "decoder.norm.bias": ("transformer.final_layernorm.bias", WHOLE),
    }
    for index in range(config.num_decoder_layers):
        for ours, (theirs, weight, bias) in BLOCK.items():
            name, key = f"decoder.layers.{index}.{ours}", f"transformer.layers.{index}.{theirs}"
            names[f"{name}.weight"] = (f"{key}.weight", weight)
            names[f"{name}.bias"] = (f"{key}.bias", bias)
    return names


def _read_config(root: Path, path: Path, states: list[State], vocab: Path | None) -> ModelConfig:
    state = states[0]

    def shape(key: str, cut: Cut) -> Shape:
        if key not in state or state[key].ndim != 2:
            raise CheckpointError(f"{path}: has no matrix {key}; this is no CPM-1 checkpoint")
        return merged_shape(tuple(state[key].shape), cut, len(states))

    vocab_size, d_model = shape(WORDS, ROWS)
    layers = {
        found[1] for key in state if (found := re.match(r"transformer\.layers\.(\d+)\.", key))
    }
    num_heads = _read_heads(root / CONFIG, d_model)
    marks = _read_marks(vocab, vocab_size)
    try:
        return ModelConfig(
            vocab_size=vocab_size,
            d_model=d_model,
            d_ff=shape(f"{FIRST}mlp.dense_h_to_4h.weight", ROWS)[0],
            d_kv=d_model // num_heads,
            num_heads=num_heads,
            num_encoder_layers=0,
            num_decoder_layers=len(layers),
            positions="learned",
            attention_scale=(d_model // num_heads) ** -0.5,
            activation="gelu_tanh",
            gated=False,
            norm="layer",
            norm_bias=True,
            qkv_bias=True,
            out_bias=True,
            ff_bias=True,
            norm_eps=LAYER_NORM_EPS,
            tied_embeddings=True,
            max_positions=shape(POSITIONS, WHOLE)[0],
            pad_token_id=marks.pad,
            decoder_start_token_id=marks.pad,
            eos_token_ids=(marks.end,),
            continuation_sentinel=None,
            tokenizer="cpm1",
        )
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from error


def _read_heads(path: Path, d_model: int) -> int:
    """The number of heads: as config.json says, otherwise that of the released model so wide."""
    values: Mapping[str, object] = read_json(path) if path.exists() else {}
    heads = values.get(HEADS, RELEASED_HEADS.get(d_model))
    if heads is None:
        raise CheckpointError(
            f"{path.parent}: a model of width {d_model} was not released, and no tensor tells its "
            f'heads; write {{"{HEADS}": N}} into {CONFIG} there'
        )
    if type(heads) is not int or heads < 1 or d_model % heads:
        raise CheckpointError(f"{path}: {HEADS} is {heads!r}; it must divide the width {d_model}")
    return heads


def _read_marks(path: Path | None, vocab_size: int) -> Marks:
    """Ids of the marks; of the released vocabulary they are known without the file."""
    if path is None:
        if vocab_size != RELEASED_WORDS:
            raise CheckpointError(
                f"{VOCABULARY} is missing: put the one for {vocab_size} words beside {LATEST}, or "
                "name it"
            )
        return Marks(pad=5, end=7)
    try:
        model = load_model(path)
    except TokenizerError as error:
        raise CheckpointError(str(error)) from error
    if model.get_piece_size() > vocab_size:
        raise CheckpointError(
            f"{path}: has {model.get_piece_size()} pieces, the model has {vocab_size}"
        )
    pad, end = (model.piece_to_id(mark) for mark in ("<pad>", "<eod>"))
    if model.unk_id() in (pad, end):
        raise CheckpointError(f"{path}: lacks <pad> or <eod>; this is no vocabulary of CPM-1")
    return Marks(pad, end)


def _check_states(paths: list[Path], states: list[State], config: ModelConfig) -> None:
    """Raise CheckpointError if a key is missing or unknown."""
    needed = {key for key, _ in tensor_names(config).values()}
    for path, state in zip(paths, states, strict=True):
        if missing := sorted(needed - state.keys()):
            raise CheckpointError(f"{path}: {len(missing)} tensors are missing, first {missing[0]}")
        if unknown := sorted(state.keys() - needed):
            raise CheckpointError(f"{path}: CPM-1 has no tensor {unknown[0]}")
