"""GET /api/v1/socket: a page that comes over a WebSocket. Its first message says what it wants, ours what it gets."""

from __future__ import annotations

import asyncio
import json
import logging
from functools import partial

from aiohttp import WSCloseCode, WSMsgType, web
from pydantic import ValidationError

from server.control import encode
from server.errors import BadRequest, ServerError, problem
from server.guard import SUBPROTOCOL, claim
from server.registry import SessionRegistry
from server.session_context import SessionContext
from server.socket_media import HELLO_TIMEOUT_S, MAX_PICTURE_BYTES, Hello, SocketPeer, open_socket, read_hello

log = logging.getLogger(__name__)


def socket_route(context: SessionContext, registry: SessionRegistry) -> web.RouteDef:
    """The route, over one registry."""

    async def handle(request: web.Request) -> web.StreamResponse:
        socket = web.WebSocketResponse(
            max_msg_size=MAX_PICTURE_BYTES, compress=False, autoping=True, protocols=(SUBPROTOCOL,)
        )
        await socket.prepare(request)
        try:
            hello = await _hello(socket)
            made: asyncio.Future[SocketPeer] = asyncio.get_running_loop().create_future()
            entry = await registry.enter(partial(open_socket, socket, hello, context.settings.media, made), hello)
        except ServerError as error:
            context.metrics.refused.labels(error.code).inc()
            body = problem(error).text or ""
            await socket.send_str(encode("refused", **json.loads(body)))
            code = WSCloseCode.TRY_AGAIN_LATER if error.retryable else WSCloseCode.POLICY_VIOLATION
            await socket.close(code=code, message=error.code.encode())
            return socket
        peer = made.result()
        claim(request, entry.name)
        log.info("session %s: over a WebSocket (%s)", entry.session.id, hello.told or "asked for")
        url = f"/api/v1/webrtc/offer/{entry.name}"
        peer.welcome(encode("welcome", url=url, **entry.as_json(context.engine.frame_size)))
        await peer.ended.wait()
        return socket

    return web.get("/api/v1/socket", handle)


async def _hello(socket: web.WebSocketResponse) -> Hello:
    """Raises BadRequest for anything but a hello, and for nothing at all."""
    try:
        message = await socket.receive(timeout=HELLO_TIMEOUT_S)
    except TimeoutError as error:
        raise BadRequest(f"nothing came within {HELLO_TIMEOUT_S:g} s; the first message is a hello") from error
    if message.type is not WSMsgType.TEXT:
        raise BadRequest("the first message is a hello, as JSON text")
    try:
        return read_hello(message.data)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "hello"
        raise BadRequest(f"{where}: {first['msg']}") from error
