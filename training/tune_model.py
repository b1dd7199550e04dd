"""A soft prompt in front of a frozen model: what it encodes, finds likely and writes.

Shape letters: B rows, S source length, T target length, N target tokens, D model width, V
vocabulary, P vectors, L labels.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from engine.adapters import Slots
from engine.config import ModelConfig
from engine.errors import ConfigError
from engine.model.transformer import Transformer
from engine.tokenizer import Tokenizer
from training.task_examples import Example
from training.task_readers import Ids, decoder_start
from training.tasks import Task
from training.tune_masks import Mask, encode_masked


class SoftPrompt(nn.Module):
    """Trained vectors and where they go; in fp32, whatever the model is in.

    With another `mask` than full it is for an ablation, and no server reads it so.
    """

    def __init__(self, prompt_PD: Tensor, slots: Slots, mask: Mask = "full") -> None:
        super().__init__()
        self.prompt_PD = nn.Parameter(prompt_PD.detach().float().clone())
        self.slots = slots
        self.mask = mask


class Encoded(NamedTuple):
    """What the encoder made of some texts, and where they are no padding.

    Of a decoder-only model its context. `starts` is what the decoder reads first after each.
    """

    states_BSD: Tensor
    segments_BS: Tensor
    starts: tuple[Ids, ...]


class Scorer:
    """A model with or without a prompt, asked for likelihoods and answers.

    Of a text the last token is what a decoder-only model reads first when it answers.
    """

    def __init__(
        self, model: Transformer, tokenizer: Tokenizer, prompt: SoftPrompt | None = None
    ) -> None:
        """Raise ConfigError for a prompt that the model cannot have."""
        if prompt is not None:
            check_slots(prompt.slots, model.config)
            if model.config.is_decoder_only and prompt.mask != "full":
                raise ConfigError(f"mask {prompt.mask} is for encoders; the model has none")
        self.model = model
        self.tokenizer = tokenizer
        self.prompt = prompt
        self.start = decoder_start(tokenizer, model.config)

    def encode(self, sources: Sequence[Ids]) -> Encoded:
        """Encode texts with the vectors among them."""
        device, pad = self.model.embedding.weight.device, self.model.config.pad_token_id
        slots = self.prompt.slots if self.prompt else Slots()
        starts = (self.start,) * len(sources)
        if not self.start:
            starts = tuple(ids[-1:] for ids in sources)
            sources = [ids[:-1] for ids in sources]
        rows, places = zip(*(lay_out(ids, slots, pad) for ids in sources), strict=True)
        tokens_BS, segments_BS = _padded(rows, pad, device)
        if self.prompt is None:
            return Encoded(self.model.encode(tokens_BS, segments_BS), segments_BS, starts)
        x_BSD = self.model.embedding(tokens_BS)
        length = tokens_BS.shape[1]
        flat = [row * length + place for row, found in enumerate(places) for place in found]
        vectors = self.prompt.prompt_PD.to(x_BSD.dtype).to(device).repeat(len(rows), 1)
        flat_N = torch.tensor(flat, device=device)
        x_BSD = x_BSD.flatten(0, 1).index_copy(0, flat_N, vectors).view_as(x_BSD)
        if self.prompt.mask != "full":
            vectors_BS = torch.zeros_like(segments_BS, dtype=torch.bool)
            vectors_BS.view(-1)[flat_N] = True
            states_BSD = encode_masked(self.model, x_BSD, segments_BS, vectors_BS, self.prompt.mask)
            return Encoded(states_BSD, segments_BS, starts)
        return Encoded(self.model.encode(tokens_BS, segments_BS, x_BSD), segments_BS, starts)

    def target_logprobs(
        self, encoded: Encoded, which: Sequence[int], targets: Sequence[Ids]
    ) -> list[Tensor]:
        """Log-probabilities of the tokens of each target, read after text `which[i]`.

        What the decoder reads twice after one text, as for all words of one token, it reads once.
        """
        device, pad = encoded.states_BSD.device, self.model.config.pad_token_id
        read = [(one, ids[:-1]) for one, ids in zip(which, targets, strict=True)]
        rows = {pair: row for row, pair in enumerate(dict.fromkeys(read))}
        which_B = torch.tensor([one for one, _ in rows], device=device)
        given = [(*encoded.starts[one], *ids) for one, ids in rows]
        tokens_BT, segments_BT = _padded(given, pad, device)
        hidden_BTD = self.model.decode(
            tokens_BT, segments_BT, encoded.states_BSD[which_B], encoded.segments_BS[which_B]
        )
        begin = len(encoded.starts[0]) - 1
        parts = [
            row_TD[begin : begin + len(ids) + 1]
            for row_TD, (_, ids) in zip(hidden_BTD, rows, strict=True)
        ]
        logs_NV = self.model.logits(torch.cat(parts)).float().log_softmax(-1)
        logs = torch.split(logs_NV, [len(part) for part in parts])
        return [
            logs[rows[pair]].gather(1, torch.tensor(ids, device=device).unsqueeze(1)).squeeze(1)
            for pair, ids in zip(read, targets, strict=True)
        ]

    def label_scores(self, examples: Sequence[Example], task: Task) -> list[Tensor]:
        """Scores (L,) of the labels of choices, or of the texts of rankings.

        A label has the probability of all its words together.
        """
        sources = {source: 0 for example in examples for source in example.sources}
        sources = {source: row for row, source in enumerate(sources)}  # the same is read once
        asked = [example.asked() for example in examples]
        words = [
            [(sources[example.sources[number]], ids) for number, ids in group]
            for example, groups in zip(examples, asked, strict=True)
            for group in groups
        ]
        which, targets = zip(*(pair for group in words for pair in group), strict=True)
        found = self.target_logprobs(self.encode(list(sources)), which, targets)
        labels = join_words(found, [len(group) for group in words], task)
        return list(torch.split(labels, [len(groups) for groups in asked]))

    def loss(self, examples: Sequence[Example], task: Task) -> tuple[Tensor, int]:
        """What training minimises, summed, and how much it is the sum of.

        Over tokens for what is generated and for the first word of the right label; over rows for
        a choice among labels and for rankings.
        """
        if task.kind == "rank":
            scores = self.label_scores(examples, task)
            losses = [
                F.cross_entropy(score_L / task.temperature, _shares(example, score_L))
                for example, score_L in zip(examples, scores, strict=True)
            ]
            return torch.stack(losses).sum(), len(examples)
        if task.kind == "choice" and task.loss == "labels":
            scores = self.label_scores(examples, task)
            losses = [
                -score_L.log_softmax(0)[example.answer]
                for example, score_L in zip(examples, scores, strict=True)
            ]
            return torch.stack(losses).sum(), len(examples)
        sources, targets = zip(*(example.right for example in examples), strict=True)
        encoded = self.encode(sources)
        found = torch.cat(self.target_logprobs(encoded, range(len(targets)), targets))
        return -found.sum(), len(found)

    @torch.no_grad()
    def write(self, sources: Sequence[Ids], max_tokens: int) -> list[str]:
        """The likeliest answer token by token, as the server gives it at temperature 0."""
        encoded = self.encode(sources)
        device = encoded.states_BSD.device
        ends, never = self._marks()
        capacity = len(encoded.starts[0]) + max_tokens
        cache = self.model.start_cache(encoded.states_BSD, encoded.segments_BS, capacity)
        tokens_BT = torch.tensor(encoded.starts, device=device)
        answers: list[list[int]] = [[] for _ in sources]
        is_open = [True] * len(sources)
        for _ in range(max_tokens):
            logits_BV = self.model.logits(self.model.step(tokens_BT, cache)[:, -1]).float()
            logits_BV[:, never] = -torch.inf
            chosen_B = logits_BV.argmax(-1)
            for row, token in enumerate(chosen_B.tolist()):
                is_open[row] = is_open[row] and token not in ends
                if is_open[row]:
                    answers[row].append(token)
            if not any(is_open):
                break
            tokens_BT = chosen_B.unsqueeze(1)
        return [self.tokenizer.decode(ids) for ids in answers]

    def _marks(self) -> tuple[set[int], list[int]]:
        """Ids that end an answer, and ids that never come in one."""
        config, tokenizer = self.model.config, self.tokenizer
        ends = set(config.eos_token_ids)
        unnamed = range(tokenizer.vocab_size, config.vocab_size)
        marks = {config.pad_token_id, config.decoder_start_token_id, *tokenizer.control_ids}
        never = sorted((marks | set(unnamed)) - ends)
        if config.continuation_sentinel is not None:
            ends |= {tokenizer.sentinel_id(i) for i in range(tokenizer.num_sentinels)}
        return ends, never


def join_words(found: Sequence[Tensor], sizes: Sequence[int], task: Task) -> Tensor:
    """Scores of labels, of the log-probabilities of their words' tokens; so many words of each."""
    is_mean = task.by == "mean"
    words_N = torch.stack([one.mean() if is_mean else one.sum() for one in found])
    return torch.stack([part.logsumexp(0) for part in torch.split(words_N, list(sizes))])


def check_slots(slots: Slots, config: ModelConfig) -> None:
    """Raise ConfigError for vectors where a model cannot have any."""
    if slots.back and config.is_decoder_only:
        raise ConfigError(
            f"{slots.back} vectors are behind the text; a decoder-only model takes them in front "
            "of it or within"
        )


def lay_out(ids: Sequence[int], slots: Slots, pad: int) -> tuple[list[int], list[int]]:
    """Ids of all positions, `pad` where vectors go, and the places of the vectors in their order.

    Text a b c, two in front, one after two tokens: pad pad a b pad c, at 0, 1 and 4.
    """
    cut = slots.split(ids)
    middle = slots.front + cut
    back = slots.middle + slots.front + len(ids)
    row = [*[pad] * slots.front, *ids[:cut], *[pad] * slots.middle, *ids[cut:], *[pad] * slots.back]
    spans = ((0, slots.front), (middle, slots.middle), (back, slots.back))
    return row, [place for start, count in spans for place in range(start, start + count)]


def batches(examples: Sequence[Example], rows: int) -> Iterator[list[int]]:
    """Numbers of examples of like length, so many texts together; a ranking has several."""
    order = sorted(range(len(examples)), key=lambda i: max(map(len, examples[i].sources)))
    group: list[int] = []
    size = 0
    for number in order:
        texts = len(examples[number].sources)
        if group and size + texts > rows:
            yield group
            group, size = [], 0
        group.append(number)
        size += texts
    if group:
        yield group


def _shares(example: Example, like_L: Tensor) -> Tensor:
    gains_L = torch.tensor(example.gains, dtype=like_L.dtype, device=like_L.device)
    return gains_L / gains_L.sum().clamp(min=1e-9)


def _padded(rows: Sequence[Sequence[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    longest = max(map(len, rows))
    padded = [[*row, *[pad] * (longest - len(row))] for row in rows]
    ids = torch.tensor(padded, dtype=torch.int64, device=device)  # also of no tokens at all
    lengths = torch.tensor([[len(row)] for row in rows], device=device)
    return ids, (torch.arange(longest, device=device) < lengths).long()
