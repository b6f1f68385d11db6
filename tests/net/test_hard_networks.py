"""One session over bad networks, short: shares of frames and counters, no times. drill_network.py measures them all."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator

import pytest

from engine.config import EngineSettings
from engine.fake import FakeEngine
from server.app import running_server
from server.settings import ServerSettings
from tests.net.client import HEIGHT, WIDTH, HardClient, demo_pictures, linked
from tests.net.link import Impairment, Link

PATIENCE_S = 60.0
FRAMES = 60


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
        latency_budget_s=2.0,
    )
    async with running_server(settings, FakeEngine(WIDTH, HEIGHT, delay_s=0.005)) as (_, port):
        yield f"http://127.0.0.1:{port}"


@pytest.fixture
async def session(base: str) -> AsyncIterator[tuple[HardClient, Link]]:
    async with linked(base, demo_pictures()) as found:
        yield found


async def share_shown(client: HardClient, frames: int = FRAMES) -> float:
    """Film so many frames more, wait for what comes of them, and tell which share was seen."""
    journal = client.journal
    first = len(journal.sent_at)
    await client.until(lambda: len(journal.sent_at) >= first + frames, "frames sent")
    await asyncio.sleep(1.0)
    return sum(first <= number < first + frames for _, number in journal.seen) / frames


@pytest.mark.parametrize(
    ("how", "share"),
    [
        (Impairment(loss=0.05, delay_s=0.02), 0.6),
        (Impairment(loss=0.05, burst=5, delay_s=0.02), 0.6),
        (Impairment(reorder=0.1, corruption=0.01, duplication=0.1, delay_s=0.02), 0.7),
    ],
    ids=["loss", "bursts", "disorder"],
)
async def test_most_frames_come_through(session: tuple[HardClient, Link], how: Impairment, share: float) -> None:
    client, link = session
    link.set(how)
    assert await share_shown(client) >= share
    if how.loss:
        assert link.up.counters["lost"] and link.down.counters["lost"]
        assert client.counters["packets_recovered"]


async def test_a_narrow_network_shows_fewer_pictures_and_never_ends_the_picture(
    session: tuple[HardClient, Link],
) -> None:
    client, link = session
    link.set(Impairment(rate_bps=300e3, delay_s=0.02))
    shares: list[float] = []
    # The first seconds go into learning it; on a busy machine they are more.
    while len(shares) < 5 and not any(share >= 0.4 for share in shares[1:]):
        shares.append(await share_shown(client, 90))
    assert max(shares[1:]) >= 0.4, shares
    # Not by luck: the queue overflowed, was noticed, and since then no more is sent than passes.
    before = Counter(link.up.counters)
    shares.append(await share_shown(client, 90))
    passed, lost = (link.up.counters[name] - before[name] for name in ("carried", "queue_full"))
    assert before["queue_full"] and lost < 0.1 * passed, (before, link.up.counters)
    assert client.counters["network_behind"]
    assert client._connection.connectionState == "connected"


async def test_many_packets_lost_by_chance_are_sent_twice_and_leave_no_picture_out(
    session: tuple[HardClient, Link],
) -> None:
    client, link = session
    link.set(Impairment(loss=0.2, delay_s=0.02))
    shares = [await share_shown(client) for _ in range(2)]
    assert max(shares) >= 0.5, shares
    lost = link.up.counters["lost"]
    assert client.counters["packets_repeated"] > 1.2 * lost, (client.counters, link.up.counters)
    assert client.counters["network_behind"] < 0.1 * len(client.journal.sent_at)


async def test_the_picture_goes_on_after_a_black_hole(session: tuple[HardClient, Link]) -> None:
    client, link = session
    link.set(Impairment(down=True))
    seen = len(client.journal.seen)
    assert await share_shown(client, 45) <= 0.1
    assert link.up.counters["black_hole"] and len(client.journal.seen) <= seen + 8
    link.set(Impairment())
    await client.until_seen(15)
    assert await share_shown(client) >= 0.7
