"""Commands of soft prompts: `infmoe adapter list | show | check | import | export | grow`."""

import json
from pathlib import Path
from typing import Annotated

import typer

from engine.model_paths import find_model
from training.cli_growth import app

MODEL_HELP = "Model directory, GGUF file, or smollm2, that it must fit."
Model = Annotated[Path | None, typer.Option(help=MODEL_HELP, parser=find_model)]
AnyBase = Annotated[bool, typer.Option("--any-base", help="Take one of another model.")]


@app.command("list")
def adapter_list(
    root: Annotated[Path, typer.Argument(help="Directory of adapters, as infmoe serve reads it.")],
) -> None:
    """List the adapters of a directory, a line of JSON for each."""
    from training.adapter_tools import list_adapters

    for facts in list_adapters(root):
        typer.echo(json.dumps(facts, ensure_ascii=False))


@app.command("show")
def adapter_show(
    adapter: Annotated[Path, typer.Argument(help="Folder of an adapter.")],
) -> None:
    """Tell all that an adapter's files say, as JSON."""
    from training.adapter_tools import show_adapter

    typer.echo(json.dumps(show_adapter(adapter), ensure_ascii=False, indent=2))


@app.command("check")
def adapter_check(
    adapter: Annotated[Path, typer.Argument(help="Folder of an adapter.")],
    model: Annotated[Path, typer.Option(help=MODEL_HELP, parser=find_model)],
    any_base: AnyBase = False,
) -> None:
    """Fail unless the files are whole and fit a model."""
    from training.adapter_tools import check_adapter

    found = check_adapter(adapter, model, is_any_base_allowed=any_base)
    typer.echo(f"{found.reference}: {found.num_vectors} vectors, fits", err=True)
    typer.echo(str(adapter))


@app.command("import")
def adapter_import(  # noqa: PLR0913  options of a command
    source: Annotated[
        Path, typer.Argument(help="PEFT folder, file of a tensor (.safetensors, .pt), or CPM-2.")
    ],
    model: Annotated[
        Path,
        typer.Option(help="Model directory, GGUF file, or smollm2: its own.", parser=find_model),
    ],
    out: Annotated[Path, typer.Option(help="Folder to write; it must not exist yet.")],
    front: Annotated[int | None, typer.Option(min=0)] = None,
    middle: Annotated[int, typer.Option(min=0)] = 0,
    back: Annotated[int, typer.Option(min=0)] = 0,
    middle_after: Annotated[int, typer.Option(min=0, help="Tokens before the middle.")] = 0,
    middle_mark: Annotated[str | None, typer.Option(help="Or the token before it.")] = None,
    version: Annotated[str | None, typer.Option(help="Default: a checksum.")] = None,
    any_base: AnyBase = False,
) -> None:
    """Make an adapter of vectors that were trained elsewhere; pickles are read restricted."""
    from engine.adapters import Slots
    from training.adapter_tools import find_mark, import_adapter

    slots = None
    if front is not None or middle or back:
        mark = None if middle_mark is None else find_mark(model, middle_mark)
        slots = Slots(
            front=front or 0, middle=middle, back=back, middle_after=middle_after, middle_mark=mark
        )
    found = import_adapter(source, model, out, slots, version=version, is_any_base_allowed=any_base)
    typer.echo(f"{found.num_vectors} vectors of {found.prompt_PD.shape[1]}", err=True)
    typer.echo(str(out))


@app.command("export")
def adapter_export(
    adapter: Annotated[Path, typer.Argument(help="Folder of an adapter.")],
    out: Annotated[Path, typer.Option(help="File to write, .safetensors: one tensor [P, d].")],
) -> None:
    """Write the vectors alone, as what takes embeddings of a prompt wants them."""
    from training.adapter_tools import export_adapter

    typer.echo(f"{export_adapter(adapter, out)} vectors", err=True)
    typer.echo(str(out))
