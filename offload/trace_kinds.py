"""Routing traces made up of chance, where none was recorded: texts, token by token."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from offload.trace import LayerCall, RoutingTrace, TraceBuilder

Kind = Literal["uniform", "zipf", "bursty"]
KINDS: tuple[Kind, ...] = get_args(Kind)
ZIPF_EXPONENT = 1.0
STAY = 7 / 8  # of the tokens go to the expert of the one before: runs of 8 on average

Ids = NDArray[np.int64]
Draw = Callable[[int, int, int], Ids]  # layer, tokens in a row, rows -> experts (tokens, rows)


@dataclass(frozen=True, slots=True, kw_only=True)
class Texts:
    """Texts one after another: each an encoder sweep, then so many decode steps of a batch.

    `precision` is the share of right guesses.
    """

    layers: tuple[str, ...]
    experts_per_layer: int
    texts: int = 8
    source_tokens: int = 512
    steps: int = 64
    batch: int = 1
    precision: float = 0.9
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("experts_per_layer", "texts", "source_tokens", "steps", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if not 0 <= self.precision <= 1:
            raise ValueError(f"precision is {self.precision}; it must lie between 0 and 1")


def generate_trace(kind: Kind, texts: Texts) -> RoutingTrace:
    """Make a trace up, the same for the same seed.

    uniform: each token goes to any expert of a layer, all alike; what balanced training aims at.
    zipf: each layer has favourites, the r-th with a share in proportion to 1 / r.
    bursty: a token mostly goes where the one before it went, in a text and from step to step.
    Raises ValueError if there is no such kind.
    """
    if kind not in KINDS:
        raise ValueError(f"{kind!r} is no kind of trace; there are {', '.join(KINDS)}")
    rng = np.random.default_rng(texts.seed)
    draw = _DRAWS[kind](texts, rng)
    builder = TraceBuilder(texts.layers, texts.experts_per_layer)
    decoder = [i for i, layer in enumerate(texts.layers) if layer.startswith("decoder")]
    encoder = [i for i in range(len(texts.layers)) if i not in decoder]
    step = 0
    for _ in range(texts.texts):
        sweep = {i: draw(i, texts.source_tokens, 1) for i in encoder}
        decoding = {i: draw(i, texts.steps, texts.batch) for i in decoder}
        if encoder:
            _add_step(builder, step, sweep, texts, rng)
            step += 1
        for time in range(texts.steps if decoder else 0):
            now = {i: experts[time] for i, experts in decoding.items()}
            _add_step(builder, step, now, texts, rng)
            step += 1
    return builder.build()


def _add_step(
    builder: TraceBuilder,
    step: int,
    experts: dict[int, Ids],
    texts: Texts,
    rng: np.random.Generator,
) -> None:
    """One pass through a stack; all layers but its first come with a guess."""
    for place, (layer, ids) in enumerate(experts.items()):
        counts = np.bincount(ids.ravel(), minlength=texts.experts_per_layer)
        wanted = np.argsort(-counts, kind="stable")[: np.count_nonzero(counts)].tolist()
        tokens = counts[wanted].tolist()
        guess = _guess(wanted, texts, rng) if place else []
        builder.add(LayerCall(step, texts.layers[layer], wanted, tokens, guess))


def _guess(wanted: Sequence[int], texts: Texts, rng: np.random.Generator) -> list[int]:
    """The wanted experts, a share of them replaced by others as far as there are any."""
    is_right = rng.random(len(wanted)) < texts.precision
    if is_right.all():
        return list(wanted)
    others = np.setdiff1d(np.arange(texts.experts_per_layer), wanted)
    wrong = iter(rng.permutation(others).tolist())
    named = (e if right else next(wrong, None) for e, right in zip(wanted, is_right, strict=True))
    return [expert for expert in named if expert is not None]


def _uniform(texts: Texts, rng: np.random.Generator) -> Draw:
    def draw(_: int, length: int, rows: int) -> Ids:
        return rng.integers(texts.experts_per_layer, size=(length, rows))

    return draw


def _zipf(texts: Texts, rng: np.random.Generator) -> Draw:
    weights = np.arange(1, texts.experts_per_layer + 1) ** -ZIPF_EXPONENT
    shares = np.cumsum(weights / weights.sum())
    shares[-1] = 1.0  # whatever the rounding: every draw lies below
    ranked = [rng.permutation(texts.experts_per_layer) for _ in texts.layers]

    def draw(layer: int, length: int, rows: int) -> Ids:
        ids: Ids = ranked[layer][np.searchsorted(shares, rng.random((length, rows)), side="right")]
        return ids

    return draw


def _bursty(texts: Texts, rng: np.random.Generator) -> Draw:
    def draw(_: int, length: int, rows: int) -> Ids:
        fresh = rng.integers(texts.experts_per_layer, size=(length, rows))
        is_new = rng.random((length, rows)) >= STAY
        start = np.maximum.accumulate(np.where(is_new, np.arange(length)[:, None], 0), axis=0)
        return np.take_along_axis(fresh, start, axis=0)

    return draw


_DRAWS = {"uniform": _uniform, "zipf": _zipf, "bursty": _bursty}
