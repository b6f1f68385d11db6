"""Health probes and the operator's own listener: metrics stand apart from what clients reach, on loopback alone."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest

from engine.api import Engine, EngineState

ADMIN_HOST = "127.0.0.1"
ADMIN_NAMES = (ADMIN_HOST, "localhost")


def health_routes(engine: Engine) -> list[web.RouteDef]:
    """/livez: 200 while the event loop turns. /readyz: 200 once the model renders, 503 with how far it is before."""

    async def livez(request: web.Request) -> web.Response:
        return web.json_response({"status": "ok"})

    async def readyz(request: web.Request) -> web.Response:
        status = engine.status
        ready = status.state is EngineState.READY
        body = {"ready": ready, "stage": str(status.state), "percent": status.percent, "detail": status.detail}
        return web.json_response(body, status=200 if ready else 503)

    return [web.get("/livez", livez), web.get("/readyz", readyz)]


def admin_application(health: Sequence[web.RouteDef], registry: CollectorRegistry) -> web.Application:
    """What only this machine may ask: /metrics and the probes. No secret, prompt or client's address stands in them."""

    async def metrics(request: web.Request) -> web.Response:
        return web.Response(body=generate_latest(registry), headers={"Content-Type": CONTENT_TYPE_LATEST})

    app = web.Application(middlewares=[_only_by_own_name], client_max_size=1024)
    app.add_routes([*health, web.get("/metrics", metrics)])
    return app


@web.middleware
async def _only_by_own_name(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    """A page in the operator's browser reaches loopback too: refused under any other name, and from any page."""
    if request.host.rsplit(":", 1)[0] not in ADMIN_NAMES or "Origin" in request.headers:
        raise web.HTTPForbidden(text=f"only as {' or '.join(ADMIN_NAMES)}, and not from a page")
    response = await handler(request)
    response.headers["X-Content-Type-Options"] = "nosniff"
    response.headers["Cache-Control"] = "no-store"
    return response
