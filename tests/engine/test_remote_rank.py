"""A rank behind a TCP connection is a rank: same frames, instants on this machine's clock, lost when the way is cut."""

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import psutil
import pytest

from engine.api import EngineError, EngineState, FrameChunk, RankLost
from engine.api import StreamParams as Params
from engine.client import BREAKER_DEATHS, LocalEngine
from engine.config import EngineSettings
from engine.frame_memory import FrameMemory
from engine.remote_rank import RankHost, RemoteRank, interface_of, start_follower
from engine.ring_start import Place

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


async def test_a_ring_of_ranks_that_were_started_one_by_one_is_one_group(model_dir: Path) -> None:
    settings = SETTINGS.model_copy(update={"model": str(model_dir), "ranks": 2})
    place = Place(HERE, interface_of(HERE), 2, apart=True)
    hosts: list[RankHost] = []

    async def launch(settings: EngineSettings, memory: FrameMemory) -> RemoteRank:
        hosts.append(RankHost(settings, place))
        port, secret = await hosts[-1].open(HERE)
        await start_follower(settings, 1, place, port, secret)
        return await RemoteRank.connect(HERE, port, secret, memory)

    def ranks() -> list[psutil.Process]:
        """Rank 0 and rank 1."""
        found = [each for each in psutil.Process().children() if "engine.ring_start" in each.cmdline()]
        return sorted(found, key=lambda each: "follow" in each.cmdline())

    near_engine = LocalEngine(settings)
    await near_engine.start()
    try:
        near = await rendered(near_engine)
    finally:
        await near_engine.close()
    engine = LocalEngine(settings, launch)
    await engine.start()
    try:
        for victim in (1, 0):
            for here, there in zip(near, await rendered(engine), strict=True):
                np.testing.assert_array_equal(here, there)
            group = ranks()
            assert len(group) == 2
            async with engine.open_stream("s", Params()) as stream:
                group[victim].kill()
                with pytest.raises(RankLost):
                    async with asyncio.timeout(30):
                        await anext(aiter(stream))
            _, left = await asyncio.to_thread(psutil.wait_procs, group, 30)
            assert not left
        await rendered(engine)
        group = ranks()
    finally:
        await engine.close()
    _, left = await asyncio.to_thread(psutil.wait_procs, group, 30)
    assert not left
    async with asyncio.timeout(30):
        for host in hosts:
            await host.close()


async def test_a_ring_does_not_begin_without_all_its_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.remote_rank.CONNECT_TIMEOUT_S", 0.2)
    host = RankHost(SETTINGS.model_copy(update={"ranks": 3}), Place(HERE, "lo", 3, apart=True))
    port, secret = await host.open(HERE)
    ends = [await asyncio.open_connection(HERE, port) for _ in range(4)]
    # Rank 1 comes, twice; a rank that there is none of; then the server.
    for (_, writer), says in zip(ends, (f"{secret} 1", f"{secret} 1", f"{secret} 7", secret), strict=True):
        writer.write(says.encode() + b"\n")
    async with asyncio.timeout(30):
        assert [await reader.read() for reader, _ in ends] == [b""] * 4
        for _, writer in ends:
            writer.close()
            await writer.wait_closed()
        await host.close()


def test_an_address_that_this_machine_does_not_have_is_refused() -> None:
    assert interface_of(HERE)
    with pytest.raises(OSError, match=r"198\.51\.100\.7"):
        interface_of("198.51.100.7")


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
