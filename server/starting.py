"""Start an engine and wait until it renders: for commands that have nothing else to do meanwhile."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from engine.api import Engine, EngineError, EngineStatus

POLL_S = 0.2
# Silence, not the whole: a large model loads for minutes and tells how far it is.
SILENCE_S = 300.0


async def start_engine(
    engine: Engine, watch: Callable[[EngineStatus], None] = lambda _: None, *, silence_s: float = SILENCE_S
) -> None:
    """Start and return once streams render; `watch` is told how far it is.

    Raises: EngineError when the engine fails, or tells no progress for silence_s; what its `start` raises.
    """
    await engine.start()
    ready = asyncio.create_task(engine.wait_ready(), name="start/wait-ready")
    try:
        heard, heard_at = engine.status, time.monotonic()
        while not ready.done():
            if engine.status != heard:
                heard, heard_at = engine.status, time.monotonic()
            if time.monotonic() - heard_at > silence_s:
                raise EngineError(
                    f"the engine told no progress for {silence_s:.0f} s ({heard.state}, {heard.percent} %);"
                    " try livebrush doctor"
                )
            watch(heard)
            await asyncio.wait({ready}, timeout=POLL_S)
        ready.result()
    finally:
        ready.cancel()
