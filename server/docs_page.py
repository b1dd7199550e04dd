"""GET /docs: the OpenAPI document as a page of plain HTML, without scripts and foreign files."""

import json
from base64 import b64encode
from hashlib import sha256
from html import escape
from typing import Any

from fastapi import FastAPI
from fastapi.responses import HTMLResponse

STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}
code{font:13px/1.45 ui-monospace,monospace}
table{border-collapse:collapse;width:100%}
td,th{border-top:1px solid #ccc;padding:.25rem .5rem;text-align:left;vertical-align:top}
summary{cursor:pointer}
b.verb{display:inline-block;min-width:4rem}
@media (prefers-color-scheme:dark){body{background:#111;color:#ddd}a{color:#8bf}}
"""
STYLE_HASH = b64encode(sha256(STYLE.encode()).digest()).decode()
POLICY = f"default-src 'none'; style-src 'sha256-{STYLE_HASH}'; frame-ancestors 'none'"
VERBS = ("get", "put", "post", "delete", "patch")

Node = dict[str, Any]  # a part of the OpenAPI document, which is JSON


def render(document: Node) -> str:
    """The page. All that it shows is escaped."""
    title = escape(f"{document['info']['title']} API")
    schemas: Node = document.get("components", {}).get("schemas", {})
    routes = [
        render_route(path, verb, item[verb])
        for path, item in document["paths"].items()
        for verb in VERBS
        if verb in item
    ]
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{title}</title>"
        f"<style>{STYLE}</style><h1>{title}</h1>"
        "<p>The same for programs: <a href=openapi.json><code>openapi.json</code></a>. Where keys "
        "are set up, send <code>Authorization: Bearer KEY</code>.</p>"
        f"<h2>Routes</h2>{''.join(routes)}"
        f"<h2>Schemas</h2>{''.join(render_schema(name, schemas[name]) for name in sorted(schemas))}"
    )


def render_route(path: str, verb: str, route: Node) -> str:
    """One route: what it does, takes and gives."""
    taken = route.get("requestBody", {}).get("content", {})
    lines = [f"<p>{escape(route.get('description') or route.get('summary', ''))}</p>"]
    for item in route.get("parameters", ()):
        kind = describe(item.get("schema", {}))
        lines.append(f"<p><code>{escape(item['name'])}</code> ({item['in']}): {kind}</p>")
    for media, body in taken.items():
        lines.append(f"<p>takes {escape(media)}: {describe(body.get('schema', {}))}</p>")
    replies: dict[str, list[str]] = {}
    for status, reply in route.get("responses", {}).items():
        kinds = " or ".join(
            f"{escape(media)}: {describe(body.get('schema', {}))}"
            for media, body in reply.get("content", {}).items()
        )
        replies.setdefault(kinds or escape(reply["description"]), []).append(escape(str(status)))
    lines += [f"<p>{', '.join(statuses)}: {kinds}</p>" for kinds, statuses in replies.items()]
    head = f"<b class=verb>{verb.upper()}</b> <code>{escape(path)}</code>"
    return f"<details><summary>{head}</summary>{''.join(lines)}</details>"


def render_schema(name: str, schema: Node) -> str:
    """One schema: its fields, each with type, bounds and meaning."""
    needed = schema.get("required", ())
    rows = "".join(
        f"<tr><td><code>{escape(field)}</code>{' *' if field in needed else ''}"
        f"<td>{describe(value)}<td>{escape(value.get('description', ''))}"
        for field, value in schema.get("properties", {}).items()
    )
    table = f"<table><tr><th>field<th>type<th>meaning{rows}</table>" if rows else describe(schema)
    text = f"<p>{escape(schema.get('description', ''))}</p>"
    return f"<h3 id='{escape(name)}'>{escape(name)}</h3>{text}{table}"


def describe(schema: Node) -> str:
    """The type of a value in a few words of HTML, with a link to a schema that has a name."""
    if "$ref" in schema:
        name = escape(schema["$ref"].rpartition("/")[2])
        return f"<a href='#{name}'>{name}</a>"
    for several in ("anyOf", "oneOf"):
        if several in schema:
            return " or ".join(map(describe, schema[several]))
    if schema.get("type") == "array":
        return f"list of {describe(schema.get('items', {}))}"
    bounds = {
        name: value
        for name, value in schema.items()
        if name not in ("type", "title", "description", "properties", "required", "items")
    }
    shown = f" <code>{escape(json.dumps(bounds))}</code>" if bounds else ""
    return f"{escape(str(schema.get('type', 'any value')))}{shown}"


def add_docs_route(app: FastAPI) -> None:
    """Serve /docs."""

    @app.get("/docs", include_in_schema=False)
    async def read_docs() -> HTMLResponse:
        """The page, made from the routes that there are."""
        return HTMLResponse(render(app.openapi()), headers={"content-security-policy": POLICY})
