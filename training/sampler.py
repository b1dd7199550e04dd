"""Batches of training rows, each a function of seed and number, so that a run resumes exactly."""

from collections.abc import Sequence

import numpy as np

from training.objectives import Denoiser
from training.shards import Shard
from training.span_corruption import (
    Batch,
    Example,
    Objective,
    Packer,
    continue_text,
    corrupt_spans,
    count_noise,
)

MISSES_BEFORE_FULL = 48  # examples in a row that find no room before a batch counts as full


class Sampler:
    """Draws windows of documents, source by source in proportion to the weights, and packs them.

    With `denoisers` each document goes to one of them, drawn by share; without, it is filled or
    continued as the objective says.
    Raises ValueError if the targets of a whole window do not fit `target_length`.
    """

    def __init__(
        self,
        shards: list[Shard],
        weights: list[float],
        objective: Objective,
        *,
        rows: int,
        source_length: int,
        target_length: int,
        window: int,
        denoisers: Sequence[Denoiser] = (),
    ) -> None:
        needed = sum(count_noise(window, objective)) + 1  # and the closing sentinel
        if needed > target_length:
            raise ValueError(
                f"the spans of {window} tokens make {needed} targets, target_length is "
                f"{target_length}: raise it, or lower window or density"
            )
        self.shards = shards
        self.shares = np.array(weights) / sum(weights)
        self.objective = objective
        self.rows = rows
        self.source_length = source_length
        self.target_length = target_length
        self.window = window
        self.denoisers = tuple(denoisers)

    def batch(self, seed: int, number: int) -> Batch:
        """The batch of that number; the same for the same seed and number, whatever came before."""
        rng = np.random.default_rng((seed, number))
        packer = Packer(self.rows, self.source_length, self.target_length, self.objective)
        misses = 0
        while misses < MISSES_BEFORE_FULL:
            example = self.example(rng)
            fits = len(example.targets) <= self.target_length
            misses = 0 if fits and packer.add(example) else misses + 1
        return packer.batch()

    def example(self, rng: np.random.Generator) -> Example:
        """Draw one document, or a window of it, and make it an example."""
        return self.fill(self.shards[int(rng.choice(len(self.shards), p=self.shares))], rng)

    def fill(self, shard: Shard, rng: np.random.Generator) -> Example:
        """Draw a document of a shard and make it an example."""
        if self.denoisers:
            shares = np.array([denoiser.share for denoiser in self.denoisers])
            denoiser = self.denoisers[int(rng.choice(len(shares), p=shares / shares.sum()))]
            length = denoiser.longest(self.window, self.target_length)
            document, is_end = shard.window(rng, length)
            return denoiser.make(document, rng, is_end=is_end)
        if rng.random() < self.objective.continuation_share:
            # head and tail share the window; the tail has to fit the decoder
            length = min(self.window - 2, self.target_length - 2)
            document, is_end = shard.window(rng, length)
            return continue_text(document, self.objective, rng, is_end=is_end)
        document, _ = shard.window(rng, self.window)
        return corrupt_spans(document, self.objective, rng)
