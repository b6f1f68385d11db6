"""REST to make a link that expires; `livebrush link` (server/link_command.py) makes one without the server."""

from __future__ import annotations

import time

from aiohttp import web
from pydantic import BaseModel, ConfigDict, Field

from server.access import Access, Link
from server.bodies import read_json
from server.errors import Forbidden, Unsupported
from server.guard import GRANT
from server.roles import DEFAULT_LINK_HOURS, MAX_LINK_HOURS, Role


class LinkWish(BaseModel):
    """Body of POST /api/v1/links."""

    model_config = ConfigDict(extra="forbid")

    role: str = Field(pattern="^(view|publish)$")
    stream: str = Field(default="", pattern="^[A-Za-z0-9_-]{0,64}$")
    hours: float = Field(default=DEFAULT_LINK_HOURS, gt=0, le=MAX_LINK_HOURS)


def link_route(access: Access) -> web.RouteDef:
    """POST /api/v1/links, for who holds a token of at least the link's role."""

    async def make(request: web.Request) -> web.Response:
        wish = await read_json(request, LinkWish)
        if not access.required:
            raise Unsupported("this server has no tokens: its URLs are open to all who reach it", code="no_tokens")
        if request[GRANT].is_link:
            raise Forbidden("a link makes no further links; use a token", code="role")
        link = access.link(Role[wish.role.upper()], wish.stream, hours=wish.hours, unix_now=time.time())
        return web.json_response(_shown(link), status=201)

    return web.post("/api/v1/links", make)


def _shown(link: Link) -> dict[str, object]:
    return {
        "token": link.token,
        "role": str(link.role),
        "stream": link.stream,
        "expires_at_unix_s": link.expires_at,
        "path": link.path,
    }
