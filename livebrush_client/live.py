"""A session with its pictures, its control channel and its telemetry, over as many connections as it takes."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import aiohttp
from aiortc.mediastreams import MediaStreamTrack
from av import VideoFrame

from livebrush_client.api import Answer, Api, Refused
from livebrush_client.line import Line, Lost, Message

CONNECT_TIMEOUT_S = 20.0
# The server waits a minute for the picture that shows a change before it says that it knows none.
ACK_TIMEOUT_S = 70.0
# A message of the data channel ends at 8 KiB.
MAX_LIST_BYTES = 8_000
# Pauses before the tries to come back, where the server names none; no more tries than these, nor longer than that.
BACKOFF_S = (0.5, 1.0, 2.0, 4.0, 8.0, 8.0, 8.0)
RECONNECT_LIMIT_S = 60.0
# What a session is asked to begin with, of all that the server says of its parameters.
WISHED = ("prompt", "blend", "transition_s", "strength", "steps", "seed", "recache")


class Ended(Exception):
    """The session is over; the text says why."""


class Moved(Exception):
    """The connection went while an answer was due, and the session goes on over another: ask again."""


class Live:
    """An open session. Made by `connect`.

    answer: what the server answered the last offer with. stats: its last telemetry. skipped: pictures that a newer one
    replaced before `frames` took them. moves: times the session went on over another connection.
    """

    def __init__(self, api: Api, track: MediaStreamTrack, params: Message, *, reconnect: bool) -> None:
        self.answer = Answer("", "", "", 0.0, "")
        self.stats: Message = {}
        self.skipped = 0
        self.moves = 0
        self._api, self._track, self._reconnect = api, track, reconnect
        self._params, self._bypass = dict(params), False
        self._scenes: Message = {}
        self._scene: Message | None = None
        self._line: Line | None = None
        self._connected = asyncio.Event()
        self._moving: asyncio.Task[None] | None = None
        self._listeners: dict[str, list[Callable[[Message], None]]] = {}
        self._requests: dict[int, asyncio.Future[Message]] = {}
        self._last_id = 0
        self._picture: VideoFrame | None = None
        self._changed = asyncio.Event()
        self._ended = ""

    # --- to look at

    async def frames(self) -> AsyncIterator[VideoFrame]:
        """The newest picture each time, until the session ends. Slow readers miss pictures and never fall behind.

        Time stamps begin anew with every connection.
        """
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
        """Call `listener` with every message of a kind: stats, marks, notice, summary, error (docs/protocol.md); and
        with `moved` when the session goes on over another connection: `session`, and `resumed` where it is the same."""
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
        ack = await self._ask("bypass", on=on)
        self._bypass = on
        return ack

    async def load_scenes(self, scenes: Sequence[Message], *, loop: bool = False, begin: int = 0) -> Message:
        """Load a scene list and begin one of its scenes; returns the ack of that, or what REST does for a long list."""
        self._scenes, self._scene = {"scenes": list(scenes), "loop": loop}, None
        return await self._load(begin)

    async def go(self, where: int | str) -> Message:
        """Go to a scene: its number from 0, next, previous, play or stop; returns the ack. Raises also Moved."""
        return await self._ask("scene", repeat=False, go=where)

    async def _load(self, begin: int) -> Message:
        if len(json.dumps(self._scenes["scenes"])) > MAX_LIST_BYTES:
            return await self._api.session(self.answer.session).load_scenes(**self._scenes, begin=begin)
        return await self._ask("scenes", **self._scenes, begin=begin)

    async def _ask(self, kind: str, *, repeat: bool = True, **fields: Any) -> Message:
        """Ask, over the next connection where this one goes meanwhile. repeat: what was asked may be asked twice."""
        async with asyncio.timeout(ACK_TIMEOUT_S):
            while True:
                await self._connected.wait()
                if self._ended or self._line is None:
                    raise Ended(self._ended)
                try:
                    return await self._ask_once(self._line, kind, fields)
                except Moved:
                    if not repeat:
                        raise

    async def _ask_once(self, line: Line, kind: str, fields: Message) -> Message:
        self._last_id += 1
        number = self._last_id
        answer: asyncio.Future[Message] = asyncio.get_running_loop().create_future()
        self._requests[number] = answer
        try:
            line.send({"type": kind, "id": number, **fields})
            return await answer
        finally:
            del self._requests[number]

    # --- what comes

    def _on_picture(self, picture: VideoFrame) -> None:
        self.skipped += self._picture is not None
        self._picture = picture
        self._changed.set()

    def _on_message(self, message: Message) -> None:
        kind = message["type"]
        if kind == "stats":
            self.stats = message
        if kind == "ack" or message.get("code") == "params_changed":
            self._learn(message)
        self._settle(kind, message)
        self._tell(kind, message)

    def _learn(self, message: Message) -> None:
        """What the session is now, for a server that it may move to."""
        self._params = {name: message["params"][name] for name in WISHED if message["params"].get(name) is not None}
        self._bypass = message.get("bypass", self._bypass)
        self._scene = message.get("scene", self._scene)

    def _settle(self, kind: str, message: Message) -> None:
        answer = self._requests.get(message.get("id", 0))
        if answer is None or answer.done():
            return
        if kind == "ack":
            answer.set_result(message)
        elif kind == "error":
            refused = Refused(400, message["code"], message["message"], retryable=False, retry_after_s=None)
            answer.set_exception(refused)

    def _tell(self, kind: str, message: Message) -> None:
        for listener in self._listeners.get(kind, ()):
            listener(message)

    # --- lifetime

    async def _open(self, timeout_s: float) -> None:
        """Raises as `Line.open`."""
        line = Line(self._api, on_picture=self._on_picture, on_message=self._on_message, on_lost=self._on_lost)
        try:
            await line.open(
                self._track, self._params, bypass=self._bypass, resume=self.answer.resume, timeout_s=timeout_s
            )
        except BaseException:
            await line.close(goodbye=True)
            raise
        self.answer, self._line = line.answer, line
        self._connected.set()

    def _on_lost(self, lost: Lost) -> None:
        if self._line is None:
            return  # before it was open: whoever opens it hears of it
        if not lost.returns or not self._reconnect:
            self._end(lost.why)
            return
        self._connected.clear()
        line, self._line = self._line, None
        for answer in self._requests.values():
            if not answer.done():
                answer.set_exception(Moved(lost.why))
        self._moving = asyncio.get_running_loop().create_task(self._move(line, lost))

    async def _move(self, line: Line, lost: Lost) -> None:
        """Go on over another connection, or end."""
        problem: Exception | None = None
        await line.close(goodbye=False)
        after_s = lost.after_s
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(RECONNECT_LIMIT_S):
                for backoff_s in BACKOFF_S:
                    await asyncio.sleep(backoff_s if after_s is None else after_s)
                    after_s = None
                    try:
                        await self._open(CONNECT_TIMEOUT_S)
                    except Refused as refused:
                        problem, after_s = refused, refused.retry_after_s
                        if not refused.retryable:
                            break
                    except (aiohttp.ClientError, OSError, ValueError, KeyError, TypeError) as error:
                        problem = error
                    else:
                        await self._moved()
                        return
        tried = f"; it did not come back: {problem or 'no answer in time'}"
        self._end(lost.why + tried)

    async def _moved(self) -> None:
        self.moves += 1
        self.stats = {}
        self._tell("moved", {"type": "moved", "session": self.answer.session, "resumed": self.answer.resumed})
        scene = self._scene
        if not self.answer.resumed and scene is not None and scene["count"] == len(self._scenes.get("scenes", ())):
            # Another server begins without the list: it goes on with the scene that stood.
            with contextlib.suppress(Refused, Moved, Ended, TimeoutError):
                await self._load(scene["index"])
                if scene["left_s"] is None:
                    await self.go("stop")

    def _end(self, why: str) -> None:
        if self._ended:
            return
        self._ended = why
        self._changed.set()
        self._connected.set()
        for answer in self._requests.values():
            if not answer.done():
                answer.set_exception(Ended(why))

    async def _close(self) -> None:
        self._end("closed")
        if self._moving is not None:
            self._moving.cancel()
            await asyncio.gather(self._moving, return_exceptions=True)
        if self._line is not None:
            await self._line.close(goodbye=True)
        self._track.stop()


@contextlib.asynccontextmanager
async def connect(
    url: str,
    track: MediaStreamTrack,
    *,
    token: str | None = None,
    timeout_s: float = CONNECT_TIMEOUT_S,
    reconnect: bool = True,
    **params: Any,
) -> AsyncIterator[Live]:
    """Open a session for the length of the context.

    Args:
        url: of the server, say http://127.0.0.1:8080.
        track: the video to restyle, any aiortc track: a camera or file by aiortc.contrib.media, or your own.
        token: bearer token, where the server asks for one.
        reconnect: go on over another connection, with all settings, where the server says that it goes or moves its
            sessions, or where the connection fails.
        params: what the session begins with: prompt, strength, seed, ... (docs/protocol.md).

    Raises: Refused when the server says no, TimeoutError when it does not come up within timeout_s.
    """
    async with Api(url, token=token) as api:
        live = Live(api, track, params, reconnect=reconnect)
        try:
            await live._open(timeout_s)
            yield live
        finally:
            await live._close()
