"""The benchmark of prompt tuning: what a prompt reaches, costs and needs, beside all weights.

Scores are of the test rows, with the weights that did best on the dev rows.
"""

from collections.abc import Sequence
from pathlib import Path

import torch

from engine.checkpoint_any import load_any
from engine.config import ModelConfig
from engine.model.initial import num_parameters
from engine.tokenizer import Tokenizer, open_tokenizer
from training.bench_tuning_arms import Budget, few_arms, main_arms, mask_arms, place_arms
from training.bench_tuning_costs import Measure, find_cost, head, make_probes
from training.bench_tuning_findings import Findings, find
from training.bench_tuning_runs import Record, Rows, Say, Workshop
from training.growth_files import read_model_config
from training.task_examples import Example, read_examples
from training.tasks import open_task
from training.tune import TuneData
from training.tune_cost import measure_cost
from training.tune_pairs import make_pairs

TASK, PAIRS = "sentiment_zh_slots", "next_sentence_zh"
PAIR_SEED = 1


def bench_tuning(
    model: Path,
    data: Path,
    texts: Path,
    work: Path,
    seeds: Sequence[int],
    budget: Budget,
    say: Say,
    measure: Measure = measure_cost,
) -> Findings:
    """Make all runs that are not in the work folder yet, and read them.

    `data` holds train.jsonl, dev.jsonl and test.jsonl of reviews, `texts` plain text for pairs.
    Raises ValueError if there is no seed, or a file cannot be used.
    """
    if not seeds:
        raise ValueError("no seed: give at least one")
    work.mkdir(parents=True, exist_ok=True)
    config = read_model_config(model)
    tokenizer = open_tokenizer(model, config.tokenizer)
    rows = read_all(data, texts, work, tokenizer, config, budget)
    probes = make_probes(model, data, TASK, work, budget)
    costs = {name: find_cost(work, name, one, measure, say) for name, one in probes.items()}
    workshop = Workshop(model, tokenizer, rows, work, say)
    runs = make_runs(workshop, seeds, budget)
    total = num_parameters(load_any(model, torch.float32))
    known = rows["all"]
    counts = (len(known.data.train), len(known.data.dev), len(known.test))
    return find(total, counts, known.test, runs, workshop.untuned(), costs)


def make_runs(workshop: Workshop, seeds: Sequence[int], budget: Budget) -> dict[str, list[Record]]:
    """All runs by arm, the first seed of all arms first: with more seeds later, only those."""
    pairs, few = few_arms(budget)
    places = place_arms(budget)
    runs: dict[str, list[Record]] = {}
    for seed in seeds:
        for arm in main_arms(budget):
            runs.setdefault(arm.name, []).append(workshop.run(arm, seed))
        if seed == seeds[0]:
            runs["pairs"] = [workshop.run(pairs, PAIR_SEED)]
            for arm in (places[0], *mask_arms(budget), *places[1:]):
                runs[arm.name] = [workshop.run(arm, seed)]
        for arm in few:
            parent_seed = PAIR_SEED if arm.parent else None
            runs.setdefault(arm.name, []).append(workshop.run(arm, seed, parent_seed))
    return runs


def read_all(
    data: Path, texts: Path, work: Path, tokenizer: Tokenizer, config: ModelConfig, budget: Budget
) -> dict[str, Rows]:
    """The rows of all tasks, as many as the budget wants."""

    def read(path: Path, name: str, most: int | None = None) -> list[Example]:
        if most is not None:
            path = head(path, most, work / f"{path.stem}-{most}.jsonl")
        return read_examples(path, open_task(name), tokenizer, config, budget.vectors)

    train = read(data / "train.jsonl", TASK, budget.train_rows)
    dev, test = read(data / "dev.jsonl", TASK), read(data / "test.jsonl", TASK)
    files = sorted(texts.glob("*.txt")) if texts.is_dir() else [texts]
    make_pairs(files, work / "pairs.jsonl", budget.pairs, PAIR_SEED)
    pairs = read(work / "pairs.jsonl", PAIRS)
    cut = len(pairs) // 8
    return {
        "all": Rows(open_task(TASK), TuneData(train, dev), test),
        "few": Rows(open_task(TASK), TuneData(train, dev[: budget.few_rows]), test),
        "pairs": Rows(open_task(PAIRS), TuneData(pairs[cut:], pairs[:cut]), []),
    }
