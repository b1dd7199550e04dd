"""Probes, metrics, models, and the log line of a request."""

import asyncio
import json
import logging
import re

import pytest
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

from engine.errors import EngineStopped
from engine.progress import LoadProgress
from engine.request import Piece
from offload.pipeline import PipelineStats
from server.app import create_app
from server.health import follow_start
from server.settings import Settings
from tests.fakes import FakeEngine, finished

URL = "/v1/completions"
READY_PATHS = ["/health", "/health/ready", "/v2/health/ready"]


def client_of(engine):
    return TestClient(create_app(engine, Settings()))


def in_state(state, phase="reading weights"):
    engine = FakeEngine()
    engine.state, engine.phase = state, phase
    return engine


@pytest.mark.parametrize("state", ["starting", "loading", "ready", "draining", "failed", "stopped"])
@pytest.mark.parametrize("path", ["/health/live", "/v2/health/live"])
def test_live_in_every_state(state, path):
    response = client_of(in_state(state)).get(path)
    assert response.status_code == 200
    assert response.json() == {"status": "live", "live": True}


@pytest.mark.parametrize("path", READY_PATHS)
def test_ready(path):
    response = client_of(FakeEngine()).get(path)
    assert response.status_code == 200
    assert response.json() == {"status": "ready", "phase": "ready", "ready": True}


@pytest.mark.parametrize("state", ["starting", "loading", "draining", "failed", "stopped"])
@pytest.mark.parametrize("path", READY_PATHS)
def test_not_ready_says_why(state, path):
    response = client_of(in_state(state, "reading layer 3 of 24")).get(path)
    assert response.status_code == 503
    assert response.json() == {"status": state, "phase": "reading layer 3 of 24", "ready": False}
    assert int(response.headers["retry-after"]) >= 1


def loading_engine(read_bytes=0):
    """Loads 1000 bytes; 4 s have gone by."""
    now_s = 100.0
    engine = in_state("loading", "reading expert 3 of 8")
    engine.progress = LoadProgress(lambda: now_s)
    engine.progress.begin(1000)
    now_s = 104.0
    if read_bytes:
        engine.progress.add(read_bytes)
    return engine


def test_startup_tells_how_far_loading_has_come():
    response = client_of(loading_engine(250)).get("/health/startup")
    assert response.status_code == 503
    assert response.json() == {
        "status": "loading",
        "phase": "reading expert 3 of 8",
        "read_bytes": 250,
        "total_bytes": 1000,
        "elapsed_s": 4.0,
        "eta_s": 12.0,
        "idle_s": 0.0,
    }
    assert response.headers["retry-after"] == "12"


def test_startup_knows_no_end_before_the_first_byte():
    response = client_of(loading_engine()).get("/health/startup")
    assert response.json()["eta_s"] is None
    assert response.headers["retry-after"] == "5"


@pytest.mark.parametrize("state", ["ready", "draining", "failed", "stopped"])
def test_what_has_been_loaded_once_stays_started(state):
    response = client_of(in_state(state)).get("/health/startup")
    assert response.status_code == 200
    assert response.json()["status"] == state
    assert "eta_s" not in response.json()


@pytest.mark.parametrize("state", ["draining", "failed", "stopped"])
def test_what_was_never_loaded_has_not_started(state):
    assert client_of(NeverLoaded(state)).get("/health/startup").status_code == 503


class NeverLoaded(FakeEngine):
    """As a worker that ended before its model was there."""

    def __init__(self, state):
        super().__init__()
        self.state = self.phase = state

    @property
    def config(self):
        raise EngineStopped("the model is not loaded")

    @config.setter
    def config(self, value):
        pass


def read_events(engine, steps, keep_alive_s=60.0):
    """The frames of the startup events; before each but the first a step of loading is made."""

    async def scenario():
        told = []
        frames = follow_start(engine, keep_alive_s)
        async for frame in frames:
            told.append(frame)
            if steps:
                steps.pop(0)()
        return told

    return asyncio.run(asyncio.wait_for(scenario(), 300))


def test_startup_events_follow_loading_to_its_end():
    engine = loading_engine()

    def become_ready():
        engine.state = engine.phase = "ready"

    frames = read_events(engine, [lambda: engine.progress.add(500), become_ready])
    assert all(frame.startswith(b"data: ") and frame.endswith(b"}\n\n") for frame in frames)
    told = [json.loads(frame[6:]) for frame in frames]
    assert [(one["status"], one["read_bytes"]) for one in told] == [
        ("loading", 0),
        ("loading", 500),
        ("ready", 500),
    ]


def test_startup_events_tell_of_failure_and_keep_alive():
    engine = loading_engine()

    def fail():
        engine.state = engine.phase = "failed"

    frames = read_events(engine, [lambda: None, fail], keep_alive_s=0.0)
    assert frames[1] == b": keep-alive\n\n"
    assert json.loads(frames[-1][6:])["status"] == "failed"


def test_startup_events_of_a_server_that_is_ready_end_at_once():
    response = client_of(FakeEngine()).get("/health/startup/events")
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["cache-control"] == "no-cache"
    assert json.loads(response.text.removeprefix("data: "))["status"] == "ready"


@pytest.mark.parametrize(
    ("state", "code"),
    [
        ("starting", "model_loading"),
        ("loading", "model_loading"),
        ("draining", "shutting_down"),
        ("stopped", "shutting_down"),
        ("failed", "engine_failed"),
    ],
)
def test_work_is_refused_until_ready(state, code):
    client = client_of(in_state(state))
    refused = [
        client.post(URL, json={"prompt": "a"}),
        client.get("/v1/models"),
        client.get("/v1/models/org/tiny"),
    ]
    for response in refused:
        assert response.status_code == 503
        assert response.json()["error"]["code"] == code
        retries = response.headers.get("x-should-retry") != "false"
        assert retries == ("retry-after" in response.headers) == (state != "failed")


def test_loading_tells_the_phase():
    response = client_of(in_state("loading")).post(URL, json={"prompt": "a"})
    assert "reading weights" in response.json()["error"]["message"]


def test_models():
    client = client_of(FakeEngine())
    (card,) = client.get("/v1/models").json()["data"]
    assert card["id"] == "org/tiny"
    assert card["object"] == "model"
    assert isinstance(card["created"], int)
    assert client.get("/v1/models/org/tiny").json() == card
    response = client.get("/v1/models/org/other")
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "model_not_found"


def samples_of(client):
    response = client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    families = text_string_to_metric_families(response.text)
    samples = [sample for family in families for sample in family.samples]
    assert all(sample.name.startswith("infmoe_") for sample in samples)
    return {(s.name, *sorted(s.labels.items())): s.value for s in samples}


def test_metrics_tell_of_offloaded_experts_only_where_there_are_some():
    engine = FakeEngine()
    client = client_of(engine)
    assert not [name for name, *_ in samples_of(client) if "expert" in name]
    engine.experts = PipelineStats(
        hits=3,
        misses=2,
        host_loads=1,
        evictions=1,
        read_bytes=8192,
        copied_bytes=4096,
        stall_s=0.5,
        prefetched=7,
        prefetch_used=4,
        prefetch_wasted=2,
    )
    samples = samples_of(client)
    counts = {name: value for (name, *_), value in samples.items() if "expert" in name}
    assert counts == {
        "infmoe_expert_hits_total": 3,
        "infmoe_expert_misses_total": 2,
        "infmoe_expert_evictions_total": 1,
        "infmoe_expert_read_bytes_total": 8192,
        "infmoe_expert_stall_seconds_total": 0.5,
        "infmoe_expert_host_loads_total": 1,
        "infmoe_expert_copied_bytes_total": 4096,
        "infmoe_expert_prefetched_total": 7,
        "infmoe_expert_prefetch_used_total": 4,
        "infmoe_expert_prefetch_wasted_total": 2,
    }


def test_metrics_count_a_completion():
    client = client_of(FakeEngine())
    client.post(URL, json={"prompt": ["ab", "c"]})
    client.post(URL, json={"prompt": "ab", "stream": True})
    client.get("/secret/path")
    samples = samples_of(client)
    route = ("route", URL)
    assert samples["infmoe_requests_total", route, ("status", "200")] == 2
    assert samples["infmoe_requests_total", ("route", "unmatched"), ("status", "404")] == 1
    assert samples["infmoe_request_seconds_count", route] == 2
    assert samples["infmoe_time_to_first_token_seconds_count",] == 3
    assert samples["infmoe_inter_token_seconds_count",] == 3
    assert samples["infmoe_queue_seconds_count",] == 3
    assert samples["infmoe_prompt_tokens_total",] == 8
    assert samples["infmoe_generated_tokens_total",] == 6
    assert samples["infmoe_finished_total", ("reason", "stop")] == 3
    assert samples["infmoe_in_flight",] == 1  # the scrape itself
    assert samples["infmoe_queue_limit",] == Settings().max_queue
    assert samples["infmoe_ready",] == 1
    assert samples["infmoe_queue_depth",] == samples["infmoe_running",] == 0
    assert not any("secret" in str(key) for key in samples)


def test_text_that_was_held_back_is_no_token_of_its_own():
    def script(request):
        return [Piece("a", (1,)), Piece("", (2,)), Piece("b", ()), finished(request)]

    client = client_of(FakeEngine(script))
    client.post(URL, json={"prompt": "a"})
    assert samples_of(client)["infmoe_inter_token_seconds_count",] == 1


def test_metrics_while_loading():
    assert samples_of(client_of(in_state("loading")))["infmoe_ready",] == 0


def test_two_servers_do_not_share_metrics():
    first, second = client_of(FakeEngine()), client_of(FakeEngine())
    first.post(URL, json={"prompt": "a"})
    assert samples_of(second)["infmoe_prompt_tokens_total",] == 0


def test_openapi_is_honest():
    schema = client_of(FakeEngine()).get("/openapi.json").json()
    probes = {"/health", "/health/live", "/health/ready", "/health/startup", "/metrics"}
    assert probes | {"/v1/completions", "/v1/models", "/v1/info"} <= set(schema["paths"])
    answers = schema["paths"][URL]["post"]["responses"]
    assert "200" in answers
    assert all(status[0] in "45" for status in answers if status != "200")
    assert set(answers["200"]["content"]) == {"application/json", "text/event-stream"}
    for path in schema["paths"].values():
        assert all("422" not in operation["responses"] for operation in path.values())
    fields = schema["components"]["schemas"]["CompletionRequest"]["properties"]
    assert all("description" in field or name == "stream_options" for name, field in fields.items())


def test_one_log_line_without_content(caplog):
    client = client_of(FakeEngine())
    with caplog.at_level(logging.INFO, logger="server"):
        response = client.post(URL, json={"prompt": "my private text", "stream": True})
        client.get("/health/live")
        client.get("/metrics")
        client.get("/no%0Asuch")
    first, second = [record.getMessage() for record in caplog.records]
    request_id = response.headers["x-request-id"]
    pattern = (
        rf"POST {URL} 200 ms=[\d.]+ id={request_id} key=anonymous completion=cmpl-\w+ choices=1 "
        r"prompt_tokens=16 completion_tokens=2 finish=stop ttft_ms=[\d.]+"
    )
    assert re.fullmatch(pattern, first)
    assert re.fullmatch(
        r"GET unmatched 404 ms=[\d.]+ id=req-\w+ key=anonymous error=not_found", second
    )
    assert "private" not in caplog.text


ALWAYS_THERE = ["/health/live", "/v2/health/live", "/health/startup/events"]


@pytest.mark.parametrize("path", [*READY_PATHS, "/health/startup", *ALWAYS_THERE])
def test_probes_that_want_no_body(path):
    response = client_of(FakeEngine()).head(path)
    assert (response.status_code, response.content) == (200, b"")
    loading = client_of(in_state("loading")).head(path)  # does not wait for events either
    assert loading.status_code == (200 if path in ALWAYS_THERE else 503)
