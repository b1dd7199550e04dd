"""Real server processes: drained, cut short, told to go while they load, stuck: how they end."""

import asyncio
import contextlib
import signal
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2
import uvicorn

from server.app import create_app
from server.lifecycle import DrainingServer
from server.settings import Settings
from tests.fakes import FakeEngine
from tests.waiting import wait_for

ROOT = Path(__file__).parents[1]
URL = "/v1/completions"

PREAMBLE = """
    import logging
    import os
    import sys
    import threading
    from engine.request import Piece
    from engine.worker import LoadedModel, Worker
    from server.app import create_app
    from server.lifecycle import open_socket, run_to_exit
    from server.settings import Settings
    from tests.fakes import HOLD, FakeEngine, finished
    from tests.tiny import byte_tokenizer, tiny_model

    def serve(engine, drain_s, delay_s=0.0):
        listener = open_socket("127.0.0.1", 0)
        print(listener.getsockname()[1], flush=True)
        close = lambda: print("closed", flush=True)
        run_to_exit(create_app(engine, Settings()), engine, listener, drain_s, delay_s, close)
        print("ended", flush=True)
"""

HOLDING = (
    PREAMBLE
    + """
    class Engine(FakeEngine):
        def drain(self, timeout_s):
            self.state = "draining"
            threading.Thread(target=self.release_when_told, daemon=True).start()
            return super().drain(timeout_s)

        def release_when_told(self):
            os.read(0, 1)
            self.release()

    engine = Engine(lambda request: [Piece("a", (1,)), HOLD, finished(request)])
"""
)

FINISHES = HOLDING + "    serve(engine, drain_s=600, delay_s=0.1)\n"

CUTS = HOLDING + "    serve(engine, drain_s=0.2, delay_s=0.0)\n"

LOADS = (
    PREAMBLE
    + """
    def load(report_phase):
        report_phase("reading weights")
        worker.progress.begin(1000)
        worker.progress.add(10)
        threading.Event().wait()

    worker = Worker("tiny", load)
    worker.start()
    serve(worker, drain_s=600, delay_s=0.0)
"""
)

EARLY = """
    import sys
    import threading
    from server.lifecycle import leave_on_signals
    leave_on_signals()
    print("0", flush=True)
    threading.Event().wait(30)
    sys.exit(3)
"""

STICKS = (
    PREAMBLE
    + """
    model = tiny_model()
    step, num_steps = model.step, 0

    def sticky(tokens, cache):
        global num_steps
        num_steps += 1
        if num_steps > 3:
            threading.Event().wait()
        return step(tokens, cache)

    model.step = sticky
    worker = Worker("tiny", lambda report: LoadedModel(model, byte_tokenizer()), stall_s=3.0)
    worker.start()
    serve(worker, drain_s=600, delay_s=600)
"""
)


@contextlib.contextmanager
def process_of(code):
    command = [sys.executable, "-c", textwrap.dedent(code)]
    with subprocess.Popen(
        command,
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield process, f"http://127.0.0.1:{process.stdout.readline().strip()}"
        finally:
            process.kill()


def reply_of(address, path, status):
    """The first reply with that status."""
    found = []

    def has_come():
        with contextlib.suppress(httpx2.TransportError):
            found.append(httpx2.get(f"{address}{path}", timeout=300))
        return found and found[-1].status_code == status

    wait_for(has_come, what=lambda: f"{path} never answered {status}")
    return found[-1]


def read_stream(address, started):
    """All lines of a stream that had begun before the signal came."""
    body = {"prompt": "a", "stream": True, "max_tokens": 20, "ignore_eos": True}
    with httpx2.stream("POST", f"{address}{URL}", json=body, timeout=300) as response:
        lines = (line for line in response.iter_lines() if line)
        first = next(lines)
        started.release()
        return [first, *lines]


def post(address, prompt="a"):
    return httpx2.post(f"{address}{URL}", json={"prompt": prompt, "ignore_eos": True}, timeout=300)


def is_running(address, count):
    return f"infmoe_running {count}.0" in httpx2.get(f"{address}/metrics", timeout=300).text


def under_load(address, process):
    """Three streams and two plain requests, a signal, and what becomes of them all."""
    started = threading.Semaphore(0)
    with ThreadPoolExecutor(5) as pool:
        streams = [pool.submit(read_stream, address, started) for _ in range(3)]
        replies = [pool.submit(post, address) for _ in range(2)]
        for _ in streams:
            assert started.acquire(timeout=300)
        wait_for(lambda: is_running(address, 5))
        process.send_signal(signal.SIGTERM)
        yield
        yield [stream.result(300) for stream in streams], [reply.result(300) for reply in replies]


def test_under_load_all_is_finished_new_work_refused_and_the_exit_clean():
    with process_of(FINISHES) as (process, address):
        steps = under_load(address, process)
        next(steps)
        refused = reply_of(address, "/health/ready", 503)
        assert refused.json()["status"] == "draining"
        assert reply_of(address, "/health/live", 200)
        assert reply_of(address, "/health/startup", 200)
        response = post(address, "b")
        assert response.status_code == 503
        assert response.json()["error"]["code"] == "shutting_down"
        assert int(response.headers["retry-after"]) >= 1
        process.stdin.write("\n")
        process.stdin.flush()
        streams, replies = next(steps)
        assert all('"finish_reason":"stop"' in lines[-2] for lines in streams)
        assert all(lines[-1] == "data: [DONE]" for lines in streams)
        assert [reply.status_code for reply in replies] == [200, 200]
        assert process.wait(300) == 0
        assert process.stdout.read().split() == ["closed", "ended"]
        assert process.stderr.read() == ""


def test_what_takes_too_long_gets_an_error_and_the_exit_is_clean_all_the_same():
    with process_of(CUTS) as (process, address):
        steps = under_load(address, process)
        next(steps)
        streams, replies = next(steps)
        assert all('"shutting_down"' in lines[-2] for lines in streams)
        assert all(lines[-1] == "data: [DONE]" for lines in streams)
        for reply in replies:
            assert reply.status_code == 503
            assert reply.json()["error"]["code"] == "shutting_down"
            assert "retry-after" in reply.headers
        assert process.wait(300) == 0


def test_an_idle_server_listens_on_for_a_while_but_not_for_who_stops_it_by_hand():
    def drained_after_s(number, delay_s):
        engine = FakeEngine()
        config = uvicorn.Config(create_app(engine, Settings()), log_config=None, lifespan="off")
        config.load()
        server = DrainingServer(config, engine, 600.0, delay_s)
        server.handle_exit(number, None)
        begin_s = time.monotonic()
        asyncio.run(asyncio.wait_for(server.main_loop(), 300))
        assert engine.state == "stopped"
        return time.monotonic() - begin_s

    assert drained_after_s(signal.SIGTERM, 0.5) >= 0.5
    assert drained_after_s(signal.SIGTERM, 0.0) < 300
    assert drained_after_s(signal.SIGINT, 600.0) < 300


def test_while_it_loads_a_server_tells_how_far_it_is_and_leaves_at_once():
    with process_of(LOADS) as (process, address):
        facts = reply_of(address, "/health/startup", 503).json()
        assert (facts["phase"], facts["read_bytes"]) == ("reading weights", 10)
        with httpx2.stream("GET", f"{address}/health/startup/events", timeout=300) as response:
            lines = (line for line in response.iter_lines() if line)
            assert '"status": "loading"' in next(lines)
            process.send_signal(signal.SIGTERM)
            assert '"status": "draining"' in list(lines)[-1]
        assert process.wait(300) == 0
        assert process.stdout.read().split() == ["closed"]


def test_before_there_is_a_server_a_signal_ends_the_process_well():
    with process_of(EARLY) as (process, _):
        process.send_signal(signal.SIGTERM)
        assert process.wait(300) == 0


def test_an_engine_that_is_stuck_ends_the_process_after_telling_everybody():
    with process_of(STICKS) as (process, address):
        reply_of(address, "/health/ready", 200)
        with ThreadPoolExecutor(2) as pool:
            stream = pool.submit(read_stream, address, threading.Semaphore(0))
            reply = pool.submit(post, address)
            lines, response = stream.result(300), reply.result(300)
        assert '"error"' in lines[-2]
        assert lines[-1] == "data: [DONE]"
        assert response.status_code >= 500
        assert process.wait(300) == 1
        assert process.stdout.read().split() == ["closed"]
        printed = process.stderr.read()
        last = printed.splitlines()[-1]
        assert last.startswith("infmoe: error: the engine has ended: a step has taken ")
        assert "in sticky" in printed  # where it is stuck
        assert "terminate called" not in printed
