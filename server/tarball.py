"""Reading a tar that comes in pieces, plain or gzipped: flat, of known files, and not a byte more.

Not by `tarfile`, which follows what an archive says: this knows files, and nothing else that a tar
can hold. Layout: POSIX.1-1988 "ustar", a header of 512 bytes before each file.
"""

import zlib
from typing import Protocol

from engine.errors import RequestError

BLOCK = 512
GZIP = b"\x1f\x8b"
GZIP_WBITS = 31
PIECE_BYTES = 2**16
MAX_MEMBERS = 32
MAX_NOTES_BYTES = 2**16  # of a header of PAX, which is skipped: times and owners
SKIPPED = ("README.md",)  # PEFT writes it beside its files
APPLE = "._"  # macOS adds a shadow to each file
ADVICE = "send `tar -czf - -C FOLDER adapter_config.json adapter_model.safetensors`"


class Sink(Protocol):
    """Where files go: `engine.adapter_upload.Upload`."""

    def begin(self, file_name: str) -> None: ...
    def write(self, data: bytes) -> None: ...


class TarReader:
    """Takes an archive piece by piece and hands its files on; of all together at most `max_bytes`.

    `feed` and `finish` raise RequestError if it is no such archive.
    """

    def __init__(self, sink: Sink, max_bytes: int) -> None:
        self._sink = sink
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self._num_members = 0
        self._start = b""  # until it is known whether this is gzip
        self._inflate: zlib._Decompress | None = None
        self._is_begun = False
        self._block = bytearray()  # of a header that has not come as a whole
        self._left = 0  # bytes of the present file
        self._padding = 0  # behind it
        self._is_kept = False
        self._is_ended = False

    def feed(self, data: bytes) -> None:
        """Take the next piece."""
        if not self._is_begun:
            self._start += data
            if len(self._start) < len(GZIP):
                return
            data, self._start, self._is_begun = self._start, b"", True
            if data.startswith(GZIP):
                self._inflate = zlib.decompressobj(GZIP_WBITS)
        if self._inflate is None:
            self._take(data)
            return
        try:
            while data:
                self._take(self._inflate.decompress(data, PIECE_BYTES))
                data = self._inflate.unconsumed_tail
        except zlib.error as error:
            raise RequestError("the body is damaged gzip") from error
        if self._inflate.unused_data.strip(b"\0"):
            raise RequestError("there is something behind the end of the archive")

    def finish(self) -> None:
        """Tell that nothing more comes."""
        if not self._is_ended or (self._inflate is not None and not self._inflate.eof):
            raise RequestError(f"the body is no whole tar archive; {ADVICE}")

    def _take(self, data: bytes) -> None:
        self._num_bytes += len(data)
        if self._num_bytes > self._max_bytes:
            raise RequestError(f"the archive holds more than {self._max_bytes} bytes")
        view = memoryview(data)
        while view:
            if self._left:
                part = view[: self._left]
                if self._is_kept:
                    self._sink.write(bytes(part))
                self._left -= len(part)
            elif self._padding:
                part = view[: self._padding]
                self._padding -= len(part)
            else:
                part = view[: BLOCK - len(self._block)]
                self._block += part
                if len(self._block) == BLOCK:
                    self._read_header(bytes(self._block))
                    self._block.clear()
            view = view[len(part) :]

    def _read_header(self, block: bytes) -> None:
        if not block.strip(b"\0"):
            self._is_ended = True
            return
        if self._is_ended:
            raise RequestError("there is something behind the end of the archive")
        if block[257:262] != b"ustar" or checksum(block) != octal(block[148:156]):
            raise RequestError(f"the body is no tar archive; {ADVICE}")
        self._num_members += 1
        if self._num_members > MAX_MEMBERS:
            raise RequestError(f"the archive has more than {MAX_MEMBERS} members; {ADVICE}")
        self._left = octal(block[124:136])
        self._padding = -self._left % BLOCK
        self._is_kept = False
        kind = block[156:157]
        if kind in (b"x", b"g") and self._left <= MAX_NOTES_BYTES:
            return
        name = member_name(block)
        if kind == b"5" and name in ("", "."):
            return
        if kind not in (b"0", b"\0"):
            raise RequestError(f"{name[:64]!r} is no plain file; {ADVICE}")
        if "/" in name:
            raise RequestError(f"{name[:64]!r} is in a folder; the archive must be flat: {ADVICE}")
        if name not in SKIPPED and not name.startswith(APPLE):
            self._sink.begin(name)
            self._is_kept = True


def member_name(block: bytes) -> str:
    """The name in a header, without "./" in front."""
    name = block[:100].partition(b"\0")[0]
    if block[257:265] == b"ustar\x0000":  # GNU keeps other things there
        prefix = block[345:500].partition(b"\0")[0]
        name = prefix + b"/" + name if prefix else name
    return name.decode("ascii", errors="replace").removeprefix("./")


def octal(digits: bytes) -> int:
    """A number of a header. Raises RequestError if it is none."""
    text = digits.strip(b" \0")
    if not text.isdigit() or set(text) & set(b"89"):
        raise RequestError(f"the body is no tar archive that is understood; {ADVICE}")
    return int(text, 8)


def checksum(block: bytes) -> int:
    """The sum of a header's bytes, with its own place as spaces."""
    return sum(block) - sum(block[148:156]) + 8 * ord(" ")
