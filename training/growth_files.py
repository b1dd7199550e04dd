"""Growing a model directory into another one, with a receipt of what changed."""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.adapters import model_fingerprint
from engine.checkpoint import find_tokenizer_files, open_native, save_state
from engine.checkpoint_any import detect_kind, load_any, open_foreign
from engine.checkpoint_tensors import convert_tensor
from engine.checkpoint_writer import partial_path, sync
from engine.config import ModelConfig
from engine.errors import CheckpointError, ConfigError
from engine.model.initial import num_parameters
from engine.model.transformer import Transformer
from training.growth import Growth, GrowthPlan, grow, prepare_growth
from training.growth_optimizer import (
    Moments,
    RunState,
    check_moments,
    grow_moments,
    read_run,
    write_run,
)
from training.growth_recipes import TargetFile
from training.growth_record import RECORD, Step, make_step, read_steps, record_text
from training.state import find_state
from training.vocabulary_growth import VocabularyMap, map_vocabulary, target_ids
from training.vocabulary_names import open_vocabulary

PROBE_ROWS, PROBE_LENGTH, PROBE_SEED = 4, 24, 20210624


@dataclass(frozen=True, slots=True)
class RunGrowth:
    """A run folder whose state grows along, the folder of the new run, and what moments become."""

    source: Path
    out: Path
    moments: Moments


@dataclass(frozen=True, slots=True)
class Receipt:
    """What a growth did. Differences of logits are over old tokens, of random texts."""

    step: Step
    warnings: list[str]

    def summary(self) -> list[str]:
        """All of it, a line each."""
        facts = self.step.receipt
        word = "exact" if self.step.is_exact else "not exact"
        lines = [_describe_operator(operator) for operator in self.step.operators]
        lines.append(f"parameters: {facts['source_parameters']:,} -> {facts['parameters']:,}")
        lines.append(
            f"logits: differ by {facts['max_logit_difference']:.2e} at most ({word}); "
            f"they are {facts['mean_logit']:.3g} on average"
        )
        return lines + [f"warning: {warning}" for warning in self.warnings]


def grow_directory(
    model: Path,
    target: TargetFile,
    out: Path,
    dtype: torch.dtype = torch.float32,
    run: RunGrowth | None = None,
) -> Receipt:
    """Grow a model as a growth file says and write it to a new directory.

    With a `run` its weights are grown instead of those of the directory, which are rounded copies,
    and its moments go along. All is checked before weights are read; the directory appears when it
    is complete.
    Raises ConfigError or TokenizerError if the target does not fit, CheckpointError if a file is
    damaged or in the way.
    """
    check_free(out)
    source = read_model_config(model)
    growth, folder = plan_directory(model, source, target)
    check_run(run, growth)
    state, run_state = _read_weights(model, source, run)
    grown = grow(state, growth)
    wide = {name: convert_tensor(str(out), name, value, dtype) for name, value in grown.items()}
    step = measure(growth, state, wide)
    files = find_tokenizer_files(folder)
    kept = find_tokenizer_files(model).get("generation_config.json")
    if kept is not None:
        files.setdefault(kept.name, kept)
    _write(out, growth.target, wide, files, [*read_steps(model), step])
    if run is not None and run_state is not None:
        moments = grow_moments(run_state.moments, state, growth, run.moments)
        weights = {name: tensor.float() for name, tensor in wide.items()}
        write_run(run.out, growth.target, RunState(run_state.optimizer, weights, moments))
    return Receipt(step, growth.warnings())


def check_free(out: Path) -> None:
    """Raise CheckpointError if something is where a model is to be written."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"{out}: is there already; choose another directory")


def check_run(run: RunGrowth | None, growth: Growth) -> None:
    """Raise ConfigError or CheckpointError if the state of a run cannot grow along."""
    if run is None:
        return
    check_moments(growth, run.moments)
    if find_state(run.out) is not None:
        raise CheckpointError(f"{run.out}: holds the state of a run; choose another folder")


def read_model_config(model: Path) -> ModelConfig:
    """The config of a native or Hugging Face directory or a GGUF file; no tensor is read."""
    kind = detect_kind(model)
    if kind == "cpm2":
        raise CheckpointError(f"{model}: holds pickles; run `infmoe convert` on it first")
    return open_native(model).config if kind == "native" else open_foreign(model).config


def plan_directory(model: Path, source: ModelConfig, target: TargetFile) -> tuple[Growth, Path]:
    """Work out a growth file for a model; also the folder that has the tokenizer files."""
    wanted = target.vocabulary
    if wanted is None:
        plan = target.plan(source)
        return prepare_growth(source, plan), model
    folder = target.path.parent / wanted.tokenizer
    old = open_vocabulary(model, source.tokenizer)
    new = open_vocabulary(folder, wanted.kind)
    plan = target.plan(target_ids(source, old, new, target.target))
    mapping = map_vocabulary(old, new, plan.target, wanted.start, plan.seed)
    _check_ids(plan, mapping)
    return prepare_growth(source, plan, mapping), folder


def _check_ids(plan: GrowthPlan, mapping: VocabularyMap) -> None:
    named = plan.target.vocab_size - mapping.report.unnamed
    ids = (plan.target.pad_token_id, plan.target.decoder_start_token_id)
    for token_id in (*ids, *plan.target.eos_token_ids):
        if token_id >= named:
            raise ConfigError(
                f"token id {token_id} has no token in the new vocabulary of {named}; "
                "give pad_token_id, decoder_start_token_id, eos_token_ids in [target]"
            )


def _read_weights(
    model: Path, config: ModelConfig, run: RunGrowth | None
) -> tuple[dict[str, Tensor], RunState | None]:
    if run is None:
        return dict(load_any(model, torch.float32).state_dict()), None
    state = read_run(run.source, config)
    return state.weights, state


def build(config: ModelConfig, state: Mapping[str, Tensor]) -> Transformer:
    """A model that computes in fp32 with the tensors given."""
    with torch.device("meta"):
        model = Transformer(config)
    model.load_state_dict({name: t.float() for name, t in state.items()}, assign=True)
    return model.eval()


@torch.no_grad()
def measure(growth: Growth, state: Mapping[str, Tensor], wide: Mapping[str, Tensor]) -> Step:
    """Compare source and result on random texts of old tokens, and record the growth."""
    source, result = build(growth.source, state), build(growth.target, wide)
    old = new = torch.arange(growth.source.vocab_size)
    if growth.vocabulary is not None:
        new, old = growth.vocabulary.old_ids()
    generator = torch.Generator().manual_seed(PROBE_SEED)
    shape = (2, PROBE_ROWS, PROBE_LENGTH)
    picked = torch.randint(len(old), shape, generator=generator)
    rows = torch.ones(shape[1:], dtype=torch.int64)
    before = source(old[picked[0]], rows, old[picked[1]], rows)[..., old]
    after = result(new[picked[0]], rows, new[picked[1]], rows)[..., new]
    receipt: dict[str, Any] = {
        "max_logit_difference": float((before - after).abs().max()),
        "mean_logit": float(before.abs().mean()),
        "source_parameters": num_parameters(source),
        "parameters": num_parameters(result),
    }
    return make_step(growth, model_fingerprint(source), model_fingerprint(result), receipt)


def _write(
    out: Path,
    config: ModelConfig,
    state: Mapping[str, Tensor],
    files: Mapping[str, Path],
    steps: list[Step],
) -> None:
    """Write beside the place, then rename: model and record are there together, or not at all."""
    staging = out.with_name(f"{out.name}.growing")
    for left in (staging, partial_path(staging)):
        shutil.rmtree(left, ignore_errors=True)
    save_state(config, state, staging, files.values())
    record = staging / RECORD
    record.write_text(record_text(steps), encoding="utf-8")
    sync(record, staging)
    if out.exists():
        out.rmdir()
    staging.rename(out)
    sync(out.parent)


def _describe_operator(operator: dict[str, Any]) -> str:
    facts = ", ".join(f"{k} {v}" for k, v in operator.items() if k != "operator")
    return f"{operator['operator']}: {facts}"
