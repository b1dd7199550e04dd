"""Reading values of a `config.json` that transformers wrote: typed, and refused by name."""

from collections.abc import Mapping

from engine.config import Activation
from engine.config_parts import MAX_NUMBERS
from engine.errors import ConfigError

Values = Mapping[str, object]

ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}


def read_integer(values: Values, key: str, default: int | None = None) -> int:
    """A whole number; null counts as absent. Raises ConfigError if it is anything else."""
    value = values.get(key)
    if value is None:
        value = default
    if type(value) is not int:
        raise ConfigError(f"{key} is {value!r}; expected a whole number")
    return value


def read_number(values: Values, key: str, default: float | None = None) -> float:
    """A number; null counts as absent. Raises ConfigError if it is anything else."""
    value = values.get(key)
    if value is None:
        value = default
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ConfigError(f"{key} is {value!r}; expected a number")
    return value


def read_epsilon(values: Values) -> float:
    """What is added to the mean square in a norm. Raises ConfigError if it is no number."""
    return read_number(values, "layer_norm_epsilon", 1e-6)


def head_scale(width: int) -> float:
    """What queries by keys of a head are usually multiplied by.

    Raises ConfigError if the width is none, as of a damaged file.
    """
    if not 0 < width <= MAX_NUMBERS:
        raise ConfigError(f"heads are {width} wide; it must be at least 1")
    return float(width**-0.5)


def read_flag(values: Values, key: str, *, default: bool = False) -> bool:
    """True or false; null counts as absent. Raises ConfigError if it is anything else."""
    value = values.get(key)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise ConfigError(f"{key} is {value!r}; expected true or false")
    return value


def read_list(values: Values, key: str, kind: type) -> tuple[object, ...] | None:
    """A list of one kind, or None if it is absent. Raises ConfigError if it is anything else."""
    value = values.get(key)
    if value is None:
        return None
    if not isinstance(value, list) or not all(type(item) is kind for item in value):
        raise ConfigError(f"{key} is {value!r}; expected a list of {kind.__name__}")
    return tuple(value)


def read_ids(values: Values, key: str, default: tuple[int, ...] = ()) -> tuple[int, ...]:
    """Token ids, given as one or as a list. Raises ConfigError if it is anything else."""
    value = values.get(key)
    if value is None:
        return default
    items = value if isinstance(value, list) else [value]
    return tuple(read_integer({key: item}, key) for item in items)


def read_activation(values: Values, key: str = "hidden_act") -> Activation:
    """What a feed-forward does. Raises ConfigError, naming those supported, if we do not."""
    value = values.get(key)
    if not isinstance(value, str) or value not in ACTIVATIONS:
        raise ConfigError(
            f"{key} {value!r} is not supported; supported: {', '.join(sorted(ACTIVATIONS))}"
        )
    return ACTIVATIONS[value]


def require(values: Values, key: str, *allowed: object) -> None:
    """Raise ConfigError if a feature is told to be other than the ways that are supported.

    Absent counts as the first of them.
    """
    value = values.get(key, allowed[0])
    if not any(
        value == one and isinstance(value, bool) == isinstance(one, bool) for one in allowed
    ):
        told = ", ".join(map(repr, allowed))
        raise ConfigError(f"{key} is {value!r}, which is not supported; supported: {told}")
