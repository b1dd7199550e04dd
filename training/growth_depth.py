"""Deeper models: stacking, interpolation, and blocks that are the identity at first.

Source: StackingBERT (ICML 2019) for stacking; bert2BERT (arXiv:2110.07143) s3.3 for what is left
over; Net2Net (arXiv:1511.05641) for identity blocks, which a residual stream makes trivial.
"""

from collections.abc import Mapping
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from training.growth_axes import parse_layer, rename_layer

DepthMethod = Literal["identity", "stack", "interpolate"]
State = Mapping[str, Tensor]
WRITERS = ("out.weight", "wo.weight", ".wo")


class Layer(NamedTuple):
    """Which old layer a new one copies, and whether it shall add nothing to the stream."""

    source: int
    is_identity: bool = False


def plan_layers(old: int, new: int, method: DepthMethod) -> list[Layer]:
    """What each layer of a stack is made of.

    stack repeats the stack and ends with its top layers: 3 to 8 is 0 1 2 0 1 2 1 2. identity is the
    same with nothing added by what is new; interpolate repeats each layer: 0 0 0 1 1 1 2 2.
    """
    if new == old:
        return [Layer(index) for index in range(new)]  # a decoder-only model has no encoder
    if method == "interpolate":
        return [Layer(index * old // new) for index in range(new)]
    repeated = [index % old for index in range(new - new % old)]
    order = repeated + list(range(old - new % old, old))
    return [
        Layer(source, is_identity=method == "identity" and index >= old)
        for index, source in enumerate(order)
    ]


def deepen(
    state: State, plans: Mapping[str, list[Layer]], *, zero_writers: bool = True
) -> dict[str, Tensor]:
    """The state with its layers laid out as planned, per stack; the rest stays as it is.

    With `zero_writers` off the copies are plain (moments of an optimiser).
    """
    deep: dict[str, Tensor] = {}
    for name, tensor in state.items():
        place = parse_layer(name)
        if place is None:
            deep[name] = tensor
            continue
        for index, layer in enumerate(plans[place[0]]):
            if layer.source != place[1]:
                continue
            is_zero = layer.is_identity and zero_writers and name.endswith(WRITERS)
            copied = torch.zeros_like(tensor) if is_zero else tensor.clone()
            deep[rename_layer(name, index)] = copied
    return deep


def has_equal_layers(plans: Mapping[str, list[Layer]]) -> bool:
    """Whether two layers of a stack do the same at first."""
    return any(
        len({layer.source for layer in plan if not layer.is_identity})
        < sum(not layer.is_identity for layer in plan)
        for plan in plans.values()
    )
