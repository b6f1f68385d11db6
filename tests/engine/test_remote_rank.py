"""A rank behind a TCP connection is a rank: same frames, instants on this machine's clock, lost when the way is cut."""

import asyncio
import time
from collections.abc import AsyncIterator

import numpy as np
import pytest

from engine.api import EngineError, EngineState, FrameChunk, RankLost
from engine.api import StreamParams as Params
from engine.client import BREAKER_DEATHS, LocalEngine
from engine.config import EngineSettings
from engine.frame_memory import FrameMemory
from engine.remote_rank import RankHost, RemoteRank

SETTINGS = EngineSettings(width=64, height=64, max_streams=1)
HERE = "127.0.0.1"


@pytest.fixture
async def remote() -> AsyncIterator[tuple[LocalEngine, list[RemoteRank]]]:
    """An engine whose rank is behind a host, and the ranks it has started."""
    ranks: list[RemoteRank] = []
    hosts: list[RankHost] = []

    async def launch(settings: EngineSettings, memory: FrameMemory) -> RemoteRank:
        hosts.append(RankHost(settings))
        port, secret = await hosts[-1].open(HERE)
        ranks.append(await RemoteRank.connect(HERE, port, secret, memory))
        return ranks[-1]

    engine = LocalEngine(SETTINGS, launch)
    await engine.start()
    yield engine, ranks
    await engine.close()
    async with asyncio.timeout(30):
        for host in hosts:
            await host.close()


def chunk(index: int) -> FrameChunk:
    frames = np.random.default_rng(index).integers(0, 255, (1 if index == 0 else 4, 64, 64, 3), np.uint8)
    count = len(frames)
    return FrameChunk(index, frames, tuple(range(count)), (0.0,) * count, time.monotonic() + 60)


async def rendered(engine: LocalEngine) -> list[np.ndarray]:
    async with asyncio.timeout(240):
        await engine.wait_ready()
        async with engine.open_stream("s", Params(prompt="ink")) as stream:
            pictures = []
            for index in range(3):
                before = time.monotonic()
                stream.submit(chunk(index))
                back = await anext(aiter(stream))
                assert before <= back.engine_started_at <= back.engine_finished_at <= time.monotonic()
                pictures.append(back.frames)
            return pictures


async def test_it_renders_what_a_rank_here_does(remote: tuple[LocalEngine, list[RemoteRank]]) -> None:
    engine, ranks = remote
    far = await rendered(engine)
    async with engine.open_stream("s", Params()) as stream:
        ranks[0].leave("its node is drained")
        with pytest.raises(RankLost, match="its node is drained"):
            async with asyncio.timeout(30):
                await anext(aiter(stream))
    assert engine.status.state is EngineState.STARTING
    near_engine = LocalEngine(SETTINGS)
    await near_engine.start()
    try:
        near = await rendered(near_engine)
    finally:
        await near_engine.close()
    for here, there in zip(near, far, strict=True):
        np.testing.assert_array_equal(here, there)


async def test_who_does_not_know_the_secret_gets_nothing() -> None:
    host = RankHost(SETTINGS)
    port, _ = await host.open(HERE)
    reader, writer = await asyncio.open_connection(HERE, port)
    writer.write(b"not the secret\n")
    assert await asyncio.wait_for(reader.read(), 30) == b""
    writer.close()
    await writer.wait_closed()
    await host.close()


async def test_a_launcher_that_raises_anything_fails_the_engine_in_words() -> None:
    attempts: list[int] = []

    async def launch(settings: EngineSettings, memory: FrameMemory) -> RemoteRank:
        attempts.append(1)
        raise KeyError("no such node")

    engine = LocalEngine(SETTINGS, launch)
    await engine.start()
    try:
        async with asyncio.timeout(120):
            with pytest.raises(EngineError, match="no such node"):
                await engine.wait_ready()
    finally:
        await engine.close()
    assert len(attempts) == BREAKER_DEATHS
