"""What is counted, under which names and labels; Prometheus' own checker has nothing to say."""

import asyncio
import json
import shutil
import subprocess
import threading
from dataclasses import replace

import httpx2
import pytest
import torch
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import generate_latest
from starlette.testclient import TestClient

from engine.adapter_states import AdapterInfo, StoreSnapshot
from engine.errors import RequestError
from engine.request import Failed, Piece, Request
from offload.pipeline import PipelineStats
from server.app import create_app
from server.keys import hash_key
from server.metrics import Meter, Metrics
from server.metrics_adapters import BASE, MAX_NAMES, OTHER, AdapterCollector, AdapterCounts
from server.settings import Settings
from tests.fakes import HOLD, FakeEngine, finished, live_server, tiny_worker
from tests.test_server_health import client_of, in_state, loading_engine, samples_of
from tests.test_server_info import planned_engine
from tests.tiny import tiny_model
from tests.waiting import wait_for

URL = "/v1/completions"
KEY = "a-key-for-tests-only"

needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="promtool is not installed"
)


def check_metrics(text):
    assert "infmoe_" in text
    checked = subprocess.run(
        ["promtool", "check", "metrics"], input=text, capture_output=True, text=True, check=False
    )
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, "", "")


def read(client):
    return client.get("/metrics").text


def reasons_of(client):
    samples = samples_of(client)
    return {
        dict(labels)["reason"]: value
        for (name, *labels), value in samples.items()
        if name == "infmoe_finished_total"
    }


@needs_promtool
def test_promtool_accepts_a_server_that_loads_and_one_that_is_idle():
    check_metrics(read(client_of(loading_engine(250))))
    check_metrics(read(client_of(FakeEngine())))


@needs_promtool
def test_promtool_accepts_a_server_under_load():
    engine = planned_engine()
    engine.script = lambda request: [Piece("a", (1,)), HOLD, Piece("b", (2,)), finished(request)]
    with live_server(engine) as address:
        body = {"prompt": ["ab", "c"], "stream": True}
        with httpx2.stream("POST", f"{address}{URL}", json=body, timeout=300) as response:
            assert engine.held.wait(300)
            busy = httpx2.get(f"{address}/metrics", timeout=300).text
            engine.release()
            response.read()
        httpx2.get(f"{address}/no/such", timeout=300)
        check_metrics(busy)
        check_metrics(httpx2.get(f"{address}/metrics", timeout=300).text)
    assert "infmoe_running 2.0" in busy


def test_loading_is_told_in_bytes():
    samples = samples_of(client_of(loading_engine(250)))
    assert samples["infmoe_load_read_bytes",] == 250
    assert samples["infmoe_load_size_bytes",] == 1000
    assert samples["infmoe_state", ("state", "loading")] == 1
    assert samples["infmoe_state", ("state", "ready")] == 0


def test_what_runs_is_told():
    samples = samples_of(client_of(FakeEngine()))
    (build,) = [key for key in samples if key[0] == "infmoe_build_info"]
    assert dict(build[1:])["model"] == "org/tiny"
    assert dict(build[1:])["torch"] == torch.__version__
    assert samples["infmoe_process_resident_memory_bytes",] > 2**20


def test_errors_are_counted_by_code():
    client = client_of(FakeEngine(room=0))
    client.post(URL, json={"prompt": "a"})
    client.post(URL, json={"prompt": "a", "model": "no-such-model"})
    client.post(URL, json={"prompt": "a", "model": "no-such-model-either"})
    client.get("/no/such")
    told = {
        dict(labels)["code"]: value
        for (name, *labels), value in samples_of(client).items()
        if name == "infmoe_errors_total"
    }
    assert told == {"server_overloaded": 1, "model_not_found": 2, "not_found": 1}


def test_work_that_is_refused_while_loading_is_counted():
    client = client_of(in_state("loading"))
    client.post(URL, json={"prompt": "a"})
    assert samples_of(client)["infmoe_errors_total", ("code", "model_loading")] == 1


def test_limits_are_counted_by_reason():
    metrics = Metrics(FakeEngine())
    metrics.record(URL, 429, 0.1, {"error": "rate_limit_exceeded", "limit": "tokens"})
    text = generate_latest(metrics.registry).decode()
    assert 'infmoe_rate_limited_total{reason="tokens"} 1.0' in text


@pytest.mark.parametrize(
    ("ends", "reasons"),
    [
        (lambda r: finished(r, "length"), {"length": 1}),
        (lambda r: replace(finished(r, "length"), stop_reason="timeout"), {"timeout": 1}),
        (lambda r: Failed("broke"), {"failed": 1}),
        (lambda r: Failed("late", is_late=True), {"timeout": 1}),
        (lambda r: Failed("over", is_shutdown=True), {"shutdown": 1}),
    ],
)
def test_choices_are_counted_by_their_end(ends, reasons):
    client = client_of(FakeEngine(lambda request: [Piece("a", (1,)), ends(request)]))
    client.post(URL, json={"prompt": "a"})
    assert reasons_of(client) == reasons


def test_choices_that_another_one_took_down_are_cancelled():
    def script(request):
        if request.encoder_ids == (3 + ord("x"),) or request.encoder_ids[0] == 3 + ord("x"):
            return [Failed("broke")]
        return [Piece("a", (1,)), HOLD, finished(request)]

    client = client_of(FakeEngine(script))
    client.post(URL, json={"prompt": ["a", "x", "b"]})
    assert reasons_of(client) == {"failed": 1, "cancelled": 2}


def test_a_client_that_goes_cancels_its_choices():
    engine = FakeEngine(lambda request: [Piece("a", (1, 2)), HOLD, finished(request)])
    with live_server(engine) as address:
        body = {"prompt": "ab", "stream": True, "n": 3}
        with httpx2.stream("POST", f"{address}{URL}", json=body, timeout=300) as response:
            next(response.iter_lines())
            assert engine.held.wait(300)
        assert engine.idle.wait(300)
        told = f'infmoe_requests_total{{route="{URL}",status="499"}} 1.0'
        wait_for(lambda: told in httpx2.get(f"{address}/metrics", timeout=300).text)
        text = httpx2.get(f"{address}/metrics", timeout=300).text
        assert 'infmoe_finished_total{reason="cancelled"} 3.0' in text
        assert "infmoe_generated_tokens_total 6.0" in text  # they were made all the same


def test_tokens_that_no_piece_told_are_counted_at_the_end():
    client = client_of(FakeEngine(lambda r: [Piece("a", (1,)), finished(r, num_tokens=5)]))
    client.post(URL, json={"prompt": "a"})
    samples = samples_of(client)
    assert samples["infmoe_generated_tokens_total",] == 5
    assert samples["infmoe_choice_generated_tokens_sum",] == 5
    assert samples["infmoe_adapter_generated_tokens_total", ("adapter", BASE)] == 5
    assert samples["infmoe_adapter_requests_total", ("adapter", BASE)] == 1


def test_labels_stay_few_whatever_clients_send():
    client = client_of(FakeEngine())
    for i in range(30):
        client.get(f"/no/such/{i}")
        client.get(f"/v1/models/m{i}")
        client.post(URL, json={"prompt": "a", "adapter": f"a{i}", "user": f"u{i}"})
        client.request(f"M{i}", URL)
    series = {key for key in samples_of(client) if "bucket" not in key[0]}
    assert len(series) < 150
    assert not any("a7" in str(key) or "u7" in str(key) for key in series)


class FakeStore:
    """Adapters by name, with their states."""

    def __init__(self, **states):
        self.states = states

    def snapshot(self):
        num = sum(state in ("resident", "pinned") for state in self.states.values())
        return StoreSnapshot(
            names=len(self.states),
            resident=num,
            pinned=0,
            used_bytes=100 * num,
            limit_bytes=1000,
            loads=7,
            failures=1,
        )

    def tell_current(self, name):
        if name not in self.states:
            raise RequestError(f"there is no adapter {name}")
        return AdapterInfo(name=name, version="1", state=self.states[name])


def counted_store(**states):
    registry = CollectorRegistry()
    counts = AdapterCounts(registry)
    store = FakeStore(**states)
    registry.register(AdapterCollector(store, counts))
    return store, counts, lambda: generate_latest(registry).decode()


def test_adapters_are_told():
    _, counts, text = counted_store(one="resident", two="pinned", three="discovered")
    counts.count_request("one")
    counts.count_prompt("one", 5)
    counts.count_generated("two", 6)
    counts.count_request(None)
    told = text()
    assert "infmoe_adapters 3.0" in told
    assert "infmoe_adapters_resident 2.0" in told
    assert "infmoe_adapter_memory_bytes 200.0" in told
    assert "infmoe_adapter_limit_bytes 1000.0" in told
    assert "infmoe_adapter_loads_total 7.0" in told
    assert "infmoe_adapter_failures_total 1.0" in told
    assert 'infmoe_adapter_requests_total{adapter="one"} 1.0' in told
    assert 'infmoe_adapter_prompt_tokens_total{adapter="one"} 5.0' in told
    assert 'infmoe_adapter_generated_tokens_total{adapter="two"} 6.0' in told
    assert f'infmoe_adapter_requests_total{{adapter="{BASE}"}} 1.0' in told


def test_counts_of_adapters_that_left_are_told_once_more_and_dropped():
    store, counts, text = counted_store(one="resident", two="resident", gone="resident")
    for name in ("one", "two", "gone"):
        counts.count_request(name)
    store.states = {"one": "resident", "two": "evicted"}
    assert {'{adapter="two"}', '{adapter="gone"}'} <= set(labels_of(text()))
    assert set(labels_of(text())) == {'{adapter="one"}'}
    counts.count_request("two")
    assert 'infmoe_adapter_requests_total{adapter="two"} 1.0' in text()


def labels_of(text):
    lines = [line for line in text.splitlines() if line.startswith("infmoe_adapter_requests_total")]
    return [line[line.index("{") : line.index("}") + 1] for line in lines]


def test_names_of_adapters_are_bounded():
    _, counts, text = counted_store()
    for i in range(MAX_NAMES + 20):
        counts.count_request(f"a{i}")
    told = labels_of(text())
    assert len(told) == MAX_NAMES + 1
    assert f'{{adapter="{OTHER}"}}' in told


@needs_promtool
def test_promtool_accepts_adapters():
    _, counts, text = counted_store(one="resident")
    counts.count_generated("one", 3)
    check_metrics(text())


def test_expert_counts_are_those_of_the_engine():
    engine = FakeEngine()
    engine.experts = PipelineStats(hits=3, misses=2, host_loads=1, stall_s=0.5)
    samples = samples_of(TestClient(create_app(engine, Settings())))
    assert samples["infmoe_expert_hits_total",] == 3
    assert samples["infmoe_expert_stall_seconds_total",] == 0.5


def test_a_keys_limits_tell_which_one_it_was(tmp_path):
    keys = tmp_path / "keys"
    records = [
        {"name": "customer-a", "sha256": hash_key("slow-key"), "requests_per_minute": 1},
        {"name": "customer-b", "sha256": hash_key("short-key"), "tokens_per_minute": 4},
        {"name": "admin", "sha256": hash_key("admin-key"), "scopes": ["metrics"]},
    ]
    keys.write_text("\n".join(json.dumps(record) for record in records))
    client = TestClient(create_app(FakeEngine(), Settings(keys_file=keys)))

    def post(key):
        headers = {"authorization": f"Bearer {key}"}
        return client.post(URL, json={"prompt": "a", "max_tokens": 9}, headers=headers).status_code

    assert [post("slow-key"), post("slow-key"), post("short-key")] == [200, 429, 429]
    text = client.get("/metrics", headers={"authorization": "Bearer admin-key"}).text
    assert 'infmoe_rate_limited_total{reason="requests"} 1.0' in text
    assert 'infmoe_rate_limited_total{reason="tokens"} 1.0' in text
    assert 'infmoe_errors_total{code="rate_limit_exceeded"} 2.0' in text
    assert "customer" not in text


def test_what_became_of_the_choices_is_told_for_the_log():
    requests = [Request(request_id=name, encoder_ids=(5, 6, 7)) for name in "abc"]
    meter = Meter(Metrics(FakeEngine()), requests)
    meter.see(0, Piece("x", (1,)))
    meter.see(0, finished(requests[0], num_tokens=2))
    meter.see(1, Piece("y", (1, 2, 3)))
    told = {"choices": 3, "prompt_tokens": 3, "completion_tokens": 5, "finish": "cancelled,stop"}
    assert meter.account() == told
    assert Meter(Metrics(FakeEngine())).account() == {}


def test_a_meter_is_closed_once():
    metrics, state = Metrics(FakeEngine()), {}
    meter = Meter(metrics, [Request(request_id="a", encoder_ids=(5,))], state)
    assert state["meter"] is meter
    meter.close()
    meter.close()
    text = generate_latest(metrics.registry).decode()
    assert 'infmoe_finished_total{reason="cancelled"} 1.0' in text


def test_tokens_of_the_step_under_way_are_counted_after_the_end():
    metrics = Metrics(FakeEngine())
    requests = [Request(request_id=name, encoder_ids=(5,)) for name in "ab"]
    meter = Meter(metrics, requests)
    assert meter.see(0, Piece("x", (1,))) == 1
    meter.close()
    assert meter.see(0, Piece("y", (2, 3))) == 2
    assert meter.see(0, finished(requests[0], num_tokens=4)) == 1  # a mark ended it
    assert meter.see(1, Failed("broken")) == 0
    lines = generate_latest(metrics.registry).decode().splitlines()
    assert "infmoe_generated_tokens_total 4.0" in lines
    assert f'infmoe_adapter_generated_tokens_total{{adapter="{BASE}"}} 4.0' in lines
    assert [line for line in lines if line.startswith("infmoe_finished_total{")] == [
        'infmoe_finished_total{reason="cancelled"} 2.0'
    ]


def test_who_goes_in_the_midst_of_a_step_pays_for_its_token():
    """A real engine whose step waits until the client has gone and its request is over."""
    reached, opened = threading.Event(), threading.Event()
    model = tiny_model()
    step = model.step

    def gated(*args):
        reached.set()
        assert opened.wait(300)
        return step(*args)

    model.step = gated
    body = {"prompt": "ab", "stream": True, "max_tokens": 50, "ignore_eos": True, "logprobs": 0}
    try:
        with tiny_worker(model) as worker, live_server(worker, api_key=KEY) as address:
            auth = {"authorization": f"Bearer {KEY}"}
            with httpx2.Client(base_url=address, headers=auth, timeout=300) as client:
                with client.stream("POST", URL, json=body):
                    assert reached.wait(300)
                wait_for(lambda: reasons_of(client).get("cancelled") == 1)
                samples = samples_of(client)
                assert samples["infmoe_generated_tokens_total",] == 0
                opened.set()
                wait_for(lambda: worker.stats().cancelled == 1 and not worker.stats().running)
                wait_for(lambda: samples_of(client)["infmoe_generated_tokens_total",] > 0)
                made = samples_of(client)["infmoe_generated_tokens_total",]
                (row,) = client.get("/v1/usage").json()["data"]
    finally:
        opened.set()
    assert row["completion_tokens"] == made
    assert row["requests"] == 1
    assert made <= 2  # its first, and that of the batch's step in the same turn


def test_tokens_that_a_client_never_reads_are_counted_all_the_same():
    """It reads nothing of its stream and goes: the engine made them, and its key pays for them."""
    made = [Piece("a", (1,)), Piece("b", (2, 3)), Piece("c", (4,)), HOLD]
    engine = FakeEngine(lambda request: [*made, finished(request)])
    app = create_app(engine, Settings(api_key=KEY))
    raw = json.dumps({"prompt": "ab", "stream": True}).encode()
    headers = [(b"content-type", b"application/json"), (b"authorization", f"Bearer {KEY}".encode())]

    async def ask():
        body = [{"type": "http.request", "body": raw, "more_body": False}]
        gone = asyncio.Event()

        async def receive():
            if body:
                return body.pop()
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message):
            if message["type"] == "http.response.body":
                await asyncio.Event().wait()  # the client does not read

        scope = {
            "type": "http",
            "http_version": "1.1",
            "method": "POST",
            "path": URL,
            "raw_path": URL.encode(),
            "query_string": b"",
            "headers": headers,
            "scheme": "http",
            "server": ("a", 1),
            "client": ("b", 1),
            "root_path": "",
        }
        task = asyncio.create_task(app(scope, receive, send))
        assert await asyncio.to_thread(engine.held.wait, 300)
        gone.set()
        await task

    asyncio.run(asyncio.wait_for(ask(), 300))
    with TestClient(app, headers={"authorization": f"Bearer {KEY}"}) as client:
        samples = samples_of(client)
        (row,) = client.get("/v1/usage").json()["data"]
    assert samples["infmoe_generated_tokens_total",] == 4
    assert samples["infmoe_adapter_generated_tokens_total", ("adapter", BASE)] == 4
    assert samples["infmoe_finished_total", ("reason", "cancelled")] == 1
    assert row["completion_tokens"] == 4
