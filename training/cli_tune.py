"""Commands of tasks: `infmoe tune` and `infmoe eval-task`."""

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from engine.model_paths import find_model

if TYPE_CHECKING:
    from training.task_eval import TaskReport
    from training.tune_ensemble import Vote
    from training.tune_run import Outcome, TunePlan

BESIDE_RECIPE = ("model", "dtype", "experts_gib")  # how it is run, not what comes of it
DtypeName = Literal["fp32", "bf16", "fp16"]


def tune(  # noqa: PLR0913  options of a command
    context: typer.Context,
    model: Annotated[
        Path, typer.Argument(help="Model, or a TOML recipe of a run.", parser=find_model)
    ],
    data: Annotated[Path | None, typer.Argument(help="Rows to learn from: CSV, TSV, JSON.")] = None,
    task: Annotated[str | None, typer.Option(help="A ready task, or a TOML file.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the adapter.")] = None,
    dev: Annotated[Path | None, typer.Option(help="Rows to choose the best prompt by.")] = None,
    steps: Annotated[int, typer.Option(min=1)] = 3000,
    rows: Annotated[int, typer.Option(min=1, help="Rows of a step.")] = 32,
    init: Annotated[
        str,
        typer.Option(help="random, text, labels, frequent, an adapter, or a folder of several."),
    ] = "labels",
    front: Annotated[int | None, typer.Option(min=0, help="Vectors before the text.")] = None,
    middle: Annotated[int | None, typer.Option(min=0, help="Vectors at {middle}.")] = None,
    back: Annotated[int | None, typer.Option(min=0, help="Vectors behind the text.")] = None,
    optimizer: Annotated[Literal["adafactor", "adam"], typer.Option()] = "adafactor",
    learning_rate: Annotated[float | None, typer.Option(help="Default: 0.3 or 0.005.")] = None,
    schedule: Annotated[
        Literal["constant", "linear"], typer.Option(help="Of the rate; linear: down to 0.")
    ] = "constant",
    eval_every: Annotated[int, typer.Option(min=1, help="Steps between evaluations.")] = 100,
    patience: Annotated[int, typer.Option(min=0, help="Evaluations without gain; 0: all.")] = 10,
    full: Annotated[bool, typer.Option("--full", help="Train the weights as well.")] = False,
    mask: Annotated[
        Literal["full", "prompt_blind", "text_blind"],
        typer.Option(help="For an ablation: who cannot see whom. Writes a report, no adapter."),
    ] = "full",
    seed: Annotated[int, typer.Option(min=0)] = 0,
    version: Annotated[str, typer.Option(help="Version of the adapter.")] = "1",
    dtype: Annotated[DtypeName | None, typer.Option(help="Default: as stored.")] = None,
    experts_gib: Annotated[
        float | None, typer.Option(min=0, help="Keep experts on the disk, in slots of so many GiB.")
    ] = None,
    run: Annotated[Path | None, typer.Option(help="Folder of the run's state; resumes.")] = None,
    members: Annotated[
        int, typer.Option(min=1, max=99, help="Prompts of as many seeds, versions 1, 2 .. of one.")
    ] = 1,
) -> None:
    """Train a soft prompt for a task in front of a frozen model, and write it as an adapter.

    Stopped and started again with the same words it goes on. With --full and an adapter as --init:
    the prompt first, then all weights with it. Several --members choose together. From a folder of
    adapters as --init it starts from the one that does the task best as it is.
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
                schedule=schedule,
                mask=mask,
                eval_every=eval_every,
                patience=patience,
                full=full,
                seed=seed,
            ),
        )
    _tell(plan)
    try:
        outcome = _tune_members(plan, members) if members > 1 else run_tune(plan, _report)
    except FloatingPointError as error:
        raise ValueError(str(error)) from error
    for number, (name, loss) in enumerate(outcome.starts.items()):
        typer.echo(f"{'' if number else 'began from '}{name}: loss {loss:.4f} untrained", err=True)
    share = outcome.num_trained / outcome.num_parameters
    typer.echo(
        f"{outcome.num_trained:,} parameters trained, {share:.3%} of the model's; "
        f"{outcome.peak_bytes / 2**20:,.0f} MiB held at most",
        err=True,
    )
    if outcome.report is not None:
        typer.echo("\n".join(outcome.report.summary()), err=True)
    typer.echo(str(plan.out))


def _tune_members(plan: "TunePlan", count: int) -> "Outcome":
    """Tune several prompts; what they came to together, as one."""
    from training.tune_ensemble import tune_members

    outcomes, found = tune_members(plan, count, _report)
    report = found.together if found else None
    trained = sum(one.num_trained for one in outcomes)
    return replace(outcomes[-1], report=report, num_trained=trained)


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
            f"{row['best']:.4f} at {row['best_step']:,}), {row['cpu_s']:.2f} s of processor a step",
            err=True,
        )
    elif row["step"] % 100 == 0:
        typer.echo(f"step {row['step']:,}: loss {row['loss']:.4f}", err=True)


def eval_task(  # noqa: PLR0913  options of a command
    model: Annotated[
        Path,
        typer.Argument(help="Model, as for serve; with --url the rows, alone.", parser=find_model),
    ],
    data: Annotated[
        Path | None, typer.Argument(help="Rows with their answers: CSV, TSV, JSON.")
    ] = None,
    task: Annotated[str | None, typer.Option(help="A ready task, or a TOML file. Needed.")] = None,
    adapter: Annotated[
        Path | None, typer.Option(help="Folder of a soft prompt; with --url its name there.")
    ] = None,
    rows: Annotated[int, typer.Option(min=1, help="Texts at once.")] = 16,
    dtype: Annotated[DtypeName | None, typer.Option(help="Default: as stored.")] = None,
    url: Annotated[str | None, typer.Option(help="Ask a running server, http://HOST:PORT.")] = None,
    api_key_file: Annotated[
        Path | None, typer.Option(help="File that holds the key for the server.")
    ] = None,
    also: Annotated[
        list[Path] | None, typer.Option(help="A further adapter: they choose together. Repeat.")
    ] = None,
    vote: Annotated[
        Literal["mean", "majority"], typer.Option(help="How several adapters choose.")
    ] = "mean",
    answers: Annotated[Path | None, typer.Option(help="Write the answers here, by line.")] = None,
    confusion: Annotated[
        Path | None, typer.Option(help="Draw which labels are taken for which, as PNG.")
    ] = None,
    any_base: Annotated[
        bool, typer.Option("--any-base", help="Take an adapter of another model.")
    ] = False,
    note_score: Annotated[
        bool, typer.Option("--note-score", help="Write the score into the adapter's folder.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print nothing but JSON.")] = False,
) -> None:
    """Score a model on labelled rows, with an interval and a line for each label.

    With --url a running server is asked the same. The last line is one JSON object.
    """
    from engine.model.dtypes import parse_dtype
    from training.tasks import open_task

    if task is None:
        raise typer.BadParameter("name a task", param_hint="--task")
    if url is not None:
        from training.served import evaluate_served, read_key

        if data is not None or dtype is not None or any_base or note_score or also:
            raise typer.BadParameter("is for the rows alone: the server has model and adapters")
        name = None if adapter is None else str(adapter)
        key = "" if api_key_file is None else read_key(api_key_file)
        report = evaluate_served(url, model, open_task(task), name, rows, key)
    else:
        from training.adapter_tools import note_score as note
        from training.tune_run import evaluate_model

        if data is None or api_key_file is not None or (note_score and (adapter is None or also)):
            raise typer.BadParameter("give MODEL and DATA, or DATA and --url")
        if also:
            report = _ask_together(model, data, task, [adapter, *also], vote, dtype, rows, any_base)
        else:
            report = evaluate_model(
                model,
                data,
                open_task(task),
                adapter,
                parse_dtype(dtype),
                rows,
                is_any_base_allowed=any_base,
            )
        if note_score and adapter is not None:
            note(adapter, model, report.as_score())
    if confusion is not None:
        from training.task_plots import plot_confusion

        plot_confusion(report, confusion)
    if answers is not None:
        text = "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in report.answers)
        answers.write_text(text, encoding="utf-8")
    if not as_json:
        typer.echo("\n".join(report.summary()))
    typer.echo(json.dumps(report.as_json(), ensure_ascii=False))


def _ask_together(
    model: Path,
    data: Path,
    task: str,
    adapters: list[Path | None],
    vote: "Vote",
    dtype: str | None,
    rows: int,
    any_base: bool,
) -> "TaskReport":
    """Score several adapters together; each alone goes to stderr."""
    from engine.model.dtypes import parse_dtype
    from training.tasks import open_task
    from training.tune_ensemble import evaluate_ensemble

    folders = [one for one in adapters if one is not None]
    if len(folders) < len(adapters):
        raise typer.BadParameter(
            "names further adapters: give --adapter first", param_hint="--also"
        )
    found = evaluate_ensemble(
        model,
        data,
        open_task(task),
        folders,
        vote,
        parse_dtype(dtype),
        rows,
        is_any_base_allowed=any_base,
    )
    for folder, member in zip(folders, found.members, strict=True):
        typer.echo(f"{folder}: {member.metric} {member.score}", err=True)
    return found.together


def tune_pairs(
    texts: Annotated[list[Path], typer.Argument(help="Text files, one document a line.")],
    out: Annotated[Path, typer.Option(help="File of rows to write, .jsonl.")],
    count: Annotated[int, typer.Option(min=3, help="Pairs; a third of each label.")] = 30_000,
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """Make pairs of Chinese sentences, to pre-train a prompt by where labelled rows are few.

    Tune on them with --task next_sentence_zh, and from that prompt (--init) on the few rows.
    """
    from training.tune_pairs import make_pairs

    typer.echo(f"{make_pairs(texts, out, count, seed):,} pairs", err=True)
    typer.echo(str(out))
