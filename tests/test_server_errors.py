"""Every failure is an error object of OpenAI's shape with the right status, nothing internal."""

import importlib
import json
import logging
import pkgutil

import httpx2
import pytest
from fastapi import HTTPException
from starlette.testclient import TestClient

import engine as engine_package
from engine.errors import (
    CheckpointError,
    ConfigError,
    EngineError,
    EngineStopped,
    Overloaded,
    PromptTooLong,
    RequestError,
    TokenizerError,
)
from server.app import create_app
from server.errors import MAX_RETRY_AFTER_S, STATUS, ApiError, api_error, retry_headers
from server.safe_headers import SAFE_HEADERS
from server.settings import Settings
from tests.fakes import FakeEngine, live_server

URL = "/v1/completions"
JSON = {"content-type": "application/json"}
SECRET = "/home/secret/weights at 0x7f3a"


@pytest.fixture
def client():
    app = create_app(FakeEngine(), Settings(max_body_bytes=1000))
    return TestClient(app, raise_server_exceptions=False)


def error_of(response, status, code):
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    assert list(response.json()) == ["error"]
    error = response.json()["error"]
    assert sorted(error) == ["code", "message", "param", "type"]
    assert error["message"]
    assert error["code"] == code
    assert response.headers["x-request-id"]
    return error


def children(kind):
    return {kind}.union(*(children(child) for child in kind.__subclasses__()))


def test_every_engine_error_has_a_status():
    for module in pkgutil.iter_modules(engine_package.__path__, "engine."):
        importlib.import_module(module.name)
    ours = {kind for kind in children(EngineError) if kind.__module__.startswith("engine.")}
    assert ours == set(STATUS)


@pytest.mark.parametrize(
    ("error", "status", "code", "kind"),
    [
        (EngineError(SECRET), 500, "internal_error", "server_error"),
        (ConfigError(SECRET), 500, "internal_error", "server_error"),
        (CheckpointError(SECRET), 500, "internal_error", "server_error"),
        (TokenizerError(SECRET), 500, "internal_error", "server_error"),
        (EngineStopped(SECRET), 503, "engine_stopped", "server_error"),
        (RuntimeError(SECRET), 500, "internal_error", "server_error"),
        (RequestError("no", "stop"), 400, "invalid_value", "invalid_request_error"),
        (PromptTooLong("no"), 400, "context_length_exceeded", "invalid_request_error"),
        (Overloaded("full"), 429, "server_overloaded", "rate_limit_error"),
        (HTTPException(418, "teapot"), 418, "http_error", "invalid_request_error"),
    ],
)
def test_translation(error, status, code, kind):
    problem = api_error(error)
    body = problem.body()["error"]
    assert (problem.status, body["code"], body["type"]) == (status, code, kind)
    assert "secret" not in json.dumps(body)
    assert body["param"] == getattr(error, "field", None)
    assert ("retry-after" in problem.headers) == (status in (429, 503))


def test_translation_keeps_what_is_translated():
    error = ApiError(400, "no", code="x")
    assert api_error(error) is error


@pytest.mark.parametrize("wait_s", [-1.0, 0.0, 1e-9, 0.5, 60.0, 500.0, float("inf")])
def test_retry_after_stays_where_clients_obey(wait_s):
    headers = retry_headers(wait_s)
    assert 1 <= int(headers["retry-after"]) <= MAX_RETRY_AFTER_S
    assert 1 <= int(headers["retry-after-ms"]) <= 1000 * MAX_RETRY_AFTER_S


def test_unknown_path(client):
    error_of(client.get("/v1/nothing"), 404, "not_found")
    error_of(client.post("/v1/edits", json={}), 404, "not_found")
    error_of(client.post(f"{URL}/", json={"prompt": "a"}), 404, "not_found")
    error_of(client.get("/redoc"), 404, "not_found")


def test_wrong_method(client):
    response = client.get(URL)
    error_of(response, 405, "method_not_allowed")
    assert response.headers["allow"] == "POST"
    error_of(client.delete("/v1/models"), 405, "method_not_allowed")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b'"text"',
        b"5",
        b"null",
        b'{"prompt": "\xff"}',
        b'{"prompt": ' + b"1" * 500 + b"}",
        b"[" * 900,
        b'{"prompt": "a"} {}',
    ],
)
def test_bodies_that_are_no_json_object(client, content):
    response = client.post(URL, content=content, headers=JSON)
    assert response.status_code == 400
    assert response.json()["error"]["code"] in ("invalid_json", "invalid_value")
    assert len(response.text) < 300


def test_number_too_long_for_python(client):
    app = create_app(FakeEngine(), Settings())
    content = b'{"prompt": "a", "seed": ' + b"1" * 10_000 + b"}"
    response = TestClient(app).post(URL, content=content, headers=JSON)
    error_of(response, 400, "invalid_json")


def test_nesting_too_deep_for_python():
    app = create_app(FakeEngine(), Settings())
    content = b'{"prompt": ' + b"[" * 200_000 + b"]" * 200_000 + b"}"
    response = TestClient(app).post(URL, content=content, headers=JSON)
    assert response.status_code == 400


@pytest.mark.parametrize("kind", [None, "text/plain", "application/x-www-form-urlencoded", "json"])
def test_content_type(client, kind):
    headers = {} if kind is None else {"content-type": kind}
    response = client.post(URL, content=b'{"prompt": "a"}', headers=headers)
    error_of(response, 415, "unsupported_content_type")


def test_what_is_refused_before_a_route_is_logged_with_its_code(client, caplog):
    with caplog.at_level(logging.INFO, logger="server"):
        client.post(URL, content=b"{}", headers={"content-type": "text/plain"})
        client.post(URL, json={"prompt": "a" * 1000})
    codes = [record.getMessage().rpartition(" ")[2] for record in caplog.records]
    assert codes == ["error=unsupported_content_type", "error=body_too_large"]


def test_content_type_with_charset(client):
    headers = {"content-type": "Application/JSON; charset=utf-8"}
    assert client.post(URL, content=b'{"prompt": "a"}', headers=headers).status_code == 200


def test_body_too_large_by_its_header(client):
    error = error_of(client.post(URL, json={"prompt": "a" * 1000}), 413, "body_too_large")
    assert "1000 bytes" in error["message"]


def test_body_too_large_without_a_length(client):
    def chunks():
        yield b'{"prompt": "'
        for _ in range(100):
            yield b"a" * 100

    error_of(client.post(URL, content=chunks(), headers=JSON), 413, "body_too_large")


def test_body_too_large_on_the_wire():
    with live_server(FakeEngine(), max_body_bytes=100_000) as address:
        content = (b"a" * 10_000 for _ in range(1000))
        response = httpx2.post(address + URL, content=content, headers=JSON, timeout=300)
        error_of(response, 413, "body_too_large")
        assert httpx2.get(f"{address}/health/live", timeout=300).status_code == 200


def test_absurd_content_length(client):
    headers = {**JSON, "content-length": "9" * 5000}
    error_of(client.post(URL, content=b"{}", headers=headers), 413, "body_too_large")


def broken(_request):
    raise RuntimeError(SECRET)


def test_bug_is_a_plain_500_and_is_logged(caplog):
    client = TestClient(create_app(FakeEngine(broken)), raise_server_exceptions=False)
    with caplog.at_level(logging.INFO):
        response = client.post(URL, json={"prompt": "my private text"})
    error_of(response, 500, "internal_error")
    assert "secret" not in response.text
    assert SECRET in caplog.text
    assert "private" not in caplog.text
    assert response.headers["x-request-id"] in caplog.text
    assert SAFE_HEADERS.items() <= dict(response.headers).items()


def test_engine_error_is_logged(caplog):
    def refuse(_request):
        raise CheckpointError(SECRET)

    client = TestClient(create_app(FakeEngine(refuse)))
    with caplog.at_level(logging.INFO):
        error_of(client.post(URL, json={"prompt": "a"}), 500, "internal_error")
    assert SECRET in caplog.text


def test_safe_request_id_is_kept(client):
    response = client.get("/health", headers={"x-request-id": "a-B_1.2"})
    assert response.headers["x-request-id"] == "a-B_1.2"


@pytest.mark.parametrize("asked", ["", "a b", "a\tb", "x" * 129, "\xe9", "a;b"])
def test_other_request_ids_are_replaced(client, asked):
    response = client.get("/health", headers={"x-request-id": asked.encode("latin-1")})
    assert response.headers["x-request-id"].startswith("req-")


def test_every_route_documents_its_failures():
    document = create_app(FakeEngine()).openapi()
    texts = [path for path in document["paths"] if path.startswith(("/v1/", "/tok", "/detok"))]
    assert {"/v1/completions", "/v1/chat/completions", "/v1/generate", "/v1/score"} < set(texts)
    assert {"/v1/embeddings", "/tokenize", "/detokenize", "/tokenizer_info"} < set(texts)
    for path in texts:
        for operation in document["paths"][path].values():
            statuses = set(operation["responses"])
            assert "422" not in statuses, path  # our code for it is 400
            assert {"200", "400", "401", "403", "404", "429", "500", "503"} <= statuses, path
            if "requestBody" in operation:
                assert {"413", "415", "504"} <= statuses, path
