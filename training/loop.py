"""The training loop: one plain function over a recipe, resumable to the same losses."""

import hashlib
import json
import logging
import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from engine.checkpoint_any import load_any
from engine.checkpoint_writer import VOCABULARY_FILES, sync
from engine.config import TokenizerKind
from engine.model.moe import assign_greedy
from engine.model.transformer import Transformer, initialize
from engine.tokenizer import Tokenizer, open_tokenizer
from training.evaluate import FillReport, evaluate_fill, unigram_log_probs
from training.optimizers import build_optimizer, learning_rate
from training.plots import plot_losses
from training.recipe import Precision, Recipe
from training.routing import assign_balanced
from training.sampler import Sampler
from training.shards import Shard, prepare_shard
from training.span_corruption import IGNORED, Batch, Objective
from training.state import load_state, save_state

logger = logging.getLogger(__name__)

EVAL_SEED = 20210624  # validation batches are the same for all runs

OnStep = Callable[[dict[str, Any]], None]
OnPrepare = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class TrainingData:
    """What the loop reads: batches for training, for validation, and the baseline."""

    train: Sampler
    valid: Sampler
    unigram_V: Tensor
    special_ids: tuple[int, ...]


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
    sizes = {
        "rows": recipe.train.rows,
        "source_length": data.source_length,
        "target_length": data.target_length,
        "window": data.window,
    }
    return TrainingData(
        Sampler(train, weights, objective, **sizes),
        Sampler(valid, weights, filling, **sizes),
        unigram_log_probs(train, weights, config.vocab_size),
        (*objective.sentinel_ids, objective.end_id),
    )


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


class Metrics:
    """`metrics.jsonl` of a run: one JSON object per line, cut back to where a run resumes."""

    def __init__(self, path: Path, step: int) -> None:
        self.path = path
        self.rows: list[dict[str, Any]] = []
        if path.exists():
            lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
            rows = [json.loads(line) for line in lines if line.endswith("\n")]  # no torn last one
            self.rows = [row for row in rows if row["step"] <= step]
        partial = path.with_name(path.name + ".partial")
        partial.write_text("".join(json.dumps(row) + "\n" for row in self.rows), encoding="utf-8")
        sync(partial)
        partial.replace(path)

    def add(self, row: dict[str, Any]) -> None:
        """Append a row."""
        self.rows.append(row)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def micro_loss(model: Transformer, batch: Batch, precision: Precision) -> Tensor:
    """Sum of the losses of all labels. Scores are computed for positions with a label only."""
    with autocast(precision):
        encoded_BSD = model.encode(batch.encoder_BS, batch.encoder_segments_BS)
        hidden_BTD = model.decode(
            batch.decoder_BT, batch.decoder_segments_BT, encoded_BSD, batch.encoder_segments_BS
        )
        counted_BT = batch.labels_BT != IGNORED
        logits_NV = model.logits(hidden_BTD[counted_BT])
    return F.cross_entropy(logits_NV.float(), batch.labels_BT[counted_BT], reduction="sum")


def autocast(precision: Precision) -> AbstractContextManager[object]:
    """Mixed precision for the matrix products, or nothing."""
    return torch.autocast("cpu", torch.bfloat16) if precision == "bf16" else nullcontext()


def train_step(
    model: Transformer, optimizer: torch.optim.Optimizer, batches: list[Batch], recipe: Recipe
) -> tuple[float, float]:
    """One update from the micro-batches, all labels weighing the same.

    Returns loss and gradient norm.
    """
    total = sum(int((batch.labels_BT != IGNORED).sum()) for batch in batches)
    loss_sum = 0.0
    optimizer.zero_grad(set_to_none=True)
    for batch in batches:
        loss = micro_loss(model, batch, recipe.train.precision)
        (loss / total).backward()  # type: ignore[no-untyped-call]
        loss_sum += loss.item()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.train.clip)
    optimizer.step()
    return loss_sum / total, float(norm)


def set_routing(model: Transformer, *, balanced: bool) -> None:
    """Route by balanced assignment or, as at inference, greedily."""
    for layer in model.moe_layers():
        layer.assign = assign_balanced if balanced else assign_greedy


def evaluate(model: Transformer, data: TrainingData, recipe: Recipe) -> FillReport:
    """Span filling on the validation texts, greedily routed as at inference."""
    set_routing(model, balanced=False)
    batches = (data.valid.batch(EVAL_SEED, i) for i in range(recipe.train.eval_batches))
    with autocast(recipe.train.precision):
        return evaluate_fill(model, batches, data.unigram_V, data.special_ids)


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
            f"start {start} has {name} {given[name]!r}, [model] {wanted[name]!r}; write it as in "
            "the config.json of the start"
        )
    model.load_state_dict(found.state_dict())
    return model


def train(
    recipe: Recipe, run: Path, data: TrainingData, on_step: OnStep | None = None
) -> Transformer:
    """Train as the recipe says, resuming from the run folder's last checkpoint if there is one.

    Leaves `recipe.json`, `metrics.jsonl`, `loss.png` and `state.safetensors` in the run folder. A
    resumed run meets the same batches, rates and states, so its losses equal those of an
    uninterrupted one.
    Raises FloatingPointError if the loss or a gradient is no longer a number, ValueError if the run
    folder holds the state of another recipe.
    """
    settings = recipe.train
    run.mkdir(parents=True, exist_ok=True)
    model = begin_model(recipe)
    optimizer = build_optimizer(model, settings)
    start = load_state(run, model, optimizer)
    metrics = Metrics(run / "metrics.jsonl", start)
    (run / "recipe.json").write_text(json.dumps(recipe.as_run(), indent=2), encoding="utf-8")
    model.train()
    for step in range(start, settings.steps):
        began = time.perf_counter()
        rate = learning_rate(step, settings)
        for group in optimizer.param_groups:
            group["lr"] = rate
        set_routing(model, balanced=step < settings.steps * settings.balanced_until)
        numbers = range(step * settings.accumulation, (step + 1) * settings.accumulation)
        batches = [data.train.batch(settings.seed, number) for number in numbers]
        loss, norm = train_step(model, optimizer, batches, recipe)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise FloatingPointError(
                f"loss is {loss}, gradient norm {norm} at step {step}: lower learning_rate, "
                "or set precision to fp32"
            )
        tokens = sum(int((batch.encoder_segments_BS > 0).sum()) for batch in batches)
        tokens += sum(int((batch.labels_BT != IGNORED).sum()) for batch in batches)
        done = step + 1
        row: dict[str, Any] = {
            "step": done,
            "loss": round(loss, 6),
            "rate": rate,
            "norm": round(norm, 4),
        }
        row |= {"tokens": tokens, "seconds": round(time.perf_counter() - began, 4)}
        if done % settings.eval_every == 0 or done == settings.steps:
            report = evaluate(model, data, recipe)
            row |= {
                f"valid_{k}" if "unigram" not in k else k: v for k, v in report._asdict().items()
            }
        metrics.add(row)
        if done % settings.checkpoint_every == 0 or done == settings.steps:
            sync(metrics.path)  # before the state that relies on it
            save_state(run, done, model, optimizer)
            plot_losses(metrics.rows, run / "loss.png")
        if on_step:
            on_step(row)
    model.eval()
    set_routing(model, balanced=False)
    return model
