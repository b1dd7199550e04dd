"""Adapter folders: soft prompts on the disk, as PEFT and the server read them."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from engine.adapters import OURS, PEFT_CONFIG, TENSORS, VECTORS, Slots
from engine.adapters_manifest import write_manifest
from engine.checkpoint_writer import sync
from engine.config import ModelConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterFacts:
    """What a folder tells beside the vectors. `about`: see `engine.adapters.ABOUT`."""

    slots: Slots
    version: str | None = None
    base_fingerprint: str | None = None
    base_name: str | None = None
    defaults: Mapping[str, object] = field(default_factory=dict)
    about: Mapping[str, object] = field(default_factory=dict)


def write_adapter(
    folder: Path, prompt_PD: Tensor, config: ModelConfig, facts: AdapterFacts
) -> None:
    """Write an adapter; the folder appears when it is complete, and replaces an older one."""
    peft = peft_config(config, len(prompt_PD), facts.base_name)
    ours: dict[str, Any] = {
        "slots": {name: value for name, value in asdict(facts.slots).items() if value},
        "version": facts.version,
        "base_fingerprint": facts.base_fingerprint,
        "defaults": dict(facts.defaults),
    }
    ours = {name: value for name, value in ours.items() if value} | dict(facts.about)
    staging = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    for name, values in ((PEFT_CONFIG, peft), (OURS, ours)):
        text = json.dumps(values, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
        (staging / name).write_text(text, encoding="utf-8")
    vectors = prompt_PD.detach().to("cpu", torch.float32).contiguous()
    # not save_file, whose files only their owner may read
    (staging / TENSORS).write_bytes(save({VECTORS: vectors}, metadata={"format": "pt"}))
    write_manifest(staging)
    sync(*staging.iterdir(), staging)
    shutil.rmtree(folder, ignore_errors=True)
    staging.replace(folder)
    sync(folder.parent)


def peft_config(config: ModelConfig, num_vectors: int, base_name: str | None) -> dict[str, Any]:
    """What PEFT is to know of a prompt of so many vectors."""
    is_decoder_only = config.is_decoder_only
    return {
        "base_model_name_or_path": base_name,
        "inference_mode": True,
        "num_attention_heads": config.num_heads,
        "num_layers": config.num_decoder_layers if is_decoder_only else config.num_encoder_layers,
        "num_transformer_submodules": 1,
        "num_virtual_tokens": num_vectors,
        "peft_type": "PROMPT_TUNING",
        "prompt_tuning_init": "RANDOM",
        "task_type": "CAUSAL_LM" if is_decoder_only else "SEQ_2_SEQ_LM",
        "token_dim": config.d_model,
    }
