"""Another vocabulary for a trained model: rows go by the string of a token, never by its id.

Between CPM-2's two vocabularies 26,236 strings are shared, but only 7 keep their id.

Source: CPM-2 (arXiv:2106.10715) s2.2 for the prefix rule.
"""

import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from engine.config import ModelConfig
from engine.errors import ConfigError, TokenizerError
from engine.tokenizer_sentencepiece import SPACE
from training.vocabulary_names import Vocabulary

logger = logging.getLogger(__name__)

RowStart = Literal["mean", "prefix", "random"]
State = Mapping[str, Tensor]
FEW = 0.5  # of the old strings that survive: less, and another kind of file was likely given


@dataclass(frozen=True, slots=True)
class VocabularyReport:
    """Where the rows of the new vocabulary come from, in tokens.

    `dropped` old tokens have no place in it; `unnamed` rows have no token.
    """

    matched: int
    same_id: int
    pieces: int
    prefix: int
    random: int
    unnamed: int
    dropped: int

    def summary(self) -> str:
        """All of it in a line."""
        return "vocabulary: " + ", ".join(f"{v:,} {k}" for k, v in asdict(self).items())


@dataclass(frozen=True, slots=True)
class VocabularyMap:
    """Which old rows each new row is the mean of; none: it is drawn.

    `matched` tells which new ids are an old token of the same name.
    """

    rows: tuple[tuple[int, ...], ...]
    matched: Tensor
    report: VocabularyReport

    def old_ids(self) -> tuple[Tensor, Tensor]:
        """New ids of matched tokens, and their old ids."""
        new = self.matched.nonzero().flatten()
        return new, torch.tensor([self.rows[i][0] for i in new.tolist()], dtype=torch.int64)


def map_vocabulary(
    old: Vocabulary, new: Vocabulary, target: ModelConfig, start: RowStart, seed: int
) -> VocabularyMap:
    """Match two vocabularies by string and give the other tokens a start.

    mean: the old rows of the pieces that the old tokenizer makes of the token. prefix: the old row
    of its longest prefix that is a token, else of a token at random. random: drawn like the others.
    Raises TokenizerError if the new vocabulary does not fit the target, or shares no token.
    """
    if len(new.names) > target.vocab_size:
        raise TokenizerError(
            f"the new vocabulary names {len(new.names)} tokens; vocab_size is only "
            f"{target.vocab_size}"
        )
    generator = torch.Generator().manual_seed(seed)
    old_ids = old.ids()
    kinds: Counter[str] = Counter()
    rows: list[tuple[int, ...]] = []
    matched = torch.zeros(target.vocab_size, dtype=torch.bool)
    for token_id, (name, text) in enumerate(zip(new.names, new.texts, strict=True)):
        if name and name in old_ids:
            matched[token_id] = True
            rows.append((old_ids[name],))
            kinds["matched"] += 1
            kinds["same_id"] += old_ids[name] == token_id
            continue
        kind, found = _start_row(old, old_ids, text, start, generator)
        kinds[kind] += 1
        rows.append(found)
    if not kinds["matched"]:
        raise TokenizerError("the two vocabularies share no token; is the new one the right file?")
    rows += [()] * (target.vocab_size - len(rows))
    known = {"matched", "same_id", "pieces", "prefix", "random"}
    report = VocabularyReport(
        **{kind: kinds[kind] for kind in known},
        unnamed=target.vocab_size - len(new.names),
        dropped=len(old_ids) - kinds["matched"],
    )
    if kinds["matched"] < FEW * len(old_ids):
        logger.warning("only %d of %d old tokens survive", kinds["matched"], len(old_ids))
    return VocabularyMap(tuple(rows), matched, report)


def _start_row(
    old: Vocabulary,
    old_ids: Mapping[str, int],
    text: str,
    start: RowStart,
    generator: torch.Generator,
) -> tuple[str, tuple[int, ...]]:
    """What a token that is new begins as: the kind of start, and old ids."""
    if start == "random" or not text:
        return "random", ()
    if start == "mean":
        special = old.tokenizer.control_ids
        pieces = tuple(i for i in old.tokenizer.encode(text) if i not in special)
        return ("pieces", pieces) if pieces else ("random", ())
    for end in range(len(text) - 1, 0, -1):
        for name in (text[:end], SPACE + text[:end]):
            if name in old_ids:
                return "prefix", (old_ids[name],)
    drawn = int(torch.randint(len(old.names), (1,), generator=generator))
    return "random", (drawn,)


def regrow_rows(
    state: State, mapping: VocabularyMap, generator: torch.Generator
) -> dict[str, Tensor]:
    """The state with embedding and head laid out by the new vocabulary.

    Drawn rows have mean and deviation of the old matrix, per column.
    """
    grown = dict(state)
    for name in ("embedding.weight", "lm_head.weight"):
        if name not in state:
            continue
        old = state[name].double()
        std, mean = torch.std_mean(old, dim=0)
        new = torch.empty(len(mapping.rows), old.shape[1], dtype=torch.float64)
        for token_id, rows in enumerate(mapping.rows):
            if rows:
                new[token_id] = old[list(rows)].mean(0)
            else:
                drawn = torch.randn(old.shape[1], generator=generator, dtype=torch.float64)
                new[token_id] = mean + std * drawn
        grown[name] = new.to(state[name].dtype)
    return grown


def target_ids(
    config: ModelConfig, old: Vocabulary, new: Vocabulary, given: Mapping[str, Any]
) -> ModelConfig:
    """A config with tokenizer and ids of the new vocabulary, by name where none is `given`.

    Raises ConfigError if the new vocabulary has no token of that name.
    """
    names, ids = old.special_names(config), new.ids()
    values: dict[str, Any] = {
        "tokenizer": new.kind,
        "vocab_size": len(new.names),
    }
    for field, name in names.items():
        if field in given:
            continue
        if name not in ids:
            raise ConfigError(
                f"{field}: the new vocabulary has no {name}; give {field} in [target]"
            )
        values[field] = (ids[name],) if field == "eos_token_ids" else ids[name]
    return replace(config, **(values | dict(given)))
