"""Several servers behind one address: offers go where there is room, everything else to whom it concerns.

    page ── HTTP ──▶ gateway ──▶ the node with most room, or the one that a token, a URL or a stream names
      └──── WebRTC, UDP ───────▶ that node

Signalling is passed on rather than redirected: the page's origin stays one, so neither CORS nor its security policy nor
its token stands in the way. Only WHIP and WHEP clients that are no pages are sent to the node itself (307), where they
have no token to lose on the way (docs/scale.md). It keeps nothing: another gateway, or this one started anew, knows as
much after one round of questions.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import aiohttp
from aiohttp import WSCloseCode, WSMsgType, hdrs, web

from server.bodies import MAX_BODY_BYTES, read_any, read_body
from server.drain import DRAIN_PATH
from server.errors import Full, NotFound, ServerError, problem
from server.forward import Answer, NotReached, ask, headers_for, pass_on, target
from server.gateway_metrics import GatewayMetrics
from server.gateway_nodes import CAPACITY, Node, Nodes
from server.gateway_settings import GatewaySettings
from server.guard import SESSIONS, SOCKET, SUBPROTOCOL, client_address, session_of
from server.health import admin_application, admin_listener
from server.limits import Connections, GuardedSite
from server.node_name import node_of
from server.tls import tls_context

log = logging.getLogger(__name__)

OFFER = "/api/v1/webrtc/offer"
# Answered of all nodes together: the member whose lists are joined; of the capacity, figures are added.
MERGED = {"/api/v1/sessions": "sessions", "/api/v1/streams": "streams", CAPACITY: ""}
# Nodes that one request is tried on.
MAX_TRIES = 4
MAX_CONNECTIONS = 1024
# To one node at once; more wait, within the timeout of a request. A node takes 32 of one address.
MAX_REQUESTS_OF_NODE = 24
NO_NODE_RETRY_S = 2.0
# Refusals that are about seats; any other 503 is told as it is.
SEAT_CODES = ("full", "draining", "shutting_down")
MAX_MESSAGE_BYTES = 1024 * 1024
SOCKET_TIMEOUT_S = 5.0
# A side of a WebSocket that takes nothing for so long is gone.
STUCK_S = 15.0
SHUTDOWN_TIMEOUT_S = 2.0
# Close codes that are never sent: none was given, or there was no close.
UNSPOKEN = (0, 1005, 1006, 1015)
# A WebSocket's own, which are said anew.
OF_THE_SOCKET = frozenset(
    ("sec-websocket-key", "sec-websocket-version", "sec-websocket-extensions", "sec-websocket-protocol")
)

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Gateway:
    """The HTTP handlers over the nodes."""

    def __init__(
        self, settings: GatewaySettings, nodes: Nodes, http: aiohttp.ClientSession, sockets: aiohttp.ClientSession
    ) -> None:
        """http: for requests, with a bound on their number; sockets: for WebSockets, without one."""
        self._settings = settings
        self._nodes = nodes
        self._http = http
        self._sockets = sockets
        self._proxies = [ipaddress.ip_network(one) for one in settings.trusted_proxies]
        self.metrics = GatewayMetrics(nodes, asyncio.get_running_loop().time)
        of_address = {"of_address": 0} if self._proxies else {}
        self.connections = Connections(
            lambda reason: self.metrics.refused.labels(reason).inc(), in_all=MAX_CONNECTIONS, **of_address
        )
        self._open: set[web.WebSocketResponse] = set()

    def application(self) -> web.Application:
        """The aiohttp application."""
        app = web.Application(middlewares=[self._wall], client_max_size=MAX_BODY_BYTES)
        app.add_routes(
            [
                *self.health_routes(),
                web.post(OFFER, self._offer),
                web.get(SOCKET, self._socket),
                web.route("*", DRAIN_PATH, self._drain),
                *(web.get(path, self._merged) for path in MERGED),
                web.route("*", "/{path:.*}", self._route),
            ]
        )
        app.on_shutdown.append(self._close_sockets)
        return app

    def health_routes(self) -> list[web.RouteDef]:
        """/livez: 200 while the loop turns. /readyz: 200 while a node renders, else 503, in the form of a server."""

        async def livez(request: web.Request) -> web.Response:
            return web.json_response({"status": "ok"})

        async def readyz(request: web.Request) -> web.Response:
            up = self._nodes.up
            ready = sum(node.report is not None and node.report.ready for node in up)
            detail = f"{ready} of {len(self._nodes.all)} servers are ready, {len(up)} answer"
            body: dict[str, object] = {"ready": ready > 0, "stage": "ready" if ready else "loading" if up else "failed"}
            body |= {"percent": 100 if ready else 0, "detail": detail}
            return web.json_response(body, status=200 if ready else 503)

        return [web.get("/livez", livez), web.get("/readyz", readyz)]

    @web.middleware
    async def _wall(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Every refusal of our own in the one shape; a fault is logged, counted and answered without its details."""
        with self.connections.request(request.transport):
            try:
                response = await handler(request)
            except ServerError as error:
                response = problem(error)
            except web.HTTPException as error:
                response = problem(ServerError(error.reason, code=f"http_{error.status}", status=error.status))
            except Exception:
                self.metrics.faults.inc()
                log.exception("%s %s failed", request.method, request.path)
                response = problem(ServerError("the gateway failed at this request; its log says why"))
        self.metrics.requests.labels(about(request.method, request.path), str(response.status)).inc()
        return response

    # --- to whom

    async def _route(self, request: web.Request) -> web.StreamResponse:
        path = request.path
        if (session := session_of(path)) is not None:
            return await self._through(request, self._nodes.named(node_of(session)))
        endpoint, stream = stream_of(path)
        if endpoint and request.method == hdrs.METH_POST:
            await self._nodes.refresh()
            return await (self._publish if endpoint == "whip" else self._view)(request, stream)
        if stream and not endpoint:
            await self._nodes.refresh()
            return await self._through(request, self._nodes.with_stream(stream))
        return await self._through(request, None)

    async def _through(self, request: web.Request, node: Node | None) -> web.StreamResponse:
        """Pass a request on to a node, or to the first of the command line that answers: all have the same page.

        Raises: ServerError where none answers.
        """
        body = await read_any(request) if request.body_exists else None
        for one in [node] if node is not None else self._nodes.up[:MAX_TRIES]:
            try:
                return await pass_on(self._http, request, target(one.url, request), self._headers(request), body)
            except NotReached as error:
                self._lost(one, error)
        if node is not None:
            raise ServerError(
                "the server that has this session or stream does not answer; send a new offer",
                code="node_gone",
                status=503,
                retry_after_s=NO_NODE_RETRY_S,
            )
        raise self._no_node()

    async def _drain(self, request: web.Request) -> web.Response:
        raise NotFound("a gateway is not emptied; ask the server itself: livebrush drain URL")

    # --- offers

    async def _offer(self, request: web.Request) -> web.StreamResponse:
        """A page's offer: to the node of its resume token, else to the one with most room."""
        body = await read_body(request, "application/json")
        return await self._place(request, body, self._nodes.named(node_of(resume_token(body))))

    async def _publish(self, request: web.Request, stream: str) -> web.StreamResponse:
        """A publisher: to where its stream is, and its viewers wait, else to the node with most room."""
        first = self._nodes.with_stream(stream, returns=True)
        node = next(iter(self._nodes.for_offer(first)), None)
        if node is not None and (node is first or node.room > 0) and self._may_redirect(request):
            node.placed += 1
            self._nodes.note_publisher(stream, node)
            return self._redirect(request, node)
        return await self._place(request, await read_any(request), first, stream)

    async def _view(self, request: web.Request, stream: str) -> web.StreamResponse:
        """A viewer: to where the stream is; where it is nowhere, any node says so."""
        node = self._nodes.with_stream(stream)
        if node is not None and self._may_redirect(request):
            return self._redirect(request, node)
        return await self._through(request, node)

    def _may_redirect(self, request: web.Request) -> bool:
        """A page is held up by CORS and its security policy, and many clients take no token to another origin."""
        carries = hdrs.ORIGIN in request.headers or hdrs.AUTHORIZATION in request.headers
        return self._settings.redirects and not carries

    def _redirect(self, request: web.Request, node: Node) -> web.Response:
        self.metrics.redirects.inc()
        location = str(target(node.public_url, request))
        return web.Response(status=307, headers={hdrs.LOCATION: location, hdrs.CACHE_CONTROL: "no-store"})

    async def _place(
        self, request: web.Request, body: bytes, first: Node | None, stream: str = ""
    ) -> web.StreamResponse:
        """Ask nodes in turn until one takes the offer or says for another reason than its seats that it does not.

        Raises: ServerError with the shortest time to come back after, when none does.
        """
        if not any(node.takes_new and node.room > 0 for node in self._nodes.all):
            await self._nodes.refresh()
        refusals: list[Answer] = []
        tried: list[Node] = []
        while len(tried) < MAX_TRIES:
            node = next((one for one in self._nodes.for_offer(first) if one not in tried), None)
            if node is None:
                break
            tried.append(node)
            node.placed += 1
            if stream:
                self._nodes.note_publisher(stream, node)
            try:
                answer = await ask(self._http, request, target(node.url, request), self._headers(request), body)
            except NotReached as error:
                self._lost(node, error)
                continue
            if answer.status != 503:
                return answer.response()
            # No more of these until it says that it has room.
            node.placed += max(0, node.room)
            refusals.append(answer)
            self.metrics.passed_over.labels("refused").inc()
        return self._refused(refusals)

    def _refused(self, refusals: list[Answer]) -> web.Response:
        """One refusal for all that were given. Raises ServerError."""
        if not refusals:
            raise self._no_node()
        told = [_problem_of(answer) for answer in refusals]
        for answer, body in zip(refusals, told, strict=True):
            if body.get("code") not in SEAT_CODES:
                return answer.response()
        reports = [node.report for node in self._nodes.all if node.takes_new and node.report is not None]
        if len(reports) < 2:
            return refusals[0].response()
        waits = [float(body["retry_after_s"]) for body in told if "retry_after_s" in body]
        seats = sum(report.seats for report in reports)
        raise Full(
            f"all {seats} seats of {len(reports)} servers are taken",
            retry_after_s=min(waits + [report.retry_after_s for report in reports]),
            details={"seats": seats, "open": sum(report.open for report in reports)},
        )

    # --- of all together

    async def _merged(self, request: web.Request) -> web.Response:
        """What every node says, in one. A refusal of one is the answer; a node that does not answer is left out."""
        headers = self._headers(request)

        async def ask_one(node: Node) -> Answer | None:
            try:
                return await ask(self._http, request, target(node.url, request), headers, None)
            except (NotReached, ServerError):
                return None

        answers = [answer for answer in await asyncio.gather(*map(ask_one, self._nodes.up)) if answer is not None]
        if not answers:
            raise self._no_node()
        for answer in answers:
            if answer.status != 200:
                return answer.response()
        bodies: list[dict[str, Any]] = [json.loads(answer.body) for answer in answers]
        if member := MERGED[request.path]:
            return web.json_response({member: [one for body in bodies for one in body[member]]})
        return web.json_response(
            {
                "open": sum(body["open"] for body in bodies),
                "seats": sum(body["seats"] for body in bodies),
                "ready": any(body["ready"] for body in bodies),
                "draining": all(body["draining"] for body in bodies),
                "retry_after_s": min(body["retry_after_s"] for body in bodies),
                "nodes": bodies,
            }
        )

    # --- WebSockets

    async def _socket(self, request: web.Request) -> web.StreamResponse:
        """A page without UDP: its pictures go through here, both ways, with no more in hand than one message each."""
        if request.headers.get(hdrs.UPGRADE, "").lower() != "websocket":
            return await self._through(request, None)
        upstream = await self._connect(request)
        async with upstream:
            socket = web.WebSocketResponse(max_msg_size=MAX_MESSAGE_BYTES, compress=False, protocols=(SUBPROTOCOL,))
            await socket.prepare(request)
            self._open.add(socket)
            self.metrics.sockets += 1
            ways = [asyncio.create_task(_carry(upstream, socket)), asyncio.create_task(_carry(socket, upstream))]
            try:
                await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
            finally:
                self.metrics.sockets -= 1
                self._open.discard(socket)
                for way in ways:
                    way.cancel()
                await asyncio.wait(ways)
                code = upstream.close_code or socket.close_code or 0
                with contextlib.suppress(TimeoutError, ConnectionError):
                    async with asyncio.timeout(SOCKET_TIMEOUT_S):
                        await socket.close(code=WSCloseCode.GOING_AWAY if code in UNSPOKEN else code)
        return socket

    async def _connect(self, request: web.Request) -> aiohttp.ClientWebSocketResponse:
        """A WebSocket to the node of the page's token, or with most room. Raises ServerError with a node's refusal."""
        await self._nodes.refresh()
        first = self._nodes.named(request.query.get("node", ""))
        # Refused is within the socket, where nobody else is tried: not the node that is being emptied.
        first = first if first is not None and first.takes_new else None
        offered = [one.strip() for one in request.headers.get(hdrs.SEC_WEBSOCKET_PROTOCOL, "").split(",")]
        for node in self._nodes.for_offer(first)[:MAX_TRIES]:
            node.placed += 1
            try:
                async with asyncio.timeout(SOCKET_TIMEOUT_S):
                    return await self._sockets.ws_connect(
                        target(node.url, request),
                        headers=self._headers(request, without=OF_THE_SOCKET),
                        protocols=[one for one in offered if one],
                        max_msg_size=MAX_MESSAGE_BYTES,
                        timeout=aiohttp.ClientWSTimeout(ws_close=SOCKET_TIMEOUT_S),
                    )
            except aiohttp.WSServerHandshakeError as refused:
                raise ServerError(
                    f"the server refuses this WebSocket ({refused.status})",
                    code=f"http_{refused.status}",
                    status=refused.status,
                ) from refused
            except (aiohttp.ClientError, TimeoutError) as error:
                self._lost(node, error)
        raise self._no_node()

    async def _close_sockets(self, app: web.Application) -> None:
        for socket in list(self._open):
            with contextlib.suppress(TimeoutError, ConnectionError):
                async with asyncio.timeout(SHUTDOWN_TIMEOUT_S):
                    await socket.close(code=WSCloseCode.GOING_AWAY)

    # --- what all use

    def _headers(self, request: web.Request, *, without: frozenset[str] = frozenset()) -> Any:
        return headers_for(request, client_address(request, self._proxies), without=without)

    def _lost(self, node: Node, error: Exception) -> None:
        self.metrics.passed_over.labels("lost").inc()
        self._nodes.lost(node, f"{error or type(error).__name__}")

    def _no_node(self) -> ServerError:
        count = len(self._nodes.all)
        error = ServerError(
            f"none of the {count} servers behind this gateway answers; try again in a moment"
            if count > 1
            else "the server behind this gateway does not answer; try again in a moment",
            code="no_node",
            status=503,
            retry_after_s=NO_NODE_RETRY_S,
        )
        error.retryable = True
        return error


def stream_of(path: str) -> tuple[str, str]:
    """The endpoint (whip, whep, or "" for REST) and the stream that a path names; ("", "") for any other path."""
    parts = path.strip("/").split("/")
    if len(parts) == 2 and parts[0] in SESSIONS:
        return parts[0], parts[1]
    if len(parts) == 2 and parts[1] in SESSIONS:
        return parts[1], parts[0]
    if parts[:3] == ["api", "v1", "streams"] and len(parts) > 3:
        return "", parts[3]
    return "", ""


def about(method: str, path: str) -> str:
    """What a request is about, for the metrics: one of few words."""
    if path in (SOCKET, OFFER):
        return "socket" if path == SOCKET else "offer"
    if session_of(path) is not None:
        return "session"
    endpoint, stream = stream_of(path)
    if endpoint or stream:
        return endpoint or "stream"
    return "api" if path.startswith("/api/") else "page"


def resume_token(body: bytes) -> str:
    """The resume token in an offer; "" where there is none, also in what is no offer: the node will say so."""
    try:
        token = json.loads(body)["resume"]["token"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return ""
    return token if isinstance(token, str) else ""


def _problem_of(answer: Answer) -> dict[str, Any]:
    try:
        body = json.loads(answer.body)
    except ValueError:
        return {}
    return body if isinstance(body, dict) else {}


async def _carry(
    source: aiohttp.ClientWebSocketResponse | web.WebSocketResponse,
    sink: aiohttp.ClientWebSocketResponse | web.WebSocketResponse,
) -> None:
    """Messages from one side to the other until either ends. A side that takes none holds up the other, not memory."""
    with contextlib.suppress(ConnectionError, TimeoutError, RuntimeError):
        async for message in source:
            async with asyncio.timeout(STUCK_S):
                if message.type is WSMsgType.TEXT:
                    await sink.send_str(message.data)
                elif message.type is WSMsgType.BINARY:
                    await sink.send_bytes(message.data)


@contextlib.asynccontextmanager
async def running_gateway(settings: GatewaySettings) -> AsyncIterator[tuple[Gateway, int]]:
    """A listening gateway; yields it and its port once every node was asked.

    Raises: OSError when a port is taken or the TLS files cannot be used.
    """
    tls = tls_context(settings.tls_cert, settings.tls_key)
    token = settings.token.get_secret_value() if settings.token else ""
    jar = aiohttp.DummyCookieJar()
    # No connection is kept: one that a node's restart has broken would only be found so by the next request.
    bounded = aiohttp.TCPConnector(force_close=True, limit=0, limit_per_host=MAX_REQUESTS_OF_NODE)
    async with (
        aiohttp.ClientSession(connector=aiohttp.TCPConnector(force_close=True), cookie_jar=jar) as polls,
        aiohttp.ClientSession(connector=bounded, cookie_jar=jar, auto_decompress=False) as http,
        aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), cookie_jar=jar) as sockets,
    ):
        nodes = Nodes(settings.make_nodes(), polls, token=token, needs_tokens=not settings.is_private)
        gateway = Gateway(settings, nodes, http, sockets)
        runner = web.AppRunner(
            gateway.application(), access_log=None, auto_decompress=False, shutdown_timeout=SHUTDOWN_TIMEOUT_S
        )
        admin = admin_application(gateway.health_routes(), gateway.metrics.registry)
        await runner.setup()
        polling = asyncio.create_task(nodes.run(), name="gateway/nodes")
        try:
            await nodes.refresh()
            await GuardedSite(runner, settings.host, settings.port, gateway.connections, tls=tls).start()
            port: int = runner.addresses[0][1]
            async with admin_listener(admin, settings.admin_port, wished=settings.port, got=port):
                yield gateway, port
        finally:
            polling.cancel()
            await asyncio.wait([polling])
            await runner.cleanup()
