"""The contenders of `infmoe bench-peers`, each in a process of its own.

All are given texts of one length as ids with the number of tokens to make of each, greedily and
never less, and have the weights in bf16.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from importlib.util import find_spec
from multiprocessing.connection import Connection
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, NamedTuple

import torch

from engine.bench import decoder_bytes
from engine.bench_contenders import MappedExperts, disk_read_bytes
from engine.bench_engine_contenders import Answer, Contender, FirstToken, OurRunner, Text
from engine.bench_peers_job import Job
from engine.bench_peers_others import VllmRunner, open_llama, open_vllm
from engine.bench_switch import device_map
from engine.checkpoint import load_model, open_expert_stores, open_native
from engine.checkpoint_any import load_any
from engine.errors import EngineError
from engine.experts import load_offloaded
from engine.memory import return_free_heap, return_large_blocks
from engine.model.transformer import Transformer
from engine.prepare import prepare

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Loaded(NamedTuple):
    """Seconds of loading, memory after it, and of ours bytes of weights that a token meets."""

    load_s: float
    rss_bytes: int
    token_bytes: int


class Told(NamedTuple):
    """A batch of texts: answers, the most memory ever held, what was read, seconds of all CPUs."""

    answers: list[Answer]
    peak_rss_bytes: int
    read_bytes: int
    cpu_s: float


class Kind(NamedTuple):
    """What a contender needs to be installed, and how it is opened."""

    packages: tuple[str, ...]
    open: Callable[[Job], AbstractContextManager[Contender]]


@contextmanager
def open_ours(job: Job) -> Iterator[OurRunner]:
    """Load a model as the server does that has memory enough."""
    return_large_blocks()
    yield _runner(load_any(job.paths.huggingface, torch.bfloat16), job)


@contextmanager
def open_offloaded(job: Job) -> Iterator[OurRunner]:
    """The same with experts offloaded within a budget."""
    assert job.paths.native is not None
    return_large_blocks()
    model, experts = load_offloaded(job.paths.native, None, job.expert_memory)
    with experts:
        yield _runner(model, job)


@contextmanager
def open_mapped(job: Job) -> Iterator[OurRunner]:
    """The same with experts in mapped files: what a process holds beside them."""
    assert job.paths.native is not None
    return_large_blocks()
    stores = open_expert_stores(job.paths.native, open_native(job.paths.native).config)
    try:
        yield _runner(load_model(job.paths.native, None, MappedExperts(stores)), job)
    finally:
        for store in stores.values():
            store.close()


def _runner(model: Transformer, job: Job) -> OurRunner:
    prepare(model)
    return_free_heap()
    return OurRunner(model, job.max_rows)


class CausalRunner:
    """transformers' `generate` on a static batch of texts of one length."""

    def __init__(self, model: "PreTrainedModel") -> None:
        # transformers declares `generate` for classes of its own making only
        self._generate: Callable[..., torch.Tensor] = getattr(model, "generate")  # noqa: B009

    def generate(self, texts: Sequence[Text]) -> list[Answer]:
        """Answer a batch."""
        began, clock = perf_counter(), FirstToken()
        ids = torch.tensor([text.ids for text in texts])
        num_tokens = texts[0].num_tokens
        made = self._generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            min_new_tokens=num_tokens,
            max_new_tokens=num_tokens,
            do_sample=False,
            streamer=clock,
        )
        end_s = perf_counter() - began
        return [Answer(row[ids.shape[1] :], clock.first - began, end_s) for row in made.tolist()]


@contextmanager
def open_transformers(job: Job) -> Iterator[CausalRunner]:
    """Load a model as transformers does."""
    yield CausalRunner(_load_transformers(job.paths.huggingface))


@contextmanager
def open_accelerate(job: Job) -> Iterator[CausalRunner]:
    """The same with its experts on accelerate's disk and the rest in memory."""
    from transformers import AutoConfig, AutoModelForCausalLM

    directory = job.paths.huggingface
    with torch.device("meta"):
        config = AutoConfig.from_pretrained(directory)
        empty = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]  # theirs
    folder = directory.with_name(f"{directory.name}-accelerate")
    options = {"device_map": device_map(empty), "offload_folder": str(folder)}
    yield CausalRunner(_load_transformers(directory, **options))


def _load_transformers(directory: Path, **options: object) -> "PreTrainedModel":
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()  # type: ignore[no-untyped-call]  # transformers has no types there
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # likewise
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.bfloat16, local_files_only=True, **options
    )  # in evaluation mode
    return model


OURS, OFFLOAD = "ours-bf16", "ours-offload-bf16"
LLAMA_PACKAGES = ("xllamacpp",)
RESIDENT = {
    OURS: Kind((), open_ours),
    "transformers-bf16": Kind(("transformers",), open_transformers),
    "llama.cpp-bf16": Kind(LLAMA_PACKAGES, open_llama),
    "vllm-bf16": Kind((), open_vllm),
}
LIMITED = {
    OFFLOAD: Kind((), open_offloaded),
    "llama.cpp-mmap-bf16": Kind(LLAMA_PACKAGES, open_llama),
    "accelerate-bf16": Kind(("transformers", "accelerate"), open_accelerate),
}
MAPPED = "mapped"
KINDS = {**RESIDENT, **LIMITED, MAPPED: Kind((), open_mapped)}


def missing_packages(kind: Kind) -> list[str]:
    """The packages that a contender needs and that are not installed."""
    return [name for name in kind.packages if find_spec(name) is None]


def child(connection: Connection) -> None:
    """Load the contender of the job that comes first, then answer each batch of texts that comes.

    Sends Loaded, and Told for each batch, or the reason why there is none; ends with the pipe.
    """
    with suppress(EOFError), ExitStack() as stack:
        job: Job = connection.recv()
        try:
            serve(connection, job, KINDS[job.contender], stack)
        except (EngineError, ImportError, OSError, RuntimeError, ValueError) as error:
            connection.send(f"{type(error).__name__}: {error}"[:400])


def serve(connection: Connection, job: Job, kind: Kind, stack: ExitStack) -> None:
    """Do as `child` tells."""
    torch.set_num_threads(job.threads)
    began = perf_counter()
    contender = stack.enter_context(kind.open(job))
    pid = contender.pid if isinstance(contender, VllmRunner) else None
    token_bytes = decoder_bytes(contender.model) if isinstance(contender, OurRunner) else 0
    connection.send(Loaded(perf_counter() - began, rss_bytes("VmRSS", pid), token_bytes))
    while True:
        texts: list[Text] = connection.recv()
        read, cpu = disk_read_bytes(), cpu_s(pid)
        answers = contender.generate(texts)
        read, cpu = disk_read_bytes() - read, cpu_s(pid) - cpu
        connection.send(Told(answers, rss_bytes("VmHWM", pid), read, cpu))


def rss_bytes(field: str, pid: int | None = None) -> int:
    """Memory that a process holds (VmRSS) or held at most (VmHWM); pid None: this one."""
    lines = Path(f"/proc/{pid or 'self'}/status").read_text().splitlines()
    values = dict(line.split(":", 1) for line in lines)
    return 1024 * int(values[field].split()[0])


def cpu_s(pid: int | None = None) -> float:
    """Seconds of CPU that all threads of a process have taken."""
    # the name, in brackets, may hold blanks; behind it utime and stime are the 12th and 13th
    fields = Path(f"/proc/{pid or 'self'}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
