"""Health probes and the operator's own listener: metrics stand apart from what clients reach, on loopback alone."""

from __future__ import annotations

import contextlib
import errno
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest

from engine.api import Engine, EngineState
from server.limits import Connections, GuardedSite

log = logging.getLogger(__name__)

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


@contextlib.asynccontextmanager
async def admin_listener(
    application: web.Application, port: int | None, *, wished: int, got: int
) -> AsyncIterator[None]:
    """Serve it on loopback for as long as the context is open.

    Args:
        port: None is the one after the public port, or any free one where that was any, too.
        wished, got: the public port, as it was asked for and as it is.

    Raises: OSError when the port is taken.
    """
    if port is None:
        port = (got + 1) % 65536 if wished else 0
    runner = web.AppRunner(application, access_log=None, auto_decompress=False)
    await runner.setup()
    try:
        await GuardedSite(runner, ADMIN_HOST, port, Connections(lambda reason: None)).start()
        log.info("metrics at http://%s:%d/metrics", *runner.addresses[0][:2])
        yield
    finally:
        await runner.cleanup()


def why_not_listening(error: OSError) -> str:
    """For who started it."""
    if error.errno == errno.EADDRINUSE:
        return f"{error.strerror}: choose other ports with --port and --admin-port"
    return f"cannot start: {error}"


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
