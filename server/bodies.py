"""The body of a request: its type checked, its size and its time bounded, never decompressed."""

from __future__ import annotations

import asyncio
from typing import TypeVar

from aiohttp import web
from pydantic import BaseModel, ValidationError

from server.errors import BadRequest, TooLarge, WrongMediaType

Body = TypeVar("Body", bound=BaseModel)

MAX_BODY_BYTES = 48 * 1024
BODY_TIMEOUT_S = 10.0


async def read_body(request: web.Request, content_type: str) -> bytes:
    """The body, if it is of `content_type`. Raises WrongMediaType, TooLarge or BadRequest, each naming the bound."""
    if request.content_type != content_type or "Content-Encoding" in request.headers:
        raise WrongMediaType(f"send plain {content_type}, not {request.content_type}")
    return await read_any(request)


async def read_any(request: web.Request) -> bytes:
    """The body, of whatever type. Raises TooLarge or BadRequest, each naming the bound."""
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            return await request.read()
    except web.HTTPRequestEntityTooLarge:
        raise TooLarge(f"the body is over {MAX_BODY_BYTES} bytes; an offer of a browser has about 6,000") from None
    except TimeoutError:
        raise BadRequest(f"the body did not arrive within {BODY_TIMEOUT_S:.0f} s") from None


async def read_json(request: web.Request, model: type[Body]) -> Body:
    """The JSON body as `model`. Raises WrongMediaType, TooLarge or BadRequest, each naming the bound."""
    raw = await read_body(request, "application/json")
    try:
        return model.model_validate_json(raw)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "body"
        raise BadRequest(f"{where}: {first['msg']}") from error
