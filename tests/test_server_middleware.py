"""The layers around the routes: keys, bodies, request lines, hosts, origins, safe headers."""

import asyncio
import contextlib
import json
import time

import pytest
from fastapi import FastAPI, Request
from starlette.datastructures import Headers
from starlette.testclient import TestClient
from starlette.websockets import WebSocketDisconnect

from server.access import PUBLIC, key_of, scope_of
from server.accounts import Accounts
from server.bodies import (
    MAX_DEPTH,
    MAX_VALUES,
    BodyGuard,
    BodyRoom,
    check_json,
    depth_exceeds,
)
from server.edge import MAX_HEADERS, MAX_QUERY_PARAMETERS, MAX_URL_BYTES, is_local_name
from server.errors import ApiError, install_handlers
from server.guards import add_guards
from server.keys import hash_key, write_keys
from server.metrics import Metrics
from server.middleware import RequestLog
from server.schemas_keys import KeyRecord
from server.settings import Settings
from tests.fakes import FakeEngine

KEY = "a-key-of-the-settings"
JSON = {"content-type": "application/json"}


def guarded(**settings):
    """An application with all layers and routes that tell what they were given."""
    app = FastAPI()

    @app.api_route("/v1/echo", methods=["GET", "POST"])
    async def echo(request: Request):
        return {"body": (await request.body()).decode(), "caller": request.state.caller.name}

    @app.post("/admin/file")
    async def take(request: Request):
        return {"bytes": sum([len(part) async for part in request.stream()])}

    @app.post("/v1/spend")
    async def spend(request: Request):
        bill = request.state.caller.reserve(10, 20)
        bill.generated += 5
        return {}

    @app.get("/v1/bug")
    async def fail():
        raise RuntimeError("no")

    @app.get("/health")
    async def live():
        return {"status": "live"}

    made = Settings(**settings)
    install_handlers(app)
    app.state.accounts = Accounts(made)
    add_guards(app, made, app.state.accounts)
    app.add_middleware(RequestLog, metrics=Metrics(FakeEngine()))
    return app


def client_of(**settings):
    return TestClient(guarded(**settings), raise_server_exceptions=False)


def error_of(response, status, code):
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert (sorted(error), error["code"]) == (["code", "message", "param", "type"], code)
    assert response.headers["x-request-id"]
    return error


@pytest.fixture
def keys_file(tmp_path):
    def write(*records):
        path = tmp_path / "keys"
        write_keys(path, [KeyRecord(sha256=hash_key(f"{r['name']}-key"), **r) for r in records])
        return path

    return write


@pytest.mark.parametrize(
    ("headers", "key"),
    [
        ({"authorization": "Bearer abc"}, "abc"),
        ({"authorization": "bearer  abc "}, "abc"),
        ({"authorization": "Bearer "}, None),
        ({"authorization": "Bearer"}, None),
        ({"authorization": "Basic abc"}, None),
        ({"authorization": ""}, None),
        ({}, None),
        ({"x-api-key": "abc"}, "abc"),
        ({"x-api-key": " "}, None),
        ({"authorization": "Bearer ", "x-api-key": "abc"}, "abc"),
        ({"authorization": "Bearer abc", "x-api-key": "def"}, "abc"),
    ],
)
def test_where_keys_are_found(headers, key):
    assert key_of(Headers(headers)) == key


@pytest.mark.parametrize(
    ("path", "scope"),
    [
        ("/v1/completions", "infer"),
        ("/metrics", "metrics"),
        ("/metrics/x", "metrics"),
        ("/metricsx", "infer"),
        ("/admin", "admin"),
        ("/admin/adapters/a", "admin"),
        ("/v1/tune/jobs", "tune"),
        ("/v1/usage", None),
        ("/docs", None),
        ("/openapi.json", None),
        ("/anything", "infer"),
        ("", "infer"),
    ],
)
def test_scopes_of_paths(path, scope):
    assert scope_of(path) == scope


def test_keys_open_what_their_scope_says(keys_file):
    client = client_of(
        keys_file=keys_file({"name": "infer"}, {"name": "admin", "scopes": ("admin",)})
    )
    for scheme in ({"authorization": "Bearer infer-key"}, {"x-api-key": "infer-key"}):
        assert client.get("/v1/echo", headers=scheme).json()["caller"] == "infer"
    admin = {"x-api-key": "admin-key"}
    error_of(client.get("/v1/echo", headers=admin), 403, "insufficient_scope")
    error_of(
        client.post("/admin/file", headers={"x-api-key": "infer-key"}), 403, "insufficient_scope"
    )
    assert client.post("/admin/file", content=b"abc", headers=admin).json() == {"bytes": 3}


def test_the_key_is_asked_for_before_the_body_is_looked_at():
    client = client_of(api_key=KEY, max_body_bytes=10)
    error_of(client.post("/v1/echo", content=b"x" * 1000), 401, "invalid_api_key")
    error_of(
        client.post("/v1/echo", content=b"x" * 1000, headers={"x-api-key": KEY}),
        413,
        "body_too_large",
    )


def test_rate_headers_on_replies_and_refusals(keys_file):
    file = keys_file({"name": "a", "requests_per_minute": 3, "tokens_per_minute": 100})
    client = client_of(keys_file=file)
    headers = {"x-api-key": "a-key"}
    first = client.post("/v1/spend", json={}, headers=headers)
    assert first.headers["x-ratelimit-limit-requests"] == "3"
    assert first.headers["x-ratelimit-remaining-requests"] == "2"
    assert first.headers["x-ratelimit-remaining-tokens"] == "70"  # reserved until the end
    second = client.get("/v1/echo", headers=headers)
    assert second.headers["x-ratelimit-remaining-tokens"] in ("85", "86")
    assert client.get("/v1/nothing", headers=headers).status_code == 404  # counts as well
    refused = client.get("/v1/echo", headers=headers)
    error = error_of(refused, 429, "rate_limit_exceeded")
    assert error["type"] == "rate_limit_error"
    assert refused.headers["x-ratelimit-remaining-requests"] == "0"
    assert 1 <= int(refused.headers["retry-after"]) <= 20
    assert int(refused.headers["retry-after-ms"]) <= 20_000
    assert "x-ratelimit-limit-requests" not in client.get("/health").headers


def test_a_bug_settles_the_bill(keys_file):
    client = client_of(keys_file=keys_file({"name": "a", "max_concurrent": 1}))
    headers = {"x-api-key": "a-key"}
    for _ in range(2):
        error_of(client.get("/v1/bug", headers=headers), 500, "internal_error")
    assert client.get("/v1/echo", headers=headers).status_code == 200


def test_web_sockets_are_closed():
    with (
        pytest.raises(WebSocketDisconnect) as caught,
        client_of().websocket_connect("/v1/echo"),
    ):
        pass
    assert caught.value.code == 1008


def test_the_lifespan_passes():
    with client_of() as client:
        assert client.get("/health").status_code == 200


@pytest.mark.parametrize("size", [0, 1, 2**16, 2**16 + 1, 10**6])
def test_bodies_arrive_whole(size):
    text = json.dumps({"a": "x" * size})
    assert client_of().post("/v1/echo", content=text, headers=JSON).json()["body"] == text


DEEP = "[" * MAX_DEPTH + "]" * MAX_DEPTH


@pytest.mark.parametrize(
    ("text", "depth"),
    [
        ("1", 0),
        ("[]", 1),
        ('{"a": [1, {"b": 2}]}', 3),
        ("[[], [], [[]]]", 3),
        (r'["[[[", "\"[[[", "\\", "\\\"[["]', 1),
        ('["unfinished [[[', 1),
        ('["unfinished [[[\\', 1),
        ('"[" [ "[" [', 2),
        ("][][", 0),
    ],
)
def test_depth(text, depth):
    assert not depth_exceeds(text.encode(), depth)
    assert depth == 0 or depth_exceeds(text.encode(), depth - 1)


def test_nesting_is_bounded():
    check_json(DEEP.encode())
    with pytest.raises(ApiError, match="nested more than 64 levels"):
        check_json(f"[{DEEP}]".encode())
    check_json(json.dumps({"prompt": ["["] * 100 + [[1]] * 100}).encode())


def test_values_are_bounded():
    check_json(json.dumps({"prompt": [1] * (MAX_VALUES - 2)}).encode())
    with pytest.raises(ApiError, match=f"more than {MAX_VALUES} values"):
        check_json(json.dumps({"prompt": [1] * (MAX_VALUES + 1)}).encode())


@pytest.mark.parametrize(
    "body",
    [
        b'"\\"' * 10**6,
        b'"' * (4 * 10**6),
        b"[" * MAX_DEPTH + b'"\\' * (2 * 10**6),
        b"[{" * (MAX_VALUES // 2 - 1) + b'"' + b"\\n" * 10**6,
        b"[" * 65 + b'""' * 60_000,
        b"[]" * (MAX_VALUES - 1),
    ],
)
def test_checking_is_linear(body):
    start_s = time.process_time()
    with contextlib.suppress(ApiError):
        check_json(body)
    assert time.process_time() - start_s < 30  # 0.05 s at most on a quiet machine


async def play(app, messages, scope, wait_s=60.0):
    """Send messages to an application, then silence; all that it sends."""
    sent = []

    async def receive():
        if messages:
            return messages.pop(0)
        await asyncio.sleep(wait_s)
        return {"type": "http.disconnect"}

    async def send(message):
        sent.append(message)

    async with asyncio.timeout(120):
        await app(scope, receive, send)
    return sent


def scope_for(path, **headers):
    return {
        "type": "http",
        "method": "POST",
        "path": path,
        "query_string": b"",
        "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
    }


PART = {"type": "http.request", "body": b"{", "more_body": True}
GONE = {"type": "http.disconnect"}


def test_a_body_that_stops_half_way_ends_in_time():
    app = guarded(body_timeout_s=0.05)
    headers = {"content-type": "application/json"}
    start, body = asyncio.run(play(app, [PART], scope_for("/v1/echo", **headers)))
    assert start["status"] == 408
    assert (b"connection", b"close") in start["headers"]
    assert json.loads(body["body"])["error"]["code"] == "request_timeout"


def test_a_client_that_goes_while_it_sends():
    app = guarded()
    headers = {"content-type": "application/json"}
    assert asyncio.run(play(app, [PART, GONE], scope_for("/v1/echo", **headers))) == []


def test_an_upload_that_stops_half_way_ends_in_time():
    app = guarded(body_timeout_s=0.05, api_key=KEY)
    headers = {"x-api-key": KEY, "content-type": "application/octet-stream"}
    start, body = asyncio.run(play(app, [PART], scope_for("/admin/file", **headers)))
    assert start["status"] == 408
    assert json.loads(body["body"])["error"]["code"] == "request_timeout"


def test_after_the_body_a_request_may_take_its_time():
    async def patient(scope, receive, send):
        assert (await receive())["body"] == b"{}"
        sent.append(await receive())

    sent = []
    guard = BodyGuard(patient, 100, 100, 0.01, BodyRoom(100))
    whole = {"type": "http.request", "body": b"{}", "more_body": False}
    for path, kind in (("/v1/echo", "application/json"), ("/admin/file", "application/zip")):
        scope = {**scope_for(path, **{"content-type": kind}), "state": {"notes": {}}}
        asyncio.run(play(guard, [whole], scope, wait_s=0.05))
    assert sent == [GONE, GONE]


def test_bodies_of_all_requests_together_are_bounded_to_their_ends():
    async def hold(scope, receive, send):
        await receive()
        began.release()
        await ended.wait()

    def ask(num_bytes):
        messages = [{"type": "http.request", "body": b" " * num_bytes, "more_body": False}]
        scope = scope_for("/v1/echo", **{"content-type": "application/json"})
        return play(guard, messages, {**scope, "state": {"notes": {}}}, wait_s=1.0)

    async def run():
        first = asyncio.create_task(ask(60))
        await began.acquire()
        start, body = await ask(41)
        assert start["status"] == 429
        assert dict(start["headers"])[b"retry-after"] == b"1"
        assert json.loads(body["body"])["error"]["code"] == "server_overloaded"
        second = asyncio.create_task(ask(40))
        await began.acquire()
        assert guard.room.used == 100
        ended.set()
        await asyncio.gather(first, second)
        assert guard.room.used == 0

    began, ended = asyncio.Semaphore(0), asyncio.Event()
    guard = BodyGuard(hold, 100, 100, 1.0, BodyRoom(100))
    asyncio.run(run())


def test_one_body_always_fits_in_what_all_may_take():
    assert Settings(max_bodies_bytes=10, max_body_bytes=20).bodies_limit == 20
    assert Settings(max_bodies_bytes=30, max_body_bytes=20).bodies_limit == 30


@pytest.mark.parametrize("is_declared", [True, False])
def test_uploads_have_a_limit_of_their_own(is_declared):
    client = client_of(api_key=KEY, max_upload_bytes=100, max_body_bytes=10)
    headers = {"x-api-key": KEY, "content-type": "application/octet-stream"}
    assert client.post("/admin/file", content=b"x" * 100, headers=headers).json() == {"bytes": 100}
    content = b"x" * 101 if is_declared else iter([b"x" * 50, b"x" * 51])
    error_of(client.post("/admin/file", content=content, headers=headers), 413, "body_too_large")
    error_of(
        client.post("/admin/file", json={"a": "b" * 9}, headers=headers | JSON),
        413,
        "body_too_large",
    )


def test_request_lines_and_headers_are_bounded():
    client = client_of()
    error_of(client.get("/v1/echo?a=" + "b" * MAX_URL_BYTES), 414, "address_too_long")
    error_of(client.get("/" + "b" * MAX_URL_BYTES), 414, "address_too_long")
    few, many = ("&".join(["a=b"] * count) for count in (MAX_QUERY_PARAMETERS, 101))
    assert client.get(f"/v1/echo?{few}").status_code == 200
    error_of(client.get(f"/v1/echo?{many}"), 400, "invalid_value")
    error_of(
        client.get("/v1/echo", headers=[(f"x-{i}", "a") for i in range(MAX_HEADERS + 1)]),
        431,
        "too_many_headers",
    )


@pytest.mark.parametrize(
    ("name", "is_local"),
    [
        *[(name, True) for name in ("localhost", "127.0.0.1", "::1", "10.0.0.1", "infmoe")],
        *[(name, True) for name in ("a.localhost", "")],
        *[(name, False) for name in ("evil.example", "localhost.evil.example", "127.0.0.1.nip.io")],
        ("127.1.evil", False),
    ],
)
def test_names_that_no_foreign_name_server_gives(name, is_local):
    assert is_local_name(name) is is_local


def test_foreign_host_names_are_refused_where_no_key_is_asked_for():
    for settings, status in (
        ({}, 421),
        ({"api_key": KEY}, 200),
        ({"host": "0.0.0.0", "allow_unauthenticated": True}, 200),
        ({"allowed_hosts": ("Evil.example",)}, 200),
        ({"api_key": KEY, "allowed_hosts": ("other.example",)}, 421),
    ):
        headers = {"x-api-key": KEY, "host": "evil.example:8000"}
        response = client_of(**settings).get("/v1/echo", headers=headers)
        assert response.status_code == status, settings
    error_of(client_of().get("/v1/echo", headers={"host": "evil.example"}), 421, "host_not_allowed")
    for host in ("[::1", "a b.c", "evil.example.", "evil.example\x00"):
        assert client_of().get("/v1/echo", headers={"host": host}).status_code in (400, 421)


PREFLIGHT = {
    "origin": "https://app.example",
    "access-control-request-method": "POST",
    "access-control-request-headers": "authorization, x-stainless-lang",
}


def test_other_origins_are_not_served_unless_listed():
    client = client_of(api_key=KEY)
    refused = client.options("/v1/echo", headers=PREFLIGHT)
    error_of(refused, 401, "invalid_api_key")
    reply = client.get("/v1/echo", headers={"origin": "https://app.example", "x-api-key": KEY})
    for response in (refused, reply):
        assert not [name for name in response.headers if name.startswith("access-control")]


def test_listed_origins_are_served():
    client = client_of(api_key=KEY, cors_origins="https://app.example")
    allowed = client.options("/v1/echo", headers=PREFLIGHT)
    assert allowed.status_code == 200
    assert allowed.headers["access-control-allow-origin"] == "https://app.example"
    assert "x-stainless-lang" in allowed.headers["access-control-allow-headers"]
    assert "access-control-allow-credentials" not in allowed.headers
    headers = {"origin": "https://app.example", "x-api-key": KEY}
    reply = client.get("/v1/echo", headers=headers)
    assert reply.headers["access-control-allow-origin"] == "https://app.example"
    assert "x-request-id" in reply.headers["access-control-expose-headers"]
    for origin in ("https://evil.example", "null", "https://app.example.evil.example"):
        other = client.options("/v1/echo", headers={**PREFLIGHT, "origin": origin})
        assert other.status_code == 400
        assert "access-control-allow-origin" not in other.headers


@pytest.mark.parametrize("path", [*sorted(PUBLIC & {"/health"}), "/v1/echo", "/v1/nothing"])
def test_safe_headers(path):
    headers = client_of().get(path).headers
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["x-frame-options"] == "DENY"
    assert headers["content-security-policy"].startswith("default-src 'none'")
    assert headers["referrer-policy"] == "no-referrer"
