"""A whole tuning run: read and check the data, load the model, train, write what came of it."""

import hashlib
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from engine.adapters import Adapter, Slots, load_adapter, model_fingerprint
from engine.checkpoint import find_tokenizer_files, save_model
from engine.checkpoint_any import load_any
from engine.config import ModelConfig
from engine.errors import CheckpointError, ConfigError
from engine.experts import load_offloaded
from engine.model.transformer import Transformer
from engine.model_paths import find_model
from engine.prepare import prepare
from engine.tokenizer import Tokenizer, open_tokenizer
from training.growth_files import check_free, count_parameters, read_model_config
from training.process_memory import peak_memory
from training.recipe import build_table, read_tables
from training.task_eval import TaskReport, evaluate_task
from training.task_examples import Example, read_examples
from training.tasks import Task, open_task
from training.tune import OnStep, TuneData, TuneSettings, tune
from training.tune_files import AdapterFacts, write_adapter
from training.tune_model import Scorer, SoftPrompt, check_slots
from training.tune_start import STARTS, find_losses, find_starts, start_prompt

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class TunePlan:
    """What is tuned on what, and where it goes; `experts_bytes` keeps experts on the disk."""

    model: Path
    data: Path
    out: Path
    task: Task
    dev: Path | None = None
    run: Path | None = None
    version: str = "1"
    dtype: torch.dtype | None = None
    experts_bytes: int | None = None
    settings: TuneSettings = TuneSettings()

    @property
    def run_folder(self) -> Path:
        """Where the run keeps its state."""
        return self.run or self.out.with_name(f"{self.out.name}.run")


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a run came to. `peak_bytes` is what the process, or its device, held at most.

    `starts` are the prompts that it could start from, if there were several, with their losses: the
    first is the one that it did start from.
    """

    report: TaskReport | None
    num_trained: int
    num_parameters: int
    adapter: Path | None
    model: Path | None
    peak_bytes: int = 0
    starts: dict[str, float] = field(default_factory=dict)


RECIPE_KEYS = ("model", "data", "out", "task", "dev", "run", "version")


def read_tune_recipe(path: Path) -> TunePlan:
    """Read a plan from a TOML file; paths in it are relative to its folder.

    The model may be a named one, as for `infmoe serve`. Raises ConfigError that names the file and
    the key, CheckpointError if the package of a named model is missing.
    """
    values = read_tables(path)
    try:
        if unknown := sorted(values.keys() - {*RECIPE_KEYS, "tune"}):
            known = ", ".join((*RECIPE_KEYS, "[tune]"))
            raise ConfigError(f"unknown key {unknown[0]}; known: {known}")
        if missing := [key for key in ("model", "data", "out", "task") if key not in values]:
            raise ConfigError(f"lacks {', '.join(missing)}")
        for key in RECIPE_KEYS:
            if not isinstance(values.get(key, ""), str):
                raise ConfigError(f"{key} is {values[key]!r}; expected a text")
        table = dict(values.get("tune", {}))
        optional = {
            key: table.pop(key)
            for key in ("learning_rate", "front", "middle", "back")
            if key in table
        }
        settings = replace(build_table(TuneSettings, table, "tune"), **optional)
        paths: dict[str, Any] = {
            key: path.parent / values[key] for key in ("data", "out", "dev", "run") if key in values
        }
        paths["model"] = find_model(values["model"], path.parent)
        task = values["task"]
        task = open_task(str(path.parent / task) if task.endswith(".toml") else task)
        version = values.get("version", "1")
        return TunePlan(**paths, task=task, version=version, settings=settings)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def run_tune(plan: TunePlan, on_step: OnStep = lambda _: None) -> Outcome:
    """Tune as planned. All data is checked before the model is loaded.

    Without `full` an adapter is written to `out`; with it the folders `model` and, if the run began
    from an adapter, `adapter` in it. With a mask a report of the dev rows is written, no adapter.
    Raises ValueError or an EngineError child for data, settings or files that do not fit.
    """
    settings, task = plan.settings, plan.task
    check_free(plan.out)
    config = read_model_config(plan.model)
    tokenizer = open_tokenizer(plan.model, config.tokenizer)
    starts = _starts(plan, config, tokenizer)
    vectors = max((slots.num_vectors for slots in starts.values()), default=0)
    for slots in starts.values():
        check_slots(slots, config)
    if settings.mask != "full" and plan.dev is None:
        raise ConfigError("a prompt behind a mask is only scored: give rows to score it by, --dev")
    train = read_examples(plan.data, task, tokenizer, config, vectors)
    dev = read_examples(plan.dev, task, tokenizer, config, vectors) if plan.dev else []
    with open_model(plan.model, plan.dtype, plan.experts_bytes) as model:
        prompt, losses = _start(plan, starts, model, tokenizer, train)
        scorer = Scorer(model, tokenizer, prompt)
        fingerprint = model_fingerprint(model)  # before the weights change
        key = _key(plan, fingerprint)
        report = tune(scorer, TuneData(train, dev), task, settings, plan.run_folder, key, on_step)
        peak_bytes = peak_memory(model.embedding.weight.device)
        total = count_parameters(config)  # also of experts that lie in slots
        if report is not None and not settings.full and settings.mask == "full":
            prepare(model)  # the score is told as a server will find it
            report = evaluate_task(scorer, dev, task, settings.rows)
        outcome = _write(plan, scorer, report, total, fingerprint)
        return replace(outcome, peak_bytes=peak_bytes, starts=losses)


def evaluate_model(
    path: Path,
    data: Path,
    task: Task,
    adapter: Path | None = None,
    dtype: torch.dtype | None = None,
    rows: int = 16,
    *,
    is_any_base_allowed: bool = False,
) -> TaskReport:
    """How well a model directory does a task, with or without an adapter.

    It is computed as a server computes, also in bf16, where other ways round otherwise.
    """
    config = read_model_config(path)
    tokenizer = open_tokenizer(path, config.tokenizer)
    found = None if adapter is None else load_adapter(adapter, config, torch.float32)
    vectors = found.num_vectors if found else 0
    examples = read_examples(data, task, tokenizer, config, vectors)
    with open_model(path, dtype, None) as model:
        if adapter is not None and not is_any_base_allowed:
            load_adapter(adapter, config, torch.float32, fingerprint=model_fingerprint(model))
        prompt = None if found is None else prompt_of(found)
        prepare(model)
        return evaluate_task(Scorer(model, tokenizer, prompt), examples, task, rows)


def prompt_of(adapter: Adapter) -> SoftPrompt:
    """An adapter as a prompt that can be asked or trained."""
    return SoftPrompt(adapter.prompt_PD, adapter.slots)


@contextmanager
def open_model(
    path: Path, dtype: torch.dtype | None, experts_bytes: int | None
) -> Iterator[Transformer]:
    """The model of a directory, its experts in memory or in slots of so many bytes."""
    if experts_bytes is None:
        yield load_any(path, dtype)
        return
    model, experts = load_offloaded(path, dtype, experts_bytes)
    with experts:
        yield model


def _starts(plan: TunePlan, config: ModelConfig, tokenizer: Tokenizer) -> dict[str, Slots]:
    """What the prompt may start from; none for full fine-tuning that begins from no adapter."""
    settings = plan.settings
    if settings.full and settings.init in STARTS:
        return {}
    counts = (settings.front, settings.middle, settings.back)
    return find_starts(settings.init, counts, plan.task, tokenizer, config)


def _start(
    plan: TunePlan,
    starts: dict[str, Slots],
    model: Transformer,
    tokenizer: Tokenizer,
    examples: list[Example],
) -> tuple[SoftPrompt | None, dict[str, float]]:
    """The prompt to train, if any; of several the one of the least loss, with all losses."""
    prompts = {}
    for name, slots in starts.items():
        try:
            prompts[name] = start_prompt(
                name, slots, model, tokenizer, plan.task, examples, plan.settings.seed
            )
        except CheckpointError as error:  # of another model, though of the same width
            if len(starts) == 1:
                raise
            logger.warning("no start: %s", error)
            continue
        prompts[name].mask = plan.settings.mask
    if starts and not prompts:
        raise ConfigError(f"{plan.settings.init}: holds no prompt of this model")
    losses = {}
    if len(prompts) > 1:
        losses = find_losses(prompts, model, tokenizer, plan.task, examples, plan.settings.rows)
    return prompts.get(next(iter(losses or prompts), "")), losses


def _key(plan: TunePlan, fingerprint: str) -> str:
    """Tells runs apart: settings, task, data and model."""
    settings = asdict(plan.settings)
    if plan.settings.schedule == "constant":  # then more steps change none of those before
        del settings["steps"]
    told = [json.dumps(settings, sort_keys=True), repr(plan.task), fingerprint, str(plan.dtype)]
    digest = hashlib.sha256("\n".join(told).encode())
    for path in (plan.data, plan.dev):
        if path is not None:
            files = sorted(path.rglob("*")) if path.is_dir() else [path]
            for file in files:
                if file.is_file():
                    digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


def _write(
    plan: TunePlan, scorer: Scorer, report: TaskReport | None, total: int, fingerprint: str
) -> Outcome:
    """Write the adapter, and with `full` the model; `fingerprint` is that of a frozen one."""
    model, prompt, task = scorer.model, scorer.prompt, plan.task
    trained = prompt.prompt_PD.numel() if prompt is not None else 0
    folder = None
    if plan.settings.mask != "full":
        assert report is not None
        _write_report(plan.out, plan.settings.mask, report)
        return Outcome(report, trained, total, None, None)
    if plan.settings.full:
        trained += sum(p.numel() for p in model.parameters() if p.requires_grad)
        plan.out.mkdir(parents=True, exist_ok=True)
        files = find_tokenizer_files(plan.model)
        save_model(model, plan.out / "model", tokenizer_files=files.values())
    if prompt is not None:
        folder = plan.out / "adapter" if plan.settings.full else plan.out
        about: dict[str, object] = {"task": task.name, "template": task.template}
        if task.labels:
            about["labels"] = {label: list(words) for label, words in task.labels.items()}
        if report is not None:
            about["score"] = report.as_score()
        is_text = task.kind == "generate"
        facts = AdapterFacts(
            slots=prompt.slots,
            version=plan.version,
            base_fingerprint=model_fingerprint(model) if plan.settings.full else fingerprint,
            base_name=plan.model.name,
            defaults={"max_tokens": task.max_tokens, "temperature": 0.0} if is_text else {},
            about=about,
        )
        write_adapter(folder, prompt.prompt_PD, model.config, facts)
        load_adapter(folder, model.config, torch.float32)  # what cannot be read is told here
    written = plan.out / "model" if plan.settings.full else None
    return Outcome(report, trained, total, folder, written)


def _write_report(folder: Path, mask: str, report: TaskReport) -> None:
    """What came of a prompt that nobody serves."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"mask": mask} | report.as_json(), ensure_ascii=False, indent=2)
    (folder / "report.json").write_text(text + "\n", encoding="utf-8")
