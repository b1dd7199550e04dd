"""Commands of growth: `infmoe grow` and `infmoe adapter grow`."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from engine.model_paths import find_model

app = typer.Typer(help="Soft prompts on the disk.", no_args_is_help=True)


def grow(  # noqa: PLR0913  options of a command
    model: Annotated[
        Path,
        typer.Argument(
            help="Model directory, native or Hugging Face; GGUF file, or smollm2.",
            parser=find_model,
        ),
    ],
    out: Annotated[Path, typer.Option(help="Directory to write; it must not exist yet.")],
    target: Annotated[
        Path | None, typer.Argument(help="TOML file: sizes and operators of the growth.")
    ] = None,
    experts: Annotated[
        int | None, typer.Option(help="Without a file: so many experts, two of a token.")
    ] = None,
    dtype: Annotated[
        Literal["fp32", "bf16", "fp16"] | None,
        typer.Option(help="Default: as stored if only experts are added, else fp32."),
    ] = None,
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
    from engine.model.dtypes import parse_dtype
    from training.compare import compare
    from training.growth_files import RunGrowth, grow_directory
    from training.growth_recipes import mixture_target, read_target

    if (run is None) != (run_out is None):
        raise typer.BadParameter("--run and --run-out go together", param_hint="--run")
    if target is not None and experts is None:
        wanted = read_target(target)
    elif experts is not None and target is None:
        wanted = mixture_target(experts)
    else:
        raise typer.BadParameter("give a TOML file or --experts", param_hint="TARGET")
    if text and wanted.vocabulary is not None:
        raise typer.BadParameter("losses of two vocabularies do not compare", param_hint="--text")
    states = None if run is None or run_out is None else RunGrowth(run, run_out, moments)
    receipt = grow_directory(model, wanted, out, parse_dtype(dtype), states)
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
