"""Lifelong pre-training: domain after domain, growing before each, replaying what came before.

Each stage: the model of the last one grows; if there were domains before, it recovers on the memory
of them; then it trains on its domain, with a share of replay. A domain prompt, one token, stands in
front of every text of its domain, and is kept as a soft prompt.

Source: ELLE (arXiv:2203.06311). Replay draws old domains alike, where ELLE prefers those that are
learnt fastest.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from engine.checkpoint import find_tokenizer_files, save_model
from engine.checkpoint_any import load_any
from engine.errors import ConfigError
from engine.model.transformer import Transformer
from training.evaluate import unigram_log_probs
from training.loop import OnStep, TrainingData, evaluate, open_data, train
from training.prompt_export import save_prompt
from training.recipe import Recipe, build_table, parse_recipe, read_tables
from training.sampler import Sampler
from training.shards import Shard
from training.span_corruption import Example, count_noise
from training.stages import START, grow_once, read_stage, write_stage

OnStage = Callable[[str, int], OnStep | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class DomainRecipe:
    """A stage: the group of sources that it learns, its steps, and a growth file before it."""

    group: str
    steps: int = 0
    grow: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class LifelongRecipe:
    """How what came before is kept.

    `replay` is the share of earlier domains in training, `memory` the share of their text that is
    kept for it, `recover_steps` how long a grown model trains on that alone.
    """

    replay: float = 0.1
    memory: float = 0.3
    recover_steps: int = 0
    prompts: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.replay < 1:
            raise ConfigError(f"replay is {self.replay}; allowed: 0 to less than 1")
        if not 0 < self.memory <= 1:
            raise ConfigError(f"memory is {self.memory}; allowed: above 0 to 1")
        if self.recover_steps < 0:
            raise ConfigError(f"recover_steps is {self.recover_steps}; it must be 0 or more")


@dataclass(frozen=True, slots=True, kw_only=True)
class LifelongPlan:
    """A stream of domains; `recipe` has the first model and the sources of all."""

    recipe: Recipe
    settings: LifelongRecipe
    domains: tuple[DomainRecipe, ...]


def read_plan(path: Path) -> LifelongPlan:
    """Read a recipe with a table [lifelong]. Raises ConfigError that names what is wrong."""
    tables = read_tables(path)
    table = tables.pop("lifelong", None)
    recipe = parse_recipe(path, tables)
    try:
        if not isinstance(table, dict):
            raise ConfigError("there is no table [lifelong]")
        listed = table.pop("domains", [])
        if not isinstance(listed, list):
            raise ConfigError("lifelong.domains is no list; write [[lifelong.domains]]")
        domains = tuple(build_table(DomainRecipe, item, "lifelong.domains") for item in listed)
        groups = {source.group for source in recipe.data.sources}
        names = [domain.group for domain in domains]
        if set(names) != groups or len(set(names)) < max(len(names), 1) or "" in groups:
            raise ConfigError(
                f"[[lifelong.domains]] names the groups {', '.join(names) or 'of nothing'}; each "
                f"group of the sources belongs there once: {', '.join(sorted(groups))}"
            )
        settings = build_table(LifelongRecipe, table, "lifelong")
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    return LifelongPlan(recipe=recipe, settings=settings, domains=domains)


class PromptedSampler(Sampler):
    """A sampler that puts the token of a shard's domain in front of each of its texts."""

    prompts: Sequence[int] = ()

    def example(self, rng: np.random.Generator) -> Example:
        """Draw a document as a sampler of one shard does, and put its prompt in front."""
        index = int(rng.choice(len(self.shards), p=self.shares))
        example = self.fill(self.shards[index], rng)
        prompt = np.array(self.prompts[index : index + 1], np.int64)
        return Example(np.concatenate([prompt, example.encoder]), example.targets)


def prompt_ids(plan: LifelongPlan, sampler: Sampler) -> list[int]:
    """The token of each domain: sentinels from the end that no text needs; the last continues.

    Raises ConfigError if the vocabulary has too few.
    """
    if not plan.settings.prompts:
        return []
    sentinels, count = sampler.objective.sentinel_ids, len(plan.domains)
    spans = count_noise(sampler.window, sampler.objective)[1] + 1
    if spans + count + 1 > len(sentinels):
        raise ConfigError(
            f"{count} domain prompts, {spans} sentinels of spans and one to continue are more than "
            f"the {len(sentinels)} of the vocabulary; raise mean_span or set prompts = false"
        )
    return [sentinels[-2 - number] for number in range(count)]


def keep_memory(shard: Shard, share: float) -> Shard:
    """The first documents of a shard, about that share of its tokens and at least one."""
    last = int(np.searchsorted(shard.offsets, share * shard.num_tokens))
    last = min(max(last, 1), len(shard.offsets) - 1)
    return Shard(shard.tokens[: shard.offsets[last]], shard.offsets[: last + 1])


class Stream:
    """The texts of all domains, as batches for each stage."""

    def __init__(self, plan: LifelongPlan) -> None:
        self.plan = plan
        self.data = open_data(plan.recipe)
        self.prompts = prompt_ids(plan, self.data.train)
        self.groups = [source.group for source in plan.recipe.data.sources]
        self.weights = [source.weight for source in plan.recipe.data.sources]

    def training(self, number: int, *, is_recovery: bool = False) -> TrainingData:
        """Batches of the domain of that number and of the memory of those before it."""
        settings = self.plan.settings
        names = [domain.group for domain in self.plan.domains]
        replay = settings.replay if number else 0.0
        shares = dict.fromkeys(names[:number], replay / max(number, 1))
        shares |= {} if is_recovery else {names[number]: 1 - replay}
        if is_recovery:
            shares = dict.fromkeys(names[:number], 1 / number)
        chosen = [i for i, group in enumerate(self.groups) if shares.get(group, 0) > 0]
        whole = {g: sum(self.weights[i] for i in chosen if self.groups[i] == g) for g in shares}
        weights = [shares[self.groups[i]] * self.weights[i] / whole[self.groups[i]] for i in chosen]
        shards = [
            keep_memory(shard, settings.memory) if self.groups[i] in names[:number] else shard
            for i, shard in ((i, self.data.train.shards[i]) for i in chosen)
        ]
        train_on = self._sampler(self.data.train, chosen, shards, weights)
        unigram_V = unigram_log_probs(shards, weights, len(self.data.unigram_V))
        valid = self.validation(names[number - 1] if is_recovery else names[number])
        return TrainingData(train_on, valid, unigram_V, self.data.special_ids)

    def validation(self, group: str) -> Sampler:
        """Held-out batches of one domain."""
        chosen = [i for i, name in enumerate(self.groups) if name == group]
        shards = [self.data.valid.shards[i] for i in chosen]
        return self._sampler(self.data.valid, chosen, shards, [self.weights[i] for i in chosen])

    def _sampler(
        self, like: Sampler, chosen: list[int], shards: list[Shard], weights: list[float]
    ) -> Sampler:
        kind = PromptedSampler if self.prompts else Sampler
        sampler = kind(
            shards,
            weights,
            like.objective,
            rows=like.rows,
            source_length=like.source_length,
            target_length=like.target_length,
            window=like.window - bool(self.prompts),
            denoisers=like.denoisers,
        )
        if isinstance(sampler, PromptedSampler):
            order = [domain.group for domain in self.plan.domains]
            sampler.prompts = [self.prompts[order.index(self.groups[i])] for i in chosen]
        return sampler


def average_perplexity(perplexities: Sequence[float]) -> float:
    """AP: the geometric mean of the perplexities on all domains so far."""
    return math.exp(sum(map(math.log, perplexities)) / len(perplexities))


def perplexity_increase(table: Sequence[Sequence[float]]) -> float:
    """AP+: how much perplexity on earlier domains has grown since each was learnt, on average.

    Row j has the perplexities after stage j on domains 0 to j; 0 after the first.
    """
    last = table[-1]
    grown = [last[i] - table[i][i] for i in range(len(last) - 1)]
    return sum(grown) / len(grown) if grown else 0.0


def run_lifelong(plan: LifelongPlan, out: Path, on_stage: OnStage) -> list[dict[str, Any]]:
    """Run all stages, or those that are left; what each began and ended with."""
    stream = Stream(plan)
    facts: list[dict[str, Any]] = []
    source: Path | None = None
    for number, domain in enumerate(plan.domains):
        folder = out / f"{number + 1}-{domain.group}"
        done = read_stage(folder)
        if done is None:
            table = [list(stage["perplexity"].values()) for stage in facts]
            done = _run_stage(stream, number, folder, source, table, on_stage)
        facts.append(done)
        source = folder / "model"
    return facts


def _run_stage(
    stream: Stream,
    number: int,
    out: Path,
    source: Path | None,
    table: list[list[float]],
    on_stage: OnStage,
) -> dict[str, Any]:
    plan, domain = stream.plan, stream.plan.domains[number]
    recipe = plan.recipe
    facts: dict[str, Any] = {"domain": domain.group}
    out.mkdir(parents=True, exist_ok=True)
    if source is not None:
        start = source
        if domain.grow:
            start = out / START
            facts["growth"] = grow_once(source, recipe.path(domain.grow), out)
            if plan.settings.recover_steps:
                start = _recover(stream, number, out, start, on_stage)
        recipe = _begin_at(recipe, start, domain.steps or recipe.train.steps)
    elif domain.steps:
        recipe = replace(recipe, train=replace(recipe.train, steps=domain.steps))
    on_step = on_stage(domain.group, recipe.train.steps)
    model = train(recipe, out, stream.training(number), on_step)
    _write_model(model, recipe, out / "model")
    for index, token_id in enumerate(stream.prompts[: number + 1]):
        folder = out / "prompts" / plan.domains[index].group
        save_prompt(folder, model, model.embedding.weight[token_id : token_id + 1])
    found = measure_domains(model, stream, number)
    table = [*table, list(found.values())]
    facts |= {
        "perplexity": found,
        "ap": average_perplexity(list(found.values())),
        "ap_plus": perplexity_increase(table),
    }
    write_stage(out, facts)
    return facts


def measure_domains(model: Transformer, stream: Stream, number: int) -> dict[str, float]:
    """Perplexity on the held-out texts of each domain up to that of `number`."""
    data = stream.data
    found: Mapping[str, float] = {
        domain.group: evaluate(
            model, replace(data, valid=stream.validation(domain.group)), stream.plan.recipe
        ).perplexity
        for domain in stream.plan.domains[: number + 1]
    }
    return dict(found)


def _recover(stream: Stream, number: int, out: Path, start: Path, on_stage: OnStage) -> Path:
    """Train a grown model on the memory of earlier domains; where the result is."""
    steps = stream.plan.settings.recover_steps
    model_folder = out / "recovered" / "model"
    if not model_folder.exists():
        recipe = _begin_at(stream.plan.recipe, start, steps)
        on_step = on_stage(f"{stream.plan.domains[number].group}: recovery", steps)
        data = stream.training(number, is_recovery=True)
        model = train(recipe, out / "recovered", data, on_step)
        _write_model(model, recipe, model_folder)
    return model_folder


def _begin_at(recipe: Recipe, start: Path, steps: int) -> Recipe:
    """The recipe for a model directory, whatever it has grown to."""
    config = load_any(start, torch.float32).config
    settings = replace(recipe.train, start=str(start.resolve()), steps=steps)
    return replace(recipe, model=config, train=settings)


def _write_model(model: Transformer, recipe: Recipe, folder: Path) -> None:
    files = find_tokenizer_files(recipe.path(recipe.data.tokenizer))
    save_model(model, folder, tokenizer_files=files.values(), dtype=torch.float32)
