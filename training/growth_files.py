"""Growing a model directory into another one, with a receipt of what changed."""

import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.adapters import model_fingerprint
from engine.checkpoint import find_tokenizer_files, save_state
from engine.checkpoint_any import load_any
from engine.checkpoint_streamed import open_streamed
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
from training.growth_record import RECORD, SOURCE, Step, make_step, read_steps, record_text
from training.run_compare import ORIGIN
from training.run_lock import locked
from training.state import find_state
from training.upcycling_files import only_upcycles, open_model_source, write_upcycled
from training.vocabulary_growth import VocabularyMap, map_vocabulary, target_ids
from training.vocabulary_names import open_vocabulary

OpenModel = Callable[[], AbstractContextManager[Transformer]]
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
    dtype: torch.dtype | None = None,
    run: RunGrowth | None = None,
) -> Receipt:
    """Grow a model as a growth file says and write it to a new directory.

    With a `run` its weights are grown instead of those of the directory, which are rounded copies,
    and its moments go along. All is checked before weights are read; the directory appears when it
    is complete. If experts are all that is new, they are written one by one, and dtype None keeps
    the stored one; else the grown model must fit into memory, and None is fp32.
    Raises ConfigError or TokenizerError if the target does not fit, CheckpointError if a file is
    damaged or in the way.
    """
    check_free(out)
    source = read_model_config(model)
    growth, folder = plan_directory(model, source, target)
    check_run(run, growth)
    steps = read_steps(model)
    if run is None and only_upcycles(growth):
        step = _upcycle(model, growth, out, dtype, steps)
        return Receipt(step, growth.warnings())
    check_memory(growth.target)
    state, run_state = _read_weights(model, source, run)
    grown = grow(state, growth)
    dtype = dtype or torch.float32
    wide = {name: convert_tensor(str(out), name, value, dtype) for name, value in grown.items()}
    step = measure(
        growth,
        lambda: nullcontext(build(growth.source, state)),
        lambda: nullcontext(build(growth.target, wide)),
    )
    files = find_tokenizer_files(folder)
    kept = find_tokenizer_files(model).get("generation_config.json")
    if kept is not None:
        files.setdefault(kept.name, kept)
    step = _from(step, model if run is None else run.source, out)
    with _staged(out) as staging:
        save_state(growth.target, wide, staging, files.values())
        _place(staging, out, [*steps, step])
    if run is not None and run_state is not None:
        moments = grow_moments(run_state.moments, state, growth, run.moments)
        weights = {name: tensor.float() for name, tensor in wide.items()}
        write_run(run.out, growth.target, RunState(run_state.optimizer, weights, moments))
        (run.out / ORIGIN).write_text(f"{run.source.resolve()}\n", encoding="utf-8")
    return Receipt(step, growth.warnings())


def check_free(out: Path) -> None:
    """Raise CheckpointError if something is where a model is to be written."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"{out}: is there already; choose another directory")


def check_memory(target: ModelConfig) -> None:
    """Raise ConfigError for a model whose weights in fp32 are more than the machine's memory."""
    wanted = 4 * count_parameters(target)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if wanted > memory:
        raise ConfigError(
            f"the grown model has {wanted / 2**30:,.0f} GiB in fp32, in which it is made, and the "
            f"machine {memory / 2**30:,.0f}; choose smaller sizes, or experts alone, which are "
            "written one by one"
        )


def check_run(run: RunGrowth | None, growth: Growth) -> None:
    """Raise ConfigError or CheckpointError if the state of a run cannot grow along."""
    if run is None:
        return
    check_moments(growth, run.moments)
    if find_state(run.out) is not None:
        raise CheckpointError(f"{run.out}: holds the state of a run; choose another folder")


def read_model_config(model: Path) -> ModelConfig:
    """The config of a native or Hugging Face directory or a GGUF file; no tensor is read."""
    return open_model_source(model).config


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
def measure(growth: Growth, open_source: OpenModel, open_result: OpenModel) -> Step:
    """Compare source and result on random texts of old tokens, and record the growth.

    One of them is in memory at a time.
    """
    old = new = torch.arange(growth.source.vocab_size)
    if growth.vocabulary is not None:
        new, old = growth.vocabulary.old_ids()
    generator = torch.Generator().manual_seed(PROBE_SEED)
    shape = (2, PROBE_ROWS, PROBE_LENGTH)
    picked = torch.randint(len(old), shape, generator=generator)
    rows = torch.ones(shape[1:], dtype=torch.int64)
    with open_source() as source:
        before = source(old[picked[0]], rows, old[picked[1]], rows)[..., old]
        source_fingerprint = model_fingerprint(source)
    del source
    with open_result() as result:
        after = result(new[picked[0]], rows, new[picked[1]], rows)[..., new]
        fingerprint = model_fingerprint(result)
    receipt: dict[str, Any] = {
        "max_logit_difference": float((before - after).abs().max()),
        "mean_logit": float(before.abs().mean()),
        "source_parameters": count_parameters(growth.source),
        "parameters": count_parameters(growth.target),
    }
    return make_step(growth, source_fingerprint, fingerprint, receipt)


def count_parameters(config: ModelConfig) -> int:
    """All parameters of a model, wherever its experts lie."""
    with torch.device("meta"):
        return num_parameters(Transformer(config))


def _upcycle(
    model: Path, growth: Growth, out: Path, dtype: torch.dtype | None, steps: list[Step]
) -> Step:
    """Write a mixture expert by expert, measure it as it is on the disk, put it in its place."""
    with _staged(out) as staging:
        write_upcycled(model, growth, staging, dtype)
        step = measure(
            growth,
            lambda: nullcontext(load_any(model).float().eval()),  # rounded as it is when served
            lambda: open_streamed(staging, growth.target),
        )
        step = _from(step, model, out)
        _place(staging, out, [*steps, step])
    return step


def _from(step: Step, origin: Path, out: Path) -> Step:
    """The step with the place of what grew, as seen from the result: its training is charged."""
    place = os.path.relpath(origin.resolve(), out.resolve())
    return replace(step, receipt=step.receipt | {SOURCE: place})


@contextmanager
def _staged(out: Path) -> Iterator[Path]:
    """Where a model is written before it is renamed; what is left there, now or by a kill, goes.

    Raises CheckpointError if another process writes there.
    """
    staging = out.with_name(f"{out.name}.growing")
    out.parent.mkdir(parents=True, exist_ok=True)
    with locked(out.with_name(f".{out.name}.lock"), str(out)):
        check_free(out)  # another one may just have ended
        _discard(staging)
        try:
            yield staging
        finally:  # a disk that is full has its room back
            _discard(staging)


def _discard(staging: Path) -> None:
    for left in (staging, partial_path(staging)):
        shutil.rmtree(left, ignore_errors=True)


def _place(staging: Path, out: Path, steps: list[Step]) -> None:
    """Rename: model and record are there together, or not at all."""
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
