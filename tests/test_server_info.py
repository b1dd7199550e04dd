"""What /v1/info and the metrics tell of limits, of the plan of memory, and of slower ways."""

import json

import pytest
import torch
from starlette.testclient import TestClient

from engine.footprint import Workload
from engine.planning import Budgets, Storage, plan_memory
from offload.pipeline import PipelineStats
from server.app import create_app
from server.settings import Settings
from server.versions import installed_version
from tests.fakes import TINY_CONFIG, FakeEngine
from tests.test_server_health import samples_of
from tests.tiny import MOE

LOAD = Workload(source_tokens=20, target_tokens=10)


def planned_engine() -> FakeEngine:
    engine = FakeEngine()
    storage = Storage(config=MOE, dtype=torch.float32, slot_bytes=20_480)
    engine.plan = plan_memory(storage, LOAD, Budgets(host_bytes=2**21, gpu_bytes=2**30), 1000)
    engine.experts = PipelineStats(hits=3, misses=2, evictions=1, read_bytes=8192, stall_s=0.5)
    engine.fallbacks = ("reads are buffered", "memory is not pinned")
    return engine


def client_of(engine, **settings):
    return TestClient(create_app(engine, Settings(**settings)))


def test_info_of_a_model_that_nobody_planned():
    reply = client_of(FakeEngine(), max_queue=7, max_body_bytes=1000).get("/v1/info")
    assert reply.status_code == 200
    values = reply.json()
    assert values["model"]["id"] == "org/tiny"
    assert values["model"]["d_model"] == TINY_CONFIG.d_model
    assert values["limits"] == {
        "max_prompt_tokens": 2048,
        "max_tokens": 2048,
        "max_rows": 32,
        "max_queue": 7,
        "max_queue_tokens": None,
        "max_choices": 7,
        "max_prompt_chars": 2**21,
        "max_body_bytes": 1000,
        "max_upload_bytes": 2**28,
        "request_timeout_s": 600,
    }
    load = {"waiting": 0, "waiting_tokens": 0, "running": 0, "max_rows": 32}
    assert values["queue"] == load
    counts = dict.fromkeys(("hits", "partial_hits", "hit_tokens", "misses"), 0)
    assert values["encoder_cache"] == {"limit_bytes": 0, "used_bytes": 0, **counts}
    assert values["is_batch_invariant"] is False
    assert values["adapters"] is None
    assert values["versions"]["torch"] == installed_version("torch")
    assert values["plan"] is values["experts"] is None
    assert values["fallbacks"] == []
    assert values["version"] == installed_version()


def test_info_of_an_offloaded_model():
    engine = planned_engine()
    values = client_of(engine).get("/v1/info").json()
    assert values["plan"] == json.loads(json.dumps(engine.plan.facts()))
    assert values["plan"]["budget_bytes"] == {"host": 2**21, "gpu": 2**30}
    assert "expert_plan" not in values["plan"]  # thousands of names
    assert values["experts"]["hits"] == 3
    assert values["experts"]["hit_rate"] == 0.6
    assert values["experts"]["read_bytes"] == 8192
    assert values["fallbacks"] == ["reads are buffered", "memory is not pinned"]


@pytest.mark.parametrize("state", ["starting", "loading", "draining", "failed"])
def test_info_waits_for_the_model(state):
    engine = FakeEngine()
    engine.state = state
    assert client_of(engine).get("/v1/info").status_code == 503


def test_a_package_that_is_not_installed_has_no_version():
    assert installed_version("no-such-package-of-ours") == "unknown"
    assert installed_version("pytest") != "unknown"


def test_metrics_tell_the_plan_and_the_slower_ways():
    engine = planned_engine()
    samples = samples_of(client_of(engine))
    planned = {
        dict(labels)["part"]: value
        for (name, *labels), value in samples.items()
        if name == "infmoe_plan_bytes"
    }
    parts = {part.lower().replace(" ", "_"): size for part, size in engine.plan.parts().items()}
    assert planned == parts
    assert planned["expert_slots"] == 16 * 20_480
    assert samples["infmoe_budget_bytes", ("tier", "host")] == 2**21
    assert samples["infmoe_budget_bytes", ("tier", "gpu")] == 2**30
    assert samples["infmoe_planned_bytes", ("tier", "gpu")] > planned["expert_slots"]
    assert samples["infmoe_fallbacks", ("what", "reads are buffered")] == 1
    assert samples["infmoe_fallbacks", ("what", "memory is not pinned")] == 1


def test_without_a_plan_there_are_no_such_metrics():
    names = {name for name, *_ in samples_of(client_of(FakeEngine()))}
    assert not {"infmoe_plan_bytes", "infmoe_fallbacks"} & names
