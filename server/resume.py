"""Coming back: a page that lost its connection finds its session again by a token, or at least its settings.

    lost but not ended  -> the same session, its seat and engine stream with it, on the new connection
    ended               -> a new session with the settings of the old one

A token is good once: who came back has another. So of two pages with the same token (a duplicated tab) one gets the
session, and they do not take it from each other for ever. The token before stays good until the new connection is up,
because an answer may be lost on the way.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from dataclasses import dataclass, field
from types import TracebackType
from typing import Protocol, Self

import av
from pydantic import BaseModel, ConfigDict, Field

from engine.api import StreamParams
from server.control import ParamsChange
from server.errors import ServerError
from server.frames import CameraFrame, FrameMark, OutgoingFrame
from server.node_name import new_resume_token

RESUME_S = 30.0
# After its last packet; others wait for the seat. The page itself comes back after 3 s without a word of the server.
SEAT_S = 18.0
MAX_KEPT = 256
# Of a session whose new connection is not up yet; each is an answer that may have been lost.
MAX_TOKENS = 4


class Link(Protocol):
    """A connection of a session, whichever way it goes: server/peer.py by WebRTC, server/socket_media.py by WebSocket.

    What its methods do in full is told in `Peer`.
    """

    answer_sdp: str
    video_delay_s: float
    connected_at: float | None
    has_sound: bool
    on_sound: Callable[[av.AudioFrame, float], None] | None

    @property
    def counters(self) -> dict[str, int]: ...  # noqa: D102
    @property
    def last_packet_at(self) -> float: ...  # noqa: D102
    async def next_frame(self) -> CameraFrame | None: ...  # noqa: D102
    def send_frame(self, frame: OutgoingFrame) -> None: ...  # noqa: D102
    def take_marks(self) -> list[FrameMark]: ...  # noqa: D102
    def take_unsent(self) -> list[tuple[int, str]]: ...  # noqa: D102
    async def next_message(self) -> str | None: ...  # noqa: D102
    def send_control(self, text: str) -> None: ...  # noqa: D102
    def send_telemetry(self, text: str) -> None: ...  # noqa: D102
    async def add_candidates(self, candidates: Sequence[Mapping[str, object]]) -> None: ...  # noqa: D102
    async def wait_until_gone(self) -> str: ...  # noqa: D102


Connect = Callable[[], AbstractAsyncContextManager[Link]]
"""Opens a connection for the body of an `async with`; raises ServerError for one that cannot be made."""


class Door:
    """The one open connection of a session. As a context manager it leaves none open."""

    def __init__(self) -> None:
        self._open = self._before = AsyncExitStack()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._before.aclose()
        await self._open.aclose()

    async def open(self, connect: Connect) -> Link:
        """Open the next connection; the one before goes on until `close_before`. Raises ServerError."""
        stack = AsyncExitStack()
        link = await stack.enter_async_context(connect())
        self._before, self._open = self._open, stack
        return link

    async def close_before(self) -> None:
        """Close the connection before this one."""
        await self._before.aclose()

    async def close(self) -> None:
        """Close the connection that is open."""
        await self._open.aclose()


class Arrival:
    """A new connection on its way to a session that runs; `answered` is resolved once it is open."""

    def __init__(self, connect: Connect) -> None:
        self.connect = connect
        self.answered: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def accept(self) -> None:
        """Tell who waits, if still somebody does."""
        if not self.answered.done():
            self.answered.set_result(None)

    def refuse(self, error: ServerError) -> None:
        """The same with the reason why not."""
        if not self.answered.done():
            self.answered.set_exception(error)


@dataclass(frozen=True, slots=True)
class Kept:
    """What is known of a session that has ended."""

    params: StreamParams
    transition_s: float
    bypass: bool

    def changed(self, change: ParamsChange, bypass: bool | None) -> Kept:
        """These settings with those that are given in place."""
        transition_s = self.transition_s if change.transition_s is None else change.transition_s
        return Kept(change.applied_to(self.params), transition_s, self.bypass if bypass is None else bypass)


class Resume(BaseModel):
    """The session that a page had. keep: its settings win over those that the page now sends."""

    model_config = ConfigDict(extra="forbid")

    token: str = Field(max_length=64)
    keep: bool = False


class Wish(BaseModel):
    """What a page asks for as it connects, over whichever way."""

    model_config = ConfigDict(extra="forbid")

    params: ParamsChange = ParamsChange()
    bypass: bool | None = None
    own_class: str = Field(default="", max_length=32, alias="class")
    resume: Resume | None = None


@dataclass(slots=True)
class _Entry:
    """Tokens of one session. kept and until: set once it has ended."""

    tokens: list[bytes] = field(default_factory=list)
    kept: Kept | None = None
    until: float = 0.0


class ResumeBook:
    """Which token belongs to which session. Pure: instants, monotonic seconds, are passed in."""

    def __init__(self, node: str = "") -> None:
        """node: the server's name, which every token begins with."""
        self._node = node
        self._entries: dict[str, _Entry] = {}
        self._sessions: dict[bytes, str] = {}

    def issue(self, session_id: str) -> str:
        """A token for a session; the one before stays good until `confirm`."""
        token = new_resume_token(self._node)
        entry = self._entries.setdefault(session_id, _Entry())
        entry.tokens.append(_digest(token))
        self._sessions[entry.tokens[-1]] = session_id
        self._drop(entry, keep=MAX_TOKENS)
        return token

    def confirm(self, session_id: str) -> None:
        """The newest token has arrived: the ones before are void."""
        if (entry := self._entries.get(session_id)) is not None:
            self._drop(entry, keep=1)

    def end(self, session_id: str, kept: Kept, now: float) -> None:
        """The session is over; its token finds `kept` for RESUME_S. The oldest of too many are forgotten."""
        if (entry := self._entries.pop(session_id, None)) is None:
            return
        entry.kept, entry.until = kept, now + RESUME_S
        self._entries[session_id] = entry
        ended = [one for one, its in self._entries.items() if its.kept is not None]
        surplus = max(0, len(ended) - MAX_KEPT)
        for place, one in enumerate(ended):
            if place < surplus or self._entries[one].until <= now:
                self._drop(self._entries.pop(one), keep=0)

    def session_of(self, token: str) -> str | None:
        """The session a token was issued for."""
        return self._sessions.get(_digest(token))

    def take(self, token: str, now: float) -> Kept | None:
        """What is kept of a session that has ended; its token is void then."""
        session_id = self.session_of(token)
        entry = self._entries.get(session_id or "")
        if session_id is None or entry is None or entry.kept is None:
            return None
        self._drop(self._entries.pop(session_id), keep=0)
        return entry.kept if now < entry.until else None

    def _drop(self, entry: _Entry, *, keep: int) -> None:
        while len(entry.tokens) > keep:
            self._sessions.pop(entry.tokens.pop(0), None)


def _digest(token: str) -> bytes:
    # Looked up by its hash, so that the time of a lookup says nothing of a token.
    return hashlib.sha256(token.encode()).digest()
