"""`infmoe bench`: how fast one request decodes, against recomputing without a cache and the memory.

Decoding one token reads every weight that the token meets once, so bytes of active weights times
tokens per second, over the bandwidth that a plain read of memory reaches, is the share of the
limit.
"""

import json
import statistics
import subprocess
from collections.abc import Callable
from pathlib import Path
from time import perf_counter

import torch

from engine.convert import count_parameters, load_any
from engine.model.transformer import Transformer

REPEATS = 5
READ_BYTES = 2**28


def memory_bandwidth() -> float:
    """Bytes per second that summing a large array reads from memory; the best of a few."""
    data = torch.ones(READ_BYTES // 4)
    return READ_BYTES / min(timed(lambda: data.sum()) for _ in range(REPEATS))


def timed(work: Callable[[], object]) -> float:
    """Seconds that a piece of work takes."""
    began = perf_counter()
    work()
    return perf_counter() - began


class DecodeBench:
    """One request of fixed lengths with random ids, decoded greedily."""

    def __init__(self, model: Transformer, source_length: int, num_tokens: int) -> None:
        self.model = model
        self.num_tokens = num_tokens
        generator = torch.Generator().manual_seed(0)
        high = model.config.vocab_size
        self.source = torch.randint(0, high, (1, source_length), generator=generator)
        self.ones = torch.ones_like(self.source)
        self.start = torch.tensor([[model.config.decoder_start_token_id]])

    def encode(self) -> torch.Tensor:
        """The encoder sweep."""
        return self.model.encode(self.source, self.ones)

    def cached(self, hidden: torch.Tensor) -> torch.Tensor:
        """Decode with the cache. Returns the ids (1, T)."""
        cache = self.model.start_cache(hidden, self.ones, self.num_tokens)
        tokens, made = self.start, []
        for _ in range(self.num_tokens):
            tokens = self.model.logits(self.model.step(tokens, cache)).argmax(-1)
            made.append(tokens)
        return torch.cat(made, 1)

    def recomputed(self, hidden: torch.Tensor) -> torch.Tensor:
        """Decode by running the decoder over the whole text for each token.

        Returns the ids (1, T).
        """
        tokens = self.start
        for _ in range(self.num_tokens):
            states = self.model.decode(tokens, torch.ones_like(tokens), hidden, self.ones)
            following = self.model.logits(states[:, -1:]).argmax(-1)
            tokens = torch.cat([tokens, following], 1)
        return tokens[:, 1:]


@torch.inference_mode()
def run_bench(
    path: Path, dtype: torch.dtype | None, source_length: int, num_tokens: int
) -> dict[str, object]:
    """Measure a model directory: medians with minimum and maximum, one warm-up, REPEATS repeats."""
    model = load_any(path, dtype)
    bench = DecodeBench(model, source_length, num_tokens)
    hidden = bench.encode()
    same = bool((bench.cached(hidden) == bench.recomputed(hidden)).all())  # warms both up
    encode_s = [timed(bench.encode) for _ in range(REPEATS)]
    pairs = [
        (timed(lambda: bench.cached(hidden)), timed(lambda: bench.recomputed(hidden)))
        for _ in range(REPEATS)
    ]
    rates = [num_tokens / cached for cached, _ in pairs]
    ratios = [recomputed / cached for cached, recomputed in pairs]
    weights = decoder_bytes(model)
    bandwidth = memory_bandwidth()
    return {
        "model": path.name,
        "dtype": str(model.embedding.weight.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "commit": commit(),
        "source_tokens": source_length,
        "decoded_tokens": num_tokens,
        "encode_ms": spread([1000 * s for s in encode_s]),
        "decode_tokens_per_s": spread(rates),
        "speedup_over_recomputing": spread(ratios),
        "tokens_equal": same,
        "active_decoder_bytes": weights,
        "read_gb_per_s": round(bandwidth / 1e9, 2),
        "share_of_memory_limit": round(statistics.median(rates) * weights / bandwidth, 4),
    }


def decoder_bytes(model: Transformer) -> int:
    """Bytes of weights that one decoded token meets.

    Decoder, one expert per layer, output layer; not what projects the encoder output, which is
    read once for a text.
    """
    config = model.config
    size = model.embedding.weight.dtype.itemsize
    decoder = sum(p.numel() for p in model.decoder.parameters())
    blocks = model.decoder.blocks()
    decoder -= sum(block.cross_attention.key_value.weight.numel() for block in blocks)
    one = count_parameters(config)["one_expert"]
    head = config.vocab_size * config.d_model
    return size * (decoder + one * config.num_decoder_layers + head)


def spread(values: list[float]) -> dict[str, float]:
    """Median, minimum and maximum."""
    return {
        "median": round(statistics.median(values), 3),
        "min": round(min(values), 3),
        "max": round(max(values), 3),
    }


def commit() -> str | None:
    """The checked-out commit, if this is a checkout."""
    try:
        result = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=False,
        )
    except OSError:
        return None
    return result.stdout.strip() or None


def print_report(report: dict[str, object]) -> None:
    """A table for people and, as the last line, one JSON object."""
    for key, value in report.items():
        if isinstance(value, dict):
            value = f"{value['median']} ({value['min']} to {value['max']})"
        print(f"{key:<26}{value}")
    print(json.dumps(report))
