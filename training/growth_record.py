"""`growth.json` beside a grown model: where it comes from, by which steps, and how inputs grew."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.adapters import model_fingerprint
from engine.checkpoint import open_native
from engine.checkpoint_tensors import read_json
from engine.config import ModelConfig, config_from_dict
from engine.errors import CheckpointError, ConfigError
from engine.model.transformer import Transformer
from training.growth import Growth, describe
from training.growth_axes import Axis, plain_axis

RECORD = "growth.json"
VERSION = 1
SOURCE = "source"  # in a receipt: where the source is, as seen from the grown model


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One growth: source and result by fingerprint, operators, and what a stream vector becomes.

    `origin` and `weight` tell, per new dimension, which old one it copies (-1: none, it is 0), and
    how much of it.
    """

    source_fingerprint: str
    fingerprint: str
    source_config: dict[str, Any]
    is_exact: bool
    seed: int
    operators: list[dict[str, Any]]
    origin: list[int]
    weight: list[float]
    receipt: dict[str, Any] = field(default_factory=dict)

    @property
    def stream(self) -> Axis:
        """How embeddings and soft prompts grew."""
        weight = torch.tensor(self.weight, dtype=torch.float64)
        return plain_axis(torch.tensor(self.origin))._replace(weight=weight)

    @property
    def config(self) -> ModelConfig:
        """The config of the source."""
        return config_from_dict(self.source_config)


def make_step(growth: Growth, source: str, result: str, receipt: dict[str, Any]) -> Step:
    """The record of a growth between two fingerprints."""
    return Step(
        source_fingerprint=source,
        fingerprint=result,
        source_config=json.loads(json.dumps(asdict(growth.source))),  # as it will be read
        is_exact=growth.is_exact,
        seed=growth.plan.seed,
        operators=describe(growth),
        origin=growth.stream.origin.tolist(),
        weight=growth.stream.weight.tolist(),
        receipt=receipt,
    )


def record_text(steps: Sequence[Step]) -> str:
    """Text of `growth.json`, the oldest step first."""
    values = {"format": "infmoe-growth", "version": VERSION, "steps": [asdict(s) for s in steps]}
    return json.dumps(values, indent=1) + "\n"


def read_steps(model: Path) -> list[Step]:
    """The steps by which a model directory has grown; none if it never did.

    Raises CheckpointError if its record is damaged or of a later version.
    """
    path = model / RECORD
    if not path.exists():
        return []
    values = read_json(path)
    if values.get("format") != "infmoe-growth" or values.get("version") != VERSION:
        raise CheckpointError(
            f"{path}: is no record of growth of version {VERSION}; upgrade InfMoE or grow again"
        )
    try:
        steps = [Step(**step) for step in values["steps"]]  # type: ignore[attr-defined]  # checked
        for step in steps:
            _check_step(step)
    except (KeyError, TypeError, ValueError, ConfigError) as error:
        raise CheckpointError(f"{path}: is damaged ({error}); grow the model again") from error
    return steps


def _check_step(step: Step) -> None:
    width = step.config.d_model
    weights = torch.tensor(step.weight, dtype=torch.float64)
    if weights.shape != (len(step.origin),) or not step.origin:
        raise ValueError("origin and weight are not of one length")
    if not all(type(i) is int and -1 <= i < width for i in step.origin):
        raise ValueError(f"origin leaves the {width} dimensions of the source")


def read_fingerprint(model: Path) -> str:
    """The fingerprint of a native model directory; of its tensors only the embedding is read."""
    source = open_native(model)
    with torch.device("meta"):
        shell = Transformer(source.config)
    shell.embedding.weight = torch.nn.Parameter(_embedding(source.dense()))
    return model_fingerprint(shell)


def _embedding(tensors: Iterator[tuple[str, Tensor]]) -> Tensor:
    return next(tensor for name, tensor in tensors if name == "embedding.weight")
