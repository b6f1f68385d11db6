"""A stream in by WHIP and out by WHEP to several players, each behind a link of its own."""

from __future__ import annotations

from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager

import aiohttp
import numpy as np
from aiortc import RTCSessionDescription
from numpy.typing import NDArray

from server.load_client import LoadClient
from tests.net.client import HardClient, Journal
from tests.net.link import Link

STREAM = "net"
PARAMS = "prompt=neon&strength=0"


async def enter(client: LoadClient, http: aiohttp.ClientSession, path: str, direction: str, link: Link) -> str:
    """Make a client one of WHIP or WHEP, behind a link: it sends only, or receives only. Returns its session's path.

    Raises RuntimeError when the offer is refused.
    """
    connection = client._connection
    connection.getTransceivers()[0].direction = direction
    await connection.setLocalDescription(await connection.createOffer())
    offer = link.towards_server(connection.localDescription.sdp)
    async with http.post(path, data=offer, headers={"Content-Type": "application/sdp"}) as response:
        text = await response.text()
        if response.status != 201:
            raise RuntimeError(f"{path}: {response.status} {text}")
        location = response.headers["Location"]
    await connection.setRemoteDescription(RTCSessionDescription(link.towards_client(text), "answer"))
    return location


def journal_beside(publisher: Journal) -> Journal:
    """Of a player: what was sent is the publisher's, what was seen its own."""
    journal = Journal()
    journal.sent_at = publisher.sent_at
    return journal


@asynccontextmanager
async def watched(
    url: str, pictures: list[NDArray[np.uint8]], players: int, *, seed: int = 1
) -> AsyncIterator[tuple[HardClient, list[tuple[HardClient, Link]]]]:
    """A publisher, and players that see its pictures already; all links are still good."""
    async with AsyncExitStack() as stack:
        http = await stack.enter_async_context(aiohttp.ClientSession(base_url=url))

        async def client(number: int, path: str, direction: str) -> tuple[HardClient, Link]:
            pool = ThreadPoolExecutor(2, thread_name_prefix="client-codec")
            stack.callback(pool.shutdown, wait=False)
            link = await stack.enter_async_context(Link(seed + number))
            made = HardClient(url, link, http, pictures, pool)
            stack.push_async_callback(made.close)
            await enter(made, http, path, direction, link)
            return made, link

        publisher, _ = await client(0, f"/whip/{STREAM}?{PARAMS}", "sendonly")
        publisher.film()
        watching = []
        for number in range(1, players + 1):
            player, link = await client(number, f"/whep/{STREAM}", "recvonly")
            player.journal = journal_beside(publisher.journal)
            watching.append((player, link))
        for player, _ in watching:
            await player.until_seen(5)
        yield publisher, watching
