import asyncio

import pytest
from prometheus_client import CollectorRegistry, Counter, generate_latest

from engine.errors import ConfigError
from server import ray_cluster
from server.ray_calls import Call, is_held, rank_replicas, wanted_adapter
from server.ray_cluster import Cluster
from server.ray_metrics import merge_metrics
from server.ray_replica import call_app, require_health
from tests.fakes import FakeEngine

SCOPE = {
    "type": "http",
    "method": "POST",
    "path": "/v1/a b",
    "raw_path": b"/v1/a%20b",
    "query_string": b"x=1",
    "headers": [(b"host", b"here")],
    "client": ["1.2.3.4", 5],
    "scheme": "https",
    "http_version": "1.1",
    "state": object(),
}


def test_call_carries_what_belongs_to_the_request():
    call = Call.of(SCOPE, b"{}")
    scope = call.scope()
    told = ("method", "path", "raw_path", "query_string", "headers", "scheme", "http_version")
    assert {name: scope[name] for name in told} == {name: SCOPE[name] for name in told}
    assert scope["client"] == ("1.2.3.4", 5)
    assert "state" not in scope
    assert Call.of(scope, b"{}") == call
    assert Call.of({**SCOPE, "client": None, "raw_path": None}, b"").raw_path == b"/v1/a b"


@pytest.mark.parametrize(
    ("method", "path", "may"),
    [
        ("POST", "/v1/completions", True),
        ("POST", "/admin/adapters", False),
        ("GET", "/admin/adapters", True),
    ],
)
def test_what_changes_something_is_not_done_twice(method, path, may):
    assert Call.of({**SCOPE, "method": method, "path": path}, b"").may_repeat is may


@pytest.mark.parametrize(
    ("body", "wanted"),
    [
        (b'{"model": "demo"}', "demo"),
        (b'{"model": "demo", "adapter": "task@2"}', "task@2"),
        (b'{"adapter_id": "task", "model": "demo"}', "task"),
        (b'{"adapter": "", "model": ["x"]}', ""),
        (b"[1]", ""),
        (b"{", ""),
        (b"", ""),
    ],
)
def test_wanted_adapter(body, wanted):
    assert wanted_adapter(body) == wanted


def test_is_held_by_name_or_by_version():
    held = ["task@1", "other@2"]
    assert is_held("task", held)
    assert is_held("task@1", held)
    assert not is_held("task@2", held)
    assert not is_held("tas", held)


def test_holders_come_first_then_all_others():
    held = {"a": (), "b": ("task@1",), "c": ("task@1",), "d": ()}
    assert rank_replicas("task", held, {}, busy=4) == [["b", "c"], ["a", "d"]]


def test_an_adapter_that_nobody_holds_has_one_home_that_outlives_the_others():
    held = dict.fromkeys("abcd", ())
    homes = {f"task{i}": rank_replicas(f"task{i}", held, {}, busy=4)[0] for i in range(100)}
    assert all(len(home) == 1 for home in homes.values())
    assert {home[0] for home in homes.values()} == set("abcd")
    without_a = dict.fromkeys("bcd", ())
    for name, home in homes.items():
        if home != ["a"]:
            assert rank_replicas(name, without_a, {}, busy=4)[0] == home
    assert rank_replicas("task1@7", held, {}, busy=4)[0] == homes["task1"]


def test_busy_holders_come_last():
    held = {"a": (), "b": ("task@1",)}
    assert rank_replicas("task", held, {"b": 3}, busy=4) == [["b"], ["a"]]
    assert rank_replicas("task", held, {"b": 4}, busy=4) == [["a"], ["b"]]
    assert rank_replicas("task", held, {"a": 4, "b": 4}, busy=4) == [["a", "b"]]
    assert rank_replicas("task", {}, {}, busy=4) == []


def reply(replica, count, status=200):
    registry = CollectorRegistry()
    Counter("infmoe_requests", "HTTP requests", ["route"], registry=registry).labels("/a").inc(
        count
    )
    body = generate_latest(registry)
    headers = [
        (b"content-type", b"text/plain"),
        (b"content-length", str(len(body)).encode()),
        (b"x-replica", replica.encode()),
    ]
    return [
        {"type": "http.response.start", "status": status, "headers": headers},
        {"type": "http.response.body", "body": body[:9], "more_body": True},
        {"type": "http.response.body", "body": body[9:]},
    ]


def test_metrics_of_replicas_are_told_apart():
    head, body = merge_metrics([reply("a", 1), reply("b", 2)])
    lines = body["body"].decode().splitlines()
    assert 'infmoe_requests_total{replica="a",route="/a"} 1.0' in lines
    assert 'infmoe_requests_total{replica="b",route="/a"} 2.0' in lines
    assert lines.count("# TYPE infmoe_requests_total counter") == 1
    headers = dict(head["headers"])
    assert int(headers[b"content-length"]) == len(body["body"])
    assert b"x-replica" not in headers


def test_metrics_that_one_replica_refuses_are_refused():
    refused = reply("b", 2, status=401)
    assert merge_metrics([reply("a", 1), refused]) == refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"replicas": 0, "max_replicas": 0}, "0 replicas serve nobody"),
        ({"replicas": 3, "max_replicas": 2}, "raise --max-replicas"),
        ({"replicas": 2, "max_replicas": 2, "replica_cpus": 1e6}, "lower --replica-cpus"),
    ],
)
def test_cluster_that_cannot_be(options, message):
    with pytest.raises(ConfigError, match=message):
        Cluster(**options)


def test_replicas_here_share_the_cores_that_there_are(monkeypatch):
    monkeypatch.setattr(ray_cluster, "usable_cores", lambda: 2)  # a quota may leave that few
    Cluster(replicas=2, max_replicas=2)
    with pytest.raises(ConfigError, match="need 3; there are 2 here"):
        Cluster(replicas=2, max_replicas=3)


def test_a_cluster_elsewhere_may_have_more_cpus():
    Cluster(replicas=2, max_replicas=2, replica_cpus=1e6, address="auto")


def test_an_application_is_called_without_a_socket():
    async def app(scope, receive, send):
        asked = await receive()
        headers = [(b"a", b"b")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": asked["body"], "more_body": True})
        await asyncio.sleep(0)
        await send({"type": "http.response.body", "body": scope["raw_path"]})

    async def run():
        return [group async for group in call_app(app, Call.of(SCOPE, b"{}"), "me")]

    (start, first), (last,) = asyncio.run(run())
    assert start["headers"] == [(b"a", b"b"), (b"x-replica", b"me")]
    assert (first["body"], last["body"]) == (b"{}", b"/v1/a%20b")


def test_to_close_a_call_is_to_hang_up():
    seen = []

    async def app(scope, receive, send):
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        seen.append((await receive())["type"])

    async def run():
        calling = call_app(app, Call.of(SCOPE, b""), "me")
        await anext(calling)
        assert seen == []
        await calling.aclose()

    asyncio.run(run())
    assert seen == ["http.disconnect"]


def test_what_an_application_raises_comes_out():
    async def app(scope, receive, send):
        raise ZeroDivisionError

    async def run():
        with pytest.raises(ZeroDivisionError):
            await anext(call_app(app, Call.of(SCOPE, b""), "me"))

    asyncio.run(run())


def test_only_a_failed_engine_is_unhealthy():
    engine = FakeEngine()
    for state in ("ready", "draining", "stopped"):
        engine.state = state
        require_health(engine)
    engine.state, engine.failure = "failed", "no device"
    with pytest.raises(RuntimeError, match="no device"):
        require_health(engine)
