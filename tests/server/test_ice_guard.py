"""The UDP guard on its own, and what it guards against."""

from __future__ import annotations

import asyncio
import socket
from collections import Counter

import pytest
from aioice.ice import Connection, StunProtocol
from aiortc import RTCIceGatherer, RTCIceServer

from server.ice_guard import LOOPBACK, MAX_QUEUED, IceGuard
from server.peer import NEGOTIATION_TIMEOUT_S
from server.udp_ports import ANY_PORT, PortsExhausted

PEER = (LOOPBACK, 40000)


@pytest.fixture(autouse=True)
def only_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aioice.ice.get_host_addresses", lambda use_ipv4, use_ipv6: [])


async def guarded(
    counters: Counter[str], ports: tuple[int, int] = ANY_PORT, stun: str = ""
) -> tuple[IceGuard, Connection, StunProtocol]:
    gatherer = RTCIceGatherer(iceServers=[RTCIceServer(urls=stun)] if stun else [])
    guard = IceGuard(counters, ports)
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


async def test_a_stun_server_that_is_silent_costs_a_candidate_and_not_the_answer() -> None:
    counters: Counter[str] = Counter()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as silent:
        silent.bind((LOOPBACK, 0))
        async with asyncio.timeout(NEGOTIATION_TIMEOUT_S - 1):
            _, connection, _ = await guarded(counters, stun=f"stun:{LOOPBACK}:{silent.getsockname()[1]}")
    assert [candidate.type for candidate in connection.local_candidates] == ["host"]
    assert counters["stun_unanswered"] == 1
    await connection.close()


def two_free_ports() -> tuple[int, int]:
    """Two ports in a row that nobody has on loopback."""
    for low in range(41000, 61000, 17):
        with socket.socket(type=socket.SOCK_DGRAM) as one, socket.socket(type=socket.SOCK_DGRAM) as two:
            try:
                one.bind((LOOPBACK, low))
                two.bind((LOOPBACK, low + 1))
            except OSError:
                continue
            return low, low + 1
    raise AssertionError("no two free ports")


async def test_sockets_lie_in_the_range_until_it_is_used_up_and_come_back() -> None:
    ports = two_free_ports()
    found = [await guarded(Counter(), ports) for _ in range(2)]
    used = sorted(connection.local_candidates[0].port for _, connection, _ in found)
    assert used == list(ports)
    with pytest.raises(PortsExhausted, match=f"all 2 UDP ports {ports[0]}-{ports[1]} .* in use; widen"):
        await guarded(Counter(), ports)
    for _, connection, _ in found:
        await connection.close()
    await asyncio.sleep(0)
    _, connection, _ = await guarded(Counter(), ports)
    assert connection.local_candidates[0].port in ports
    await connection.close()
