"""A directory of adapters, read when they are asked for and watched for new versions."""

import logging
import math
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from engine.adapter_folders import PLAIN, POINTER, list_names, list_versions, read_change
from engine.adapter_pins import AdapterPins
from engine.adapter_reader import RETRY_S, AdapterReader
from engine.adapter_states import AdapterInfo, Entry, State, StoreSnapshot, Version
from engine.adapter_table import AdapterTable
from engine.adapters import Adapter, Base
from engine.adapters_manifest import write_file
from engine.errors import (
    CheckpointError,
    EngineError,
    EngineStopped,
    Overloaded,
    RequestError,
)

logger = logging.getLogger(__name__)

SETTLE_S = 1.0


class AdapterStore:
    """Adapters of one directory, those in use within `limit_bytes` of memory. For any thread.

    Folders are listed and read when somebody asks for their name. `describe` tells the model that
    they are read for. Methods read from the disk, and may block, unless they say otherwise.
    """

    def __init__(
        self,
        root: Path,
        describe: Callable[[], Base],
        limit_bytes: int,
        *,
        is_any_base_allowed: bool = False,
        settle_s: float = SETTLE_S,
    ) -> None:
        self.root = root.absolute()
        self._table = AdapterTable(limit_bytes)
        self.reader = AdapterReader(
            self.root,
            describe,
            self._table,
            is_any_base_allowed=is_any_base_allowed,
            settle_s=settle_s,
        )
        self._lock = threading.Lock()  # of the fields below; never held while a file is read
        self._entries: dict[str, Entry] = {}
        self._pins = AdapterPins(self.root)
        self._pinning = threading.Lock()  # of what is pinned, here and in the table
        self._unpinned: dict[str, tuple[str, float]] = {}  # why not, and when that was found

    # --- what there is

    def look(self) -> None:
        """See what was added, changed and removed; what is in use gives way to better versions.

        What was pinned before a restart is read and pinned again, once there is a model. Cheap for
        names that nobody has asked for. Raises OSError if the directory cannot be read.
        """
        found = list_names(self.root)
        with self._lock:
            gone = [entry for name, entry in self._entries.items() if name not in found]
            for entry in gone:
                del self._entries[entry.name]
            for name in found.keys() - self._entries.keys():
                self._entries[name] = Entry(name)
            listed = [entry for entry in self._entries.values() if entry.changed_ns is not None]
        for entry in gone:
            with entry.reading:
                self.reader.refresh(entry)
        for entry in listed:
            if entry.reading.acquire(blocking=False):  # else somebody is looking at it
                try:
                    self._refresh(entry)
                finally:
                    entry.reading.release()
        self._pin_again()

    def _refresh(self, entry: Entry) -> None:
        is_used = entry.current is not None
        self.reader.refresh(entry)
        if is_used:
            try:
                self.reader.find_current(entry, waits=False)
            except (CheckpointError, Overloaded, RequestError, EngineStopped) as error:
                logger.debug("adapter %s: %s", entry.name, str(error))

    def _pin_again(self) -> None:
        """Pin what should be and is not: after a restart, or when its files are mended."""
        for reference in self._pins.wanted():
            name, _, version = reference.partition("@")
            if self._table.is_pinned(name, version) or self._has_just_failed(reference):
                continue
            try:
                _, adapter = self._fetch(reference)
            except EngineStopped:  # there is no model yet
                return
            except (CheckpointError, Overloaded, RequestError) as error:
                if isinstance(error, RequestError) and self._is_gone(name, version):
                    self._forget_pin(reference)
                else:
                    self._note_unpinned(reference, error)
                continue
            with self._pinning:
                if self._pins.has(reference):  # nobody has unpinned it meanwhile
                    self._table.set_pin(adapter.name, adapter.version, is_pinned=True)
                    self._unpinned.pop(reference, None)
                    logger.info("adapter %s is pinned again", reference)

    def _has_just_failed(self, reference: str) -> bool:
        return time.monotonic() - self._unpinned.get(reference, ("", -math.inf))[1] < RETRY_S

    def _note_unpinned(self, reference: str, error: EngineError) -> None:
        if reference not in self._unpinned or self._unpinned[reference][0] != str(error):
            logger.warning("adapter %s cannot be pinned again: %s", reference, str(error))
        # who has no room has read the files for nothing; the reader itself waits with bad ones
        failed_s = time.monotonic() if isinstance(error, Overloaded) else -math.inf
        self._unpinned[reference] = (str(error), failed_s)

    def _is_gone(self, name: str, version: str) -> bool:
        """Whether that version is not there, and not only out of reach."""
        try:
            is_there = read_change(self.root, name) is not None
            folders = list_versions(self.root, name) if is_there else {}
        except OSError:
            return False
        return version not in folders and PLAIN not in folders

    def _forget_pin(self, reference: str) -> None:
        logger.warning("adapter %s was pinned and is gone; its pin is forgotten", reference)
        with suppress(OSError):  # the next look tries again
            self._pins.discard(reference)

    def watch(self, poll_s: float) -> None:
        """Look again and again, in a thread that ends with the process or with the store."""
        args = (weakref.ref(self), poll_s)
        threading.Thread(target=_watch, args=args, name="adapters", daemon=True).start()

    def names(self) -> list[str]:
        """All names, sorted, as of the last look. Reads nothing."""
        with self._lock:
            return sorted(self._entries)

    def has_name(self, name: str) -> bool:
        """Whether there was such a name at the last look. Reads nothing."""
        with self._lock:
            return name in self._entries

    def tell_current(self, name: str) -> AdapterInfo:
        """What a name means now, as far as it is known. Reads nothing."""
        with self._lock:
            entry = self._entries.get(name)
            if entry is None:
                return AdapterInfo(name=name, version=None)
            best = next(iter(entry.versions.values()), None)
            version = entry.current or best
            return self._tell(entry, version) if version else AdapterInfo(name=name, version=None)

    def tell(self, name: str) -> list[AdapterInfo]:
        """All versions of a name, the preferred one first. Raises RequestError if there is none."""
        entry = self._open(name)
        if entry.reading.acquire(blocking=False):  # else it is loading, and that is the news
            try:
                self.reader.refresh(entry)
            finally:
                entry.reading.release()
        with self._lock:
            told = [self._tell(entry, version) for version in entry.versions.values()]
        if not told:
            raise RequestError(f"adapter {name[:100]!r} is not known", "adapter")
        return told

    def find_info(self, reference: str) -> AdapterInfo:
        """What there is to tell of `name@version`, or of what `name` means or would mean.

        Raises RequestError if it is not known.
        """
        name, mark, wanted = reference.partition("@")
        told = self.tell(name)
        if not mark:
            return next((info for info in told if info.is_current), told[0])
        for info in told:
            if info.version == wanted:
                return info
        raise RequestError(f"adapter {name!r} has no version {wanted[:100]!r}", "version")

    def snapshot(self) -> StoreSnapshot:
        """Counts and memory, for metrics. Reads nothing."""
        resident, pinned = self._table.count()
        with self._lock:
            return StoreSnapshot(
                names=len(self._entries),
                resident=resident,
                pinned=pinned,
                used_bytes=self._table.nbytes,
                limit_bytes=self._table.limit_bytes,
                loads=self.reader.loads,
                failures=self.reader.failures,
            )

    def resident(self) -> list[str]:
        """All that is in memory, as `name@version`, sorted. Reads nothing."""
        return self._table.known()

    # --- what requests need

    def find_resident(self, reference: str) -> Adapter | None:
        """As `resolve`, if no file need be read for it; else None. Reads nothing."""
        name, mark, wanted = reference.partition("@")
        with self._lock:
            entry = self._entries.get(name)
            version = self._known(entry, wanted if mark else None) if entry else None
            adapter = self._table.find(name, version.version or "") if version else None
            if adapter is not None and version is not None:
                self._count_use(version)
            return adapter

    def resolve(self, reference: str) -> Adapter:
        """The adapter that `name` or `name@version` means, read if need be.

        Raises RequestError if it is not known, CheckpointError if it cannot be served, Overloaded
        if it is still being written or there is no room for it, EngineStopped without a model.
        """
        entry, adapter = self._fetch(reference)
        with self._lock:
            version = self._known(entry, adapter.version)
            if version is not None:
                self._count_use(version)
        return adapter

    # --- what administrators do

    def unload(self, reference: str) -> AdapterInfo:
        """Let the memory go, also of a pinned one; the next request reads it again.

        Requests in flight keep theirs. Raises RequestError if it is not known, OSError if it was
        pinned and the disk is full.
        """
        info = self.find_info(reference)
        with self._pinning:
            self._pins.discard(f"{info.name}@{info.version or ''}")
            self._table.discard(info.name, info.version or "")
        return self.find_info(reference)

    def load(self, reference: str) -> AdapterInfo:
        """Read an adapter now. Raises as `resolve`."""
        _, adapter = self._fetch(reference)
        return self.find_info(adapter.reference)

    def pin(self, reference: str) -> AdapterInfo:
        """Read an adapter and keep it in memory, whatever else is asked for, also after a restart.

        Until it is unpinned, unloaded or removed. Raises as `resolve`, and OSError if the disk is
        full.
        """
        _, adapter = self._fetch(reference)
        with self._pinning:
            self._pins.add(adapter.reference)
            self._table.set_pin(adapter.name, adapter.version, is_pinned=True)
        return self.find_info(adapter.reference)

    def unpin(self, reference: str) -> AdapterInfo:
        """Let an adapter go again when room is needed. Raises as `unload`."""
        info = self.find_info(reference)
        with self._pinning:
            self._pins.discard(f"{info.name}@{info.version or ''}")
            self._table.set_pin(info.name, info.version or "", is_pinned=False)
        return self.find_info(reference)

    def make_current(self, name: str, version: str) -> AdapterInfo:
        """Let a name mean one of its versions from now on, and after a restart; it is read first.

        Raises as `resolve`, and OSError if the disk is full.
        """
        entry, _ = self._fetch(f"{name}@{version}")
        with entry.reading:
            write_file(self.root / name / POINTER, f"{version}\n".encode())
            entry.changed_ns = None
            self.reader.refresh(entry)
            self.reader.find_current(entry, waits=True)
        return self.find_info(f"{name}@{version}")

    # --- inside

    def _open(self, name: str) -> Entry:
        """The entry of a name, also of one that came after the last look."""
        with self._lock:
            entry = self._entries.get(name)
        with suppress(OSError):  # then it is as unknown as before
            if entry is None and read_change(self.root, name) is not None:
                with self._lock:
                    entry = self._entries.setdefault(name, Entry(name))
        if entry is None:
            raise RequestError(f"adapter {name[:100]!r} is not known", "adapter")
        return entry

    def _fetch(self, reference: str) -> tuple[Entry, Adapter]:
        name, mark, wanted = reference.partition("@")
        entry = self._open(name)
        with entry.reading:
            self.reader.refresh(entry)
            if mark:
                return entry, self.reader.fetch_version(entry, wanted)
            version, adapter = self.reader.find_current(entry, waits=True)
            return entry, adapter or self.reader.fetch(entry, version)

    def _known(self, entry: Entry, wanted: str | None) -> Version | None:
        """The version of an entry that has been read, the current one for None."""
        if wanted is None:
            return entry.current
        versions = entry.versions.values()
        return next((v for v in versions if v.good and v.version == wanted), None)

    def _count_use(self, version: Version) -> None:
        version.uses += 1
        version.last_used = time.time()

    def _tell(self, entry: Entry, version: Version) -> AdapterInfo:
        known = version.version or ""
        is_pinned = self._table.is_pinned(entry.name, known)
        state: State = "discovered" if version.good is None else "evicted"
        if version.is_loading:
            state = "loading"
        elif version.reason is not None:
            state = "failed"
        elif self._table.holds(entry.name, known):
            state = "pinned" if is_pinned else "resident"
        return AdapterInfo(
            name=entry.name,
            version=version.version,
            state=state,
            is_current=version is entry.current,
            is_pinned=is_pinned,
            reason=version.reason,
            nbytes=version.nbytes,
            num_vectors=version.num_vectors,
            sha256=version.sha256,
            uses=version.uses,
            last_used=version.last_used,
            loaded_at=version.loaded_at,
        )


def _watch(ref: "weakref.ref[AdapterStore]", poll_s: float) -> None:
    while (store := ref()) is not None:
        try:
            store.look()
        except OSError as error:  # a network volume may come back
            logger.warning("the directory of adapters cannot be read: %s", error.strerror)
        del store
        time.sleep(poll_s)
