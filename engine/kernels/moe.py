"""MoE layers in a program: experts in memory as operations of it, others as they are borrowed.

Shape letters: R rows, D model width, F feed-forward width, E experts, K experts of a row, P = R * K
pairs.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from engine.config import ModelConfig
from engine.kernels import ops
from engine.kernels.builder import CHUNK, TASKS_PER_THREAD, Builder, real
from engine.kernels.curves import ACTIVATIONS
from engine.kernels.team import Table, the_team
from engine.model.layers import FeedForwardWeights, feed_forward
from engine.model.moe import ExpertSource, MoELayer, ResidentExperts, assign_greedy
from engine.model.topk import AnyMoE


def can_route(layer: AnyMoE) -> bool:
    """Whether a layer's way of choosing experts is one that programs know."""
    if isinstance(layer, MoELayer):
        return layer.assign is assign_greedy
    return layer.config.router != "sparsemixer" and layer.config.expert_groups == 1


class MixtureBuffers:
    """What MoE layers make of rows on the way; one layer follows the other."""

    def __init__(self, config: ModelConfig, rows: int) -> None:
        size, width = config.num_experts_per_token, config.d_model
        pairs, experts = rows * size, config.num_experts
        self.normed = torch.zeros(rows, width)
        self.ids = torch.zeros(pairs, dtype=torch.int64)
        self.gates = torch.zeros(pairs)
        self.num_wanted = torch.zeros(1, dtype=torch.int64)
        self.wanted = torch.zeros(experts, dtype=torch.int64)
        self.begins = torch.zeros(experts + 1, dtype=torch.int64)
        self.order = torch.zeros(pairs, dtype=torch.int64)
        self.places = torch.zeros(pairs, dtype=torch.int64)
        self.gathered = torch.zeros(pairs, width)
        self.hidden = torch.zeros(pairs, config.expert_width)
        self.gate = torch.zeros(pairs, config.expert_width)
        self.outs = torch.zeros(pairs, width)
        self.shared = torch.zeros(rows, width)
        self.shared_hidden = torch.zeros(rows, config.shared_d_ff)
        self.shared_gate = torch.zeros(rows, config.shared_d_ff)
        self.shared_gates = torch.zeros(rows)


class Mixture:
    """One MoE layer. The choice of experts is added to a program at once."""

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
            (ops.G_WANTED, buffers.num_wanted),
            (ops.G_IDS_WANTED, buffers.wanted),
            (ops.G_BEGINS, buffers.begins),
            (ops.G_ORDER, buffers.order),
            (ops.G_PLACES, buffers.places),
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

    def _part(self, code: int, x: Tensor, out: Tensor) -> Table:
        """An operation on the wanted experts."""
        row, builder, buffers = self._builder.new(code), self._builder, self._buffers
        row[ops.M_WANTED] = builder.address(buffers.num_wanted)
        row[ops.M_IDS_WANTED] = builder.address(buffers.wanted)
        row[ops.M_BEGINS] = builder.address(buffers.begins)
        row[ops.M_ORDER] = builder.address(buffers.order)
        row[ops.M_PER_ROW] = self._config.num_experts_per_token
        row[ops.M_WEIGHTS] = builder.address(self._weights)
        row[ops.M_X], row[ops.M_X_STRIDE] = builder.address(x), 4 * x.stride(0)
        row[ops.M_LENGTH], row[ops.M_OUTPUTS] = x.shape[1], out.shape[1]
        row[ops.M_OUT] = builder.address(out)
        tasks = the_team().threads * TASKS_PER_THREAD // self._config.num_experts_per_token
        chunk = out.shape[1] // max(tasks, 1) // CHUNK * CHUNK
        row[ops.M_CHUNK] = max(chunk, CHUNK)
        row[ops.M_EPS] = real(self._config.norm_eps)
        return row

    def _add_parts(self) -> None:
        """Rows to their places, and both halves of experts."""
        config, buffers = self._config, self._buffers
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

    def add_experts(self, experts: ResidentExperts) -> None:
        """Let the program compute experts that are in memory."""
        tensors = experts.layers[self._layer.name]
        for column, name in enumerate(ops.EXPERT_WEIGHTS):
            if name and name in tensors:  # type: ignore[operator]  # a ParameterDict
                stacked = tensors[name]  # type: ignore[index]
                base, size = self._builder.address(stacked), stacked[0].nbytes
                self._weights[:, column] = base + size * torch.arange(len(stacked))
        self._add_parts()

    def make_stop(self, experts: ExpertSource) -> Callable[[int], None]:
        """What computes the experts of a number of rows as they are lent, at this place."""
        own, self._builder = self._builder, self._builder.beside()
        self._add_parts()
        table, own.kept = self._builder.table(), own.kept + self._builder.kept
        self._builder = own

        def stop(rows: int) -> None:
            self._borrow(experts, table, rows)

        return stop

    def _borrow(self, experts: ExpertSource, table: Table, rows: int) -> None:
        layer, buffers = self._layer, self._buffers
        count = int(buffers.num_wanted[0])
        wanted, begins = buffers.wanted[:count].tolist(), buffers.begins[: count + 1].tolist()
        sizes = {expert: begins[i + 1] - begins[i] for i, expert in enumerate(wanted)}
        places = {expert: i for i, expert in enumerate(wanted)}
        experts.foresee(layer.name, self._x[:rows].to(layer_dtype(layer)))
        ordered = sorted(wanted, key=lambda expert: -sizes[expert])
        for expert, weights in experts.stream(layer.name, ordered):
            place = places[expert]
            if isinstance(weights.wi_0, Tensor):
                self._point(expert, weights)
                table[:, ops.M_BEGIN], table[:, ops.M_END] = place, place + 1
                the_team().run(table, rows, 0)
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
            assert not isinstance(layer, MoELayer)
            shared = layer.shared
            gate = None
            if config.gated:
                gate = (shared.wi_1.weight, None, buffers.shared_gate)
            builder.product(
                buffers.normed,
                shared.wi_0.weight,
                buffers.shared_hidden,
                activation=config.activation,
                gate=gate,
            )
            builder.linear(buffers.shared_hidden, shared.wo, buffers.shared)
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


def layer_dtype(layer: AnyMoE) -> torch.dtype:
    """The dtype of a layer's own weights."""
    own = layer.centroids if isinstance(layer, MoELayer) else layer.router.weight
    return own.dtype
