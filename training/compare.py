"""How far a model is from a reference, say a quantised one from its original, on the same texts.

Spans of the texts are taken out, always the same ones, and both models predict them teacher-forced.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from engine.checkpoint import find_tokenizer_files, open_native
from engine.checkpoint_any import detect_kind, load_any
from engine.checkpoint_writer import VOCABULARY_FILES
from engine.config import ModelConfig
from engine.errors import ConfigError
from engine.experts import load_offloaded
from engine.model.transformer import Transformer
from engine.tokenizer import Tokenizer, open_tokenizer
from training.shards import MIN_DOCUMENT_TOKENS, encode_documents
from training.span_corruption import (
    IGNORED,
    Batch,
    Ids,
    Objective,
    Packer,
    corrupt_spans,
    count_noise,
)

SEED = 20210624
ROWS = 4  # packed rows computed at once
MAX_WINDOW = 512  # longer documents are cut into pieces
SAME_FIELDS = ("vocab_size", "tokenizer", "pad_token_id", "decoder_start_token_id", "eos_token_ids")


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Means over the predicted tokens that are no sentinels; losses and divergence in nats.

    `logit_difference` is the mean, `max_logit_difference` the largest of all absolute differences;
    `kl_divergence` is that of the model's distribution from the reference's, and `agreement` the
    share of tokens for which both find the same one likeliest.
    """

    tokens: int
    loss: float
    reference_loss: float
    logit_difference: float
    max_logit_difference: float
    kl_divergence: float
    agreement: float

    def summary(self) -> list[str]:
        """All of it, a line each."""
        more = self.loss - self.reference_loss
        return [
            f"span filling    {self.tokens:,} tokens predicted",
            f"loss            {self.loss:.4f}, reference {self.reference_loss:.4f} ({more:+.4f})",
            f"logits          differ by {self.logit_difference:.4f} on average, "
            f"{self.max_logit_difference:.4f} at most",
            f"KL divergence   {self.kl_divergence:.6f} nats from the reference",
            f"top-1           the same for {self.agreement:.2%}",
        ]


def compare(model: Path, reference: Path, texts: Sequence[Path], num_tokens: int) -> Comparison:
    """Compare two model directories on text files of one document per line.

    About `num_tokens` tokens are read, as many of each file. Quantised experts stay packed.
    Raises ConfigError if the models have different vocabularies or there is nothing to predict
    from, CheckpointError if one of them is damaged.
    """
    with open_model(model) as measured, open_model(reference) as original:
        check_same_vocabulary((model, measured.config), (reference, original.config))
        config = original.config
        tokenizer = open_tokenizer(reference, config.tokenizer)
        objective = fill_objective(config, tokenizer)
        window = min(config.max_positions, MAX_WINDOW)
        documents = read_documents(texts, tokenizer, window, num_tokens)
        batches = pack(documents, objective, window)
        special_ids = (*objective.sentinel_ids, objective.end_id)
        return compare_models(measured, original, batches, special_ids)


@contextmanager
def open_model(directory: Path) -> Iterator[Transformer]:
    """Load a model of any kind as it is stored: quantised experts multiply packed."""
    layout = open_native(directory).expert_layout() if detect_kind(directory) == "native" else None
    if layout is None or layout.quantization == "none":
        yield load_any(directory)
        return
    config = open_native(directory).config
    all_experts = layout.blob_bytes * config.num_experts * len(config.moe_layers())
    model, experts = load_offloaded(directory, None, all_experts)
    with experts:
        yield model


def check_same_vocabulary(
    first: tuple[Path, ModelConfig], second: tuple[Path, ModelConfig]
) -> None:
    """Raise ConfigError unless ids mean the same to both models."""
    (path, config), (other_path, other) = first, second
    for name in SAME_FIELDS:
        values = getattr(config, name), getattr(other, name)
        if values[0] != values[1]:
            raise ConfigError(
                f"{path} cannot be compared with {other_path}: {name} is {values[0]!r} against "
                f"{values[1]!r}; both need the same vocabulary"
            )
    name = VOCABULARY_FILES.get(config.tokenizer, "")
    files = [find_tokenizer_files(directory).get(name) for directory in (path, other_path)]
    contents = {file.read_bytes() for file in files if file is not None}
    if len(contents) > 1:
        raise ConfigError(
            f"{path} cannot be compared with {other_path}: their {name} differ; both need the same "
            "vocabulary"
        )


def fill_objective(config: ModelConfig, tokenizer: Tokenizer) -> Objective:
    """Span corruption as CPM-2 was trained, with the ids of a model."""
    if not config.eos_token_ids:
        raise ConfigError(
            "eos_token_ids of the reference is empty; the id that ends a text is needed"
        )
    return Objective(
        sentinel_ids=tuple(tokenizer.sentinel_id(i) for i in range(tokenizer.num_sentinels)),
        start_id=config.decoder_start_token_id,
        end_id=config.eos_token_ids[0],
        pad_id=config.pad_token_id,
    )


def read_documents(
    texts: Sequence[Path], tokenizer: Tokenizer, window: int, num_tokens: int
) -> list[Ids]:
    """The first documents of each file, in pieces of at most `window` tokens.

    Raises ConfigError if no document is long enough, or a file is not UTF-8.
    """
    pieces: list[Ids] = []
    for path in texts:
        left = -(-num_tokens // len(texts))
        try:
            with path.open(encoding="utf-8") as file:
                for ids in encode_documents(file, tokenizer):
                    cut = ids[:left]
                    left -= len(cut)
                    pieces += (np.array(cut[i : i + window]) for i in range(0, len(cut), window))
                    if not left:
                        break
        except UnicodeDecodeError as error:
            raise ConfigError(f"{path}: not UTF-8 ({error.reason})") from error
    pieces = [piece for piece in pieces if len(piece) >= MIN_DOCUMENT_TOKENS]
    if not pieces:
        raise ConfigError(
            f"the texts hold no document of at least {MIN_DOCUMENT_TOKENS} tokens: "
            f"{', '.join(map(str, texts))}"
        )
    return pieces


def pack(documents: Iterable[Ids], objective: Objective, window: int) -> Iterator[Batch]:
    """Examples of the documents in their order, the same spans taken out of them each time."""
    rng = np.random.default_rng(SEED)
    sizes = (ROWS, window, sum(count_noise(window, objective)) + 1)
    packer = Packer(*sizes, objective)
    for document in documents:
        example = corrupt_spans(document, objective, rng)
        if not packer.add(example):
            yield packer.batch()
            packer = Packer(*sizes, objective)
            is_placed = packer.add(example)
            assert is_placed
    yield packer.batch()


@torch.inference_mode()
def compare_models(
    model: Transformer, reference: Transformer, batches: Iterable[Batch], special_ids: Iterable[int]
) -> Comparison:
    """Compare two models of one vocabulary. Targets among the special ids are not counted."""
    special = torch.tensor(sorted(special_ids))
    sums, largest, tokens = torch.zeros(5, dtype=torch.float64), 0.0, 0
    for batch in batches:
        counted_BT = (batch.labels_BT != IGNORED) & ~torch.isin(batch.labels_BT, special)
        labels_N = batch.labels_BT[counted_BT]
        ours_NV, theirs_NV = (_score(each, batch, counted_BT) for each in (model, reference))
        difference_NV = (ours_NV - theirs_NV).abs()
        log_probs_NV, wanted_NV = ours_NV.log_softmax(-1), theirs_NV.log_softmax(-1)
        parts = (
            F.nll_loss(log_probs_NV, labels_N, reduction="sum"),
            F.nll_loss(wanted_NV, labels_N, reduction="sum"),
            difference_NV.mean(-1).sum(),
            F.kl_div(log_probs_NV, wanted_NV, reduction="sum", log_target=True),
            (ours_NV.argmax(-1) == theirs_NV.argmax(-1)).sum(),
        )
        sums += torch.tensor([part.item() for part in parts], dtype=torch.float64)
        largest = max(largest, difference_NV.max().item())
        tokens += len(labels_N)
    loss, reference_loss, difference, divergence, agreement = (sums / tokens).tolist()
    return Comparison(
        tokens=tokens,
        loss=loss,
        reference_loss=reference_loss,
        logit_difference=difference,
        max_logit_difference=largest,
        kl_divergence=divergence,
        agreement=agreement,
    )


def _score(model: Transformer, batch: Batch, counted_BT: Tensor) -> Tensor:
    """Teacher-forced logits of the counted targets, (N, V), in fp32."""
    encoded_BSD = model.encode(batch.encoder_BS, batch.encoder_segments_BS)
    hidden_BTD = model.decode(
        batch.decoder_BT, batch.decoder_segments_BT, encoded_BSD, batch.encoder_segments_BS
    )
    return model.logits(hidden_BTD[counted_BT]).float()
