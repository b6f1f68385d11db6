"""One WebRTC connection of a session: its tracks, its channels, and why it was lost."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import aiohttp
from aiortc import RTCBundlePolicy, RTCConfiguration, RTCIceServer, RTCPeerConnection, RTCSessionDescription
from aiortc.mediastreams import MediaStreamError, MediaStreamTrack
from av import VideoFrame

from livebrush_client.api import Answer, Api, Refused

log = logging.getLogger(__name__)

CLOSE_TIMEOUT_S = 3.0
PROTOCOL_VERSION = 1

Message = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Lost:
    """Why a line is over. returns: whether the session may go on over another, after so many seconds where the server
    named them."""

    why: str
    returns: bool = False
    after_s: float | None = None


class Lent(MediaStreamTrack):
    """The user's track, lent to one connection: aiortc stops a connection's tracks with it."""

    def __init__(self, track: MediaStreamTrack) -> None:
        super().__init__()
        self.kind = track.kind
        self._track = track

    async def recv(self) -> Any:
        """The next picture of the track."""
        return await self._track.recv()


class Line:
    """A connection from its offer to its end. Calls back for pictures and messages, and once when it is lost."""

    def __init__(
        self,
        api: Api,
        *,
        on_picture: Callable[[VideoFrame], None],
        on_message: Callable[[Message], None],
        on_lost: Callable[[Lost], None],
    ) -> None:
        self.answer = Answer("", "", "", 0.0, "")
        self._api = api
        self._on_picture, self._on_message, self._on_lost = on_picture, on_message, on_lost
        self._connection: RTCPeerConnection | None = None
        self._control: Any = None
        self._opened = asyncio.Event()
        self._lost = False
        self._tasks: set[asyncio.Task[None]] = set()

    async def open(
        self, track: MediaStreamTrack, params: Message, *, bypass: bool, resume: str, timeout_s: float
    ) -> None:
        """Connect; resume: token of the session to go on with. Raises Refused, TimeoutError, ValueError for an answer
        that is none, or what aiohttp raises."""
        async with asyncio.timeout(timeout_s):
            servers = [RTCIceServer(**server) for server in await self._api.ice_servers()]
            configuration = RTCConfiguration(servers, bundlePolicy=RTCBundlePolicy.MAX_BUNDLE)
            connection = self._connection = RTCPeerConnection(configuration)
            connection.addTrack(Lent(track))
            self._control = connection.createDataChannel("control")
            telemetry = connection.createDataChannel("telemetry", ordered=False, maxRetransmits=0)
            self._control.on("open", self._opened.set)
            self._control.on("close", lambda: self._lose(Lost("the server closed the session")))
            self._control.on("message", self._take)
            telemetry.on("message", self._take)
            connection.on("track", self._on_track)
            connection.on("connectionstatechange", self._on_state)
            await connection.setLocalDescription(await connection.createOffer())
            self.answer = await self._api.offer(connection.localDescription.sdp, params, bypass=bypass, resume=resume)
            await connection.setRemoteDescription(RTCSessionDescription(self.answer.sdp, "answer"))
            await self._opened.wait()

    def send(self, message: Message) -> None:
        """Over the control channel."""
        self._control.send(json.dumps({"v": PROTOCOL_VERSION, **message}))

    async def close(self, *, goodbye: bool) -> None:
        """End it; nothing is called back any more. goodbye: the session is over too, which frees its seat at once."""
        self._lost = True
        if goodbye and self.answer.url:
            with contextlib.suppress(Refused, aiohttp.ClientError, OSError, TimeoutError):
                async with asyncio.timeout(CLOSE_TIMEOUT_S):
                    await self._api.close(self.answer.url)
        if self._connection is not None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(CLOSE_TIMEOUT_S):
                    await self._connection.close()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _take(self, text: str | bytes) -> None:
        """A message of either channel. What raises here would end aiortc's transport."""
        if self._lost:
            return
        try:
            message = json.loads(text)
            self._on_message(message)
            if message["type"] == "notice" and message["code"] == "closing":
                after_s = message.get("reconnect_after_s")
                self._lose(Lost(message["message"], returns=True, after_s=None if after_s is None else float(after_s)))
        except Exception:
            log.exception("a message of the server was not taken")

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
            if isinstance(frame, VideoFrame) and not self._lost:
                self._on_picture(frame)

    def _on_state(self) -> None:
        assert self._connection is not None  # who calls this back
        state = self._connection.connectionState
        if state in ("failed", "closed"):
            self._lose(Lost(f"the connection {state}", returns=state == "failed"))

    def _lose(self, lost: Lost) -> None:
        if not self._lost:
            self._lost = True
            self._on_lost(lost)
