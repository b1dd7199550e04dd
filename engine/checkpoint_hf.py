"""Hugging Face directories, read as they are released, one tensor or one expert at a time.

What differs between families is in `checkpoint_hf_families.py`.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from engine.checkpoint import check_directory, find_tokenizer_files
from engine.checkpoint_hf_config import Values, read_ids
from engine.checkpoint_hf_families import find_family
from engine.checkpoint_hf_files import Tensors, open_weights, read_part
from engine.checkpoint_hf_fp8 import Fp8Tensors, read_fp8_block
from engine.checkpoint_hf_recipes import Checkpoint, Family, Recipe
from engine.checkpoint_tensors import read_json
from engine.config import ModelConfig
from engine.errors import CheckpointError, ConfigError, TokenizerError

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"


class HuggingFaceSource:
    """An open Hugging Face directory, read one tensor or one expert at a time."""

    kind = "huggingface"

    def __init__(
        self, directory: Path, family: Family, checkpoint: Checkpoint, tensors: Tensors
    ) -> None:
        self.directory = directory
        self.config = checkpoint.config
        self._family = family
        self._checkpoint = checkpoint
        self._tensors = tensors
        self._embedding = _embedding_key(family, checkpoint.keys)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the embedding."""
        return self._tensors.dtype(self._embedding)

    @property
    def tokenizer_files(self) -> dict[str, Path]:
        """The tokenizer files that are there, by name."""
        return find_tokenizer_files(self.directory)

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that hold tensors."""
        return self._tensors.files

    def dense(self) -> Iterator[tuple[str, Tensor]]:
        """Names and tensors of all that is not an expert."""
        for recipe in self._family.dense(self._checkpoint):
            yield from self._make(recipe)

    def experts(self, layer: str) -> Iterator[dict[str, Tensor]]:
        """The experts of a layer, in order. Raises ValueError if the layer has none."""
        if layer not in self.config.moe_layers():
            raise ValueError(f"{self.directory}: {layer} has no experts")
        for expert in range(self.config.num_experts):
            recipes = self._family.experts(self._checkpoint, layer, expert)
            yield dict(made for recipe in recipes for made in self._make(recipe))

    def _make(self, recipe: Recipe) -> Iterable[tuple[str, Tensor]]:
        first = self._family.embeddings[0]
        parts = [
            read_part(
                self.directory,
                self._tensors,
                part._replace(key=self._embedding) if part.key == first else part,
            )
            for part in recipe.parts
        ]
        return zip(recipe.names, recipe.make(parts), strict=True)


def is_huggingface(directory: Path) -> bool:
    """Whether config.json tells a model_type, as transformers writes it."""
    if not (directory / CONFIG).is_file():
        return False
    try:
        return "model_type" in read_json(directory / CONFIG)
    except CheckpointError:
        return False


def open_huggingface(directory: Path, *, allow_pickles: bool = False) -> HuggingFaceSource:
    """Open a directory of a supported model_type; all keys are checked.

    Raises CheckpointError if the family or something that its config tells is not supported,
    tensors are missing or left over, copies of the embedding differ, or the weights are pickles and
    those are not allowed.
    """
    check_directory(directory)
    values = read_values(directory)
    open_tensors = partial(_open_tensors, directory, values, allow_pickles=allow_pickles)
    try:
        return make_source(directory, values, open_tensors, partial(_begin_ids, directory))
    except ConfigError as error:
        raise CheckpointError(f"{directory / CONFIG}: {error}") from error


def _open_tensors(
    directory: Path, values: Values, is_ignored: Callable[[str], bool], *, allow_pickles: bool
) -> Tensors:
    """The tensors of a directory, dequantised if they are fp8."""
    block = read_fp8_block(values)
    tensors = open_weights(directory, is_ignored, allow_pickles=allow_pickles)
    return tensors if block is None else Fp8Tensors(directory, tensors, block)


def make_source(
    where: Path,
    values: Values,
    open_tensors: Callable[[Callable[[str], bool]], Tensors],
    begin: Callable[[ModelConfig], tuple[int, ...]],
) -> HuggingFaceSource:
    """Join what config.json tells and tensors, which are opened once it is known which to ignore.

    `begin` tells what is read before a text. Raises ConfigError or CheckpointError as
    `open_huggingface` does.
    """
    family = find_family(values)
    config = family.map_config(values)

    def is_ignored(key: str) -> bool:
        return family.is_ignored(key, config, values)

    tensors = open_tensors(is_ignored)
    keys = frozenset(key for key in tensors.names() if not is_ignored(key))
    is_tied = _is_tied(where, family, values, tensors, keys)
    found = replace(config, tied_embeddings=is_tied, begin_token_ids=begin(config))
    checkpoint = Checkpoint(found, values, keys)
    _check_keys(where, family, checkpoint, tensors)
    return HuggingFaceSource(where, family, checkpoint, tensors)


def read_values(directory: Path) -> Values:
    """What config.json tells, and generation_config.json where that says nothing.

    Ids that end an answer are those of both. Raises CheckpointError if one cannot be read.
    """
    values, generation = read_json(directory / CONFIG), dict[str, object]()
    if (directory / GENERATION_CONFIG).exists():
        generation = read_json(directory / GENERATION_CONFIG)
    told = {key: value for key, value in values.items() if value is not None}
    try:
        ends = [read_ids(part, "eos_token_id") for part in (told, generation)]
    except ConfigError as error:
        raise CheckpointError(f"{directory / CONFIG}: {error}") from error
    merged = {**generation, **told}
    if any(ends):
        merged["eos_token_id"] = list(dict.fromkeys(ends[0] + ends[1]))
    return merged


def _begin_ids(directory: Path, config: ModelConfig) -> tuple[int, ...]:
    """What the tokenizer, if it is there, puts before each text of a decoder-only model."""
    path = directory / "tokenizer.json"
    if not config.is_decoder_only or not path.exists():
        return ()
    from engine.tokenizer_json import begin_ids  # its library is needed for such files alone

    try:
        return begin_ids(path)
    except TokenizerError as error:
        raise CheckpointError(str(error)) from error


def _is_tied(
    directory: Path, family: Family, values: Values, tensors: Tensors, keys: frozenset[str]
) -> bool:
    """The head is tied unless the files hold another one; transformers 5 calls every T5 tied."""
    is_told = values.get("tie_word_embeddings", family.is_tied) is not False
    if family.head not in keys:
        if not is_told:
            raise CheckpointError(
                f"{directory}: {family.head} is missing, and the config says not to tie it"
            )
        return True
    embedding = _embedding_key(family, keys)
    return is_told and torch.equal(tensors.tensor(family.head), tensors.tensor(embedding))


def _check_keys(directory: Path, family: Family, checkpoint: Checkpoint, tensors: Tensors) -> None:
    """Raise CheckpointError if tensors are missing or left over, or copies of one differ."""
    config, keys = checkpoint.config, checkpoint.keys
    needed = {part.key for recipe in family.dense(checkpoint) for part in recipe.parts}
    for layer in config.moe_layers():
        for expert in range(config.num_experts):
            recipes = family.experts(checkpoint, layer, expert)
            needed |= {part.key for recipe in recipes for part in recipe.parts}
    copies = {*family.embeddings, family.head} if config.tied_embeddings else family.embeddings
    if keys.intersection(copies):  # any one of them serves
        needed.discard(family.embeddings[0])
    if missing := sorted(needed - keys):
        raise CheckpointError(f"{directory}: {len(missing)} tensors missing, first {missing[0]}")
    if unknown := sorted(keys - needed - {*family.embeddings, family.head}):
        raise CheckpointError(
            f"{directory}: {len(unknown)} tensors that this {checkpoint.values['model_type']} does "
            f"not have, first {unknown[0]}"
        )
    first = _embedding_key(family, keys)
    for key in family.embeddings:
        if key in keys - {first} and not torch.equal(tensors.tensor(key), tensors.tensor(first)):
            raise CheckpointError(f"{directory}: {key} differs from {first}; they must be equal")


def _embedding_key(family: Family, keys: frozenset[str]) -> str:
    """The key that stores the embedding; writers that drop copies keep any one of them."""
    stored = (key for key in (*family.embeddings, family.head) if key in keys)
    return next(stored, family.embeddings[0])
