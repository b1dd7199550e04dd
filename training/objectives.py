"""What training asks of a text: blanks to fill, text to continue, or UL2's mixture of both.

Source: UL2 (arXiv:2205.05131) s3.1: R denoisers with short spans, X with long or many, S continues.
"""

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from training.recipe import ObjectiveName
from training.span_corruption import (
    Example,
    Ids,
    Objective,
    continue_text,
    corrupt_spans,
    count_noise,
)

Kind = Literal["R", "S", "X"]
MODE_TOKENS: dict[Kind, str] = {"R": "[NLU]", "S": "[S2S]", "X": "[NLG]"}
SUFFIX_SHARE = 0.25  # of a text that an S denoiser takes on average


@dataclass(frozen=True, slots=True)
class Denoiser:
    """One task: spans of a mean length and density (R, X), or the end of a text (S).

    `prefix` is put in front of the encoder's text. A cut of None lies anywhere in a text.
    """

    kind: Kind
    share: float
    objective: Objective
    prefix: tuple[int, ...] = ()
    suffix_share: float | None = None

    def longest(self, window: int, target_length: int) -> int:
        """The most tokens of a text, up to a window, whose targets surely fit."""
        window -= len(self.prefix)
        if self.kind == "S":
            return min(window - 2, target_length - 2)
        while window > 1 and sum(count_noise(window, self.objective)) + 1 > target_length:
            window -= 1
        return window

    def make(self, document: Ids, rng: np.random.Generator, *, is_end: bool) -> Example:
        """An example of one document or window."""
        if self.kind != "S":
            example = corrupt_spans(document, self.objective, rng)
        elif self.suffix_share is None:
            example = continue_text(document, self.objective, rng, is_end=is_end)
        else:
            example = continue_end(document, self, rng, is_end=is_end)
        encoder = np.concatenate([np.array(self.prefix, np.int64), example.encoder])
        return Example(encoder, example.targets)


def continue_end(
    document: Ids, denoiser: Denoiser, rng: np.random.Generator, *, is_end: bool
) -> Example:
    """Cut the end off, of `suffix_share` on average, and ask for it as `continue_text` does."""
    assert denoiser.suffix_share is not None
    longest = max(int(len(document) * 2 * denoiser.suffix_share), 1)
    cut = max(len(document) - int(rng.integers(1, longest + 1)), 1)
    sentinel = np.array(denoiser.objective.sentinel_ids[-1:])
    end = np.array([denoiser.objective.end_id] if is_end else [], np.int64)
    return Example(
        np.concatenate([document[:cut], sentinel]),
        np.concatenate([sentinel, document[cut:], end]),
    )


def make_denoisers(
    name: ObjectiveName, objective: Objective, modes: dict[Kind, int] | None = None
) -> tuple[Denoiser, ...]:
    """The tasks of an objective; `modes` are the ids of mode tokens, for a vocabulary with them."""
    if name == "spans":  # the sampler's own
        return ()
    if name == "prefix_lm":
        return (Denoiser("S", 1.0, objective),)
    modes = modes or {}
    settings: list[tuple[Kind, float, float]] = [
        ("R", 3, 0.15),
        ("R", 8, 0.15),
        ("X", 3, 0.5),
        ("X", 8, 0.5),
        ("X", 64, 0.15),
        ("X", 64, 0.5),
    ]
    spans = [
        Denoiser(
            kind,
            1 / 7,
            replace(objective, mean_span=mean, density=density),
            _prefix(modes, kind),
        )
        for kind, mean, density in settings
    ]
    return (*spans, Denoiser("S", 1 / 7, objective, _prefix(modes, "S"), SUFFIX_SHARE))


def _prefix(modes: dict[Kind, int], kind: Kind) -> tuple[int, ...]:
    return (modes[kind],) if kind in modes else ()
