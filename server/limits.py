"""How much one client may ask, and how many connections there may be. Pure but for `Connections`' timers.

Keys are an address and the token shown, so that who shares an address with a guesser is not held up by it.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
import ssl
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import cast

from aiohttp import web

from server.control import TokenBucket
from server.errors import TooManyRequests
from server.tls import HANDSHAKE_TIMEOUT_S

MAX_CLIENTS = 4096
OFFERS_PER_S, OFFERS_BURST = 2.0, 30
ALL_OFFERS_PER_S, ALL_OFFERS_BURST = 10.0, 100
CHANGES_PER_S, CHANGES_BURST = 20.0, 100
BAD_PER_S, BAD_BURST = 1.0, 60
BLOCK_S = 1.0
MAX_CONNECTIONS = 256
MAX_CONNECTIONS_OF_ADDRESS = 32
HEADER_DEADLINE_S = 15.0
CLIENT_KEY = tuple[str, str]
# A refused connection is told why once it has asked something, and is gone after so long in any case.
REFUSAL_S = 1.0
MAX_REFUSING = 64
BUSY_BODY = json.dumps(
    {
        "title": "Too Many Requests",
        "status": 429,
        "detail": "too many connections are open; use fewer, and keep them alive",
        "code": TooManyRequests.code,
        "message": "too many connections are open; use fewer, and keep them alive",
        "retryable": True,
        "retry_after_s": 5.0,
    }
).encode()
BUSY = (
    b"HTTP/1.1 429 Too Many Requests\r\nRetry-After: 5\r\nConnection: close\r\n"
    b"Content-Type: application/problem+json\r\nContent-Length: %d\r\n\r\n%s" % (len(BUSY_BODY), BUSY_BODY)
)


@dataclass(slots=True)
class _Client:
    offers: TokenBucket = field(default_factory=lambda: TokenBucket(OFFERS_PER_S, OFFERS_BURST))
    changes: TokenBucket = field(default_factory=lambda: TokenBucket(CHANGES_PER_S, CHANGES_BURST))
    bad: TokenBucket = field(default_factory=lambda: TokenBucket(BAD_PER_S, BAD_BURST))
    blocked_until: float = float("-inf")


class RateLimits:
    """Buckets of the clients seen last, at most MAX_CLIENTS; instants are passed in, monotonic seconds."""

    def __init__(self) -> None:
        self._clients: OrderedDict[CLIENT_KEY, _Client] = OrderedDict()
        self._all_offers = TokenBucket(ALL_OFFERS_PER_S, ALL_OFFERS_BURST)

    def __len__(self) -> int:
        return len(self._clients)

    def check(self, key: CLIENT_KEY, now: float) -> None:
        """Raises TooManyRequests for who sent too many broken requests."""
        left_s = self._client(key).blocked_until - now
        if left_s > 0:
            raise TooManyRequests(
                f"over {BAD_PER_S:g} refused requests a second after {BAD_BURST}; wait a moment",
                code="too_many_bad_requests",
                retry_after_s=left_s,
            )

    def offer(self, key: CLIENT_KEY, now: float) -> None:
        """Count an offer. Raises TooManyRequests over the rate of a client, or of all together."""
        if not self._client(key).offers.take(now):
            raise TooManyRequests(f"over {OFFERS_PER_S:g} offers a second; wait a moment", retry_after_s=1.0)
        if not self._all_offers.take(now):
            raise TooManyRequests(
                f"over {ALL_OFFERS_PER_S:g} offers a second from all clients; wait a moment", retry_after_s=1.0
            )

    def change(self, key: CLIENT_KEY, now: float) -> None:
        """Count any other request that changes something. Raises TooManyRequests."""
        if not self._client(key).changes.take(now):
            raise TooManyRequests(f"over {CHANGES_PER_S:g} changes a second; wait a moment", retry_after_s=1.0)

    def refused(self, key: CLIENT_KEY, now: float) -> None:
        """Count a request that was refused for what it was."""
        client = self._client(key)
        if not client.bad.take(now):
            client.blocked_until = now + BLOCK_S

    def _client(self, key: CLIENT_KEY) -> _Client:
        client = self._clients.pop(key, None) or _Client()
        self._clients[key] = client
        if len(self._clients) > MAX_CLIENTS:
            self._clients.popitem(last=False)
        return client


def address_key(address: str) -> str:
    """An address as limits see it: of IPv6 the /64, which one client has whole."""
    try:
        found = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address[:64]
    if isinstance(found, ipaddress.IPv6Address):
        if found.ipv4_mapped is not None:
            return str(found.ipv4_mapped)
        return str(ipaddress.IPv6Network((found, 64), strict=False).network_address)
    return str(found)


class Connections:
    """The open TCP connections of a listener: their number, each address's share, and a deadline for headers.

    aiohttp waits for a request's headers as long as they take; here a connection without a request in hand that has
    begun one, or sent nothing yet, is closed after HEADER_DEADLINE_S.
    """

    def __init__(
        self,
        refused: Callable[[str], None],
        *,
        of_address: int = MAX_CONNECTIONS_OF_ADDRESS,
        in_all: int = MAX_CONNECTIONS,
        header_deadline_s: float = HEADER_DEADLINE_S,
    ) -> None:
        """refused: told the reason of each connection that is not kept. of_address: 0 for no such limit."""
        self._refused = refused
        self._of_address = of_address
        self._in_all = in_all
        self._header_deadline_s = header_deadline_s
        self._open: dict[asyncio.BaseTransport, _Connection] = {}
        self._addresses: Counter[str] = Counter()
        self._refusing = 0

    def __len__(self) -> int:
        return len(self._open)

    def guarded(self, make: Callable[[], asyncio.Protocol]) -> Callable[[], asyncio.Protocol]:
        """A protocol factory that counts the connections of `make`."""
        return lambda: _Connection(self, make)

    @contextmanager
    def request(self, transport: asyncio.BaseTransport | None) -> Iterator[None]:
        """Around a request's handling: its headers have come."""
        connection = None if transport is None else self._open.get(transport)
        if connection is None:
            yield
            return
        connection.has_request(True)
        try:
            yield
        finally:
            connection.has_request(False)

    def _admit(self, connection: _Connection, transport: asyncio.Transport) -> str:
        """The address that the connection counts for; raises TooManyRequests, with the reason as its code."""
        peer = transport.get_extra_info("peername")
        address = address_key(str(peer[0])) if peer else ""
        if len(self._open) >= self._in_all:
            raise TooManyRequests("too many connections", code="connections")
        if self._of_address and self._addresses[address] >= self._of_address:
            raise TooManyRequests("too many connections of one address", code="connections_of_address")
        self._open[transport] = connection
        self._addresses[address] += 1
        return address

    def _release(self, transport: asyncio.BaseTransport, address: str) -> None:
        del self._open[transport]
        self._addresses[address] -= 1
        if not self._addresses[address]:
            del self._addresses[address]


class _Connection(asyncio.Protocol):
    """Passes everything on to aiohttp's protocol, once the connection is admitted."""

    def __init__(self, connections: Connections, make: Callable[[], asyncio.Protocol]) -> None:
        self._connections = connections
        self._make = make
        self._inner: asyncio.Protocol | None = None
        self._transport: asyncio.Transport | None = None
        self._address = ""
        self._in_hand = False
        self._is_refused = False
        self._deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        try:
            self._address = self._connections._admit(self, self._transport)
        except TooManyRequests as error:
            self._connections._refused(error.code)
            if self._connections._refusing >= MAX_REFUSING:
                self._transport.abort()
                return
            self._connections._refusing += 1
            self._is_refused = True
            self._deadline = asyncio.get_running_loop().call_later(REFUSAL_S, self._transport.abort)
            return
        self._inner = self._make()
        self._inner.connection_made(transport)
        self._arm()

    def has_request(self, in_hand: bool) -> None:
        """A request is handled from now on, or no longer."""
        self._in_hand = in_hand
        self._disarm()

    def data_received(self, data: bytes) -> None:
        if self._inner is None:
            if self._is_refused and self._transport is not None:
                self._transport.write(BUSY)
                self._transport.close()
            return
        if not self._in_hand and self._deadline is None:
            self._arm()
        self._inner.data_received(data)

    def eof_received(self) -> bool | None:
        return self._inner.eof_received() if self._inner is not None else None

    def pause_writing(self) -> None:
        if self._inner is not None:
            self._inner.pause_writing()

    def resume_writing(self) -> None:
        if self._inner is not None:
            self._inner.resume_writing()

    def connection_lost(self, error: Exception | None) -> None:
        self._disarm()
        if self._is_refused:
            self._connections._refusing -= 1
        if self._inner is not None and self._transport is not None:
            self._connections._release(self._transport, self._address)
            self._inner.connection_lost(error)

    def _arm(self) -> None:
        loop = asyncio.get_running_loop()
        self._deadline = loop.call_later(self._connections._header_deadline_s, self._too_slow)

    def _disarm(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _too_slow(self) -> None:
        self._deadline = None
        self._connections._refused("header_deadline")
        if self._transport is not None:
            self._transport.abort()


class GuardedSite(web.TCPSite):
    """A listener whose connections are counted and bounded."""

    def __init__(
        self,
        runner: web.AppRunner,
        host: str,
        port: int,
        connections: Connections,
        *,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        super().__init__(runner, host, port, ssl_context=tls)
        self._address = (host, port)
        self._connections = connections

    async def start(self) -> None:
        """Listen. Raises OSError when the port is taken."""
        await web.BaseSite.start(self)
        server = self._runner.server
        assert server is not None
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(
            self._connections.guarded(server),
            *self._address,
            backlog=128,
            ssl=self._ssl_context,
            ssl_handshake_timeout=HANDSHAKE_TIMEOUT_S if self._ssl_context else None,
        )
