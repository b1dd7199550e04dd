"""Gives a model that is to be served on a CPU its kernels."""

import numpy as np
import torch
from torch import Tensor

from engine.checkpoint_tensors import FULL
from engine.kernels import ops
from engine.kernels.builder import KINDS
from engine.kernels.step import StepProgram
from engine.kernels.sweep import SweepProgram, can_sweep
from engine.kernels.team import the_team
from engine.kernels.warm import compile_elsewhere, compile_work
from engine.model.transformer import Transformer


def attach_kernels(model: Transformer) -> bool:
    """Let a model compute its steps by programs; its weights must stay where they are.

    Returns whether it does: not if it is in fp16, on a GPU, packed or with latent attention.
    Compiles at first (some 10 s), unless that was kept on disk.
    """
    weights = dict(model.named_parameters()) | dict(model.named_buffers())
    config, dtype = model.config, model.embedding.weight.dtype
    # programs bound queries and keys before heads are normed; no family does both
    is_known = config.latent is None and not (config.clip_qkv and config.query_key_norm == "head")
    if dtype not in KINDS or not is_known:
        return False
    if not all(_is_readable(weight, dtype, name) for name, weight in weights.items()):
        return False
    warm_up()
    model.kernels = StepProgram(model)
    if can_sweep(model):
        model.sweep_kernels = SweepProgram(model)
    return True


def _is_readable(weight: Tensor, dtype: torch.dtype, name: str) -> bool:
    """Whether a weight lies in host memory as it is, and is of the one dtype that is expected."""
    is_expected = weight.dtype == dtype or name.endswith(FULL)
    return is_expected and weight.device.type == "cpu" and not weight.is_mkldnn


def warm_up() -> None:
    """Compile, unless that was kept on disk, and start the threads of the team."""
    compile_elsewhere()
    compile_work()
    nothing = np.zeros((1, ops.COLUMNS), np.int64)
    nothing[0, 0] = ops.NORM
    the_team().run(nothing, 0, 0)
