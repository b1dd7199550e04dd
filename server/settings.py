"""Settings of the server: what each means, which values it takes, what it is unless given."""

import ipaddress
import re
from pathlib import Path
from typing import Annotated, Literal, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    model_validator,
)

from engine.errors import ConfigError
from engine.units import parse_bytes

DtypeName = Literal["fp32", "bf16", "fp16"]
LogLevel = Literal["debug", "info", "warning", "error"]
LogFormat = Literal["text", "json"]
ByteSize = Annotated[int, BeforeValidator(lambda value: parse_bytes(str(value)))]
Count = Annotated[int, Field(ge=1, le=2**31 - 1)]
Seconds = Annotated[float, Field(gt=0, le=86_400, allow_inf_nan=False)]

MIN_KEY_CHARS = 16
ORIGIN = re.compile(r"https?://[a-z0-9.-]+(:[0-9]{1,5})?|https?://\[[0-9a-f:.]+\](:[0-9]{1,5})?")


def split_list(value: object) -> object:
    """Read 'a, b' as a list of two: variables of the environment know no lists."""
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(",") if part.strip())
    return value


def require_origin(text: str) -> str:
    """Refuse what browsers never send as an origin, and the star above all."""
    if not ORIGIN.fullmatch(text):
        raise ValueError(f"{text!r} is no origin; write https://host or http://host:port, no '*'")
    return text


def require_strength(key: SecretStr) -> SecretStr:
    """Refuse a key that is guessed soon or that no header can carry."""
    text = key.get_secret_value()
    if len(text) < MIN_KEY_CHARS or not text.isascii() or not text.isprintable() or " " in text:
        raise ValueError(
            f"the key must have at least {MIN_KEY_CHARS} characters of ASCII without spaces; "
            "`infmoe keys add` makes a good one"
        )
    return key


Names = Annotated[tuple[str, ...], BeforeValidator(split_list)]
Origin = Annotated[str, AfterValidator(require_origin)]
Origins = Annotated[tuple[Origin, ...], BeforeValidator(split_list)]
Key = Annotated[SecretStr, AfterValidator(require_strength)]


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class Settings(BaseModel):
    """How the server listens, what it accepts, when it gives up. Times in seconds."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: Path | None = None
    model_name: Annotated[str, Field(min_length=1, max_length=128)] | None = None
    dtype: DtypeName | None = None
    memory: ByteSize | None = None
    gpu_memory: ByteSize | None = None
    record_routing: Path | None = None

    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=0, le=65_535)
    allowed_hosts: Names = ()
    cors_origins: Origins = ()

    api_key: Key | None = None
    keys_file: Path | None = None
    allow_unauthenticated: bool = False

    adapters: Path | None = None
    adapter_memory: ByteSize = 256 * 2**20
    max_upload_bytes: ByteSize = 256 * 2**20
    adapter_poll_s: Seconds = 2.0
    adapter_any_base: bool = False

    max_rows: Annotated[int, Field(ge=1, le=4096)] = 32
    max_model_len: Annotated[int, Field(ge=2)] | None = None
    max_queue: Count = 256
    max_queue_tokens: Count | None = None
    max_choices: Count = 64
    max_body_bytes: Annotated[ByteSize, Field(ge=1, le=2**31 - 1)] = 4 * 2**20
    max_bodies_bytes: Annotated[ByteSize, Field(ge=1)] = 64 * 2**20
    max_prompt_chars: Count = 2 * 2**20
    strict_fields: bool = False
    encoder_cache: ByteSize = 0
    invariant: bool = False
    engine_process: bool | None = None

    body_timeout_s: Seconds = 30.0
    request_timeout_s: Seconds = 600.0
    keep_alive_s: Seconds = 12.0
    drain_s: Seconds = 30.0
    drain_delay_s: Annotated[float, Field(ge=0, le=3600, allow_inf_nan=False)] = 3.0
    stall_s: Seconds | None = None
    threads: Count | None = None

    log_level: LogLevel = "info"
    log_format: LogFormat = "text"
    otlp_endpoint: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse_switches_as_numbers(cls, values: dict[str, object]) -> dict[str, object]:
        for name, value in values.items():
            field = cls.model_fields.get(name)
            kinds = () if field is None else (field.annotation, *get_args(field.annotation))
            if isinstance(value, bool) and kinds and bool not in kinds:
                raise ValueError(f"setting {name}: true and false are no values for it")
        return values

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

    @property
    def has_engine_process(self) -> bool:
        """Whether the engine gets a process of its own.

        That keeps the gateway's work out of its way, and takes some 250 MiB: by itself not where
        there is a budget of memory.
        """
        return self.memory is None if self.engine_process is None else self.engine_process

    @property
    def bodies_limit(self) -> int:
        """Bytes of bodies in memory, of all requests together: never less than one may have."""
        return max(self.max_bodies_bytes, self.max_body_bytes)

    @property
    def has_keys(self) -> bool:
        """Whether callers must show a key."""
        return self.api_key is not None or self.keys_file is not None

    def require_safe(self) -> None:
        """Refuse to serve everybody by oversight. Raises ConfigError."""
        if self.has_keys or self.allow_unauthenticated or is_loopback(self.host):
            return
        raise ConfigError(
            f"{self.host} can be reached from other machines and no key is set; "
            "give --keys-file (`infmoe keys add FILE` makes it) or INFMOE_API_KEY, or say "
            "--allow-unauthenticated to serve everybody"
        )
