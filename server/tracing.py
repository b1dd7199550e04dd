"""Traces for OpenTelemetry: a span per request, and what its choices waited for. Never content.

To be imported only where traces are wanted: the packages are an extra.
Source: OpenTelemetry's semantic conventions for HTTP and for generative AI (in development).
"""

import threading
import time
from collections.abc import Mapping
from urllib.parse import urlsplit

from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Span, SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from engine.errors import ConfigError
from engine.request import Finished, Request
from server.errors import CLIENT_GONE
from server.metrics import Meter
from server.protocol import ExpertStats
from server.versions import installed_version

NAME = "infmoe"
QUIET_PATHS = ("/health", "/v2/health", "/metrics")
OPERATIONS = {
    "/v1/completions": "text_completion",
    "/v1/chat/completions": "chat",
    "/v1/embeddings": "embeddings",
    "/v1/generate": "text_completion",
    "/v1/score": "score",
}
MAX_CHOICES = 8  # that get spans of their own
CLOSE_S = 2.0
EXPORT_S = 5.0

Attribute = str | int | float | tuple[str, ...]


class Tracing:
    """Makes the spans of a server and hands them to what the provider sends them to."""

    def __init__(self, provider: TracerProvider, model: str) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer(NAME, installed_version())
        self._model = model
        self._propagator = TraceContextTextMapPropagator()

    def layer(self, app: ASGIApp) -> "TraceLayer":
        """The layer that traces the requests of an application."""
        return TraceLayer(app, self)

    def begin(self, scope: Scope) -> Span:
        """The span of an HTTP request, a child of the caller's if that tells of one."""
        headers = Headers(scope=scope)
        carrier = {name: headers[name] for name in ("traceparent", "tracestate") if name in headers}
        context = self._propagator.extract(carrier)
        return self._tracer.start_span(scope["method"], context, SpanKind.SERVER)

    def end(self, span: Span, scope: Scope, status: int) -> None:
        """Describe the request and what it waited for, and hand the span over."""
        route = getattr(scope.get("route"), "path", "unmatched")
        state = scope["state"]
        span.update_name(f"{scope['method']} {route}")
        span.set_attributes(http_facts(scope, route, status))
        if (code := state["notes"].get("error")) is not None:
            span.set_attribute("error.type", str(code))
        if status >= 500:
            span.set_status(Status(StatusCode.ERROR))
        meter: Meter | None = state.get("meter")
        if meter is not None and meter.requests:
            operation = OPERATIONS.get(route, "text_completion")
            span.update_name(f"{operation} {self._model}")
            facts = {"gen_ai.operation.name": operation, "gen_ai.request.model": self._model}
            span.set_attributes({**facts, **generation_facts(meter, state["notes"])})
            self._tell_choices(span, meter)
        span.end()

    def _tell_choices(self, span: Span, meter: Meter) -> None:
        context = trace.set_span_in_context(span)
        now_ns = time.time_ns()
        for index, end in sorted(meter.ends.items())[:MAX_CHOICES]:
            if not isinstance(end, Finished):
                continue
            at_ns = meter.began_ns
            times = {"queue": end.queued_s, "encode": end.encode_s, "decode": end.decode_s}
            for name, wait_s in times.items():
                child = self._tracer.start_span(name, context, start_time=at_ns)
                child.set_attribute("infmoe.choice", index)
                if name == "decode":
                    child.set_attributes(choice_facts(end))
                at_ns = min(at_ns + int(wait_s * 1e9), max(now_ns, at_ns))
                child.end(at_ns)

    def close(self) -> None:
        """Send what is left, but do not wait long for a receiver that does not answer."""
        thread = threading.Thread(target=self._provider.shutdown, daemon=True)
        thread.start()
        thread.join(CLOSE_S)


class TraceLayer:
    """Traces each request; probes are left out. To be put inside `RequestLog`."""

    def __init__(self, app: ASGIApp, tracing: Tracing) -> None:
        self.app = app
        self.tracing = tracing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"].startswith(QUIET_PATHS):
            await self.app(scope, receive, send)
            return
        span = self.tracing.begin(scope)
        scope["state"]["notes"]["trace_id"] = f"{span.get_span_context().trace_id:032x}"
        status = CLIENT_GONE  # until a whole reply has been sent
        sent_status = 500

        async def watched(message: Message) -> None:
            nonlocal status, sent_status
            if message["type"] == "http.response.start":
                sent_status = message["status"]
            elif not message.get("more_body", False):
                status = sent_status
            await send(message)

        try:
            await self.app(scope, receive, watched)
        except Exception:
            status = 500
            raise
        finally:
            self.tracing.end(span, scope, status)


def http_facts(scope: Scope, route: str, status: int) -> dict[str, Attribute]:
    """What every request is described by; the raw path is the client's and is left out."""
    address, port = scope.get("server") or ("", 0)
    return {
        "http.request.method": scope["method"],
        "http.route": route,
        "http.response.status_code": status,
        "server.address": address,
        "server.port": port or 0,
        "infmoe.request_id": scope["state"]["request_id"],
    }


def generation_facts(meter: Meter, notes: Mapping[str, object]) -> dict[str, Attribute]:
    """What was asked of the model, by numbers only, and what came of it."""
    ends = [end for end in meter.ends.values() if isinstance(end, Finished)]
    first = meter.requests[0]
    facts: dict[str, Attribute] = {
        "gen_ai.provider.name": NAME,
        "gen_ai.request.choice.count": len(meter.requests),
        "gen_ai.response.finish_reasons": tuple(end.reason for end in ends),
        "gen_ai.usage.input_tokens": sum(end.prompt_tokens for end in ends),
        "gen_ai.usage.output_tokens": sum(end.completion_tokens for end in ends),
        **request_facts(first),
    }
    if "completion" in notes:
        facts["gen_ai.response.id"] = str(notes["completion"])
    if first.adapter is not None:
        facts["infmoe.adapter"] = first.adapter.reference
        facts["gen_ai.response.model"] = first.adapter.reference
    if (first_ms := meter.first_token_ms()) is not None:
        facts["infmoe.time_to_first_token_ms"] = first_ms
    return facts


def request_facts(request: Request) -> dict[str, Attribute]:
    """How the first choice was to be sampled; stop strings are content."""
    params = request.params
    if request.task is not None:
        return {"infmoe.task": type(request.task).__name__.lower()}
    facts: dict[str, Attribute] = {
        "gen_ai.request.max_tokens": params.max_tokens,
        "gen_ai.request.temperature": params.temperature,
        "gen_ai.request.top_p": params.top_p,
        "gen_ai.request.top_k": params.top_k,
    }
    if params.seed is not None:
        facts["gen_ai.request.seed"] = params.seed
    return facts


def choice_facts(end: Finished) -> dict[str, Attribute]:
    """The accounts of one choice, with what it waited for experts."""
    facts: dict[str, Attribute] = {
        "infmoe.finish_reason": end.reason,
        "infmoe.output_tokens": end.completion_tokens,
    }
    return facts if end.experts is None else {**facts, **expert_facts(end.experts)}


def expert_facts(moved: ExpertStats) -> dict[str, Attribute]:
    """What was moved of experts."""
    return {
        "infmoe.expert.hits": moved.hits,
        "infmoe.expert.misses": moved.misses,
        "infmoe.expert.bytes": moved.read_bytes + moved.copied_bytes,
        "infmoe.expert.stall_ms": round(1000 * moved.stall_s, 3),
    }


def open_tracing(endpoint: str, model: str) -> Tracing:
    """Send spans to a receiver of OTLP over HTTP; to its usual path if the address tells none.

    They wait in a bounded queue and are sent by a thread: a receiver that is not there costs them,
    and nothing else. Raises ConfigError if that is no address of one.
    """
    parts = urlsplit(endpoint)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError("setting otlp_endpoint: give an address such as http://collector:4318")
    if parts.path in ("", "/"):
        endpoint = f"{endpoint.rstrip('/')}/v1/traces"
    resource = Resource.create({"service.name": NAME, "service.version": installed_version()})
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    exporter = OTLPSpanExporter(endpoint=endpoint, timeout=EXPORT_S)
    provider.add_span_processor(BatchSpanProcessor(exporter))
    return Tracing(provider, model)
