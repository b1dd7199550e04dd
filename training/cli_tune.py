"""Commands of tasks: `infmoe tune` and `infmoe eval-task`."""

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    from training.tune_run import TunePlan

BESIDE_RECIPE = ("model", "dtype", "experts_gib")  # how it is run, not what comes of it
DtypeName = Literal["fp32", "bf16", "fp16"]


def tune(  # noqa: PLR0913  options of a command
    context: typer.Context,
    model: Annotated[Path, typer.Argument(help="Model directory, or a TOML recipe of a run.")],
    data: Annotated[Path | None, typer.Argument(help="Rows to learn from: CSV, TSV, JSON.")] = None,
    task: Annotated[str | None, typer.Option(help="A ready task, or a TOML file.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the adapter.")] = None,
    dev: Annotated[Path | None, typer.Option(help="Rows to choose the best prompt by.")] = None,
    steps: Annotated[int, typer.Option(min=1)] = 3000,
    rows: Annotated[int, typer.Option(min=1, help="Rows of a step.")] = 32,
    init: Annotated[
        str, typer.Option(help="random, text, labels, frequent, or an adapter.")
    ] = "labels",
    front: Annotated[int | None, typer.Option(min=0, help="Vectors before the text.")] = None,
    middle: Annotated[int | None, typer.Option(min=0, help="Vectors at {middle}.")] = None,
    back: Annotated[int | None, typer.Option(min=0, help="Vectors behind the text.")] = None,
    optimizer: Annotated[Literal["adafactor", "adam"], typer.Option()] = "adafactor",
    learning_rate: Annotated[float | None, typer.Option(help="Default: 0.3 or 0.005.")] = None,
    eval_every: Annotated[int, typer.Option(min=1, help="Steps between evaluations.")] = 100,
    patience: Annotated[int, typer.Option(min=0, help="Evaluations without gain; 0: all.")] = 10,
    full: Annotated[bool, typer.Option("--full", help="Train the weights as well.")] = False,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    version: Annotated[str, typer.Option(help="Version of the adapter.")] = "1",
    dtype: Annotated[DtypeName | None, typer.Option(help="Default: as stored.")] = None,
    experts_gib: Annotated[
        float | None, typer.Option(min=0, help="Keep experts on the disk, in slots of so many GiB.")
    ] = None,
    run: Annotated[Path | None, typer.Option(help="Folder of the run's state; resumes.")] = None,
) -> None:
    """Train a soft prompt for a task in front of a frozen model, and write it as an adapter.

    Stopped and started again with the same words it goes on. With --full and an adapter as --init:
    the prompt first, then all weights with it.
    """
    from engine.model.dtypes import parse_dtype
    from training.tasks import open_task
    from training.tune import TuneSettings
    from training.tune_run import TunePlan, read_tune_recipe, run_tune

    slot_bytes = None if experts_gib is None else int(experts_gib * 2**30)
    if data is None and model.suffix == ".toml":
        _refuse_options(context)
        plan = replace(read_tune_recipe(model), dtype=parse_dtype(dtype), experts_bytes=slot_bytes)
    else:
        if data is None or task is None or out is None:
            raise typer.BadParameter("give MODEL, DATA, --task and --out, or a recipe")
        plan = TunePlan(
            model=model,
            data=data,
            out=out,
            task=open_task(task),
            dev=dev,
            run=run,
            version=version,
            dtype=parse_dtype(dtype),
            experts_bytes=slot_bytes,
            settings=TuneSettings(
                steps=steps,
                rows=rows,
                init=init,
                front=front,
                middle=middle,
                back=back,
                optimizer=optimizer,
                learning_rate=learning_rate,
                eval_every=eval_every,
                patience=patience,
                full=full,
                seed=seed,
            ),
        )
    _tell(plan)
    try:
        outcome = run_tune(plan, _report)
    except FloatingPointError as error:
        raise ValueError(str(error)) from error
    share = outcome.num_trained / outcome.num_parameters
    typer.echo(f"{outcome.num_trained:,} parameters trained, {share:.3%} of the model's", err=True)
    if outcome.report is not None:
        typer.echo("\n".join(outcome.report.summary()), err=True)
    typer.echo(str(plan.out))


def _refuse_options(context: typer.Context) -> None:
    """What a recipe says, no option may say as well."""
    for name in context.params:
        source = context.get_parameter_source(name)
        if name not in BESIDE_RECIPE and source is not None and source.name == "COMMANDLINE":
            raise typer.BadParameter("is for the recipe to say", param_hint=f"--{name}")


def _tell(plan: "TunePlan") -> None:
    settings = plan.settings
    typer.echo(
        f"{plan.task.name}: up to {settings.steps:,} steps of {settings.rows} rows, "
        f"{settings.optimizer} at {settings.rate:g}; state in {plan.run_folder}",
        err=True,
    )


def _report(row: dict[str, Any]) -> None:
    if "dev" in row:
        typer.echo(
            f"step {row['step']:,}: loss {row['loss']:.4f}, dev {row['dev']:.4f} (best "
            f"{row['best']:.4f} at {row['best_step']:,})",
            err=True,
        )
    elif row["step"] % 100 == 0:
        typer.echo(f"step {row['step']:,}: loss {row['loss']:.4f}", err=True)


def eval_task(  # noqa: PLR0913  options of a command
    model: Annotated[Path, typer.Argument(help="Model directory.")],
    data: Annotated[Path, typer.Argument(help="Rows with their answers: CSV, TSV, JSON.")],
    task: Annotated[str, typer.Option(help="A ready task, or a TOML file.")],
    adapter: Annotated[Path | None, typer.Option(help="Folder of a soft prompt.")] = None,
    rows: Annotated[int, typer.Option(min=1, help="Texts at once.")] = 16,
    dtype: Annotated[DtypeName | None, typer.Option(help="Default: as stored.")] = None,
    answers: Annotated[Path | None, typer.Option(help="Write the answers here, by line.")] = None,
    any_base: Annotated[
        bool, typer.Option("--any-base", help="Take an adapter of another model.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print nothing but JSON.")] = False,
) -> None:
    """Score a model on labelled rows, with an interval and a line for each label.

    The last line is one JSON object.
    """
    from engine.model.dtypes import parse_dtype
    from training.tasks import open_task
    from training.tune_run import evaluate_model

    report = evaluate_model(
        model,
        data,
        open_task(task),
        adapter,
        parse_dtype(dtype),
        rows,
        is_any_base_allowed=any_base,
    )
    if answers is not None:
        text = "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in report.answers)
        answers.write_text(text, encoding="utf-8")
    if not as_json:
        typer.echo("\n".join(report.summary()))
    typer.echo(json.dumps(report.as_json(), ensure_ascii=False))
