"""What takes requests from the proxy of Ray Serve and hands each to a replica."""

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Callable
from typing import Any

from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.exceptions import ReplicaUnavailableError as ReplicaGone
from ray.serve.handle import DeploymentHandle
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.bodies import BODY_METHODS, BodyGuard, BodyRoom, may_upload
from server.edge import EdgeGuard
from server.errors import ApiError, api_error, retry_headers
from server.log_format import configure_logging
from server.ray_calls import Call, wanted_adapter
from server.ray_metrics import merge_metrics
from server.safe_headers import SAFE_HEADERS
from server.settings import Settings
from server.streams import DONE, data_frame, until_disconnect

logger = logging.getLogger(__name__)

ATTEMPTS = 3
RETRY_S = 1.0
PROBE_S = 2.0  # that a probe waits for a replica
SLACK_S = 10.0  # beyond the time that the engine gives a request
LOST = (RayActorError, ReplicaGone)
PROBES = ("/health", "/v2/health")


class Ingress:
    """The application behind the proxy. It keeps nothing that a second one would have to know."""

    def __init__(self, replicas: DeploymentHandle, settings: Settings) -> None:
        configure_logging(settings.log_level, settings.log_format)
        self._replicas = replicas
        self._settings = settings

    def __serve_build_asgi_app__(self) -> ASGIApp:
        return build_ingress(self._replicas, self._settings)


def build_ingress(replicas: DeploymentHandle, settings: Settings) -> ASGIApp:
    """The application with its guards: what comes is bounded before it is held or sent on."""
    room = BodyRoom(settings.bodies_limit)
    forwarder = Forwarder(replicas, room, settings.request_timeout_s + SLACK_S)
    guarded = BodyGuard(
        forwarder,
        max_body_bytes=settings.max_body_bytes,
        max_upload_bytes=min(settings.max_upload_bytes, settings.bodies_limit),
        timeout_s=settings.body_timeout_s,
        room=room,
    )
    return Outermost(EdgeGuard(guarded, settings))


class Outermost:
    """Gives a request the state that the guards write to; only replicas log requests."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await accept_lifespan(receive, send)
        elif scope["type"] == "http":
            scope["state"] = {"notes": {}}
            await self.app(scope, receive, send)
        else:
            await send({"type": "websocket.close", "code": 1000})


async def accept_lifespan(receive: Receive, send: Send) -> None:
    """Say yes to the start and the end."""
    for step in ("startup", "shutdown"):
        await receive()
        await send({"type": f"lifespan.{step}.complete"})


class Forwarder:
    """Sends a request to a replica, and to another one if that dies before it has said anything."""

    def __init__(self, replicas: DeploymentHandle, room: BodyRoom, wait_s: float) -> None:
        self._replicas = replicas
        self._room = room
        self._wait_s = wait_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sender = Sender(send)
        with self._room.share() as take:
            try:
                call = Call.of(scope, await read_body(scope, receive, take))
                await until_disconnect(receive, self._forward(call, sender))
            except ClientDisconnect:
                logger.debug("client gone: %s %s", call.method, call.path)
            except Exception as error:
                problem = translate(error)
                if problem.status == 500:
                    logger.exception("%s %s", scope["method"], scope["path"])
                await sender.fail(problem)

    async def _forward(self, call: Call, sender: "Sender") -> None:
        if call.path == "/metrics" and call.method == "GET":
            await sender.send_all(await self._ask_all(call))
            return
        for attempt in range(1, ATTEMPTS + 1):
            try:
                await self._ask_one(call, sender)
                return
            except LOST:
                if sender.has_begun or not call.may_repeat or attempt == ATTEMPTS:
                    raise
                logger.warning("a replica died; %s %s goes to another", call.method, call.path)
                sender.forget()

    async def _ask_one(self, call: Call, sender: "Sender") -> None:
        handle = self._replicas.options(
            method_name="answer", stream=True, multiplexed_model_id=wanted_adapter(call.body)
        )
        wait_s = PROBE_S if call.path.startswith(PROBES) else self._wait_s
        reply = handle.remote(call)
        try:
            async for messages in in_time(reply, wait_s):
                await sender.send_all(messages)
        finally:
            reply.cancel()  # of one that has ended: nothing

    async def _ask_all(self, call: Call) -> list[Message]:
        told = self._replicas.broadcast("answer_whole", call)
        return merge_metrics(await told.results_async(timeout_s=SLACK_S))


async def in_time(reply: AsyncIterator[list[Message]], wait_s: float) -> AsyncIterator[Any]:
    """What a replica sends. Raises ApiError (503) if nothing has come within `wait_s`."""
    try:
        async with asyncio.timeout(wait_s):
            first = await anext(reply, None)
    except TimeoutError as error:
        text = "no replica has answered in time"
        raise ApiError(503, text, code="no_replica", headers=retry_headers(RETRY_S)) from error
    if first is None:
        return
    yield first
    async for messages in reply:
        yield messages


async def read_body(scope: Scope, receive: Receive, take: Callable[[int], None]) -> bytes:
    """The whole body. Raises ClientDisconnect, and what the guards raise for one that is too large.

    Those of uploads alone come in pieces, which take their room here.
    """
    if scope["method"] not in BODY_METHODS:
        return b""
    is_upload = may_upload(scope, Headers(scope=scope))
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        part: bytes = message.get("body", b"")
        if is_upload:
            take(len(part))
        body += part
        if not message.get("more_body", False):
            return bytes(body)


def translate(error: Exception) -> ApiError:
    """What the client is told of a failure on the way to a replica."""
    if isinstance(error, LOST):
        text = "the replica died before the request was finished"
        return ApiError(503, text, code="replica_died", headers=retry_headers(RETRY_S))
    if isinstance(error, BackPressureError | DeploymentUnavailableError):
        text = "no replica takes requests now"
        return ApiError(503, text, code="no_replica", headers=retry_headers(RETRY_S))
    return api_error(error)


class Sender:
    """Sends a reply; its head waits for the first piece, so that until then all can begin anew."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._head: Message | None = None
        self._is_stream = False
        self._is_over = False
        self.has_begun = False

    def forget(self) -> None:
        """The head that waits is that of a reply that does not come."""
        self._head = None

    async def send_all(self, messages: list[Message]) -> None:
        """Send what a replica sent."""
        for message in messages:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(raw=list(message["headers"]))
                self._is_stream = headers.get("content-type", "").startswith("text/event-stream")
                del headers["x-request-id"]  # the proxy, which made it, adds it
                self._head = {**message, "headers": headers.raw}
                continue
            if self._head is not None:
                head, self._head = self._head, None
                self.has_begun = True
                await self._send(head)
            self._is_over = not message.get("more_body", False)
            await self._send(message)

    async def fail(self, problem: ApiError) -> None:
        """End the reply with an error, in the stream if there is one."""
        if self._is_over:
            return
        if not self.has_begun:
            response = problem.response()
            response.headers.update(SAFE_HEADERS)
            await self._send(
                {
                    "type": "http.response.start",
                    "status": problem.status,
                    "headers": response.raw_headers,
                }
            )
            await self._send({"type": "http.response.body", "body": bytes(response.body)})
        elif self._is_stream:
            body = data_frame(json.dumps(problem.body())) + DONE
            await self._send({"type": "http.response.body", "body": body})
        else:  # half a body of another kind: only a closed connection tells that it is half
            raise problem
