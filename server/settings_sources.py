"""Where settings come from: flags, over INFMOE_* variables, over one TOML file, over defaults."""

import difflib
import os
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path

from pydantic import SecretStr, ValidationError

from engine.errors import ConfigError
from server.settings import Settings
from server.toml import write_value

ENV_PREFIX = "INFMOE_"
CONFIG = f"{ENV_PREFIX}CONFIG"  # names the file, hence no setting itself
SECRETS = ("api_key",)
MASK = SecretStr("********")
MAX_CONFIG_BYTES = 2**20

Values = dict[str, tuple[object, str]]  # by name of the setting, each with its origin


def read_settings(**options: object) -> Settings:
    """Join all sources but a file; an option that is None was not given. Raises ConfigError."""
    return join_settings(options)[0]


def join_settings(
    options: Mapping[str, object], config: Path | None = None
) -> tuple[Settings, dict[str, str]]:
    """Join all sources; an option that is None was not given.

    Returns the settings, and the origin of each that is not at its default.
    Raises ConfigError if a name is unknown or a value not allowed, naming its origin.
    """
    if config is None and os.environ.get(CONFIG):
        config = Path(os.environ[CONFIG])
    values: Values = {}
    if config is not None:
        values |= from_file(config)
    values |= from_environment(os.environ)
    values |= from_options(options)
    origins = {name: origin for name, (_, origin) in values.items()}
    try:
        settings = Settings.model_validate({name: value for name, (value, _) in values.items()})
    except ValidationError as error:
        first = error.errors()[0]
        reason = first["msg"].removeprefix("Value error, ")
        if not first["loc"]:
            raise ConfigError(reason) from error
        name = str(first["loc"][0])
        raise ConfigError(f"setting {name} (from {origins[name]}): {reason}") from error
    return settings, origins


def from_options(options: Mapping[str, object]) -> Values:
    """Options of the command line that were given."""
    given = {name: value for name, value in options.items() if value is not None}
    require_known(given, Settings.model_fields)
    return {name: (value, f"--{name.replace('_', '-')}") for name, value in given.items()}


def from_environment(environment: Mapping[str, str]) -> Values:
    """INFMOE_* variables; of a secret, INFMOE_X_FILE names the file that holds it."""
    known = {f"{ENV_PREFIX}{name.upper()}": name for name in Settings.model_fields}
    secret_files = {f"{ENV_PREFIX}{name.upper()}_FILE": name for name in SECRETS}
    ours = [name for name in environment if name.upper().startswith(ENV_PREFIX)]
    require_known((name.upper() for name in ours), (*known, *secret_files, CONFIG))
    values: Values = {}
    for variable in sorted(ours):
        if name := known.get(variable.upper()):
            values[name] = (environment[variable], variable)
    for variable in sorted(ours):
        if name := secret_files.get(variable.upper()):
            if name in values:
                raise ConfigError(f"{values[name][1]} and {variable} are both set; leave one out")
            values[name] = (read_secret(Path(environment[variable]), variable), variable)
    return values


def read_secret(path: Path, variable: str) -> str:
    """What a file of a secret holds, less the line break at its end. Raises ConfigError."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise ConfigError(f"{variable}: {path} cannot be read: {reason}") from error
    return text.removesuffix("\n").removesuffix("\r")


def from_file(path: Path) -> Values:
    """The settings of a TOML file. Raises ConfigError that names the file."""
    try:
        with path.open("rb") as file:
            content = file.read(MAX_CONFIG_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    if len(content) > MAX_CONFIG_BYTES:
        raise ConfigError(
            f"{path}: is larger than {MAX_CONFIG_BYTES} bytes; is it a settings file?"
        )
    try:
        table = tomllib.loads(content.decode())
    except ValueError as error:  # of TOML or of UTF-8
        raise ConfigError(f"{path}: is not TOML: {error}") from error
    try:
        require_known(table, Settings.model_fields)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    return {name: (value, str(path)) for name, value in table.items()}


def require_known(names: Iterable[str], known: Iterable[str]) -> None:
    """Raise ConfigError if a name is not known, with the known one that is most like it."""
    allowed = sorted(known)
    for name in sorted(names):
        if name in allowed:
            continue
        plain = {one.upper().removeprefix(ENV_PREFIX): one for one in allowed}
        near = difflib.get_close_matches(name.upper().removeprefix(ENV_PREFIX), plain, n=1)
        hint = f" did you mean {plain[near[0]]}?" if near else ""
        raise ConfigError(
            f"unknown setting {name};{hint} `infmoe serve --print-config` lists all settings"
        )


def parse_assignments(texts: Iterable[str]) -> dict[str, str]:
    """Read NAME=VALUE each. Raises ConfigError."""
    given: dict[str, str] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(f"--set {text!r}: write --set NAME=VALUE")
        given[name.strip().replace("-", "_")] = value
    require_known(given, Settings.model_fields)
    return given


def print_settings(settings: Settings, origins: Mapping[str, str]) -> str:
    """All settings as a TOML file that `--config` takes, each with its origin; secrets masked."""
    lines = []
    for name in Settings.model_fields:
        value = getattr(settings, name)
        origin = origins.get(name, "default")
        if value is None:
            lines.append(f"# {name} is not set")
        elif isinstance(value, SecretStr):
            lines.append(f"# {name} = {write_value(MASK.get_secret_value())}  # {origin}")
        else:
            lines.append(f"{name} = {write_value(value)}  # {origin}")
    return "\n".join(lines)
