"""Training with several processes: data-parallel, weights and moments in shards (FSDP2).

Started by torchrun, which tells each process its rank. Every process computes its share of a step's
micro-batches; sums over all make the losses those of one process. Experts can be spread over the
processes instead (`expert_parallel`). Only rank 0 writes files, but for the shards of the state.
"""

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from engine.errors import ConfigError
from engine.model.moe import ResidentExperts
from engine.model.transformer import Transformer
from training.recipe import Recipe

if TYPE_CHECKING:  # DTensor takes a second to import, which one process does not need
    from training.expert_parallel import HeldExperts

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Workers:
    """The processes of a run, and which of them this is; one alone needs no communication."""

    rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this process writes the files of the run."""
        return self.rank == 0

    def check(self, recipe: Recipe) -> None:
        """Raise ConfigError if the recipe cannot run in as many processes."""
        train = recipe.train
        if self.size == 1:
            return
        if train.accumulation % self.size:
            raise ConfigError(
                f"accumulation is {train.accumulation}; the {self.size} processes share the "
                "micro-batches of a step, so it must be a multiple of their number"
            )
        if train.submodel_until:
            raise ConfigError(
                f"submodel_until is {train.submodel_until}; sub-models train in one process, as "
                "others keep shards of the whole: set it to 0, or start one process"
            )
        if self.size % train.expert_parallel:
            raise ConfigError(
                f"expert_parallel is {train.expert_parallel}; it must divide the number of "
                f"processes, {self.size}"
            )
        if train.optimizer != "adamw" or train.ema:
            raise ConfigError(
                "several processes train with optimizer adamw and without ema; the others need "
                "whole matrices"
            )

    def share(self, items: Sequence[T]) -> list[T]:
        """This process's part of a list that all have."""
        return list(items[self.rank :: self.size])

    def sum(self, value: float) -> float:
        """The sum of a number over all processes."""
        if self.size == 1:
            return value
        total = torch.tensor(value, dtype=torch.float64)
        torch.distributed.all_reduce(total)
        return float(total)

    def wait(self) -> None:
        """Go on when all processes have come here."""
        if self.size > 1:
            torch.distributed.barrier()

    def shard(self, model: Transformer, expert_parallel: int = 1) -> Transformer:
        """Keep one part of each parameter here; they are gathered where they are needed.

        With `expert_parallel` over 1, experts are not gathered: so many processes share them.
        """
        if self.size == 1:
            return model
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

        held: set[torch.nn.Parameter] = set()
        if expert_parallel > 1:
            from training.expert_parallel import spread_experts

            shape = (self.size // expert_parallel, expert_parallel)
            grid = init_device_mesh("cpu", shape, mesh_dim_names=("data", "expert"))
            held = set(spread_experts(model, grid).parameters())
        mesh = init_device_mesh("cpu", (self.size,))
        for stack in (model.encoder, model.decoder):
            for block in stack.blocks():
                fully_shard(block.self_attention, mesh=mesh)
                if hasattr(block, "cross_attention"):
                    fully_shard(block.cross_attention, mesh=mesh)
                    register_fsdp_forward_method(block.cross_attention, "project")
                if hasattr(block, "feed_forward"):
                    fully_shard(block.feed_forward, mesh=mesh)
        fully_shard(model, mesh=mesh, ignored_params=held)
        for method in ("encode", "decode", "logits"):
            register_fsdp_forward_method(model, method)
        return model

    def clip(self, model: Transformer, limit: float) -> float:
        """Make the gradients those of all processes, and clip them; returns their norm before."""
        parameters = [p for p in model.parameters() if p.grad is not None]
        if self.size == 1:
            return float(torch.nn.utils.clip_grad_norm_(parameters, limit))
        copies = dict.fromkeys(parameters, 1)
        if (held := held_experts(model)) is not None:
            held.reduce_gradients()
            copies |= dict.fromkeys(held.parameters(), held.mesh.size(0))
        gradients = {p: local(p.grad) for p in parameters}
        mine = sum(float(g.double().square().sum()) / copies[p] for p, g in gradients.items())
        norm = math.sqrt(self.sum(mine))
        factor = min(limit / (norm + 1e-6), 1.0)  # as torch clips
        for gradient in gradients.values():
            gradient.mul_(factor)
        return norm

    def gather(self, model: Transformer) -> Transformer:
        """The whole model, in every process."""
        if self.size == 1:
            return model
        state = {name: whole(tensor) for name, tensor in model.state_dict().items()}
        gathered = Transformer(model.config)
        gathered.load_state_dict(state)
        return gathered


ALONE = Workers()


def whole(tensor: Any) -> Any:
    """A tensor with all of its shards; every process must ask. Others come back as they are."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def local(tensor: Any) -> Any:
    """The shard of a tensor that is here; others are here as they are."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def held_experts(model: Transformer) -> "HeldExperts | None":
    """The experts of this process, if they are spread over processes."""
    if isinstance(model.experts, ResidentExperts | None):
        return None
    from training.expert_parallel import HeldExperts

    return model.experts if isinstance(model.experts, HeldExperts) else None


def sharded_like(tensor: torch.Tensor, model: torch.Tensor) -> torch.Tensor:
    """A whole tensor cut as another one of the same shape is, if that one is cut."""
    if hasattr(tensor, "full_tensor") or not hasattr(model, "full_tensor"):
        return tensor
    if tensor.shape != model.shape:
        return tensor
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(model, DTensor)
    return distribute_tensor(tensor, model.device_mesh, model.placements)


@contextmanager
def open_workers() -> Iterator[Workers]:
    """The processes that torchrun has started; without it, this one alone."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield ALONE
        return
    torch.distributed.init_process_group("gloo")
    try:
        yield Workers(torch.distributed.get_rank(), size)
    finally:
        torch.distributed.destroy_process_group()
