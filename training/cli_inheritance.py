"""Command of the proof: `infmoe bench-inheritance`."""

import json
from pathlib import Path
from typing import Annotated, Literal

import typer


def bench_inheritance(
    data: Annotated[Path, typer.Argument(help="Folder of texts, as infmoe corpus makes it.")],
    work: Annotated[Path, typer.Argument(help="Folder of runs; those that are done are kept.")],
    out: Annotated[Path, typer.Option(help="Folder for table and plot.")],
    seeds: Annotated[int, typer.Option(min=1, max=10, help="Runs of each arm.")] = 3,
    pair: Annotated[
        Literal["small", "large"],
        typer.Option(help="Sizes: small has all arms, large 1.8 and 14 million weights and four."),
    ] = "small",
    quick: Annotated[
        bool, typer.Option("--quick", help="A few steps of each, to see that it runs.")
    ] = False,
) -> None:
    """Compare large models that begin from small ones with large ones from scratch.

    Made for one processor core. Stopped and started again, it goes on. The last line is one JSON
    object.
    """
    import torch

    from training import bench_inheritance_report as report
    from training.bench_inheritance import Goal, summary
    from training.bench_inheritance import bench_inheritance as run
    from training.bench_inheritance_arms import PAIR, QUICK, Budget
    from training.bench_inheritance_pair import bench_pair, pair_summary
    from training.bench_inheritance_steps import Shape

    torch.set_num_threads(1)  # small products: a second thread costs more than it brings
    shape = Shape(rows=2, eval_every=2, eval_rows=4) if quick else Shape()
    numbers = range(1, seeds + 1)

    def say(line: str) -> None:
        typer.echo(line, err=True)

    goals: list[Goal]
    if pair == "large":
        budget = QUICK if quick else PAIR
        found = bench_pair(data, work, numbers, budget, shape, say)
        report.write_pair_report(found, budget, shape, out)
        goals, facts = found.goals, pair_summary(found)
    else:
        budget = QUICK if quick else Budget()
        findings = run(data, work, numbers, budget, shape, say)
        report.write_report(findings, budget, shape, out)
        goals, facts = findings.goals, summary(findings)
    for goal in goals:
        say(f"{'met' if goal.is_met else 'missed'}: {goal.wanted}: {goal.measured}")
    typer.echo(str(out))
    typer.echo(json.dumps(facts))
