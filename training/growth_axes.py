"""What the axes of each tensor of a Transformer mean, and how an axis grows.

Read: a linear map takes in the residual stream there; write: it adds to the stream; produce: it
makes neurons or heads; consume: it takes them in. Growth maps every axis by its role, so one rule
serves weights and the moments of an optimiser alike.
"""

import re
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Role = Literal["same", "gain", "read", "write", "produce", "consume", "head", "q", "k", "v", "mix"]
Roles = tuple[tuple[Role, ...], ...]  # per dimension the parts that lie one after the other

ATTENTION: dict[str, Roles] = {
    "qkv.weight": (("q", "k", "v"), ("read",)),
    "query.weight": (("q",), ("read",)),
    "key_value.weight": (("k", "v"), ("read",)),
    "out.weight": (("write",), ("mix",)),
}
FEED_FORWARD: dict[str, Roles] = {
    "wi_0": (("produce",), ("read",)),
    "wi_1": (("produce",), ("read",)),
    "wo": (("write",), ("consume",)),
}
LAYER = re.compile(r"(?P<stack>encoder|decoder)(?:\.layers\.|-)(?P<index>\d+)(?=\.)")


def parameter_roles(name: str) -> Roles:
    """What each dimension of a tensor of the Transformer's state means.

    Raises ValueError if no such tensor is known.
    """
    if name == "embedding.weight":
        return ("same",), ("write",)
    if name == "lm_head.weight":
        return ("same",), ("read",)
    if name.endswith("relative_bias.weight"):
        return ("same",), ("head",)
    if name.endswith((".centroids", ".router.weight")):
        return ("same",), ("read",)
    if name.endswith((".router.bias", ".choice_bias")):
        return (("same",),)
    last = name.rsplit(".", 1)[-1]
    if name.startswith("experts."):
        return ("same",), *(FEED_FORWARD[last] if last != "norm" else (("gain",),))
    if name.endswith(("norm.weight", "router_norm")):
        return (("gain",),)
    tail = ".".join(name.rsplit(".", 2)[-2:])
    if tail in ATTENTION:
        return ATTENTION[tail]
    if tail.removesuffix(".weight") in FEED_FORWARD:
        return FEED_FORWARD[tail.removesuffix(".weight")]
    raise ValueError(f"{name}: growth knows no such tensor")


def parse_layer(name: str) -> tuple[str, int] | None:
    """Stack and index of the layer that a tensor belongs to; None if to none."""
    match = LAYER.search(name)
    return None if match is None else (match["stack"], int(match["index"]))


def rename_layer(name: str, index: int) -> str:
    """The name of the same tensor in another layer of its stack."""
    return LAYER.sub(lambda match: match[0][: -len(match["index"])] + str(index), name)


class Axis(NamedTuple):
    """How one dimension grows. All tensors have the new length.

    `origin` tells which old entry a new one is a copy of, -1 none. `weight` multiplies the weights
    that are copied, `grad` is what that does to their gradients. `is_zero` tells which entries of
    no origin are zero; the others are drawn.
    """

    origin: Tensor
    weight: Tensor
    grad: Tensor
    is_zero: Tensor

    def scaled(self, factor: Tensor | float) -> "Axis":
        """The same with other weights, against which the rest of the model does not change."""
        return self._replace(weight=self.weight * factor, grad=self.grad / factor)

    @property
    def is_copy(self) -> Tensor:
        """Entries that come after the first one with the same origin."""
        first = {origin: place for place, origin in reversed(list(enumerate(self.origin.tolist())))}
        flags = [i >= 0 and first[i] != place for place, i in enumerate(self.origin.tolist())]
        return torch.tensor(flags, dtype=torch.bool)


def plain_axis(index: Tensor, *, is_zero: bool = False) -> Axis:
    """Copies as they are."""
    ones = torch.ones(len(index), dtype=torch.float64)
    return Axis(index, ones, ones, torch.full((len(index),), is_zero))


def identity_axis(size: int) -> Axis:
    """An axis that does not grow."""
    return plain_axis(torch.arange(size))


def join_axes(axes: list[Axis], old_sizes: list[int]) -> Axis:
    """Axes of parts that lie one after the other, such as queries, keys and values."""
    starts = [sum(old_sizes[:i]) for i in range(len(old_sizes))]
    index = [
        torch.where(axis.origin >= 0, axis.origin + start, -1)
        for axis, start in zip(axes, starts, strict=True)
    ]
    rest = (torch.cat([axis[i] for axis in axes]) for i in (1, 2, 3))
    return Axis(torch.cat(index), *rest)


@dataclass(frozen=True, slots=True)
class Expanded:
    """A tensor taken over into its new shape; where `is_new`, the values mean nothing yet."""

    values: Tensor
    is_new: Tensor
    is_zero: Tensor
    is_copy: Tensor


Factor = Literal["weight", "grad", "grad_squared", "none"]


def expand(tensor: Tensor, axes: tuple[Axis, ...], factor: Factor) -> Expanded:
    """Copy a tensor along its axes, in fp64, with the factors asked for."""
    values = tensor.to(torch.float64)
    shape = tuple(len(axis.origin) for axis in axes)
    is_new, is_zero, is_copy = (torch.zeros(shape, dtype=torch.bool) for _ in range(3))
    for dim, axis in enumerate(axes):
        view = [1] * len(axes)
        view[dim] = -1
        values = values.index_select(dim, axis.origin.clamp(min=0))
        values = values * axis_factor(axis, factor).view(view)
        missing = axis.origin < 0
        is_new |= missing.view(view)
        is_zero |= (missing & axis.is_zero).view(view)
        is_copy |= axis.is_copy.view(view)
    return Expanded(values, is_new, is_zero, is_copy)


def axis_factor(axis: Axis, factor: Factor) -> Tensor:
    """What multiplies the entries of an axis that are copied."""
    if factor == "weight":
        return axis.weight
    if factor == "grad":
        return axis.grad
    return axis.grad.square() if factor == "grad_squared" else torch.ones_like(axis.grad)
