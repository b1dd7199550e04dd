"""Models with rotary positions of their own for texts longer than those they were trained on."""

import logging
from dataclasses import replace

from engine.config import ModelConfig

logger = logging.getLogger(__name__)


def lengthen(config: ModelConfig, max_model_len: int) -> ModelConfig:
    """The config for texts of up to `max_model_len` tokens; 0: of the length it was trained on.

    LongRoPE divides frequencies otherwise in texts beyond `max_positions`. Keys that were computed
    with the ones do not fit the others, and nobody knows how long a text will become: so the model
    as a whole takes those for long texts if longer ones are to be accepted, as vLLM does, and for
    all texts then. transformers changes them in the middle of a text.

    Source: LongRoPE (arXiv:2402.13753).
    """
    if config.long_rotary is None or max_model_len <= config.max_positions:
        return config
    longest = min(max_model_len, config.long_positions)
    logger.info("rotary positions are those for texts of up to %d tokens", longest)
    return replace(config, rotary=config.long_rotary, max_positions=longest)
