"""Emptying a server before it is stopped: POST /api/v1/drain, for the admin (docs/scale.md)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from aiohttp import web
from pydantic import BaseModel, ConfigDict, Field

from server.bodies import read_json
from server.settings import MAX_DRAIN_S, ServerSettings

if TYPE_CHECKING:
    from server.registry import SessionRegistry

DRAIN_PATH = "/api/v1/drain"


class DrainWish(BaseModel):
    """Body of POST /api/v1/drain."""

    model_config = ConfigDict(extra="forbid")

    wait_s: float | None = Field(
        default=None,
        ge=0,
        le=MAX_DRAIN_S,
        description="for sessions to end by themselves before they are moved; none: the server's drain_s",
    )


def drain_routes(registry: SessionRegistry, settings: ServerSettings) -> list[web.RouteDef]:
    """POST begins, or begins anew; DELETE takes new sessions again. How far it is stands in /api/v1/capacity."""

    def shown(status: int) -> web.Response:
        body = {"draining": registry.draining, "open": registry.open_sessions}
        return web.json_response(body, status=status)

    async def drain(request: web.Request) -> web.Response:
        wish = await read_json(request, DrainWish)
        registry.start_drain(settings.drain_s if wish.wait_s is None else wish.wait_s)
        return shown(202)

    async def undo(request: web.Request) -> web.Response:
        registry.undo_drain()
        return shown(200)

    return [web.post(DRAIN_PATH, drain), web.delete(DRAIN_PATH, undo)]
