"""Composition root: builds the parts, joins them and owns their lifetimes. Never loads torch."""

from __future__ import annotations

import asyncio
import contextlib
import errno
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
from server.catalogue import load_styles, steps_max
from server.metrics import ServerMetrics
from server.osc import listening
from server.registry import SessionRegistry
from server.session import SessionContext
from server.settings import ServerSettings
from server.signalling import Signalling

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
    return LocalEngine(groups[0]) if len(groups) == 1 else Cluster([LocalEngine(group) for group in groups])


def _profile(settings: EngineSettings) -> ServingProfile:
    """The model's own profile, where the stand-in is told of a model that exists."""
    try:
        return settings.profile
    except (FileNotFoundError, ValueError):
        return ServingProfile()


@contextlib.asynccontextmanager
async def running_server(settings: ServerSettings, engine: Engine) -> AsyncIterator[tuple[SessionContext, int]]:
    """A listening server over an engine it starts and closes; yields its context and port.

    Raises: OSError when the port is taken, FileNotFoundError for an unknown model.
    """
    local = settings.engine_kind == "local"
    styles = load_styles(settings.engine.model_dir) if local else []
    most_steps = steps_max(settings.engine) if local else MAX_STEPS
    with ThreadPoolExecutor(max(2, os.cpu_count() or 2), thread_name_prefix="livebrush") as executor:
        loop = asyncio.get_running_loop()
        loop.set_default_executor(executor)
        metrics = ServerMetrics()
        loop.set_exception_handler(_count_strays(metrics))
        context = SessionContext(
            engine,
            settings,
            metrics,
            executor,
            steps_max=most_steps,
            seed=_profile(settings.engine).seed,
            style_names={style["id"]: style["name"] for style in styles},
        )
        registry = SessionRegistry(context)
        signalling = Signalling(context, registry, styles)
        runner = web.AppRunner(
            signalling.application(),
            access_log=None,
            auto_decompress=False,
            shutdown_timeout=SHUTDOWN_TIMEOUT_S,
        )
        await runner.setup()
        try:
            site = web.TCPSite(runner, settings.host, settings.port)
            await site.start()
            await engine.start()
            osc = listening(settings.osc_host, settings.osc_port, signalling.steering, metrics.osc, context.clock)
            async with registry, osc:
                yield context, runner.addresses[0][1]
        finally:
            await runner.cleanup()
            await engine.close()


async def serve(settings: ServerSettings) -> int:
    """Serve until SIGINT or SIGTERM; returns the exit status."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    engine = make_engine(settings)
    try:
        async with running_server(settings, engine) as (_, port):
            print(f"Livebrush is at http://{settings.host}:{port}  (Ctrl-C stops it)", flush=True)
            await stop.wait()
            print("Stopping.", flush=True)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            print(f"port {settings.port} of {settings.host} is in use: choose another with --port", file=sys.stderr)
        else:
            print(f"cannot start: {error}", file=sys.stderr)
        return 1
    return 0


def _count_strays(metrics: ServerMetrics) -> Any:
    """A loop exception handler: errors of tasks nobody awaited are counted and logged, never fatal."""

    def handle(loop: asyncio.AbstractEventLoop, details: dict[str, Any]) -> None:
        metrics.faults.labels("loop").inc()
        log.warning("stray: %s", details.get("message"), exc_info=details.get("exception"))

    return handle
