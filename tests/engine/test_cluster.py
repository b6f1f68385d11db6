"""Groups side by side: streams go where there is room, and a group that is lost takes its own streams only."""

import asyncio
from collections.abc import AsyncIterator

import numpy as np
import pytest

from engine.api import EngineError, EngineFull, EngineNotReady, EngineState, EngineStream, FrameChunk, RankLost
from engine.api import StreamParams as Params
from engine.cluster import Cluster, arrange
from engine.config import EngineSettings
from engine.fake import FakeEngine

SIZE = 32


@pytest.fixture
async def groups() -> AsyncIterator[list[FakeEngine]]:
    made = [FakeEngine(SIZE, SIZE, delay_s=0.01, max_streams=2) for _ in range(2)]
    yield made
    for engine in made:
        await engine.close()


async def ready(groups: list[FakeEngine]) -> Cluster:
    cluster = Cluster(groups)
    await cluster.start()
    for group in groups:
        await group.wait_ready()
    return cluster


async def renders(stream: EngineStream, index: int = 0) -> bool:
    frames = np.zeros((1, SIZE, SIZE, 3), np.uint8)
    stream.submit(FrameChunk(index, frames, (index,), (0.0,), 1e12))
    async with asyncio.timeout(30):
        return (await anext(aiter(stream))).index == index


async def test_streams_are_spread_and_all_seats_are_given(groups: list[FakeEngine]) -> None:
    cluster = await ready(groups)
    assert (cluster.capacity.max_streams, cluster.capacity.groups, cluster.frame_size) == (4, 2, (SIZE, SIZE))
    async with cluster.open_stream("a", Params()) as a, cluster.open_stream("b", Params()):
        assert [group.capacity.open_streams for group in groups] == [1, 1]
        async with cluster.open_stream("c", Params()), cluster.open_stream("d", Params()):
            assert cluster.capacity.open_streams == 4
            with pytest.raises(EngineFull, match="4 streams"):
                async with cluster.open_stream("e", Params()):
                    pass
        assert await renders(a)
    assert cluster.capacity.open_streams == 0
    await cluster.close()
    assert cluster.status.state is EngineState.CLOSED


async def test_a_slower_group_is_given_fewer(groups: list[FakeEngine]) -> None:
    slow = FakeEngine(SIZE, SIZE, delay_s=0.025, max_streams=4)
    quick = FakeEngine(SIZE, SIZE, delay_s=0.01, max_streams=4)
    cluster = await ready([slow, quick])
    async with (
        cluster.open_stream("a", Params()),
        cluster.open_stream("b", Params()),
        cluster.open_stream("c", Params()),
    ):
        assert (slow.capacity.open_streams, quick.capacity.open_streams) == (1, 2)
        assert cluster.capacity.chunk_cost_s == slow.capacity.chunk_cost_s
    await cluster.close()


async def test_a_lost_group_takes_its_own_streams_and_they_find_room_elsewhere(groups: list[FakeEngine]) -> None:
    cluster = await ready(groups)
    async with cluster.open_stream("a", Params()) as a, cluster.open_stream("b", Params()) as b:
        loss = asyncio.create_task(groups[0].lose_rank(down_s=60))
        with pytest.raises(RankLost):
            await renders(a)
        assert await renders(b)
        assert cluster.status.state is EngineState.READY
        assert (cluster.capacity.max_streams, cluster.capacity.groups) == (2, 1)
        await cluster.wait_ready()
        async with cluster.open_stream("a", Params()) as again:
            assert groups[1].capacity.open_streams == 2
            assert await renders(again)
            with pytest.raises(EngineFull, match="1 of 2 groups are not ready"):
                async with cluster.open_stream("c", Params()):
                    pass
        loss.cancel()


async def test_without_any_group_nothing_opens_and_the_wait_ends_with_the_last(groups: list[FakeEngine]) -> None:
    cluster = Cluster(groups)
    with pytest.raises(EngineNotReady, match="starting"):
        async with cluster.open_stream("a", Params()):
            pass
    waiting = asyncio.create_task(cluster.wait_ready())
    await asyncio.sleep(0)
    await cluster.start()
    await asyncio.wait_for(waiting, 30)
    await cluster.close()
    with pytest.raises(EngineError, match="closed"):
        await cluster.wait_ready()


def test_what_is_not_said_is_one_rank_of_one_group_and_the_log_says_why() -> None:
    (alone,), reason = arrange(EngineSettings())
    assert (alone.ranks, alone.replicas) == (1, 1)
    assert reason == "1 x 1 rank from cpu on (ranks and replicas auto: processes on one CPU share its cores)"
    each, reason = arrange(EngineSettings(device="cuda:2", ranks=2, replicas=3))
    assert [group.device for group in each] == ["cuda:2", "cuda:4", "cuda:6"]
    assert reason == "3 x 2 ranks from cuda:2 on"
