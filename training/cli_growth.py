"""Commands of growth: `infmoe grow` and `infmoe adapter grow`."""

from pathlib import Path
from typing import Annotated, Literal

import typer

app = typer.Typer(help="Soft prompts on the disk.", no_args_is_help=True)


def grow(
    model: Annotated[Path, typer.Argument(help="Model directory: native or Hugging Face.")],
    target: Annotated[Path, typer.Argument(help="TOML file: sizes and operators of the growth.")],
    out: Annotated[Path, typer.Option(help="Directory to write; it must not exist yet.")],
    dtype: Annotated[
        Literal["fp32", "bf16", "fp16"], typer.Option(help="Format; fp32 keeps growth exact.")
    ] = "fp32",
    run: Annotated[
        Path | None, typer.Option(help="Run folder: grow its weights and optimiser.")
    ] = None,
    run_out: Annotated[
        Path | None, typer.Option(help="Run folder to write, for infmoe train to go on.")
    ] = None,
    moments: Annotated[
        Literal["carry", "scale", "reset"], typer.Option(help="The optimiser's state, with --run.")
    ] = "scale",
    text: Annotated[
        list[Path] | None, typer.Option(help="Also tell the loss before and after on this text.")
    ] = None,
) -> None:
    """Grow a model: wider, deeper, to experts, to another vocabulary; and tell what changed."""
    from engine.model.dtypes import DTYPES
    from training.compare import compare
    from training.growth_files import RunGrowth, grow_directory
    from training.growth_recipes import read_target

    if (run is None) != (run_out is None):
        raise typer.BadParameter("--run and --run-out go together", param_hint="--run")
    wanted = read_target(target)
    if text and wanted.vocabulary is not None:
        raise typer.BadParameter("losses of two vocabularies do not compare", param_hint="--text")
    states = None if run is None or run_out is None else RunGrowth(run, run_out, moments)
    receipt = grow_directory(model, wanted, out, DTYPES[dtype], states)
    typer.echo("\n".join(receipt.summary()), err=True)
    if text:
        typer.echo("\n".join(compare(out, model, text, 20_000).summary()), err=True)
    typer.echo(str(out))


@app.callback()
def adapter() -> None:
    """Soft prompts on the disk."""


@app.command("grow")
def adapter_grow(
    adapter: Annotated[Path, typer.Argument(help="Adapter directory, trained before growth.")],
    model: Annotated[Path, typer.Option(help="The grown model, as infmoe grow wrote it.")],
    out: Annotated[Path, typer.Option(help="Directory to write; it must not exist yet.")],
) -> None:
    """Carry a trained soft prompt to a model that has grown, so that answers stay the same."""
    from training.growth_adapters import grow_adapter

    grown = grow_adapter(adapter, model, out)
    typer.echo(f"{grown.num_vectors} vectors of {grown.prompt_PD.shape[1]}", err=True)
    typer.echo(str(out))
