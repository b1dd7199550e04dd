"""Command of the table: `infmoe bench-tuning`."""

import json
from pathlib import Path
from typing import Annotated

import typer


def bench_tuning(
    model: Annotated[Path, typer.Argument(help="Model directory.")],
    data: Annotated[Path, typer.Argument(help="Folder of train, dev and test.jsonl: reviews.")],
    work: Annotated[Path, typer.Argument(help="Folder of runs; those that are done are kept.")],
    texts: Annotated[Path, typer.Option(help="Plain text for pairs: a file, or a folder of .txt.")],
    out: Annotated[Path, typer.Option(help="Folder for tables and plot.")],
    seeds: Annotated[int, typer.Option(min=1, max=10, help="Runs of each main arm.")] = 3,
    quick: Annotated[
        bool, typer.Option("--quick", help="A few steps of each, to see that it runs.")
    ] = False,
) -> None:
    """Compare a tuned prompt with full fine-tuning, and prompts at other places or behind masks.

    Takes some twenty minutes of one processor core. Stopped and started again, it goes on. The last
    line is one JSON object.
    """
    import torch

    from training.bench_tuning import bench_tuning as run
    from training.bench_tuning_arms import QUICK, Budget
    from training.bench_tuning_findings import summary
    from training.bench_tuning_report import write_report

    torch.set_num_threads(1)
    budget = QUICK if quick else Budget()
    found = run(
        model,
        data,
        texts,
        work,
        range(1, seeds + 1),
        budget,
        lambda line: typer.echo(line, err=True),
    )
    write_report(found, budget, model.name, out)
    for goal in found.goals:
        typer.echo(
            f"{'met' if goal.is_met else 'missed'}: {goal.wanted}: {goal.measured}", err=True
        )
    typer.echo(str(out))
    typer.echo(json.dumps(summary(found)))
