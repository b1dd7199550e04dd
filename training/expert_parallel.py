"""Expert parallelism: each process holds some of the experts, and tokens travel to them and back.

The processes stand in a device mesh of two dimensions: along `expert` lie different experts, along
`data` copies of the same. Each has tokens of its own. Shape letters: N own tokens, K pairs of a
token and an expert, R pairs that came, E experts, H experts held here, P processes along `expert`,
D model width.

Source: GShard (arXiv:2006.16668) s3.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from engine.model.layers import FeedForwardWeights, feed_forward
from engine.model.moe import ExpertSource, ResidentExperts
from engine.model.topk import AnyMoE
from engine.model.transformer import Transformer


class HeldExperts(nn.Module):
    """The experts of this process, of all layers, as an ExpertSource that numbers them from 0.

    Its state dict has them as parts of the whole (DTensor), so that checkpoints hold all experts,
    whatever the number of processes; and it takes parts or the whole.
    """

    def __init__(self, source: ResidentExperts, mesh: DeviceMesh) -> None:
        super().__init__()
        self.mesh = mesh
        self.source = [source]  # in a list: no submodule, so that names stay those of one process
        self.layers = source.layers
        for tensors in self.layers.values():
            assert isinstance(tensors, nn.ParameterDict)
            for name, parameter in tensors.items():
                tensors[name] = nn.Parameter(self.cut(parameter.detach()).clone())
        self.register_state_dict_post_hook(_give_parts)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(_take_parts)  # type: ignore[no-untyped-call]

    def stream(self, layer: str, wanted: Sequence[int]) -> Iterator[tuple[int, FeedForwardWeights]]:
        """Yield experts that are held here, in the order given."""
        return self.source[0].stream(layer, wanted)

    def foresee(self, layer: str, x_ND: Tensor) -> None:
        """Nothing to do: those experts are there."""

    def cut(self, tensor: Tensor) -> Tensor:
        """This process's part of a tensor of all experts, which may be cut already."""
        if isinstance(tensor, DTensor):
            return tensor.to_local()
        parts = tensor.chunk(self.mesh.size(1))
        return parts[self.mesh.get_local_rank("expert")]

    def part(self, tensor: Tensor) -> DTensor:
        """A tensor of the experts held here, as a part of that of all."""
        places = [Replicate(), Shard(0)]
        return DTensor.from_local(tensor, self.mesh, places, run_check=False)

    def reduce_gradients(self) -> None:
        """Make gradients means over all processes, as those of the other parameters are.

        The backward pass has already summed over the processes that sent tokens.
        """
        for parameter in self.parameters():
            assert parameter.grad is not None  # experts without tokens have gradients of 0
            if self.mesh.size(0) > 1:
                torch.distributed.all_reduce(parameter.grad, group=self.mesh.get_group("data"))
            parameter.grad /= self.mesh.size()

    def adopt(self, optimizer: torch.optim.Optimizer) -> None:
        """Let the state dict of an optimiser have the moments of experts as parts of the whole."""
        held = {id(parameter) for parameter in self.parameters()}
        order = [id(p) for group in optimizer.param_groups for p in group["params"]]

        def convert(state: dict[str, Any], change: Any) -> dict[str, Any]:
            found = {
                index: {
                    key: change(value) if order[index] in held and value.ndim else value
                    for key, value in values.items()
                }
                for index, values in state["state"].items()
            }
            return state | {"state": found}

        optimizer.register_state_dict_post_hook(lambda _, state: convert(state, self.part))
        optimizer.register_load_state_dict_pre_hook(lambda _, state: convert(state, self.cut))


def _give_parts(
    held: nn.Module, state: dict[str, Any], prefix: str, _metadata: dict[str, Any]
) -> None:
    assert isinstance(held, HeldExperts)
    for name in state:
        if name.startswith(prefix) and not isinstance(state[name], DTensor):
            state[name] = held.part(state[name])


def _take_parts(held: nn.Module, state: dict[str, Any], prefix: str, *_rest: object) -> None:
    assert isinstance(held, HeldExperts)
    for name in state:
        if name.startswith(prefix):
            state[name] = held.cut(state[name])


def spread_experts(model: Transformer, mesh: DeviceMesh) -> HeldExperts:
    """Keep this process's experts in a model, and let its MoE layers send tokens to the others."""
    assert isinstance(model.experts, ResidentExperts)
    held = HeldExperts(model.experts, mesh)
    model.experts = held
    for layer in model.moe_layers():
        layer.compute = partial(_compute, layer, held)  # type: ignore[method-assign]
    return held


def _compute(
    layer: AnyMoE, held: HeldExperts, x_ND: Tensor, expert_K: Tensor, _experts: ExpertSource
) -> Tensor:
    """The output of the expert of each pair of token and expert, (K, D), computed where it is.

    Two processes with experts 0 1 | 2 3: pairs with 2 0 3 are sorted to 0 2 3; one stays with the
    first process, two go to the second.
    """
    group, num_processes = held.mesh.get_group("expert"), held.mesh.size(1)
    order_K = expert_K.argsort(stable=True)
    counts_E = torch.bincount(expert_K, minlength=layer.config.num_experts)
    sent_PH = counts_E.view(num_processes, -1)
    came_PH = torch.empty_like(sent_PH)
    torch.distributed.all_to_all_single(came_PH, sent_PH, group=group)
    sent, came = sent_PH.sum(1).tolist(), came_PH.sum(1).tolist()
    token_K = order_K // (len(expert_K) // max(len(x_ND), 1))
    x_RD = _Exchange.apply(x_ND[token_K], sent, came, group)  # type: ignore[no-untyped-call]
    # they came by sender, and by expert within
    own = torch.arange(sent_PH.shape[1], device=x_ND.device).repeat(num_processes)
    order_R = own.repeat_interleave(came_PH.flatten()).argsort(stable=True)
    rows = torch.split(order_R, came_PH.sum(0).tolist())
    # experts without tokens as well: their gradient is 0 and not missing, as in one process
    parts = [
        feed_forward(x_RD[rows[expert]], weights, layer.config, layer.tile_rows)
        for expert, weights in held.stream(layer.name, range(len(rows)))
    ]
    computed_RD = torch.cat(parts)[order_R.argsort()]
    back_KD: Tensor = _Exchange.apply(computed_RD, came, sent, group)  # type: ignore[no-untyped-call]
    return back_KD[order_K.argsort()]


class _Exchange(torch.autograd.Function):
    """Send rows to the processes of a group and receive theirs; gradients go the way back."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, sent: list[int], came: list[int], group: Any) -> Tensor:
        ctx.counts = sent, came, group
        received = rows.new_empty((sum(came), *rows.shape[1:]))
        torch.distributed.all_to_all_single(received, rows.contiguous(), came, sent, group=group)
        return received

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        sent, came, group = ctx.counts
        (gradient,) = gradients
        back = gradient.new_empty((sum(sent), *gradient.shape[1:]))
        torch.distributed.all_to_all_single(back, gradient.contiguous(), sent, came, group=group)
        return back, None, None, None
