"""Released CPM-2 checkpoints: torch pickles of many ranks, dense or mixture-of-experts.

    ROOT/latest_checkpointed_iteration.txt         names ITER
    ROOT/ITER/mp_rank_{MM}_model_states.pt         dense, or a MoE start whose experts are all alike
    ROOT/ITER/mp_rank_{EE}_{MM}_model_states.pt    MoE: expert EE, model-parallel rank MM
    ROOT/vocab.txt                                 put there by the user

Files are mapped and read one tensor at a time: the 386 GB of CPM-2-MoE need memory for one expert.
(Files of torch before 1.6 cannot be mapped: there the files of one expert are read whole.)
"""

import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from engine.checkpoint_cpm2_layout import (
    PROMPT,
    WORD_COPIES,
    WORDS,
    dense_names,
    expert_names,
    infer_sizes,
)
from engine.checkpoint_hf_config import read_epsilon
from engine.checkpoint_ranks import (
    LATEST,
    Names,
    Ranks,
    State,
    find_iteration,
    find_ranks,
    merge_ranks,
    read_state,
)
from engine.checkpoint_tensors import read_json
from engine.config import ModelConfig, TokenizerKind
from engine.errors import CheckpointError, ConfigError, TokenizerError
from engine.tokenizer_cpm2 import read_vocabulary

logger = logging.getLogger(__name__)

VOCABULARY = "vocab.txt"
OUTDATED_VOCABULARY = (
    52736  # a file of that many lines is in the pre-training code, fitting no model
)


class Vocabulary(NamedTuple):
    """What the model needs to know of vocab.txt."""

    kind: TokenizerKind
    pad: int
    start: int
    end: int


KNOWN_VOCABULARIES = {  # by size, for a look at a checkpoint without its vocab.txt
    26240: Vocabulary("cpm2_zh", 5, 1, 7),
    51968: Vocabulary("cpm2_zh_en", 5, 1, 8),
}


class Cpm2Source:
    """An open CPM-2 checkpoint, read one tensor or one expert at a time."""

    kind = "cpm2"

    def __init__(
        self, ranks: Ranks, states: list[State], config: ModelConfig, vocab: Path | None
    ) -> None:
        self._ranks = ranks
        self._states = states  # of expert 0, or of the only set of ranks
        self._vocab = vocab
        self.config = config

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the embedding, and so of all tensors."""
        return self._states[0][WORDS].dtype

    @property
    def tokenizer_files(self) -> dict[str, Path]:
        """The vocabulary, if there is one."""
        return {} if self._vocab is None else {VOCABULARY: self._vocab}

    @property
    def files(self) -> tuple[Path, ...]:
        """The rank files."""
        return tuple(path for row in self._ranks.rows for path in row)

    def dense(self) -> Iterator[tuple[str, Tensor]]:
        """Names and merged tensors of all that is not an expert."""
        for name, (key, cut) in dense_names(self.config).items():
            yield name, merge_ranks(self._ranks.rows[0], self._states, key, cut)

    def experts(self, layer: str) -> Iterator[State]:
        """The merged experts of a layer in order.

        Warns if their norms differ: the router has one norm for all, that of expert 0.
        """
        names, rows = expert_names(layer), self._ranks.rows
        if not self._ranks.is_by_expert:
            shared = self._expert(rows[0], self._states, names)
            for _ in range(self.config.num_experts):
                yield shared
            return
        norm = merge_ranks(rows[0], self._states, *names["norm"])
        odd = []
        for expert, row in enumerate(rows):
            states = [read_state(path) for path in row] if expert else self._states
            if not torch.equal(merge_ranks(row, states, *names["norm"]), norm):
                odd.append(expert)
            yield self._expert(row, states, names)  # no name here keeps it in memory
            states = []
        if odd:
            logger.warning("%s: norms differ from that of expert 0: experts %s", layer, odd)

    def prompt(self) -> Tensor | None:
        """The soft prompt (P, D) that was stored with the model, if any."""
        return self._states[0].get(PROMPT)

    def _expert(self, row: list[Path], states: list[State], names: Names) -> State:
        return {name: merge_ranks(row, states, key, cut) for name, (key, cut) in names.items()}


def open_cpm2(root: Path, vocab: Path | None = None) -> Cpm2Source:
    """Open a CPM-2 checkpoint; the first rank files are mapped and all keys checked.

    The vocabulary is `vocab`, else vocab.txt in the folder. A config.json there, with the keys of
    the released one, is compared with the sizes that the tensors tell.
    Raises CheckpointError if files or tensors are missing, left over, or disagree.
    """
    folder = find_iteration(root)
    if folder is None:
        raise CheckpointError(f"{root}: has neither {LATEST} nor rank files")
    ranks = find_ranks(folder)
    states = [read_state(path) for path in ranks.rows[0]]
    path = ranks.rows[0][0]
    sizes = infer_sizes(path, states[0], len(states))
    if ranks.is_by_expert and sizes.get("num_experts") != len(ranks.rows):
        raise CheckpointError(
            f"{folder}: has files of {len(ranks.rows)} experts, {path.name} tells of "
            f"{sizes.get('num_experts', 0)}"
        )
    vocab = vocab or next((p for p in (root / VOCABULARY, folder / VOCABULARY) if p.exists()), None)
    known = _read_vocabulary(vocab, sizes["vocab_size"])
    try:
        config = ModelConfig(
            **sizes,  # type: ignore[arg-type]  # all of them are integers
            tokenizer=known.kind,
            pad_token_id=known.pad,
            decoder_start_token_id=known.start,
            eos_token_ids=(known.end,),
        )
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from error
    config = _check_config_file(root / "config.json", config)
    _check_states(ranks.rows[0], states, config)
    return Cpm2Source(ranks, states, config, vocab)


def _check_states(paths: list[Path], states: list[State], config: ModelConfig) -> None:
    """Raise CheckpointError if a key is missing or unknown, or a copy of the embedding differs."""
    needed = {key for key, _ in dense_names(config).values()}
    for layer in config.moe_layers():
        needed |= {key for key, _ in expert_names(layer).values()}
    for path, state in zip(paths, states, strict=True):
        if missing := sorted(needed - state.keys()):
            raise CheckpointError(f"{path}: {len(missing)} tensors are missing, first {missing[0]}")
        if unknown := sorted(state.keys() - needed - {*WORD_COPIES, PROMPT}):
            raise CheckpointError(f"{path}: CPM-2 has no tensor {unknown[0]}")
        for key in WORD_COPIES:
            if key in state and not torch.equal(state[key], state[WORDS]):
                raise CheckpointError(f"{path}: {key} differs from {WORDS}; they must be equal")


def _read_vocabulary(path: Path | None, vocab_size: int) -> Vocabulary:
    """What the vocabulary tells; for the released sizes it is known without the file."""
    if path is None:
        if vocab_size not in KNOWN_VOCABULARIES:
            raise CheckpointError(
                f"{VOCABULARY} is missing: put the one of {vocab_size} lines beside {LATEST}, "
                "or name it"
            )
        return KNOWN_VOCABULARIES[vocab_size]
    try:
        tokens = read_vocabulary(path)
    except TokenizerError as error:
        raise CheckpointError(str(error)) from error
    if len(tokens) != vocab_size:
        outdated = len(tokens) == OUTDATED_VOCABULARY
        hint = "; it is an outdated file that fits no released model" if outdated else ""
        raise CheckpointError(f"{path}: has {len(tokens)} lines, the model has {vocab_size}{hint}")
    ids = {token: index for index, token in enumerate(tokens)}
    if missing := [token for token in ("<pad>", "<s>", "<eod>") if token not in ids]:
        raise CheckpointError(f"{path}: has no token {missing[0]}; this is no CPM-2 vocabulary")
    kind: TokenizerKind = "cpm2_zh"
    if any(token.startswith("##") and token != "##" for token in tokens):
        kind = "cpm2_zh_en"
    return Vocabulary(kind, ids["<pad>"], ids["<s>"], ids["<eod>"])


def _check_config_file(path: Path, config: ModelConfig) -> ModelConfig:
    """Compare the released config, if there is one, with the sizes found; it tells the epsilon.

    `feed_forward_proj` and `num_decoder_layers` are ignored, as the released code does.
    """
    if not path.exists():
        return config
    values = read_json(path)
    try:
        config = replace(config, norm_eps=read_epsilon(values))
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from error
    found = {
        "d_model": config.d_model,
        "d_ff": config.d_ff,
        "d_kv": config.d_kv,
        "num_heads": config.num_heads,
        "num_layers": config.num_encoder_layers,
        "relative_attention_num_buckets": config.relative_buckets,
        "vocab_size": config.vocab_size,
    }
    for key, size in found.items():
        if values.get(key, size) != size:
            raise CheckpointError(f"{path}: {key} is {values[key]!r}, the tensors tell {size}")
    decoder_layers = values.get("num_decoder_layers", config.num_decoder_layers)
    if decoder_layers != config.num_decoder_layers:
        logger.warning(
            "%s: num_decoder_layers %s is ignored; the tensors tell %d",
            path,
            decoder_layers,
            config.num_decoder_layers,
        )
    return config
