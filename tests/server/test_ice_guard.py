"""The UDP guard on its own, and what it guards against."""

from __future__ import annotations

import asyncio
from collections import Counter

import pytest
from aioice.ice import Connection, StunProtocol
from aiortc import RTCIceGatherer

from server.ice_guard import LOOPBACK, MAX_QUEUED, IceGuard

PEER = (LOOPBACK, 40000)


@pytest.fixture(autouse=True)
def only_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aioice.ice.get_host_addresses", lambda use_ipv4, use_ipv6: [])


async def guarded(counters: Counter[str]) -> tuple[IceGuard, Connection, StunProtocol]:
    gatherer = RTCIceGatherer(iceServers=[])
    guard = IceGuard(counters)
    guard.attach(gatherer)
    await gatherer.gather()
    connection: Connection = gatherer._connection
    (protocol,) = connection._protocols
    return guard, connection, protocol


async def test_loopback_is_offered() -> None:
    _, connection, _ = await guarded(Counter())
    assert [candidate.host for candidate in connection.local_candidates] == [LOOPBACK]
    await connection.close()


async def test_only_known_addresses_reach_the_queue_and_never_nothing() -> None:
    counters: Counter[str] = Counter()
    guard, connection, protocol = await guarded(counters)
    before = guard.last_packet_at
    protocol.datagram_received(b"\x16dtls", PEER)
    protocol.datagram_received(b"", PEER)
    assert connection._queue.empty() and guard.last_packet_at == before
    guard._known.add(PEER)
    protocol.datagram_received(b"\x16dtls", PEER)
    protocol.datagram_received(b"", PEER)
    assert connection._queue.qsize() == 1 and guard.last_packet_at > before
    assert (counters["datagrams_empty"], counters["datagrams_foreign"]) == (2, 1)
    await connection.close()


async def test_queue_is_bounded() -> None:
    counters: Counter[str] = Counter()
    guard, connection, protocol = await guarded(counters)
    guard._known.add(PEER)
    for _ in range(MAX_QUEUED + 3):
        protocol.datagram_received(b"\x80rtp", PEER)
    assert (connection._queue.qsize(), counters["datagrams_dropped"]) == (MAX_QUEUED, 3)
    await connection.close()


async def test_the_sockets_call_the_guard() -> None:
    """asyncio must look the method up for each datagram, or the hook would do nothing."""
    counters: Counter[str] = Counter()
    _, connection, _ = await guarded(counters)
    (candidate,) = connection.local_candidates
    transport, _ = await asyncio.get_running_loop().create_datagram_endpoint(
        asyncio.DatagramProtocol, remote_addr=(candidate.host, candidate.port)
    )
    transport.sendto(b"\x16hello")
    async with asyncio.timeout(30):
        while not counters["datagrams_foreign"]:
            await asyncio.sleep(0.01)
    transport.close()
    await connection.close()
