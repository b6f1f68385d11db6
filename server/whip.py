"""WHIP in (RFC 9725) and WHEP out: a stream by its name, one publisher, many viewers (docs/whip.md).

    OBS -> POST /whip/{stream} -> a session as any other, with a Broadcast as outlet -> POST /whep/{stream} <- players

What is published goes through the same admission, ladder, engine and pacer as a page's camera.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import re
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from aiohttp import web
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from pydantic import ValidationError

from engine.api import StreamParams
from server.bodies import read_body
from server.broadcast import Broadcast
from server.control import ControlError, SessionChange, check_steps
from server.errors import (
    BadRequest,
    Conflict,
    Full,
    NotFound,
    PreconditionFailed,
    ServerError,
    ShuttingDown,
    Unsupported,
)
from server.matte import MatteProcess, asked_form
from server.node_name import new_session_id
from server.peer import NEGOTIATION_TIMEOUT_S, Peer, answer_offer
from server.registry import RETRY_AFTER_S, SessionRegistry
from server.resume import Link
from server.sdp_gate import check_offer
from server.session import Session
from server.session_context import SessionContext
from server.turn import ice_servers
from server.viewers import Feed
from server.whip_sdp import check_codecs, nearest_first, parse_fragment, ufrag_of

log = logging.getLogger(__name__)

SDP = "application/sdp"
FRAGMENT = "application/trickle-ice-sdpfrag"
STREAM_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
# A publisher from whom nothing came for so long makes way for another: OBS comes back before its old peer times out.
SILENT_S = 3.0
# Viewers stay so long for a publisher that comes back.
RETURN_S = 30.0
TICK_S = 0.5
# Asked for key frames in so many ticks on end and none came: the publisher does not hear, as OBS and FFmpeg.
DEAF_TICKS = 6
CLOSE_TIMEOUT_S = 5.0
# Session URLs whose DELETE is answered 200 once more: some clients close their connection and then say so.
MAX_REMEMBERED = 1024
NOT_LIVE_RETRY_S = 2.0
TAKEN_RETRY_S = 5.0
VIEWERS_FULL_RETRY_S = 10.0
PUBLISHER_CLASS = "publisher"
URL_PARAMS = ("prompt", "strength", "steps", "seed", "transition_s", "bypass")
EXPOSED_HEADERS = "Location, Link, ETag, Retry-After, Accept-Post, Accept-Patch, WWW-Authenticate"


@dataclass(eq=False, slots=True)
class Viewer:
    """One WHEP session."""

    id: str
    ufrag: str
    feed: Feed
    answered: asyncio.Future[str]
    peer: Peer | None = None
    task: asyncio.Task[None] | None = None


@dataclass(eq=False, slots=True)
class Stream:
    """One published stream. gone_at: since when nobody publishes, monotonic seconds; None while somebody does."""

    name: str
    broadcast: Broadcast
    session: Session | None = None
    ufrag: str = ""
    arriving: bool = False
    gone_at: float | None = None
    key_frames_asked: int = 0
    deaf_ticks: int = 0
    viewers: dict[str, Viewer] = field(default_factory=dict)


class Whip(Collector):
    """The streams of a server and the handlers of WHIP and WHEP."""

    def __init__(self, context: SessionContext, registry: SessionRegistry) -> None:
        self._context = context
        self._registry = registry
        self._streams: dict[str, Stream] = {}
        self._made: deque[str] = deque(maxlen=MAX_REMEMBERED)
        self._matte = MatteProcess()
        # Of the streams that are over.
        self._counted: Counter[str] = Counter()
        context.metrics.registry.register(self)
        self._closing = False
        self._tick_task: asyncio.Task[None] | None = None

    def add_to(self, app: web.Application) -> None:
        """Add the routes, and the start and the end of what stands behind them."""
        for path in ("/whip/{stream}", "/{stream}/whip"):
            app.router.add_route("*", path, self._whip_endpoint)
        for path in ("/whep/{stream}", "/{stream}/whep"):
            app.router.add_route("*", path, self._whep_endpoint)
        app.router.add_route("*", "/whip/{stream}/{id}", self._resource)
        app.router.add_route("*", "/whep/{stream}/{id}", self._resource)
        app.on_startup.append(self._start)
        app.on_shutdown.append(self._close)
        app.on_response_prepare.append(self._add_cors)

    # --- who may ask, beside server/guard.py

    async def _add_cors(self, request: web.Request, response: web.StreamResponse) -> None:
        if not _is_ours(request) or "Origin" not in request.headers:
            return
        response.headers["Vary"] = "Origin"
        response.headers["Access-Control-Expose-Headers"] = EXPOSED_HEADERS
        if (origin := request.headers["Origin"]) in self._context.settings.allowed_origins:
            response.headers["Access-Control-Allow-Origin"] = origin
        if request.method == "OPTIONS":
            response.headers["Access-Control-Allow-Methods"] = "OPTIONS, GET, HEAD, POST, PUT, PATCH, DELETE"
            response.headers["Access-Control-Allow-Headers"] = "Authorization, Content-Type, If-Match"
            response.headers["Access-Control-Max-Age"] = "600"

    # --- endpoints

    async def _whip_endpoint(self, request: web.Request) -> web.Response:
        _stream_name(request)
        match request.method:
            case "OPTIONS":
                return web.Response(headers={"Accept-Post": SDP, "Allow": "OPTIONS, GET, HEAD, POST"})
            case "GET" | "HEAD":
                return web.Response(status=204)
            case "POST":
                return await self._publish(request)
        raise _not_allowed(request, "OPTIONS, GET, HEAD, POST")

    async def _whep_endpoint(self, request: web.Request) -> web.Response:
        _stream_name(request)
        match request.method:
            case "OPTIONS":
                return web.Response(headers={"Accept-Post": SDP, "Allow": "OPTIONS, GET, HEAD, POST"})
            case "GET" | "HEAD":
                return web.Response(content_type=SDP)
            case "POST":
                return await self._view(request)
        raise _not_allowed(request, "OPTIONS, GET, HEAD, POST")

    async def _resource(self, request: web.Request) -> web.Response:
        if request.method == "OPTIONS":
            return web.Response(headers={"Accept-Patch": FRAGMENT, "Allow": "OPTIONS, GET, HEAD, PATCH, DELETE"})
        if request.method not in ("GET", "HEAD", "PATCH", "DELETE"):
            raise _not_allowed(request, "OPTIONS, GET, HEAD, PATCH, DELETE")
        session_id = request.match_info["id"]
        try:
            ufrag, viewer = self._find(request)
        except NotFound:
            if request.method == "DELETE" and request.path in self._made:
                return web.Response(status=200)
            raise
        if request.method == "DELETE":
            if viewer is not None:
                await self._end([viewer])
            else:
                await self._registry.close(session_id)
            return web.Response(status=200)
        if request.method == "PATCH":
            await self._trickle(request, ufrag, viewer.peer if viewer else self._registry.get(session_id).peer)
        return web.Response(status=204)

    def _find(self, request: web.Request) -> tuple[str, Viewer | None]:
        """The ufrag of the offer, and the viewer if it is one, of a session's URL. Raises NotFound."""
        name, session_id = _stream_name(request), request.match_info["id"]
        stream = self._streams.get(name)
        if stream is not None and request.path.startswith("/whep/"):
            viewer = stream.viewers.get(session_id)
            if viewer is not None:
                return viewer.ufrag, viewer
        elif stream is not None and (session := self._publisher(stream)) and session.id == session_id:
            return stream.ufrag, None
        raise NotFound("no such session: it has ended; POST a new offer", code="session_gone")

    async def _trickle(self, request: web.Request, ufrag: str, peer: Link | None) -> None:
        """Take candidates. What is not usable is left out in silence, as the RFC has it."""
        text = (await read_body(request, FRAGMENT)).decode(errors="replace")
        fragment = parse_fragment(text)
        if fragment.ufrag and fragment.ufrag != ufrag:
            raise Unsupported(
                "an ICE restart is not supported; DELETE this session and POST a new offer", code="no_ice_restart"
            )
        expected = request.headers.get("If-Match", "*").strip()
        if expected not in ("*", _etag(request.match_info["id"])):
            raise PreconditionFailed(f"If-Match {expected[:80]} is not the ETag of this session's ICE")
        if peer is not None:
            await peer.add_candidates(fragment.candidates)

    # --- publishing

    async def _publish(self, request: web.Request) -> web.Response:
        name = _stream_name(request)
        offer_sdp = await self._read_offer(request, watches=False)
        change = self._url_params(request.query)
        stream = self._streams.get(name)
        if stream is None:
            broadcast = Broadcast(self._context.settings.media, self._context.executor, self._matte)
            stream = self._streams[name] = Stream(name, broadcast, gone_at=self._context.clock())
        if stream.arriving:
            raise _taken(name)
        stream.arriving = True
        try:
            await self._make_way(stream)
            stream.session = session = await self._registry.answer(
                offer_sdp,
                change.applied_to(StreamParams(steps=self._context.settings.steps)),
                transition_s=change.transition_s or 0.0,
                bypass=bool(change.bypass),
                own_class=PUBLISHER_CLASS,
                outlet=stream.broadcast,
            )
        finally:
            stream.arriving = False
        stream.ufrag, stream.gone_at = ufrag_of(offer_sdp), None
        stream.key_frames_asked = stream.deaf_ticks = 0
        return self._created(request, f"/whip/{name}/{session.id}", session.id, session.answered.result())

    async def _make_way(self, stream: Stream) -> None:
        """Raises Conflict while somebody publishes; one who has fallen silent is ended."""
        session = self._publisher(stream)
        if session is None:
            return
        if session.peer is None or self._context.clock() - session.peer.last_packet_at < SILENT_S:
            raise _taken(stream.name)
        log.info("stream %s: its publisher fell silent and makes way for another", stream.name)
        await self._registry.close(session.id)

    def _publisher(self, stream: Stream) -> Session | None:
        """The session that publishes a stream now."""
        if stream.session is None:
            return None
        try:
            return self._registry.get(stream.session.id)
        except NotFound:
            return None

    def _url_params(self, query: Mapping[str, str]) -> SessionChange:
        """Raises BadRequest, naming the parameter and its bound."""
        if unknown := [name for name in query if name not in URL_PARAMS]:
            raise BadRequest(f"unknown parameter {unknown[0][:40]!r} in the URL; there are {', '.join(URL_PARAMS)}")
        try:
            change = SessionChange.model_validate_strings(dict(query), strict=False)
            check_steps(change, self._context.steps_max)
        except ValidationError as error:
            first = error.errors()[0]
            raise BadRequest(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from error
        except ControlError as error:
            raise BadRequest(str(error)) from error
        return change

    # --- watching

    async def _view(self, request: web.Request) -> web.Response:
        name = _stream_name(request)
        offer_sdp = await self._read_offer(request, watches=True)
        form = asked_form(request.query)
        stream = self._streams.get(name)
        if stream is None or stream.session is None:
            raise NotFound(
                f"nobody publishes {name!r}; try again in a moment", code="not_live", retry_after_s=NOT_LIVE_RETRY_S
            )
        most, count = self._context.settings.max_viewers, sum(len(one.viewers) for one in self._streams.values())
        if count >= most:
            raise Full(f"all {most} places for viewers are taken (max_viewers)", retry_after_s=VIEWERS_FULL_RETRY_S)
        answered: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        viewer = Viewer(
            new_session_id(self._context.node),
            ufrag_of(offer_sdp),
            Feed(stream.broadcast, self._context.settings.media, form),
            answered,
        )
        stream.viewers[viewer.id] = viewer
        viewer.task = asyncio.create_task(self._run_viewer(stream, viewer, offer_sdp), name=f"{viewer.id}/viewer")
        async with asyncio.timeout(NEGOTIATION_TIMEOUT_S + CLOSE_TIMEOUT_S):
            answer = await asyncio.shield(viewer.answered)
        return self._created(request, f"/whep/{name}/{viewer.id}", viewer.id, answer)

    async def _run_viewer(self, stream: Stream, viewer: Viewer, offer_sdp: str) -> None:
        """One viewer, behind a wall of its own: whatever it raises ends it and nobody else."""
        try:
            async with answer_offer(offer_sdp, self._context.settings.media, feed=viewer.feed) as peer:
                viewer.peer = peer
                viewer.answered.set_result(peer.answer_sdp)
                reason = await peer.wait_until_gone()
                log.info("viewer %s of %s left: %s", viewer.id, stream.name, reason)
        except ServerError as error:
            viewer.answered.set_exception(error)
        except Exception:
            self._context.metrics.faults.labels("viewer").inc()
            log.exception("viewer %s of %s failed", viewer.id, stream.name)
        finally:
            if not viewer.answered.done():
                viewer.answered.set_exception(ServerError("the viewer ended before it was answered"))
            viewer.feed.stop()
            stream.viewers.pop(viewer.id, None)

    async def _end(self, viewers: list[Viewer]) -> None:
        tasks = [viewer.task for viewer in viewers if viewer.task is not None]
        for task in tasks:
            task.cancel()
        if tasks:
            _, pending = await asyncio.wait(tasks, timeout=CLOSE_TIMEOUT_S)
            for late in pending:
                log.error("%s did not end within %.0f s", late.get_name(), CLOSE_TIMEOUT_S)

    # --- offers and answers

    async def _read_offer(self, request: web.Request, *, watches: bool) -> str:
        if self._closing:
            raise ShuttingDown("the server is shutting down; try again in a moment", retry_after_s=RETRY_AFTER_S)
        try:
            offer_sdp = (await read_body(request, SDP)).decode()
        except UnicodeDecodeError as error:
            raise BadRequest("the offer is not UTF-8 text") from error
        check_offer(offer_sdp, watches=watches)
        check_codecs(offer_sdp)
        return offer_sdp

    def _created(self, request: web.Request, url: str, session_id: str, answer: str) -> web.Response:
        answer = nearest_first(answer, _reached(request))
        # RFC 9725, 4.4.2: in each bundled section.
        answer = answer.replace("a=rtcp-mux\r\n", "a=rtcp-mux\r\na=rtcp-mux-only\r\n")
        # As bytes: with a text aiohttp would add a charset, which application/sdp does not have (RFC 8866).
        response = web.Response(body=answer.encode(), status=201, content_type=SDP)
        response.headers["Location"] = url
        self._made.append(url)
        response.headers["ETag"] = _etag(session_id)
        for server in ice_servers(self._context.settings.media):
            response.headers.add("Link", server.as_link())
        return response

    # --- REST

    def streams(self) -> dict[str, Session]:
        """The session that published a stream last, by the stream's name; one that is over may still have viewers."""
        return {stream.name: stream.session for stream in self._streams.values() if stream.session is not None}

    def live_session(self, name: str) -> Session:
        """Raises NotFound for a stream that nobody publishes now."""
        stream = self._streams.get(name)
        session = self._publisher(stream) if stream is not None else None
        if session is None:
            raise NotFound(f"nobody publishes {name[:64]!r}", code="not_live", retry_after_s=NOT_LIVE_RETRY_S)
        return session

    def shown(self, name: str) -> dict[str, object]:
        """What REST shows of a stream beside its session. Raises KeyError for one that is not there."""
        stream = self._streams[name]
        return {
            "stream": name,
            "live": self._publisher(stream) is not None,
            "viewers": len(stream.viewers),
            "broadcast": dict(stream.broadcast.counters),
        }

    def names(self) -> dict[str, bool]:
        """The streams that are here, those that wait for their publisher too, and whether each has one now."""
        return {stream.name: self._publisher(stream) is not None for stream in self._streams.values()}

    # --- figures

    def collect(self) -> Iterator[Metric]:
        """What Prometheus is told: viewers now, and everything that broadcasts have counted."""
        streams = list(self._streams.values())
        viewers = sum(len(stream.viewers) for stream in streams)
        yield GaugeMetricFamily("livebrush_viewers", "WHEP viewers of all streams", value=viewers)
        events = CounterMetricFamily(
            "livebrush_broadcast", "What broadcasts encoded, sent and dropped", labels=["what"]
        )
        total = sum((stream.broadcast.counters for stream in streams), self._counted + self._matte.counters)
        for what, count in sorted(total.items()):
            events.add_metric([what], count)
        yield events

    # --- lifetime

    async def _start(self, app: web.Application) -> None:
        self._tick_task = asyncio.create_task(self._tick(), name="whip")

    async def _close(self, app: web.Application) -> None:
        self._closing = True
        if self._tick_task is not None:
            self._tick_task.cancel()
        for stream in list(self._streams.values()):
            await self._forget(stream)
        await self._matte.close()

    async def _tick(self) -> None:
        """End the streams whose publisher stays away; tell of those whose publisher does not hear."""
        while True:
            await asyncio.sleep(TICK_S)
            now = self._context.clock()
            for stream in list(self._streams.values()):
                session = self._publisher(stream)
                if session is not None and session.peer is not None:
                    count_deaf(stream, session.peer.counters.get("key_frames_asked", 0))
                if stream.arriving or session is not None:
                    continue
                if stream.gone_at is None:
                    stream.gone_at = now
                # Of a server that is emptied the publisher comes back elsewhere, and viewers find it there.
                if not stream.viewers or self._registry.draining or now - stream.gone_at >= RETURN_S:
                    log.info("stream %s ended; %d viewers with it", stream.name, len(stream.viewers))
                    await self._forget(stream)

    async def _forget(self, stream: Stream) -> None:
        del self._streams[stream.name]
        await self._end(list(stream.viewers.values()))
        stream.broadcast.close()
        self._counted += stream.broadcast.counters


def _etag(session_id: str) -> str:
    """A strong tag of the session's ICE, which never restarts; tells nothing of the id, which is a secret."""
    return f'"{hashlib.sha256(session_id.encode()).hexdigest()[:16]}"'


def _stream_name(request: web.Request) -> str:
    name = request.match_info["stream"]
    if not STREAM_NAME.fullmatch(name):
        raise BadRequest("a stream's name has 1 to 64 letters, digits, - and _")
    return name


def count_deaf(stream: Stream, asked: int) -> None:
    """Log, once for each time, that a stream waits in vain for a key frame."""
    stream.deaf_ticks = stream.deaf_ticks + 1 if asked > stream.key_frames_asked else 0
    stream.key_frames_asked = asked
    if stream.deaf_ticks == DEAF_TICKS:
        log.warning(
            "stream %s: no key frame for %.0f s, though its publisher was asked for one: set the encoder's keyframe"
            " interval to 1 s (OBS: Settings, Output, Advanced; FFmpeg: -g)",
            stream.name,
            DEAF_TICKS * TICK_S,
        )


def _reached(request: web.Request) -> str:
    """The address of this server to which the client came; "" where a proxy stands between."""
    if request.transport is None or "X-Forwarded-For" in request.headers:
        return ""
    own: tuple[str, ...] = request.transport.get_extra_info("sockname") or ("",)
    return own[0].removeprefix("::ffff:")


def _is_ours(request: web.Request) -> bool:
    """Whether WHIP, WHEP or the REST calls of streams are asked."""
    parts = request.path.split("/")
    return (
        parts[1] in ("whip", "whep") or parts[2:] in (["whip"], ["whep"]) or request.path.startswith("/api/v1/streams")
    )


def _not_allowed(request: web.Request, allowed: str) -> ServerError:
    error = ServerError(f"{request.method} is not for this URL; there are {allowed}", code="http_405", status=405)
    error.headers = {"Allow": allowed}
    return error


def _taken(name: str) -> Conflict:
    return Conflict(
        f"somebody publishes {name!r} already; choose another name or stop that one first",
        code="already_published",
        retry_after_s=TAKEN_RETRY_S,
    )
