"""What a server does around the engine, in a simulation: thins cameras to the agreed rate, shows pictures when they are
due, and moves all sessions on its ladder by what was missed.

The rules are not here: `server.plan_server` brings the server's own ladder and pacer.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from math import inf
from typing import Protocol

from engine.simulator_devices import Clock, Devices, Making
from engine.simulator_load import Camera, Chunk, Workload
from engine.simulator_outcome import Book

# As often as a server looks.
SAMPLE_PERIOD_S = 0.25
# A session that has shown nothing yet is still starting, for so long: its misses tell nothing.
STARTING_S = 5.0


class Rung(Protocol):
    """Where all sessions stand, see `server.ladder.Rung`."""

    @property
    def steps(self) -> int: ...  # noqa: D102
    @property
    def small(self) -> bool: ...  # noqa: D102
    @property
    def light(self) -> bool: ...  # noqa: D102
    @property
    def fps(self) -> float: ...  # noqa: D102
    @property
    def camera(self) -> bool: ...  # noqa: D102


class Playout(Protocol):
    """When a session's pictures are shown, see `server.pacer.Pacer`; a picture is its capture."""

    def set_rate(self, fps: float) -> None: ...  # noqa: D102
    def push(self, pictures: Sequence[float], captured_at: Sequence[float], now: float) -> list[float]: ...  # noqa: D102
    def due_at(self) -> float | None: ...  # noqa: D102
    def shed(self, now: float) -> list[float]: ...  # noqa: D102
    def pop(self, now: float) -> float: ...  # noqa: D102


class Server(Protocol):
    """The rules of a server."""

    @property
    def rung(self) -> Rung:
        """Where all sessions stand now."""
        ...

    def decide(self, now: float, sessions: int, due: int, missed: int, lost: int) -> None:
        """Move, if it is time. due, missed: frames of so many open sessions since the call before; lost: those of the
        missed that were never shown."""
        ...

    def playout(self, fps: float) -> Playout:
        """Of one session."""
        ...


class Served:
    """The sessions of a run, as a server treats them."""

    def __init__(
        self, server: Server, workload: Workload, clock: Clock, devices: Devices, book: Book, cameras: Sequence[Camera]
    ) -> None:
        self._server, self._workload, self._clock = server, workload, clock
        self._devices, self._book, self._cameras = devices, book, cameras
        self._rung = server.rung
        self._playouts = [server.playout(self._rung.fps) for _ in cameras]
        # When the next picture of a session is to be looked for.
        self._look_at = [inf] * len(cameras)
        self._open: list[int] = []
        self._started = [0.0] * len(cameras)
        self._missed, self._lost = [0] * len(cameras), [0] * len(cameras)
        self._told = [(0, 0, 0)] * len(cameras)
        # Chunks in the engine; those that were given up for the camera meanwhile are no longer in it.
        self._inside: set[tuple[int, int]] = set()
        self._stand()
        clock.at(SAMPLE_PERIOD_S, self._tick)

    def open(self, session: int, now: float) -> None:
        """A session comes, and has all of them look at their rung."""
        self._open.append(session)
        self._started[session] = now
        self._sample(now)

    def takes(self, chunk: Chunk) -> bool:
        """Whether a chunk goes to the engine; on the camera rung its frames are shown as they are."""
        if self._rung.camera:
            self._book.by_camera(chunk.session, chunk.captured)
            return False
        self._inside.add((chunk.session, chunk.index))
        return True

    def on_dropped(self, chunk: Chunk) -> None:
        """The engine gave a chunk up."""
        if (chunk.session, chunk.index) in self._inside:
            self._inside.remove((chunk.session, chunk.index))
            self._lose(chunk.session, len(chunk.captured))

    def on_done(self, chunk: Chunk, now: float) -> None:
        """The engine rendered a chunk: its pictures wait until they are due."""
        if (chunk.session, chunk.index) not in self._inside:
            return
        self._inside.remove((chunk.session, chunk.index))
        self._playouts[chunk.session].push(chunk.captured, chunk.captured, now)
        self._play(chunk.session, now)

    def _play(self, session: int, now: float) -> None:
        playout = self._playouts[session]
        while (due := playout.due_at()) is not None and due <= now:
            self._lose(session, len(playout.shed(now)))
            captured_at = playout.pop(now)
            self._book.shown(session, captured_at, now)
            self._missed[session] += now - captured_at > self._workload.budget_s
        self._look_at[session] = inf if due is None else due
        if due is not None:
            self._clock.at(due, partial(self._look, session))

    def _look(self, session: int, now: float) -> None:
        # What came meanwhile may have put it off or brought it on.
        if now == self._look_at[session]:
            self._play(session, now)

    def _lose(self, session: int, frames: int) -> None:
        self._missed[session] += frames
        self._lost[session] += frames

    def _tick(self, now: float) -> None:
        self._sample(now)
        if now < self._workload.seconds:
            self._clock.at(now + SAMPLE_PERIOD_S, self._tick)

    def _sample(self, now: float) -> None:
        due = missed = lost = 0
        for session in self._open:
            total = self._cameras[session].captured_by(now), self._missed[session], self._lost[session]
            told, self._told[session] = self._told[session], total
            if self._book.has_shown(session) or now - self._started[session] > STARTING_S:
                due += total[0] - told[0]
                missed += total[1] - told[1]
                lost += total[2] - told[2]
        self._server.decide(now, len(self._open), due, missed, lost)
        if self._server.rung != self._rung:
            self._stand()

    def _stand(self) -> None:
        """All sessions go over to the server's rung."""
        before, self._rung = self._rung, self._server.rung
        rung = self._rung
        if rung.camera and not before.camera:
            self._inside.clear()
        self._devices.change(Making(rung.steps, rung.small, rung.light))
        for camera, playout in zip(self._cameras, self._playouts, strict=True):
            camera.fps = min(rung.fps, self._workload.fps)
            if rung.fps != before.fps:
                playout.set_rate(camera.fps)
