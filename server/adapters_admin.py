"""Routes under /admin/adapters: list, load, pin, roll back, upload and delete adapters."""

import asyncio
import errno
import logging
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, TypeVar

import anyio
from fastapi import FastAPI, Query, Request, Response

from engine.adapter_states import AdapterInfo
from engine.adapter_upload import Outcome, Upload, remove_version
from engine.errors import CheckpointError, RequestError
from server.adapters import FINAL, Adapters
from server.errors import ApiError
from server.responses import ERRORS, Documented
from server.schemas import ErrorBody
from server.schemas_adapters import (
    AdapterDetails,
    AdapterEntry,
    AdapterPage,
    Removed,
    RollbackBody,
    VersionBody,
)
from server.settings import Settings
from server.tarball import TarReader

logger = logging.getLogger(__name__)

PATH = "/admin/adapters"
UPLOADS = 2  # at the same time
MIN_FREE_BYTES = 16 * 2**20  # of the disk, after an upload
FULL = (errno.ENOSPC, errno.EDQUOT)
FULL_DISK: Documented = {
    507: {"model": ErrorBody, "description": "The disk of the adapters is full"}
}
STAGING = re.compile(r"\.upload-[0-9a-f]{32}/?")
T = TypeVar("T")


class AdapterAdmin:
    """What administrators may do with the adapters of one server."""

    def __init__(self, adapters: Adapters, settings: Settings) -> None:
        self._store = adapters.store
        self._max_upload_bytes = settings.max_upload_bytes
        self._uploads = asyncio.Semaphore(UPLOADS)

    async def show_all(
        self, limit: Annotated[int, Query(ge=1, le=1000)] = 100, after: str = ""
    ) -> AdapterPage:
        """Adapters by name, with the state of each version; `limit` names at a time."""
        names = self._store.names()
        rest = [name for name in names if name > after]
        told = await self._run(lambda: [info for name in rest[:limit] for info in self._tell(name)])
        held = self._store.snapshot()
        return AdapterPage(
            data=[self._entry(info) for info in told],
            total=len(names),
            next_after=rest[limit - 1] if len(rest) > limit else None,
            used_bytes=held.used_bytes,
            limit_bytes=held.limit_bytes,
        )

    async def show(self, name: str) -> AdapterDetails:
        """All versions of an adapter."""
        told = await self._run(lambda: self._store.tell(name))
        current = next((info.version for info in told if info.is_current), None)
        entries = [self._entry(info) for info in told]
        return AdapterDetails(name=name, current=current, versions=entries)

    async def load(self, name: str, body: VersionBody | None = None) -> AdapterEntry:
        """Read a version into memory now, instead of at its first use."""
        return await self._act(self._store.load, name, body)

    async def unload(self, name: str, body: VersionBody | None = None) -> AdapterEntry:
        """Let the memory of a version go; requests in flight keep it, the next one reads it."""
        return await self._act(self._store.unload, name, body)

    async def pin(self, name: str, body: VersionBody | None = None) -> AdapterEntry:
        """Read a version and keep it in memory until it is unpinned, also after a restart."""
        return await self._act(self._store.pin, name, body)

    async def unpin(self, name: str, body: VersionBody | None = None) -> AdapterEntry:
        """Let a version go again when room is needed."""
        return await self._act(self._store.unpin, name, body)

    async def roll_back(self, name: str, body: RollbackBody) -> AdapterEntry:
        """Let the name mean another of its versions, now and after a restart."""
        return self._entry(
            await self._run(lambda: self._store.make_current(name, body.version), "rollback")
        )

    async def upload(
        self, name: str, version: str, request: Request, response: Response
    ) -> AdapterEntry:
        """Take in a version as a tar, plain or gzipped, and let the name mean it.

        201 if it is new; 200 if it was there, the same: then what the name means is not changed.
        """
        async with self._uploads:
            with translated(self._store.root, upload=True):
                upload = Upload(self._store.root, name, version)
                try:
                    outcome = await self._receive(upload, request)
                finally:
                    with anyio.CancelScope(shield=True):
                        await anyio.to_thread.run_sync(upload.close)
        if outcome == "taken":
            text = (
                f"{name}@{version} is there with another content; versions do not change: "
                "give it another one, or delete it first"
            )
            raise ApiError(409, text, code="version_exists", param="version", headers=FINAL)
        response.status_code = 201 if outcome == "new" else 200
        if outcome == "new":
            info = await self._run(lambda: self._store.make_current(name, version), "upload")
        else:
            info = await self._run(lambda: self._store.find_info(f"{name}@{version}"))
        return self._entry(info)

    async def delete(self, name: str, version: str | None = None) -> Removed:
        """Delete a version, or all of them; requests in flight keep theirs."""
        await self._run(lambda: remove_version(self._store, name, version))
        logger.info("admin: deleted adapter %s version %s", name, version or "(all)")
        return Removed(name=name, version=version)

    async def _act(
        self, work: Callable[[str], AdapterInfo], name: str, body: VersionBody | None
    ) -> AdapterEntry:
        version = body.version if body else None
        reference = name if version is None else f"{name}@{version}"
        return self._entry(await self._run(lambda: work(reference), work.__name__))

    async def _run(self, work: Callable[[], T], action: str | None = None) -> T:
        """Do something in a thread, and log what changes anything."""
        with translated(self._store.root):
            done = await anyio.to_thread.run_sync(work)
        if action is not None and isinstance(done, AdapterInfo):
            logger.info("admin: %s adapter %s version %s", action, done.name, done.version)
        return done

    async def _receive(self, upload: Upload, request: Request) -> Outcome:
        length = request.headers.get("content-length", "")
        needed = int(length[:20]) if length.isdecimal() else 0
        await anyio.to_thread.run_sync(require_space, self._store.root, needed)
        await anyio.to_thread.run_sync(upload.open)
        reader = TarReader(upload, self._max_upload_bytes)
        async for piece in request.stream():
            await anyio.to_thread.run_sync(reader.feed, piece)
        reader.finish()
        return await anyio.to_thread.run_sync(upload.install, self._store)

    def _tell(self, name: str) -> list[AdapterInfo]:
        try:
            return self._store.tell(name)
        except RequestError:  # no version in it, or gone meanwhile
            return []

    def _entry(self, info: AdapterInfo) -> AdapterEntry:
        return AdapterEntry(
            name=info.name,
            version=info.version,
            state=info.state,
            is_current=info.is_current,
            is_pinned=info.is_pinned,
            reason=without_paths(self._store.root, info.reason) if info.reason else None,
            bytes=info.nbytes,
            num_vectors=info.num_vectors,
            sha256=info.sha256,
            uses=info.uses,
            last_used=info.last_used,
            loaded_at=info.loaded_at,
        )


def require_space(root: Path, num_bytes: int) -> None:
    """Raise OSError unless the disk has room for so much and a little more."""
    if shutil.disk_usage(root).free < num_bytes + MIN_FREE_BYTES:
        raise OSError(errno.ENOSPC, "no space left on the disk")


def without_paths(root: Path, text: str) -> str:
    """A text without where the directory lies on this machine."""
    return STAGING.sub("", text.replace(f"{root}/", ""))


@contextmanager
def translated(root: Path, *, upload: bool = False) -> Iterator[None]:
    """Tell what went wrong as an ApiError; administrators may read what is wrong with a file."""
    try:
        yield
    except RequestError as error:
        status, code = (400, "invalid_upload") if upload else (404, "adapter_not_found")
        raise ApiError(status, str(error), code=code, param=error.field) from error
    except CheckpointError as error:
        raise ApiError(400, without_paths(root, str(error)), code="invalid_adapter") from error
    except OSError as error:
        if error.errno in FULL:
            text = "the disk of the adapters is full; delete some, nothing was changed"
            raise ApiError(507, text, code="disk_full", headers=FINAL) from error
        logger.error("the directory of adapters: %s", error)  # noqa: TRY400  the system's text tells
        text = "the directory of adapters cannot be written; the server log has details"
        raise ApiError(500, text, code="storage_failed", headers=FINAL) from error


def add_adapter_routes(app: FastAPI, adapters: Adapters | None, settings: Settings) -> None:
    """Serve the routes, if there is a directory of adapters."""
    if adapters is None:
        return
    admin = AdapterAdmin(adapters, settings)
    one, version = f"{PATH}/{{name}}", f"{PATH}/{{name}}/{{version}}"
    tar: dict[str, object] = {"schema": {"type": "string", "format": "binary"}}
    body = {"requestBody": {"required": True, "content": {"application/x-tar": tar}}}
    app.add_api_route(PATH, admin.show_all, responses=ERRORS)
    actions: dict[str, Callable[..., object]] = {
        "load": admin.load,
        "unload": admin.unload,
        "pin": admin.pin,
        "unpin": admin.unpin,
        "rollback": admin.roll_back,
    }
    for action, work in actions.items():
        app.add_api_route(f"{one}:{action}", work, methods=["POST"], responses=ERRORS)
    app.add_api_route(one, admin.show, responses=ERRORS)
    app.add_api_route(
        version,
        admin.upload,
        methods=["PUT"],
        responses={201: {"model": AdapterEntry}, **ERRORS, **FULL_DISK},
        openapi_extra=body,
    )
    app.add_api_route(version, admin.delete, methods=["DELETE"], responses=ERRORS)
    app.add_api_route(one, admin.delete, methods=["DELETE"], responses=ERRORS)
