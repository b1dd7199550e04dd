"""What the runs of the benchmark of prompt tuning say: scores, gaps and goals, with intervals.

An interval is a bootstrap over seeds and rows together; where two arms are compared, the same rows
are drawn for both. Of one seed it tells of the rows alone.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from training.bench_tuning_runs import Record
from training.metrics_text import DRAWS, SEED, Interval
from training.task_eval import Replies
from training.task_examples import Example
from training.tune_cost import Cost
from training.tune_ensemble import combine

POINTS_GOAL, SHARE_GOAL, MEMORY_GOAL = 0.03, 0.01, 0.6
VOTES: tuple[Literal["mean", "majority"], ...] = ("mean", "majority")

MAIN = ("untuned", "prompt", "ensemble-mean", "ensemble-majority", "full", "joint")
FEW = ("few", "few-pretrained")

Hits = NDArray[np.bool_]  # (seeds, rows): is the answer right?


@dataclass(frozen=True, slots=True)
class Goal:
    """What was wanted, what came out, and whether that is enough: of scores, by every seed."""

    wanted: str
    measured: str
    is_met: bool


@dataclass(frozen=True, slots=True)
class Findings:
    """All that the report tells, by arm.

    `gaps` are by how much full fine-tuning is above the main arms, and the prompt in front above
    the ablations.
    """

    num_parameters: int
    num_rows: tuple[int, int, int]  # to learn from, to choose by, to test
    runs: dict[str, list[Record]]
    scores: dict[str, Interval]
    gaps: dict[str, Interval]
    costs: dict[str, Cost]
    goals: list[Goal]


def find(
    num_parameters: int,
    num_rows: tuple[int, int, int],
    test: Sequence[Example],
    runs: dict[str, list[Record]],
    untuned: list[list[float]],
    costs: dict[str, Cost],
) -> Findings:
    """Read the runs: the main arms, ensembles of their prompts, the arms of few rows, ablations."""
    scored = {name: found for name, found in runs.items() if name != "pairs"}
    hits = {name: hits_of([one.scores for one in found], test) for name, found in scored.items()}
    hits["untuned"] = hits_of([untuned], test)
    members = [Replies([], record.scores) for record in runs["prompt"]]
    for vote in VOTES:
        hits[f"ensemble-{vote}"] = hits_of([combine(members, vote).scores], test)
    gaps = {name: gap(hits["full"], hits[name]) for name in MAIN if name != "full"}
    ablations = [name for name in hits if name not in (*MAIN, *FEW, "front")]
    gaps |= {name: gap(hits["front"], hits[name]) for name in ablations}
    gaps["few"] = gap(hits["few-pretrained"], hits["few"])
    return Findings(
        num_parameters=num_parameters,
        num_rows=num_rows,
        runs=runs,
        scores={name: score(found) for name, found in hits.items()},
        gaps=gaps,
        costs=costs,
        goals=find_goals(num_parameters, runs, hits, gaps["prompt"], costs),
    )


def hits_of(scores: Sequence[Sequence[Sequence[float]]], test: Sequence[Example]) -> Hits:
    """Which rows each seed got right."""
    best = [[max(range(len(row)), key=row.__getitem__) for row in of_seed] for of_seed in scores]
    right: Hits = np.equal(best, [example.answer for example in test])
    return right


def score(hits: Hits) -> Interval:
    """The share of right answers."""
    values = _draw(hits)
    low, high = np.percentile(values, [2.5, 97.5])
    return Interval(float(hits.mean()), float(low), float(high))


def gap(upper: Hits, lower: Hits) -> Interval:
    """By how much one arm is above another."""
    low, high = np.percentile(_draw(upper) - _draw(lower), [2.5, 97.5])
    return Interval(float(upper.mean() - lower.mean()), float(low), float(high))


def _draw(hits: Hits) -> NDArray[np.float64]:
    """Means of samples of seeds and rows, with repetition: the same rows for every arm."""
    num_seeds, num_rows = hits.shape
    rows, seeds = np.random.default_rng(SEED), np.random.default_rng(SEED + 1)
    means = np.empty(DRAWS)
    for i in range(DRAWS):
        chosen_rows = rows.integers(0, num_rows, num_rows)
        chosen_seeds = seeds.integers(0, num_seeds, num_seeds)
        means[i] = hits[chosen_seeds][:, chosen_rows].mean()
    return means


def find_goals(
    num_parameters: int,
    runs: dict[str, list[Record]],
    hits: dict[str, Hits],
    behind: Interval,
    costs: dict[str, Cost],
) -> list[Goal]:
    """The goals of score, parameters and memory."""
    by_seed = hits["full"].mean(1) - hits["prompt"].mean(1)
    share = runs["prompt"][0].num_trained / runs["full"][0].num_trained
    goals = [
        Goal(
            f"prompt within {100 * POINTS_GOAL:.0f} points of full fine-tuning",
            f"{points(behind)} points behind; by seed "
            + ", ".join(f"{100 * one:.1f}" for one in by_seed),
            bool(by_seed.max() <= POINTS_GOAL + 1e-9),  # 3 rows of 100 are 3 points
        ),
        Goal(
            f"under {SHARE_GOAL:.0%} of the trained parameters",
            f"{share:.3%} ({num_parameters:,} in the model)",
            share < SHARE_GOAL,
        ),
    ]
    for name, cost in costs.items():
        place, kind, optimizer = name.split()
        if kind == "prompt":
            ratio = cost.peak_bytes / costs[f"{place} full {optimizer}"].peak_bytes
            what = "" if place == "model" else ", wider random model"
            goals.append(
                Goal(
                    f"at most {MEMORY_GOAL} of its memory ({optimizer}{what})",
                    f"{ratio:.2f}",
                    ratio <= MEMORY_GOAL,
                )
            )
    return goals


def points(found: Interval) -> str:
    """A difference in hundredths, with its interval."""
    if found.low is None or found.high is None:
        return f"{100 * found.value:.1f}"
    return f"{100 * found.value:.1f} [{100 * found.low:.1f}, {100 * found.high:.1f}]"


def summary(findings: Findings) -> dict[str, Any]:
    """The findings as JSON has them, without the scores of single rows."""
    return {
        "parameters": findings.num_parameters,
        "rows": dict(zip(("train", "dev", "test"), findings.num_rows, strict=True)),
        "scores": {name: one._asdict() for name, one in findings.scores.items()},
        "gaps": {name: one._asdict() for name, one in findings.gaps.items()},
        "costs": {name: one._asdict() for name, one in findings.costs.items()},
        "runs": {
            name: [{k: v for k, v in asdict(one).items() if k != "scores"} for one in found]
            for name, found in findings.runs.items()
        },
        "goals": [asdict(goal) for goal in findings.goals],
    }
