"""The one gate before every handler: who asks, from where, how often, and with what (docs/security.md).

A request passes in this order: the Host header (DNS rebinding), the Origin header (other pages), the bearer token,
the role that its URL needs, the stream that a link is for, the rate of its client, the content type, and who made
the session that its URL names. A route that nobody listed here needs the publish role: new ones are closed.
"""

from __future__ import annotations

import asyncio
import base64
import ipaddress
import random
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterator, Sequence

from aiohttp import hdrs, web
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from server.access import EVERYTHING, Access, Grant
from server.errors import Forbidden, NotFound, ServerError, TooManyRequests, Unauthorized, WrongMediaType
from server.limits import CLIENT_KEY, Connections, RateLimits, address_key
from server.roles import Role
from server.settings import ServerSettings

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

# The subprotocol of this server's WebSocket. A browser's takes no headers, so its token is the second one that it
# offers: bearer.TOKEN, in base64url.
SUBPROTOCOL = "livebrush"
GRANT = web.RequestKey("grant", Grant)
# What a viewer's page asks before it plays.
FOR_VIEWERS = ("version", "models", "capacity", "ice-servers", "openapi.json", "streams")
# Beside its own stream, a link may ask these.
FOR_LINKS = ("version", "models", "ice-servers")
CONTENT_TYPES = ("application/json", "application/sdp", "application/trickle-ice-sdpfrag")
# Answers that say that the request was broken or not allowed; what is only gone or taken is no fault of its sender.
BAD_STATUSES = (400, 401, 403, 413, 415, 422)
WRONG_TOKEN_PAUSE_S = (0.1, 0.5)
MAX_OWNED = 4096
SESSIONS = ("whip", "whep")
SOCKET = "/api/v1/socket"


def needed_role(method: str, path: str) -> Role | None:
    """The role that a request needs; None for what everybody may have: the page's files and the health probes."""
    parts = path.strip("/").split("/")
    if method == hdrs.METH_OPTIONS:
        return None
    if parts[0] in SESSIONS or (len(parts) == 2 and parts[1] in SESSIONS):
        return Role.VIEW if "whep" in (parts[0], parts[-1]) and parts[0] != "whip" else Role.PUBLISH
    if parts[0] != "api" or len(parts) < 3:
        return None
    reads = method in (hdrs.METH_GET, hdrs.METH_HEAD)
    if parts[2:] in (["sessions"], ["drain"]):
        return Role.ADMIN
    return Role.VIEW if reads and parts[2] in FOR_VIEWERS else Role.PUBLISH


def session_of(path: str) -> str | None:
    """The id of the session that a URL names, which its creator and the admin alone may touch."""
    parts = path.strip("/").split("/")
    if parts[0] in SESSIONS and len(parts) == 3:
        return parts[2]
    if parts[:4] == ["api", "v1", "webrtc", "offer"] and len(parts) > 4:
        return parts[4]
    if parts[:3] == ["api", "v1", "sessions"] and len(parts) > 3:
        return parts[3]
    return None


def is_offer(method: str, path: str) -> bool:
    """Whether a request opens a session."""
    if path == SOCKET:
        return True
    return method == hdrs.METH_POST and session_of(path) is None and ("webrtc" in path or _names_stream(path))


def _names_stream(path: str) -> bool:
    parts = path.strip("/").split("/")
    return len(parts) == 2 and (parts[0] in SESSIONS or parts[1] in SESSIONS)


class Guard(Collector):
    """The gate of one server, its tables and its counters. Every table is bounded."""

    def __init__(
        self,
        settings: ServerSettings,
        access: Access,
        *,
        clock: Callable[[], float] = time.monotonic,
        unix_clock: Callable[[], float] = time.time,
    ) -> None:
        self._settings = settings
        self._access = access
        self._clock = clock
        self._unix_clock = unix_clock
        self._limits = RateLimits()
        self._owners: OrderedDict[str, str] = OrderedDict()
        self._refused: dict[str, int] = {}
        self._proxies = [ipaddress.ip_network(one) for one in settings.trusted_proxies]
        # All clients of a proxy come from its address.
        of_address = {"of_address": 0} if self._proxies else {}
        self.connections = Connections(self._count, **of_address)

    @web.middleware
    async def middleware(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Raises the ServerError of whoever may not pass."""
        with self.connections.request(request.transport):
            try:
                return await self._passed(request, handler)
            except TooManyRequests as error:
                self._count(error.code)
                raise

    async def _passed(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        key = (self._address(request), "")
        role = needed_role(request.method, request.path)
        try:
            self._check_host(request)
            self._check_origin(request)
            if role is None:
                self._check_content_type(request)
                return await handler(request)
            grant = await self._grant(request, key)
            key = (key[0], grant.owner)
            self._limits.check(key, self._clock())
            self._check_grant(request, grant, role)
            self._check_rate(request, key)
            self._check_content_type(request)
            self._check_owner(request, grant)
            request[GRANT] = grant
            request[GUARD] = self
            response = await handler(request)
        except (ServerError, web.HTTPException) as error:
            if error.status in BAD_STATUSES:
                self._limits.refused(key, self._clock())
            raise
        if response.status == 201 and (location := response.headers.get(hdrs.LOCATION)):
            self.own(grant, location.rstrip("/").rpartition("/")[2])
        return response

    def own(self, grant: Grant, session_id: str) -> None:
        """From now on the session's URL is for the holder of this grant, and the admin."""
        if self._access.required:
            # Of a page's session, ID.LEG, every leg is its creator's, and so is the plain id that REST takes.
            self._owners[session_id.partition(".")[0]] = grant.owner
            if len(self._owners) > MAX_OWNED:
                self._owners.popitem(last=False)

    # --- from where

    def _address(self, request: web.Request) -> str:
        return address_key(client_address(request, self._proxies))

    def _check_host(self, request: web.Request) -> None:
        """Only under a name of this server: a page that rebinds its own name to this address is refused."""
        host = request.host if request.host.endswith("]") else request.host.rsplit(":", 1)[0]
        allowed = self._settings.allowed_hosts
        if host in allowed or host == self._settings.host:
            return
        # Rebinding needs a name; a server that is reached from elsewhere is reached by any of its addresses.
        if not self._settings.is_loopback and _is_address(host.strip("[]")):
            return
        self._count("host")
        raise Forbidden(f"host {host[:100]!r} is not one of {', '.join(allowed)}; add it to allowed_hosts")

    def _check_origin(self, request: web.Request) -> None:
        """The same origin, or a listed one. A preflight reveals nothing; without its header a page goes no further."""
        origin = request.headers.get(hdrs.ORIGIN)
        if origin is None or request.method == hdrs.METH_OPTIONS or origin in self._settings.allowed_origins:
            return
        if origin.partition("://")[2] != request.host:
            self._count("origin")
            raise Forbidden("requests from pages of other origins are refused; add theirs to allowed_origins")

    # --- who

    async def _grant(self, request: web.Request, key: CLIENT_KEY) -> Grant:
        """Raises Unauthorized without a token, or after a pause with a wrong one."""
        if not self._access.required:
            return EVERYTHING
        scheme, _, token = (_from_subprotocol(request) or request.headers.get(hdrs.AUTHORIZATION, "")).partition(" ")
        try:
            if scheme.lower() != "bearer":
                raise Unauthorized("send the header Authorization: Bearer <token>; in OBS, fill in Bearer Token")
            return self._access.grant(token.strip(), unix_now=self._unix_clock())
        except Unauthorized as error:
            self._count(error.code)
            self._limits.check(key, self._clock())
            if token:
                await asyncio.sleep(random.uniform(*WRONG_TOKEN_PAUSE_S))
            raise

    def _check_grant(self, request: web.Request, grant: Grant, role: Role) -> None:
        if grant.role < role:
            self._count("role")
            raise Forbidden(f"this needs a token for {role}; the one sent is for {grant.role}", code="role")
        if not grant.stream or request.match_info.get("stream") == grant.stream:
            return
        parts = request.path.strip("/").split("/")
        if parts[0] == "api" and parts[2] in FOR_LINKS:
            return
        self._count("stream")
        raise Forbidden(f"this link is for the stream {grant.stream!r} alone", code="other_stream")

    def _check_owner(self, request: web.Request, grant: Grant) -> None:
        """Raises NotFound, as for a session that is not there, so that nobody learns which are."""
        session_id = session_of(request.path)
        if session_id is None or grant.role is Role.ADMIN:
            return
        if self._owners.get(session_id.partition(".")[0]) == grant.owner:
            return
        self._count("owner")
        raise NotFound("no such session: it has ended; send a new offer", code="session_gone")

    # --- how often, and with what

    def _check_rate(self, request: web.Request, key: CLIENT_KEY) -> None:
        now = self._clock()
        if is_offer(request.method, request.path):
            self._limits.offer(key, now)
        elif request.method not in (hdrs.METH_GET, hdrs.METH_HEAD):
            self._limits.change(key, now)

    def _check_content_type(self, request: web.Request) -> None:
        """Nothing that a form or a simple request of a foreign page can send, and nothing compressed."""
        if not request.body_exists:
            return
        if request.content_type not in CONTENT_TYPES or hdrs.CONTENT_ENCODING in request.headers:
            self._count("content_type")
            raise WrongMediaType(f"send plain {' or '.join(CONTENT_TYPES[:2])}, not {request.content_type[:100]}")

    # --- figures

    def _count(self, reason: str) -> None:
        self._refused[reason] = self._refused.get(reason, 0) + 1

    def collect(self) -> Iterator[Metric]:
        """What Prometheus is told. The reasons are words of this server, never of a client."""
        refused = CounterMetricFamily(
            "livebrush_requests_refused", "Requests and connections that did not pass", labels=["reason"]
        )
        for reason, count in sorted(self._refused.items()):
            refused.add_metric([reason], count)
        yield refused
        yield GaugeMetricFamily("livebrush_http_connections", "Open connections", value=len(self.connections))
        yield GaugeMetricFamily("livebrush_limited_clients", "Clients whose rate is known", value=len(self._limits))


GUARD = web.RequestKey("guard", Guard)


def claim(request: web.Request, session_id: str) -> None:
    """Bind a session's URL to who asked; an answer of 201 with a Location does so by itself."""
    request[GUARD].own(request[GRANT], session_id)


def client_address(request: web.Request, proxies: Sequence[Network]) -> str:
    """Whom a request is from; where one of the proxies sent it, whom that one saw."""
    peer = request.remote or ""
    if proxies and _is_in(peer, proxies):
        # The last entry is what the proxy itself saw; those before it are the client's own words.
        peer = request.headers.get("X-Forwarded-For", peer).rpartition(",")[2].strip()
    return peer


def _from_subprotocol(request: web.Request) -> str:
    """What would stand in the Authorization header; "" without a token there, or with one that is no base64url."""
    if request.path != SOCKET:
        return ""
    offered = [one.strip() for one in request.headers.get(hdrs.SEC_WEBSOCKET_PROTOCOL, "").split(",")]
    coded = next((one.removeprefix("bearer.") for one in offered if one.startswith("bearer.")), "")
    try:
        return f"Bearer {base64.urlsafe_b64decode(coded + '=' * (-len(coded) % 4)).decode()}" if coded else ""
    except ValueError:
        return ""


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def _is_in(address: str, networks: Sequence[Network]) -> bool:
    return _is_address(address) and any(ipaddress.ip_address(address) in network for network in networks)
