"""The contenders of `infmoe bench-engine`: ours, transformers' `generate`, CTranslate2.

Each is given texts as ids with the number of tokens to make of each, greedily and never less; all
read the same Hugging Face directory.
"""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from time import perf_counter, sleep
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch

from engine.adapters import Adapter
from engine.checkpoint_any import load_any
from engine.engine import Engine
from engine.errors import EngineError
from engine.model.transformer import Transformer, set_invariant
from engine.prepare import prepare
from engine.request import Event, Failed, Finished, Piece, Request, SamplingParams
from engine.scheduler import Limits

if TYPE_CHECKING:
    from transformers import T5ForConditionalGeneration

INVARIANT = "invariant-bf16"
MAX_ROWS = 32
SETTLE_S = 0.25  # Intel's OpenMP threads spin for 0.2 s after their work, in the way of the next


class Text(NamedTuple):
    """Ids for the encoder, the number of tokens to make, and when it arrives, in seconds.

    Ours alone can read it with an adapter.
    """

    ids: tuple[int, ...]
    num_tokens: int
    arrives_s: float = 0.0
    adapter: Adapter | None = None


class Answer(NamedTuple):
    """What was made of a text; first token and end in seconds since the first text arrived."""

    tokens: list[int]
    first_s: float
    end_s: float


class Contender(Protocol):
    """A loaded model."""

    def generate(self, texts: Sequence[Text]) -> list[Answer]:
        """Answer texts that are all there."""
        ...


class Kind(NamedTuple):
    """What a contender is: the package that it needs, and how it is opened."""

    package: str
    dtype: torch.dtype
    open: Callable[[Path, torch.dtype], Contender]


class IdTokenizer:
    """Names every id of a model and spells it as a number."""

    num_sentinels = 0

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.control_ids = frozenset[int]()

    def encode(self, text: str) -> list[int]:
        return [int(word) for word in text.split()]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(f"{token_id} " for token_id in ids)

    def spell(self, token_id: int, state: int) -> tuple[bytes, int]:
        return f"{token_id} ".encode(), state

    def sentinel_id(self, index: int) -> int:
        raise ValueError(f"there is no sentinel {index}; this vocabulary has none")

    def sentinel_index(self, token_id: int) -> int | None:  # noqa: ARG002  the protocol's
        return None


@dataclass(slots=True, eq=False)
class BenchJob:
    """A request in the engine and what came of it."""

    request: Request
    submitted: float
    tokens: list[int] = field(default_factory=list)
    first: float = 0.0
    end: float = 0.0

    def is_cancelled(self) -> bool:
        """Never: everybody waits."""
        return False

    def take(self, event: Event) -> None:
        """Note an event. Raises EngineError if it is a failure."""
        now = perf_counter()
        if isinstance(event, Failed):
            raise EngineError(f"{self.request.request_id}: {event.message}")
        if isinstance(event, Finished):
            self.end = now
            return
        assert isinstance(event, Piece)
        self.first = self.first or now
        self.tokens += event.token_ids


class OurRunner:
    """The engine, for itself on one thread; its caches stay as they have grown, as in a server."""

    def __init__(self, model: Transformer, max_rows: int = MAX_ROWS) -> None:
        self.model = model
        tokenizer = IdTokenizer(model.config.vocab_size)
        self._engine: Engine[BenchJob] = Engine(model, tokenizer, Limits(max_rows=max_rows))

    def generate(self, texts: Sequence[Text]) -> list[Answer]:
        """Answer texts, each from the time of its arrival on."""
        engine, began, jobs = self._engine, perf_counter(), list[BenchJob]()
        while len(jobs) < len(texts) or engine.running or engine.num_waiting():
            while len(jobs) < len(texts) and texts[len(jobs)].arrives_s <= perf_counter() - began:
                jobs.append(self._make_job(len(jobs), texts[len(jobs)], began))
                engine.add(jobs[-1])
            for job, event in engine.turn():
                job.take(event)
            if not engine.running and not engine.num_waiting() and len(jobs) < len(texts):
                _sleep_until(began + texts[len(jobs)].arrives_s)
        return [Answer(job.tokens, job.first - began, job.end - began) for job in jobs]

    def _make_job(self, index: int, text: Text, began: float) -> BenchJob:
        request = Request(
            request_id=f"text-{index}",
            encoder_ids=text.ids,
            params=SamplingParams(max_tokens=text.num_tokens, ignore_eos=True),
            adapter=text.adapter,
            num_held=int(self.model.config.is_decoder_only),  # a step gives the first scores
        )
        return BenchJob(request, began + text.arrives_s)


def _sleep_until(when: float) -> None:
    sleep(max(when - perf_counter(), 0.0))


def open_ours(directory: Path, dtype: torch.dtype) -> OurRunner:
    """Load a model as the server does that has memory enough."""
    return OurRunner(_load_ours(directory, dtype))


def open_invariant(directory: Path, dtype: torch.dtype) -> OurRunner:
    """The same in batch-invariant mode."""
    model = _load_ours(directory, dtype)
    set_invariant(model)
    return OurRunner(model)


def _load_ours(directory: Path, dtype: torch.dtype) -> Transformer:
    model = load_any(directory, dtype)
    prepare(model)
    return model


class FirstToken:
    """A streamer for `generate` that notes when the first token of a batch is there."""

    def __init__(self) -> None:
        self._times: list[float] = []

    def put(self, value: torch.Tensor) -> None:  # noqa: ARG002  transformers' own
        """Take what the decoder starts with, and then a token of each row at a time."""
        self._times.append(perf_counter())

    def end(self) -> None:
        """Nothing is left over."""

    @property
    def first(self) -> float:
        """When the first token came."""
        return self._times[1]


class TransformersRunner:
    """transformers' `generate` on a static batch, which ends with its longest text."""

    def __init__(self, model: "T5ForConditionalGeneration") -> None:
        # transformers declares `generate` for classes of its own making only
        self._generate: Callable[..., torch.Tensor] = getattr(model, "generate")  # noqa: B009

    def generate(self, texts: Sequence[Text]) -> list[Answer]:
        """Answer a batch."""
        began, clock = perf_counter(), FirstToken()
        longest = max(len(text.ids) for text in texts)
        num_tokens = max(text.num_tokens for text in texts)
        ids = [[*text.ids, *[0] * (longest - len(text.ids))] for text in texts]
        lengths = torch.tensor([[len(text.ids)] for text in texts])
        made: torch.Tensor = self._generate(
            input_ids=torch.tensor(ids),
            attention_mask=(torch.arange(longest) < lengths).long(),
            min_new_tokens=num_tokens,
            max_new_tokens=num_tokens,
            do_sample=False,
            num_beams=1,
            streamer=clock,
        )
        end_s = perf_counter() - began
        return [
            Answer(row[1 : 1 + text.num_tokens], clock.first - began, end_s)  # after the start id
            for row, text in zip(made.tolist(), texts, strict=True)
        ]


def open_transformers(directory: Path, dtype: torch.dtype) -> TransformersRunner:
    """Load a model as transformers does."""
    return TransformersRunner(_load_transformers(directory, dtype))


def _load_transformers(directory: Path, dtype: torch.dtype) -> "T5ForConditionalGeneration":
    from transformers import T5ForConditionalGeneration
    from transformers.utils import logging

    logging.set_verbosity_error()  # type: ignore[no-untyped-call]  # transformers has no types there
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # likewise
    model: T5ForConditionalGeneration = T5ForConditionalGeneration.from_pretrained(
        directory, dtype=dtype, local_files_only=True
    )  # in evaluation mode
    return model


class CTranslate2Runner:
    """CTranslate2 on a static batch."""

    def __init__(self, directory: Path) -> None:
        import ctranslate2

        self._translator = ctranslate2.Translator(
            str(directory),
            device="cpu",
            compute_type="float32",
            inter_threads=1,
            intra_threads=torch.get_num_threads(),
        )

    def generate(self, texts: Sequence[Text]) -> list[Answer]:
        """Answer a batch."""
        times: list[float] = []

        def note(_: object) -> bool:  # once for each token of each row
            times.append(perf_counter())
            return False

        began = perf_counter()
        num_tokens = max(text.num_tokens for text in texts)
        results = self._translator.translate_batch(
            [list(map(str, text.ids)) for text in texts],
            beam_size=1,
            min_decoding_length=num_tokens,
            max_decoding_length=num_tokens,
            callback=note,
        )
        end_s = perf_counter() - began
        sleep(SETTLE_S)
        return [
            Answer(
                [int(name) for name in result.hypotheses[0][: text.num_tokens]],
                times[len(texts) - 1] - began,
                end_s,
            )
            for result, text in zip(results, texts, strict=True)
        ]


class Names:
    """What CTranslate2's converter asks of a tokenizer: each id is called by its number."""

    pad_token, eos_token, unk_token = "0", "1", "2"

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size

    def get_vocab(self) -> dict[str, int]:
        return {str(token_id): token_id for token_id in range(self._vocab_size)}

    def convert_ids_to_tokens(self, token_id: int) -> str:
        return str(token_id)


def open_ctranslate2(directory: Path, dtype: torch.dtype) -> CTranslate2Runner:
    """Convert a model beside its directory, if that has not been done, and load it."""
    converted = directory.with_name(f"{directory.name}-ctranslate2")
    if not converted.exists():
        from ctranslate2.converters.transformers import T5Loader

        partial = converted.with_name(f"{converted.name}.partial")
        if partial.exists():
            shutil.rmtree(partial)
        partial.mkdir()
        with torch.no_grad():
            model = _load_transformers(directory, dtype)
            spec = T5Loader()(model, Names(model.config.vocab_size))
        spec.validate()
        spec.optimize()
        spec.save(str(partial))
        partial.rename(converted)
    return CTranslate2Runner(converted)


KINDS = {
    "ours-bf16": Kind("torch", torch.bfloat16, open_ours),
    INVARIANT: Kind("torch", torch.bfloat16, open_invariant),
    "transformers-bf16": Kind("transformers", torch.bfloat16, open_transformers),
    "ours-fp32": Kind("torch", torch.float32, open_ours),
    "transformers-fp32": Kind("transformers", torch.float32, open_transformers),
    "ctranslate2-fp32": Kind("ctranslate2", torch.float32, open_ctranslate2),
}


def is_installed(kind: Kind) -> bool:
    """Whether the package is there that a contender needs."""
    return find_spec(kind.package) is not None


def serve_static(contender: Contender, texts: Sequence[Text], rows: int) -> list[Answer]:
    """Answer texts as they arrive in static batches: whoever is there, up to so many, in order."""
    began, answers = perf_counter(), list[Answer]()
    while len(answers) < len(texts):
        left = texts[len(answers) :]
        _sleep_until(began + left[0].arrives_s)
        begin_s = perf_counter() - began
        batch = [text for text in left[:rows] if text.arrives_s <= begin_s]
        answers += [
            Answer(tokens, begin_s + first_s, begin_s + end_s)
            for tokens, first_s, end_s in contender.generate(batch)
        ]
    return answers
