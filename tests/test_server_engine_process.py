"""`infmoe serve` with its engine in a process of its own: what the end of either means."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import httpx2
import pytest

from engine.adapters_manifest import write_manifest
from engine.checkpoint import save_model
from tests.adapter_folders import adapter_files, write_files
from tests.tiny import tiny_model
from tests.waiting import wait_for

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
GREETING = re.compile(r"listening on (http://127\.0\.0\.1:\d+);")
URL = "/v1/completions"
LONG = {"prompt": "hello", "max_tokens": 60, "ignore_eos": True, "temperature": 0}
ENDLESS = LONG | {"n": 32, "stream": True, "temperature": 1.0}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "tiny"
    save_model(tiny_model(), path)
    return path


@contextlib.contextmanager
def served(model, *options):
    """A server process, a client of it, and its engine's process id."""
    command = [sys.executable, "-m", "server", "serve", str(model), "--port", "0", *options]
    with subprocess.Popen(
        [*command, "--set", "engine_process=true", "--set", "drain_delay_s=0"],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        child = None
        try:
            address = GREETING.search(process.stderr.readline())[1]
            with httpx2.Client(base_url=address, timeout=300) as client:
                wait_for(lambda: client.get("/health/ready").status_code == 200)
                (child,) = children_of(process.pid)
                yield process, client, child
        finally:
            process.kill()
            if child is not None and is_running(child):
                os.kill(child, signal.SIGKILL)


def children_of(pid):
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return list(map(int, found.split()))


def is_running(pid):
    """Whether there is such a process that is no zombie, which nobody may be there to reap."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_it_serves_texts_adapters_grammars_and_metrics_and_drains(model, tmp_path):
    root = tmp_path / "adapters"
    write_manifest(write_files(root / "task" / "1", adapter_files(seed=1)))
    with served(model, "--adapters", str(root)) as (process, client, child):
        whole = client.post(URL, json=LONG).json()["choices"][0]["text"]
        lines = [
            json.loads(line.removeprefix("data: "))
            for line in client.post(URL, json=LONG | {"stream": True}).text.splitlines()
            if line.startswith("data: {")
        ]
        assert "".join(line["choices"][0]["text"] for line in lines) == whole
        soft = client.post(URL, json=LONG | {"model": "task"})
        assert soft.headers["x-adapter"] == "task@1"
        assert soft.json()["choices"][0]["text"] != whole
        ruled = client.post(URL, json=LONG | {"structured_outputs": {"choice": ["yes", "no"]}})
        assert ruled.json()["choices"][0]["text"] in ("yes", "no")
        refused = client.post(URL, json=LONG | {"max_tokens": 10_000})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "max_tokens")
        told = client.get("/metrics").text
        assert "infmoe_decode_steps_total" in told
        for name in ("infmoe", "infmoe_engine"):
            used = re.search(rf"^{name}_process_resident_memory_bytes (\S+)$", told, re.M)
            assert float(used[1]) > 2**24
        planned = client.get("/v1/info").json()["plan"]
        assert 0 < planned["planned_bytes"]["host"] <= planned["budget_bytes"]["host"]
        process.terminate()
        assert process.wait(300) == 0
        wait_for(lambda: not is_running(child))


def test_an_engine_that_is_killed_ends_streams_with_an_error_and_the_server(model):
    with served(model) as (process, client, child):
        with client.stream("POST", URL, json=ENDLESS) as response:
            lines = (line for line in response.iter_lines() if line)
            first = next(lines)
            os.kill(child, signal.SIGKILL)
            rest = list(lines)
        assert first.startswith("data: {")
        assert '"engine_failure"' in rest[-2]
        assert rest[-1] == "data: [DONE]"
        assert process.wait(300) == 1
        assert "it was ended by SIGKILL, which the system sends when" in process.stderr.read()


def test_an_engine_does_not_outlive_its_server_even_where_it_is_stuck(model):
    with served(model) as (process, client, child):
        os.kill(child, signal.SIGSTOP)  # it cannot see that its sockets are closed
        process.kill()
        process.wait(300)
        wait_for(lambda: not is_running(child))


def test_a_server_that_is_told_to_go_while_it_loads_takes_its_engine_along(model):
    command = [sys.executable, "-m", "server", "serve", str(model), "--port", "0"]
    with subprocess.Popen(
        [*command, "--set", "engine_process=true"], cwd=ROOT, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            assert GREETING.search(process.stderr.readline())
            wait_for(lambda: children_of(process.pid))
            (child,) = children_of(process.pid)
            process.terminate()
            assert process.wait(300) == 0
            wait_for(lambda: not is_running(child))
        finally:
            process.kill()
