"""What it costs to read texts with different adapters together, rather than with one."""

import statistics
from collections.abc import Sequence

import torch

from engine.adapters import Adapter, Slots
from engine.bench import spread
from engine.bench_engine_contenders import Answer, OurRunner, Text
from engine.model.transformer import Transformer

NUM_VECTORS = 100


def make_adapters(model: Transformer, count: int) -> list[Adapter]:
    """Adapters of random vectors, in front of the text."""
    weight = model.embedding.weight
    generator = torch.Generator().manual_seed(0)
    return [
        Adapter(
            name=f"adapter-{number}",
            version="1",
            prompt_PD=torch.randn(NUM_VECTORS, weight.shape[1], generator=generator).to(weight),
            slots=Slots(front=NUM_VECTORS),
        )
        for number in range(count)
    ]


def measure_adapters(model: Transformer, texts: Sequence[Text], repeats: int) -> dict[str, object]:
    """Tokens per second of the texts with an adapter each, and with one for all, in turns.

    The first round warms up. Also the ratio of the medians, the former over the latter.
    """
    adapters = make_adapters(model, len(texts))
    work = {
        "one": [text._replace(adapter=adapters[0]) for text in texts],
        "each_its_own": [
            text._replace(adapter=adapter) for text, adapter in zip(texts, adapters, strict=True)
        ],
    }
    runner = OurRunner(model, max_rows=len(texts))
    rates: dict[str, list[float]] = {name: [] for name in work}
    for turn in range(repeats + 1):
        for name in (work, reversed(work))[turn % 2]:
            rate = _tokens_per_s(runner.generate(work[name]))
            if turn:
                rates[name].append(rate)
    medians = [statistics.median(rates[name]) for name in ("each_its_own", "one")]
    return {
        "rows": len(texts),
        "vectors": NUM_VECTORS,
        **{name: spread(found) for name, found in rates.items()},
        "each_its_own_over_one": round(medians[0] / medians[1], 3),
    }


def _tokens_per_s(answers: Sequence[Answer]) -> float:
    return sum(len(answer.tokens) for answer in answers) / max(answer.end_s for answer in answers)
