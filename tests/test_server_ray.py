"""The ingress around fakes, and a service on a real Ray: routed, streamed, killed, updated, ended.

Ray is an extra (`pip install -e ".[ray]"`); without it only its absence is tested.
"""

import asyncio
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2
import pytest

from server.settings import Settings
from tests.adapter_folders import adapter_files, vectors, write_files

ROOT = Path(__file__).parents[1]
GREETING = re.compile(r"listening on (http://\S+);")
URL = "/v1/completions"


def run_command(*arguments, preamble=""):
    code = (
        f"import sys\n{preamble}\nfrom server.__main__ import main\nmain({['ray', *arguments]!r})"
    )
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_without_ray_one_line_says_what_to_install():
    done = run_command("models/demo", "--replicas", "1", preamble="sys.modules['ray'] = None")
    assert done.returncode == 1
    assert done.stderr.startswith("infmoe: error: ")
    assert done.stderr.count("\n") == 1
    assert "pip install 'infmoe[ray]'" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (("models/demo", "--replicas", "0"), 1, "0 replicas serve nobody"),
        (("no/such/model",), 1, "is not a directory"),
        (("models/demo", "--host", "0.0.0.0"), 1, "no key is set"),
        (("models/demo", "--keys-file", "no/keys.jsonl"), 1, "no/keys.jsonl"),
        (("models/demo", "--set", "record_routing=x.npz"), 1, "replicas cannot share"),
        ((), 2, "give a model directory"),
    ],
)
def test_mistakes_are_told_before_ray_starts(arguments, status, message):
    # a Ray that cannot even be imported: it was not asked for
    done = run_command(*arguments, preamble="sys.modules['ray'] = None")
    assert done.returncode == status
    assert message in done.stderr
    assert "pip install" not in done.stderr


# --- the ingress around a fake handle


def head(kind="application/json", status=200):
    headers = [(b"content-type", kind.encode()), (b"x-request-id", b"twice")]
    return {"type": "http.response.start", "status": status, "headers": headers}


def piece(body, more=False):
    return {"type": "http.response.body", "body": body, "more_body": more}


STREAM = head("text/event-stream; charset=utf-8")
HANG = object()


class FakeReply:
    """Sends the steps of a script; an exception among them is raised."""

    def __init__(self, steps):
        self.steps = iter(steps)
        self.is_cancelled = False

    def __aiter__(self):
        return self

    async def __anext__(self):
        step = next(self.steps, None)
        if step is None:
            raise StopAsyncIteration
        if step is HANG:
            await asyncio.Event().wait()
        if isinstance(step, Exception):
            raise step
        return step

    def cancel(self):
        self.is_cancelled = True


class FakeHandle:
    """A deployment handle whose calls are answered by one script after the other."""

    def __init__(self, *scripts):
        self.scripts = list(scripts)
        self.calls = []
        self.replies = []

    def options(self, *, method_name, stream, multiplexed_model_id):
        assert (method_name, stream) == ("answer", True)
        self.wanted = multiplexed_model_id
        return self

    def remote(self, call):
        self.calls.append(call)
        self.replies.append(FakeReply(self.scripts[len(self.calls) - 1]))
        return self.replies[-1]


def died():
    return pytest.importorskip("ray.exceptions").ActorDiedError()


def ask(handle, path=URL, body=b'{"model": "m"}', method="POST", leaves=False, **settings):
    pytest.importorskip("ray.serve")
    from server.ray_ingress import build_ingress

    scope = {
        "type": "http",
        "method": method,
        "path": path,
        "query_string": b"",
        "headers": [(b"content-type", b"application/json"), (b"host", b"localhost")],
    }
    sent = []

    async def run():
        came = [{"type": "http.request", "body": body}]

        async def receive():
            if came:
                return came.pop()
            if not leaves:
                await asyncio.Event().wait()
            return {"type": "http.disconnect"}

        async def send(message):
            sent.append(message)

        app = build_ingress(handle, Settings(**settings))
        await asyncio.wait_for(app(scope, receive, send), 300)

    asyncio.run(run())
    return sent


def error_of(sent):
    text = b"".join(message["body"] for message in sent[1:]).decode()
    return json.loads(text.removeprefix("data: ").partition("\n\n")[0])["error"]


def test_ingress_hands_on_what_comes():
    handle = FakeHandle([[head(), piece(b"{")], [piece(b"}")]])
    sent = ask(handle, body=b'{"model": "m", "adapter": "task"}')
    assert [message["type"][14:] for message in sent] == ["start", "body", "body"]
    assert sent[1:] == [piece(b"{"), piece(b"}")]
    assert (b"x-request-id", b"twice") not in sent[0]["headers"]
    assert handle.wanted == "task"
    assert handle.calls[0].body == b'{"model": "m", "adapter": "task"}'


def test_ingress_asks_another_replica_if_one_dies_before_the_reply():
    handle = FakeHandle([died()], [[head(status=201)], died()], [[head(), piece(b"{}")]])
    sent = ask(handle)
    assert len(handle.calls) == 3
    assert sent[0]["status"] == 200
    assert sent[1:] == [piece(b"{}")]


def test_ingress_gives_up_in_the_shape_of_all_errors():
    sent = ask(FakeHandle([died()], [died()], [died()]))
    assert sent[0]["status"] == 503
    assert error_of(sent)["code"] == "replica_died"
    assert b"x-content-type-options" in dict(sent[0]["headers"])
    assert b"retry-after" in dict(sent[0]["headers"])


def test_ingress_does_not_repeat_what_changes_something():
    handle = FakeHandle([died()])
    sent = ask(handle, path="/admin/adapters/x/pin")
    assert sent[0]["status"] == 503
    assert len(handle.calls) == 1


def test_ingress_ends_a_broken_stream_with_an_error():
    handle = FakeHandle([[STREAM, piece(b"data: 1\n\n", more=True)], died()])
    sent = ask(handle)
    assert len(handle.calls) == 1
    assert sent[1]["body"] == b"data: 1\n\n"
    assert sent[2]["body"].endswith(b"data: [DONE]\n\n")
    assert not sent[2].get("more_body")
    assert error_of([sent[0], sent[2]])["code"] == "replica_died"


def test_ingress_breaks_off_half_a_body_of_another_kind():
    pytest.importorskip("ray.serve")
    from server.errors import ApiError

    with pytest.raises(ApiError, match="died"):
        ask(FakeHandle([[head(), piece(b"{", more=True)], died()]))


def test_ingress_says_nothing_after_the_end():
    assert len(ask(FakeHandle([[head(), piece(b"{}")], died()]))) == 2


def test_ingress_does_not_wait_for_ever():
    sent = ask(FakeHandle([HANG]), path="/health/ready", method="GET", body=b"")
    assert sent[0]["status"] == 503
    assert error_of(sent)["code"] == "no_replica"


def test_ingress_tells_of_no_replica():
    pytest.importorskip("ray.serve")
    from ray.serve.exceptions import BackPressureError

    sent = ask(FakeHandle([BackPressureError(1, 1)]))
    assert (sent[0]["status"], error_of(sent)["code"]) == (503, "no_replica")


def test_ingress_hides_its_own_mistakes():
    sent = ask(FakeHandle([ValueError("secret")]))
    assert (sent[0]["status"], error_of(sent)["code"]) == (500, "internal_error")
    assert "secret" not in str(sent)


def test_ingress_lets_go_of_a_reply_whose_client_has_left():
    handle = FakeHandle([[STREAM, piece(b"data: 1\n\n", more=True)], HANG])
    ask(handle, leaves=True)
    assert all(reply.is_cancelled for reply in handle.replies)


def test_ingress_bounds_bodies():
    handle = FakeHandle()
    sent = ask(handle, body=b'"' + b"a" * 100 + b'"', max_body_bytes=50)
    assert sent[0]["status"] == 413
    assert handle.calls == []


def test_replicas_scale_between_two_numbers():
    pytest.importorskip("ray.serve")
    from server.ray_cluster import Cluster
    from server.ray_serve import how_many

    settings = Settings(max_rows=8)
    fixed = Cluster(replicas=2, max_replicas=2, address="auto")
    assert how_many(settings, fixed) == {"num_replicas": 2}
    scaled = how_many(settings, Cluster(replicas=2, max_replicas=5, address="auto"))
    scaling = scaled["autoscaling_config"]
    assert (scaling.min_replicas, scaling.max_replicas) == (2, 5)
    assert scaling.target_ongoing_requests == 8


def test_the_ingress_stays_when_the_model_changes():
    pytest.importorskip("ray.serve")
    from server.ray_serve import bounds_of

    one, other = Settings(model=Path("a"), max_rows=2), Settings(model=Path("b"), max_rows=3)
    assert bounds_of(one) == bounds_of(other)
    assert bounds_of(one) != bounds_of(Settings(max_body_bytes=9))


# --- a service on a real Ray


def test_an_address_without_ray_is_told_in_one_line(tmp_path):
    pytest.importorskip("ray.serve")
    preamble = f"import os; os.environ['RAY_TMPDIR'] = {str(tmp_path)!r}"
    done = run_command("models/demo", "--address", "auto", preamble=preamble)
    assert done.returncode == 1
    assert "infmoe: error: Ray: " in done.stderr.splitlines()[-1]


def descendants(pid):
    """All processes below one, by id, with their command lines."""
    parents, names = {}, {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with contextlib.suppress(OSError):
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                names[int(entry.name)] = (entry / "cmdline").read_text().replace("\0", " ")
                parents[int(entry.name)] = int(fields[1])
    found = {}
    for child in parents:
        above = child
        while above in parents and above != pid:
            above = parents[above]
        if above == pid and child != pid:
            found[child] = names[child]
    return found


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_for(condition, wait_s=120.0):
    until = time.monotonic() + wait_s
    while not (found := condition()):
        assert time.monotonic() < until
        time.sleep(0.05)
    return found


class Service:
    """`infmoe ray` of two replicas of the demo, in a process."""

    def __init__(self, home, adapters):
        self.home = home  # short: Ray keeps sockets below it, whose paths have a limit
        self.env = {
            **os.environ,
            # kernels that the tests began by compiling, wherever they are kept
            "XDG_CACHE_HOME": os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache"),
            "HOME": str(home),  # Ray writes the secret of its cluster there
            "RAY_TMPDIR": str(home),
            "INFMOE_ADAPTERS": str(adapters),
            "INFMOE_DRAIN_DELAY_S": "0",
            "OMP_NUM_THREADS": "1",
        }
        self.log = home / "log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                self.command("--port", "0"), cwd=ROOT, env=self.env, stderr=log, stdout=log
            )
        self.url = ""

    def command(self, *arguments):
        sizes = ("--replicas", "2", "--replica-cpus", "0.1", "--memory", "1200MiB")
        return [sys.executable, "-m", "server", "ray", "models/demo", *sizes, *arguments]

    def wait(self):
        def greeting():
            assert self.process.poll() is None, self.log.read_text()
            return GREETING.search(self.log.read_text())

        self.url = wait_for(greeting, 300.0)[1]

    def replicas(self):
        names = descendants(self.process.pid)
        return [pid for pid, name in names.items() if "ServeReplica:infmoe:Replica" in name]

    def end(self):
        """Whatever has come of it, nothing goes on."""
        left = descendants(self.process.pid)
        if self.process.poll() is None:
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(300)
        for pid in (self.process.pid, *left):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait(300)


@pytest.fixture(scope="module")
def service():
    pytest.importorskip("ray.serve")
    with tempfile.TemporaryDirectory(prefix="r", ignore_cleanup_errors=True) as folder:
        home = Path(folder)
        width = json.loads((ROOT / "models/demo/config.json").read_text())["d_model"]
        for name in ("one", "two", "three"):
            files = adapter_files(tensor=vectors(3, width=width), token_dim=width)
            write_files(home / "adapters" / name, files)
        made = Service(home, home / "adapters")
        try:
            made.wait()
            yield made
        finally:
            made.end()


def post(service, **fields):
    body = {"prompt": "In the beginning", "max_tokens": 4, "temperature": 0, **fields}
    return httpx2.post(f"{service.url}{URL}", json=body, timeout=300)


def frames_of(text):
    frames = [line.removeprefix("data: ") for line in text.split("\n\n") if line[:1] != ":"]
    assert frames[-2:] == ["[DONE]", ""]
    return [json.loads(frame) for frame in frames[:-2]]


def metric(service, name):
    text = httpx2.get(f"{service.url}/metrics", timeout=300).text
    return {
        line.rpartition(" ")[0]: float(line.rpartition(" ")[2])
        for line in text.splitlines()
        if line.startswith(name)
    }


@pytest.mark.slow
def test_streams_add_up_to_the_whole(service):
    whole = post(service, max_tokens=12).json()
    frames = frames_of(post(service, max_tokens=12, stream=True).text)
    assert "".join(frame["choices"][0]["text"] for frame in frames) == whole["choices"][0]["text"]
    assert len(frames) > 2


@pytest.mark.slow
def test_requests_for_an_adapter_go_to_who_holds_it(service):
    for name in ("one", "two", "three"):
        replies = [post(service, model=name) for _ in range(8)]
        assert {reply.headers["x-adapter"].partition("@")[0] for reply in replies} == {name}
        assert len({reply.headers["x-replica"] for reply in replies}) == 1
    loads = metric(service, "infmoe_adapter_loads_total")
    assert sum(loads.values()) == 3, loads  # each was read once, by one replica
    assert len({post(service).headers["x-replica"] for _ in range(30)}) == 2


@pytest.mark.slow
def test_errors_come_through_as_they_are(service):
    reply = post(service, model="nobody")
    assert (reply.status_code, reply.json()["error"]["code"]) == (404, "model_not_found")
    reply = httpx2.post(f"{service.url}{URL}", content=b"x", timeout=300)
    assert (reply.status_code, reply.json()["error"]["code"]) == (415, "unsupported_content_type")


@pytest.mark.slow
def test_a_client_that_hangs_up_frees_its_row(service):
    name = 'infmoe_finished_total{reason="cancelled"'
    before = sum(metric(service, name).values())
    body = {"prompt": "a", "max_tokens": 900, "ignore_eos": True, "stream": True}
    with httpx2.stream("POST", f"{service.url}{URL}", json=body, timeout=300) as reply:
        next(reply.iter_bytes())
    wait_for(lambda: sum(metric(service, name).values()) == before + 1)


def load(service, index):
    """One request; how it ended, in a word. Anything that is neither is a failure."""
    is_stream = index % 2 == 0
    reply = post(service, max_tokens=40, ignore_eos=True, stream=is_stream)
    if reply.status_code != 200:
        return reply.json()["error"]["code"]
    if not is_stream:
        assert reply.json()["choices"][0]["finish_reason"] == "length"
        return "finished"
    last = frames_of(reply.text)[-1]
    if "error" in last:
        return last["error"]["code"]
    assert last["choices"][0]["finish_reason"] == "length"
    return "finished"


@pytest.mark.slow
def test_a_killed_replica_loses_no_request_and_is_replaced(service):
    victim = service.replicas()[0]
    with ThreadPoolExecutor(16) as pool:
        ends = [pool.submit(load, service, index) for index in range(96)]
        wait_for(lambda: sum(end.done() for end in ends) >= 16)
        os.kill(victim, signal.SIGKILL)
        told = [end.result() for end in ends]
    assert set(told) <= {"finished", "replica_died"}
    assert told.count("finished") >= 80  # a stream that has begun cannot begin anew
    assert {told[index] for index in range(1, 96, 2)} == {"finished"}  # what has not, can
    wait_for(lambda: len(service.replicas()) == 2 and victim not in service.replicas())
    wait_for(lambda: len(metric(service, "infmoe_build_info")) == 2)
    assert post(service).status_code == 200


@pytest.mark.slow
def test_an_update_replaces_replicas_under_load(service):
    old = service.replicas()
    command = service.command("--address", "auto", "--set", "model_name=second")
    update = subprocess.Popen(
        command, cwd=ROOT, env=service.env, stderr=subprocess.PIPE, stdout=subprocess.PIPE
    )
    told = []
    try:
        with ThreadPoolExecutor(2) as pool:
            while update.poll() is None:
                told += pool.map(lambda index: load(service, index), range(2))
    finally:
        update.kill()
        error = update.communicate()[1].decode()
    assert update.returncode == 0, error
    assert set(told) == {"finished"}
    assert post(service).json()["model"] == "second"
    wait_for(lambda: not set(old) & set(service.replicas()))


@pytest.mark.slow
def test_an_update_that_cannot_load_changes_nothing(service):
    broken = service.home / "broken"
    broken.mkdir()
    (broken / "config.json").write_text("{}")
    command = [sys.executable, "-m", "server", "ray", str(broken), "--address", "auto"]
    command += ["--replicas", "2", "--replica-cpus", "0.1"]
    done = subprocess.run(
        command, cwd=ROOT, env=service.env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 1
    assert "infmoe: error: the replicas do not start" in done.stderr
    assert 'no "format"' in done.stderr
    assert post(service).json()["model"] == "second"


@pytest.mark.slow
def test_the_end_waits_for_what_is_under_way_and_leaves_nothing(service):
    everything = descendants(service.process.pid)
    assert any("gcs_server" in name for name in everything.values())
    body = {"prompt": "a", "max_tokens": 300, "ignore_eos": True, "stream": True}
    with httpx2.stream("POST", f"{service.url}{URL}", json=body, timeout=300) as reply:
        pieces = reply.iter_text()
        text = next(pieces)
        service.process.terminate()
        text += "".join(pieces)
    assert frames_of(text)[-1]["choices"][0]["finish_reason"] == "length"
    assert service.process.wait(300) == 0, service.log.read_text()
    wait_for(lambda: not any(is_running(pid) for pid in everything))
