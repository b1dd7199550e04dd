"""Readies a loaded model for serving on a CPU."""

import logging

from engine.model.layers import Linear
from engine.model.packed import can_pack, pack_linears
from engine.model.transformer import Transformer

logger = logging.getLogger(__name__)


def load_kernels() -> bool:
    """Load the compiler of kernels, which takes memory of its own; False if it is not installed."""
    try:
        import engine.kernels.attach  # noqa: F401  it takes a second
    except ImportError as error:
        logger.warning("steps are computed by torch, which is slower: %s", error)
        return False
    return True


def prepare(model: Transformer) -> None:
    """Give a model kernels, and pack what only sweeps use, where it pays; else pack all.

    Packed weights can be neither read nor saved. Experts are not packed: offloaded ones could not
    be, and would differ from resident ones.
    """
    weight = model.embedding.weight
    if weight.device.type != "cpu":
        return
    if load_kernels():
        from engine.kernels.attach import attach_kernels

        if attach_kernels(model):
            if can_pack(weight.dtype) and not model.config.is_decoder_only:
                pack_linears(model.encoder, Linear)
                for block in model.decoder.blocks():
                    pack_linears(block.cross_attention.key_value, Linear)
            return
    if can_pack(weight.dtype):
        pack_linears(model, Linear)
