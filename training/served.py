"""A model behind a server, asked over HTTP for what a `Scorer` is asked: the same questions."""

import http.client
import json
import time
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from urllib.parse import urlsplit

import torch
from torch import Tensor

from engine.errors import EngineError
from training.task_eval import TaskReport, evaluate_task
from training.task_examples import Example, read_with
from training.task_readers import Ids, inner_ids
from training.tasks import Task
from training.tune_model import join_words

TIMEOUT_S = 600.0
PATIENCE_S = 300.0  # with a queue that is full
MOST_TEXTS = 32  # of one request; a server takes 64 unless it was told otherwise
MOST_WORDS = 256  # that one request may score
PROBE = "0"

T = TypeVar("T")
Words = tuple[tuple[Ids, ...], ...]


class Refused(EngineError):
    """The server cannot be reached, or does not do what it was asked."""


class Server:
    """Sends JSON to one server, waiting while its queue is full."""

    def __init__(
        self, url: str, api_key: str = "", wait: Callable[[float], None] = time.sleep
    ) -> None:
        try:
            parts = urlsplit(url)
            host, port = parts.hostname, parts.port
        except ValueError:
            host, port = None, None
        if host is None or parts.scheme not in ("http", "https"):
            raise Refused(f"--url is {url!r}; write http://HOST:PORT")
        is_safe = parts.scheme == "https"
        self._kind = http.client.HTTPSConnection if is_safe else http.client.HTTPConnection
        self._host, self._port = host, port
        self._path = parts.path.rstrip("/")
        self._url = url.rstrip("/")
        self._headers = {"content-type": "application/json"}
        if api_key:
            self._headers["authorization"] = f"Bearer {api_key}"
        self._wait = wait

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """The reply to a body. Raises Refused if there is none, or it is an error."""
        return self._ask("POST", path, json.dumps(body).encode())

    def is_decoder_only(self) -> bool:
        """Whether the model goes on in a text. Raises Refused if the server does not tell."""
        cards = self._ask("GET", "/v1/models", None).get("data")
        first = cards[0] if isinstance(cards, list) and cards else None
        if not isinstance(first, dict):
            raise Refused(f"{self._url}/v1/models: tells no model")
        return first.get("architecture") == "decoder_only"

    def _ask(self, method: str, path: str, body: bytes | None) -> dict[str, Any]:
        waited_s = 0.0
        while True:
            reply = self._send(method, path, body)
            if reply.status != 429 or waited_s >= PATIENCE_S:
                break
            pause_s = min(max(reply.wait_s, 0.1), PATIENCE_S)
            self._wait(pause_s)
            waited_s += pause_s
        if reply.status != 200:
            error = reply.facts.get("error")
            told = error.get("message") if isinstance(error, dict) else None
            raise Refused(f"{self._url}{path}: {reply.status}: {told or 'no InfMoE server'}")
        return reply.facts

    def _send(self, method: str, path: str, body: bytes | None) -> "_Reply":
        connection = self._kind(self._host, self._port, timeout=TIMEOUT_S)
        try:
            connection.request(method, self._path + path, body, self._headers)
            response = connection.getresponse()
            text, wait = response.read(), response.getheader("retry-after", "1")
        except (OSError, http.client.HTTPException) as error:
            reason = str(error) or type(error).__name__
            raise Refused(f"{self._url} does not answer: {reason}") from error
        finally:
            connection.close()
        try:
            facts = json.loads(text)
        except ValueError:
            facts = None
        wait_s = float(wait) if wait.isdecimal() else 1.0
        return _Reply(response.status, facts if isinstance(facts, dict) else {}, wait_s)


class _Reply(NamedTuple):
    status: int
    facts: dict[str, Any]
    wait_s: float


class ServedTokens:
    """Reads texts with the tokenizer of the server."""

    closing: Ids = ()

    def __init__(self, server: Server, *, is_decoder_only: bool = False) -> None:
        self._server = server
        self.is_decoder_only = is_decoder_only

    def close(self, text: str) -> list[int]:
        """Ids of what the encoder reads."""
        return self._tokenize(text, is_closed=True)

    def follow(self, text: str) -> list[int]:
        """Ids of what comes after a text."""
        if self.is_decoder_only:
            return inner_ids(lambda part: self._tokenize(part, is_closed=False), text)
        return self._tokenize(text, is_closed=False)

    def spell(self, text: str) -> list[int]:
        """Ids of a part of a text.

        Raises ValueError if they give another text back, but for spaces and forms of characters.
        """
        ids = self.follow(text)
        read = self._server.post("/detokenize", {"tokens": ids})["prompt"]
        if not ids or _plain(read) != _plain(text):
            raise ValueError(f"the tokenizer cannot spell {text[:40]!r}")
        return ids

    def _tokenize(self, text: str, *, is_closed: bool) -> list[int]:
        body = {"prompt": text, "add_special_tokens": is_closed}
        ids: list[int] = self._server.post("/tokenize", body)["tokens"]
        return ids


class ServedScorer:
    """Asks a server what a `Scorer` computes; `adapter` is a name or name@version, if any."""

    def __init__(self, server: Server, adapter: str | None = None) -> None:
        self._server = server
        self._common: dict[str, Any] = {} if adapter is None else {"adapter": adapter}

    def longest_text(self) -> int:
        """Tokens that a text may have beside the vectors of the adapter; loads it."""
        text = self._server.post("/tokenize", {"prompt": PROBE})
        body = self._common | {"context": PROBE, "continuations": [PROBE]}
        usage = self._server.post("/v1/score", body)["usage"]
        taken: int = usage["prompt_tokens_details"]["encoder_tokens"] - text["count"]
        longest: int = text["max_model_len"]
        return longest - taken

    def label_scores(self, examples: Sequence[Example], task: Task) -> list[Tensor]:
        """Scores (L,) of the labels of choices, or of the texts of rankings."""
        if any(example.is_paired for example in examples):
            return [self._pair_scores(example, task) for example in examples]
        found: list[list[Tensor]] = [[] for _ in examples]
        by_words: dict[Words, list[tuple[int, Ids]]] = {}
        for number, example in enumerate(examples):
            pairs = by_words.setdefault(example.words, [])
            pairs += [(number, source) for source in example.sources]
        for words, pairs in by_words.items():
            for part in _parts(pairs, MOST_TEXTS):
                scores = self._score([source for _, source in part], words, task)
                for (number, _), score_L in zip(part, scores, strict=True):
                    found[number].append(score_L)
        return [torch.cat(parts) for parts in found]

    def _pair_scores(self, example: Example, task: Task) -> Tensor:
        """Scores (L,) of labels each of whose words follows a source of its own."""
        pairs = [pair for group in example.asked() for pair in group]
        by_target: dict[Ids, list[Ids]] = {}
        for number, target in pairs:
            by_target.setdefault(target, []).append(example.sources[number])
        sums: dict[tuple[Ids, Ids], Tensor] = {}
        for target, sources in by_target.items():
            for part in _parts(list(dict.fromkeys(sources)), MOST_TEXTS):
                logs = self._logs(list(part), [target])
                sums |= {(source, target): log[0] for source, log in zip(part, logs, strict=True)}
        found = [sums[example.sources[number], target] for number, target in pairs]
        return join_words(found, [len(group) for group in example.asked()], task)

    def _score(self, sources: list[Ids], words: Words, task: Task) -> list[Tensor]:
        """Scores of all labels after each text."""
        logs = self._logs(sources, [ids for group in words for ids in group])
        return [join_words(log, [len(group) for group in words], task) for log in logs]

    def _logs(self, sources: list[Ids], flat: list[Ids]) -> list[list[Tensor]]:
        """Log-probabilities of the tokens of all words, after each text."""
        logs: list[list[Tensor]] = [[] for _ in sources]
        for part in _parts(flat, MOST_WORDS):
            body = self._common | {"contexts": sources, "continuations": part}
            for log, context in zip(
                logs, self._server.post("/v1/score", body)["data"], strict=True
            ):
                log += [torch.tensor(one["token_logprobs"]) for one in context["scores"]]
        return logs

    def write(self, sources: Sequence[Ids], max_tokens: int) -> list[str]:
        """The likeliest answer token by token."""
        texts: list[str] = []
        for part in _parts(sources, MOST_TEXTS):
            body = {"text": part, "max_tokens": max_tokens, "temperature": 0}
            reply = self._server.post("/v1/generate", self._common | body)
            texts += [answer["text"] for answer in reply["answers"]]
        return texts


def evaluate_served(
    url: str,
    data: Path,
    task: Task,
    adapter: str | None = None,
    rows: int = 16,
    api_key: str = "",
) -> TaskReport:
    """How well what a server serves does a task. All data is checked before the first question.

    Raises Refused for what the server does not do, ValueError for rows that cannot be used.
    """
    server = Server(url, api_key)
    scorer = ServedScorer(server, adapter)
    tokens = ServedTokens(server, is_decoder_only=server.is_decoder_only())
    examples = read_with(tokens, scorer.longest_text(), data, task)
    return evaluate_task(scorer, examples, task, rows)


def read_key(path: Path) -> str:
    """The key in a file. Raises ValueError if it holds none, or more than one line."""
    key = path.read_text(encoding="utf-8").strip()
    if not key.isascii() or not key.isprintable() or not key:
        raise ValueError(f"{path}: holds no key; expected one line of ASCII")
    return key


def _parts(items: Sequence[T], size: int) -> list[Sequence[T]]:
    return [items[start : start + size] for start in range(0, len(items), size)]


def _plain(text: str) -> str:
    return "".join(unicodedata.normalize("NFKC", text).casefold().split())
