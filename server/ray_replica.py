"""One engine and its application as a replica of Ray Serve."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing

from starlette.types import ASGIApp, Message

from engine.garbage import spare_modules
from engine.model_paths import model_title
from server.cli import make_tracing, open_engine
from server.log_format import configure_logging
from server.protocol import Engine
from server.ray_calls import Call
from server.settings import Settings

POLL_S = 0.05


class Replica:
    """What `infmoe serve` runs in a process, asked by calls instead of over a socket.

    It is there when the model is loaded, so Serve sends it nothing before.
    """

    # Serve awaits it, and lets others of its tasks go on meanwhile
    async def __init__(self, settings: Settings) -> None:  # type: ignore[misc]
        assert settings.model is not None
        # not at the top: torch takes seconds, and only where Ray is installed is this class used
        from ray import serve

        from server.app import create_app

        configure_logging(settings.log_level, settings.log_format)
        name = settings.model_name or model_title(settings.model)
        self._tracing = make_tracing(settings, name)
        self._drain_s = settings.drain_s
        self._engine = open_engine(settings.model, settings)
        while self._engine.state in ("starting", "loading"):  # noqa: ASYNC110  it sets no event
            await asyncio.sleep(POLL_S)
        require_health(self._engine)
        self._app = create_app(self._engine, settings, self._tracing)
        spare_modules()
        self._name = serve.get_replica_context().replica_id.unique_id

    async def answer(self, call: Call) -> AsyncGenerator[list[Message], None]:
        """The messages of a reply: see `call_app`."""
        async with aclosing(call_app(self._app, call, self._name)) as reply:  # at once if cancelled
            async for messages in reply:
                yield messages

    async def answer_whole(self, call: Call) -> list[Message]:
        """The same in one piece."""
        return [message async for messages in self.answer(call) for message in messages]

    def check_health(self) -> None:
        """Raise RuntimeError if the engine has failed: Serve puts another replica in its place."""
        require_health(self._engine)

    def record_routing_stats(self) -> dict[str, object]:
        """What `server.ray_router` wants to know."""
        adapters = self._app.state.adapters
        held = adapters.store.resident() if adapters is not None else []
        return {"model": self._engine.model_name, "adapters": held}

    async def drain(self) -> bool:
        """Take nothing more, finish the rest: see `server.protocol.Engine.drain`."""
        return await asyncio.to_thread(self._engine.drain, self._drain_s)

    async def __del__(self) -> None:
        """End the engine; Serve calls this once, when the last request has ended."""
        if not hasattr(self, "_engine"):
            return
        await self.drain()
        if self._tracing is not None:
            self._tracing.close()


def require_health(engine: Engine) -> None:
    """Raise RuntimeError if an engine has failed; one that was drained has not."""
    if engine.state == "failed":
        raise RuntimeError(f"the engine has failed: {engine.failure}")


async def call_app(app: ASGIApp, call: Call, name: str) -> AsyncGenerator[list[Message], None]:
    """The messages of a reply as ASGI has them, those together that come together.

    The head of the reply tells the name of the replica. To close the generator is to hang up; it
    returns when the application has, and raises what that raises.
    """
    sent: asyncio.Queue[Message | None] = asyncio.Queue()
    gone = asyncio.Event()
    task = asyncio.create_task(_run(app, call, name, sent, gone))
    try:
        is_open = True
        while is_open:
            messages = [await sent.get()]
            while not sent.empty():
                messages.append(sent.get_nowait())
            is_open = messages[-1] is not None
            if told := [message for message in messages if message is not None]:
                yield told
        await task
    finally:
        gone.set()
        await asyncio.wait([task])


async def _run(
    app: ASGIApp, call: Call, name: str, sent: asyncio.Queue[Message | None], gone: asyncio.Event
) -> None:
    is_read = False

    async def receive() -> Message:
        nonlocal is_read
        if is_read:
            await gone.wait()
            return {"type": "http.disconnect"}
        is_read = True
        return {"type": "http.request", "body": call.body, "more_body": False}

    async def send(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = [*message["headers"], (b"x-replica", name.encode())]
            message = {**message, "headers": headers}
        sent.put_nowait(message)

    try:
        await app(call.scope(), receive, send)
    finally:
        sent.put_nowait(None)
