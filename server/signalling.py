"""HTTP: offer and answer, health, metrics, the page. Parses and replies, decides nothing (docs/protocol.md)."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from typing import Any

from aiohttp import web
from pydantic import BaseModel, ConfigDict, Field

from engine.api import EngineState
from server.access import Access
from server.bodies import MAX_BODY_BYTES, read_json
from server.catalogue import model_name
from server.drain import drain_routes
from server.errors import ServerError, TooManyRequests, problem
from server.guard import Guard
from server.health import health_routes
from server.links import link_route
from server.peer import answer_offer
from server.registry import SessionRegistry
from server.rest import Rest
from server.resume import Wish
from server.session_context import SessionContext
from server.socket_route import socket_route
from server.steering import Steering
from server.turn import LIFETIME_S, ice_servers
from server.whip import Whip

log = logging.getLogger(__name__)

MAX_CANDIDATES = 24
MAX_CLASS_CHARS = 32
CONTENT_SECURITY_POLICY = (
    "default-src 'self'; img-src 'self' data: blob:; media-src 'self' blob: mediastream:; "
    "object-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
# What the page uses; everything else is off for it and for whatever it might be made to load.
PERMISSIONS_POLICY = (
    "camera=(self), microphone=(self), display-capture=(self), midi=(self), autoplay=(self), fullscreen=(self), "
    "clipboard-write=(self), screen-wake-lock=(self), geolocation=(), payment=(), usb=(), serial=(), hid=()"
)

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Offer(Wish):
    """Body of POST /api/v1/webrtc/offer."""

    type: str = Field(pattern="^offer$")
    sdp: str


class Candidates(BaseModel):
    """Body of PATCH /api/v1/webrtc/offer/{id}."""

    model_config = ConfigDict(extra="forbid")

    candidates: list[dict[str, Any]] = Field(max_length=MAX_CANDIDATES)


class Signalling:
    """The HTTP handlers over one registry."""

    def __init__(
        self,
        context: SessionContext,
        registry: SessionRegistry,
        styles: list[dict[str, str]],
    ) -> None:
        self._context = context
        self._registry = registry
        self._styles = styles
        self._whip = Whip(context, registry)
        self._access = Access(context.settings.tokens.by_role())
        self.guard = Guard(context.settings, self._access)
        context.metrics.registry.register(self.guard)
        self.steering = Steering(registry, self._whip)

    def application(self) -> web.Application:
        """The aiohttp application with every route."""
        app = web.Application(middlewares=[self._wall, self.guard.middleware], client_max_size=MAX_BODY_BYTES)
        self._whip.add_to(app)
        Rest(self._context, self.steering).add_to(app)
        offer = "/api/v1/webrtc/offer"
        app.add_routes(
            [
                *health_routes(self._context.engine),
                link_route(self._access),
                *drain_routes(self._registry, self._context.settings),
                web.get("/api/v1/version", self._version),
                web.get("/api/v1/models", self._models),
                web.get("/api/v1/ice-servers", self._ice_servers),
                web.get("/api/v1/capacity", self._capacity),
                web.post(offer, self._offer),
                socket_route(self._context, self._registry),
                web.patch(offer + "/{id}", self._trickle),
                web.delete(offer + "/{id}", self._delete),
                web.post(offer + "/{id}/close", self._delete),
                web.get("/", self._page),
                web.get("/overlay", self._overlay),
                web.static("/", self._context.settings.web_dir),
            ]
        )
        app.on_response_prepare.append(_add_headers)
        return app

    @web.middleware
    async def _wall(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Every refusal in one shape; a fault of ours is logged, counted and answered without its details."""
        try:
            return await handler(request)
        except ServerError as error:
            if request.method == "POST" and not request.path.endswith("/close"):
                self._context.metrics.refused.labels(error.code).inc()
                if error.status != TooManyRequests.status:
                    # OBS shows none of it: whatever it is refused for, it speaks of a stream key.
                    log.info("%s %s refused: %d, %s", request.method, request.path[:100], error.status, error)
            return problem(error)
        except web.HTTPException as error:
            if error.status < 400:
                raise
            return problem(ServerError(error.reason, code=f"http_{error.status}", status=error.status))
        except Exception:
            self._context.metrics.faults.labels("http").inc()
            log.exception("%s %s failed", request.method, request.path)
            return problem(ServerError("the server failed at this request; its log says why"))

    # --- what there is

    async def _version(self, request: web.Request) -> web.Response:
        recordings = self._context.recordings is not None and self._context.recordings.offered
        return web.json_response({"name": "livebrush", "version": version("livebrush"), "recordings": recordings})

    async def _models(self, request: web.Request) -> web.Response:
        settings = self._context.settings
        width, height = self._context.engine.frame_size
        model = {
            "id": settings.engine.model,
            "name": model_name(settings.engine),
            "size": f"{width}x{height}",
            "fps": settings.max_fps,
            "steps": settings.steps,
            "steps_max": self._context.steps_max,
            "seed": self._context.seed,
            "styles": self._styles,
        }
        return web.json_response({"models": [model]})

    async def _ice_servers(self, request: web.Request) -> web.Response:
        servers = [server.as_json() for server in ice_servers(self._context.settings.media)]
        return web.json_response({"iceServers": servers, "ttl_s": LIFETIME_S}, headers={"Cache-Control": "no-store"})

    async def _capacity(self, request: web.Request) -> web.Response:
        registry, capacity = self._registry, self._context.engine.capacity
        costs = [
            {
                "steps": cost.steps,
                "small": cost.small,
                "light": cost.light,
                "mean_ms": round(cost.mean_s * 1000, 1),
                "upper_ms": round(cost.upper_s * 1000, 1),
            }
            for cost in capacity.costs
        ]
        return web.json_response(
            {
                "node": self._context.node,
                "ready": self._context.engine.status.state is EngineState.READY,
                "draining": registry.draining,
                "streams": self._whip.names(),
                "retry_after_s": round(registry.retry_after_s, 1),
                "open": registry.open_sessions,
                "seats": registry.seats,
                "fps": registry.rung.fps,
                "rung": asdict(registry.rung),
                "load": round(registry.load, 3),
                "chunk_cost_ms": round(capacity.chunk_cost_s * 1000, 1),
                "costs": costs,
                "state_bytes": capacity.state_bytes,
            }
        )

    async def _page(self, request: web.Request) -> web.FileResponse:
        return web.FileResponse(self._context.settings.web_dir / "index.html")

    async def _overlay(self, request: web.Request) -> web.FileResponse:
        return web.FileResponse(self._context.settings.web_dir / "overlay.html")

    # --- sessions

    async def _offer(self, request: web.Request) -> web.Response:
        offer = await read_json(request, Offer)
        entry = await self._registry.enter(partial(answer_offer, offer.sdp, self._context.settings.media), offer)
        assert entry.session.peer is not None
        url = f"/api/v1/webrtc/offer/{entry.name}"
        body: dict[str, object] = {"type": "answer", "sdp": entry.session.peer.answer_sdp, "url": url}
        body |= entry.as_json(self._context.engine.frame_size)
        return web.json_response(body, status=201, headers={"Location": url})

    async def _trickle(self, request: web.Request) -> web.Response:
        session = self._registry.get(request.match_info["id"])
        body = await read_json(request, Candidates)
        if session.peer is not None:
            await session.peer.add_candidates(body.candidates)
        return web.Response(status=204)

    async def _delete(self, request: web.Request) -> web.Response:
        await self._registry.close(request.match_info["id"])
        return web.Response(status=204)


async def _add_headers(request: web.Request, response: web.StreamResponse) -> None:
    response.headers.setdefault("Content-Security-Policy", CONTENT_SECURITY_POLICY)
    response.headers.setdefault("Permissions-Policy", PERMISSIONS_POLICY)
    response.headers.setdefault("X-Content-Type-Options", "nosniff")
    response.headers.setdefault("Referrer-Policy", "no-referrer")
    response.headers.setdefault("Cache-Control", "no-cache")
