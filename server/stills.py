"""One picture of a session, now: what the camera sees or what is shown, as PNG or JPEG (docs/recording.md)."""

from __future__ import annotations

import asyncio
import re
from concurrent.futures import Executor

import cv2
from aiohttp import hdrs, web

from engine.api import Frames
from server.errors import BadRequest, Forbidden, NotFound, ServerError
from server.guard import GRANT
from server.roles import Role
from server.session import Session

FORMATS = {"image/png": (".png", []), "image/jpeg": (".jpg", [cv2.IMWRITE_JPEG_QUALITY, 92])}
SOURCES = ("output", "input")
RETRY_S = 1.0
QUALITY = re.compile(r";\s*q=([01](?:\.\d{0,3})?)\s*$")


def wanted_format(accept: str) -> str:
    """The media type of `FORMATS` that an Accept header likes best, PNG where it likes both alike.

    Raises: ServerError (406) where it takes neither.
    """
    liked: dict[str, float] = {}
    for part in (accept or "*/*").split(","):
        kind = part.partition(";")[0].strip().lower()
        found = QUALITY.search(part)
        liked[kind] = float(found[1]) if found else 1.0

    def quality(kind: str) -> float:
        return liked.get(kind, liked.get("image/*", liked.get("*/*", 0.0)))

    best = max(FORMATS, key=quality)
    if quality(best) <= 0:
        raise ServerError(f"a still comes as {' or '.join(FORMATS)}", code="not_acceptable", status=406)
    return best


async def answer_still(request: web.Request, session: Session, executor: Executor) -> web.Response:
    """The newest picture, `?of=output` (what is shown) or `input` (what the engine gets).

    Raises: BadRequest for another source, Forbidden for the camera with a viewer's token, NotFound before the first
        picture.
    """
    source = request.query.get("of", "output")
    if source not in SOURCES:
        raise BadRequest(f"of: {source[:40]!r} is refused; there are {' and '.join(SOURCES)}")
    if source == "input" and request[GRANT].role < Role.PUBLISH:
        raise Forbidden("the camera's own picture needs a token for publish", code="role")
    kind = wanted_format(request.headers.get(hdrs.ACCEPT, ""))
    rgb = session.media.last_output if source == "output" else session.media.last_input
    if rgb is None:
        raise NotFound("there is no picture yet; try again in a moment", code="no_picture", retry_after_s=RETRY_S)
    data = await asyncio.get_running_loop().run_in_executor(executor, encoded, rgb, kind)
    return web.Response(body=data, content_type=kind, headers={hdrs.CACHE_CONTROL: "no-store", hdrs.VARY: "Accept"})


def encoded(rgb: Frames, kind: str) -> bytes:
    """An [H, W, 3] picture as a file of a type of `FORMATS`. Runs in a thread: some milliseconds."""
    suffix, options = FORMATS[kind]
    done, data = cv2.imencode(suffix, cv2.cvtColor(rgb, cv2.COLOR_RGB2BGR), options)
    if not done:
        raise ServerError("the picture could not be encoded")
    return bytes(data)
