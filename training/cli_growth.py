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
        int | None,
        typer.Option(min=2, help="Without a file: so many experts, two of a token."),
    ] = None,
    d_model: Annotated[
        int | None, typer.Option(min=1, help="Without a file: width of the stream.")
    ] = None,
    d_ff: Annotated[
        int | None, typer.Option(min=1, help="Without a file: width of feed-forwards.")
    ] = None,
    heads: Annotated[int | None, typer.Option(min=1, help="Without a file: heads.")] = None,
    layers: Annotated[
        int | None, typer.Option(min=1, help="Without a file: layers of each stack.")
    ] = None,
    vocab: Annotated[
        Path | None,
        typer.Option(help="Without a file: folder of another vocabulary, matched by string."),
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
    """Grow a model: wider, deeper, to experts, to another vocabulary; and tell what changed.

    What is not named stays as it is. Without a file all growth is by operators that are exact.
    """
    from engine.model.dtypes import parse_dtype
    from training.growth_files import RunGrowth, grow_directory, read_model_config
    from training.growth_losses import check_texts, measure_losses
    from training.growth_recipes import read_target, sizes_target

    if (run is None) != (run_out is None):
        raise typer.BadParameter("--run and --run-out go together", param_hint="--run")
    sizes = {"d_model": d_model, "d_ff": d_ff, "num_heads": heads}
    given = {name: size for name, size in sizes.items() if size is not None}
    has_options = bool(given) or not (layers is None and experts is None and vocab is None)
    if (target is not None) == has_options:
        raise typer.BadParameter(
            "give a TOML file, or sizes such as --d-model, --layers, --experts, --vocab",
            param_hint="TARGET",
        )
    config = read_model_config(model)
    if text:
        check_texts(model, config, text)
    if target is not None:
        wanted = read_target(target)
    else:
        wanted = sizes_target(config, given, layers, experts, vocab)
    states = None if run is None or run_out is None else RunGrowth(run, run_out, moments)
    receipt = grow_directory(model, wanted, out, parse_dtype(dtype), states)
    typer.echo("\n".join(receipt.summary()), err=True)
    if text:
        is_other = wanted.vocabulary is not None
        losses = measure_losses(model, out, text, is_other_vocabulary=is_other)
        typer.echo("\n".join(losses.summary()), err=True)
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
