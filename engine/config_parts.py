"""Parts of a model's config that only some families have."""

import math
from dataclasses import dataclass
from typing import Literal, TypeVar, get_args, get_type_hints

from engine.errors import ConfigError

MAX_NUMBERS = 2**48  # of a matrix: no model has so many, but a damaged file may tell of more
MAX_RANK = 2**16  # as narrow as latent vectors are, which is what they are for
RotaryKind = Literal["plain", "linear", "llama3", "yarn", "longrope"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rotary:
    """Rotary positions: the first `width` numbers of a head turn in pairs (i, i + width / 2).

    Frequency i is theta ** (-2 i / width), then scaled by `kind`. `original_positions` are those
    that the model was trained on before it was stretched by `factor`. `attention_factor` multiplies
    sine and cosine. `divisors` are longrope's, one per frequency.

    Source: RoFormer (arXiv:2104.09864); position interpolation (arXiv:2306.15595); YaRN
    (arXiv:2309.00071); Llama 3 (arXiv:2407.21783); LongRoPE (arXiv:2402.13753).
    """

    theta: float = 10000.0
    width: int
    kind: RotaryKind = "plain"
    factor: float = 1.0
    low_factor: float = 1.0
    high_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncates: bool = True
    original_positions: int = 0
    attention_factor: float = 1.0
    divisors: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in get_args(RotaryKind):
            allowed = ", ".join(get_args(RotaryKind))
            raise ConfigError(f"rotary kind is {self.kind!r}; allowed: {allowed}")
        if self.width < 2 or self.width % 2:
            raise ConfigError(f"rotary width is {self.width}; it must be even and at least 2")
        if not 1 < self.theta < math.inf:  # NaN fails as well
            raise ConfigError(f"rotary: theta is {self.theta}; it must be a number above 1")
        factors = (self.factor, self.attention_factor, *self.divisors)
        if wrong := [factor for factor in factors if not 0 < factor < math.inf]:
            raise ConfigError(f"rotary: a factor is {wrong[0]}; it must be a number above 0")
        if self.kind in ("llama3", "yarn") and self.original_positions < 1:
            raise ConfigError(f"rotary kind {self.kind} needs original_positions")
        if self.kind == "longrope" and len(self.divisors) != self.width // 2:
            raise ConfigError(
                f"rotary: {len(self.divisors)} divisors for {self.width // 2} frequencies"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentAttention:
    """Multi-head latent attention: keys and values are made of a narrow vector per position.

    Queries and keys of a head have `plain_width` numbers without positions, then `Rotary.width`
    with them, which all heads' keys share; values have `value_width`. Queries come through
    `query_rank` numbers, or directly where it is 0.

    Source: DeepSeek-V2 (arXiv:2405.04434) s2.1.
    """

    rank: int
    query_rank: int = 0
    plain_width: int
    value_width: int

    def __post_init__(self) -> None:
        if min(self.rank, self.plain_width, self.value_width) < 1 or self.query_rank < 0:
            raise ConfigError("latent attention: ranks and widths must be at least 1")
        if max(self.rank, self.query_rank) > MAX_RANK:
            raise ConfigError(f"latent attention: a rank is above {MAX_RANK}; the file is damaged")


def check_matrix(rows: int, columns: int) -> None:
    """Raise ConfigError if a matrix is larger than any of a model: it could not even be named."""
    if rows * columns > MAX_NUMBERS:
        raise ConfigError(
            f"a matrix would be {rows} by {columns}, more than {MAX_NUMBERS} numbers; the file is "
            "damaged"
        )


Part = TypeVar("Part", Rotary, LatentAttention)


def read_part(key: str, part: type[Part], value: object) -> Part | None:
    """Build the part of a config that `config.json` has under `key`; None stays None.

    Raises ConfigError if a key is unknown or missing, or a value has the wrong type.
    """
    if value is None or isinstance(value, part):
        return value
    hints = get_type_hints(part)
    if not isinstance(value, dict):
        raise ConfigError(f"{key} is {value!r}; expected an object or null")
    if unknown := sorted(value.keys() - hints.keys()):
        known = ", ".join(sorted(hints))
        raise ConfigError(f"{key}: unknown keys {', '.join(unknown)}; known: {known}")
    read = {name: _read_value(f"{key}.{name}", hints[name], given) for name, given in value.items()}
    try:
        return part(**read)  # type: ignore[arg-type]  # checked above
    except TypeError as error:  # a required key is missing
        raise ConfigError(f"{key}: {str(error).split('() ')[-1]}") from error


def _read_value(name: str, expected: object, value: object) -> object:
    if expected == tuple[float, ...]:
        if not isinstance(value, list) or not all(type(item) in (int, float) for item in value):
            raise ConfigError(f"{name} is {value!r}; expected a list of numbers")
        return tuple(map(float, value))
    kinds = {int: (int,), float: (int, float), bool: (bool,)}
    if isinstance(expected, type) and expected in kinds:
        is_wrong_bool = isinstance(value, bool) and expected is not bool
        if is_wrong_bool or not isinstance(value, kinds[expected]):
            raise ConfigError(f"{name} is {value!r}; expected {expected.__name__}")
    return value
