"""`infmoe keys`: make, list and revoke the keys of a server."""

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated

import typer
from pydantic import ValidationError

from engine.errors import ConfigError
from server.keys import SETTINGS_NAME, changing_keys, hash_key, new_key, read_keys
from server.schemas_keys import SCOPES, KeyRecord

app = typer.Typer(
    help="Make, list and revoke keys. A running server reads the file again by itself.",
    no_args_is_help=True,
)

KeysFile = Annotated[Path, typer.Argument(help="Keys file, as `infmoe serve --keys-file` takes.")]


@app.command()
def add(  # noqa: PLR0913  the options are the interface
    file: KeysFile,
    name: Annotated[str, typer.Option(help="Whose key it is; logs and usage tell this name.")],
    scope: Annotated[
        list[str] | None,
        typer.Option(help=f"What it is for: {', '.join(SCOPES)}; may repeat. Default: infer."),
    ] = None,
    requests_per_minute: Annotated[int | None, typer.Option(min=1)] = None,
    tokens_per_minute: Annotated[int | None, typer.Option(min=1)] = None,
    max_concurrent: Annotated[
        int | None, typer.Option(help="Requests under way at once.", min=1)
    ] = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option(help="It may use these alone; may repeat; '*' at the end: any rest."),
    ] = None,
    priority: Annotated[int, typer.Option(help="Higher ones go first.", min=-100, max=100)] = 0,
    days: Annotated[
        float | None, typer.Option(help="It expires after so many.", min=0.01, max=36_500)
    ] = None,
) -> None:
    """Make a key and print it, this once; the file keeps its hash."""
    now = datetime.now(UTC).replace(microsecond=0)
    key = new_key()
    try:
        record = KeyRecord.model_validate(
            {
                "name": name,
                "sha256": hash_key(key),
                "scopes": tuple(dict.fromkeys(scope or ["infer"])),
                "requests_per_minute": requests_per_minute,
                "tokens_per_minute": tokens_per_minute,
                "max_concurrent": max_concurrent,
                "adapters": None if adapter is None else tuple(adapter),
                "priority": priority,
                "expires": None if days is None else now + timedelta(days=days),
                "created": now,
            }
        )
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        raise ConfigError(f"no such key can be made: {field}: {first['msg']}") from error
    if name == SETTINGS_NAME:
        raise ConfigError(f"{name} is what INFMOE_API_KEY is called; choose another name")
    with changing_keys(file) as records:
        if any(other.name == name for other in records):
            raise ConfigError(f"{file} has a key named {name}; revoke it first")
        records.append(record)
    typer.echo(key)


@app.command("list")
def show(file: KeysFile) -> None:
    """Show names, scopes and limits, a line of JSON each; no keys: nobody has them."""
    for record in read_keys(file):
        typer.echo(record.model_dump_json(exclude_none=True, exclude={"sha256"}))


@app.command()
def revoke(
    file: KeysFile, name: Annotated[str, typer.Option(help="Of the key that is to end.")]
) -> None:
    """Take a key out of the file; within a second no server takes it any more."""
    with changing_keys(file) as records:
        kept = [record for record in records if record.name != name]
        if len(kept) == len(records):
            known = ", ".join(record.name for record in records) or "none"
            raise ConfigError(f"{file} has no key named {name}; it has {known}")
        records[:] = kept
