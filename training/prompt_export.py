"""Soft prompts that a training run leaves, as adapter folders."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from engine.adapters import OURS, PEFT_CONFIG, TENSORS, VECTORS, model_fingerprint
from engine.adapters_manifest import write_manifest
from engine.checkpoint_writer import sync
from engine.model.transformer import Transformer
from training.tune_files import peft_config


def save_prompt(folder: Path, model: Transformer, prompt_PD: Tensor) -> None:
    """Write vectors that stand in front of a text; a folder that is there is replaced."""
    peft = peft_config(model.config, len(prompt_PD), None)
    staging = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    ours = {"base_fingerprint": model_fingerprint(model)}
    for name, values in ((PEFT_CONFIG, peft), (OURS, ours)):
        text = json.dumps(values, indent=2, sort_keys=True) + "\n"
        (staging / name).write_text(text, encoding="utf-8")
    vectors = prompt_PD.detach().to(torch.float32).contiguous()
    # not save_file, whose files only their owner may read
    (staging / TENSORS).write_bytes(save({VECTORS: vectors}, metadata={"format": "pt"}))
    write_manifest(staging)
    sync(*staging.iterdir(), staging)
    shutil.rmtree(folder, ignore_errors=True)
    staging.replace(folder)
