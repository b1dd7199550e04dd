"""Gradient checkpointing: blocks keep their inputs only and are computed again for gradients."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from engine.model.blocks import Block
from engine.model.transformer import Transformer


@contextmanager
def checkpointed(model: Transformer) -> Iterator[None]:
    """The model with checkpointed blocks; afterwards it is as it was."""
    blocks = [*model.encoder.blocks(), *model.decoder.blocks()]
    for block in blocks:
        for module in _attentions(block):
            module.forward = _again(module.forward)
        block.transform = _again(block.transform)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for block in blocks:
            for module in _attentions(block):
                del module.forward
            del block.transform


def _attentions(block: Block) -> list[torch.nn.Module]:
    names = ("self_attention", "cross_attention")
    return [getattr(block, name) for name in names if hasattr(block, name)]


def _again(function: Callable[..., Any]) -> Callable[..., Any]:
    def compute(*inputs: Any) -> Any:
        if not torch.is_grad_enabled():
            return function(*inputs)
        return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)

    return compute
