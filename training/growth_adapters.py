"""Soft prompts for a grown model, from those that were trained on the model that it grew from."""

import json
import logging
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from engine.adapters import OURS, PEFT_CONFIG, TENSORS, VECTORS, Adapter, load_adapter
from engine.adapters_manifest import write_manifest
from engine.checkpoint_tensors import read_json
from engine.checkpoint_writer import sync
from engine.config import ModelConfig
from engine.errors import CheckpointError
from training.growth import grow_prompt
from training.growth_files import check_free, read_model_config
from training.growth_record import RECORD, Step, read_fingerprint, read_steps

logger = logging.getLogger(__name__)


def grow_adapter(adapter: Path, model: Path, out: Path) -> Adapter:
    """Carry a trained soft prompt to a model grown from its base; returns what was written.

    Where growth was exact, text and prompt give the outputs that they gave before. The folder
    appears when it is complete.
    Raises CheckpointError if the model has not grown from the adapter's base, or `out` is taken.
    """
    check_free(out)
    if not adapter.is_dir():
        raise CheckpointError(f"{adapter}: does not exist; name the folder of an adapter")
    config = read_model_config(model)
    fingerprint = read_fingerprint(model)
    steps = _steps_from(adapter, _check_steps(model, read_steps(model), fingerprint))
    old = load_adapter(adapter, steps[0].config, torch.float32)
    prompt_PD = old.prompt_PD
    for step in steps:
        prompt_PD = grow_prompt(prompt_PD, step.stream)
        if not step.is_exact:
            names = ", ".join(str(operator["operator"]) for operator in step.operators)
            logger.warning("%s: %s changed the model, so answers change too", adapter, names)
    _write(adapter, out, prompt_PD.contiguous(), config, fingerprint)
    return load_adapter(out, config, torch.float32, fingerprint=fingerprint)


def _check_steps(model: Path, steps: list[Step], fingerprint: str) -> list[Step]:
    if not steps:
        raise CheckpointError(
            f"{model}: has no {RECORD}, so it is not known what it grew from; name a directory "
            "that `infmoe grow` wrote"
        )
    if steps[-1].fingerprint != fingerprint:
        raise CheckpointError(
            f"{model / RECORD}: is of another model: the weights here have changed since; grow "
            "again, and the adapter before training goes on"
        )
    return steps


def _steps_from(adapter: Path, steps: list[Step]) -> list[Step]:
    """The steps from the base of an adapter on; all but the last need its fingerprint."""
    base = None
    if (adapter / OURS).exists():
        base = read_json(adapter / OURS).get("base_fingerprint")
    if base is None:
        logger.warning("%s: does not tell its base, which is taken to be the last source", adapter)
        return steps[-1:]
    for index, step in enumerate(steps):
        if step.source_fingerprint == base:
            return steps[index:]
    if base == steps[-1].fingerprint:
        raise CheckpointError(f"{adapter}: belongs to the grown model already; use it as it is")
    known = ", ".join(step.source_fingerprint[:12] for step in steps)
    raise CheckpointError(
        f"{adapter}: was trained on {str(base)[:12]}, from which this model has not grown; it has "
        f"grown from {known}"
    )


def _write(
    adapter: Path, out: Path, prompt_PD: Tensor, config: ModelConfig, fingerprint: str
) -> None:
    """Write the folder beside its place, then rename it."""
    peft = read_json(adapter / PEFT_CONFIG) | {
        "token_dim": config.d_model,
        "num_transformer_submodules": 1,
        "num_layers": config.num_encoder_layers,
        "num_attention_heads": config.num_heads,
    }
    ours = read_json(adapter / OURS) if (adapter / OURS).exists() else {}
    ours |= {"base_fingerprint": fingerprint}
    staging = out.with_name(f".{out.name}.growing")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    for name, values in ((PEFT_CONFIG, peft), (OURS, ours)):
        text = json.dumps(values, indent=2, sort_keys=True) + "\n"
        (staging / name).write_text(text, encoding="utf-8")
    save_file({VECTORS: prompt_PD}, staging / TENSORS, metadata={"format": "pt"})
    write_manifest(staging)
    sync(*staging.iterdir(), staging)
    if out.exists():
        out.rmdir()
    staging.rename(out)
    sync(out.parent)
