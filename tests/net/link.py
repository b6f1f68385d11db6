"""A bad network between a client and a server on loopback, in user space and without root.

    client  <->  [near socket  Link  far socket]  <->  server

A relay of datagrams that rewrites none of them: each side is told the relay's address in place of the other's, by
`towards_server` and `towards_client`, which change the candidates of an offer and of its answer. What happens to a
datagram on its way is decided by `Way`, which is pure: it has no clock and its chance comes from a seed.
"""

from __future__ import annotations

import asyncio
import random
import re
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

LOOPBACK = "127.0.0.1"
MAX_UNDER_WAY = 4096


@dataclass(frozen=True, slots=True)
class Impairment:
    """What one way does to datagrams; the default does nothing. Times in seconds, shares from 0 to 1.

    burst: mean length of runs of lost datagrams (two states, as Gilbert had it); 1 loses each by itself.
    jitter_s: added or taken, evenly spread; the order is kept.
    reorder: share that comes reorder_s late, so that others overtake.
    rate_bps: bit/s, with a queue of queue_s; what finds it full is dropped. None: as fast as it comes.
    down: a black hole.
    """

    loss: float = 0.0
    burst: float = 1.0
    delay_s: float = 0.0
    jitter_s: float = 0.0
    reorder: float = 0.0
    reorder_s: float = 0.015
    corruption: float = 0.0
    duplication: float = 0.0
    rate_bps: float | None = None
    queue_s: float = 0.4
    down: bool = False


class Way:
    """One direction. counters: datagrams `carried`, `lost`, `queue_full`, `black_hole`, `corrupted`, `duplicated`.

    carried_bytes: of the `carried`.
    """

    def __init__(self, seed: int) -> None:
        self.impairment = Impairment()
        self.counters: Counter[str] = Counter()
        self.carried_bytes = 0
        self._random = random.Random(seed)
        self._in_burst = False
        self._line_free_at = 0.0
        self._last_at = 0.0

    def carry(self, data: bytes, now: float) -> list[tuple[float, bytes]]:
        """What becomes of a datagram: instants of arrival and contents; nothing when it is lost."""
        how, chance = self.impairment, self._random.random
        if how.down:
            self.counters["black_hole"] += 1
            return []
        if self._is_lost(how):
            self.counters["lost"] += 1
            return []
        leaves_at = now
        if how.rate_bps is not None:
            begins_at = max(now, self._line_free_at)
            if begins_at - now > how.queue_s:
                self.counters["queue_full"] += 1
                return []
            leaves_at = self._line_free_at = begins_at + 8 * len(data) / how.rate_bps
        at = leaves_at + max(0.0, how.delay_s + how.jitter_s * (2 * chance() - 1))
        if chance() < how.reorder:
            at += how.reorder_s
        else:
            at = self._last_at = max(at, self._last_at)
        if data and chance() < how.corruption:
            place = self._random.randrange(len(data))
            data = data[:place] + bytes([data[place] ^ (1 << self._random.randrange(8))]) + data[place + 1 :]
            self.counters["corrupted"] += 1
        self.counters["carried"] += 1
        self.carried_bytes += len(data)
        if chance() < how.duplication:
            self.counters["duplicated"] += 1
            return [(at, data), (at, data)]
        return [(at, data)]

    def _is_lost(self, how: Impairment) -> bool:
        if how.burst <= 1:
            return self._random.random() < how.loss
        # Left after `burst` datagrams on average, and entered as often as makes the share come out at `loss`.
        leaving = 1 / how.burst
        entering = leaving * how.loss / (1 - how.loss)
        self._in_burst = self._random.random() < ((1 - leaving) if self._in_burst else entering)
        return self._in_burst


class _Socket(asyncio.DatagramProtocol):
    def __init__(self, received: Callable[[bytes, tuple[str, int]], None]) -> None:
        self._received = received
        self.transport: asyncio.DatagramTransport | None = None

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def datagram_received(self, data: bytes, addr: tuple[Any, ...]) -> None:
        self._received(data, (addr[0], addr[1]))


class Link:
    """The relay of one peer connection, from entering the context to leaving it.

    up: from the client to the server; down: back. Both may be changed at any time.
    """

    def __init__(self, seed: int = 1) -> None:
        self.up, self.down = Way(2 * seed), Way(2 * seed + 1)
        self.strays = 0
        """Datagrams of neither side, or that came before both were known."""
        self._client: tuple[str, int] | None = None
        self._learns = False
        self._server: tuple[str, int] | None = None
        self._near = _Socket(self._from_client)
        self._far = _Socket(self._from_server)
        self._under_way: dict[int, asyncio.TimerHandle] = {}
        self._last_number = 0

    async def __aenter__(self) -> Self:
        loop = asyncio.get_running_loop()
        for end in (self._near, self._far):
            await loop.create_datagram_endpoint(lambda end=end: end, local_addr=(LOOPBACK, 0))  # type: ignore[misc]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        for timer in self._under_way.values():
            timer.cancel()
        for end in (self._near, self._far):
            assert end.transport is not None
            end.transport.close()

    def set(self, up: Impairment, down: Impairment | None = None) -> None:
        """Impair both ways: alike, where `down` is left out."""
        self.up.impairment, self.down.impairment = up, up if down is None else down

    def towards_server(self, offer_sdp: str) -> str:
        """The offer to send: the client is where the far socket is. Its loopback candidate is the one used."""
        sdp, self._client = _moved(offer_sdp, _port(self._far))
        return sdp

    def towards_server_unseen(self, offer_sdp: str) -> str:
        """The offer to send of a client that trickles: without candidates. Who first sends to the near socket is it."""
        self._client, self._learns = None, True
        lines = [line for line in offer_sdp.splitlines() if not line.startswith("a=candidate:")]
        return "\r\n".join(lines) + "\r\n"

    def towards_client(self, answer_sdp: str) -> str:
        """The answer to take: the server is where the near socket is."""
        sdp, self._server = _moved(answer_sdp, _port(self._near))
        return sdp

    @property
    def server_address(self) -> tuple[str, int]:
        """Where the server's socket is, for those who send to it besides."""
        assert self._server is not None
        return self._server

    def _from_client(self, data: bytes, address: tuple[str, int]) -> None:
        if self._learns and self._client is None:
            self._client = address
        self._relay(self.up, data, address == self._client, self._far, self._server)

    def _from_server(self, data: bytes, address: tuple[str, int]) -> None:
        self._relay(self.down, data, self._server is None or address == self._server, self._near, self._client)

    def _relay(self, way: Way, data: bytes, known: bool, out: _Socket, target: tuple[str, int] | None) -> None:
        if not known or target is None or len(self._under_way) >= MAX_UNDER_WAY:
            self.strays += 1
            return
        now = time.monotonic()
        for at, what in way.carry(data, now):
            if at <= now:
                self._send(out, what, target)
                continue
            self._last_number += 1
            # The loop's clock is time.monotonic.
            self._under_way[self._last_number] = asyncio.get_running_loop().call_at(
                at, self._arrive, self._last_number, out, what, target
            )

    def _arrive(self, number: int, out: _Socket, data: bytes, target: tuple[str, int]) -> None:
        del self._under_way[number]
        self._send(out, data, target)

    @staticmethod
    def _send(out: _Socket, data: bytes, target: tuple[str, int]) -> None:
        if out.transport is not None and not out.transport.is_closing():
            out.transport.sendto(data, target)


def _port(end: _Socket) -> int:
    assert end.transport is not None
    return int(end.transport.get_extra_info("sockname")[1])


def _moved(sdp: str, port: int) -> tuple[str, tuple[str, int]]:
    """The text with one candidate, on loopback at `port`, in each section; and where that one was."""
    pattern = re.compile(r"a=candidate:\S+ \d+ udp \d+ 127\.0\.0\.1 (\d+) typ host[^\r\n]*", re.IGNORECASE)
    found = pattern.search(sdp)
    if found is None:
        raise ValueError(f"no host candidate at {LOOPBACK} in the SDP: a link works on loopback only")
    was = int(found[1])
    lines = []
    for line in sdp.splitlines():
        if line.startswith("a=candidate:"):
            match = pattern.match(line)
            if match is None or int(match[1]) != was:
                continue
            line = line.replace(f" {LOOPBACK} {was} ", f" {LOOPBACK} {port} ")
        lines.append(line)
    return "\r\n".join(lines) + "\r\n", (LOOPBACK, was)
