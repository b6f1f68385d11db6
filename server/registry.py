"""Every session of this server: who is let in, on which rung, isolated from each other, and all of them ended.

What a session is given is one mechanism for all: the ladder. Who comes, who goes, a new wish and an engine that slows
down are all the same to it: another load.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from dataclasses import dataclass, replace
from functools import partial

import psutil

from engine.api import EngineState, StreamParams
from server.admission import LIMITS, Stays, bounds, free_seats, seats
from server.allocator import give_back
from server.control import ControlError, check_steps, shown_params
from server.errors import BadRequest, Full, NotFound, ServerError, ShuttingDown
from server.event_loop import busy_s
from server.host import FrameCap, HostMeter
from server.ladder import Ladder, Rung, Signals
from server.node_name import new_session_id
from server.peer import answer_offer
from server.resume import Connect, Kept, ResumeBook, Wish
from server.session import Session
from server.session_context import Outlet, SessionContext

log = logging.getLogger(__name__)

ANSWER_TIMEOUT_S = 5.0
CLOSE_TIMEOUT_S = 5.0
# For the last notice to leave before its channel is closed.
GOODBYE_S = 0.1
# Of a server that stops: the next one is up by then.
RETRY_AFTER_S = 5.0
# Between two sessions that are moved, so that the servers they go to answer one offer after another; all of them are
# told within MOVE_ALL_S.
MOVE_PAUSE_S = 0.25
MOVE_ALL_S = 5.0
SAMPLE_PERIOD_S = 0.25
# Samples between two looks at the machine.
TICK_SAMPLES = 8
# Between two times that the memory of sessions that are over is given back to the system.
GIVE_BACK_SAMPLES = 40
# A session that has shown nothing of the model yet is still starting, for so long: its misses tell nothing.
STARTING_S = 5.0


@dataclass(frozen=True, slots=True)
class Entry:
    """A page's session. name: for `get`, of this connection; token: for the next one; resumed: it is not a new one."""

    session: Session
    name: str
    token: str
    resumed: bool

    def as_json(self, size: tuple[int, int]) -> dict[str, object]:
        """What its page is told. size: of the picture, in pixels."""
        session = self.session
        return {
            "session": session.id,
            "fps": session.terms.rung.fps,
            "size": f"{size[0]}x{size[1]}",
            "resume": self.token,
            "resumed": self.resumed,
            "params": shown_params(session.terms.params, session.terms.transition_s),
            "bypass": session.bypass,
        }


class SessionRegistry:
    """Open sessions by id. Use as an async context manager; on exit every session has ended."""

    def __init__(self, context: SessionContext) -> None:
        self._context = context
        self._sessions: dict[str, Session] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._classes: dict[str, str] = {}
        self._stays = Stays()
        self._tokens = ResumeBook(context.node)
        self._ladder = self._new_ladder(context.settings.steps)
        self._meter, self._cap = HostMeter(), FrameCap(context.settings)
        self._process = psutil.Process()
        # Whether sessions ended whose memory has not been given back yet.
        self._over = False
        # Of sessions that are over.
        self._due_before = 0
        # Frames of each session that the ladder has been told of: due, missed, lost.
        self._told: dict[str, tuple[int, int, int]] = {}
        self._watch_task: asyncio.Task[None] | None = None
        self._closing = self._draining = False
        self._drain_task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> SessionRegistry:
        self._watch_task = asyncio.create_task(self._watch(), name="registry/watch")
        return self

    async def __aexit__(self, *exc: object) -> None:
        self._closing = True
        assert self._watch_task is not None
        self._watch_task.cancel()
        self._stop_drain()
        if self._sessions:
            for session in self._sessions.values():
                session.announce_closing()
            await asyncio.sleep(GOODBYE_S)
        await self._end(list(self._tasks))
        await asyncio.wait([self._watch_task])

    @property
    def open_sessions(self) -> int:
        """Seats taken, counted from the offer on."""
        return len(self._tasks)

    @property
    def draining(self) -> bool:
        """Whether new sessions are refused, because the server is being emptied."""
        return self._draining

    @property
    def retry_after_s(self) -> float:
        """When a seat is expected to be free, seconds from now."""
        now = self._context.clock()
        return self._stays.retry_after_s(now - session.metrics.offered_at for session in self._sessions.values())

    @property
    def sessions(self) -> tuple[Session, ...]:
        """Every open session, the oldest first."""
        return tuple(self._sessions.values())

    @property
    def seats(self) -> int:
        """Sessions this server takes at the measured cost."""
        return seats(self._context.engine.capacity, self._context.settings, self._meter.host)

    @property
    def rung(self) -> Rung:
        """Where every session stands, or the first to come would: the ladder's, at no more than the process carries."""
        rung = self._ladder.rung
        return replace(rung, fps=min(rung.fps, self._cap.fps))

    @property
    def load(self) -> float:
        """Share of the engine's time that the open sessions need, by its measured costs, at the rate they have."""
        share = self.rung.fps / self._ladder.rung.fps
        return share * self._ladder.load(self._context.engine.capacity, self._wishes())

    def get(self, name: str) -> Session:
        """A session by its id, or by the id and its connection's number ("id.0"), as the page knows it.

        Raises: NotFound for a session that never was or is over, and for a connection that another has replaced: the
            late goodbye of a page that was reloaded must not end what the reloaded one has taken up.
        """
        session_id, _, leg = name.partition(".")
        session = self._sessions.get(session_id)
        if session is None or leg not in ("", str(session.leg)):
            raise NotFound("no such session: it has ended; send a new offer", code="session_gone")
        return session

    async def enter(self, connect: Connect, wish: Wish) -> Entry:
        """Open a session for a page, or have a page go on with the one that its token names; returns once it is open.

        A page that comes back needs no other seat than its own, and finds it on a server that is being emptied too.

        Raises: BadRequest for more steps than the model has timesteps for; else as `answer`.
        """
        if self._closing:
            raise _shutting_down()
        try:
            check_steps(wish.params, self._context.steps_max)
        except ControlError as error:
            raise BadRequest(f"params.{error}") from error
        params = StreamParams(steps=self._context.settings.steps)
        kept = Kept(params, 0.0, False)
        keeps = wish.resume is not None and wish.resume.keep
        if wish.resume is not None:
            session = self._sessions.get(self._tokens.session_of(wish.resume.token) or "")
            if session is not None and await self._rejoin(session, connect):
                if not keeps:
                    session.controls.take_over(wish.params, wish.bypass)
                self._context.metrics.resumed.labels("running").inc()
                return self._entry(session, resumed=True)
            found = self._tokens.take(wish.resume.token, self._context.clock())
            if found is not None:
                self._context.metrics.resumed.labels("ended").inc()
                kept = found
        resumed = kept.params is not params
        if not (resumed and keeps):
            kept = kept.changed(wish.params, wish.bypass)
        session = await self._open(
            connect,
            kept.params,
            transition_s=kept.transition_s,
            bypass=kept.bypass,
            own_class=wish.own_class,
            returning=resumed,
        )
        return self._entry(session, resumed=resumed)

    async def _rejoin(self, session: Session, connect: Connect) -> bool:
        """Whether the session went on over the new connection; False, if it ended meanwhile."""
        try:
            async with asyncio.timeout(ANSWER_TIMEOUT_S):
                await session.rejoin(connect)
        except NotFound:
            return False
        except TimeoutError:
            raise ServerError(f"the offer could not be answered within {ANSWER_TIMEOUT_S:.0f} s") from None
        return True

    def _entry(self, session: Session, *, resumed: bool) -> Entry:
        return Entry(session, f"{session.id}.{session.leg}", self._tokens.issue(session.id), resumed)

    async def answer(
        self,
        offer_sdp: str,
        params: StreamParams,
        *,
        transition_s: float = 0.0,
        bypass: bool = False,
        own_class: str = "",
        outlet: Outlet | None = None,
    ) -> Session:
        """Open a session for an offer; returns once it has its answer.

        own_class: for `ServerSettings.reserved_seats`.
        outlet: where the pictures go if not back to the peer.
        Raises: Full with a retry time, ShuttingDown, or what the session raises for a broken offer. The seat is
            given back on every failure.
        """
        connect = partial(answer_offer, offer_sdp, self._context.settings.media, publishes=outlet is not None)
        return await self._open(
            connect, params, transition_s=transition_s, bypass=bypass, own_class=own_class, outlet=outlet
        )

    async def _open(
        self,
        connect: Connect,
        params: StreamParams,
        *,
        transition_s: float,
        bypass: bool,
        own_class: str,
        outlet: Outlet | None = None,
        returning: bool = False,
    ) -> Session:
        """Open a session for a connection; returns once that is open. Its seat is taken from this call on.

        returning: it was here a moment ago.
        """
        if self._closing:
            raise _shutting_down()
        if self._draining and not returning:
            raise ShuttingDown(
                "this server is being emptied and takes no new sessions", code="draining", retry_after_s=RETRY_AFTER_S
            )
        self._admit(own_class)
        if not self._sessions:
            self._ladder = self._new_ladder(params.steps)
        session_id = new_session_id(self._context.node)
        session = Session(
            session_id,
            self._context,
            params,
            fps=self.rung.fps,
            transition_s=transition_s,
            bypass=bypass,
            outlet=outlet,
        )
        self._sessions[session_id] = session
        self._classes[session_id] = own_class
        task = asyncio.create_task(self._run(session, connect), name=f"{session_id}/session")
        self._tasks[session_id] = task
        self._context.metrics.sessions.set(len(self._tasks))
        self._sample()
        try:
            async with asyncio.timeout(ANSWER_TIMEOUT_S):
                await session.answered
        except TimeoutError:
            await self._end([session_id])
            raise ServerError(f"the offer could not be answered within {ANSWER_TIMEOUT_S:.0f} s") from None
        except asyncio.CancelledError:
            task.cancel()
            raise
        self._context.metrics.opened.inc()
        return session

    def _admit(self, own_class: str) -> None:
        """Raises Full unless there is a seat for one more of the class."""
        context, reserved = self._context, self._context.settings.reserved_seats
        all_seats, limit = bounds(context.engine.capacity, context.settings, self._meter.host)
        taken = Counter(self._classes.values())
        if free_seats(all_seats, taken, reserved, own_class) > 0:
            return
        left = all_seats - self.open_sessions
        message = f"all {all_seats} seats of this server are taken" if all_seats > 1 else "the one seat here is taken"
        message += f", and {LIMITS[limit]}"
        if left > 0:
            message = f"{left} of {all_seats} seats are free, and kept for {' or '.join(sorted(reserved))}"
        raise Full(
            message,
            retry_after_s=self.retry_after_s,
            details={"seats": all_seats, "open": self.open_sessions, "limit": limit},
        )

    async def close(self, name: str) -> None:
        """End a session; its peer, seat and threads are free when this returns. Raises NotFound."""
        await self._end([self.get(name).id])

    # --- emptying the server

    def start_drain(self, wait_s: float) -> None:
        """Begin `drain` in the background; one that runs gives way to it."""
        self._stop_drain()
        self._draining = True
        self._drain_task = asyncio.create_task(self.drain(wait_s), name="registry/drain")

    def undo_drain(self) -> None:
        """Take new sessions again; those that were moved are gone."""
        self._stop_drain()
        self._draining = self._closing = False
        log.info("drain: undone, new sessions are taken")

    async def drain(self, wait_s: float, hurry: asyncio.Event | None = None) -> None:
        """Empty the server: no new sessions, `wait_s` for those in place to end, then the rest are moved.

        A session is moved by being told to connect again at once, and ended: behind a gateway its page, with all that
        it had set, comes back on another server. Returns when none is left.

        hurry: once set, nothing is waited for any more.
        """
        self._draining = True
        log.info("drain: %d sessions, up to %.0f s for them to end", self.open_sessions, wait_s)
        for session in self.sessions:
            session.announce_draining(wait_s)
        until = self._context.clock() + wait_s
        while self._tasks and self._context.clock() < until and not (hurry and hurry.is_set()):
            await asyncio.wait(list(self._tasks.values()), timeout=SAMPLE_PERIOD_S)
        self._closing = True
        moved = self.sessions
        for session in moved:
            session.announce_closing(reconnect_after_s=0.0)
            self._context.metrics.moved.inc()
            await asyncio.sleep(max(GOODBYE_S, min(MOVE_PAUSE_S, MOVE_ALL_S / len(moved))))
        await self._end(list(self._tasks))
        log.info("drain: done, %d sessions were moved", len(moved))

    def _stop_drain(self) -> None:
        if self._drain_task is not None:
            self._drain_task.cancel()
            self._drain_task = None

    async def _end(self, session_ids: list[str]) -> None:
        tasks = [self._tasks[session_id] for session_id in session_ids if session_id in self._tasks]
        for task in tasks:
            task.cancel()
        if tasks:
            _, pending = await asyncio.wait(tasks, timeout=CLOSE_TIMEOUT_S)
            for task in pending:
                log.error("%s did not end within %.0f s", task.get_name(), CLOSE_TIMEOUT_S)

    async def _run(self, session: Session, connect: Connect) -> None:
        """Run one session behind the server's one wall: whatever it raises ends it and nothing else."""
        reason = "closed"
        try:
            reason = await session.run(connect)
        except asyncio.CancelledError:
            pass
        except ServerError as error:
            reason = error.code
            if not session.answered.done():
                session.answered.set_exception(error)
        except Exception:
            reason = "fault"
            self._context.metrics.faults.labels("session").inc()
            log.exception("session %s failed", session.id)
        finally:
            if not session.answered.done():
                session.answered.set_exception(ServerError("the session ended before it was answered"))
            self._forget(session, reason)

    def _forget(self, session: Session, reason: str) -> None:
        kept = Kept(session.terms.params, session.terms.transition_s, session.bypass)
        self._tokens.end(session.id, kept, self._context.clock())
        self._sessions.pop(session.id, None)
        self._tasks.pop(session.id, None)
        self._classes.pop(session.id, None)
        self._told.pop(session.id, None)
        self._due_before += session.metrics.due
        self._over = True
        self._stays.ended(self._context.clock() - session.metrics.offered_at)
        self._context.metrics.sessions.set(len(self._tasks))
        self._context.metrics.ended.labels(reason).inc()
        # Its figures stand in its own summary.
        log.info("session %s ended: %s", session.id, reason)

    # --- the ladder

    def _new_ladder(self, wish: int) -> Ladder:
        context = self._context
        now, capacity = context.clock(), context.engine.capacity
        return Ladder(context.settings, capacity, steps_max=context.steps_max, wish=wish, now=now)

    def _wishes(self) -> tuple[int, ...]:
        return tuple(session.terms.params.steps for session in self._sessions.values())

    def _sample(self) -> None:
        """Tell the ladder what has become of the frames, and have every session stand where it says."""
        now = self._context.clock()
        due, missed, lost = self._frames_since(now)
        for session in self._sessions.values():
            if session.peer is not None and session.peer.connected_at is not None:
                self._tokens.confirm(session.id)
        if not self._sessions:
            self._ladder = self._new_ladder(self._context.settings.steps)
            self._cap = FrameCap(self._context.settings)
            return
        if self._context.engine.status.state is not EngineState.READY:
            self._ladder.hold(now)
            return
        fps, host, sessions = self._cap.fps, self._meter.host, len(self._sessions)
        ours = 0
        if host.is_to_blame(self.rung.fps, sessions, self.load):
            ours, missed, lost = missed, 0, 0
        move = self._ladder.decide(now, Signals(self._context.engine.capacity, self._wishes(), due, missed, lost))
        capped = self._cap.decide(now, host, sessions, due=due, missed=ours) < self._ladder.rung.fps
        reason = self._cap.reason if capped or self._cap.fps != fps else self._ladder.reason
        rung = self.rung
        for session in self._sessions.values():
            if session.terms.rung != rung:
                session.controls.set_rung(rung, move.reason if move else reason)

    def _frames_since(self, now: float) -> tuple[int, int, int]:
        """Frames due, missed and lost in all sessions since the last call."""
        due = missed = lost = 0
        for session in self._sessions.values():
            metrics = session.metrics
            total = (metrics.due, metrics.engine_missed, metrics.engine_lost)
            told = self._told.get(session.id, (0, 0, 0))
            self._told[session.id] = total
            if metrics.ttff_s is not None or now - metrics.offered_at > STARTING_S:
                due += total[0] - told[0]
                missed += total[1] - told[1]
                lost += total[2] - told[2]
        return due, missed, lost

    def _measure(self, busy_share: float) -> None:
        """Learn what a frame costs this process."""
        times, now = self._process.cpu_times(), self._context.clock()
        period_s = TICK_SAMPLES * SAMPLE_PERIOD_S
        self._meter.sample(
            now,
            cpu_s=times.user + times.system,
            loop_s=busy_s(),
            frames=self._due_before + sum(session.metrics.due for session in self._sessions.values()),
            sessions=sum(now - session.metrics.released_at < period_s for session in self._sessions.values()),
            busy_share=busy_share,
            cores=psutil.cpu_count() or 1,
        )

    async def _watch(self) -> None:
        """Follow what the engine can do, and watch the event loop's lag."""
        lag_s, samples = 0.0, 0
        while True:
            before = self._context.clock()
            await asyncio.sleep(SAMPLE_PERIOD_S)
            lag_s = max(lag_s, self._context.clock() - before - SAMPLE_PERIOD_S)
            self._sample()
            metrics = self._context.metrics
            metrics.seats.set(self.seats)
            metrics.load.set(self.load)
            metrics.process_load.set(self._meter.host.load(self.rung.fps, len(self._sessions)))
            metrics.rungs_down.set(self._ladder.depth)
            samples += 1
            if samples % TICK_SAMPLES == 0:
                cpu_share = psutil.cpu_percent() / 100
                self._measure(cpu_share)
                metrics.on_tick(lag_s, self._context.engine.capacity.chunk_cost_s, cpu_share)
                lag_s = 0.0
            if samples % GIVE_BACK_SAMPLES == 0 and self._over:
                self._over = False
                await asyncio.get_running_loop().run_in_executor(None, give_back)


def _shutting_down() -> ShuttingDown:
    return ShuttingDown("the server is shutting down; try again in a moment", retry_after_s=RETRY_AFTER_S)
