"""One peer's session: its life over one connection after another, and its figures.

    session_media.py     its pictures, from the camera through the engine to the screen
    session_controls.py  what changes it: page, REST and OSC, scenes, ladder
    session_terms.py     what it wishes, and what the rung leaves of that
    session_page.py      what its page is told
    session_recorder.py  its recordings

The session opens everything it uses and closes it when its `run` ends, however it ends.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time

from engine.api import StreamParams
from server import control
from server.errors import Conflict, NotFound, ServerError
from server.ladder import Rung
from server.metrics import SessionMetrics
from server.peer import Peer, PeerGone
from server.resume import SEAT_S, Arrival, Connect, Door, Link
from server.session_context import Outlet, SessionContext
from server.session_controls import Controls
from server.session_media import Media
from server.session_page import Page
from server.session_recorder import Recorder
from server.session_terms import Terms

log = logging.getLogger(__name__)

TELEMETRY_PERIOD_S = 0.5
BUSY_SHARE = 0.95
# Ends of a connection, not of a session: its page may come back.
REPLACED, LOST = "replaced", {"vanished", "failed"}
# Ends in which there is nobody left to tell.
PEER_LEFT = {"goodbye", "closed_by_peer", "vanished", "failed", "never_connected"}
# For the summary to leave before its channel is closed.
GOODBYE_S = 0.05


class Session:
    """One peer's tasks. `run` serves until the peer leaves; `answered` resolves to the SDP answer."""

    def __init__(
        self,
        session_id: str,
        context: SessionContext,
        params: StreamParams,
        *,
        fps: float,
        transition_s: float = 0.0,
        bypass: bool = False,
        outlet: Outlet | None = None,
    ) -> None:
        self.id = session_id
        self.answered: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._context = context
        self._outlet = outlet
        self._clock = clock = context.clock
        self.metrics = metrics = SessionMetrics(context.metrics, clock(), context.settings.latency_budget_s)
        self.terms = terms = Terms(params, Rung(context.steps_max, small=False, fps=fps), transition_s)
        self.page = page = Page(terms, context.style_names, clock)
        self.recorder = recorder = Recorder(page, context.settings, context.recordings)
        self.media = Media(session_id, context, terms, page, recorder, metrics, bypass=bypass, outlet=outlet)
        self.controls = Controls(
            *(session_id, terms, page, recorder, self.media, metrics, clock),
            steps_max=context.steps_max,
            chunk_frames=lambda: context.engine.capacity.chunk_frames,
        )
        self.leg = -1
        """How many connections this session had before the one it has."""
        self._arrival: Arrival | None = None
        self._arrived = asyncio.Event()

    @property
    def peer(self) -> Link | None:
        """The connection that it has now; None before the first."""
        return self.page.peer

    @property
    def bypass(self) -> bool:
        """Whether the camera is shown in the place of the restyled picture."""
        return self.media.presenter.bypass

    # --- lifetime

    async def run(self, connect: Connect) -> str:
        """Open a connection and serve; returns why its peer left. What it opens is closed when this ends.

        Raises: ServerError when the connection cannot be made.
        """
        async with Door() as door:
            peer = await door.open(connect)
            self._join(peer)
            self.answered.set_result(peer.answer_sdp)
            reason = "fault"
            try:
                reason = await self._serve(door, peer)
            except asyncio.CancelledError:
                reason = "closed"
                raise
            finally:
                if self._arrival is not None:
                    self._arrival.refuse(NotFound("the session has ended", code="session_gone"))
                self.recorder.close()
                await self._sum_up(self.peer or peer, reason)
        return reason

    async def rejoin(self, connect: Connect) -> None:
        """Go on over another connection; returns once it is open and the one before is to be closed.

        Raises: NotFound, if the session ends meanwhile; Conflict, if yet another connection comes first; or what
            `connect` raises, and the session stays as it is then.
        """
        if self._arrival is not None:
            self._arrival.refuse(Conflict("another page took this session up at the same time", code="resumed_twice"))
        self._arrival = arrival = Arrival(connect)
        self._arrived.set()
        await arrival.answered

    async def _serve(self, door: Door, peer: Link) -> str:
        """Run the session's tasks until the peer leaves for good; returns why it did."""
        try:
            async with asyncio.TaskGroup() as tasks:
                for work in (self.media.render, self.media.play, self.controls.scenes.run):
                    tasks.create_task(work(), name=f"{self.id}/{work.__name__}")
                if self._outlet is not None:
                    assert isinstance(peer, Peer)
                    tasks.create_task(self._outlet.serve(peer), name=f"{self.id}/outlet")
                tasks.create_task(self._follow_peers(door, peer), name=f"{self.id}/peers")
        except* PeerGone as gone:
            reason = _first_reason(gone)
        return reason

    async def _follow_peers(self, door: Door, peer: Link) -> None:
        """One connection after the other. Raises PeerGone when nobody comes back."""
        while True:
            reason = await self._serve_peer(peer)
            if reason != REPLACED:
                if reason not in LOST or self._outlet is not None:
                    raise PeerGone(reason)
                await door.close()
                log.info("session %s: its peer is lost (%s); it may come back", self.id, reason)
                left_s = peer.last_packet_at + SEAT_S - time.monotonic()
                try:
                    async with asyncio.timeout(max(0.0, left_s)):
                        await self._arrived.wait()
                except TimeoutError:
                    raise PeerGone(reason) from None
            peer = await self._take_up(door, peer)

    async def _take_up(self, door: Door, peer: Link) -> Link:
        """Open the connection that arrived, in the place of `peer`; returns `peer` when that cannot be done."""
        arrival, self._arrival = self._arrival, None
        self._arrived.clear()
        assert arrival is not None
        try:
            fresh = await door.open(arrival.connect)
        except ServerError as error:
            arrival.refuse(error)
            return peer
        fresh.video_delay_s = peer.video_delay_s
        self._join(fresh)
        arrival.accept()
        await door.close_before()
        return fresh

    async def _serve_peer(self, peer: Link) -> str:
        """Serve one connection; returns why it ended, REPLACED if another has arrived."""
        try:
            async with asyncio.TaskGroup() as tasks:
                for work in (self.media.ingest, self.controls.follow, self._telemetry, self._watch):
                    tasks.create_task(work(peer), name=f"{self.id}/{work.__name__.strip('_')}")
        except* PeerGone as gone:
            reason = _first_reason(gone)
        return reason

    def _join(self, peer: Link) -> None:
        """Have a connection as the session's own from now on; a page that came back knows nothing of before."""
        self.leg += 1
        self.metrics.on_stage("answer", self._clock())
        self.page.join(peer)
        self.media.join()
        self.controls.join()
        if self.leg > 0:
            self.media.tell_progress()
            self.controls.tell_again()
        self.controls.tell_rung()
        self.recorder.join(peer)
        self.recorder.tell_again()

    async def _sum_up(self, peer: Link, reason: str) -> None:
        """One line of figures in the log, and the same to a page that is still there."""
        self._take_unsent(peer)
        summary = self.metrics.summary(self._clock()) | {
            "reason": reason,
            "rung": self.terms.in_force(),
            "camera_overwritten": peer.counters.get("camera_overwritten", 0),
            "messages_passed_over": self.controls.passed_over,
            "peer": {name: count for name, count in sorted(peer.counters.items()) if count},
        }
        log.info("session %s: summary %s", self.id, json.dumps(summary))
        if reason not in PEER_LEFT:
            peer.send_control(control.encode("summary", **summary))
            await asyncio.sleep(GOODBYE_S)

    async def _watch(self, peer: Link) -> None:
        gone = asyncio.create_task(peer.wait_until_gone(), name=f"{self.id}/gone")
        arrived = asyncio.create_task(self._arrived.wait(), name=f"{self.id}/arrived")
        try:
            await asyncio.wait({gone, arrived}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            gone.cancel()
            arrived.cancel()
        raise PeerGone(REPLACED if self._arrived.is_set() else gone.result())

    def announce_draining(self, moves_in_s: float) -> None:
        """Tell the page that the server takes no new sessions, and when it ends this one."""
        message = "This server is being emptied; the page then goes on elsewhere."
        self.page.notice("draining", message, moves_in_s=moves_in_s)

    def announce_closing(self, *, reconnect_after_s: float = 2.0) -> None:
        """Tell the page that the server goes and when to come back."""
        message = "The server is stopping; the page comes back by itself."
        self.page.notice("closing", message, reconnect_after_s=reconnect_after_s)

    # --- figures

    async def _telemetry(self, peer: Link) -> None:
        """Frame marks and figures, twice a second."""
        while True:
            await asyncio.sleep(TELEMETRY_PERIOD_S)
            self.page.expire_acks(self.metrics.released_at)
            self._take_unsent(peer)
            marks = [
                [mark.rtp_timestamp, mark.index, round(mark.arrived_at, 4), round(mark.released_at, 4), mark.kind]
                for mark in peer.take_marks()
            ]
            if marks:
                peer.send_telemetry(control.encode("marks", frames=marks))
            peer.send_telemetry(control.encode("stats", **self.stats()))

    def _take_unsent(self, peer: Link) -> None:
        for index, reason in peer.take_unsent():
            self.metrics.on_unsent(self._clock(), reason, index)

    def stats(self) -> dict[str, object]:
        """The session's figures, as telemetry and REST show them."""
        return self.metrics.stats(self._clock()) | {
            "agreed_fps": self.terms.rung.fps,
            "rung": self.terms.in_force(),
            "limited_by": self._limited_by(),
            "sessions": self._context.engine.capacity.open_streams,
            "state": str(self.media.presenter.view),
        }

    def _limited_by(self) -> str:
        """What keeps the picture below the best this server gives, and below the wish."""
        terms, rung, metrics = self.terms, self.terms.rung, self.metrics
        if metrics.input_fps() < 0.9 * rung.fps:
            # A starved machine delivers fewer camera frames too.
            return "cpu" if self._context.metrics.cpu_share > BUSY_SHARE else "camera"
        is_lowered = rung.camera or rung.small or rung.light or terms.engine_params().steps != terms.params.steps
        is_slowed = rung.fps < self._context.settings.max_fps or metrics.engine_missed > 0.01 * metrics.due
        if is_lowered or is_slowed:
            return "gpu" if self._context.settings.engine.device.startswith("cuda") else "cpu"
        return "none"


def _first_reason(group: BaseExceptionGroup[PeerGone]) -> str:
    gone = group.exceptions[0]
    return _first_reason(gone) if isinstance(gone, BaseExceptionGroup) else gone.reason
