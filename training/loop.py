"""The training loop: one plain function over a recipe, resumable to the same losses."""

import hashlib
import json
import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from engine.checkpoint_any import load_any
from engine.checkpoint_writer import VOCABULARY_FILES, sync
from engine.config import ModelConfig, TokenizerKind
from engine.model.initial import initialize
from engine.model.transformer import Transformer
from engine.tokenizer import Tokenizer, open_tokenizer
from training.averages import Average
from training.checkpointing import checkpointed
from training.distill import Teaching, open_teaching, prepare_cache
from training.distributed import ALONE, Workers, held_experts
from training.evaluate import FillReport, evaluate_fill, unigram_log_probs
from training.losses import autocast, label_scores
from training.metrics import Metrics
from training.objectives import MODE_TOKENS, make_denoisers
from training.optimizers import build_optimizer, learning_rate
from training.plots import plot_losses
from training.recipe import Precision, Recipe
from training.routing import set_routing
from training.run_lock import LOCK, locked
from training.run_record import tell_differences
from training.sampler import Sampler
from training.shards import Shard, prepare_shard
from training.span_corruption import IGNORED, Batch, Objective
from training.state import find_state, load_state, save_state
from training.two_stage import part_of_step, step_flops, submodel
from training.updates import Lesson, train_update
from training.vocabulary_names import open_vocabulary

logger = logging.getLogger(__name__)

EVAL_SEED = 20210624  # validation batches are the same for all runs

OnStep = Callable[[dict[str, Any]], None]
OnPrepare = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class TrainingData:
    """What the loop reads: batches for training, for validation, and the baseline.

    `groups` are validation batches of the sources of one group, by its name.
    """

    train: Sampler
    valid: Sampler
    unigram_V: Tensor
    special_ids: tuple[int, ...]
    groups: dict[str, Sampler] = field(default_factory=dict)


def open_data(recipe: Recipe, on_prepare: OnPrepare | None = None) -> TrainingData:
    """Tokenize the texts of a recipe where that has not been done, and open them.

    Raises ValueError or an EngineError child if a text or the vocabulary is missing or does not
    fit.
    """
    data, config = recipe.data, recipe.model
    folder = recipe.path(data.tokenizer)
    tokenizer = open_tokenizer(folder, config.tokenizer)
    if tokenizer.vocab_size > config.vocab_size:
        raise ValueError(
            f"{folder} names {tokenizer.vocab_size} tokens; vocab_size is only {config.vocab_size}"
        )
    key = _tokenizer_key(folder, config.tokenizer)

    def shards(names: list[str]) -> list[Shard]:
        opened = []
        for name in names:
            report = (lambda done, size, n=name: on_prepare(n, done, size)) if on_prepare else None
            shard = recipe.path(data.shards) / name.strip("./").replace("/", "-")
            opened.append(prepare_shard(recipe.path(name), shard, tokenizer, key, report))
        return opened

    weights = [source.weight for source in data.sources]
    train = shards([source.train for source in data.sources])
    valid = shards([source.valid for source in data.sources])
    objective = _objective(recipe, tokenizer, data.continuation_share)
    filling = _objective(recipe, tokenizer, 0.0)
    denoisers = make_denoisers(data.objective, objective, _mode_ids(folder, config.tokenizer))
    sizes: dict[str, Any] = {
        "rows": recipe.train.rows,
        "source_length": data.source_length,
        "target_length": data.target_length,
        "window": data.window,
    }

    def validation(numbers: list[int]) -> Sampler:
        chosen = [valid[i] for i in numbers]
        shares = [weights[i] for i in numbers]
        return Sampler(chosen, shares, filling, **sizes, denoisers=denoisers[:1])

    groups: dict[str, list[int]] = {}
    for number, source in enumerate(data.sources):
        if source.group:
            groups.setdefault(source.group, []).append(number)
    return TrainingData(
        Sampler(train, weights, objective, **sizes, denoisers=denoisers),
        validation(list(range(len(valid)))),
        unigram_log_probs(train, weights, config.vocab_size),
        (*objective.sentinel_ids, objective.end_id),
        {name: validation(numbers) for name, numbers in groups.items()},
    )


def _mode_ids(folder: Path, kind: TokenizerKind) -> dict[Any, int]:
    """Ids of UL2's mode tokens, if the vocabulary has them."""
    ids = open_vocabulary(folder, kind).ids()
    return {mode: ids[name] for mode, name in MODE_TOKENS.items() if name in ids}


def _tokenizer_key(folder: Path, kind: TokenizerKind) -> str:
    """Tells tokenizers apart; that of bytes reads no file."""
    name = VOCABULARY_FILES.get(kind)
    return hashlib.sha256(b"" if name is None else (folder / name).read_bytes()).hexdigest()


def _objective(recipe: Recipe, tokenizer: Tokenizer, continuation_share: float) -> Objective:
    config = recipe.model
    if not config.eos_token_ids:
        raise ValueError("[model] eos_token_ids is empty; training needs the id that ends a text")
    return Objective(
        sentinel_ids=tuple(tokenizer.sentinel_id(i) for i in range(tokenizer.num_sentinels)),
        start_id=config.decoder_start_token_id,
        end_id=config.eos_token_ids[0],
        pad_id=config.pad_token_id,
        density=recipe.data.density,
        mean_span=recipe.data.mean_span,
        continuation_share=continuation_share,
    )


def micro_loss(model: Transformer, batch: Batch, precision: Precision) -> Tensor:
    """Sum of the losses of all labels. Scores are computed for positions with a label only."""
    logits_NV, labels_N = label_scores(model, batch, precision)
    return F.cross_entropy(logits_NV, labels_N, reduction="sum")


def train_step(
    model: Transformer, optimizer: torch.optim.Optimizer, batches: list[Batch], recipe: Recipe
) -> tuple[float, float]:
    """One update from the micro-batches, all labels weighing the same.

    Returns loss and gradient norm.
    """
    update = train_update(model, optimizer, list(enumerate(batches)), recipe)
    return update.loss, update.norm


def evaluate(model: Transformer, data: TrainingData, recipe: Recipe) -> FillReport:
    """Span filling on the validation texts, greedily routed as at inference."""
    set_routing(model, balanced=False)
    batches = valid_batches(data, recipe)
    with autocast(recipe.train.precision):
        return evaluate_fill(model, batches, data.unigram_V, data.special_ids)


def valid_batches(data: TrainingData, recipe: Recipe) -> Iterator[Batch]:
    """The batches of an evaluation, the same each time."""
    return (data.valid.batch(EVAL_SEED, i) for i in range(recipe.train.eval_batches))


def evaluate_groups(
    model: Transformer, data: TrainingData, recipe: Recipe
) -> dict[str, FillReport]:
    """The same for each group of sources, such as a language."""
    return {
        name: evaluate(model, replace(data, valid=sampler), recipe)
        for name, sampler in data.groups.items()
    }


def begin_model(recipe: Recipe) -> Transformer:
    """The model at step 0: random, or that of the directory that the recipe starts from.

    Raises ValueError if that one has another config than [model].
    """
    model = Transformer(recipe.model)
    start = recipe.train.start
    if not start:
        initialize(model, recipe.train.seed)
        return model
    found = load_any(recipe.path(start), torch.float32)
    given, wanted = asdict(found.config), asdict(recipe.model)
    if differing := [name for name in wanted if wanted[name] != given[name]]:
        name = differing[0]
        raise ValueError(
            f"start {start} has {name} {given[name]!r}, [model] {wanted[name]!r}; leave [model] "
            "out, or write it as in the config.json of the start"
        )
    model.load_state_dict(found.state_dict())
    return model


def train(
    recipe: Recipe,
    run: Path,
    data: TrainingData,
    on_step: OnStep | None = None,
    workers: Workers = ALONE,
) -> Transformer:
    """Train as the recipe says, resuming from the run folder's last checkpoint if there is one.

    Leaves `recipe.json`, `metrics.jsonl`, `loss.png` and `state.safetensors` in the run folder. A
    resumed run meets the same batches, rates and states, so its losses equal those of an
    uninterrupted one; a warning tells of steps before that were of other data or rates. With `ema`
    the model returned has the averaged weights.
    Raises FloatingPointError if the loss or a gradient is no longer a number, OSError if the disk
    is full, ValueError if the run folder holds the state of another model or optimiser,
    CheckpointError if another process is at work there; the last state is kept.
    """
    settings = recipe.train
    run.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        if workers.is_first:
            stack.enter_context(locked(run / LOCK, str(run)))
        state = _begin(recipe, run, data, workers)
        model = state.model
        stack.enter_context(checkpointed(model) if settings.checkpointing else nullcontext())
        model.train()
        for step in range(state.start, settings.steps):
            row = _run_step(state, recipe, data, step, workers)
            done = step + 1
            if done % settings.eval_every == 0 or done == settings.steps:
                row |= _evaluate_step(state, recipe, data)
            if state.metrics is not None:
                state.metrics.add(row)
            if done % settings.checkpoint_every == 0 or done == settings.steps:
                _save(state, recipe, run, done, workers)
            if on_step:
                on_step(row)
    if state.average is not None:
        state.average.copy_to(model)
    model = workers.gather(model)
    model.eval()
    set_routing(model, balanced=False)
    return model


@dataclass(slots=True)
class _State:
    """What a run carries from step to step."""

    model: Transformer
    optimizer: torch.optim.Optimizer
    metrics: Metrics | None  # of the first worker
    start: int
    average: Average | None
    teaching: Teaching | None


def _begin(recipe: Recipe, run: Path, data: TrainingData, workers: Workers) -> _State:
    settings = recipe.train
    workers.check(recipe)
    first = recipe
    if settings.start and not recipe.path(settings.start).exists() and find_state(run) is not None:
        first = replace(recipe, train=replace(settings, start=""))  # the state has all weights
    model = workers.shard(begin_model(first), settings.expert_parallel)
    optimizer = build_optimizer(model, settings)
    if (held := held_experts(model)) is not None:
        held.adopt(optimizer)
    average = Average(model, settings.ema) if settings.ema else None
    facts: dict[str, Any] = {}
    weights = None if average is None else average.weights
    try:
        start = load_state(run, model, optimizer, weights, facts)
    finally:  # of a misfit this tells the field, not all the shapes
        _check_model(run, facts, recipe)
    if start and workers.is_first:
        tell_differences(run, recipe, start)
    teaching = open_teaching(recipe)
    if teaching is not None:
        teaching.is_over = bool(facts.get("teaching_is_over", False))
        inheriting = math.ceil(settings.steps * teaching.recipe.inherit_share)
        prepare_cache(teaching, recipe, data.train, inheriting * settings.accumulation)
        if teaching.recipe.stop_when_passed:
            teaching.measure(valid_batches(data, recipe), data.special_ids)
    metrics = Metrics(run / "metrics.jsonl", start) if workers.is_first else None
    if workers.is_first:
        text = json.dumps(recipe.as_run(), indent=2)
        (run / "recipe.json").write_text(text, encoding="utf-8")
    return _State(model, optimizer, metrics, start, average, teaching)


def _check_model(run: Path, facts: dict[str, Any], recipe: Recipe) -> None:
    """Raise ValueError if a state is of a model that computes another function of its weights."""
    known, wanted = facts.get("config"), _as_json(recipe.model)
    if known is None:  # of a version that did not note it
        return
    if differing := [name for name in wanted if name in known and wanted[name] != known[name]]:
        name = differing[0]
        raise ValueError(
            f"{run}: its state is of a model with {name} {known[name]!r}, [model] has "
            f"{wanted[name]!r}; write it so, or give another run folder"
        )


def _as_json(config: ModelConfig) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(json.dumps(asdict(config)))
    return values


def _run_step(
    state: _State, recipe: Recipe, data: TrainingData, step: int, workers: Workers
) -> dict[str, Any]:
    """One step; what to note of it."""
    settings, model, teaching = recipe.train, state.model, state.teaching
    began = time.perf_counter()
    rate = learning_rate(step, settings)
    for group in state.optimizer.param_groups:
        group["lr"] = rate
    set_routing(model, balanced=step < settings.steps * settings.balanced_until)
    numbers = range(step * settings.accumulation, (step + 1) * settings.accumulation)
    batches = [(number, data.train.batch(settings.seed, number)) for number in numbers]
    lesson = None if teaching is None else Lesson(teaching.rate(step, settings.steps), teaching)
    part = part_of_step(recipe, step)
    with nullcontext() if part is None else submodel(model, part, settings.submodel_layers):
        update = train_update(model, state.optimizer, batches, recipe, lesson, workers)
    if not (math.isfinite(update.loss) and math.isfinite(update.norm)):
        raise FloatingPointError(
            f"loss is {update.loss}, gradient norm {update.norm} at step {step}: lower "
            "learning_rate, or set precision to fp32"
        )
    if state.average is not None:
        state.average.update(model, step)
    tokens = sum(int((batch.encoder_segments_BS > 0).sum()) for _, batch in batches)
    tokens += sum(int((batch.labels_BT != IGNORED).sum()) for _, batch in batches)
    rows = settings.rows * settings.accumulation
    lengths = recipe.data.source_length, recipe.data.target_length
    row: dict[str, Any] = {
        "step": step + 1,
        "loss": round(update.loss, 6),
        "rate": rate,
        "norm": round(update.norm, 4),
        "flops": rows * step_flops(recipe.model, part, settings.submodel_layers, *lengths),
    }
    if part is not None:
        row["submodel"] = part
    if lesson is not None and lesson.rate > 0:
        row |= {"inheritance": lesson.rate, "kl": round(update.kl, 6)}
        row["teacher_flops"] = rows * lesson.teaching.flops(*lengths)
    return row | {"tokens": tokens, "seconds": round(time.perf_counter() - began, 4)}


def _evaluate_step(state: _State, recipe: Recipe, data: TrainingData) -> dict[str, Any]:
    """Validation of the model, or of its averaged weights, in all and by group."""
    model, average = state.model, state.average
    with nullcontext() if average is None else average.applied(model):
        report = evaluate(model, data, recipe)
        groups = evaluate_groups(model, data, recipe)
    row = {f"valid_{k}" if "unigram" not in k else k: v for k, v in report._asdict().items()}
    row |= {f"valid_loss_{name}": group.loss for name, group in groups.items()}
    if state.teaching is not None:
        state.teaching.hear(report.loss)
        if state.teaching.valid_loss is not None:
            row["teacher_valid_loss"] = state.teaching.valid_loss
    return row


def _save(state: _State, recipe: Recipe, run: Path, done: int, workers: Workers) -> None:
    weights = None if state.average is None else state.average.weights
    is_over = state.teaching is not None and state.teaching.is_over
    if state.metrics is not None:
        sync(state.metrics.path)  # before the state that relies on it
    facts = {"teaching_is_over": is_over, "config": _as_json(recipe.model)}
    save_state(run, done, state.model, state.optimizer, weights, workers, **facts)
    if state.metrics is not None:
        plot_losses(state.metrics.rows, run / "loss.png")
