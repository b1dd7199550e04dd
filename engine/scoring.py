"""How likely a model finds given continuations: many at once, each text encoded once.

The decoder is fed the whole continuation (teacher forcing), so a score costs one pass, not a step
per token. Shape letters: B rows, S source length, T target length, V vocabulary.
"""

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.config import ModelConfig
from engine.errors import EngineError, RequestError
from engine.failures import is_out_of_memory
from engine.model.transformer import Transformer
from engine.prompt import decoder_prefix
from engine.request import Continuations, Request, Score, TokenLogprob
from engine.sources import Source, gather
from engine.tokenizer import Tokenizer

MAX_TOKENS = 4096  # of sources and targets with their padding, in one pass
SCORES_AT_ONCE = 64  # positions; the scores of one take a vocabulary


@dataclass(frozen=True, slots=True)
class Question:
    """A text, and what may follow it or fill its one blank, as ids; `top` likeliest are told."""

    request: Request
    choices: tuple[tuple[int, ...], ...]
    top: int = 0


@dataclass(frozen=True, slots=True)
class _Row:
    question: int
    choice: int
    source: Source
    prefix: tuple[int, ...]
    top: int
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


def score_encoded(
    model: Transformer,
    tokenizer: Tokenizer,
    request: Request,
    asked: Continuations,
    encoded_1SD: Tensor,
    max_tokens: int = MAX_TOKENS,
) -> Generator[None, None, tuple[Score, ...]]:
    """Score choices, as `make_question` makes them, for a text that was encoded.

    Yields between passes, so that others may compute. Raises EngineError if the model's scores are
    not finite.
    """
    question = Question(request, asked.choices, asked.top)
    rows = sorted(_rows([question], tokenizer, model.config), key=_likeness)
    real_1S = torch.ones(encoded_1SD.shape[:2], dtype=torch.int64, device=encoded_1SD.device)
    scores: dict[int, Score] = {}
    for group in _groups(rows, max_tokens):
        if scores:
            yield
        found = _score_group(model, group, encoded_1SD, real_1S)
        scores |= dict(zip((row.choice for row in group), found, strict=True))
    return tuple(scores[choice] for choice in range(len(asked.choices)))


def _score_group(
    model: Transformer, rows: Sequence[_Row], encoded_1SD: Tensor, real_1S: Tensor
) -> list[Score]:
    """Score rows of one text: in one pass, or one by one where there is no memory for that."""
    try:
        return list(_score_rows(model, rows, encoded_1SD, real_1S, [0] * len(rows)))
    except (RuntimeError, MemoryError) as error:
        if len(rows) == 1 or not is_out_of_memory(error):
            raise
    # not in `except`: the error keeps alive what was half made
    return [found for row in rows for found in _score_group(model, [row], encoded_1SD, real_1S)]


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
        texts = list(dict.fromkeys(row.source for row in group))
        source = gather(model, texts)
        which = [texts.index(row.source) for row in group]
        found = _score_rows(model, group, model.encode(*source), source.segments_BS, which)
        keys = ((row.question, row.choice) for row in group)
        scores |= dict(zip(keys, found, strict=True))
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
            yield _Row(number, choice, question.request.source, prefix, question.top, target)


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


def _score_rows(
    model: Transformer,
    rows: Sequence[_Row],
    encoded_BSD: Tensor,
    segments_BS: Tensor,
    which: Sequence[int],
) -> Iterator[Score]:
    """Score rows in one pass; row i reads `encoded_BSD[which[i]]`."""
    which_B = torch.tensor(which, device=encoded_BSD.device)
    decoder_BT, decoder_segments_BT = _padded([row.decoder_ids for row in rows], model)
    states_BTD = model.decode(
        decoder_BT, decoder_segments_BT, encoded_BSD[which_B], segments_BS[which_B]
    )
    for row, states_TD in zip(rows, states_BTD, strict=True):
        begin = len(row.prefix) - 1
        yield _score_row(model, row, states_TD[begin : begin + len(row.target)])


def _score_row(model: Transformer, row: _Row, states_TD: Tensor) -> Score:
    logprobs: list[float] = []
    tokens: list[TokenLogprob] = []
    is_greedy = True
    targets = torch.split(torch.tensor(row.target, device=states_TD.device), SCORES_AT_ONCE)
    for part_TD, target_T in zip(torch.split(states_TD, SCORES_AT_ONCE), targets, strict=True):
        log_probs_TV = model.logits(part_TD).float().log_softmax(-1)
        if not log_probs_TV.isfinite().all():
            raise EngineError("the model gave scores that are not finite")
        found = log_probs_TV.gather(1, target_T.unsqueeze(1)).squeeze(1).tolist()
        logprobs += found
        is_greedy = is_greedy and bool((log_probs_TV.argmax(-1) == target_T).all())
        if row.top:
            values, ids = log_probs_TV.topk(min(row.top, log_probs_TV.shape[1]))
            likeliest = zip(target_T.tolist(), found, ids.tolist(), values.tolist(), strict=True)
            tokens += [
                TokenLogprob(token_id, logprob, tuple(zip(top, tops, strict=True)))
                for token_id, logprob, top, tops in likeliest
            ]
    return Score(tuple(logprobs), is_greedy, tuple(tokens))


def _padded(lists: Sequence[Sequence[int]], model: Transformer) -> tuple[Tensor, Tensor]:
    """Ids (B, L) of lists of different lengths, and where they are real, as segments."""
    longest = max(map(len, lists))
    pad = model.config.pad_token_id
    device = model.embedding.weight.device
    ids = torch.tensor([[*ids, *[pad] * (longest - len(ids))] for ids in lists], device=device)
    lengths = torch.tensor([[len(ids)] for ids in lists], device=device)
    return ids, (torch.arange(longest, device=device) < lengths).long()
