"""Reading adapters from their directory: only what is whole, and what fits the model.

A version counts only when its manifest lists it, or, for a folder that was put there by hand, two
looks some time apart found it the same; and when it can be read. Until then, and if it is damaged,
the name goes on meaning the version before. The caller holds the `reading` of an entry.
"""

import logging
import time
from collections.abc import Callable
from pathlib import Path

from engine.adapter_folders import (
    PLAIN,
    Signature,
    check_inside,
    has_manifest,
    is_version,
    list_versions,
    read_change,
    sign,
)
from engine.adapter_states import Entry, Version
from engine.adapter_table import AdapterTable
from engine.adapters import Adapter, Base, load_adapter
from engine.adapters_manifest import check_manifest, content_sha256, measure_files
from engine.errors import CheckpointError, Overloaded, RequestError
from engine.request import SamplingParams

logger = logging.getLogger(__name__)

COARSE_NS = 5 * 10**9  # a second change so soon after the first may leave no trace in its time
RETRY_S = 30.0  # after a failure that may have been the network's


class AdapterReader:
    """Keeps entries in step with their folders, and what they hold in a table.

    `describe` tells the model that adapters are read for; it raises EngineStopped without one.
    """

    def __init__(
        self,
        root: Path,
        describe: Callable[[], Base],
        table: AdapterTable,
        *,
        is_any_base_allowed: bool,
        settle_s: float,
    ) -> None:
        self.root = root
        self.table = table
        self.loads = 0
        self.failures = 0
        self._describe = describe
        self._is_any_base_allowed = is_any_base_allowed
        self._settle_s = settle_s

    def read(self, path: Path, name: str, version: str | None) -> Adapter:
        """Read a folder as the adapter that it would be, without taking it in.

        Raises CheckpointError if it cannot be served.
        """
        base = self._describe()
        adapter = load_adapter(
            path,
            base.config,
            base.dtype,
            base.device,
            fingerprint=None if self._is_any_base_allowed else base.fingerprint,
            name=name,
            version=version,
        )
        check_defaults(path, adapter)
        needed, limit = adapter.prompt_PD.nbytes, self.table.limit_bytes
        if needed > limit:
            raise CheckpointError(
                f"{path}: its vectors take {needed:,} bytes; all adapters may take {limit:,}"
            )
        return adapter

    def refresh(self, entry: Entry) -> None:
        """Bring the versions of a name up to date."""
        try:
            changed_ns = read_change(self.root, entry.name)
        except OSError:  # a network volume that may come back: what is known stays
            return
        is_recent = changed_ns is not None and abs(time.time_ns() - changed_ns) < COARSE_NS
        if changed_ns is not None and changed_ns == entry.changed_ns and not is_recent:
            return
        try:
            folders = {} if changed_ns is None else list_versions(self.root, entry.name)
        except FileNotFoundError:  # gone meanwhile
            folders = {}
        except OSError:
            return
        known = entry.versions
        kept = {
            key: known.get(key) or Version(key, path, key or None) for key, path in folders.items()
        }
        gone = [version for key, version in known.items() if key not in kept]
        if entry.current in gone:
            entry.current = None
        entry.versions = kept  # at once: others read it
        entry.changed_ns = changed_ns
        self.forget(entry, gone)

    def forget(self, entry: Entry, gone: list[Version]) -> None:
        """Let go what is not on the disk any more; requests in flight keep theirs."""
        for version in gone:
            if version.version is not None:
                entry.contents.pop(version.version, None)
                self.table.discard(entry.name, version.version)

    def find_current(self, entry: Entry, *, waits: bool) -> tuple[Version, Adapter | None]:
        """Let the name mean its best version that can be served; read if it was not yet.

        If all are still being written, `waits` waits for the first. Raises the error of the best
        one if none can be served, RequestError if there is none.
        """
        errors: list[CheckpointError | Overloaded] = []
        for version in entry.versions.values():
            try:
                adapter = None
                if sign(version.path) != version.good:
                    adapter = self._load(entry, version, waits=False)
            except (CheckpointError, Overloaded) as error:
                errors.append(error)
                continue
            self._set_current(entry, version)
            return version, adapter
        current = entry.current
        if current is not None:  # its files went bad; what was read of them did not
            adapter = self.table.find(entry.name, current.version or "")
            if adapter is not None:
                return current, adapter
        best = next(iter(entry.versions.values()), None)
        if best is None:
            raise RequestError(f"adapter {entry.name!r} is not known", "adapter")
        if waits and all(isinstance(error, Overloaded) for error in errors):
            adapter = self._load(entry, best, waits=True)
            self._set_current(entry, best)
            return best, adapter
        raise errors[0]

    def fetch(self, entry: Entry, version: Version) -> Adapter:
        """The adapter of a version, from memory if its files are as they were."""
        if version.version is not None and sign(version.path) == version.good:
            adapter = self.table.find(entry.name, version.version)
            if adapter is not None:
                return adapter
        return self._load(entry, version, waits=True)

    def fetch_version(self, entry: Entry, wanted: str) -> Adapter:
        """The adapter of a version that was asked for. Raises RequestError if there is none."""
        version = entry.versions.get(wanted) if wanted != PLAIN else None
        if version is not None:
            return self.fetch(entry, version)
        plain = entry.versions.get(PLAIN)
        if plain is not None and is_version(wanted):
            adapter = self.fetch(entry, plain)
            if adapter.version == wanted:
                return adapter
        raise RequestError(f"adapter {entry.name!r} has no version {wanted[:100]!r}", "adapter")

    def _set_current(self, entry: Entry, version: Version) -> None:
        if entry.current is not version:
            logger.info("adapter %s means version %s now", entry.name, version.version)
        entry.current = version

    def _load(self, entry: Entry, version: Version, *, waits: bool) -> Adapter:
        """Read a version and take it in."""
        files = sign(version.path)
        if version.bad is not None and version.bad[0] == files:
            if time.monotonic() - version.bad[1] < RETRY_S:
                raise CheckpointError(str(version.reason))
        elif files != version.good and not has_manifest(files):
            files = self._settle(version, files, waits=waits)
        version.is_loading = True
        try:
            return self._take_in(entry, version, files)
        except CheckpointError as error:
            if version.reason != str(error):
                # as a text: the error holds all that its frames do, and records may be kept
                logger.warning("adapter %s cannot be served: %s", entry.name, str(error))
            self.failures += 1
            version.reason, version.bad = str(error), (files, time.monotonic())
            raise
        finally:
            version.is_loading = False

    def _settle(self, version: Version, files: Signature, *, waits: bool) -> Signature:
        """Files that have been the same for a while. Raises Overloaded if they are not."""
        if not self._is_settled(version, files) and waits:
            time.sleep(self._settle_s)
            files = sign(version.path)
        if not self._is_settled(version, files):
            raise Overloaded("the adapter is being written; try again", self._settle_s)
        return files

    def _is_settled(self, version: Version, files: Signature) -> bool:
        now = time.monotonic()
        if version.seen is None or version.seen[0] != files:
            version.seen = (files, now)
        return now - version.seen[1] >= self._settle_s

    def _take_in(self, entry: Entry, version: Version, files: Signature) -> Adapter:
        check_inside(self.root, version.path)
        facts = measure_files(version.path)
        if has_manifest(files):
            check_manifest(version.path, facts)
        adapter = self.read(version.path, entry.name, version.key or None)
        sha256 = content_sha256(facts)
        if entry.contents.get(adapter.version, sha256) != sha256:
            raise CheckpointError(
                f"{version.path}: is not what it was when version {adapter.version} was read; put "
                "new vectors into a folder of their own, with another version"
            )
        if sign(version.path) != files:
            raise Overloaded("the adapter is being written; try again", self._settle_s)
        lent = self.table.add(adapter)
        old = version.version
        entry.contents[adapter.version] = sha256
        version.version, version.sha256 = adapter.version, sha256
        version.nbytes, version.num_vectors = adapter.prompt_PD.nbytes, adapter.num_vectors
        version.good, version.bad, version.reason = files, None, None
        version.loaded_at = time.time()
        self.loads += 1
        if old is not None and old != adapter.version:  # a plain folder has new content
            self.table.discard(entry.name, old)
        return lent


def check_defaults(path: Path, adapter: Adapter) -> None:
    """Raise CheckpointError if a request could not have the values that an adapter sets."""
    values = dict(adapter.defaults)
    stop = values.pop("stop", [])
    assert isinstance(stop, list)
    try:
        SamplingParams(**values, stop=tuple(stop))  # type: ignore[arg-type]  # checked by name
    except RequestError as error:
        raise CheckpointError(f"{path}: defaults: {error}") from error
