"""What the composition root itself promises."""

from __future__ import annotations

import asyncio
import gc

from engine.config import EngineSettings
from engine.fake import FakeEngine
from server.app import running_server
from server.settings import ServerSettings


async def test_an_error_that_nobody_waits_for_is_counted_and_the_server_goes_on() -> None:
    settings = ServerSettings(port=0, engine_kind="fake", engine=EngineSettings(width=64, height=64))

    async def fail() -> None:
        raise RuntimeError("nobody waits for this")

    async with running_server(settings, FakeEngine(64, 64)) as (context, _):
        task = asyncio.create_task(fail())
        await asyncio.wait([task])
        del task
        gc.collect()
        assert context.metrics.faults.labels("loop")._value.get() == 1
        asyncio.get_running_loop().call_soon(lambda: 1 / 0)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert context.metrics.faults.labels("loop")._value.get() == 2
