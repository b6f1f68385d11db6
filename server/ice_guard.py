"""The UDP side of a peer: which addresses it listens on, and which datagrams get any further.

Why it exists: one empty datagram from anybody who knows the port ends a live aiortc session (the DTLS reader
indexes its first byte), and the queue behind the socket has no bound. Both are closed here, before any parser.
Gathering is done here too: aioice takes any port, and waits as long for a STUN server that is out of reach as an answer
may take at all.

Hooks: three methods of aioice objects are replaced on the instance, all in `attach` and `_watch`, and `_open` adds
sockets to its list. aioice offers no
other way in; tests/server/test_ice_guard.py fails when an upgrade moves them.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from collections import Counter
from typing import Any

from aioice.candidate import Candidate, candidate_foundation, candidate_priority
from aioice.ice import Connection, StunProtocol, server_reflexive_candidate
from aiortc import RTCIceGatherer

from server.udp_ports import ANY_PORT, bind_udp

log = logging.getLogger(__name__)

LOOPBACK = "127.0.0.1"
MAX_QUEUED = 512
LAST_STUN_BYTE = 3
# For what STUN and TURN servers say; an answer goes out without the candidates that took longer.
GATHER_TIMEOUT_S = 1.0
# As aioice has it: a key frame comes in one burst.
RECEIVE_BUFFER_BYTES = 256 * 1024


class IceGuard:
    """Stands between the sockets of one peer and aioice. Attach before candidates are gathered."""

    def __init__(self, counters: Counter[str], udp_ports: tuple[int, int] = ANY_PORT) -> None:
        self._counters = counters
        self._udp_ports = udp_ports
        self._known: set[tuple[str, int]] = set()
        self.last_packet_at = time.monotonic()
        """Monotonic seconds: the last datagram of any kind from an address of the peer."""

    def attach(self, gatherer: RTCIceGatherer) -> None:
        """Offer 127.0.0.1 beside the real interfaces, and filter whatever the sockets receive."""
        connection: Connection = gatherer._connection
        gather_relayed, enqueue = connection.get_component_candidates, connection.data_received

        async def get_component_candidates(component: int, addresses: list[str], timeout: int = 5) -> list[Candidate]:
            # aioice leaves loopback out, but a browser on this machine may have no other address.
            for address in dict.fromkeys([LOOPBACK, *addresses]):
                await self._open(connection, component, address)
            hosts = list(connection._protocols)
            reflexive, relayed = await asyncio.gather(
                self._reflexive(connection, hosts),
                gather_relayed(component=component, addresses=[], timeout=GATHER_TIMEOUT_S),  # type: ignore[arg-type]
            )
            for protocol in connection._protocols:
                self._watch(connection, protocol)
            return [protocol.local_candidate for protocol in hosts] + reflexive + relayed

        def data_received(data: bytes, component: int) -> None:
            if not data:
                self._counters["datagrams_empty"] += 1
            elif connection._queue.qsize() >= MAX_QUEUED:
                self._counters["datagrams_dropped"] += 1
            else:
                enqueue(data, component)

        connection.get_component_candidates = get_component_candidates  # type: ignore[method-assign]
        connection.data_received = data_received  # type: ignore[method-assign]

    async def _open(self, connection: Connection, component: int, address: str) -> None:
        """Open the socket of one host candidate. Raises PortsExhausted."""
        try:
            bound = bind_udp(address, self._udp_ports)
        except OSError as error:
            self._counters["addresses_unbound"] += 1
            log.info("no candidate at %s: %s", address, error)
            return
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER_BYTES)
        loop = asyncio.get_running_loop()
        _, protocol = await loop.create_datagram_endpoint(lambda: StunProtocol(connection), sock=bound)
        connection._protocols.append(protocol)
        host, port = bound.getsockname()[:2]
        protocol.local_candidate = Candidate(
            foundation=candidate_foundation("host", "udp", host),
            component=component,
            transport="udp",
            priority=candidate_priority(component, "host"),
            host=host,
            port=port,
            type="host",
        )

    async def _reflexive(self, connection: Connection, hosts: list[StunProtocol]) -> list[Candidate]:
        """What the STUN server sees of the sockets; those that it did not answer for in time are counted."""
        if connection.stun_server is None:
            return []
        asked = [
            asyncio.create_task(server_reflexive_candidate(protocol, connection.stun_server))
            for protocol in hosts
            if ":" not in protocol.local_candidate.host
        ]
        if not asked:
            return []
        _, late = await asyncio.wait(asked, timeout=GATHER_TIMEOUT_S)
        for task in late:
            task.cancel()
        await asyncio.gather(*asked, return_exceptions=True)
        found = [task.result()[0] for task in asked if not task.cancelled() and task.exception() is None]
        self._counters["stun_unanswered"] += len(asked) - len(found)
        return found

    def _watch(self, connection: Connection, protocol: StunProtocol) -> None:
        """Let STUN in from anyone (it is authenticated), everything else only from addresses of the peer."""
        receive = protocol.datagram_received

        def datagram_received(data: bytes | str, addr: tuple[Any, ...]) -> None:
            assert isinstance(data, bytes)
            is_peer = self._is_peer(connection, (addr[0], addr[1]))
            if is_peer:
                self.last_packet_at = time.monotonic()
            if not data:
                self._counters["datagrams_empty"] += 1
            elif data[0] <= LAST_STUN_BYTE or is_peer:
                receive(data, addr)
            else:
                self._counters["datagrams_foreign"] += 1

        protocol.datagram_received = datagram_received  # type: ignore[method-assign]

    def _is_peer(self, connection: Connection, address: tuple[str, int]) -> bool:
        """Whether an address was signalled by the peer, or has passed an authenticated ICE check."""
        if address not in self._known:
            self._known = {pair.remote_addr for pair in connection._check_list}
        return address in self._known
