"""API keys: made, kept as hashes in a file of JSON lines, looked up in constant time.

A key is 256 random bits, so that its plain SHA-256 is safe to keep: slow hashes are for passwords,
which can be guessed; here they would only make every request slow.
"""

import fcntl
import hmac
import logging
import os
import secrets
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path

from pydantic import SecretStr, ValidationError

from engine.errors import ConfigError
from server.schemas_keys import SCOPES, KeyRecord

logger = logging.getLogger(__name__)

PREFIX = "infmoe-"  # lets scanners of repositories find a key that got there
KEY_BYTES = 32
MAX_KEYS = 1000
MAX_FILE_BYTES = 2**21
CHECK_S = 1.0
SETTINGS_NAME = "default"  # of the one key that is a setting


def new_key() -> str:
    """A fresh key."""
    return PREFIX + secrets.token_urlsafe(KEY_BYTES)


def hash_key(key: str) -> str:
    """What is kept of a key."""
    return sha256(key.encode(errors="replace")).hexdigest()


def parse_keys(text: str) -> list[KeyRecord]:
    """Read the lines of a keys file. Raises ConfigError that names the line, and shows no hash."""
    records: list[KeyRecord] = []
    names: set[str] = set()
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            record = KeyRecord.model_validate_json(line)
        except ValidationError as error:
            first = error.errors()[0]
            name = ".".join(map(str, first["loc"])) or "it"
            raise ConfigError(f"line {number}: {name}: {first['msg']}") from error
        if record.name in names:
            raise ConfigError(f"line {number}: there are two keys named {record.name}")
        names.add(record.name)
        records.append(record)
    if len(records) > MAX_KEYS:
        raise ConfigError(f"{len(records)} keys; a file takes up to {MAX_KEYS}")
    return records


def read_keys(path: Path) -> list[KeyRecord]:
    """Read a keys file. Raises ConfigError that names it."""
    try:
        with path.open("rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
        if len(content) > MAX_FILE_BYTES:
            raise ConfigError(f"larger than {MAX_FILE_BYTES} bytes; is it a keys file?")
        return parse_keys(content.decode())
    except OSError as error:
        raise ConfigError(f"keys file {path}: {error.strerror}") from error
    except (UnicodeError, ConfigError) as error:
        raise ConfigError(f"keys file {path}: {error}") from error


def write_keys(path: Path, records: Sequence[KeyRecord]) -> None:
    """Replace a keys file at once, readable by its owner only."""
    lines = [record.model_dump_json(exclude_none=True) + "\n" for record in records]
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # of mode 0600
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.writelines(lines)
            file.flush()
            os.fsync(file.fileno())
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


@contextmanager
def changing_keys(path: Path) -> Iterator[list[KeyRecord]]:
    """The records of a file, to be changed in place; written at the end, one writer at a time.

    A file that is not there holds no keys.
    """
    path = path.resolve()  # a link stays one
    directory = os.open(path.parent, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(directory, fcntl.LOCK_EX)
        records = read_keys(path) if path.exists() else []
        yield records
        write_keys(path, records)
    finally:
        os.close(directory)


class KeyStore:
    """Finds the record of a key, in a file that is read again when it has changed.

    If the new file cannot be read, the keys stay as they were and the log says why.
    Raises ConfigError if the file cannot be read at first.
    """

    def __init__(
        self,
        path: Path | None,
        single: SecretStr | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._path = path
        self._clock = clock
        self._single: list[KeyRecord] = []
        if single is not None:
            digest = hash_key(single.get_secret_value())
            self._single = [KeyRecord(name=SETTINGS_NAME, sha256=digest, scopes=SCOPES)]
        self._checked_s = clock()
        self._stamp = None if path is None else stamp_of(path)
        self._records = self._single if path is None else self._read(path)

    def _read(self, path: Path) -> list[KeyRecord]:
        records = read_keys(path)
        if self._single and any(record.name == SETTINGS_NAME for record in records):
            raise ConfigError(
                f"keys file {path}: the name {SETTINGS_NAME} is taken by the key of the settings"
            )
        return self._single + records

    def find(self, key: str) -> KeyRecord | None:
        """The record of a key. All hashes are compared, whichever fits."""
        self._refresh()
        digest = hash_key(key)
        found = None
        for record in self._records:
            if hmac.compare_digest(record.sha256, digest):
                found = record
        return found

    def _refresh(self) -> None:
        if self._path is None or self._clock() - self._checked_s < CHECK_S:
            return
        self._checked_s = self._clock()
        stamp = stamp_of(self._path)
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            self._records = self._read(self._path)
        except ConfigError as error:
            logger.error("the keys stay as they were: %s", error)  # noqa: TRY400  no bug of ours
        else:
            logger.info("%d keys read anew", len(self._records))


def stamp_of(path: Path) -> tuple[int, int, int] | None:
    """What changes when a file is written or replaced; None if it is not there."""
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_mtime_ns, stat.st_size, stat.st_ino
