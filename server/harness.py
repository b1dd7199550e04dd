"""A model class for lm-evaluation-harness, which scores through the encoder.

The harness asks OpenAI servers for one flat list of ids; an encoder-decoder model has two sides.
Here the context goes to the encoder and the continuation to the decoder, by POST /v1/score:

    python -m server.harness --model infmoe --model_args base_url=http://127.0.0.1:8000 --tasks ...

Needs the package lm_eval, and nothing else of this server.
"""

import json
import os
import urllib.error
import urllib.request
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model

MAX_SHOWN = 500  # characters of an error reply


@register_model("infmoe")
class InfmoeModel(LM):  # type: ignore[misc]  # the harness has no types
    """Asks a running server. Raises RuntimeError with the server's own words if it refuses."""

    def __init__(
        self,
        base_url: str = "http://127.0.0.1:8000",
        model: str | None = None,
        adapter: str | None = None,
        api_key: str | None = None,
        timeout_s: float = 600.0,
        max_gen_toks: int = 64,
        **_kwargs: object,  # batch_size, device: the server knows better
    ) -> None:
        super().__init__()
        self._base_url = base_url.rstrip("/").removesuffix("/v1")
        self._fields = {"model": model, "adapter": adapter}
        self._api_key = api_key or os.environ.get("OPENAI_API_KEY", "")
        self._timeout_s = timeout_s
        self._max_tokens = max_gen_toks

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        """Log-probability of each continuation, and whether it is what greedy decoding says.

        Continuations of one context go in one call, which reads the context once.
        """
        found: dict[int, tuple[float, bool]] = {}
        for context, numbers in _by_context(requests):
            texts = [requests[i].args[1] for i in numbers]
            body: dict[str, object] = {"context": context, "continuations": texts}
            scores = self._post("/v1/score", body)["data"][0]["scores"]
            for number, score in zip(numbers, scores, strict=True):
                found[number] = (score["logprob"], score["is_greedy"])
        return [found[number] for number in range(len(requests))]

    def loglikelihood_rolling(self, requests: Sequence[Instance]) -> list[float]:
        """Refused: a text alone is no input of an encoder-decoder model."""
        raise NotImplementedError("perplexity of a whole text is not defined for these models")

    def generate_until(self, requests: Sequence[Instance]) -> list[str]:
        """Answers to contexts, each until one of its stop strings."""
        return [self._generate(*request.args) for request in requests]

    def _generate(self, context: str, options: dict[str, Any]) -> str:
        until = options.get("until") or []
        body: dict[str, object] = {
            "prompt": context,
            "stop": [until] if isinstance(until, str) else list(until),
            "max_tokens": options.get("max_gen_toks", self._max_tokens),
            "temperature": options.get("temperature", 0) if options.get("do_sample") else 0,
            "seed": 1234,
        }
        text: str = self._post("/v1/completions", body)["choices"][0]["text"]
        return text

    def _post(self, path: str, body: dict[str, object]) -> dict[str, Any]:
        fields = {name: value for name, value in self._fields.items() if value is not None}
        request = urllib.request.Request(
            f"{self._base_url}{path}",
            json.dumps({**fields, **body}).encode(),
            {"content-type": "application/json"},
        )
        if self._api_key:
            request.add_header("authorization", f"Bearer {self._api_key}")
        try:
            with urllib.request.urlopen(request, timeout=self._timeout_s) as reply:
                answer: dict[str, Any] = json.load(reply)
                return answer
        except urllib.error.HTTPError as error:
            text = error.read().decode(errors="replace")[:MAX_SHOWN]
            raise RuntimeError(f"{path}: status {error.code}: {text}") from error


def _by_context(requests: Sequence[Instance]) -> Iterator[tuple[str, list[int]]]:
    """Contexts, each with the numbers of its requests."""
    groups: dict[str, list[int]] = defaultdict(list)
    for number, request in enumerate(requests):
        groups[request.args[0]].append(number)
    yield from groups.items()


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
