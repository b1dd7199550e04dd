"""What a soft prompt starts from: random numbers, tokens of a text or of labels, another prompt.

Of several other prompts it is the one that does the new task best before it is trained.

Shape letters: P vectors, D model width.
"""

import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from engine.adapters import PEFT_CONFIG, Slots, load_adapter, model_fingerprint
from engine.config import ModelConfig
from engine.errors import CheckpointError, ConfigError
from engine.model.transformer import Transformer
from engine.tokenizer import Tokenizer
from training.task_examples import Example, make_slots
from training.task_readers import Ids
from training.tasks import FIELD, Task
from training.tune_model import Scorer, SoftPrompt, batches, check_slots

logger = logging.getLogger(__name__)

STARTS = ("random", "text", "labels", "frequent")
MOST_FREQUENT = 5000
HALF_WIDTH = 0.5
TRIED_ROWS = 256  # that other prompts are compared by

Counts = tuple[int | None, int | None, int | None]  # vectors in front, middle, back; as asked


def find_starts(
    start: str, counts: Counts, task: Task, tokenizer: Tokenizer, config: ModelConfig
) -> dict[str, Slots]:
    """What a prompt may start from, with the slots that it would have.

    `start` is one of `STARTS`, the path of an adapter or of a directory of adapters. Of the latter
    it is those with as many vectors as are asked for; a warning tells which do not fit the model.
    Raises ConfigError if there is none, CheckpointError for a single one that cannot be read.
    """
    if start in STARTS:
        return {start: make_slots(task, tokenizer, *counts)}
    path = Path(start)
    if not path.is_dir():
        raise ConfigError(
            f"init is {start!r}; give the folder of an adapter or of several, or one of: "
            f"{', '.join(STARTS)}"
        )
    below = sorted([*path.glob(f"*/{PEFT_CONFIG}"), *path.glob(f"*/*/{PEFT_CONFIG}")])
    if not below and not (path / PEFT_CONFIG).exists():
        raise ConfigError(f"{path}: holds no adapter; give the folder of one, or of several")
    if (path / PEFT_CONFIG).exists():
        _, asked = _counts(path, config, counts)
        return {start: make_slots(task, tokenizer, *asked)}
    found = {}
    for one in (file.parent for file in below):
        try:
            own, asked = _counts(one, config, counts)
            if own == asked:
                slots = make_slots(task, tokenizer, *asked)
                check_slots(slots, config)
                found[str(one)] = slots
        except (CheckpointError, ConfigError) as error:
            logger.warning("no start: %s", error)
    if not found:
        wanted = "that fits" if counts == (None, None, None) else f"with {_named(counts)}"
        raise ConfigError(f"{path}: holds no prompt {wanted}")
    return found


def _counts(adapter: Path, config: ModelConfig, counts: Counts) -> tuple[Counts, Counts]:
    """Vectors that an adapter has, and those that are asked for."""
    slots = load_adapter(adapter, config, torch.float32).slots
    own = (slots.front, slots.middle, slots.back)
    if counts == (None, None, None):
        return own, own
    front, middle, back = (count or 0 for count in counts)
    return own, (front, middle, back)


def _named(counts: Counts) -> str:
    front, middle, back = (count or 0 for count in counts)
    return f"{front} vectors in front, {middle} in the middle, {back} behind"


@torch.no_grad()
def find_losses(
    prompts: dict[str, SoftPrompt],
    model: Transformer,
    tokenizer: Tokenizer,
    task: Task,
    examples: Sequence[Example],
    rows: int,
) -> dict[str, float]:
    """The loss of each prompt on some examples, without training; the best first.

    Source: after SPoT (arXiv:2110.07904), which starts from the prompt of another task.
    """
    some = examples[:TRIED_ROWS]
    losses = {}
    for name, prompt in prompts.items():
        scorer = Scorer(model, tokenizer, prompt)
        parts = [scorer.loss([some[i] for i in group], task) for group in batches(some, rows)]
        losses[name] = sum(loss.item() for loss, _ in parts) / sum(count for _, count in parts)
    return dict(sorted(losses.items(), key=lambda pair: pair[1]))


def start_prompt(
    start: str,
    slots: Slots,
    model: Transformer,
    tokenizer: Tokenizer,
    task: Task,
    examples: Sequence[Example],
    seed: int,
) -> SoftPrompt:
    """Vectors to begin with; `start` is one of `STARTS` or the path of an adapter.

    Of texts and labels come as many as there are, then frequent tokens of the data.
    Raises ConfigError if an adapter has other slots, CheckpointError if it does not fit.
    Source: Lester et al. (arXiv:2104.08691): labels, 5,000 most frequent tokens, +-0.5.
    """
    if start not in STARTS:
        return SoftPrompt(_load(start, slots, model), slots)
    generator = torch.Generator().manual_seed(seed)
    shape = (slots.num_vectors, model.config.d_model)
    if start == "random":
        random_PD = (torch.rand(shape, generator=generator) * 2 - 1) * HALF_WIDTH
        return SoftPrompt(random_PD, slots)
    tokens: list[Ids] = []
    if start == "text":
        tokens = [(token,) for token in tokenizer.encode(FIELD.sub("", task.template))]
    elif start == "labels":
        words = [word for example in examples for group in example.words for word in group]
        tokens = list(dict.fromkeys(words))
    counts = Counter(token for e in examples for source in e.sources for token in source)
    frequent = [token for token, _ in counts.most_common(MOST_FREQUENT)]
    missing = max(slots.num_vectors - len(tokens), 0)
    drawn = torch.randint(0, len(frequent), (missing,), generator=generator).tolist()
    tokens += [(frequent[index],) for index in drawn]
    device = model.embedding.weight.device
    with torch.no_grad():
        rows = [
            model.embedding(torch.tensor(ids, device=device)).float().mean(0)
            for ids in tokens[: slots.num_vectors]
        ]
    return SoftPrompt(torch.stack(rows), slots)


def _load(start: str, slots: Slots, model: Transformer) -> Tensor:
    path = Path(start)
    fingerprint = model_fingerprint(model)
    adapter = load_adapter(path, model.config, torch.float32, fingerprint=fingerprint)
    counts = [(one.front, one.middle, one.back) for one in (adapter.slots, slots)]
    if counts[0] != counts[1]:
        raise ConfigError(
            f"{path}: has {counts[0]} vectors in front, middle and back; asked for are {counts[1]}"
        )
    return adapter.prompt_PD
