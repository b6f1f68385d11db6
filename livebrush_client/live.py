"""The WebRTC side: one session with its pictures, its control channel and its telemetry."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import aiohttp
from aiortc import RTCBundlePolicy, RTCConfiguration, RTCIceServer, RTCPeerConnection, RTCSessionDescription
from aiortc.mediastreams import MediaStreamError, MediaStreamTrack
from av import VideoFrame

from livebrush_client.api import Answer, Api, Refused

log = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 20.0
# The server waits a minute for the picture that shows a change before it says that it knows none.
ACK_TIMEOUT_S = 70.0
CLOSE_TIMEOUT_S = 3.0
PROTOCOL_VERSION = 1
# A message of the data channel ends at 8 KiB.
MAX_LIST_BYTES = 8_000

Message = dict[str, Any]


class Ended(Exception):
    """The session is over; the text says why."""


class Live:
    """An open session. Made by `connect`.

    answer: what the server answered the offer with. stats: its last telemetry. skipped: pictures that a newer one
    replaced before `frames` took them.
    """

    def __init__(self, api: Api, connection: RTCPeerConnection) -> None:
        self.answer = Answer("", "", "", 0.0, "")
        self.stats: Message = {}
        self.skipped = 0
        self._api = api
        self._connection = connection
        self._control = connection.createDataChannel("control")
        telemetry = connection.createDataChannel("telemetry", ordered=False, maxRetransmits=0)
        self._listeners: dict[str, list[Callable[[Message], None]]] = {}
        self._requests: dict[int, asyncio.Future[Message]] = {}
        self._last_id = 0
        self._opened = asyncio.Event()
        self._picture: VideoFrame | None = None
        self._changed = asyncio.Event()
        self._ended = ""
        self._tasks: set[asyncio.Task[None]] = set()
        self._control.on("open", self._opened.set)
        self._control.on("close", lambda: self._end("the server closed the session"))
        self._control.on("message", self._on_message)
        telemetry.on("message", self._on_message)
        connection.on("track", self._on_track)
        connection.on("connectionstatechange", self._on_state)

    # --- to look at

    async def frames(self) -> AsyncIterator[VideoFrame]:
        """The newest picture each time, until the session ends. Slow readers miss pictures and never fall behind."""
        while True:
            await self._changed.wait()
            self._changed.clear()
            picture, self._picture = self._picture, None
            if picture is not None:
                yield picture
            if self._ended:
                self._changed.set()
                return

    def on(self, kind: str, listener: Callable[[Message], None]) -> None:
        """Call `listener` with every message of a kind: stats, marks, notice, summary, error (docs/protocol.md)."""
        self._listeners.setdefault(kind, []).append(listener)

    @property
    def ended(self) -> str:
        """Why the session is over; empty while it is not."""
        return self._ended

    # --- to steer

    async def set(self, **change: Any) -> Message:
        """Change what is given (prompt, blend, transition_s, strength, steps, seed, ...); returns the server's ack.

        Raises: Refused for what the server does not take, Ended, or TimeoutError.
        """
        return await self._ask("params", **change)

    async def bypass(self, on: bool) -> Message:
        """Show the camera, or stop doing so; returns the ack."""
        return await self._ask("bypass", on=on)

    async def load_scenes(self, scenes: Sequence[Message], *, loop: bool = False, begin: int = 0) -> Message:
        """Load a scene list and begin one of its scenes; returns the ack of that, or what REST does for a long list."""
        if len(json.dumps(list(scenes))) > MAX_LIST_BYTES:
            return await self._api.session(self.answer.session).load_scenes(scenes, loop=loop, begin=begin)
        return await self._ask("scenes", scenes=list(scenes), loop=loop, begin=begin)

    async def go(self, where: int | str) -> Message:
        """Go to a scene: its number from 0, next, previous, play or stop; returns the ack."""
        return await self._ask("scene", go=where)

    async def _ask(self, kind: str, **fields: Any) -> Message:
        if self._ended:
            raise Ended(self._ended)
        self._last_id += 1
        number = self._last_id
        answer: asyncio.Future[Message] = asyncio.get_running_loop().create_future()
        self._requests[number] = answer
        try:
            self._control.send(json.dumps({"v": PROTOCOL_VERSION, "type": kind, "id": number, **fields}))
            async with asyncio.timeout(ACK_TIMEOUT_S):
                return await answer
        finally:
            del self._requests[number]

    # --- what comes

    def _on_message(self, text: str | bytes) -> None:
        """A message of either channel. What raises here would end aiortc's transport."""
        try:
            message = json.loads(text)
            kind = message["type"]
            if kind == "stats":
                self.stats = message
            self._settle(kind, message)
            for listener in self._listeners.get(kind, ()):
                listener(message)
        except Exception:
            log.exception("a message of the server was not taken")

    def _settle(self, kind: str, message: Message) -> None:
        answer = self._requests.get(message.get("id", 0))
        if answer is None or answer.done():
            return
        if kind == "ack":
            answer.set_result(message)
        elif kind == "error":
            refused = Refused(400, message["code"], message["message"], retryable=False, retry_after_s=None)
            answer.set_exception(refused)

    def _on_track(self, track: MediaStreamTrack) -> None:
        task = asyncio.get_running_loop().create_task(self._read(track))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _read(self, track: MediaStreamTrack) -> None:
        """Always read: an unread track grows."""
        while True:
            try:
                frame = await track.recv()
            except MediaStreamError:
                return
            if isinstance(frame, VideoFrame):
                self.skipped += self._picture is not None
                self._picture = frame
                self._changed.set()

    def _on_state(self) -> None:
        if self._connection.connectionState in ("failed", "closed"):
            self._end(f"the connection {self._connection.connectionState}")

    def _end(self, why: str) -> None:
        if self._ended:
            return
        self._ended = why
        self._changed.set()
        for answer in self._requests.values():
            if not answer.done():
                answer.set_exception(Ended(why))

    # --- lifetime

    async def _open(self, params: dict[str, Any], timeout_s: float) -> None:
        async with asyncio.timeout(timeout_s):
            await self._connection.setLocalDescription(await self._connection.createOffer())
            self.answer = await self._api.offer(self._connection.localDescription.sdp, params)
            await self._connection.setRemoteDescription(RTCSessionDescription(self.answer.sdp, "answer"))
            await self._opened.wait()

    async def _close(self) -> None:
        self._end("closed")
        if self.answer.url:
            with contextlib.suppress(Refused, aiohttp.ClientError, OSError, TimeoutError):
                async with asyncio.timeout(CLOSE_TIMEOUT_S):
                    await self._api.close(self.answer.url)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_TIMEOUT_S):
                await self._connection.close()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@contextlib.asynccontextmanager
async def connect(
    url: str,
    track: MediaStreamTrack,
    *,
    token: str | None = None,
    timeout_s: float = CONNECT_TIMEOUT_S,
    **params: Any,
) -> AsyncIterator[Live]:
    """Open a session for the length of the context.

    Args:
        url: of the server, say http://127.0.0.1:8080.
        track: the video to restyle, any aiortc track: a camera or file by aiortc.contrib.media, or your own.
        token: bearer token, where the server asks for one.
        params: what the session begins with: prompt, strength, seed, ... (docs/protocol.md).

    Raises: Refused when the server says no, TimeoutError when it does not come up within timeout_s.
    """
    async with Api(url, token=token) as api:
        servers = [RTCIceServer(**server) for server in await api.ice_servers()]
        connection = RTCPeerConnection(RTCConfiguration(servers, bundlePolicy=RTCBundlePolicy.MAX_BUNDLE))
        connection.addTrack(track)
        live = Live(api, connection)
        try:
            await live._open(params, timeout_s)
            yield live
        finally:
            await live._close()
