"""What a soft prompt starts from: random numbers, tokens of a text or of labels, another prompt.

Shape letters: P vectors, D model width.
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from engine.adapters import Slots, load_adapter, model_fingerprint
from engine.errors import ConfigError
from engine.model.transformer import Transformer
from engine.tokenizer import Tokenizer
from training.task_examples import Example
from training.task_readers import Ids
from training.tasks import FIELD, Task
from training.tune_model import SoftPrompt

STARTS = ("random", "text", "labels", "frequent")
MOST_FREQUENT = 5000
HALF_WIDTH = 0.5


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
    Raises ConfigError for an unknown start, CheckpointError if an adapter does not fit.
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
    if not path.is_dir():
        raise ConfigError(
            f"init is {start!r}; give the folder of an adapter or one of: {', '.join(STARTS)}"
        )
    fingerprint = model_fingerprint(model)
    adapter = load_adapter(path, model.config, torch.float32, fingerprint=fingerprint)
    counts = [(one.front, one.middle, one.back) for one in (adapter.slots, slots)]
    if counts[0] != counts[1]:
        raise ConfigError(
            f"{path}: has {counts[0]} vectors in front, middle and back; asked for are {counts[1]}"
        )
    return adapter.prompt_PD
