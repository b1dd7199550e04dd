"""Command of the proof: `infmoe bench-inheritance`."""

import json
from pathlib import Path
from typing import Annotated

import typer


def bench_inheritance(
    data: Annotated[Path, typer.Argument(help="Folder of texts, as infmoe corpus makes it.")],
    work: Annotated[Path, typer.Argument(help="Folder of runs; those that are done are kept.")],
    out: Annotated[Path, typer.Option(help="Folder for table and plot.")],
    seeds: Annotated[int, typer.Option(min=1, max=10, help="Runs of each arm.")] = 3,
    quick: Annotated[
        bool, typer.Option("--quick", help="A few steps of each, to see that it runs.")
    ] = False,
) -> None:
    """Compare large models that begin from small ones with large ones from scratch.

    Made for one processor core. Stopped and started again, it goes on. The last line is one JSON
    object.
    """
    import torch

    from training.bench_inheritance import bench_inheritance as run
    from training.bench_inheritance import summary
    from training.bench_inheritance_arms import QUICK, Budget
    from training.bench_inheritance_report import write_report
    from training.bench_inheritance_steps import Shape

    torch.set_num_threads(1)  # small products: a second thread costs more than it brings
    budget, shape = Budget(), Shape()
    if quick:
        budget, shape = QUICK, Shape(rows=2, eval_every=2, eval_rows=4)
    findings = run(
        data, work, range(1, seeds + 1), budget, shape, lambda line: typer.echo(line, err=True)
    )
    write_report(findings, budget, shape, out)
    for goal in findings.goals:
        typer.echo(
            f"{'met' if goal.is_met else 'missed'}: {goal.wanted}: {goal.measured}", err=True
        )
    typer.echo(str(out))
    typer.echo(json.dumps(summary(findings)))
