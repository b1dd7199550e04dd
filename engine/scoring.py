"""How likely a model finds given continuations: many at once, each text encoded once.

The decoder is fed the whole continuation (teacher forcing), so a score costs one pass, not a step
per token. Shape letters: B rows, S source length, T target length, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.config import ModelConfig
from engine.errors import RequestError
from engine.model.transformer import Transformer
from engine.prompt import decoder_prefix
from engine.request import Request, Score
from engine.sources import Source, gather
from engine.tokenizer import Tokenizer

MAX_TOKENS = 4096  # of sources and targets with their padding, in one pass


@dataclass(frozen=True, slots=True)
class Question:
    """A text, and what may follow it or fill its one blank, as ids."""

    request: Request
    choices: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class _Row:
    question: int
    choice: int
    source: Source
    prefix: tuple[int, ...]
    target: tuple[int, ...]

    @property
    def decoder_ids(self) -> tuple[int, ...]:
        """What the decoder reads: all but the last token."""
        return (*self.prefix, *self.target[:-1])


def make_question(
    request: Request, choices: Sequence[Sequence[int]], tokenizer: Tokenizer
) -> Question:
    """Check what is asked. In a text with a blank, the sentinel that closes it is scored as well.

    Raises RequestError if there is no choice, an empty one, or more than one blank.
    """
    if request.num_blanks > 1:
        raise RequestError(
            f"the prompt has {request.num_blanks} blanks; choices are for one", "prompt"
        )
    if not choices or not all(choices):
        raise RequestError("give at least one choice, and no empty one", "choices")
    closing = (tokenizer.sentinel_id(1),) if request.num_blanks else ()
    return Question(request, tuple((*choice, *closing) for choice in choices))


@torch.inference_mode()
def score(
    model: Transformer,
    tokenizer: Tokenizer,
    questions: Sequence[Question],
    max_tokens: int = MAX_TOKENS,
) -> list[list[Score]]:
    """Score all choices of all questions, in their order.

    Rows go together as far as `max_tokens` reach, texts of like length beside one another.
    """
    rows = list(_rows(questions, tokenizer, model.config))
    rows.sort(key=_likeness)
    scores: dict[tuple[int, int], Score] = {}
    for group in _groups(rows, max_tokens):
        for row, found in zip(group, _score_rows(model, group), strict=True):
            scores[row.question, row.choice] = found
    return [
        [scores[number, choice] for choice in range(len(question.choices))]
        for number, question in enumerate(questions)
    ]


def _rows(
    questions: Sequence[Question], tokenizer: Tokenizer, config: ModelConfig
) -> Iterator[_Row]:
    for number, question in enumerate(questions):
        prefix = tuple(decoder_prefix(question.request, tokenizer, config))
        for choice, target in enumerate(question.choices):
            yield _Row(number, choice, question.request.source, prefix, target)


def _likeness(row: _Row) -> tuple[int, tuple[int, ...], str, int]:
    """A sort key that puts equal sources together, and those of like length near them."""
    ids, adapter = row.source
    reference = adapter.reference if adapter else ""
    return row.source.num_positions, ids, reference, len(row.target)


def _groups(rows: Sequence[_Row], max_tokens: int) -> Iterator[list[_Row]]:
    group: list[_Row] = []
    for row in rows:
        together = [*group, row]
        source = max(r.source.num_positions for r in together)
        width = source + max(len(r.decoder_ids) for r in together)
        if group and width * len(together) > max_tokens:
            yield group
            together = [row]
        group = together
    if group:
        yield group


def _score_rows(model: Transformer, rows: Sequence[_Row]) -> Iterator[Score]:
    texts = list(dict.fromkeys(row.source for row in rows))
    source = gather(model, texts)
    encoded_BSD = model.encode(*source)
    which = torch.tensor([texts.index(row.source) for row in rows], device=encoded_BSD.device)
    decoder_BT, decoder_segments_BT = _padded([row.decoder_ids for row in rows], model)
    states_BTD = model.decode(
        decoder_BT, decoder_segments_BT, encoded_BSD[which], source.segments_BS[which]
    )
    for row, states_TD in zip(rows, states_BTD, strict=True):
        begin = len(row.prefix) - 1
        log_probs_TV = model.logits(states_TD[begin : begin + len(row.target)]).float()
        log_probs_TV = log_probs_TV.log_softmax(-1)
        target_T = torch.tensor(row.target, device=log_probs_TV.device)
        found_T = log_probs_TV.gather(1, target_T.unsqueeze(1)).squeeze(1)
        is_greedy = bool((log_probs_TV.argmax(-1) == target_T).all())
        yield Score(tuple(found_T.tolist()), is_greedy)


def _padded(lists: Sequence[Sequence[int]], model: Transformer) -> tuple[Tensor, Tensor]:
    """Ids (B, L) of lists of different lengths, and where they are real, as segments."""
    longest = max(map(len, lists))
    pad = model.config.pad_token_id
    device = model.embedding.weight.device
    ids = torch.tensor([[*ids, *[pad] * (longest - len(ids))] for ids in lists], device=device)
    lengths = torch.tensor([[len(ids)] for ids in lists], device=device)
    return ids, (torch.arange(longest, device=device) < lengths).long()
