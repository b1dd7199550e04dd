"""What tells one state of a server from another: the model and the version that runs it."""

import hashlib
from functools import lru_cache

from server.protocol import Engine
from server.versions import installed_version

CHARS = 16


@lru_cache(maxsize=8)
def _digest(base: str, version: str) -> str:
    return f"fp_{hashlib.sha256(f'{base} {version}'.encode()).hexdigest()[:CHARS]}"


def tell_fingerprint(engine: Engine) -> str:
    """The same as long as the same requests with the same seeds should give the same answers."""
    return _digest(engine.adapter_base.fingerprint, installed_version())
