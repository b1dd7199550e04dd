"""Wider models: how residual stream, neurons, heads and head width grow, and how exactly.

The residual stream is carried as x' = P x. Operators differ in P and in what is new:

pad        P = [I; 0]; new readers are drawn, new writers are zero. Exact, and no two units alike.
isometric  copies weighed so that P keeps lengths. Exact for any width.
fpi        copies as they are, their readers divided. Exact if all are copied equally often.
aki        as fpi, but what is new comes from the layer above. Not exact.
corner     the old block in the corner, all else drawn. Not exact.

Source: bert2BERT (arXiv:2110.07143) s3 for fpi and aki; Net2Net (arXiv:1511.05641) for the split.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from engine.config import ModelConfig
from engine.model.initial import random_weight
from training.growth_axes import (
    Axis,
    Expanded,
    Factor,
    Role,
    expand,
    identity_axis,
    join_axes,
    parameter_roles,
    parse_layer,
    plain_axis,
    rename_layer,
)

WidthMethod = Literal["pad", "isometric", "fpi", "aki", "corner"]
Split = Literal["even", "uneven"]
State = Mapping[str, Tensor]

COPYING: tuple[WidthMethod, ...] = ("isometric", "fpi", "aki")
KEEPS_LENGTH: tuple[WidthMethod, ...] = ("pad", "isometric")  # of the stream, so RMS changes
UNEVENNESS = 0.25  # shares of copies differ by up to this much


@dataclass(frozen=True, slots=True)
class WidthMaps:
    """How every kind of axis grows; `stream` is how input embeddings do."""

    method: WidthMethod
    source: ModelConfig
    target: ModelConfig
    roles: dict[Role, Axis]
    final_gain: Axis

    @property
    def stream(self) -> Axis:
        """How vectors in the residual stream grow: embeddings, soft prompts."""
        return self.roles["write"]

    def axes(self, name: str, shape: tuple[int, ...]) -> tuple[Axis, ...]:
        """The axes of a tensor of the state with its old shape."""
        if name == "decoder.norm.weight":
            return (self.final_gain,)
        axes = []
        for parts, size in zip(parameter_roles(name), shape, strict=True):
            if parts == ("same",):
                axes.append(identity_axis(size))
            elif len(parts) == 1:
                axes.append(self.roles[parts[0]])
            else:
                old = [size // len(parts)] * len(parts)
                axes.append(join_axes([self.roles[part] for part in parts], old))
        return tuple(axes)

    def upper_name(self, name: str) -> str:
        """The same tensor one layer above; the top layer is its own."""
        place = parse_layer(name)
        if place is None:
            return name
        layers = self.source.num_layers("encoder" if place[0] == "encoder" else "decoder")
        return rename_layer(name, min(place[1] + 1, layers - 1))


def build_maps(
    source: ModelConfig,
    target: ModelConfig,
    method: WidthMethod,
    split: Split,
    generator: torch.Generator,
) -> WidthMaps:
    """Choose what is a copy of what. One map serves all layers, as relative positions demand."""
    copies = method in COPYING
    index = {
        name: _index(getattr(source, name), getattr(target, name), copies=copies)
        for name in ("d_model", "d_ff", "num_heads", "d_kv")
    }
    share = {name: _shares(found, split, generator) for name, found in index.items()}
    roles: dict[Role, Axis] = {
        **_stream_axes(source, target, method, index["d_model"], share["d_model"]),
        **_unit_axes("produce", "consume", index["d_ff"], share["d_ff"], method),
        **_head_axes(source, index, share, method),
    }
    final = roles["gain"]
    if source.scale_logits:
        final = final.scaled(math.sqrt(target.d_model / source.d_model))
    if source.tied_embeddings and method in ("fpi", "aki"):
        final = final.scaled(share["d_model"])  # the head cannot divide, it is the embedding
    return WidthMaps(method, source, target, roles, final)


def widen(state: State, maps: WidthMaps, noise: float, generator: torch.Generator) -> State:
    """The weights of the wider model. `noise` is added to copies, in shares of a tensor's std."""
    wide = {}
    for name, tensor in state.items():
        axes = maps.axes(name, tuple(tensor.shape))
        grown = expand_layered(state, name, maps, "weight")
        values = grown.values
        if bool(grown.is_new.any()):
            fresh = _fresh(name, tensor, axes, maps, generator)
            fresh = fresh.masked_fill(grown.is_zero, 0.0)
            values = torch.where(grown.is_new, fresh, values)
        if noise and tensor.ndim > 1 and bool(grown.is_copy.any()):
            drawn = torch.randn(values.shape, generator=generator, dtype=torch.float64)
            values = values + drawn * grown.is_copy * (noise * float(tensor.double().std()))
        wide[name] = values.to(tensor.dtype)
    return wide


def expand_layered(state: State, name: str, maps: WidthMaps, factor: Factor) -> Expanded:
    """Take a tensor over; for AKI the new outputs are those of the layer above."""
    tensor = state[name]
    axes = maps.axes(name, tuple(tensor.shape))
    grown = expand(tensor, axes, factor)
    upper = maps.upper_name(name)
    if maps.method != "aki" or upper == name or tensor.ndim < 2 or name.endswith(".norm"):
        return grown
    above = expand(state[upper], axes, factor).values
    rows = axes[-2].is_copy.unsqueeze(-1)
    return Expanded(
        torch.where(rows, above, grown.values), grown.is_new, grown.is_zero, grown.is_copy
    )


def is_exact(source: ModelConfig, target: ModelConfig, method: WidthMethod, noise: float) -> bool:
    """Whether the wider model computes the same function."""
    if all(getattr(source, name) == getattr(target, name) for name in WIDTHS):
        return True
    if noise or method in ("aki", "corner"):
        return False
    return method != "fpi" or target.d_model % source.d_model == 0


WIDTHS = ("d_model", "d_ff", "num_heads", "d_kv")


def wide_eps(source: ModelConfig, d_model: int, method: WidthMethod) -> float:
    """The eps of RMS norm after growth: the mean is over more entries of the same sum."""
    return source.norm_eps * (source.d_model / d_model if method in KEEPS_LENGTH else 1.0)


def _index(old: int, new: int, *, copies: bool) -> Tensor:
    """Old entry of each new one. Copying 3 to 5: 0 1 2 0 1; padding: 0 1 2 -1 -1."""
    number = torch.arange(new)
    return number % old if copies else torch.where(number < old, number, -1)


def _shares(index: Tensor, split: Split, generator: torch.Generator) -> Tensor:
    """What share each copy has of its origin; those of one origin sum to 1."""
    known = index.clamp(min=0)
    raw = torch.ones(len(index), dtype=torch.float64)
    if split == "uneven":
        drawn = torch.rand(len(index), generator=generator, dtype=torch.float64)
        raw = 1 + UNEVENNESS * (2 * drawn - 1)
    sums = torch.zeros(int(known.max()) + 1, dtype=torch.float64)
    sums.scatter_add_(0, known, torch.where(index >= 0, raw, 0.0))
    return torch.where(index >= 0, raw / sums[known], 1.0)


def _stream_axes(
    source: ModelConfig, target: ModelConfig, method: WidthMethod, index: Tensor, share: Tensor
) -> dict[Role, Axis]:
    """Writers, readers and gains of the residual stream."""
    plain = plain_axis(index)
    shrink = math.sqrt(source.d_model / target.d_model) if method in KEEPS_LENGTH else 1.0
    if method in ("fpi", "aki"):
        return {
            "write": plain._replace(grad=share),
            "read": plain._replace(weight=share),
            "gain": plain._replace(grad=share),
        }
    root = share.sqrt()
    both = plain._replace(weight=root, grad=root)
    return {
        "write": both._replace(is_zero=torch.full_like(plain.is_zero, method == "pad")),
        "read": both,
        "gain": plain._replace(grad=share).scaled(shrink),
    }


def _unit_axes(
    producer: Role, consumer: Role, index: Tensor, share: Tensor, method: WidthMethod
) -> dict[Role, Axis]:
    """Units with a nonlinearity in between: copied where made, shared out where they are read."""
    plain = plain_axis(index)
    return {
        producer: plain._replace(grad=share),
        consumer: plain._replace(
            weight=share, is_zero=torch.full_like(plain.is_zero, method == "pad")
        ),
    }


def _head_axes(
    source: ModelConfig,
    index: dict[str, Tensor],
    share: dict[str, Tensor],
    method: WidthMethod,
) -> dict[Role, Axis]:
    """Axes of attention: heads, and within each the head width.

    A query times a key is a sum over the head width, so keys share it out as outputs do.
    """
    head = _unit_axes("produce", "consume", index["num_heads"], share["num_heads"], method)
    inner = _unit_axes("produce", "consume", index["d_kv"], share["d_kv"], method)
    kv, old_kv = index["d_kv"], source.d_kv

    def product(outer: Axis, within: Axis, *, zero_within: bool, zero_outer: bool) -> Axis:
        """Head by head, all of the head width. A new head is new as a whole."""
        both = outer.origin.unsqueeze(1) * old_kv + kv
        known = (outer.origin >= 0).unsqueeze(1) & (kv >= 0)
        in_new_head = (outer.origin < 0).unsqueeze(1).expand_as(known)
        is_zero = torch.where(in_new_head, zero_outer, zero_within)
        return Axis(
            torch.where(known, both, -1).flatten(),
            torch.outer(outer.weight, within.weight).flatten(),
            torch.outer(outer.grad, within.grad).flatten(),
            is_zero.flatten(),
        )

    pads = method == "pad"
    made, read = head["produce"], head["consume"]
    return {
        "head": made,
        "q": product(made, inner["produce"], zero_within=pads, zero_outer=False),
        "k": product(made, inner["consume"], zero_within=False, zero_outer=False),
        "v": product(made, inner["produce"], zero_within=False, zero_outer=False),
        "mix": product(read, inner["consume"], zero_within=pads, zero_outer=pads),
    }


def _fresh(
    name: str,
    tensor: Tensor,
    axes: tuple[Axis, ...],
    maps: WidthMaps,
    generator: torch.Generator,
) -> Tensor:
    """What new entries start from: the usual random start, for gains the mean of the old ones."""
    shape = tuple(len(axis.origin) for axis in axes)
    if tensor.ndim == 1 or name.endswith(".norm"):
        factor = float(axes[-1].weight[0])
        mean = tensor.double().mean(-1, keepdim=True) * factor
        return mean.expand(shape)
    return random_weight(name, shape, maps.target, generator).double()
