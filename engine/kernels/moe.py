"""MoE layers in a program: experts in memory as operations of it, others as they are borrowed.

Shape letters: R rows, D model width, F feed-forward width, E experts, K experts of a row, P = R * K
pairs.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from engine.config import ModelConfig
from engine.kernels import ops
from engine.kernels.builder import CHUNK, TASKS_PER_THREAD, Builder, real
from engine.kernels.curves import ACTIVATIONS
from engine.kernels.panel_builder import (
    Groups,
    add_feed_forward,
    add_pack,
    add_product,
    make_panels,
    panel_scratch_bytes,
)
from engine.kernels.team import Table, the_team
from engine.model.layers import FeedForwardWeights, feed_forward
from engine.model.moe import ExpertSource, MoELayer, ResidentExperts, assign_greedy
from engine.model.topk import AnyMoE, TopKLayer

EXPERT_TILE_ROWS = 3  # of a step from which on tiles are faster than vectors


def can_route(layer: AnyMoE) -> bool:
    """Whether a layer's way of choosing experts is one that programs know."""
    if isinstance(layer, MoELayer):
        return layer.assign is assign_greedy
    return layer.config.router != "sparsemixer" and layer.config.expert_groups == 1


class MixtureBuffers:
    """What MoE layers make of rows, whichever way experts are multiplied; layer follows layer."""

    def __init__(self, config: ModelConfig, rows: int) -> None:
        size, width = config.num_experts_per_token, config.d_model
        pairs, experts = rows * size, config.num_experts

        def whole(count: int) -> Tensor:
            return torch.zeros(count, dtype=torch.int64)

        self.normed = torch.zeros(rows, width)
        self.ids, self.order, self.places = whole(pairs), whole(pairs), whole(pairs)
        self.gates = torch.zeros(pairs)
        self.groups = Groups(
            whole(1), whole(experts), whole(experts + 1), whole(experts + 1), self.order, size
        )
        self.counts = whole(experts)
        self.outs = torch.zeros(pairs, width)
        self.shared = torch.zeros(rows, width)
        self.shared_gates = torch.zeros(rows)


class StepBuffers(MixtureBuffers):
    """The same, and what becomes of rows on the way."""

    def __init__(self, config: ModelConfig, rows: int) -> None:
        super().__init__(config, rows)
        pairs = rows * config.num_experts_per_token
        self.gathered = torch.zeros(pairs, config.d_model)
        self.hidden = torch.zeros(pairs, config.expert_width)
        self.gate = torch.zeros(pairs, config.expert_width)
        self.shared_hidden = torch.zeros(rows, config.shared_d_ff)
        self.shared_gate = torch.zeros(rows, config.shared_d_ff)


class SweepBuffers(MixtureBuffers):
    """The same, and panels of pairs, and of rows for the expert that all go through."""

    def __init__(self, config: ModelConfig, rows: int) -> None:
        super().__init__(config, rows)
        pairs, experts = rows * config.num_experts_per_token, config.num_experts
        self.gathered = make_panels(pairs, config.d_model, experts)
        self.hidden = make_panels(pairs, config.expert_width, experts)
        self.shared_input = make_panels(rows if config.shared_d_ff else 0, config.d_model)
        self.shared_hidden = make_panels(rows if config.shared_d_ff else 0, config.shared_d_ff)


class Mixture(ABC):
    """One MoE layer. The choice of experts is added to a program at once.

    How experts are multiplied is left to `add_parts` and `add_shared`.
    """

    def __init__(
        self, builder: Builder, layer: AnyMoE, buffers: MixtureBuffers, x_RD: Tensor
    ) -> None:
        self._builder, self._layer, self._buffers, self._x = builder, layer, buffers, x_RD
        self._config = layer.config
        self._weights = torch.zeros(layer.config.num_experts, ops.WEIGHTS, dtype=torch.int64)
        # experts of a MoELayer norm for themselves
        self._input = x_RD if isinstance(layer, MoELayer) else buffers.normed
        self._add_route()
        row = builder.new(ops.GROUP)
        row[ops.G_PER_ROW] = self._config.num_experts_per_token
        row[ops.G_EXPERTS] = self._config.num_experts
        for column, tensor in (
            (ops.G_IDS, buffers.ids),
            (ops.G_WANTED, buffers.groups.num_wanted),
            (ops.G_IDS_WANTED, buffers.groups.wanted),
            (ops.G_BEGINS, buffers.groups.begins),
            (ops.G_ORDER, buffers.order),
            (ops.G_PLACES, buffers.places),
            (ops.G_STARTS, buffers.groups.starts),
            (ops.G_COUNTS, buffers.counts),
        ):
            row[column] = builder.address(tensor)

    def _add_route(self) -> None:
        layer, config, builder, buffers = self._layer, self._config, self._builder, self._buffers
        row = builder.new(ops.ROUTE)
        row[ops.R_X], row[ops.R_X_STRIDE] = builder.address(self._x), 4 * self._x.stride(0)
        row[ops.R_LENGTH], row[ops.R_EXPERTS] = config.d_model, config.num_experts
        row[ops.R_PER_ROW] = config.num_experts_per_token
        row[ops.R_NORMED] = builder.address(buffers.normed)
        row[ops.R_IDS], row[ops.R_GATES] = map(builder.address, (buffers.ids, buffers.gates))
        if isinstance(layer, MoELayer):
            row[ops.R_ROUTER] = builder.address(layer.centroids)
            row[ops.R_HOW] = ops.SIGMOID_FIRST if config.router == "base_layer" else ops.FIRST
            if config.router == "cpm_2":
                row[ops.R_NORM], row[ops.R_EPS] = 1, real(config.norm_eps)
                row[ops.R_NORM_WEIGHT] = builder.address(layer.router_norm)
            return
        builder.put_norm(row, ops.R_NORM, layer.norm)
        row[ops.R_ROUTER] = builder.address(layer.router.weight)
        row[ops.R_BIAS] = builder.address(layer.router.bias)
        row[ops.R_HOW] = ops.SOFTMAX if config.router == "softmax" else ops.SIGMOID
        row[ops.R_NORMALIZES] = config.normalize_gates
        row[ops.R_SCALE] = real(config.routed_scale)
        if config.choice_bias:
            row[ops.R_CHOICE_BIAS] = builder.address(layer.choice_bias.float())
        if config.shared_gate:
            row[ops.R_SHARED_GATE] = builder.address(layer.shared_gate.weight)
            row[ops.R_SHARED] = builder.address(buffers.shared_gates)

    @abstractmethod
    def add_parts(self) -> None:
        """Add rows to their places, and both halves of experts."""

    @abstractmethod
    def add_shared(self, layer: TopKLayer) -> None:
        """Add the expert that all rows go through."""

    @abstractmethod
    def scratch_bytes(self, rows: int) -> int:
        """What a thread needs for the parts."""

    def add_experts(self, experts: ResidentExperts) -> None:
        """Let the program compute experts that are in memory."""
        tensors = experts.layers[self._layer.name]
        for column, name in enumerate(ops.EXPERT_WEIGHTS):
            if name and name in tensors:  # type: ignore[operator]  # a ParameterDict
                stacked = tensors[name]  # type: ignore[index]
                base, size = self._builder.address(stacked), stacked[0].nbytes
                self._weights[:, column] = base + size * torch.arange(len(stacked))
        self.add_parts()

    def make_stop(self, experts: ExpertSource) -> Callable[[int], None]:
        """What computes the experts of a number of rows as they are lent, at this place."""
        own, self._builder = self._builder, self._builder.beside()
        self.add_parts()
        table, own.kept = self._builder.table(), own.kept + self._builder.kept
        self._builder = own

        def stop(rows: int) -> None:
            self._borrow(experts, table, rows)

        return stop

    def _borrow(self, experts: ExpertSource, table: Table, rows: int) -> None:
        layer, buffers = self._layer, self._buffers
        groups = buffers.groups
        count = int(groups.num_wanted[0])
        wanted, begins = groups.wanted[:count].tolist(), groups.begins[: count + 1].tolist()
        sizes = {expert: begins[i + 1] - begins[i] for i, expert in enumerate(wanted)}
        places = {expert: i for i, expert in enumerate(wanted)}
        experts.foresee(layer.name, self._x[:rows].to(layer_dtype(layer)))
        ordered = sorted(wanted, key=lambda expert: -sizes[expert])
        for expert, weights in experts.stream(layer.name, ordered):
            place = places[expert]
            if isinstance(weights.wi_0, Tensor):
                self._point(expert, weights)
                table[:, ops.M_BEGIN], table[:, ops.M_END] = place, place + 1
                the_team().run(table, rows, self.scratch_bytes(rows))
            else:
                begin, end = begins[place], begins[place + 1]
                rows_R = buffers.order[begin:end] // self._config.num_experts_per_token
                x_RD = self._input[rows_R].to(layer_dtype(layer))
                buffers.outs[begin:end] = feed_forward(x_RD, weights, self._config, layer.tile_rows)

    def _point(self, expert: int, weights: FeedForwardWeights) -> None:
        for column, name in enumerate(ops.EXPERT_WEIGHTS):
            if name:
                tensor = getattr(weights, name)
                self._weights[expert, column] = self._builder.address(tensor, keeps=False)

    def add_sum(self) -> None:
        """Add what experts made to each row, and the expert that all rows go through."""
        config, builder, buffers, layer = self._config, self._builder, self._buffers, self._layer
        if config.shared_d_ff:
            assert isinstance(layer, TopKLayer)
            self.add_shared(layer)
        row = builder.new(ops.COMBINE)
        row[ops.C_X], row[ops.C_X_STRIDE] = builder.address(self._x), 4 * self._x.stride(0)
        row[ops.C_LENGTH], row[ops.C_PER_ROW] = config.d_model, config.num_experts_per_token
        row[ops.C_PLACES], row[ops.C_OUTS] = map(builder.address, (buffers.places, buffers.outs))
        if not isinstance(layer, MoELayer) or config.router == "base_layer":
            row[ops.C_GATES] = builder.address(buffers.gates)
        if config.shared_d_ff:
            row[ops.C_SHARED] = builder.address(buffers.shared)
        if config.shared_gate:
            row[ops.C_SHARED_GATES] = builder.address(buffers.shared_gates)


class StepMixture(Mixture):
    """Experts of a few rows each, by vectors."""

    def __init__(self, builder: Builder, layer: AnyMoE, buffers: StepBuffers, x_RD: Tensor) -> None:
        super().__init__(builder, layer, buffers, x_RD)
        self._own = buffers
        for length in (layer.config.d_model, layer.config.expert_width):
            builder.pack_rows(length)
        self._all = builder

    def _part(self, code: int, x: Tensor, out: Tensor) -> Table:
        """An operation on the wanted experts."""
        row, builder, groups = self._builder.new(code), self._builder, self._own.groups
        row[ops.M_WANTED] = builder.address(groups.num_wanted)
        row[ops.M_IDS_WANTED] = builder.address(groups.wanted)
        row[ops.M_BEGINS] = builder.address(groups.begins)
        row[ops.M_ORDER], row[ops.M_PER_ROW] = builder.address(groups.order), groups.per_row
        row[ops.M_WEIGHTS] = builder.address(self._weights)
        row[ops.M_X], row[ops.M_X_STRIDE] = builder.address(x), 4 * x.stride(0)
        row[ops.M_LENGTH], row[ops.M_OUTPUTS] = x.shape[1], out.shape[1]
        row[ops.M_OUT] = builder.address(out)
        tasks = the_team().threads * TASKS_PER_THREAD // self._config.num_experts_per_token
        chunk = out.shape[1] // max(tasks, 1) // CHUNK * CHUNK
        row[ops.M_CHUNK] = max(chunk, CHUNK)
        row[ops.M_TILES] = EXPERT_TILE_ROWS if builder.can_tile(x.shape[1]) else 0
        row[ops.M_EPS] = real(self._config.norm_eps)
        return row

    def add_parts(self) -> None:
        """Add rows to their places, and both halves of experts."""
        config, buffers = self._config, self._own
        names = ops.EXPERT_WEIGHTS
        self._part(ops.GATHER, self._input, buffers.gathered)
        row = self._part(ops.EXPERT, buffers.gathered, buffers.hidden)
        row[ops.M_MATRIX], row[ops.M_BIAS] = names.index("wi_0"), names.index("bi_0")
        row[ops.M_ACTIVATION] = ACTIVATIONS.index(config.activation) + 1
        if config.gated:
            row[ops.M_GATE], row[ops.M_GATE_BIAS] = names.index("wi_1"), names.index("bi_1")
            row[ops.M_GATE_OUT] = self._builder.address(buffers.gate)
        row = self._part(ops.EXPERT, buffers.hidden, buffers.outs)
        row[ops.M_MATRIX], row[ops.M_BIAS] = names.index("wo"), names.index("bo")

    def scratch_bytes(self, rows: int) -> int:
        """What a thread needs for the parts."""
        return self._all.scratch_bytes(rows)

    def add_shared(self, layer: TopKLayer) -> None:
        """Add the expert that all rows go through."""
        builder, buffers, shared, gate = self._builder, self._own, layer.shared, None
        if self._config.gated:
            gate = (shared.wi_1.weight, None, buffers.shared_gate)
        builder.product(
            buffers.normed,
            shared.wi_0.weight,
            buffers.shared_hidden,
            activation=self._config.activation,
            gate=gate,
        )
        builder.linear(buffers.shared_hidden, shared.wo, buffers.shared)


class SweepMixture(Mixture):
    """Experts of many rows, by panels; for the one of all rows, these are one group."""

    def __init__(
        self,
        builder: Builder,
        layer: AnyMoE,
        buffers: SweepBuffers,
        x_RD: Tensor,
        all_rows: Groups,
    ) -> None:
        self._own, self._all_rows = buffers, all_rows
        super().__init__(builder, layer, buffers, x_RD)

    def add_parts(self) -> None:
        """Add rows to their places, and both halves of experts."""
        config, buffers, builder, weights = self._config, self._own, self._builder, self._weights
        groups = buffers.groups
        add_pack(builder, groups, self._input, buffers.gathered, weights=weights)
        builder.rows[-1][ops.M_EPS] = real(config.norm_eps)
        add_product(
            builder,
            groups,
            buffers.gathered,
            weights,
            ("wi_0", "bi_0"),
            buffers.hidden,
            how=ops.PACKS,
            gate=("wi_1", "bi_1") if config.gated else None,
            activation=config.activation,
        )
        names = ("wo", "bo")
        add_product(builder, groups, buffers.hidden, weights, names, buffers.outs, how=ops.WRITES)

    def scratch_bytes(self, rows: int) -> int:  # noqa: ARG002  as much for any
        """What a thread needs for the parts."""
        return panel_scratch_bytes(self._config.d_model)

    def add_shared(self, layer: TopKLayer) -> None:
        """Add the expert that all rows go through."""
        builder, buffers, rows = self._builder, self._own, self._all_rows
        add_pack(builder, rows, buffers.normed, buffers.shared_input)
        add_feed_forward(
            builder,
            rows,
            buffers.shared_input,
            layer.shared,
            buffers.shared_hidden,
            buffers.shared,
            how=ops.WRITES,
        )


def layer_dtype(layer: AnyMoE) -> torch.dtype:
    """The dtype of a layer's own weights."""
    own = layer.centroids if isinstance(layer, MoELayer) else layer.router.weight
    return own.dtype
