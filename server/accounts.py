"""Callers: who sends a request, what that one may do, and the bill at its end."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from server.errors import CLIENT_GONE, ApiError
from server.keys import KeyStore
from server.limits import Clock, Limits
from server.schemas_keys import KeyRecord, Scope
from server.settings import Settings
from server.usage import Usage

NO_KEY = "0" * 64  # the hash of no key that anybody knows
# Whoever may change what is served must show a key, also on the loopback device.
ANONYMOUS = KeyRecord(name="anonymous", sha256=NO_KEY, scopes=("infer", "metrics"))


@dataclass(slots=True)
class Bill:
    """What one HTTP request reserved and used; `generated` grows as tokens come.

    Those that come when it is settled already are told to `charge_late`.
    """

    adapter: str | None = None
    reserved: int = 0
    prompt_tokens: int = 0
    generated: int = 0
    charge_late: Callable[[int], None] | None = None

    def add(self, num_tokens: int) -> None:
        """Count tokens that were generated."""
        self.generated += num_tokens
        if self.charge_late is not None and num_tokens:
            self.charge_late(num_tokens)


class Caller:
    """The sender of one HTTP request, at scope["state"]["caller"]."""

    def __init__(self, record: KeyRecord, limits: Limits, usage: Usage) -> None:
        self._record = record
        self._limits = limits
        self._usage = usage
        self._bills: list[Bill] = []

    @property
    def name(self) -> str:
        """Of the key."""
        return self._record.name

    @property
    def account(self) -> str:
        """What the engine shares its time and its queue by; those without a key are all alike."""
        return "" if self._record is ANONYMOUS else self._record.name

    @property
    def scopes(self) -> tuple[Scope, ...]:
        """What the key is for."""
        return self._record.scopes

    @property
    def priority(self) -> int:
        """Of the requests in the engine's queue."""
        return self._record.priority

    def may_use_adapter(self, name: str) -> bool:
        """Whether the key's list allows an adapter; `name@version` is asked by both."""
        return self._record.may_use_adapter(name)

    def require_scope(self, scope: Scope) -> None:
        """Raise ApiError (403) if the key is not for that."""
        if scope in self.scopes:
            return
        if self._record is ANONYMOUS:
            text = f"this needs a key with the scope {scope}, and the server has none set up"
        else:
            text = f"this key is for {', '.join(self.scopes)}, not for {scope}"
        raise ApiError(403, text, code="insufficient_scope")

    def reserve(self, prompt_tokens: int, max_tokens: int, adapter: str | None = None) -> Bill:
        """Take from the key's tokens what a request may need, before it goes to the engine.

        Count on the bill what is generated; the rest is given back when the reply ends, all of it
        if the reply is a failure and nothing was generated; but a client that goes pays for its
        prompt. Raises ApiError (429).
        """
        self._limits.reserve(prompt_tokens + max_tokens)
        bill = Bill(adapter, prompt_tokens + max_tokens, prompt_tokens)
        self._bills.append(bill)
        return bill

    def enter(self) -> None:
        """Begin a request. Raises ApiError (429)."""
        self._limits.enter()

    def leave(self, status: int) -> None:
        """End a request that was begun: settle its bills."""
        self._limits.running -= 1
        for bill in self._bills:
            is_free = status >= 400 and status != CLIENT_GONE and not bill.generated
            used = 0 if is_free else bill.prompt_tokens + bill.generated
            if self._limits.tokens is not None:
                self._limits.tokens.add(bill.reserved - used)
            if not is_free:
                self._usage.add(self.name, bill.adapter, bill.prompt_tokens, bill.generated)
                bill.charge_late = partial(self._charge_late, bill.adapter)

    def _charge_late(self, adapter: str | None, num_tokens: int) -> None:
        if self._limits.tokens is not None:
            self._limits.tokens.add(-num_tokens)
        self._usage.add_late(self.name, adapter, num_tokens)

    def headers(self) -> dict[str, str]:
        """The x-ratelimit headers."""
        return self._limits.headers()


class Accounts:
    """All callers of a server. Raises ConfigError if the keys file cannot be read."""

    def __init__(self, settings: Settings, clock: Clock = time.monotonic) -> None:
        self._keys = KeyStore(settings.keys_file, settings.api_key, clock)
        self._is_open = not settings.has_keys
        self._clock = clock
        self._limits: dict[str, Limits] = {}
        self.usage = Usage()

    def identify(self, key: str | None) -> Caller:
        """The caller with a key. Raises ApiError (401)."""
        if self._is_open:
            return self._caller(ANONYMOUS)
        if key is None:
            text = "no API key was given; send it as 'Authorization: Bearer KEY'"
            raise unauthorized(text)
        record = self._keys.find(key)
        if record is None:
            raise unauthorized("the API key is not known here")
        if record.has_expired():
            raise unauthorized("the API key has expired")
        return self._caller(record)

    def _caller(self, record: KeyRecord) -> Caller:
        limits = self._limits.setdefault(record.name, Limits())
        limits.adjust(record, self._clock)
        return Caller(record, limits, self.usage)


def unauthorized(text: str) -> ApiError:
    """An error that asks for a key."""
    headers = {"www-authenticate": "Bearer", "x-should-retry": "false"}
    return ApiError(401, text, code="invalid_api_key", headers=headers)
