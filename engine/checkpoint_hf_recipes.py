"""How tensors of ours are made of those that a Hugging Face directory stores."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from engine.checkpoint_hf_config import Values
from engine.checkpoint_tensors import Shape
from engine.config import ModelConfig


class Stored(NamedTuple):
    """A tensor on the disk and its shape there.

    With `row` only that one of its first dimension is read; `dtype` None stands for any float.
    """

    key: str
    shape: Shape
    row: int | None = None
    dtype: torch.dtype | None = None


Make = Callable[[list[Tensor]], Iterable[Tensor]]


def stack(parts: list[Tensor]) -> tuple[Tensor]:
    """One tensor: the parts, one below the other."""
    return (parts[0] if len(parts) == 1 else torch.cat(parts),)


class Recipe(NamedTuple):
    """Tensors of ours, by name, and of what they are made."""

    names: tuple[str, ...]
    parts: tuple[Stored, ...]
    make: Make = stack


class Checkpoint(NamedTuple):
    """What a recipe may depend on: our config, theirs, and the keys that are there."""

    config: ModelConfig
    values: Values
    keys: frozenset[str]


def is_nothing(_: str, __: ModelConfig, ___: Values) -> bool:
    """No key is unused."""
    return False


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """What is particular to the checkpoints of a kind of model.

    `experts` makes those of a layer ('decoder-0') with names as in `config.expert_shapes()`. Any
    of `embeddings` holds the embedding, others are copies; so does `head` if it is tied, which
    `is_tied` tells where the config does not. `is_ignored`: keys that no code uses.
    """

    map_config: Callable[[Values], ModelConfig]
    dense: Callable[[Checkpoint], Iterable[Recipe]]
    experts: Callable[[Checkpoint, str, int], Iterable[Recipe]]
    embeddings: tuple[str, ...] = ("model.embed_tokens.weight",)
    head: str = "lm_head.weight"
    is_tied: bool = False
    is_ignored: Callable[[str, ModelConfig, Values], bool] = is_nothing
    quantization: str | None = None  # one of its own that its config may tell of


def no_experts(_: Checkpoint, __: str, ___: int) -> Iterable[Recipe]:
    """Of a family that is always dense."""
    return ()


def linear(
    ours: str, theirs: Mapping[str, int], inputs: int, *, bias: bool = False, make: Make = stack
) -> list[Recipe]:
    """A product, of parts with so many outputs each; `make` joins weights and biases alike."""
    weights = tuple(Stored(f"{key}.weight", (rows, inputs)) for key, rows in theirs.items())
    recipes = [Recipe((f"{ours}.weight",), weights, make)]
    if bias:
        biases = tuple(Stored(f"{key}.bias", (rows,)) for key, rows in theirs.items())
        recipes.append(Recipe((f"{ours}.bias",), biases, make))
    return recipes


def vector(ours: str, theirs: str, width: int, *, bias: bool = False) -> list[Recipe]:
    """The weight of a norm, and maybe its bias."""
    ends = ("weight", "bias") if bias else ("weight",)
    return [Recipe((f"{ours}.{end}",), (Stored(f"{theirs}.{end}", (width,)),)) for end in ends]


def matrix(ours: str, theirs: str, shape: Shape) -> Recipe:
    """A tensor that is stored as it is."""
    return Recipe((ours,), (Stored(theirs, shape),))
