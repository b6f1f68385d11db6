"""Ranks of a real server killed under a real client."""

import asyncio
from pathlib import Path

import psutil
import pytest

from livebrush_client import connect
from tests.e2e.killing import Watch, kill_rank
from tests.e2e.serving import Server, has_model
from tests.server.test_server import MovingPicture

PATIENCE_S = 240


@pytest.mark.skipif(not has_model(), reason="the embedded model's weights are not built")
async def test_a_client_sees_its_camera_while_a_killed_group_comes_back_three_times(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aioice.ice.get_host_addresses", lambda use_ipv4, use_ipv6: ["127.0.0.1"])
    options = ("--ranks", "2", "--size", "64x64")
    with Server(
        tmp_path / "log", engine="local", options=options, patient=True, LIVEBRUSH_ENGINE__COSTS_DIR=str(tmp_path)
    ) as server:
        async with asyncio.timeout(PATIENCE_S):
            while not await asyncio.to_thread(server.is_ready):
                await asyncio.sleep(0.1)
        process = psutil.Process(server.pid)
        async with connect(server.url, MovingPicture(), prompt="watercolor") as live:
            watch = Watch(live)
            watching = asyncio.create_task(watch.run())
            kills = []
            for rank in (1, 0, 1):
                kills.append(await kill_rank(watch, process, rank, timeout_s=PATIENCE_S))
                print(kills[-1])
            # The camera comes in a small part of the time that the group is away, and the session never ends.
            assert all(kill.camera_s < kill.restyled_s / 2 and kill.told_s < kill.restyled_s / 2 for kill in kills)
            assert all(kill.gap_s < kill.restyled_s / 2 for kill in kills)
            assert [code for _, code in watch.notices if code.startswith("engine_")] == [
                "engine_lost",
                "engine_back",
            ] * 3
            assert not live.ended
        await watching
        everything = [process, *process.children(recursive=True)]
    _, left = psutil.wait_procs(everything, PATIENCE_S)
    assert not left
