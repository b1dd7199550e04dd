"""Log lines: one record is one line, as text or as JSON; no content, no forged lines."""

import io
import json
import logging
import subprocess
import sys
import warnings
from contextlib import contextmanager
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from engine.request import Failed, Piece
from server.app import create_app
from server.log_format import (
    JsonFormatter,
    TextFormatter,
    configure_logging,
    escape_controls,
    is_json,
    say,
)
from server.settings import Settings
from tests.fakes import FakeEngine

ROOT = Path(__file__).parents[1]
URL = "/v1/completions"
FORGED = "GET /x\r\n2026-01-01 00:00:00 INFO server: all is well\x1b[2K\u2028\x85\x00"
FORMATTERS = [TextFormatter(), JsonFormatter()]


@contextmanager
def logged(formatter, level=logging.DEBUG):
    """The lines that loggers of the server write meanwhile."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(formatter)
    root = logging.getLogger()
    before = root.level
    root.addHandler(handler)
    root.setLevel(level)
    try:
        yield lambda: stream.getvalue().splitlines()
    finally:
        root.removeHandler(handler)
        root.setLevel(before)


@pytest.fixture
def root_logger():
    """The root logger, put back as it was."""
    root = logging.getLogger()
    handlers, level, uvicorn_level = (
        root.handlers[:],
        root.level,
        logging.getLogger("uvicorn").level,
    )
    yield root
    logging.captureWarnings(capture=False)
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.getLogger("uvicorn").setLevel(uvicorn_level)


def complete(formatter, headers=None, script=None, path=URL, **fields):
    engine = FakeEngine(script) if script else FakeEngine()
    client = TestClient(create_app(engine, Settings()), raise_server_exceptions=False)
    with logged(formatter, logging.INFO) as lines:
        response = client.post(path, json={"prompt": "my private text", **fields}, headers=headers)
        return response, [line for line in lines() if "httpx" not in line]


@pytest.mark.parametrize("formatter", FORMATTERS)
def test_one_record_is_one_line_whatever_is_in_it(formatter):
    record = logging.LogRecord("server", logging.INFO, "", 0, "asked: %s", (FORGED,), None)
    text = formatter.format(record)
    assert len(text.splitlines()) == 1
    assert text.isprintable()
    assert "all is well" in text


@pytest.mark.parametrize("formatter", FORMATTERS)
def test_a_traceback_cannot_begin_a_line(formatter):
    try:
        raise ValueError(FORGED)
    except ValueError:
        record = logging.LogRecord("server", logging.ERROR, "", 0, "broke", (), sys.exc_info())
    first, *rest = formatter.format(record).splitlines()
    assert "broke" in first
    assert all(line.startswith("    ") and line.isprintable() for line in rest)
    assert "ValueError" in (first if isinstance(formatter, JsonFormatter) else rest[-2])


def test_escapes_are_those_of_python():
    assert escape_controls("a\r\n\x00\x1b\u2028é\t") == "a\\r\\n\\x00\\x1b\\u2028é\\t"
    assert escape_controls("中文 plain") == "中文 plain"


def test_a_request_is_one_object_without_content():
    response, lines = complete(JsonFormatter(), headers={"authorization": "Bearer my-secret-key"})
    (values,) = map(json.loads, lines)
    assert values["message"] == f"POST {URL} 200"
    assert values["level"] == "info"
    assert values["logger"].startswith("server.")
    assert values["ts"].endswith("Z")
    assert values["request_id"] == response.headers["x-request-id"]
    assert (values["route"], values["status"], values["method"]) == (URL, 200, "POST")
    assert values["ms"] > 0
    assert (values["prompt_tokens"], values["completion_tokens"]) == (16, 2)
    assert values["key"] == "anonymous"
    assert "private" not in lines[0]
    assert "Hello" not in lines[0]
    assert "my-secret-key" not in lines[0]


def test_a_refusal_tells_its_code():
    _, lines = complete(JsonFormatter(), model="no-such-model")
    values = json.loads(lines[-1])
    assert (values["status"], values["error"]) == (404, "model_not_found")


@pytest.mark.parametrize("formatter", FORMATTERS)
def test_what_clients_send_cannot_forge_lines(formatter):
    forged = "x%0d%0a2026-01-01%20INFO%20server:%20all%20is%20well"
    headers = {"x-request-id": "a\tb all is well", "user-agent": b"all is well\x85"}
    for path in (f"/{forged}", f"{URL}?{forged}", f"/v1/models/{forged}"):
        response, lines = complete(formatter, headers, path=path, user="all is well\r\nx")
        assert len(lines) == 1
        assert "all is well" not in lines[0]
        assert response.headers["x-request-id"].startswith("req-")


@pytest.mark.parametrize("formatter", FORMATTERS)
def test_what_breaks_in_mid_stream_is_told_in_single_lines(formatter):
    def script(request):
        return [Piece("my private answer", (1,)), Failed(FORGED)]

    _, lines = complete(formatter, script=script, stream=True)
    assert len(lines) == 2  # the failure, and the request
    assert all(line.isprintable() for line in lines)
    assert not any("private" in line for line in lines)
    if isinstance(formatter, JsonFormatter):
        assert [json.loads(line)["level"] for line in lines] == ["warning", "info"]


def test_configured_loggers_write_json_to_standard_error(root_logger, capsys):
    configure_logging("info", "json")
    assert is_json()
    logging.getLogger("uvicorn.error").warning("Invalid HTTP request received.\r\n%s", "x")
    logging.getLogger("uvicorn.error").info("not wanted")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        configure_logging("info", "json")  # catch_warnings had put away what it set
        warnings.warn("old\nways", DeprecationWarning, stacklevel=1)
    say(logging.ERROR, "it is over")
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [(line["level"], line["logger"]) for line in lines] == [
        ("warning", "uvicorn.error"),
        ("warning", "py.warnings"),
        ("error", "infmoe"),
    ]
    assert lines[0]["message"] == "Invalid HTTP request received.\r\nx"
    assert lines[2]["message"] == "it is over"


def test_what_must_be_seen_is_seen_at_any_level(root_logger, capsys):
    configure_logging("error", "json")
    say(logging.INFO, "listening on here")
    assert json.loads(capsys.readouterr().err)["message"] == "listening on here"
    configure_logging("error", "text")
    assert not is_json()
    say(logging.INFO, "listening on\nhere")
    say(logging.ERROR, "it is over")
    told = capsys.readouterr().err.splitlines()
    assert told == ["infmoe: listening on\\nhere", "infmoe: error: it is over"]


def test_a_server_that_logs_json_prints_nothing_else(tmp_path):
    command = [sys.executable, "-m", "server", "serve", str(tmp_path), "--port", "0"]
    ended = subprocess.run(
        [*command, "--set", "log_format=json"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert ended.returncode == 1
    assert ended.stdout == ""
    told = [json.loads(line) for line in ended.stderr.splitlines()]
    assert told[0]["message"].startswith("listening on http://127.0.0.1:")
    assert told[-1]["message"].startswith("the engine has ended: ")
    assert told[-1]["level"] == "critical"
