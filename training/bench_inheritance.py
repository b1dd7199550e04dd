"""The benchmark of inheritance: does a large model that begins from a small one get there cheaper?

Protocol: the large model from scratch at a tuned learning rate is the baseline; the small model
trained on for the same operations is the control; all runs see the same data in the same order.
Costs are read off curves at the losses that scratch has after shares of its own budget.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from training.bench_inheritance_arms import (
    Budget,
    grown_arms,
    scratch_arm,
    small_text_arms,
    source_arms,
    sparse_arms,
    wide_arms,
)
from training.bench_inheritance_curves import (
    Interval,
    Ratio,
    best_loss,
    compare_at,
    compare_costs,
    compare_ends,
    compare_steps,
    falling,
    interval,
)
from training.bench_inheritance_runs import Record, Workshop
from training.bench_inheritance_steps import Shape, read_texts

SHARES = (0.5, 0.75, 1.0)  # of the scratch budget, at whose losses costs are compared
GOAL_SHARE = 0.75
FREE_GOAL, CHARGED_GOAL = 0.55, 0.80
STEPS_GOAL, NATS_GOAL = 0.4, 0.15

Say = Callable[[str], None]
Runs = dict[str, list[Record]]


@dataclass(frozen=True, slots=True)
class Goal:
    """What was wanted, what came out, and whether that is enough: met means by every seed."""

    wanted: str
    measured: str
    is_met: bool


@dataclass(frozen=True, slots=True)
class Findings:
    """All that the report tells. Runs are by arm, one record per seed."""

    rates: dict[str, float]  # last loss of scratch by learning rate, first seed
    rate: float
    runs: Runs
    ratios: dict[str, dict[float, Ratio]]  # by arm and share
    over_control: Interval  # how much lower pad ends than the control
    over_dense: Interval
    over_sparse_scratch: Interval
    teaching_steps: Interval | None
    teaching_nats: Interval
    goals: list[Goal]


def bench_inheritance(
    data: Path,
    work: Path,
    seeds: Sequence[int],
    budget: Budget,
    shape: Shape,
    say: Say,
) -> Findings:
    """Make all runs that are not in the work folder yet, and read them.

    Raises ValueError if there is no text, or no seed.
    """
    workshop = open_workshop(data, work, seeds, shape, say)
    rates, rate = tune_scratch(workshop, budget, seeds[0])
    source, control = source_arms(budget, rate, shape)
    grown = grown_arms(budget, rate)
    deep, *wide = wide_arms(budget, rate)
    order = [
        scratch_arm(budget, rate),
        source,
        grown[0],
        control,
        *sparse_arms(budget, rate),
        *small_text_arms(budget, rate, control),
        *grown[1:],
        deep,
        *wide,
    ]
    runs = {arm.name: [workshop.run(arm, seed) for seed in seeds] for arm in order}
    runs["scratch"] = runs.pop(f"scratch-{rate:g}")
    ratios = {
        arm.name: {s: compare_costs(runs[arm.name], runs["scratch"], s) for s in SHARES}
        for arm in (*grown, *wide, control)
        if arm.name != "middle"
    }
    return _find(rates, rate, runs, ratios)


def open_workshop(data: Path, work: Path, seeds: Sequence[int], shape: Shape, say: Say) -> Workshop:
    """The work folder and the texts. Raises ValueError if there is no text, or no seed."""
    if not seeds:
        raise ValueError("no seed: give at least one")
    work.mkdir(parents=True, exist_ok=True)
    return Workshop(work, read_texts(data), shape, say)


def tune_scratch(workshop: Workshop, budget: Budget, seed: int) -> tuple[dict[str, float], float]:
    """The last loss of scratch by learning rate, and the best rate."""
    losses = {}
    for rate in budget.rates:
        record = workshop.run(scratch_arm(budget, rate), seed)
        losses[f"{rate:g}"] = falling(record.points)[-1].loss
    return losses, min(budget.rates, key=lambda rate: losses[f"{rate:g}"])


def _find(
    rates: dict[str, float], rate: float, runs: Runs, ratios: dict[str, dict[float, Ratio]]
) -> Findings:
    over_dense = compare_at(runs["upcycled"], runs["continued"])
    over_sparse = compare_ends(runs["upcycled"], runs["sparse-scratch"])
    steps, _ = compare_steps(runs["little-taught"], runs["little-alone"])
    nats = interval(
        [
            best_loss(alone).loss - best_loss(taught).loss
            for taught, alone in zip(runs["little-taught"], runs["little-alone"], strict=True)
        ]
    )
    goals = [
        *cost_goals(ratios["pad"][GOAL_SHARE]),
        *teaching_goals(steps, nats),
        *(
            Goal(
                f"upcycled MoE ahead of {name} at equal extra compute",
                f"{gain.text(3)} nat lower",
                min(gain.values) > 0,
            )
            for name, gain in (("dense continued", over_dense), ("MoE from scratch", over_sparse))
        ),
    ]
    return Findings(
        rates=rates,
        rate=rate,
        runs=runs,
        ratios=ratios,
        over_control=compare_ends(runs["pad"], runs["continued"]),
        over_dense=over_dense,
        over_sparse_scratch=over_sparse,
        teaching_steps=steps,
        teaching_nats=nats,
        goals=goals,
    )


def cost_goals(ratio: Ratio) -> list[Goal]:
    """The goals on compute, for growth by padding."""
    at = f"of the compute, at scratch's loss after {GOAL_SHARE:.0%} of its budget"
    goals = []
    for name, bound, found in (
        ("source free", FREE_GOAL, ratio.free),
        ("source charged", CHARGED_GOAL, ratio.charged),
    ):
        measured = "not reached by all seeds" if found is None else found.text()
        is_met = found is not None and ratio.is_fair and max(found.values) <= bound
        goals.append(Goal(f"growth, {name}: at most {bound:.2f} {at}", measured, is_met))
    return goals


def teaching_goals(steps: Interval | None, nats: Interval) -> list[Goal]:
    """The goals on distillation where text is little."""
    return [
        Goal(
            f"distillation, little text: at most {STEPS_GOAL} of the steps to the lone run's best",
            "not reached by all seeds" if steps is None else steps.text(),
            steps is not None and max(steps.values) <= STEPS_GOAL,
        ),
        Goal(
            f"distillation, little text: best loss at least {NATS_GOAL} nat lower",
            nats.text(3),
            min(nats.values) >= NATS_GOAL,
        ),
    ]


def summary(findings: Findings) -> dict[str, Any]:
    """The findings without their curves, as JSON has them."""
    return {
        "rate": findings.rate,
        "rates": findings.rates,
        "ratios": {
            name: {f"{share:g}": asdict(ratio) for share, ratio in by_share.items()}
            for name, by_share in findings.ratios.items()
        },
        "over_control": asdict(findings.over_control),
        "over_dense": asdict(findings.over_dense),
        "over_sparse_scratch": asdict(findings.over_sparse_scratch),
        "teaching_steps": asdict(findings.teaching_steps) if findings.teaching_steps else None,
        "teaching_nats": asdict(findings.teaching_nats),
        "goals": [asdict(goal) for goal in findings.goals],
    }


def write_summary(values: dict[str, Any], path: Path) -> None:
    """Write a summary as JSON, atomically."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    partial.replace(path)
