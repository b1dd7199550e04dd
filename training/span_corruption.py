"""From documents to training rows: span corruption, continuation, packing.

Source: T5 (arXiv:1910.10683) s3.1.4; CPM-2 (arXiv:2106.10715) s2.1 (density 0.15, mean span 10);
continuation as CPM-2.1 was trained further (the encoder text ends in the last sentinel).
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Ids = NDArray[np.integer[Any]]

IGNORED = -100  # label of positions without loss


class Example(NamedTuple):
    """One document as encoder ids (S,) and decoder stream (T,).

    Decoder input: start + stream[:-1].
    """

    encoder: Ids
    targets: Ids


class Batch(NamedTuple):
    """Packed rows.

    Segments number the documents of a row from 1, 0 is padding; labels IGNORED = no loss.
    """

    encoder_BS: Tensor
    encoder_segments_BS: Tensor
    decoder_BT: Tensor
    decoder_segments_BT: Tensor
    labels_BT: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """How a document becomes an example. Special ids are the tokenizer's."""

    sentinel_ids: tuple[int, ...]
    start_id: int
    end_id: int
    pad_id: int
    density: float = 0.15
    mean_span: float = 10.0
    continuation_share: float = 0.0

    def __post_init__(self) -> None:
        if len(self.sentinel_ids) < 2:
            raise ValueError(f"the vocabulary has {len(self.sentinel_ids)} sentinels; 2 are needed")
        if not 0 < self.density < 1:
            raise ValueError(f"density is {self.density}; it must lie between 0 and 1")
        if not self.mean_span >= 1:
            raise ValueError(f"mean_span is {self.mean_span}; it must be at least 1 token")
        if not 0 <= self.continuation_share <= 1:
            raise ValueError(f"continuation_share is {self.continuation_share}; allowed: 0 to 1")


def span_lengths(total: int, parts: int, rng: np.random.Generator) -> Ids:
    """Split `total` at random into `parts` lengths of at least 1, all splits equally likely."""
    cuts = np.sort(rng.choice(max(total - 1, 1), parts - 1, replace=False)) + 1
    return np.diff(cuts, prepend=0, append=total)


def count_noise(length: int, objective: Objective) -> tuple[int, int]:
    """How many tokens of a document are taken out, and in how many spans."""
    noise = min(max(round(length * objective.density), 1), length)
    limit = min(len(objective.sentinel_ids) - 1, noise, length - noise + 1)
    return noise, min(max(round(noise / objective.mean_span), 1), limit)


def corrupt_spans(document: Ids, objective: Objective, rng: np.random.Generator) -> Example:
    """Replace random spans by sentinels.

    The decoder stream is sentinel, span, ..., closing sentinel.

    [a b c d e f] with spans (b c) and (e): encoder [a S0 d S1 f], stream [S0 b c S1 e S2].
    Spans never touch; unlike T5's they may lie anywhere, so text before the first and after the
    last may be empty or not. A document of one token is all span.
    """
    noise, spans = count_noise(len(document), objective)
    kept = len(document) - noise
    noise_lengths = span_lengths(noise, spans, rng)
    text_lengths = span_lengths(kept + 2, spans + 1, rng)
    text_lengths[[0, -1]] -= 1  # so that both ends may be empty
    sentinels = np.array(objective.sentinel_ids[: spans + 1])
    encoder: list[Ids] = []
    targets: list[Ids] = []
    start = 0
    for index in range(spans):
        middle = start + text_lengths[index]
        end = middle + noise_lengths[index]
        sentinel = sentinels[index : index + 1]
        encoder += [document[start:middle], sentinel]
        targets += [sentinel, document[middle:end]]
        start = end
    encoder.append(document[start:])
    targets.append(sentinels[spans:])
    return Example(np.concatenate(encoder), np.concatenate(targets))


def continue_text(
    document: Ids, objective: Objective, rng: np.random.Generator, *, is_end: bool
) -> Example:
    """Cut a document in two: encoder [head, last sentinel], stream [last sentinel, tail, end mark].

    `is_end` tells that the document really ends here; otherwise no end mark is learnt.
    """
    cut = int(rng.integers(1, max(len(document), 2)))
    sentinel = np.array(objective.sentinel_ids[-1:])
    end = np.array([objective.end_id] if is_end else [], np.int64)
    return Example(
        np.concatenate([document[:cut], sentinel]),
        np.concatenate([sentinel, document[cut:], end]),
    )


class Packer:
    """Fills rows of fixed lengths with whole examples, first fit."""

    def __init__(
        self, rows: int, source_length: int, target_length: int, objective: Objective
    ) -> None:
        shape_BS, shape_BT = (rows, source_length), (rows, target_length)
        self.objective = objective
        self.encoder = np.full(shape_BS, objective.pad_id, np.int64)
        self.encoder_segments = np.zeros(shape_BS, np.int64)
        self.decoder = np.full(shape_BT, objective.pad_id, np.int64)
        self.decoder_segments = np.zeros(shape_BT, np.int64)
        self.labels = np.full(shape_BT, IGNORED, np.int64)
        self.used_source = np.zeros(rows, np.int64)
        self.used_target = np.zeros(rows, np.int64)
        self.documents = np.zeros(rows, np.int64)

    def add(self, example: Example) -> bool:
        """Place an example in the first row that has room; False if none has."""
        source, target = len(example.encoder), len(example.targets)
        fits = (self.used_source + source <= self.encoder.shape[1]) & (
            self.used_target + target <= self.decoder.shape[1]
        )
        if not fits.any():
            return False
        row = int(fits.argmax())
        self.documents[row] += 1
        here = slice(self.used_source[row], self.used_source[row] + source)
        self.encoder[row, here] = example.encoder
        self.encoder_segments[row, here] = self.documents[row]
        there = slice(self.used_target[row], self.used_target[row] + target)
        self.decoder[row, there] = [self.objective.start_id, *example.targets[:-1]]
        self.decoder_segments[row, there] = self.documents[row]
        self.labels[row, there] = example.targets
        self.used_source[row] += source
        self.used_target[row] += target
        return True

    def batch(self) -> Batch:
        """The rows as tensors."""
        arrays = (
            self.encoder,
            self.encoder_segments,
            self.decoder,
            self.decoder_segments,
            self.labels,
        )
        return Batch(*(torch.from_numpy(array) for array in arrays))
