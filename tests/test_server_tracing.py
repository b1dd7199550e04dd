"""Traces: a span per request with its waits, nothing of content, no harm from a dead receiver."""

import logging
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode
from starlette.testclient import TestClient

from engine.errors import ConfigError
from engine.request import Failed, Piece
from offload.pipeline import PipelineStats
from server.app import create_app
from server.cli import make_tracing
from server.settings import Settings
from server.tracing import EXPORT_S, MAX_CHOICES, Tracing, open_tracing
from tests.fakes import FakeEngine, finished

ROOT = Path(__file__).parents[1]
URL = "/v1/completions"
TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


class Traced:
    """A server whose spans stay here."""

    def __init__(self, engine):
        self.exporter = InMemorySpanExporter()
        provider = TracerProvider(shutdown_on_exit=False)
        provider.add_span_processor(SimpleSpanProcessor(self.exporter))
        tracing = Tracing(provider, "org/tiny")
        app = create_app(engine, Settings(), tracing)
        self.client = TestClient(app, raise_server_exceptions=False)

    def spans(self):
        return self.exporter.get_finished_spans()

    def server_span(self):
        (span,) = [span for span in self.spans() if span.kind is SpanKind.SERVER]
        return span


def timed(request):
    end = finished(request)
    moved = PipelineStats(hits=3, misses=2, read_bytes=10, copied_bytes=5, stall_s=0.25)
    return [
        Piece("my private answer", (1,)),
        replace(end, queued_s=0.001, encode_s=0.002, decode_s=0.003, experts=moved),
    ]


def test_a_completion_is_a_span_with_its_waits():
    traced = Traced(FakeEngine(timed))
    body = {"prompt": "my private text", "max_tokens": 7, "temperature": 0.5, "seed": 3}
    reply = traced.client.post(URL, json={**body, "stop": ["my private stop"]}).json()
    span = traced.server_span()
    assert span.name == "text_completion org/tiny"
    assert span.status.status_code is StatusCode.UNSET
    told = dict(span.attributes)
    assert told["gen_ai.operation.name"] == "text_completion"
    assert told["gen_ai.provider.name"] == "infmoe"
    assert told["gen_ai.request.model"] == "org/tiny"
    assert told["gen_ai.response.id"] == reply["id"]
    assert told["gen_ai.response.finish_reasons"] == ("stop",)
    assert told["gen_ai.request.max_tokens"] == 7
    assert told["gen_ai.request.temperature"] == 0.5
    assert told["gen_ai.request.seed"] == 3
    assert told["gen_ai.usage.input_tokens"] == reply["usage"]["prompt_tokens"]
    assert told["gen_ai.usage.output_tokens"] == 2
    assert (told["http.route"], told["http.response.status_code"]) == (URL, 200)
    children = [span for span in traced.spans() if span.kind is SpanKind.INTERNAL]
    assert [child.name for child in children] == ["queue", "encode", "decode"]
    assert all(child.parent.span_id == span.context.span_id for child in children)
    queue, encode, decode = children
    assert queue.end_time == encode.start_time
    assert encode.end_time == decode.start_time
    assert 0 < queue.end_time - queue.start_time <= 1_000_000
    assert decode.attributes["infmoe.expert.hits"] == 3
    assert decode.attributes["infmoe.expert.bytes"] == 15
    assert decode.attributes["infmoe.expert.stall_ms"] == 250
    assert "private" not in " ".join(span.to_json() for span in traced.spans())


def test_the_trace_of_the_caller_goes_on(caplog):
    traced = Traced(FakeEngine())
    headers = {"traceparent": f"00-{TRACE}-{PARENT}-01"}
    with caplog.at_level(logging.INFO, logger="server"):
        traced.client.post(URL, json={"prompt": "a"}, headers=headers)
    span = traced.server_span()
    assert f"{span.context.trace_id:032x}" == TRACE
    assert f"{span.parent.span_id:016x}" == PARENT
    assert f"trace_id={TRACE}" in caplog.text


@pytest.mark.parametrize("header", ["", "no trace\t", f"00-{'0' * 32}-{PARENT}-01", "x" * 1000])
def test_a_broken_trace_of_the_caller_begins_a_new_one(header):
    traced = Traced(FakeEngine())
    assert traced.client.post(URL, json={"prompt": "a"}, headers={"traceparent": header}).is_success
    assert traced.server_span().parent is None


def test_a_caller_that_does_not_sample_is_heeded():
    traced = Traced(FakeEngine())
    headers = {"traceparent": f"00-{TRACE}-{PARENT}-00"}
    assert traced.client.post(URL, json={"prompt": "a"}, headers=headers).is_success
    assert not traced.spans()


def test_a_refusal_is_a_span_with_its_code():
    traced = Traced(FakeEngine())
    traced.client.post(URL, json={"prompt": "a", "model": "no-such-model"})
    span = traced.server_span()
    assert span.name == f"POST {URL}"
    assert span.attributes["error.type"] == "model_not_found"
    assert span.status.status_code is StatusCode.UNSET  # the caller's mistake
    assert "no-such-model" not in span.to_json()


def test_a_failure_of_the_engine_is_an_error():
    traced = Traced(FakeEngine(lambda request: [Failed("broke")]))
    traced.client.post(URL, json={"prompt": "a"})
    span = traced.server_span()
    assert span.status.status_code is StatusCode.ERROR
    assert span.attributes["gen_ai.response.finish_reasons"] == ()
    assert len(traced.spans()) == 1


def test_probes_and_unknown_paths_make_no_names_of_their_own():
    traced = Traced(FakeEngine())
    for path in ("/health", "/health/live", "/v2/health/ready", "/metrics"):
        assert traced.client.get(path).status_code == 200
    assert not traced.spans()
    traced.client.get("/my/private/path")
    span = traced.server_span()
    assert span.name == "GET unmatched"
    assert "private" not in span.to_json()


def test_spans_of_choices_are_few_and_those_of_streams_alike():
    traced = Traced(FakeEngine(timed))
    body = {"prompt": ["a"] * (MAX_CHOICES + 5), "stream": True}
    traced.client.post(URL, json=body)
    assert len(traced.spans()) == 1 + 3 * MAX_CHOICES
    span = traced.server_span()
    assert span.attributes["gen_ai.request.choice.count"] == MAX_CHOICES + 5
    assert span.attributes["infmoe.time_to_first_token_ms"] >= 0


def test_a_receiver_that_is_not_there_costs_nothing_but_spans(caplog):
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes connections, never answers
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        tracing = open_tracing(address, "org/tiny")
        client = TestClient(create_app(FakeEngine(), Settings(), tracing))
        start_s = time.monotonic()
        for _ in range(20):
            assert client.post(URL, json={"prompt": "a"}).is_success
        assert time.monotonic() - start_s < 20 * EXPORT_S  # if each waited for its export
        closing = threading.Thread(target=tracing.close, daemon=True)
        closing.start()
        closing.join(300)
        assert not closing.is_alive()


@pytest.mark.parametrize("endpoint", ["collector:4318", "ftp://collector", "http://", "nonsense"])
def test_an_address_that_is_none_is_refused(endpoint):
    with pytest.raises(ConfigError, match="setting otlp_endpoint: give an address"):
        open_tracing(endpoint, "org/tiny")


def test_without_the_setting_nothing_is_opened():
    assert make_tracing(Settings(), "org/tiny") is None


def test_missing_packages_are_named():
    code = """
        import sys
        sys.modules["opentelemetry.sdk"] = None
        from engine.errors import ConfigError
        from server.cli import make_tracing
        from server.settings import Settings
        try:
            make_tracing(Settings(otlp_endpoint="http://localhost:4318"), "m")
        except ConfigError as error:
            print(error)
    """
    assert "pip install 'infmoe[otel]'" in run_python(code)


def test_without_the_setting_nothing_is_imported():
    code = """
        import sys
        import server.cli
        from server.app import create_app
        from tests.fakes import FakeEngine
        create_app(FakeEngine())
        print([name for name in sys.modules if name.startswith("opentelemetry.sdk")])
        print("server.tracing" in sys.modules)
    """
    assert run_python(code).split() == ["[]", "False"]


def run_python(code):
    lines = [line.removeprefix("        ") for line in code.splitlines()]
    command = [sys.executable, "-c", "\n".join(lines)]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=True
    ).stdout
