"""Released CPM-2 checkpoints: torch pickles of many ranks, dense or mixture-of-experts.

    ROOT/latest_checkpointed_iteration.txt         names ITER
    ROOT/ITER/mp_rank_{MM}_model_states.pt         dense, or a MoE start whose experts are all alike
    ROOT/ITER/mp_rank_{EE}_{MM}_model_states.pt    MoE: expert EE, model-parallel rank MM
    ROOT/vocab.txt                                 put there by the user

Files are mapped and read one tensor at a time: the 386 GB of CPM-2-MoE need memory for one expert.
(Files of torch before 1.6 cannot be mapped: there the files of one expert are read whole.)
"""

import logging
import re
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
    Cut,
    Names,
    dense_names,
    expert_names,
    infer_sizes,
    merge,
)
from engine.checkpoint_hf_config import read_epsilon
from engine.checkpoint_tensors import read_json, translated
from engine.config import ModelConfig, TokenizerKind
from engine.errors import CheckpointError, ConfigError, TokenizerError
from engine.pickles import load_state
from engine.tokenizer_cpm2 import read_vocabulary

logger = logging.getLogger(__name__)

LATEST = "latest_checkpointed_iteration.txt"
VOCABULARY = "vocab.txt"
RANK_FILE = re.compile(r"mp_rank_(?:(\d{2,})_)?(\d{2,})_model_states\.pt")
PLACES = ("module", "model")  # DeepSpeed's name, and that of the MoE training code
OUTDATED_VOCABULARY = (
    52736  # a file of that many lines is in the pre-training code, fitting no model
)
State = dict[str, Tensor]


class Ranks(NamedTuple):
    """The rank files: one row per expert, or one row in all. `rows[e][m]` is of rank m."""

    rows: list[list[Path]]
    is_by_expert: bool


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
            yield name, self._merge(self._ranks.rows[0], self._states, key, cut)

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
        norm = self._merge(rows[0], self._states, *names["norm"])
        odd = []
        for expert, row in enumerate(rows):
            states = [_read_state(path) for path in row] if expert else self._states
            if not torch.equal(self._merge(row, states, *names["norm"]), norm):
                odd.append(expert)
            yield self._expert(row, states, names)  # no name here keeps it in memory
            states = []
        if odd:
            logger.warning("%s: norms differ from that of expert 0: experts %s", layer, odd)

    def prompt(self) -> Tensor | None:
        """The soft prompt (P, D) that was stored with the model, if any."""
        return self._states[0].get(PROMPT)

    def _expert(self, row: list[Path], states: list[State], names: Names) -> State:
        return {name: self._merge(row, states, key, cut) for name, (key, cut) in names.items()}

    def _merge(self, row: list[Path], states: list[State], key: str, cut: Cut) -> Tensor:
        for path, state in zip(row, states, strict=True):
            if key not in state:
                raise CheckpointError(f"{path}: has no {key}")
            found, expected = state[key].shape, states[0][key].shape
            if cut.dim is not None and len(found) != 2:
                raise CheckpointError(f"{path}: {key} has shape {list(found)}, expected a matrix")
            if found != expected or (cut.parts > 1 and found[0] % cut.parts):
                raise CheckpointError(
                    f"{path}: {key} has shape {list(found)}, expected {list(expected)} "
                    f"as in {row[0].name}, rows dividing by {cut.parts}"
                )
        return merge([state[key] for state in states], cut)


def find_iteration(root: Path) -> Path | None:
    """The folder of rank files that a checkpoint folder points to, or is itself; None if neither.

    Raises CheckpointError if it points to nothing.
    """
    latest = root / LATEST
    if latest.is_file():
        with translated(latest, "read"):
            text = latest.read_bytes()[:100].decode("utf-8", "replace").strip()
        if not text.isdecimal() or not (root / text).is_dir():
            raise CheckpointError(f"{latest}: names {text!r}, which is no folder beside it")
        return root / text
    with translated(root, "listed"):
        names = [path.name for path in root.iterdir()] if root.is_dir() else []
    return root if any(RANK_FILE.fullmatch(name) for name in names) else None


def open_cpm2(root: Path, vocab: Path | None = None) -> Cpm2Source:
    """Open a CPM-2 checkpoint; the first rank files are mapped and all keys checked.

    The vocabulary is `vocab`, else vocab.txt in the folder. A config.json there, with the keys of
    the released one, is compared with the sizes that the tensors tell.
    Raises CheckpointError if files or tensors are missing, left over, or disagree.
    """
    folder = find_iteration(root)
    if folder is None:
        raise CheckpointError(f"{root}: has neither {LATEST} nor rank files")
    ranks = _find_ranks(folder)
    states = [_read_state(path) for path in ranks.rows[0]]
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


def _find_ranks(folder: Path) -> Ranks:
    """List the rank files. Raises CheckpointError if one is missing."""
    found: dict[tuple[int, int], Path] = {}
    is_by_expert = False
    with translated(folder, "listed"):
        matches = [(path, RANK_FILE.fullmatch(path.name)) for path in sorted(folder.iterdir())]
    for path, match in matches:
        if match is None:
            continue
        if found and is_by_expert != (match[1] is not None):
            raise CheckpointError(f"{folder}: mixes rank files with and without an expert number")
        is_by_expert = match[1] is not None
        found[int(match[1] or 0), int(match[2])] = path
    if not found:
        raise CheckpointError(f"{folder}: has no rank files mp_rank_*_model_states.pt")
    num_rows, num_ranks = (1 + max(place[axis] for place in found) for axis in (0, 1))
    for row in range(num_rows):
        for rank in range(num_ranks):
            if (row, rank) not in found:
                name = f"mp_rank_{row:02d}_{rank:02d}" if is_by_expert else f"mp_rank_{rank:02d}"
                raise CheckpointError(f"{folder}: {name}_model_states.pt is missing; copy it again")
    rows = [[found[row, rank] for rank in range(num_ranks)] for row in range(num_rows)]
    return Ranks(rows, is_by_expert)


def _read_state(path: Path) -> State:
    return load_state(path, PLACES)


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
