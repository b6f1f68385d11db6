"""Viewers of one stream over networks of their own, short: shares and counters. drill_viewers.py measures them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import aiohttp
import pytest

from engine.config import EngineSettings
from engine.fake import FakeEngine
from server.app import running_server
from server.settings import ServerSettings
from tests.net.client import HEIGHT, WIDTH, HardClient, demo_pictures
from tests.net.link import Impairment
from tests.net.watching import STREAM, watched

FRAMES = 90


@pytest.fixture(autouse=True)
def only_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aioice.ice.get_host_addresses", lambda use_ipv4, use_ipv6: [])


@pytest.fixture
async def base() -> AsyncIterator[str]:
    settings = ServerSettings(
        port=0,
        engine_kind="fake",
        engine=EngineSettings(width=WIDTH, height=HEIGHT),
        max_fps=24,
        min_fps=0.5,
        latency_budget_s=10.0,
    )
    async with running_server(settings, FakeEngine(WIDTH, HEIGHT, delay_s=0.005)) as (_, port):
        yield f"http://127.0.0.1:{port}"


async def counted(base: str) -> dict[str, int]:
    async with aiohttp.ClientSession() as http, http.get(f"{base}/api/v1/streams/{STREAM}") as response:
        figures: dict[str, int] = (await response.json())["broadcast"]
        return figures


async def shares(publisher: HardClient, *players: HardClient) -> list[float]:
    """Film so many frames more, wait for what comes of them, and tell which share each player saw."""
    first = len(publisher.journal.sent_at)
    await publisher.until(lambda: len(publisher.journal.sent_at) >= first + FRAMES, "frames sent")
    await asyncio.sleep(1.0)
    return [sum(first <= number < first + FRAMES for _, number in one.journal.seen) / FRAMES for one in players]


async def test_a_viewer_on_a_narrow_network_goes_on_and_takes_nothing_from_the_others(base: str) -> None:
    async with watched(base, demo_pictures(), 3) as (publisher, ((poor, link), (good, good_link), (other, _))):
        link.set(Impairment(rate_bps=300e3, delay_s=0.02))
        found: list[list[float]] = []
        # The first seconds go into learning it; on a busy machine they are more.
        while len(found) < 5 and not any(one[0] >= 0.4 for one in found[1:]):
            found.append(await shares(publisher, poor, good, other))
        assert max(one[0] for one in found[1:]) >= 0.4, found
        assert min(min(one[1:]) for one in found) >= 0.5, found
        assert link.down.counters["queue_full"] and not good_link.down.counters["queue_full"]
        before = (await counted(base), link.down.carried_bytes, good_link.down.carried_bytes)
        await shares(publisher)
        after = (await counted(base), link.down.carried_bytes, good_link.down.carried_bytes)
        # They did not go down to its bitrate.
        assert after[2] - before[2] > 1.5 * (after[1] - before[1])
        figures = {name: count - before[0].get(name, 0) for name, count in after[0].items()}
        assert after[0]["viewers_to_narrow"] >= 1
        # Two encoders for three viewers, and one for the two whose network is good.
        assert figures["frames_encoded"] <= 2.2 * FRAMES + 48, figures
        assert figures["video_frames_sent"] > 1.2 * figures["frames_encoded"], figures
        link.set(Impairment())
        await poor.until_seen(15)


async def test_a_viewer_who_loses_packets_by_chance_gets_them_again(base: str) -> None:
    async with watched(base, demo_pictures(), 2) as (publisher, ((poor, link), (good, _))):
        link.set(Impairment(loss=0.15, delay_s=0.02))
        found = [await shares(publisher, poor, good) for _ in range(2)]
        assert max(one[0] for one in found) >= 0.5, found
        assert min(one[1] for one in found) >= 0.5, found
        assert link.down.counters["lost"] and poor.counters["packets_recovered"]
        assert (await counted(base))["packets_repeated"] > 0.5 * link.down.counters["lost"]
