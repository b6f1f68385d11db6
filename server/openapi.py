"""The OpenAPI document of the HTTP interface, and a plain page of it.

One table; the schemas come from the models that the handlers parse with. A test holds the table against the routes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from html import escape
from importlib.metadata import version
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from server.control import RecordingWish, SceneGo, SceneList, SessionChange
from server.drain import DrainWish
from server.guard import needed_role
from server.links import LinkWish

JSON = "application/json"
SCHEMAS = "#/components/schemas/"
PROBLEM = {
    "type": "object",
    "required": ["status", "code", "message", "retryable"],
    "properties": {
        "status": {"type": "integer"},
        "code": {"type": "string", "description": "for programs"},
        "message": {"type": "string", "description": "for people: what was wrong, the bound, the cure"},
        "retryable": {"type": "boolean"},
        "retry_after_s": {"type": "number"},
    },
}


@dataclass(frozen=True, slots=True)
class Call:
    """One method of one path. body: the model it is parsed with, or None. answers: what by status."""

    method: str
    path: str
    summary: str
    answers: tuple[tuple[int, str], ...]
    body: type[BaseModel] | None = None


def _steered(path: str, noun: str) -> tuple[Call, ...]:
    ok, gone = (200, f"the {noun} as it is now"), (404, f"no such {noun}")
    done, broken = (204, "done"), (400, "refused: which field, and its bound")
    return (
        Call("get", path, f"One {noun}: parameters, scene, figures", (ok, gone)),
        Call("patch", path, "Change what is given; the rest stays", (ok, broken, gone), SessionChange),
        Call("delete", path, f"End the {noun}", (done, gone)),
        Call("get", path + "/scenes", "The scene list and where it stands", ((200, "the list"), gone)),
        Call("put", path + "/scenes", "Load a scene list and begin it", (ok, broken, gone), SceneList),
        Call("delete", path + "/scenes", "Forget the scene list; the picture stays", (done, gone)),
        Call("post", path + "/scenes/go", "Go to a scene", (ok, broken, gone), SceneGo),
        Call(
            "get", path + "/still", "The newest picture, ?of=output or input", ((200, "PNG or JPEG, by Accept"), gone)
        ),
        Call("get", path + "/recording", "The recording that runs, or ran last", ((200, "how it goes"), gone)),
        Call(
            "post",
            path + "/recording",
            "Begin to record on the server's disk",
            ((201, "it has begun"), broken, gone, (409, "one runs"), (422, "not here"), (507, "no room")),
            RecordingWish,
        ),
        Call("delete", path + "/recording", "End the recording", ((200, "how it went"), gone)),
    )


CALLS = (
    Call("get", "/api/v1/version", "Name and version", ((200, "name and version"),)),
    Call("get", "/api/v1/models", "The model that is served, and its styles", ((200, "the models"),)),
    Call(
        "get",
        "/api/v1/models/{id}/schema",
        "JSON schema of what can be set on a session",
        ((200, "a JSON schema"), (404, "not served here")),
    ),
    Call("get", "/api/v1/capacity", "Seats, rate and cost", ((200, "seats, rung, load, costs"),)),
    Call("get", "/api/v1/ice-servers", "RTCConfiguration for a page", ((200, "iceServers"),)),
    Call("get", "/api/v1/openapi.json", "This document", ((200, "an OpenAPI document"),)),
    Call("post", "/api/v1/links", "Make a link that expires", ((201, "the link"), (400, "broken")), LinkWish),
    Call("post", "/api/v1/drain", "Empty this server (docs/scale.md)", ((202, "it has begun"),), DrainWish),
    Call("delete", "/api/v1/drain", "Take new sessions again", ((200, "they are"),)),
    Call("get", "/api/v1/sessions", "Every open session", ((200, "the sessions"),)),
    *_steered("/api/v1/sessions/{id}", "session"),
    Call("get", "/api/v1/streams", "Every published stream", ((200, "the streams"),)),
    *_steered("/api/v1/streams/{stream}", "stream"),
    Call(
        "post",
        "/api/v1/webrtc/offer",
        "Open a session: SDP offer in, SDP answer out (docs/protocol.md)",
        ((201, "the answer"), (400, "broken"), (422, "not supported"), (503, "full: see Retry-After")),
    ),
    Call("get", "/api/v1/socket", "A session over one WebSocket (docs/networks.md)", ((101, "upgraded"),)),
    Call("patch", "/api/v1/webrtc/offer/{id}", "More ICE candidates", ((204, "taken"), (404, "no such session"))),
    Call("delete", "/api/v1/webrtc/offer/{id}", "End a session", ((204, "done"), (404, "no such session"))),
    Call("post", "/api/v1/webrtc/offer/{id}/close", "The same, for sendBeacon", ((204, "done"),)),
)


@cache
def document() -> dict[str, Any]:
    """The OpenAPI 3.1 document."""
    bodies = sorted({call.body for call in CALLS if call.body is not None}, key=lambda model: model.__name__)
    _, schemas = models_json_schema([(model, "validation") for model in bodies], ref_template=SCHEMAS + "{model}")
    paths: dict[str, dict[str, Any]] = {}
    for call in CALLS:
        paths.setdefault(call.path, {})[call.method] = _operation(call)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Livebrush",
            "version": version("livebrush"),
            "description": "Restyles live video. What data channels carry stands in docs/protocol.md, WHIP and WHEP"
            " in docs/whip.md, examples in docs/steering.md.",
        },
        "paths": paths,
        "components": {
            "schemas": {"Problem": PROBLEM, **schemas["$defs"]},
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
        },
    }


def _operation(call: Call) -> dict[str, Any]:
    answers: dict[str, Any] = {str(status): {"description": text} for status, text in call.answers}
    answers["default"] = {
        "description": "refused",
        "content": {"application/problem+json": {"schema": {"$ref": SCHEMAS + "Problem"}}},
    }
    operation: dict[str, Any] = {"summary": call.summary, "responses": answers}
    role = needed_role(call.method.upper(), call.path)
    # A server without tokens asks nobody.
    operation["security"] = [] if role is None else [{}, {"token": [str(role)]}]
    names = [part[1:-1] for part in call.path.split("/") if part.startswith("{")]
    if names:
        operation["parameters"] = [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in names
        ]
    if call.body is not None:
        schema = {"$ref": SCHEMAS + call.body.__name__}
        operation["requestBody"] = {"required": True, "content": {JSON: {"schema": schema}}}
    return operation


def page() -> str:
    """The table as an HTML page; nothing in it comes from elsewhere."""
    rows = "".join(
        f"<tr><td><code>{call.method.upper()}</code><td><code>{escape(call.path)}</code><td>{escape(call.summary)}"
        f"<td>{needed_role(call.method.upper(), call.path) or ''}"
        f"<td>{escape(call.body.__name__ if call.body else '')}"
        f"<td>{escape(', '.join(str(status) for status, _ in call.answers))}"
        for call in CALLS
    )
    schemas = "".join(
        f"<h2>{escape(name)}</h2><table><tr><th>Field<th>Bounds<th>What{_fields(schema)}</table>"
        for name, schema in document()["components"]["schemas"].items()
    )
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>Livebrush: HTTP interface</title>'
        '<meta name="viewport" content="width=device-width"><link rel="stylesheet" href="/api.css">'
        '<h1>Livebrush: HTTP interface</h1><p>For programs: <a href="/api/v1/openapi.json">OpenAPI document</a>.'
        " Every refusal is a Problem. A server with tokens asks for <code>Authorization: Bearer</code>.</p>"
        f"<table><tr><th>Method<th>Path<th>What<th>Role<th>Body<th>Answers{rows}</table>{schemas}</html>"
    )


def _fields(schema: dict[str, Any]) -> str:
    return "".join(
        f"<tr><td><code>{escape(name)}</code><td>{escape(_bounds(field))}<td>{escape(field.get('description', ''))}"
        for name, field in schema.get("properties", {}).items()
    )


def _bounds(field: dict[str, Any]) -> str:
    """A field's type and bounds in words."""
    forms = field.get("anyOf", [field])
    words = []
    for form in forms:
        if form.get("type") == "null":
            continue
        text = form.get("$ref", "").rpartition("/")[2] or form.get("type", "") or "any"
        if "enum" in form:
            text = ", ".join(map(str, form["enum"]))
        for key, word in (
            ("exclusiveMinimum", "over"),
            ("minimum", "from"),
            ("maximum", "to"),
            ("exclusiveMaximum", "below"),
            ("minItems", "at least"),
            ("maxItems", "at most"),
            ("maxLength", "characters at most"),
        ):
            if key in form:
                text += f" {word} {form[key]:g}"
        words.append(text)
    return " or ".join(words)
