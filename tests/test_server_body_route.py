"""Routes that read one body say of each what FastAPI's own would say, and document the same."""

import pytest
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.testclient import TestClient

from server.body_route import post
from server.errors import install_handlers
from server.responses import ERRORS
from server.schemas_completions import CompletionRequest

URL = "/v1/completions"
BODIES = [
    b'{"prompt": "a"}',
    b'{"prompt": "a", "model": null, "unknown": {"x": [1]}}',
    b'{"prompt": "\xe4\xbd\xa0", "max_tokens": 1e3}',
    b'{"prompt": "a", "max_tokens": "1"}',
    b'{"prompt": "a", "stream_options": {"include_usage": 1}}',
    b'{"prompt": "\\ud800"}',
    b'{"prompt": {}}',
    b'{"prompt": 1, "prompt": "the last one counts"}',
    b'{"prompt": "a", "temperature": NaN}',
    b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}",
    b'{"prompt": "a", "response_format": "json"}',
    b'{"prompt": "a", "stream_options": [1]}',
    b'{"prompt": "a", "\\ud800": 1}',
    b'\xef\xbb\xbf{"prompt": "a"}',
    b"{}",
    b"[]",
    b'"text"',
    b"null",
    b"",
    b'{"prompt": "a"',
    b'{"prompt": "a"}}',
    b"\xff\xfe{",
    b'{"prompt": "\xff"}',
    '{"prompt": "a"}'.encode("utf-16"),
    b"[" * 100_000,
]


async def answer(http: Request, body: CompletionRequest) -> Response:
    """Echo."""
    return JSONResponse({"path": http.url.path, "body": body.model_dump()})


def app_of(add):
    app = FastAPI(title="t")
    install_handlers(app)
    add(app)(answer)
    return app


OURS = app_of(lambda app: post(app, URL, ERRORS))
THEIRS = app_of(lambda app: app.post(URL, response_model=None, responses=ERRORS))


@pytest.mark.parametrize("body", BODIES, ids=range(len(BODIES)))
def test_what_is_said_of_a_body(body):
    headers = {"content-type": "application/json"}
    replies = [TestClient(app).post(URL, content=body, headers=headers) for app in (OURS, THEIRS)]
    ours, theirs = ((reply.status_code, reply.json()) for reply in replies)
    assert ours == theirs
    assert ours[0] == (200 if ours[1].get("path") else 400)


def test_the_document_is_the_same():
    assert OURS.openapi() == THEIRS.openapi()
