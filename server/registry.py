"""Every session of this server: who is let in, at which rate, isolated from each other, and all of them ended."""

from __future__ import annotations

import asyncio
import logging
import secrets

import psutil

from engine.api import StreamParams
from server.admission import agreed_fps, seats
from server.errors import Full, NotFound, ServerError, ShuttingDown
from server.session import Session, SessionContext

log = logging.getLogger(__name__)

ANSWER_TIMEOUT_S = 5.0
CLOSE_TIMEOUT_S = 5.0
# For the last notice to leave before its channel is closed.
GOODBYE_S = 0.1
RETRY_AFTER_S = 5.0
RATE_PERIOD_S = 2.0
# A higher rate must have been affordable this long before a session is moved up to it.
RISE_AFTER_S = 10.0


class SessionRegistry:
    """Open sessions by id. Use as an async context manager; on exit every session has ended."""

    def __init__(self, context: SessionContext) -> None:
        self._context = context
        self._sessions: dict[str, Session] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._rate_task: asyncio.Task[None] | None = None
        self._fps: float | None = None
        self._rise_since: float | None = None
        self._closing = False

    async def __aenter__(self) -> SessionRegistry:
        self._rate_task = asyncio.create_task(self._keep_rates(), name="registry/rates")
        return self

    async def __aexit__(self, *exc: object) -> None:
        self._closing = True
        assert self._rate_task is not None
        self._rate_task.cancel()
        if self._sessions:
            for session in self._sessions.values():
                session.announce_closing()
            await asyncio.sleep(GOODBYE_S)
        await self._end(list(self._tasks))
        await asyncio.wait([self._rate_task])

    @property
    def open_sessions(self) -> int:
        """Seats taken, counted from the offer on."""
        return len(self._tasks)

    @property
    def seats(self) -> int:
        """Sessions this server takes at the measured cost."""
        return seats(self._context.engine.capacity, self._context.settings)

    @property
    def fps(self) -> float:
        """The rate each session is agreed now."""
        if self._fps is None:
            self._fps = self._affordable_fps(1)
        return self._fps

    def get(self, session_id: str) -> Session:
        """Raises NotFound for a session that never was or is over."""
        session = self._sessions.get(session_id)
        if session is None:
            raise NotFound("no such session: it has ended; send a new offer", code="session_gone")
        return session

    async def answer(
        self, offer_sdp: str, params: StreamParams, *, transition_s: float = 0.0, bypass: bool = False
    ) -> Session:
        """Open a session for an offer; returns once it has its answer.

        Raises: Full with a retry time, ShuttingDown, or what the session raises for a broken offer. The seat is
            given back on every failure.
        """
        if self._closing:
            raise ShuttingDown("the server is shutting down; try again in a moment", retry_after_s=RETRY_AFTER_S)
        if self.open_sessions >= self.seats:
            raise Full(f"all {self.seats} seats of this server are taken", retry_after_s=RETRY_AFTER_S)
        session_id = secrets.token_urlsafe(16)
        session = Session(
            session_id,
            self._context,
            params,
            fps=self._affordable_fps(len(self._tasks) + 1),
            transition_s=transition_s,
            bypass=bypass,
        )
        self._sessions[session_id] = session
        task = asyncio.create_task(self._run(session, offer_sdp), name=f"{session_id}/session")
        self._tasks[session_id] = task
        self._context.metrics.sessions.set(len(self._tasks))
        self._set_rates()
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

    async def close(self, session_id: str) -> None:
        """End a session; its peer, seat and threads are free when this returns. Raises NotFound."""
        self.get(session_id)
        await self._end([session_id])

    async def _end(self, session_ids: list[str]) -> None:
        tasks = [self._tasks[session_id] for session_id in session_ids if session_id in self._tasks]
        for task in tasks:
            task.cancel()
        if tasks:
            _, pending = await asyncio.wait(tasks, timeout=CLOSE_TIMEOUT_S)
            for task in pending:
                log.error("%s did not end within %.0f s", task.get_name(), CLOSE_TIMEOUT_S)

    async def _run(self, session: Session, offer_sdp: str) -> None:
        """Run one session behind the server's one wall: whatever it raises ends it and nothing else."""
        reason = "closed"
        try:
            reason = await session.run(offer_sdp)
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
        self._sessions.pop(session.id, None)
        self._tasks.pop(session.id, None)
        self._context.metrics.sessions.set(len(self._tasks))
        self._context.metrics.ended.labels(reason).inc()
        metrics = session.metrics
        ttff_s = "none" if metrics.ttff_s is None else f"{metrics.ttff_s:.3f}"
        log.info(
            "session %s ended: %s; %d frames due, %d late, dropped %s, ttff %s s",
            *(session.id, reason, metrics.due, metrics.late, dict(metrics.dropped), ttff_s),
        )
        if not self._closing:
            self._set_rates()

    # --- rates

    def _affordable_fps(self, sessions: int) -> float:
        return agreed_fps(self._context.engine.capacity, sessions, self._context.settings, self._fps)

    def _set_rates(self) -> None:
        """Agree the rate that all open sessions can have; upwards only after it has been affordable for a while."""
        now = self._context.clock()
        fps = self._affordable_fps(max(1, len(self._tasks)))
        rises = self._fps is not None and fps > self._fps
        if rises:
            self._rise_since = self._rise_since if self._rise_since is not None else now
            if now - self._rise_since < RISE_AFTER_S:
                return
        self._rise_since = None
        self._fps = fps
        for session in self._sessions.values():
            session.set_rate(fps)

    async def _keep_rates(self) -> None:
        """Follow the measured cost, and watch the event loop's lag."""
        while True:
            before = self._context.clock()
            await asyncio.sleep(RATE_PERIOD_S)
            lag = self._context.clock() - before - RATE_PERIOD_S
            cpu_share = psutil.cpu_percent() / 100
            self._context.metrics.on_tick(lag, self._context.engine.capacity.chunk_cost_s, cpu_share)
            self._set_rates()
