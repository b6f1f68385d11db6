"""Composition root: builds the parts, joins them and owns their lifetimes. Never loads torch."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from aiohttp import web

from engine.api import Engine
from engine.client import LocalEngine
from engine.cluster import Cluster, arrange
from engine.config import MAX_STEPS, EngineSettings, ServingProfile
from engine.fake import FakeEngine
from engine.ray_cluster import RayCluster
from server.access import new_token
from server.catalogue import load_styles, steps_max
from server.health import admin_application, admin_listener, health_routes, why_not_listening
from server.limits import GuardedSite
from server.metrics import ServerMetrics
from server.osc import listening
from server.recording import Recordings
from server.registry import SessionRegistry
from server.roles import Role
from server.session_context import SessionContext
from server.settings import ServerSettings, TokenSettings
from server.signalling import Signalling
from server.tls import tls_context

log = logging.getLogger(__name__)

SHUTDOWN_TIMEOUT_S = 2.0


def make_engine(settings: ServerSettings) -> Engine:
    """The engine the settings ask for."""
    engine = settings.engine
    if settings.engine_kind == "fake":
        return FakeEngine(
            engine.width,
            engine.height,
            max_streams=engine.max_streams,
            first_chunk_frames=_profile(engine).first_chunk_frames,
            held_chunks=settings.steps - 1 if engine.mode == "batch" else 0,
        )
    groups, reason = arrange(engine)
    log.info("engine: %s", reason)
    if settings.engine_kind.startswith("ray"):
        return RayCluster(settings.engine_kind, groups)
    return LocalEngine(groups[0]) if len(groups) == 1 else Cluster([LocalEngine(group) for group in groups])


def _profile(settings: EngineSettings) -> ServingProfile:
    """The model's own profile, where the stand-in is told of a model that exists."""
    try:
        return settings.profile
    except (FileNotFoundError, ValueError):
        return ServingProfile()


@contextlib.asynccontextmanager
async def running_server(
    settings: ServerSettings, engine: Engine, *, hurry: asyncio.Event | None = None
) -> AsyncIterator[tuple[SessionContext, int]]:
    """A listening server over an engine it starts and closes; yields its context and port.

    Left without an error it is emptied first, where `drain_s` says so; once `hurry` is set nothing is waited for.

    Raises: OSError when a port is taken or the TLS files cannot be used, FileNotFoundError for an unknown model,
        ValueError for a server that is reached from elsewhere, without tokens.
    """
    if not settings.is_private and not settings.tokens.by_role():
        raise ValueError(f"host {settings.host}, or a proxy before it, is reached from elsewhere and no token is set")
    tls = tls_context(settings.tls_cert, settings.tls_key)
    local = settings.engine_kind != "fake"
    styles = load_styles(settings.engine.model_dir) if local else []
    most_steps = steps_max(settings.engine) if local else MAX_STEPS
    with ThreadPoolExecutor(max(2, os.cpu_count() or 2), thread_name_prefix="livebrush") as executor:
        loop = asyncio.get_running_loop()
        loop.set_default_executor(executor)
        metrics = ServerMetrics()
        loop.set_exception_handler(_count_strays(metrics))
        recordings = Recordings(settings.recordings)
        metrics.registry.register(recordings)
        context = SessionContext(
            engine,
            settings,
            metrics,
            executor,
            steps_max=most_steps,
            seed=_profile(settings.engine).seed,
            style_names={style["id"]: style["name"] for style in styles},
            recordings=recordings,
        )
        registry = SessionRegistry(context)
        signalling = Signalling(context, registry, styles)
        runner = web.AppRunner(
            signalling.application(),
            access_log=None,
            auto_decompress=False,
            shutdown_timeout=SHUTDOWN_TIMEOUT_S,
        )
        admin = admin_application(health_routes(engine), metrics.registry)
        await runner.setup()
        try:
            site = GuardedSite(runner, settings.host, settings.port, signalling.guard.connections, tls=tls)
            await site.start()
            port: int = runner.addresses[0][1]
            async with admin_listener(admin, settings.admin_port, wished=settings.port, got=port):
                await engine.start()
                osc = listening(settings.osc_host, settings.osc_port, signalling.steering, metrics.osc, context.clock)
                async with recordings, registry, osc:
                    yield context, port
                    if settings.drain_s and registry.open_sessions:
                        await registry.drain(settings.drain_s, hurry)
        finally:
            await runner.cleanup()
            await engine.close()


async def serve(settings: ServerSettings) -> int:
    """Serve until SIGINT or SIGTERM, of which a second one cuts the emptying short; returns the exit status."""
    stop, hurry = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, lambda: (hurry if stop.is_set() else stop).set())
    settings = _with_tokens(settings)
    engine = make_engine(settings)
    try:
        async with running_server(settings, engine, hurry=hurry) as (_, port):
            scheme = "https" if settings.tls_cert else "http"
            print(f"Livebrush is at {scheme}://{settings.host}:{port}  (Ctrl-C stops it)", flush=True)
            await stop.wait()
            print("Stopping.", flush=True)
    except OSError as error:
        print(why_not_listening(error), file=sys.stderr)
        return 1
    return 0


def _with_tokens(settings: ServerSettings) -> ServerSettings:
    """The settings, with tokens made and printed once where the server is reached from elsewhere and has none."""
    if settings.is_private:
        return settings
    if not settings.is_loopback and settings.tls_cert is None:
        print(
            "This is plain HTTP: browsers give no camera to it, and tokens can be read on the way. Set"
            " --tls-cert and --tls-key, or put an HTTPS proxy before it (docs/deploy.md).",
            file=sys.stderr,
        )
    if settings.tokens.by_role():
        return settings
    made = {str(role): new_token() for role in Role}
    print("No tokens are set, so these were made for this run; set them as LIVEBRUSH_TOKENS__VIEW, ... to keep them:")
    for role, token in made.items():
        print(f"  {role:8} {token}", flush=True)
    return settings.model_copy(update={"tokens": TokenSettings.model_validate(made)})


def _count_strays(metrics: ServerMetrics) -> Any:
    """A loop exception handler: errors of tasks nobody awaited are counted and logged, never fatal."""

    def handle(loop: asyncio.AbstractEventLoop, details: dict[str, Any]) -> None:
        metrics.faults.labels("loop").inc()
        log.warning("stray: %s", details.get("message"), exc_info=details.get("exception"))

    return handle
