"""Settings of the server: defaults, over them INFMOE_* variables, over them options."""

import os
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, ValidationError, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from engine.errors import ConfigError
from engine.units import parse_bytes

ENV_PREFIX = "INFMOE_"

DtypeName = Literal["fp32", "bf16", "fp16"]
LogLevel = Literal["debug", "info", "warning", "error"]
ByteSize = Annotated[int, BeforeValidator(lambda value: parse_bytes(str(value)))]
Count = Annotated[int, Field(ge=1, le=2**31 - 1)]
Seconds = Annotated[float, Field(gt=0, le=86_400, allow_inf_nan=False)]


class Settings(BaseSettings):
    """How the server listens, what it accepts, when it gives up. Times in seconds."""

    model_config = SettingsConfigDict(env_prefix=ENV_PREFIX, extra="forbid", frozen=True)

    model: Path | None = None
    dtype: DtypeName | None = None
    memory: ByteSize | None = None
    gpu_memory: ByteSize | None = None
    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=0, le=65_535)
    record_routing: Path | None = None
    max_rows: Annotated[int, Field(ge=1, le=4096)] = 32
    max_queue: Count = 256
    max_choices: Count = 64
    max_body_bytes: Count = 4 * 2**20
    keep_alive_s: Seconds = 12.0
    drain_s: Seconds = 30.0
    log_level: LogLevel = "info"

    @model_validator(mode="after")
    def _check(self) -> "Settings":
        if "max_choices" in self.model_fields_set and self.max_choices > self.max_queue:
            raise ValueError(
                f"max_choices {self.max_choices} exceeds max_queue {self.max_queue}: "
                "such a request would be refused even by an idle server"
            )
        return self

    @property
    def choices_limit(self) -> int:
        """Choices that one request may ask for: never more than the queue holds."""
        return min(self.max_choices, self.max_queue)


def read_settings(**options: object) -> Settings:
    """Join environment and command line; an option that is None was not given.

    Raises ConfigError if a value is not allowed or an INFMOE_* variable is not a setting.
    """
    names = {name.upper() for name in os.environ if name.upper().startswith(ENV_PREFIX)}
    known = {f"{ENV_PREFIX}{name.upper()}" for name in Settings.model_fields}
    if unknown := ", ".join(sorted(names - known)):
        raise ConfigError(f"unknown settings {unknown}; known: {', '.join(sorted(known))}")
    given = {name: value for name, value in options.items() if value is not None}
    try:
        return Settings(**given)  # type: ignore[arg-type]  # pydantic checks them
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        reason = first["msg"].removeprefix("Value error, ")
        raise ConfigError(f"setting {name}: {reason}" if name else reason) from error
