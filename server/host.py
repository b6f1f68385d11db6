"""What the video of the sessions takes of the machine's cores, beside the model, and how many frames that leaves. Pure.

Decoding, scaling, mattes and encoding run in the server process, and its event loop is one thread of it. So a session
can be too much for the machine while the engine has room. Measured are the process's CPU seconds and the seconds in
which its loop is busy, both a frame. Of the cores the process can count on what it has, what is idle, and never less
than half of all; of the loop there is one. It is busy too while it is kept from working, by want of a core or of
Python's lock: so it tells that the process can do no more where cores are idle.

A session costs something beside its frames: 30 pictures of its camera are received and decoded whatever rate it has
been agreed, there are reports and telemetry, and the encoder spends its bitrate at any rate. At 8 instead of 24 frames
a second it needs 0.6 of the CPU and not a third.

Where the process is the bottleneck all sessions get evenly fewer frames (`FrameCap`); steps and size, which are the
engine's matter, are kept. Missed frames are laid to whichever of the two is busier: a ladder that took the process's
for the engine's would give up picture after picture, down to the camera, and gain nothing. Admission counts with the
least rate that a session may be given.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from server.ladder import (
    CLEAN_S,
    MISSED_SHARE,
    MOVE_PERIOD_S,
    PROMISE_LOAD,
    RATES_FPS,
    RISE_LOAD,
    STAY_LOAD,
    Misses,
)
from server.settings import ServerSettings

# What a session costs beside its frames, in frames a second (measured with cameras of 30 fps: 8 to 22).
SESSION_FRAMES = 16.0
# Fewer frames in a sample tell what a connection costs, and not what a frame does.
MIN_FRAMES = 30
SMOOTHING = 0.3
# Whatever else runs here, so much of the cores is the server's: a fair share beside the engine.
OWN_SHARE = 0.5
# Of the loop's time, promised to sessions: beyond, waiting grows faster than they do (8 sessions: 0.56 busy, 10: 0.96).
LOOP_PROMISE = 0.6
# Under this load of its own the process makes nobody wait.
BLAME_LOAD = 0.5


@dataclass(frozen=True, slots=True)
class Host:
    """What a frame of one session costs this process. cpu_s: CPU seconds in all its threads; loop_s: seconds in which
    its event loop is busy; 0 while unknown. cores: that it can count on."""

    cpu_s: float = 0.0
    loop_s: float = 0.0
    cores: float = 1.0

    def load(self, fps: float, sessions: int) -> float:
        """Share of what there is that so many sessions of that rate need: of the cores or of the loop."""
        return sessions * (fps + SESSION_FRAMES) * max(self.cpu_s / self.cores, self.loop_s)

    def is_to_blame(self, fps: float, sessions: int, engine_load: float) -> bool:
        """Whether frames that so many sessions of that rate missed are this process's, and not the engine's."""
        return self.load(fps, sessions) > max(engine_load, BLAME_LOAD)

    def seats(self, settings: ServerSettings) -> int:
        """Sessions that can all have `min_fps`; at least one."""
        each = max(self.cpu_s / self.cores / PROMISE_LOAD, self.loop_s / LOOP_PROMISE)
        frames = settings.min_fps + SESSION_FRAMES
        return max(1, int(1 / (each * frames))) if each > 0 else settings.max_sessions


class HostMeter:
    """Learns `host` from counters that only rise. Pure: they are passed in."""

    def __init__(self) -> None:
        self.host = Host()
        self._before: tuple[float, float, float, int, int] | None = None

    def sample(
        self, now: float, *, cpu_s: float, loop_s: float, frames: int, sessions: int, busy_share: float, cores: int
    ) -> Host:
        """Take one sample, every few seconds.

        Args:
            now: monotonic seconds.
            cpu_s, loop_s: CPU time of the process, and time in which its loop was busy, so far.
            frames: of all sessions so far, at their agreed rates.
            sessions: that have pictures now.
            busy_share: of all cores of the machine, since the last sample.
            cores: of the machine.
        """
        before, self._before = self._before, (now, cpu_s, loop_s, frames, sessions)
        if before is None or now <= before[0]:
            return self.host
        seconds, fresh = now - before[0], frames - before[3]
        count = fresh + SESSION_FRAMES * seconds * (before[4] + sessions) / 2
        used = (cpu_s - before[1]) / seconds
        available = max(OWN_SHARE * cores, used + (1 - busy_share) * cores)
        host = self.host
        if fresh >= MIN_FRAMES:
            known = host.cpu_s > 0
            host = Host(
                _smooth(host.cpu_s, (cpu_s - before[1]) / count, known=known),
                _smooth(host.loop_s, (loop_s - before[2]) / count, known=known),
                _smooth(host.cores, available, known=known),
            )
        self.host = host
        return host


class FrameCap:
    """The rate that every session may have at most, for the process's sake. Pure: instants are passed in.

    Down at once, to the highest rate that keeps PROMISE_LOAD, or, where frames are missed for the process's sake at a
    load that should do, to the next lower one; up after CLEAN_S without either in which there was room for it.
    """

    def __init__(self, settings: ServerSettings) -> None:
        full = settings.max_fps
        self._rates: Sequence[float] = (full, *(fps for fps in RATES_FPS if settings.min_fps <= fps < full))
        self.fps = self._rates[0]
        self.reason = ""
        self._moved_at = float("-inf")
        self._room_since: float | None = None
        self._misses = Misses()

    def decide(self, now: float, host: Host, sessions: int, *, due: int = 0, missed: int = 0) -> float:
        """The rate from now on. due, missed: frames since the last call, those missed for the process's sake."""
        load = host.load(self.fps, sessions)
        missed_share, goes_on = self._misses.note(now, due, missed)
        misses = goes_on and missed_share > MISSED_SHARE
        higher = [fps for fps in self._rates if fps > self.fps and host.load(fps, sessions) <= RISE_LOAD]
        has_room = higher and not misses
        self._room_since = (now if self._room_since is None else self._room_since) if has_room else None
        if now - self._moved_at < MOVE_PERIOD_S:
            return self.fps
        if load > STAY_LOAD:
            lower = [fps for fps in self._rates if fps < self.fps]
            fitting = [fps for fps in lower if host.load(fps, sessions) <= PROMISE_LOAD]
            if lower:
                self._move(now, fitting[0] if fitting else lower[-1], _too_busy(load, sessions))
        elif misses:
            if lower := [fps for fps in self._rates if fps < self.fps]:
                self._move(now, lower[0], f"{missed_share:.0%} of the frames of the last second came too late here")
        elif self._room_since is not None and now - self._room_since >= CLEAN_S:
            self._move(now, higher[0], f"this machine has had room for {CLEAN_S:.0f} s")
        return self.fps

    def _move(self, now: float, fps: float, reason: str) -> None:
        self.fps, self.reason, self._moved_at, self._room_since = fps, reason, now, None
        self._misses.clear()


def _too_busy(load: float, sessions: int) -> str:
    whose = "one session" if sessions == 1 else f"{sessions} sessions"
    return f"the video of {whose} needs {load:.0%} of what this machine has for it"


def _smooth(old: float, new: float, *, known: bool) -> float:
    return old + SMOOTHING * (new - old) if known else new
