"""The contenders of `infmoe bench-offload`: each is loaded and timed in a process of its own.

A text is a row of seeded random ids for the encoder and another one that the decoder is fed, one id
a step, with its cache of keys and values; several rows may go together. The decoder is not fed what
it made itself: a model of random weights soon goes round in circles, and then it asks for the same
few experts again and again, another few in every contender.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from time import perf_counter
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from engine.bench_switch import open_switch
from engine.checkpoint import load_model, open_expert_stores, open_native
from engine.checkpoint_experts import expert_weights
from engine.errors import EngineError
from engine.experts import load_offloaded
from engine.model.layers import FeedForwardWeights
from engine.model.transformer import Transformer
from engine.prepare import prepare
from offload.store import ExpertStore


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What a child is to run. Contenders: see engine/bench_offload.py. Memory in bytes."""

    contender: str
    model: Path
    switch: Path
    expert_memory: int
    source_tokens: int
    decode_tokens: int
    rows: int


class Text(NamedTuple):
    """Ids for the encoder (B, S) and for the steps of the decoder (B, T)."""

    seed: int
    source: Tensor
    fed: Tensor


class Sample(NamedTuple):
    """One text: seconds, bytes read from the disk, the likeliest id of each row after each step."""

    seed: int
    encode_s: float
    decode_s: float
    encode_read_bytes: int
    decode_read_bytes: int
    tokens: list[int]


class Loaded(NamedTuple):
    """How long loading took, and what the process holds after it."""

    load_s: float
    rss_bytes: int


class Answer(NamedTuple):
    """One text in each of a child's models, and the most memory that the process ever held."""

    samples: list[Sample]
    peak_rss_bytes: int


class Runner(Protocol):
    """A loaded model."""

    def encode(self, source: Tensor) -> Tensor:
        """Map ids (B, S) to encoder states (B, S, D)."""
        ...

    def decode(self, hidden: Tensor, fed: Tensor) -> list[int]:
        """Feed ids (B, T) one step at a time. Returns the likeliest ids after each."""
        ...


class OurRunner:
    """Our model as it is served, wherever its experts come from."""

    def __init__(self, model: Transformer) -> None:
        prepare(model)
        self._model = model

    def encode(self, source: Tensor) -> Tensor:
        """The encoder sweep."""
        return self._model.encode(source, torch.ones_like(source))

    def decode(self, hidden: Tensor, fed: Tensor) -> list[int]:
        """Decode with the cache."""
        ones = torch.ones(hidden.shape[:2], dtype=torch.int64)
        cache = self._model.start_cache(hidden, ones, fed.shape[1])
        made: list[int] = []
        for step in range(fed.shape[1]):
            states = self._model.step(fed[:, step : step + 1], cache)
            made += self._model.logits(states).argmax(-1).flatten().tolist()
        return made


class MappedExperts:
    """Experts as views of mapped files: what is touched is faulted in, the kernel does the rest.

    The plain way to run a model larger than memory, as llama.cpp does it; no advice is given.
    """

    def __init__(self, stores: Mapping[str, ExpertStore]) -> None:
        self._stores = stores
        # copy-on-write and never written to: torch warns about arrays that are read-only
        self._files = {
            layer: np.memmap(store.path, np.uint8, "c") for layer, store in stores.items()
        }

    def foresee(self, layer: str, x_ND: Tensor) -> None:
        """Nothing: plain mapping does not look ahead."""

    def stream(self, layer: str, wanted: Sequence[int]) -> Iterator[tuple[int, FeedForwardWeights]]:
        """Yield the wanted experts in the order given."""
        store = self._stores[layer]
        for expert in wanted:
            start = store.offset(expert)
            blob = self._files[layer][start : start + store.layout.blob_bytes]
            yield expert, expert_weights(blob, store.layout)


@contextmanager
def open_ours(directory: Path, expert_memory: int) -> Iterator[OurRunner]:
    """Our model with its experts offloaded within a budget in bytes."""
    model, experts = load_offloaded(directory, None, expert_memory)
    with experts:
        yield OurRunner(model)


@contextmanager
def open_mapped(directory: Path) -> Iterator[OurRunner]:
    """Our model with its experts in mapped files."""
    stores = open_expert_stores(directory, open_native(directory).config)
    try:
        yield OurRunner(load_model(directory, None, MappedExperts(stores)))
    finally:
        for store in stores.values():
            store.close()


@torch.inference_mode()
def child(connection: Connection) -> None:
    """Load the contender of the job that comes first, then time a text for each seed that comes.

    Sends Loaded, and an Answer for each seed, or the reason why there is none; ends with the pipe.
    """
    with ExitStack() as stack, suppress(EOFError):
        job = connection.recv()
        began = perf_counter()
        try:
            runners = open_runners(job, stack)
            connection.send(Loaded(perf_counter() - began, rss_bytes("VmRSS")))
            while True:
                text = make_text(job, connection.recv())
                samples = [time_text(runner, text) for runner in runners]
                connection.send(Answer(samples, rss_bytes("VmHWM")))
        except (EngineError, OSError, ValueError) as error:
            connection.send(str(error))


def open_runners(job: Job, stack: ExitStack) -> list[Runner]:
    """Load what a contender runs: one model, or two that are to be compared text by text."""
    if job.contender == "accelerate":
        return [stack.enter_context(open_switch(job.switch))]
    if job.contender == "mmap":
        return [stack.enter_context(open_mapped(job.model))]
    if job.contender == "offload":
        return [stack.enter_context(open_ours(job.model, job.expert_memory))]
    assert job.contender == "resident"
    ours = stack.enter_context(open_ours(job.model, total_bytes(expert_files(job.model))))
    return [ours, OurRunner(load_model(job.model))]


def expert_files(directory: Path) -> list[Path]:
    """The files of a native directory that hold its experts."""
    return sorted(directory.glob("experts-*.safetensors"))


def total_bytes(files: list[Path]) -> int:
    """Size of files together; that of the expert files is enough for all experts."""
    return sum(file.stat().st_size for file in files)


def make_text(job: Job, seed: int) -> Text:
    """The same ids for the same seed, below the size of the vocabulary."""
    generator = torch.Generator().manual_seed(seed)
    high = open_native(job.model).config.vocab_size
    source, fed = (
        torch.randint(0, high, (job.rows, length), generator=generator)
        for length in (job.source_tokens, job.decode_tokens)
    )
    return Text(seed, source, fed)


def time_text(runner: Runner, text: Text) -> Sample:
    """Time the encoder sweep and the decoding of one text."""
    read_0, began = disk_read_bytes(), perf_counter()
    hidden = runner.encode(text.source)
    encoded = perf_counter()
    read_1, encoded_again = disk_read_bytes(), perf_counter()
    tokens = runner.decode(hidden, text.fed)
    decoded = perf_counter()
    return Sample(
        seed=text.seed,
        encode_s=encoded - began,
        decode_s=decoded - encoded_again,
        encode_read_bytes=read_1 - read_0,
        decode_read_bytes=disk_read_bytes() - read_1,
        tokens=tokens,
    )


def disk_read_bytes() -> int:
    """Bytes that this process had fetched from disks so far, by direct reads and page faults."""
    return _number("/proc/self/io", "read_bytes")


def rss_bytes(field: str) -> int:
    """Memory that this process holds (VmRSS) or held at most (VmHWM), mapped files included."""
    return 1024 * _number("/proc/self/status", field)


def _number(path: str, field: str) -> int:
    match = re.search(rf"^{field}:\s*(\d+)", Path(path).read_text(), re.MULTILINE)
    assert match is not None
    return int(match[1])
