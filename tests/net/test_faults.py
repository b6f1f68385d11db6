"""tests/bench/drill_faults.py, short and without its times: a stopped server, a storm, rubbish, sizes that change."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.bench.drill_faults import RUBBISH, SIZES, TalkingClient, resized, serving
from tests.e2e.serving import Server
from tests.net.client import demo_pictures, linked_as

FRAMES = 45


@pytest.fixture
async def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Server]:
    monkeypatch.setattr("aioice.ice.get_host_addresses", lambda use_ipv4, use_ipv6: [])
    made = serving(tmp_path / "server.log", patient=True)
    await asyncio.to_thread(made.start)
    yield made
    await asyncio.to_thread(made.stop)


@pytest.fixture
async def client(server: Server) -> AsyncIterator[TalkingClient]:
    async with linked_as(TalkingClient, server.url, demo_pictures()) as (made, _):
        await made.until(lambda: made._control.readyState == "open", "the control channel")
        yield made


async def test_what_came_while_the_server_was_stopped_is_not_shown_late(server: Server, client: TalkingClient) -> None:
    pid, journal = server.family()[0].pid, client.journal
    os.kill(pid, signal.SIGSTOP)
    first = len(journal.sent_at)
    await client.until(lambda: len(journal.sent_at) >= first + FRAMES, "frames sent in vain")
    last = len(journal.sent_at)
    os.kill(pid, signal.SIGCONT)
    await client.until_seen(FRAMES)
    of_the_stop = {number for _, number in journal.seen if first <= number < last - 8}
    assert len(of_the_stop) < 0.3 * FRAMES, sorted(of_the_stop)
    assert client.errors == [] and server.capacity()["open"] == 1
    # And it is told.
    async with asyncio.timeout(60):
        while "livebrush_loop_stalls_total 0.0" in await asyncio.to_thread(server.metrics):
            await asyncio.sleep(0.2)
    assert "the event loop was late by" in server.log_text()


async def test_of_a_storm_of_prompts_the_last_is_in_force_and_few_are_answered(
    server: Server, client: TalkingClient
) -> None:
    for number in range(1000):
        client.say(type="params", id=number, prompt=f"style {number}", strength=0.0)
        if number % 50 == 0:
            await asyncio.sleep(0.05)
    client.say(type="params", id=5000, prompt="the last")
    await client.until(lambda: client.last_ack.get("id") == 5000, "the answer to the last")
    assert client.last_ack["params"]["prompt"] == "the last"
    assert 40 <= client.said["ack"] < 500 and client.said["too_fast"] < 60, client.said
    assert client.errors_but("too_fast") == []
    await client.until_seen(15)


async def test_rubbish_and_a_hundred_channels_end_nothing(server: Server, client: TalkingClient) -> None:
    for number in range(100):
        client._connection.createDataChannel(f"other {number}")
    for message in RUBBISH:
        client._control.send(message)
    client.say(type="params", id=7, prompt="still here")
    await client.until(lambda: client.last_ack.get("id") == 7, "an answer after the rubbish")
    assert client.said["bad_message"] >= 20
    await client.until_seen(15)
    assert server.capacity()["open"] == 1


async def test_the_cameras_size_may_change_again_and_again(server: Server, client: TalkingClient) -> None:
    usual, rank_pids = client._pictures, [one.pid for one in server.family()]
    for height, width in SIZES:
        client._pictures = resized(usual, width, height)
        count = len(client.returned)
        await client.until(lambda count=count: len(client.returned) >= count + 10, f"pictures of {width}x{height}")  # type: ignore[misc]
    client._pictures = usual
    await client.until_seen(15)
    assert client.errors == [] and [one.pid for one in server.family()] == rank_pids
