"""Operations of sweeps on panels of rows.

Shape letters: R rows, I inputs, O outputs, E experts.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from engine.kernels import ops
from engine.kernels.builder import TASKS_PER_THREAD, Builder
from engine.kernels.curves import ACTIVATIONS
from engine.kernels.panels import PANEL_SUM_BYTES, WIDE
from engine.kernels.team import Table, the_team
from engine.kernels.tiles import DEPTH, ROWS
from engine.model.layers import FeedForward
from engine.model.topk import SharedExpert

NAMES = ops.EXPERT_WEIGHTS


@dataclass(frozen=True)
class Groups:
    """Which rows go together, each as `ops` tells of it; all int64.

    Without `order` rows are as they stand, with it they are picked by pairs of which each has
    `per_row`.
    """

    num_wanted: Tensor
    wanted: Tensor
    begins: Tensor
    starts: Tensor
    order: Tensor | None = None
    per_row: int = 1


def one_group() -> Groups:
    """All rows together; how many they are is set later."""
    whole = torch.int64
    one, first = torch.ones(1, dtype=whole), torch.zeros(1, dtype=whole)
    return Groups(one, first, torch.zeros(2, dtype=whole), torch.zeros(2, dtype=whole))


def set_rows(groups: Groups, rows: int) -> None:
    """Say how many rows one group has."""
    groups.begins[1], groups.starts[1] = rows, -(-rows // ROWS)


def panel_scratch_bytes(width: int) -> int:
    """Scratch that packing rows of a width needs, and products."""
    return max(4 * ROWS * width, 4 * PANEL_SUM_BYTES)


def fits_panels(weight_OI: Tensor) -> bool:
    """Whether a matrix can be multiplied with panels."""
    return weight_OI.shape[-2] % WIDE == 0 and weight_OI.shape[-1] % DEPTH == 0


def make_panels(rows: int, width: int, groups: int = 1) -> Tensor:
    """Room for so many rows in panels, of as many groups."""
    return torch.zeros((rows // ROWS + groups + 1) * ROWS, width, dtype=torch.bfloat16)


def _new(builder: Builder, code: int, groups: Groups, weights: Tensor | None) -> Table:
    row = builder.new(code)
    row[ops.M_WANTED] = builder.address(groups.num_wanted)
    row[ops.M_IDS_WANTED] = builder.address(groups.wanted)
    row[ops.M_BEGINS] = builder.address(groups.begins)
    row[ops.M_STARTS] = builder.address(groups.starts)
    row[ops.M_WEIGHTS] = builder.address(weights)
    return row


def add_pack(
    builder: Builder,
    groups: Groups,
    x_RI: Tensor,
    panels: Tensor,
    *,
    norm: nn.Module | None = None,
    weights: Tensor | None = None,
) -> None:
    """Pack rows, after a norm, or that of their expert if it has one."""
    row = _new(builder, ops.PACK, groups, weights)
    row[ops.M_ORDER], row[ops.M_PER_ROW] = builder.address(groups.order), groups.per_row
    row[ops.M_X], row[ops.M_X_STRIDE] = builder.address(x_RI), 4 * x_RI.stride(0)
    row[ops.M_LENGTH], row[ops.M_OUT] = x_RI.shape[1], builder.address(panels)
    builder.put_norm(row, ops.M_NORM, norm)


def add_product(  # noqa: PLR0913  what, how and where to
    builder: Builder,
    groups: Groups,
    panels: Tensor,
    weights: Tensor,
    names: tuple[str, str],
    out: Tensor,
    *,
    how: int,
    gate: tuple[str, str] | None = None,
    activation: str = "",
) -> Table:
    """Out = activation(x matrix + bias) [* (x gate + its bias)], of each expert with its rows.

    `names` are those of the matrix and its bias among `weights`; `out` has panels or rows, as `how`
    says.
    """
    outputs = out.shape[1]
    row = _new(builder, ops.PANEL_PRODUCT, groups, weights)
    row[ops.M_X], row[ops.M_LENGTH] = builder.address(panels), panels.shape[1]
    row[ops.M_OUTPUTS], row[ops.M_HOW] = outputs, how
    row[ops.M_OUT], row[ops.M_OUT_STRIDE] = builder.address(out), 4 * out.stride(0)
    row[ops.M_MATRIX], row[ops.M_BIAS] = map(NAMES.index, names)
    if gate is not None:
        row[ops.M_GATE], row[ops.M_GATE_BIAS] = map(NAMES.index, gate)
    row[ops.M_ACTIVATION] = ACTIVATIONS.index(activation) + 1 if activation else 0
    tasks = the_team().threads * TASKS_PER_THREAD
    row[ops.M_CHUNK] = max(outputs // tasks // WIDE * WIDE, WIDE)
    return row


def point_weights(builder: Builder, *named: tuple[str, Tensor | None]) -> Tensor:
    """The one row of weights of a product of all rows."""
    weights = torch.zeros(1, ops.WEIGHTS, dtype=torch.int64)
    for name, tensor in named:
        weights[0, NAMES.index(name)] = builder.address(tensor)
    return weights


def add_linear(
    builder: Builder, groups: Groups, panels: Tensor, layer: nn.Linear, out_RO: Tensor, *, how: int
) -> None:
    """The product of a layer."""
    weights = point_weights(builder, ("wi_0", layer.weight), ("bi_0", layer.bias))
    add_product(builder, groups, panels, weights, ("wi_0", "bi_0"), out_RO, how=how)


def add_feed_forward(
    builder: Builder,
    groups: Groups,
    panels: Tensor,
    layer: FeedForward | SharedExpert,
    hidden: Tensor,
    out_RO: Tensor,
    *,
    how: int,
) -> None:
    """Both halves of a feed-forward layer, or of the expert of all rows."""
    named: list[tuple[str, Tensor | None]] = [
        ("wi_0", layer.wi_0.weight),
        ("bi_0", layer.wi_0.bias),
    ]
    if builder.config.gated:
        named += [("wi_1", layer.wi_1.weight), ("bi_1", layer.wi_1.bias)]
    weights = point_weights(builder, *named)
    gate = ("wi_1", "bi_1") if builder.config.gated else None
    add_product(
        builder,
        groups,
        panels,
        weights,
        ("wi_0", "bi_0"),
        hidden,
        how=ops.PACKS,
        gate=gate,
        activation=builder.config.activation,
    )
    add_linear(builder, groups, hidden, layer.wo, out_RO, how=how)
