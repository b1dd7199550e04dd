"""The benchmark of inheritance on a larger pair, 1.8 and 14 million weights: does its order hold?

The arms that decide: scratch at the better of two rates, the source, padding, and the control.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from training.bench_inheritance import (
    GOAL_SHARE,
    SHARES,
    Goal,
    Runs,
    Say,
    cost_goals,
    open_workshop,
    tune_scratch,
)
from training.bench_inheritance_arms import Budget, grown_arms, scratch_arm, source_arms
from training.bench_inheritance_curves import Interval, Ratio, compare_costs, compare_ends
from training.bench_inheritance_steps import Shape


@dataclass(frozen=True, slots=True)
class PairFindings:
    """What the larger pair shows. Runs are by arm, one record per seed."""

    rates: dict[str, float]  # last loss of scratch by learning rate, first seed
    rate: float
    runs: Runs
    ratios: dict[str, dict[float, Ratio]]  # by arm and share
    over_control: Interval  # how much lower padding ends than the control
    goals: list[Goal]


def bench_pair(
    data: Path, work: Path, seeds: Sequence[int], budget: Budget, shape: Shape, say: Say
) -> PairFindings:
    """Make all runs that are not in the work folder yet, and read them.

    Raises ValueError if there is no text, or no seed.
    """
    workshop = open_workshop(data, work, seeds, shape, say)
    rates, rate = tune_scratch(workshop, budget, seeds[0])
    source, control = source_arms(budget, rate, shape)
    pad = grown_arms(budget, rate)[0]
    order = [scratch_arm(budget, rate), source, pad, control]
    runs = {arm.name: [workshop.run(arm, seed) for seed in seeds] for arm in order}
    runs["scratch"] = runs.pop(f"scratch-{rate:g}")
    ratios = {
        arm.name: {s: compare_costs(runs[arm.name], runs["scratch"], s) for s in SHARES}
        for arm in (pad, control)
    }
    over_control = compare_ends(runs["pad"], runs["continued"])
    goals = [
        *cost_goals(ratios["pad"][GOAL_SHARE]),
        Goal(
            "growth ahead of the control at equal operations",
            f"{over_control.text(3)} nat lower",
            min(over_control.values) > 0,
        ),
    ]
    return PairFindings(rates, rate, runs, ratios, over_control, goals)


def pair_summary(findings: PairFindings) -> dict[str, Any]:
    """The findings without their curves, as JSON has them."""
    return {
        "rate": findings.rate,
        "rates": findings.rates,
        "ratios": {
            name: {f"{share:g}": asdict(ratio) for share, ratio in by_share.items()}
            for name, by_share in findings.ratios.items()
        },
        "over_control": asdict(findings.over_control),
        "goals": [asdict(goal) for goal in findings.goals],
    }
