"""What the config.json of a Hugging Face directory tells of rotary positions.

transformers 5 writes `rope_parameters`, its predecessor `rope_scaling` beside `rope_theta`.
"""

import math

from engine.checkpoint_hf_config import Values, read_integer, read_number, require
from engine.config_parts import Rotary, RotaryKind
from engine.errors import ConfigError

KINDS: dict[str, RotaryKind] = {
    "default": "plain",
    "linear": "linear",
    "llama3": "llama3",
    "yarn": "yarn",
    "longrope": "longrope",
    "su": "longrope",
}
COMMON = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
KEYS: dict[RotaryKind, set[str]] = {  # beside the common ones
    "plain": set(),
    "linear": {"factor"},
    "llama3": {
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    },
    "yarn": {
        "factor",
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "truncate",
        "original_max_position_embeddings",
    },
    "longrope": {
        "factor",
        "attention_factor",
        "short_factor",
        "long_factor",
        "short_mscale",
        "long_mscale",
        "original_max_position_embeddings",
    },
}


def read_rotary(values: Values, width: int, theta: float = 10000.0) -> Rotary:
    """The rotary positions of heads of that width; `theta` is the family's own.

    longrope has others for texts beyond `original_positions`; see `read_long_rotary`.

    Raises ConfigError if they are of a kind that is not supported.
    """
    scaling = _scaling(values)
    kind = KINDS[_name(scaling)]
    if unknown := sorted(scaling.keys() - COMMON - KEYS[kind]):
        raise ConfigError(f"{unknown[0]} of {_name(scaling)} rotary positions is not supported")
    require({**values, **scaling}, "partial_rotary_factor", 1.0, None)
    theta = read_number(scaling, "rope_theta", read_number(values, "rope_theta", theta))
    original = _original(values, scaling)
    if kind == "plain":
        return Rotary(theta=theta, width=width)
    if kind == "linear":
        return Rotary(theta=theta, width=width, kind=kind, factor=read_number(scaling, "factor"))
    if kind == "llama3":
        return Rotary(
            theta=theta,
            width=width,
            kind=kind,
            factor=read_number(scaling, "factor"),
            low_factor=read_number(scaling, "low_freq_factor"),
            high_factor=read_number(scaling, "high_freq_factor"),
            original_positions=original,
        )
    if kind == "longrope":
        return _read_longrope(values, scaling, theta, width)
    return Rotary(
        theta=theta,
        width=width,
        kind=kind,
        factor=_factor(values, scaling),
        beta_fast=read_number(scaling, "beta_fast", 32.0),
        beta_slow=read_number(scaling, "beta_slow", 1.0),
        truncates=scaling.get("truncate", True) is not False,
        original_positions=original,
        attention_factor=_yarn_attention_factor(values, scaling),
    )


def read_long_rotary(values: Values, rotary: Rotary) -> Rotary | None:
    """What takes the place of longrope's `rotary` in longer texts; None if there are none.

    Raises ConfigError if its factors are no numbers.
    """
    longest = read_integer(values, "max_position_embeddings")
    if rotary.kind != "longrope" or longest <= rotary.original_positions:
        return None
    return _read_longrope(values, _scaling(values), rotary.theta, rotary.width, "long")


def latent_attention_factor(values: Values) -> float:
    """What DeepSeek's attention scale is multiplied by where positions are stretched.

    Source: DeepSeek-V2 (arXiv:2405.04434), its released configs' `mscale_all_dim`.
    """
    scaling = _scaling(values)
    if KINDS[_name(scaling)] == "plain" or not scaling.get("mscale_all_dim"):
        return 1.0
    magnitude = _magnitude(_factor(values, scaling), read_number(scaling, "mscale_all_dim"))
    return magnitude * magnitude


def _scaling(values: Values) -> dict[str, object]:
    found = values.get("rope_scaling") or values.get("rope_parameters") or {}
    if not isinstance(found, dict):
        raise ConfigError(f"rope_parameters is {found!r}; expected an object")
    if _name(found) not in KINDS:
        raise ConfigError(
            f"rotary positions of type {_name(found)!r} are not supported; "
            f"supported: {', '.join(KINDS)}"
        )
    return found


def _name(scaling: Values) -> str:
    return str(scaling.get("rope_type") or scaling.get("type") or "default")


def _original(values: Values, scaling: Values) -> int:
    """Positions before stretching; what stands beside the scaling goes before what is in it."""
    key = "original_max_position_embeddings"
    inner = read_integer(scaling, key, read_integer(values, "max_position_embeddings"))
    original = read_integer(values, key, inner)
    if original < 2:
        raise ConfigError(f"{key} is {original}; it must be at least 2")
    return original


def _factor(values: Values, scaling: Values) -> float:
    longest = read_integer(values, "max_position_embeddings")
    return read_number(scaling, "factor", longest / _original(values, scaling))


def _magnitude(factor: float, share: float = 1.0) -> float:
    """How much larger dot products are made over longer texts. Source: YaRN s3.4."""
    return 1.0 if factor <= 1 else 0.1 * share * math.log(factor) + 1.0


def _yarn_attention_factor(values: Values, scaling: Values) -> float:
    if scaling.get("attention_factor") is not None:
        return read_number(scaling, "attention_factor")
    factor = _factor(values, scaling)
    over, under = scaling.get("mscale"), scaling.get("mscale_all_dim")
    if not over or not under:
        return _magnitude(factor)
    shares = (read_number(scaling, "mscale"), read_number(scaling, "mscale_all_dim"))
    return _magnitude(factor, shares[0]) / _magnitude(factor, shares[1])


def _read_longrope(
    values: Values, scaling: Values, theta: float, width: int, which: str = "short"
) -> Rotary:
    original, factor = _original(values, scaling), _factor(values, scaling)
    suggested = 1.0
    if factor > 1:
        suggested = math.sqrt(1 + math.log(factor) / math.log(original))
    divisors = scaling.get(f"{which}_factor")
    if not isinstance(divisors, list) or not all(type(n) in (int, float) for n in divisors):
        raise ConfigError(f"{which}_factor is {divisors!r}; expected a list of numbers")
    told = read_number(scaling, "attention_factor", suggested)
    return Rotary(
        theta=theta,
        width=width,
        kind="longrope",
        factor=factor,
        original_positions=original,
        attention_factor=read_number(scaling, f"{which}_mscale", told),
        divisors=tuple(map(float, divisors)),
    )
