"""Knowledge inheritance: frozen teachers, how much they count at a step, when they fall silent.

Source: Qin et al. (arXiv:2105.13880).
"""

import hashlib
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from engine.adapters import model_fingerprint
from engine.checkpoint_any import load_any
from engine.config import ModelConfig
from engine.errors import ConfigError
from engine.model.transformer import Transformer
from training.distill_cache import CachedScores, open_cache, write_cache
from training.flops import forward_flops
from training.losses import TeacherScores, keep_likeliest, label_scores
from training.recipe import DistillRecipe, Recipe
from training.sampler import Sampler
from training.span_corruption import IGNORED, Batch
from training.vocabulary_names import Vocabulary, open_vocabulary


def inheritance_rate(step: int, steps: int, recipe: DistillRecipe) -> float:
    """How much the teachers count at a step, counted from 0.

    linear falls from `rate` to 0 at the last inheriting step; heaviside and constant stay at `rate`
    until then (heaviside is meant with a rate of 1, constant with 0.5).
    """
    end = recipe.inherit_share * steps
    if step >= end:
        return 0.0
    return recipe.rate * (1 - step / end) if recipe.schedule == "linear" else recipe.rate


@dataclass(frozen=True, slots=True)
class Teacher:
    """A frozen model, and the id that it has for each id of the student (None: the same ids)."""

    model: Transformer
    fingerprint: str
    ids_V: Tensor | None = None

    @torch.no_grad()
    def log_probs(self, batch: Batch, vocab_size: int) -> Tensor:
        """Log-probabilities (N, V) of the student's tokens at the positions with a label."""
        logits_NV, _ = label_scores(self.model, self._translate(batch), "fp32")
        if self.ids_V is not None:
            found = logits_NV[:, self.ids_V.clamp(min=0)]
            logits_NV = found.masked_fill(self.ids_V < 0, -torch.inf)
        shared = logits_NV[:, :vocab_size].log_softmax(-1)
        missing = vocab_size - shared.shape[1]
        padded = torch.nn.functional.pad(shared, (0, missing), value=-torch.inf)
        return padded.clamp(min=torch.finfo(torch.float32).min)  # 0 * -inf would be NaN

    def _translate(self, batch: Batch) -> Batch:
        if self.ids_V is None:
            return batch
        encoder, decoder = self.ids_V[batch.encoder_BS], self.ids_V[batch.decoder_BT]
        return batch._replace(encoder_BS=encoder, decoder_BT=decoder)


@dataclass(slots=True)
class Teaching:
    """The teachers of a run: what they say of a batch, and whether they still do."""

    recipe: DistillRecipe
    teachers: tuple[Teacher, ...]
    student: ModelConfig
    valid_loss: float | None = None  # of the teachers, if it matters
    is_over: bool = False
    cache: CachedScores | None = None

    def rate(self, step: int, steps: int) -> float:
        """How much the teachers count at a step; 0 once they have fallen silent."""
        return 0.0 if self.is_over else inheritance_rate(step, steps, self.recipe)

    def scores(self, batch: Batch, number: int) -> TeacherScores:
        """What the teachers say of a batch: from disk, or computed now."""
        if self.cache is not None:
            return self.cache.read(number)
        return self.compute(batch)

    def compute(self, batch: Batch) -> TeacherScores:
        """The mean of the teachers' probabilities, of the likeliest tokens or of all."""
        return keep_likeliest(self.mean_log_probs(batch), self.recipe.top_k)

    def mean_log_probs(self, batch: Batch) -> Tensor:
        """The logarithm (N, V) of the mean of the teachers' probabilities."""
        size = self.student.vocab_size
        logs = [teacher.log_probs(batch, size) for teacher in self.teachers]
        if len(logs) == 1:
            return logs[0]
        return torch.stack(logs).logsumexp(0) - math.log(len(logs))

    def flops(self, source_tokens: int, target_tokens: int) -> int:
        """What the teachers compute for one row."""
        return sum(
            forward_flops(teacher.model.config, source_tokens, target_tokens).total
            for teacher in self.teachers
        )

    @torch.no_grad()
    def measure(self, batches: Iterable[Batch], special_ids: Iterable[int]) -> None:
        """Find the loss of the teachers, special tokens left out, which the student is to reach."""
        special = torch.tensor(sorted(special_ids))
        total, count = 0.0, 0
        for batch in batches:
            labels_N = batch.labels_BT[batch.labels_BT != IGNORED]
            counted_N = ~torch.isin(labels_N, special)
            picked = self.mean_log_probs(batch).gather(1, labels_N.unsqueeze(1)).squeeze(1)
            total -= float(picked[counted_N].sum())
            count += int(counted_N.sum())
        self.valid_loss = total / count if count else None

    def hear(self, valid_loss: float) -> None:
        """Fall silent if the student is as good as the teachers on the validation texts."""
        if self.valid_loss is not None and valid_loss <= self.valid_loss:
            self.is_over = True


def open_teaching(recipe: Recipe) -> Teaching | None:
    """Load the teachers of a recipe, None if it has none.

    Raises ConfigError if a teacher's vocabulary lacks a token of the student's, CheckpointError if
    there is no model.
    """
    if recipe.distill is None:
        return None
    teachers = tuple(_open_teacher(recipe, name) for name in recipe.distill.teachers)
    return Teaching(recipe.distill, teachers, recipe.model)


def find_model(folder: Path) -> Path:
    """The model directory that a name stands for: a run folder's model, or the folder itself."""
    return folder / "model" if (folder / "model").is_dir() else folder


def _open_teacher(recipe: Recipe, name: str) -> Teacher:
    folder = find_model(recipe.path(name))
    model = load_any(folder, torch.float32).eval().requires_grad_(requires_grad=False)
    student = open_vocabulary(recipe.path(recipe.data.tokenizer), recipe.model.tokenizer)
    teacher = open_vocabulary(folder, model.config.tokenizer)
    ids_V = match_ids(student, teacher, recipe.model, name)
    return Teacher(model, model_fingerprint(model), ids_V)


def match_ids(
    student: Vocabulary, teacher: Vocabulary, config: ModelConfig, name: str
) -> Tensor | None:
    """The teacher's id for each id of the student, by string; None if the vocabularies are equal.

    Rows without a token have -1. Raises ConfigError if the teacher lacks a token of the student.
    """
    if student.kind == teacher.kind and student.names == teacher.names:
        return None
    known = teacher.ids()
    missing = [token for token in student.names if token and token not in known]
    if missing:
        raise ConfigError(
            f"teacher {name}: its vocabulary lacks {len(missing):,} of the student's tokens, such "
            f"as {missing[0]!r}; teach only where all strings match"
        )
    ids_V = torch.full((config.vocab_size,), -1, dtype=torch.int64)
    for token_id, token in enumerate(student.names):
        ids_V[token_id] = known.get(token, -1)
    return ids_V


def prepare_cache(teaching: Teaching, recipe: Recipe, sampler: Sampler, num_batches: int) -> None:
    """Have what the teachers say of the first batches on disk, computing it where it is not.

    Raises ValueError if the folder holds the scores of other data or other teachers.
    """
    if not teaching.recipe.cache:
        return
    folder = recipe.path(teaching.recipe.cache)
    key = cache_key(teaching, recipe, sampler)
    if not folder.exists():
        seed = recipe.train.seed
        batches = (sampler.batch(seed, number) for number in range(num_batches))
        write_cache(folder, key, (teaching.compute(batch) for batch in batches))
    teaching.cache = open_cache(folder, key, num_batches)


def cache_key(teaching: Teaching, recipe: Recipe, sampler: Sampler) -> str:
    """Fingerprint of all that what a teacher says depends on: batches, teachers, top K."""
    digest = hashlib.sha256()
    data = asdict(recipe.data) | {"shards": "", "sources": [s.weight for s in recipe.data.sources]}
    facts: Sequence[object] = (
        data,
        recipe.train.seed,
        recipe.train.rows,
        recipe.model.vocab_size,
        teaching.recipe.top_k,
        [teacher.fingerprint for teacher in teaching.teachers],
    )
    digest.update(json.dumps(facts, sort_keys=True).encode())
    for shard in sampler.shards:
        digest.update(shard.offsets.tobytes())
        digest.update(shard.tokens.tobytes())
    for teacher in teaching.teachers:
        if teacher.ids_V is not None:
            digest.update(teacher.ids_V.numpy().tobytes())
    return digest.hexdigest()
