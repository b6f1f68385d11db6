"""A request passed on to another server, and its answer back: what a gateway does with small HTTP.

Host and Origin go as they came, so that the server's own rules about names and pages hold; X-Forwarded-For says who
asked. Bodies are bounded (server/bodies.py), every wait too, and nothing is decompressed on the way.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import aiohttp
from aiohttp import hdrs, web
from multidict import CIMultiDict, MultiMapping
from yarl import URL

from server.errors import BadRequest, ServerError

# Of one connection, not of the request (RFC 9110, 7.6.1); bodies are framed anew.
HOP_BY_HOP = frozenset(
    (
        "connection",
        "keep-alive",
        "proxy-authenticate",
        "proxy-authorization",
        "proxy-connection",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
    )
)
# What is said anew on the way there; a client's own X-Forwarded-For is nobody's word.
SAID_ANEW = frozenset(("content-length", "expect", "x-forwarded-for"))
NOT_OURS = ("User-Agent", "Accept", "Accept-Encoding", "Content-Type")
CHUNK_BYTES = 64 * 1024
CONNECT_TIMEOUT_S = 2.0
# The longest that a server takes by itself: the end of a recording, which it writes out first.
READ_TIMEOUT_S = 30.0
TIMEOUT_S = 120.0
TIMEOUT = aiohttp.ClientTimeout(total=TIMEOUT_S, sock_connect=CONNECT_TIMEOUT_S, sock_read=READ_TIMEOUT_S)


class NotReached(Exception):
    """Nobody is there who could have taken the request; it may be sent elsewhere."""


class NotAnswered(ServerError):
    """It was sent, and what became of it is not known."""

    status, code, retryable = 504, "no_answer", True


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole answer."""

    status: int
    headers: CIMultiDict[str]
    body: bytes

    def response(self) -> web.Response:
        """For the client."""
        return web.Response(status=self.status, headers=self.headers, body=self.body)


def target(base: str, request: web.Request) -> URL:
    """The same path and query on another server. Raises BadRequest for what is no path."""
    path = request.rel_url.raw_path_qs
    if not path.startswith("/") or path.startswith("//"):
        raise BadRequest("the request names no path")
    return URL(base + path, encoded=True)


def headers_for(request: web.Request, address: str, *, without: frozenset[str] = frozenset()) -> CIMultiDict[str]:
    """The headers to send on, for a client at `address`."""
    headers = _of_the_request(request.headers, SAID_ANEW | without)
    headers["X-Forwarded-For"] = address
    return headers


async def ask(
    http: aiohttp.ClientSession, request: web.Request, url: URL, headers: Mapping[str, str], body: bytes | None
) -> Answer:
    """Pass a request on and take the whole answer. Raises NotReached or NotAnswered."""
    try:
        async with _sent(http, request, url, headers, body) as answer:
            return Answer(answer.status, _of_the_request(answer.headers, SAID_ANEW), await answer.read())
    except (aiohttp.ClientConnectionError, aiohttp.ConnectionTimeoutError) as error:
        raise NotReached(str(error)) from error
    except (aiohttp.ClientError, TimeoutError) as error:
        raise NotAnswered("the server behind this gateway did not answer in time; try again") from error


async def pass_on(
    http: aiohttp.ClientSession, request: web.Request, url: URL, headers: Mapping[str, str], body: bytes | None
) -> web.StreamResponse:
    """The same with an answer of any length, handed on as it comes."""
    response: web.StreamResponse | None = None
    try:
        async with _sent(http, request, url, headers, body) as answer:
            response = web.StreamResponse(
                status=answer.status, reason=answer.reason, headers=_of_the_request(answer.headers, frozenset())
            )
            await response.prepare(request)
            async for chunk in answer.content.iter_chunked(CHUNK_BYTES):
                await response.write(chunk)
            await response.write_eof()
            return response
    except (aiohttp.ClientError, TimeoutError, ConnectionResetError) as error:
        if response is not None:
            # Half an answer cannot be taken back: the client sees its connection close.
            if request.transport is not None:
                request.transport.abort()
            return response
        if isinstance(error, aiohttp.ClientConnectionError | aiohttp.ConnectionTimeoutError):
            raise NotReached(str(error)) from error
        raise NotAnswered("the server behind this gateway did not answer in time; try again") from error


def _sent(
    http: aiohttp.ClientSession, request: web.Request, url: URL, headers: Mapping[str, str], body: bytes | None
) -> aiohttp.client._RequestContextManager:
    return http.request(
        request.method,
        url,
        headers=headers,
        data=body,
        allow_redirects=False,
        skip_auto_headers=NOT_OURS,
        timeout=TIMEOUT,
    )


def _of_the_request(headers: MultiMapping[str], without: frozenset[str]) -> CIMultiDict[str]:
    named = {name.strip().lower() for name in headers.get(hdrs.CONNECTION, "").split(",")}
    return CIMultiDict(
        (name, value) for name, value in headers.items() if name.lower() not in HOP_BY_HOP | without | named
    )
