"""What passes between the ingress and a replica on Ray, and which replica it should go to."""

from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import TypeVar

from pydantic_core import from_json
from starlette.types import Scope

R = TypeVar("R", bound=Hashable)


@dataclass(frozen=True, slots=True)
class Call:
    """An HTTP request with its whole body."""

    method: str
    path: str
    raw_path: bytes
    query: bytes
    headers: tuple[tuple[bytes, bytes], ...]
    client: tuple[str, int] | None
    scheme: str
    http_version: str
    body: bytes

    @classmethod
    def of(cls, scope: Scope, body: bytes) -> "Call":
        """What ASGI calls a scope, without what belongs to one process."""
        client = scope.get("client")
        path: str = scope["path"]
        return cls(
            method=scope["method"],
            path=path,
            raw_path=scope.get("raw_path") or path.encode(),
            query=scope["query_string"],
            headers=tuple((bytes(name), bytes(value)) for name, value in scope["headers"]),
            client=(client[0], client[1]) if client else None,
            scheme=scope.get("scheme", "http"),
            http_version=scope.get("http_version", "1.1"),
            body=body,
        )

    def scope(self) -> Scope:
        """The same for another application."""
        return {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.4"},
            "http_version": self.http_version,
            "method": self.method,
            "scheme": self.scheme,
            "path": self.path,
            "raw_path": self.raw_path,
            "root_path": "",
            "query_string": self.query,
            "headers": list(self.headers),
            "client": self.client,
            "server": None,
        }

    @property
    def may_repeat(self) -> bool:
        """Whether nothing is changed by doing it twice."""
        return self.method in ("GET", "HEAD") or not self.path.startswith("/admin/")


def wanted_adapter(body: bytes) -> str:
    """The adapter, or the model, that a body names; "" for none. What is wrong is told later."""
    try:
        fields = from_json(body)
    except ValueError:
        return ""
    if not isinstance(fields, dict):
        return ""
    for field in ("adapter", "adapter_id", "model"):
        value = fields.get(field)
        if isinstance(value, str) and value:
            return value
    return ""


def is_held(wanted: str, held: Collection[str]) -> bool:
    """Whether `name` or `name@version` is among references, all of which have a version."""
    if "@" in wanted:
        return wanted in held
    return any(reference.partition("@")[0] == wanted for reference in held)


def rank_replicas(
    wanted: str, held: Mapping[R, Collection[str]], loads: Mapping[R, int], busy: int
) -> list[list[R]]:
    """Replicas in the order to try them: those that hold the adapter, its home, the others.

    `held` has the references in the memory of each replica, `loads` the requests of those that are
    known. Who has `busy` requests or more comes last, so that one adapter that everybody wants is
    read by others too. The home is the same for all who ask, as long as it is there: of requests
    for an adapter that nobody holds yet all but one find it there.
    Source: rendezvous hashing, Thaler and Ravishankar 1996.
    """
    free = [replica for replica in held if loads.get(replica, 0) < busy]
    holders = [replica for replica in free if is_held(wanted, held[replica])]
    home = [] if holders else _by_weight(wanted, free)[:1]
    first = holders or home
    rest = [replica for replica in held if replica not in first]
    return [group for group in (first, rest) if group]


def _by_weight(wanted: str, replicas: Sequence[R]) -> list[R]:
    name = wanted.partition("@")[0]
    return sorted(
        replicas, key=lambda replica: blake2b(f"{name} {replica}".encode(), digest_size=8).digest()
    )
