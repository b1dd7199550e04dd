"""llama.cpp and vLLM, as `infmoe bench-peers` runs them: in processes that are not ours alone.

llama.cpp is asked through its own HTTP server on the loopback: its Python package offers nothing
below. vLLM has an environment of its own, whose Python runs `bench_peers_vllm.py`.
"""

import json
import os
import subprocess
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from http.client import HTTPConnection
from pathlib import Path
from time import perf_counter
from urllib.parse import urlsplit

from engine.bench_engine_contenders import Answer, Text
from engine.bench_peers_job import Job
from engine.errors import EngineError

TIMEOUT_S = 600.0
VLLM_CACHE_GIB = 1
VLLM_END_S = 30.0


class LlamaRunner:
    """llama.cpp's server: a stream for each text, all at once. `server` is what keeps it alive."""

    def __init__(self, address: str, server: object = None) -> None:
        parts = urlsplit(address)
        assert parts.hostname is not None
        self._host, self._port = parts.hostname, parts.port
        self._server = server

    def generate(self, texts: Sequence[Text]) -> list[Answer]:
        """Answer texts that are all there. Raises EngineError if the server refuses one."""
        began = perf_counter()
        with ThreadPoolExecutor(len(texts)) as pool:
            answers = list(pool.map(lambda text: self._stream(text, began), texts))
        return [
            # a stream leaves out ids of characters that are not whole yet
            answer if len(answer.tokens) == text.num_tokens else self._told_again(text, answer)
            for text, answer in zip(texts, answers, strict=True)
        ]

    def _stream(self, text: Text, began: float) -> Answer:
        tokens, first_s = list[int](), 0.0
        for event in self._ask(text, stream=True):
            first_s = first_s or perf_counter() - began
            tokens += event["tokens"]
        return Answer(tokens, first_s, perf_counter() - began)

    def _told_again(self, text: Text, answer: Answer) -> Answer:
        (event,) = self._ask(text, stream=False)
        return answer._replace(tokens=event["tokens"])

    def _ask(self, text: Text, *, stream: bool) -> Iterator[dict[str, list[int]]]:
        body = {
            "prompt": list(text.ids),
            "n_predict": text.num_tokens,
            "temperature": 0.0,
            "samplers": ["temperature"],
            "ignore_eos": True,
            "cache_prompt": False,
            "return_tokens": True,
            "stream": stream,
        }
        connection = HTTPConnection(self._host, self._port, timeout=TIMEOUT_S)
        try:
            headers = {"Content-Type": "application/json"}
            connection.request("POST", "/completion", json.dumps(body), headers)
            response = connection.getresponse()
            if response.status != 200:
                reason = response.read().decode(errors="replace")[:200]
                raise EngineError(f"llama.cpp answered {response.status}: {reason}")
            for line in response if stream else [b"data: " + response.read()]:
                if line.startswith(b"data: {"):
                    yield json.loads(line.removeprefix(b"data: "))
        finally:
            connection.close()


@contextmanager
def open_llama(job: Job) -> Iterator[LlamaRunner]:
    """Load the GGUF file in llama.cpp's server as it comes, mapped; nothing is kept of a text."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(job.paths.gguf)
    params.n_parallel = job.max_rows
    params.n_ctx = job.max_rows * job.max_tokens
    params.n_threads_http = job.max_rows + 1
    for cpu in (params.cpuparams, params.cpuparams_batch):
        cpu.n_threads = job.threads
    params.load_mode = xllamacpp.llama_load_mode.LLAMA_LOAD_MODE_MMAP
    params.fit_params = False  # it would shrink the context to what is free
    params.warmup = False  # would read all experts; the first text warms up
    params.cache_ram_mib = 0
    params.verbosity = -1
    params.ui = False
    server = xllamacpp.Server(params)
    yield LlamaRunner(server.listening_address, server)


class VllmRunner:
    """vLLM in a process of its own Python, a line for each batch."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self._line()  # that it is loaded

    @property
    def pid(self) -> int:
        """Its process."""
        return self._process.pid

    def generate(self, texts: Sequence[Text]) -> list[Answer]:
        """Answer texts that are all there. Raises EngineError if the process has ended."""
        assert self._process.stdin is not None
        message = json.dumps([(text.ids, text.num_tokens) for text in texts])
        try:
            self._process.stdin.write(f"{message}\n")
            self._process.stdin.flush()
        except BrokenPipeError as error:
            raise EngineError("vLLM has ended; its last words are above") from error
        return [Answer(**answer) for answer in json.loads(self._line())]

    def _line(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise EngineError("vLLM has ended; its last words are above")
        return line


@contextmanager
def open_vllm(job: Job) -> Iterator[VllmRunner]:
    """Load the Hugging Face directory in vLLM's own environment."""
    script = Path(__file__).with_name("bench_peers_vllm.py")
    numbers = (job.paths.huggingface, job.max_rows, job.max_tokens)
    process = subprocess.Popen(
        [str(job.vllm_python), str(script), *map(str, numbers)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=vllm_environment(job.threads),
    )
    try:
        yield VllmRunner(process)
    finally:
        assert process.stdin is not None
        assert process.stdout is not None
        with suppress(BrokenPipeError):
            process.stdin.close()  # which ends it
        try:
            process.wait(VLLM_END_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()


def vllm_environment(threads: int) -> dict[str, str]:
    """What vLLM reads on a CPU: threads, each on a core, memory of its cache, and no network."""
    cores = sorted(os.sched_getaffinity(0))[:threads]
    return {
        **{key: value for key, value in os.environ.items() if key != "PYTHONPATH"},
        "OMP_NUM_THREADS": str(threads),
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
        "VLLM_CPU_KVCACHE_SPACE": str(VLLM_CACHE_GIB),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "DO_NOT_TRACK": "1",
    }
