"""Which adapter a request means, and what the API tells of adapters."""

import asyncio
import time
from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple, Protocol, TypeVar

import anyio
from pydantic import BaseModel

from engine.adapter_store import AdapterStore
from engine.adapter_upload import remove_leftovers
from engine.adapters import Adapter
from engine.errors import CheckpointError, ConfigError, RequestError
from server.errors import ApiError
from server.protocol import Engine
from server.schemas_adapters import AdapterCard, AdapterFacts
from server.settings import Settings

LOADING_THREADS = 4
MAX_ECHO = 64  # characters of a name that came
NO_DEFAULTS: Mapping[str, object] = MappingProxyType({})
FINAL = {"x-should-retry": "false"}  # clients of OpenAI try 409 and 5xx again unless told
B = TypeVar("B", bound=BaseModel)


class Caller(Protocol):
    """Who asks: see `server.accounts.Caller`."""

    def may_use_adapter(self, name: str) -> bool: ...


class Chosen(NamedTuple):
    """What a request asked for: `model` is the name to reply with."""

    model: str
    adapter: Adapter | None

    @property
    def reference(self) -> str | None:
        """What the reply tells as `adapter`: name@version; None without an adapter."""
        return self.adapter.reference if self.adapter else None

    @property
    def headers(self) -> dict[str, str]:
        """What the reply tells in its headers."""
        return {"x-adapter": self.adapter.reference} if self.adapter else {}

    @property
    def defaults(self) -> Mapping[str, object]:
        """Request fields that the adapter sets where the request does not: see `with_defaults`."""
        return self.adapter.defaults if self.adapter else NO_DEFAULTS


class Adapters:
    """The store of adapters as the event loop sees it: reading from the disk is done in threads."""

    def __init__(self, store: AdapterStore) -> None:
        self.store = store
        self.created = int(time.time())
        self._threads = anyio.CapacityLimiter(LOADING_THREADS)
        self._loading: dict[str, asyncio.Task[Adapter]] = {}

    async def resolve(self, reference: str) -> Adapter:
        """The adapter that a name or name@version means; all who want it wait for one loading.

        Raises RequestError if it is not known, CheckpointError if it cannot be served, Overloaded
        if there is no room for it now.
        """
        if (found := self.store.find_resident(reference)) is not None:
            return found
        task = self._loading.get(reference)
        if task is None:
            work = anyio.to_thread.run_sync(self.store.resolve, reference, limiter=self._threads)
            task = asyncio.ensure_future(work)
            self._loading[reference] = task
            task.add_done_callback(lambda done: self._forget(reference, done))
        return await asyncio.shield(task)  # the others wait on when one goes away

    def _forget(self, reference: str, done: "asyncio.Task[Adapter]") -> None:
        if self._loading.get(reference) is done:
            del self._loading[reference]
        if not done.cancelled():
            done.exception()  # has been looked at, also if nobody waits any more


def open_adapters(engine: Engine, settings: Settings) -> Adapters | None:
    """Look at the directory of the settings and watch it; None if none is set.

    Raises ConfigError if it cannot be read.
    """
    if settings.adapters is None:
        return None
    store = AdapterStore(
        settings.adapters,
        lambda: engine.adapter_base,
        settings.adapter_memory,
        is_any_base_allowed=settings.adapter_any_base,
    )
    try:
        remove_leftovers(settings.adapters)
        store.look()
    except OSError as error:
        text = f"adapters: {settings.adapters} cannot be read: {error.strerror}"
        raise ConfigError(text) from error
    store.watch(settings.adapter_poll_s)
    return Adapters(store)


async def choose_adapter(
    adapters: Adapters | None,
    engine: Engine,
    *,
    model: str | None = None,
    adapter: str | None = None,
    adapter_id: str | None = None,
    caller: Caller | None = None,
) -> Chosen:
    """What `model`, `adapter` and `adapter_id` of a request ask for; loads it if need be.

    Each takes the name of the base model, or in the latter two "", for no adapter; or the name of
    an adapter, or name@version. None means not given. `adapters` is what `open_adapters` returned.

    Raises ApiError: 400 if two of them differ, 403 if the key may not use it, 404 with code
    model_not_found or adapter_not_found (adapter_failed: it is damaged). Raises Overloaded if there
    is no room for it now, EngineStopped before the model is loaded.
    """
    base = engine.model_name
    named = {"model": model, "adapter": adapter, "adapter_id": adapter_id}
    given = {field: value for field, value in named.items() if value is not None}
    if given.get("model") == base and len(given) > 1:
        del given["model"]  # clients must send some model; the other field tells more
    wanted = {field: "" if value == base else value for field, value in given.items()}
    if model == "":
        raise _unknown_model(adapters, base)
    if len(set(wanted.values())) > 1:
        fields = " and ".join(wanted)
        text = f"{fields} ask for different adapters; give one of them, or the same in each"
        raise ApiError(400, text, code="adapter_conflict", param=list(wanted)[-1])
    field, reference = next(iter(wanted.items()), ("model", ""))
    if not reference:
        return Chosen(base, None)
    return Chosen(reference, await _resolve(adapters, base, field, reference, caller))


async def _resolve(
    adapters: Adapters | None, base: str, field: str, reference: str, caller: Caller | None
) -> Adapter:
    name = reference.partition("@")[0]
    if adapters is not None and caller is not None and not caller.may_use_adapter(reference):
        text = f"this key may not use the adapter {name[:MAX_ECHO]!r}"  # there is one or not
        raise ApiError(403, text, code="adapter_not_allowed", param=field)
    try:
        if adapters is None:
            raise RequestError("no adapters are served here")
        return await adapters.resolve(reference)
    except RequestError as error:
        if field == "model":
            raise _unknown_model(adapters, base) from error
        text = f"there is no adapter {reference[:MAX_ECHO]!r}; /v1/models lists those there are"
        raise ApiError(404, text, code="adapter_not_found", param=field) from error
    except CheckpointError as error:  # its text names files
        text = f"adapter {reference[:MAX_ECHO]!r} cannot be served; /admin/adapters tells why"
        raise ApiError(404, text, code="adapter_failed", param=field, headers=FINAL) from error


def _unknown_model(adapters: Adapters | None, base: str) -> ApiError:
    more = " and adapters, which /v1/models lists" if adapters is not None else ""
    text = f"no such model; this server has {base!r}{more}"
    return ApiError(404, text, code="model_not_found", param="model")


def with_defaults(body: B, defaults: Mapping[str, object]) -> B:
    """A body with the adapter's values in the fields that the request did not give."""
    if not defaults:
        return body
    given = body.model_fields_set
    if "max_completion_tokens" in given:
        given = given | {"max_tokens"}
    known = type(body).model_fields.keys() - given
    return body.model_copy(update={k: v for k, v in defaults.items() if k in known})


def adapter_cards(
    adapters: Adapters | None, engine: Engine, caller: Caller | None = None
) -> list[AdapterCard]:
    """Cards for /v1/models of all adapters that the caller may use, by name. Touches no disk."""
    if adapters is None:
        return []
    names = adapters.store.names()
    if caller is not None:
        names = [name for name in names if caller.may_use_adapter(name)]
    return [_card(adapters, engine.model_name, name) for name in names]


def find_card(
    adapters: Adapters | None, engine: Engine, name: str, caller: Caller | None = None
) -> AdapterCard | None:
    """The card of one adapter; None if there is none that the caller may use."""
    if adapters is None or (caller is not None and not caller.may_use_adapter(name)):
        return None
    return _card(adapters, engine.model_name, name) if adapters.store.has_name(name) else None


def _card(adapters: Adapters, base: str, name: str) -> AdapterCard:
    facts = adapters.store.tell_current(name)
    told = AdapterFacts(version=facts.version, state=facts.state, num_vectors=facts.num_vectors)
    return AdapterCard(id=name, created=adapters.created, root=base, parent=base, adapter=told)
