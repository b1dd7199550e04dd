"""The OpenAPI document against the server: any body that it allows, and many that it forbids.

Longer than in the suite: INFMOE_SCHEMA_EXAMPLES=2000 pytest tests/test_server_schema.py
"""

import json
import os
from functools import cache

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.python import asgi
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from server.app import create_app
from server.settings import Settings
from tests.adapter_folders import adapter_files, make_tar, write_files
from tests.fakes import FakeEngine, tiny_worker

KEY = "a-key-for-tests-only"
HEADERS = {"authorization": f"Bearer {KEY}"}
NUM_EXAMPLES = int(os.environ.get("INFMOE_SCHEMA_EXAMPLES", "8"))
CHECKS = [
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
]
NO_MODEL = ("/health", "/v2/health")  # probes tell their state instead of an error
LATE = "deadline_exceeded"  # the body may ask for that
TAR = make_tar(adapter_files())

# Fields whose random values nearly always end a request early: with these it goes on.
NAMES = {"model": ["tiny", "task", "task@1"], "adapter": ["", "task"], "adapter_id": ["task"]}
SMALL = {"max_tokens": 3, "max_completion_tokens": 3, "n": 2, "best_of": 2, "num_beams": 2}


@schemathesis.serializer("application/x-tar")
def send_tar(context, value):
    """Bytes as they are; every other body of a PUT is a good archive."""
    return {"data": value if isinstance(value, bytes) and len(value) % 2 else TAR}


def make_app(engine, root, **more):
    write_files(root / "task" / "1", adapter_files())
    return create_app(engine, Settings(adapters=root, request_timeout_s=2.0, **more))


@cache
def document():
    """The operations, by an application that serves them all."""
    return schemathesis.openapi.from_dict(
        create_app(FakeEngine(), Settings(adapters=".")).openapi()
    )


def operations():
    return {found.ok().label: found.ok() for found in document().get_all_operations()}


@pytest.fixture(scope="module")
def clients(tmp_path_factory):
    """One application that knows a key, one that asks for none."""
    with tiny_worker(max_queue=256) as worker:
        roots = [tmp_path_factory.mktemp(name) for name in ("keyed", "open")]
        keyed = make_app(worker, roots[0], api_key=KEY)
        with asgi.get_client(keyed) as first, asgi.get_client(make_app(worker, roots[1])) as second:
            first.headers.update(HEADERS)
            yield first, second


def tame(case, draw):
    """Turn a body into one that is more likely to be carried out."""
    if not isinstance(case.body, dict):
        return
    for name, values in NAMES.items():
        if name in case.body:
            case.body[name] = draw(st.sampled_from(values))
    for name in SMALL.keys() & case.body.keys():
        case.body[name] = SMALL[name]
    for name in (
        draw(st.lists(st.sampled_from(sorted(case.body)), unique=True)) if case.body else ()
    ):
        if name not in ("prompt", "text", "messages", "input", "continuations", "context"):
            del case.body[name]


def check(case, response):
    """The reply is as documented; a failure is an error of OpenAI's shape; no 500."""
    is_late = response.status_code == 504 and response.json()["error"]["code"] == LATE
    assert response.status_code < 500 or is_late, response.content
    if response.headers.get("content-type", [""])[0].startswith("text/event-stream"):
        check_events(response.content.decode())
        return
    if response.status_code >= 400:
        error = response.json()["error"]
        assert sorted(error) == ["code", "message", "param", "type"]
        assert error["message"]
        assert error["code"]
    case.validate_response(response, checks=CHECKS)


def check_events(text):
    """JSON in each event; a failure in mid-stream would be one of the server."""
    for frame in text.split("\n\n"):
        if frame in ("", "data: [DONE]") or frame.startswith(":"):
            continue
        error = json.loads(frame.removeprefix("data: ")).get("error")
        assert error is None or error["code"] == LATE or error["type"] != "server_error", error


def try_many(run):
    """Call a property with so many examples, the same each time."""
    limits = settings(
        max_examples=NUM_EXAMPLES,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    seed(7)(limits(run))()


@pytest.mark.parametrize("label", operations())
def test_what_the_document_allows_is_answered_as_it_says(label, clients):
    operation = operations()[label]

    @given(operation.as_strategy(generation_mode=GenerationMode.POSITIVE), st.data())
    def run(case, data):
        if data.draw(st.booleans()):
            tame(case, data.draw)
        for client in clients:
            check(case, case.call(session=client, app=client.app))

    try_many(run)


@pytest.mark.parametrize(
    "label",
    [
        name
        for name, one in operations().items()
        if (one.body or one.query) and not name.startswith("PUT")  # no file is forbidden
    ],
)
def test_what_the_document_forbids_ends_in_no_failure_of_the_server(label, clients):
    operation = operations()[label]

    @given(operation.as_strategy(generation_mode=GenerationMode.NEGATIVE))
    def run(case):
        for client in clients:
            check(case, case.call(session=client, app=client.app))

    try_many(run)
