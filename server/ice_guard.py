"""The UDP side of a peer: which addresses it listens on, and which datagrams get any further.

Why it exists: one empty datagram from anybody who knows the port ends a live aiortc session (the DTLS reader
indexes its first byte), and the queue behind the socket has no bound. Both are closed here, before any parser.

Hooks: three methods of aioice objects are replaced on the instance, all in `attach` and `_watch`. aioice offers no
other way in; tests/server/test_ice_guard.py fails when an upgrade moves them.
"""

from __future__ import annotations

import time
from collections import Counter
from typing import Any

from aioice.candidate import Candidate
from aioice.ice import Connection, StunProtocol
from aiortc import RTCIceGatherer

LOOPBACK = "127.0.0.1"
MAX_QUEUED = 512
LAST_STUN_BYTE = 3


class IceGuard:
    """Stands between the sockets of one peer and aioice. Attach before candidates are gathered."""

    def __init__(self, counters: Counter[str]) -> None:
        self._counters = counters
        self._known: set[tuple[str, int]] = set()
        self.last_packet_at = time.monotonic()
        """Monotonic seconds: the last datagram of any kind from an address of the peer."""

    def attach(self, gatherer: RTCIceGatherer) -> None:
        """Offer 127.0.0.1 beside the real interfaces, and filter whatever the sockets receive."""
        connection: Connection = gatherer._connection
        gather, enqueue = connection.get_component_candidates, connection.data_received

        async def get_component_candidates(component: int, addresses: list[str], timeout: int = 5) -> list[Candidate]:
            # aioice leaves loopback out, but a browser on this machine may have no other address.
            found = await gather(
                component=component, addresses=list(dict.fromkeys([LOOPBACK, *addresses])), timeout=timeout
            )
            for protocol in connection._protocols:
                self._watch(connection, protocol)
            return found

        def data_received(data: bytes, component: int) -> None:
            if not data:
                self._counters["datagrams_empty"] += 1
            elif connection._queue.qsize() >= MAX_QUEUED:
                self._counters["datagrams_dropped"] += 1
            else:
                enqueue(data, component)

        connection.get_component_candidates = get_component_candidates  # type: ignore[method-assign]
        connection.data_received = data_received  # type: ignore[method-assign]

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
