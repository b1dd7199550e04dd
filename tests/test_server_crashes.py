"""Real server processes: killed in the midst of work and started again, stopped under load, used
for long by clients that vanish."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2
import pytest

from engine.adapter_upload import PREFIX
from engine.adapters_manifest import write_manifest
from engine.checkpoint import save_model
from server.keys import hash_key, write_keys
from server.schemas_keys import KeyRecord
from tests.adapter_folders import adapter_files, make_tar, write_files
from tests.tiny import tiny_model
from tests.waiting import wait_for

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
GREETING = re.compile(r"listening on http://127\.0\.0\.1:(\d+);")
URL = "/v1/completions"
KEY = "a-key-for-tests-only"
AUTH = {"authorization": f"Bearer {KEY}"}
LONG = {"prompt": "hello", "max_tokens": 200, "ignore_eos": True}
ASKED = LONG | {"model": "task", "max_tokens": 8, "temperature": 0}
NUM_VANISHING = 100
GROWTH_BYTES = 8 * 2**20  # of 600 requests; one that stayed would keep its texts and tasks


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "tiny"
    save_model(tiny_model(), path)
    return path


@contextlib.contextmanager
def process_of(model, *options):
    command = [sys.executable, "-m", "server", "serve", str(model), "--port", "0", *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [*command, "--set", "drain_delay_s=0.2"],
        cwd=ROOT,
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        reader = None
        try:
            port = next(found[1] for line in process.stderr if (found := GREETING.search(line)))
            reader = threading.Thread(target=process.stderr.read)  # so that it never blocks
            reader.start()
            address = f"http://127.0.0.1:{port}"
            with httpx2.Client(base_url=address, headers=AUTH, timeout=300) as client:
                wait_for(lambda: client.get("/health/ready").status_code == 200)
                yield process, client
        finally:
            process.kill()
            if reader is not None:
                reader.join()


def connect(client):
    made = socket.create_connection((client.base_url.host, client.base_url.port), timeout=300)
    return contextlib.closing(made)


def send(raw, body, method="POST", path=URL, length=None):
    kind = "application/json" if path == URL else "application/x-tar"
    told = {
        "host": "localhost",
        "content-type": kind,
        **AUTH,
        "content-length": length or len(body),
    }
    lines = "".join(f"{name}: {value}\r\n" for name, value in told.items())
    raw.sendall(f"{method} {path} HTTP/1.1\r\n{lines}\r\n".encode() + body)


def files_of(root):
    return {
        path.relative_to(root): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file() and not path.name.endswith(".lock")
    }


def counts_of(client):
    """Values of metrics, those of one name together."""
    told = Counter()
    for line in client.get("/metrics").text.splitlines():
        if not line.startswith("#"):
            name, _, value = line.rpartition(" ")
            told[name.partition("{")[0]] += float(value)
    return told


def test_kill_9_loses_no_adapter_and_no_key_and_the_start_cleans_up(model, tmp_path):
    root, keys = tmp_path / "adapters", tmp_path / "keys"
    write_manifest(write_files(root / "task" / "1", adapter_files(seed=1)))
    scopes = ("infer", "admin", "metrics")
    write_keys(keys, [KeyRecord(name="all", sha256=hash_key(KEY), scopes=scopes)])
    options = ("--adapters", str(root), "--keys-file", str(keys))
    upload = make_tar(adapter_files(count=40, seed=2))
    with process_of(model, *options) as (process, client), contextlib.ExitStack() as stack:
        text = client.post(URL, json=ASKED).json()["choices"][0]["text"]
        before = files_of(tmp_path)
        half = stack.enter_context(connect(client))
        send(half, upload[:3000], "PUT", "/admin/adapters/task/2", len(upload))
        for _ in range(20):
            raw = stack.enter_context(connect(client))
            send(raw, json.dumps(LONG | {"stream": True}).encode())
        wait_for(lambda: list(root.glob(f"{PREFIX}*/*")))
        wait_for(lambda: counts_of(client)["infmoe_running"] > 0)
        process.kill()
        assert process.wait(300) == -signal.SIGKILL
    assert files_of(tmp_path).items() > before.items()  # half an upload more
    with process_of(model, *options) as (process, client):
        assert files_of(tmp_path) == before
        after = client.post(URL, json=ASKED)
        assert after.headers["x-adapter"] == "task@1"
        assert after.json()["choices"][0]["text"] == text
        assert client.put("/admin/adapters/task/2", content=upload).status_code == 201
        assert client.post(URL, json=ASKED).headers["x-adapter"] == "task@2"
        process.terminate()
        assert process.wait(300) == 0


def test_sigterm_under_load_ends_every_request(model):
    def ask(client, number):
        reply = client.post(URL, json=LONG | {"stream": number % 2 == 0})
        return reply.status_code, reply.text

    def num_accepted():
        told = counts_of(client)
        names = ("infmoe_queue_depth", "infmoe_running", "infmoe_finished_total")
        return sum(told[name] for name in names)

    options = ("--set", "max_rows=4", "--set", "drain_s=1")
    with process_of(model, *options) as (process, client), ThreadPoolExecutor(60) as pool:
        replies = [pool.submit(ask, client, number) for number in range(60)]
        wait_for(lambda: num_accepted() == 60)
        process.terminate()
        replies = [reply.result(300) for reply in replies]
        assert process.wait(300) == 0
    statuses = Counter(status for status, _ in replies)
    assert statuses.keys() <= {200, 503}
    assert statuses[200] > 0
    for status, text in replies:
        if status == 200 and text.startswith("data: "):
            assert text.endswith("data: [DONE]\n\n")
            assert '"finish_reason":"length"' in text or '"shutting_down"' in text
        elif status == 200:
            assert json.loads(text)["choices"][0]["finish_reason"] == "length"


def test_memory_is_flat_however_many_clients_vanish(model):
    def is_idle():
        told = counts_of(client)
        busy = told["infmoe_queue_depth"] + told["infmoe_running"]
        return not busy and told["infmoe_in_flight"] == 1  # who asks

    def measure():
        sums = Counter()
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        for pid in (process.pid, *children):  # the gateway, and the engine's own process
            status = Path(f"/proc/{pid}/status").read_text()
            sums["rss_bytes"] += 1024 * int(re.search(r"VmRSS:\s+(\d+)", status)[1])
            sums["threads"] += int(re.search(r"Threads:\s+(\d+)", status)[1])
            sums["files"] += len(list(Path(f"/proc/{pid}/fd").iterdir()))
        return tuple(sums[name] for name in ("rss_bytes", "threads", "files"))

    def vanish():
        with contextlib.ExitStack() as stack:
            for number in range(NUM_VANISHING):
                raw = stack.enter_context(connect(client))
                body = LONG | {"prompt": "x" * 200, "stream": number % 2 == 0, "logprobs": 5}
                send(raw, json.dumps(body).encode())
            wait_for(lambda: counts_of(client)["infmoe_queue_depth"] > 20)
        wait_for(is_idle)

    with process_of(model, "--set", "max_rows=4") as (process, client):
        for _ in range(3):
            vanish()
        before = measure()
        for _ in range(6):
            vanish()
        after = measure()
        num_ended = counts_of(client)["infmoe_finished_total"]
    # Threads of pools stay or go as the load comes, and connections close when they do.
    assert after[0] - before[0] < GROWTH_BYTES, (before, after)
    assert after[1] < before[1] + NUM_VANISHING / 2
    assert after[2] < before[2] + NUM_VANISHING / 2
    assert num_ended > 9 * 20
