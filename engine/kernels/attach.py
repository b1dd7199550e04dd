"""Gives a model that is to be served on a CPU its kernels."""

import numpy as np

from engine.kernels import ops
from engine.kernels.builder import KINDS
from engine.kernels.step import StepProgram
from engine.kernels.team import the_team
from engine.model.transformer import Transformer


def attach_kernels(model: Transformer) -> bool:
    """Let a model compute its steps by programs; its weights must stay where they are.

    Returns whether it does: not if it is in fp16, on a GPU or with latent attention. Compiles at
    first (some 10 s), unless that was kept on disk.
    """
    weight = model.embedding.weight
    if weight.dtype not in KINDS or weight.device.type != "cpu" or model.config.latent is not None:
        return False
    warm_up()
    model.kernels = StepProgram(model)
    return True


def warm_up() -> None:
    """Compile, and start the threads of the team."""
    nothing = np.zeros((1, ops.COLUMNS), np.int64)
    nothing[0, 0] = ops.NORM
    the_team().run(nothing, 0, 0)
