"""Groups on nodes of a Ray cluster, which are raylets of this machine: a node dies, the streams go on."""

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest

from engine.api import EngineState, EngineStream, FrameChunk, RankLost
from engine.api import StreamParams as Params
from engine.config import EngineSettings
from engine.ray_cluster import STORE_BYTES, Controller, RayCluster, _answers, controller, import_ray, join
from engine.wan.weights import load_model
from engine.worker import dtype_of, make_pipeline

SIZE = 64
START_S = 120

pytest.importorskip("ray")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


@pytest.fixture
def raylets() -> Iterator[Any]:
    """A cluster of a head that holds no group."""
    ray = import_ray()
    from ray.cluster_utils import Cluster as Raylets

    raylets = Raylets(initialize_head=True, head_node_args={"num_cpus": 0, "object_store_memory": STORE_BYTES})
    yield raylets
    ray.shutdown()
    raylets.shutdown()


def add(raylets: Any, cpus: int) -> Any:
    """A node with room for so many ranks."""
    return raylets.add_node(num_cpus=cpus, object_store_memory=STORE_BYTES)


async def renders(stream: EngineStream, index: int = 0) -> np.ndarray:
    frames = np.full((1 if index == 0 else 4, SIZE, SIZE, 3), 90, np.uint8)
    indices = tuple(range(len(frames)))
    stream.submit(FrameChunk(index, frames, indices, (0.0,) * len(frames), time.monotonic() + 60))
    async with asyncio.timeout(60):
        rendered = await anext(aiter(stream))
    assert rendered.index == index
    assert rendered.engine_started_at <= rendered.engine_finished_at <= time.monotonic()
    assert rendered.engine_started_at > time.monotonic() - 60
    return rendered.frames


async def all_ready(cluster: RayCluster) -> None:
    async with asyncio.timeout(START_S):
        while any(group.status.state is not EngineState.READY for group in cluster.groups):
            assert all(group.status.state is not EngineState.FAILED for group in cluster.groups), cluster.status
            await asyncio.sleep(0.1)


async def until(done: Callable[[], bool]) -> None:
    async with asyncio.timeout(START_S):
        while not done():
            await asyncio.sleep(0.1)


async def test_a_node_is_killed_and_its_stream_goes_on_elsewhere(raylets: Any) -> None:
    workers = [add(raylets, 1) for _ in range(2)]
    import ray

    began = time.monotonic()
    settings = EngineSettings(width=SIZE, height=SIZE, max_streams=2, start_timeout_s=START_S)
    cluster = RayCluster("ray", [settings, settings])
    await cluster.start()
    try:
        await all_ready(cluster)
        print(f"two groups ready after {time.monotonic() - began:.1f} s")
        homes = {number: node for number, ((node,), _) in cluster._ranks.items()}
        assert set(homes.values()) == {worker.node_id for worker in workers}
        async with contextlib.AsyncExitStack() as held:
            a = await held.enter_async_context(cluster.open_stream("a", Params(prompt="ink")))
            hit = next(number for number, group in enumerate(cluster.groups) if group.capacity.open_streams)
            b = await held.enter_async_context(cluster.groups[1 - hit].open_stream("b", Params()))
            first = await renders(a)
            assert np.any(first != 90)
            await renders(b)
            await renders(a, 1)
            by_id = {worker.node_id: worker for worker in workers}
            killed = time.monotonic()
            raylets.remove_node(by_id[homes[hit]], allow_graceful=False)
            with pytest.raises(RankLost):
                async with asyncio.timeout(60):
                    await anext(aiter(a))
            print(f"lost after {time.monotonic() - killed:.2f} s")
            await renders(b, 1)
            async with cluster.open_stream("a", Params(prompt="ink")) as again:
                np.testing.assert_array_equal(await renders(again), first)
                print(f"rendered again after {time.monotonic() - killed:.2f} s")
        # A node comes: the lost group is placed there.
        add(raylets, 1)
        await all_ready(cluster)
        assert cluster.capacity.groups == 2

        # Its node is drained: the group leaves, and has nowhere to go.
        (leaving,) = cluster._ranks[hit][0]
        await asyncio.to_thread(ray.get, controller(ray).drain.remote(leaving, True))
        async with asyncio.timeout(30):
            while cluster.groups[hit].status.state is EngineState.READY:
                await asyncio.sleep(0.1)
        assert cluster.groups[1 - hit].status.state is EngineState.READY
        shown = await asyncio.to_thread(ray.get, controller(ray).groups.remote())
        assert {(one["group"], one["node"]) for one in shown} >= {(1 - hit, homes[1 - hit])}
    finally:
        await cluster.close()


def ring_processes(node: Any) -> list[psutil.Process]:
    """The ranks of rings on a node."""
    raylet = node.all_processes["raylet"][0].process.pid
    found = psutil.Process(raylet).children(recursive=True)
    return [each for each in found if "engine.ring_start" in each.cmdline()]


async def test_a_ring_over_two_nodes_is_one_rank_and_outlives_either_node(raylets: Any, model_dir: Path) -> None:
    workers = [add(raylets, 1) for _ in range(3)]
    settings = EngineSettings(
        model=str(model_dir), width=SIZE, height=SIZE, max_streams=2, ranks=2, dtype="float32", start_timeout_s=START_S
    )
    ink = Params(prompt="ink", steps=2)
    plain = make_pipeline(load_model(model_dir, "cpu", dtype_of(settings)), settings)
    state = plain.open(ink)
    expected = [plain.render(state, np.full((1 if index == 0 else 4, SIZE, SIZE, 3), 90, np.uint8)) for index in (0, 1)]
    began = time.monotonic()
    cluster = RayCluster("ray", [settings, settings.model_copy(update={"ranks": 1})])
    ring, other = cluster.groups
    left: list[psutil.Process] = []

    def all_gone() -> bool:
        return not any(each.is_running() for each in left)

    await cluster.start()
    try:
        await all_ready(cluster)
        print(f"ready after {time.monotonic() - began:.1f} s")
        async with other.open_stream("b", Params()) as untouched:
            for killed_rank, room in ((1, 1), (0, 2)):
                by_id = {worker.node_id: worker for worker in workers}
                homes = sorted(cluster._ranks[0][0])
                assert len(homes) == 2
                left += [each for home in homes for each in ring_processes(by_id[home])]
                async with ring.open_stream("a", ink) as stream:
                    for index in (0, 1):
                        np.testing.assert_array_equal(await renders(stream, index), expected[index])
                    victim = next(
                        worker
                        for worker in workers
                        if any("follow" in each.cmdline() for each in ring_processes(worker)) == bool(killed_rank)
                        and worker.node_id in homes
                    )
                    killed = time.monotonic()
                    raylets.remove_node(victim, allow_graceful=False)
                    with pytest.raises(RankLost):
                        async with asyncio.timeout(60):
                            await anext(aiter(stream))
                print(f"node of rank {killed_rank}: lost after {time.monotonic() - killed:.2f} s")
                await until(all_gone)
                await renders(untouched, 1 - killed_rank)
                assert ring.status.state is not EngineState.READY
                workers.remove(victim)
                workers.append(add(raylets, room))
                added = time.monotonic()
                await all_ready(cluster)
                print(f"ready {time.monotonic() - added:.1f} s after a node came")
            # The last node had room for the whole ring.
            assert cluster._ranks[0][0] == {workers[-1].node_id}
            async with ring.open_stream("a", ink) as stream:
                for index in (0, 1):
                    np.testing.assert_array_equal(await renders(stream, index), expected[index])
            left += [each for worker in workers for each in ring_processes(worker)]
            assert len(left) == 6
            placed = await asyncio.to_thread(import_ray().util.placement_group_table)
            assert sorted(one["name"][-1] for one in placed.values() if one["state"] != "REMOVED") == ["0", "1"]
    finally:
        await cluster.close()
    await until(all_gone)


async def test_what_is_asked_of_ray_is_answered_before_its_shutdown() -> None:
    """Ray ends the process of whoever asks it for something later."""
    asked, told = threading.Event(), threading.Event()
    order: list[str] = []

    def slow() -> None:
        asked.set()
        told.wait(START_S)
        order.append("answered")

    ray = SimpleNamespace(shutdown=lambda: order.append("shut down"))
    cluster = RayCluster("ray", [EngineSettings(width=SIZE, height=SIZE)])
    cluster._joining = asyncio.create_task(asyncio.sleep(0, ray))
    cluster._reporting = asyncio.create_task(cluster._call(slow))
    await asyncio.to_thread(asked.wait, START_S)
    closing = asyncio.create_task(cluster.close())
    # Who asked is gone; the thread is not.
    await asyncio.wait([cluster._reporting])
    assert cluster._reporting.cancelled() and not closing.done()
    told.set()
    await closing
    assert order == ["answered", "shut down"]


def test_a_cluster_that_is_gone_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setattr("ray._private.services.canonicalize_bootstrap_address", lambda _: address)
        assert _answers(import_ray())
    assert not _answers(import_ray())
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(ConnectionError, match="RAY_ADDRESS"):
        join("ray")


def test_a_controller_that_was_started_anew_learns_what_is_drained() -> None:
    first, second = Controller(), Controller()
    first.drain("n1", True)
    life, drained = first.report("server", [], "", [])
    assert drained == ["n1"]
    _, drained = second.report("server", [{"group": 0}], life, drained)
    assert drained == ["n1"]
    assert second.groups() == [{"group": 0, "server": "server"}]
    second.drain("n1", False)
    assert second.drained() == []
