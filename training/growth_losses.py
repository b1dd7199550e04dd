"""Losses of a model on a text right before and right after growth, by filling its blanks.

With another vocabulary the text stays in the old tokens, which both models know: once with the new
ids in the running, which take probability away, and once with them masked.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from engine.checkpoint_any import load_any
from engine.config import ModelConfig
from engine.errors import ConfigError
from engine.model.transformer import Transformer
from engine.tokenizer import open_tokenizer
from training.compare import MAX_WINDOW, fill_objective, pack, read_documents
from training.losses import label_scores
from training.span_corruption import IGNORED, Batch, Objective
from training.upcycling_files import open_model_source
from training.vocabulary_names import SENTINEL, open_vocabulary

NUM_TOKENS = 20_000


@dataclass(frozen=True, slots=True, kw_only=True)
class GrowthLosses:
    """Means over the predicted tokens, in nats; `masked` only if the vocabulary is another.

    `before` is over the tokens that both vocabularies have, so that it equals `masked` where growth
    was exact. `lost` tokens of the text have no place in the new one and were left out.
    """

    tokens: int
    before: float
    after: float
    masked: float | None = None
    lost: int = 0

    def summary(self) -> list[str]:
        """All of it, a line each."""
        text = f"loss: {self.before:.4f} -> {self.after:.4f} on {self.tokens:,} tokens filled in"
        if self.masked is None:
            return [text]
        text += f", {self.masked:.4f} with the new ids masked"
        missing = f"{self.lost:,} tokens of the text are not in the new vocabulary: left out"
        return [text, *([missing] if self.lost else [])]


def check_texts(model: Path, config: ModelConfig, texts: Sequence[Path]) -> None:
    """Raise ConfigError, before any work, if losses on texts cannot be measured."""
    if config.is_decoder_only:
        raise ConfigError(
            "losses on a text are measured by filling blanks, which this model cannot"
        )
    for path in texts:
        if not path.is_file():
            raise ConfigError(f"{path}: is no file; name a text of one document per line")
    tokenizer = open_tokenizer(model, config.tokenizer)
    read_documents(texts, tokenizer, min(config.max_positions, MAX_WINDOW), NUM_TOKENS)


@torch.inference_mode()
def measure_losses(
    source: Path, grown: Path, texts: Sequence[Path], *, is_other_vocabulary: bool
) -> GrowthLosses:
    """Fill blanks of the texts by both models, in the wider of their stored types.

    Raises ConfigError if no document is long enough, or nothing of them is in both vocabularies.
    """
    opened = [open_model_source(model) for model in (source, grown)]
    dtype = torch.promote_types(opened[0].dtype, opened[1].dtype)
    config = opened[0].config
    new_ids = torch.arange(config.vocab_size)
    if is_other_vocabulary:
        new_ids = _new_ids((source, config), (grown, opened[1].config))
    tokenizer = open_tokenizer(source, config.tokenizer)
    objective = _share_sentinels(fill_objective(config, tokenizer), new_ids)
    window = min(config.max_positions, MAX_WINDOW)
    documents = read_documents(texts, tokenizer, window, NUM_TOKENS)
    known = [document[new_ids.numpy()[document] >= 0] for document in documents]
    lost = sum(map(len, documents)) - sum(map(len, known))
    batches = list(pack(filter(len, known), objective, window))
    special = torch.tensor(sorted((*objective.sentinel_ids, objective.end_id)))
    shared = (new_ids >= 0).nonzero().flatten()
    before, tokens = _loss(load_any(source, dtype).eval(), batches, special, shared)
    model = load_any(grown, dtype).eval()
    moved = [_move(batch, new_ids) for batch in batches]
    after, _ = _loss(model, moved, new_ids[special])
    masked = None
    if is_other_vocabulary:
        masked, _ = _loss(model, moved, new_ids[special], new_ids[shared])
    return GrowthLosses(tokens=tokens, before=before, after=after, masked=masked, lost=lost)


def _new_ids(old: tuple[Path, ModelConfig], new: tuple[Path, ModelConfig]) -> Tensor:
    """The new id of each old one, by name; -1 for a token that has no place.

    The ids that the old config speaks of go to those of the new one.
    """
    (source, config), (grown, target) = old, new
    names = open_vocabulary(source, config.tokenizer).names
    known = open_vocabulary(grown, target.tokenizer).ids()
    ids = [known.get(name, -1) if name else -1 for name in names]
    found = torch.tensor(ids + [-1] * (config.vocab_size - len(ids)))
    found[config.pad_token_id] = target.pad_token_id
    found[config.decoder_start_token_id] = target.decoder_start_token_id
    found[config.eos_token_ids[0]] = target.eos_token_ids[0]
    return found


def _share_sentinels(objective: Objective, new_ids: Tensor) -> Objective:
    """The same with those sentinels alone that the new vocabulary has as well."""
    shared = tuple(i for i in objective.sentinel_ids if new_ids[i] >= 0)
    if len(shared) < 2:  # one for a blank, one for the end
        raise ConfigError(f"the vocabularies share no two sentinels, such as {SENTINEL.format(0)}")
    return Objective(
        sentinel_ids=shared,
        start_id=objective.start_id,
        end_id=objective.end_id,
        pad_id=objective.pad_id,
    )


def _move(batch: Batch, new_ids: Tensor) -> Batch:
    labels_BT = torch.where(
        batch.labels_BT == IGNORED, IGNORED, new_ids[batch.labels_BT.clamp(min=0)]
    )
    return batch._replace(
        encoder_BS=new_ids[batch.encoder_BS],
        decoder_BT=new_ids[batch.decoder_BT],
        labels_BT=labels_BT,
    )


def _loss(
    model: Transformer, batches: Iterable[Batch], special: Tensor, allowed: Tensor | None = None
) -> tuple[float, int]:
    """Mean loss of the labels that are not special, with all ids but those allowed masked."""
    total, tokens = 0.0, 0
    for batch in batches:
        logits_NV, labels_N = label_scores(model, batch, "fp32")
        if allowed is not None:
            open_NV = torch.full_like(logits_NV, -torch.inf)
            open_NV[:, allowed] = logits_NV[:, allowed]
            logits_NV = open_NV
        counted_N = ~torch.isin(labels_N, special)
        total += float(F.cross_entropy(logits_NV[counted_N], labels_N[counted_N], reduction="sum"))
        tokens += int(counted_N.sum())
    if not tokens:
        raise ConfigError("none of the texts' tokens is in the new vocabulary; give other texts")
    return total / tokens, tokens
