"""Fields that nobody knows, named or refused; and what headers say about reading a body."""

import difflib
import hashlib
from collections.abc import Sequence
from urllib.parse import quote

from fastapi import Request as HttpRequest

from server.errors import ApiError
from server.schemas import Body

MAX_NAMED_CHARS = 64
USER_CHARS = 16


def is_on(http: HttpRequest, header: str) -> bool:
    """Whether a header switches something on."""
    return http.headers.get(header, "").strip().lower() in ("1", "true", "yes", "on")


def check_fields(http: HttpRequest, body: Body, *, is_strict: bool) -> list[str]:
    """Names of the fields without a meaning here.

    Raises ApiError (400) instead if the settings, the body or the header `x-strict` say so.
    """
    ignored = body.ignored_fields()
    if ignored and (is_strict or getattr(body, "strict", False) or is_on(http, "x-strict")):
        raise unknown_field(ignored[0], type(body))
    return ignored


def unknown_field(name: str, kind: type[Body]) -> ApiError:
    """A refusal that says which known field may have been meant."""
    known = list(kind.model_fields)
    if name in known:
        text = f"field {name!r} has no effect here; leave it out"
        return ApiError(400, text, code="unknown_parameter", param=name)
    short = quote(name[:MAX_NAMED_CHARS], safe=" ", errors="replace")
    near = difflib.get_close_matches(name[:MAX_NAMED_CHARS], known, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    text = f"unknown field {short!r}{hint}"
    return ApiError(400, text, code="unknown_parameter", param=short)


def ignored_header(names: Sequence[str]) -> dict[str, str]:
    """The header that names fields without a meaning here."""
    if not names:
        return {}
    short = [quote(name[:MAX_NAMED_CHARS], errors="replace") for name in names]
    return {"x-ignored-fields": ",".join(short)}


def hash_user(user: str) -> str:
    """What the log tells of the field `user`: the same for the same one, and not who it is."""
    return hashlib.sha256(user.encode()).hexdigest()[:USER_CHARS]
