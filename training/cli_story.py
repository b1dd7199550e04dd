"""Commands of long journeys: `infmoe story` and `infmoe lifelong`."""

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer

OUT = typer.Option(help="Folder of the runs; what is there is resumed.")
THREADS = typer.Option(min=0, help="CPU threads; 0 leaves torch's choice.")


def story(
    recipes: Annotated[Path, typer.Argument(help="Folder with story.toml and its recipes.")],
    out: Annotated[Path, OUT] = Path("runs/story"),
    threads: Annotated[int, THREADS] = 0,
) -> None:
    """Grow and train a model stage by stage, as CPM-2: Chinese, bilingual, mixture of experts."""
    import torch

    from training.loop import OnStep
    from training.progress import TrainProgress
    from training.story import describe_stage, read_story, run_story

    plan = read_story(recipes)
    if threads:
        torch.set_num_threads(threads)
    with ExitStack() as stack:

        def begin(name: str, steps: int) -> OnStep:
            stack.close()  # the bar of the stage before
            typer.echo(f"stage {name}", err=True)
            report: OnStep = stack.enter_context(TrainProgress(steps)).report
            return report

        facts = run_story(plan, out, begin)
    for stage in facts:
        typer.echo("\n".join(describe_stage(stage)), err=True)
    typer.echo(json.dumps(facts))
    typer.echo(str(out / plan.stages[-1].name / "model"))


def lifelong(
    recipe: Annotated[Path, typer.Argument(help="TOML file: a recipe with a table [lifelong].")],
    out: Annotated[Path, OUT] = Path("runs/lifelong"),
    threads: Annotated[int, THREADS] = 0,
) -> None:
    """Train on a stream of domains, growing before each and replaying those before (ELLE)."""
    import torch

    from training.lifelong import read_plan, run_lifelong
    from training.loop import OnStep
    from training.progress import TrainProgress

    plan = read_plan(recipe)
    if threads:
        torch.set_num_threads(threads)
    with ExitStack() as stack:

        def begin(name: str, steps: int) -> OnStep:
            stack.close()
            typer.echo(f"domain {name}", err=True)
            report: OnStep = stack.enter_context(TrainProgress(steps)).report
            return report

        facts = run_lifelong(plan, out, begin)
    for stage in facts:
        found = ", ".join(f"{name} {value:.1f}" for name, value in stage["perplexity"].items())
        typer.echo(
            f"after {stage['domain']}: AP {stage['ap']:.1f}, AP+ {stage['ap_plus']:+.1f} ({found})",
            err=True,
        )
    typer.echo(json.dumps(facts))
