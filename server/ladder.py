"""What every session has to give up when the engine is too slow for all wishes, and when it gets it back.

The engine's time is one thing that all sessions share, so there is one ladder a server: all sessions stand on the same
rung, each with its own wished steps below it. Its rungs, from the wish down:

    the wish -> fewer steps -> the light VAE -> the smaller size, where there are these -> evenly fewer frames
        -> the camera

It is a pure policy: `decide` is given the instant, the engine's measured costs and the frames that were missed since
the last call, and answers with a move or with none. n sessions at f frames a second need n * f / T * cost of each
second; a frame comes back (T - 1) / f after its capture, until its chunk is full, and then the cost of a chunk of every
session later, for all of them may be full in the same instant. A rung is good when both numbers are: under
PROMISE_LOAD, and within the latency budget.

- Down: at once when more is needed than there is, or when over MISSED_SHARE of the frames of the last second were
  missed. The move goes straight to the first good rung, so that an engine four times slower is answered by one move.
  Chunks that were late once are no reason: misses must go on for two samples.
- Up: after CLEAN_S without either and with room for more, to the highest rung that is good with room to spare. A way
  up that is taken back within RELAPSE_S doubles the wait for the next one: an engine at its edge moves the picture
  seldom.
- The camera is the last rung, for when there is no painting to be seen: at once when the engine could not render half
  of any other's frames; else when, for LAST_S, over half of them were not shown, or no rung would show three in four
  in time. Late is no reason, for a painting a little late is more than none; nor is a second in which the machine did
  something else, for the camera stays for CLEAN_S. It is left after the same wait, for only trying tells whether the
  engine is better.
- One move in MOVE_PERIOD_S.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace

from engine.api import Capacity
from server.settings import ServerSettings

# Rates there are, and nothing between: a rate that creeps is a picture that stutters.
RATES_FPS = (60.0, 30.0, 24.0, 20.0, 15.0, 12.0, 10.0, 8.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0)
# Share of the engine's time that may be needed: to stay, to move down to or admit somebody to, and to move up to.
STAY_LOAD = 0.95
PROMISE_LOAD = 0.85
RISE_LOAD = 0.80
# At more than this not half of a rung's frames can be rendered.
HOPELESS_LOAD = 2.0
MISSED_SHARE = 0.05
LOST_SHARE = 0.5
# Fewer frames than this in a second are too few to tell a share.
MIN_DUE = 4
WINDOW_S = 1.0
LAST_S = 3.0
MOVE_PERIOD_S = 3.0
CLEAN_S = 10.0
MAX_CLEAN_S = 160.0
RELAPSE_S = 30.0
# Of the way beside the engine: decoding, scaling, the pacer.
MARGIN_S = 0.05
# Beyond, a picture is not shown while a newer one waits (server/pacer.py); of a chunk this part may be, and no more.
TOLERANCE_S = 0.1
LOST_PART = 0.25
# A rung that needs not even this much less is no help.
REAL_GAIN = 0.02


@dataclass(frozen=True, slots=True)
class Rung:
    """What a session may have at most. light: by the light VAE. camera: no restyling, the plain camera is shown."""

    steps: int
    small: bool
    fps: float
    camera: bool = False
    light: bool = False


@dataclass(frozen=True, slots=True)
class Move:
    """From one rung to another. reason: in plain words, the end of a sentence."""

    origin: Rung
    target: Rung
    reason: str


@dataclass(frozen=True, slots=True)
class Signals:
    """What `Ladder.decide` is told.

    capacity: the engine's measured costs. wishes: wished steps, of each session. due: frames due since the last call;
    missed: those that were shown past the budget since, or never; lost: those never, of them.
    """

    capacity: Capacity
    wishes: tuple[int, ...]
    due: int = 0
    missed: int = 0
    lost: int = 0


def rungs(settings: ServerSettings, *, steps_max: int, has_small: bool, has_light: bool = False) -> list[Rung]:
    """The ladder, from the wish (any number of steps up to `steps_max`) down to the camera."""
    full_fps = settings.max_fps
    ladder = [Rung(steps, small=False, fps=full_fps) for steps in range(steps_max, 0, -1)]
    if has_light:
        ladder.append(Rung(1, small=False, fps=full_fps, light=True))
    if has_small:
        ladder.append(Rung(1, small=True, fps=full_fps, light=has_light))
    fewer_fps = [fps for fps in RATES_FPS if settings.min_fps <= fps < full_fps]
    ladder += [Rung(1, has_small, fps, light=has_light) for fps in fewer_fps]
    return [*ladder, Rung(1, has_small, full_fps, camera=True, light=has_light)]


@dataclass(frozen=True, slots=True)
class Demand:
    """What sessions that wish so many steps each need of an engine, rung by rung."""

    capacity: Capacity
    wishes: tuple[int, ...]
    settings: ServerSettings

    def chunks_s(self, rung: Rung) -> float:
        """Seconds of the engine for one chunk of every session; of several groups, of the fullest."""
        costs = (
            self.capacity.mean_s(min(wish, rung.steps), small=rung.small, light=rung.light) for wish in self.wishes
        )
        share = math.ceil(len(self.wishes) / self.capacity.groups) / max(1, len(self.wishes))
        return 0.0 if rung.camera else share * sum(costs)

    def load(self, rung: Rung) -> float:
        """Share of the engine's time."""
        return self.chunks_s(rung) * rung.fps / self.capacity.chunk_frames

    def latency_s(self, rung: Rung) -> float:
        """Age of a frame when it can be shown."""
        if rung.camera:
            return 0.0
        frames = self.capacity.chunk_frames
        # A stream batch gives a chunk back with its last step: as many chunks later as there are steps more.
        held = max((min(wish, rung.steps) for wish in self.wishes), default=1) - 1
        batch = self.settings.engine.mode == "batch"
        fill_s = (frames - 1 + (held * frames if batch else 0)) / rung.fps
        return fill_s + self.chunks_s(rung) + self.capacity.transit_s + MARGIN_S

    def is_good(self, rung: Rung, load: float) -> bool:
        """Whether the rung needs at most `load` of the engine and keeps the latency budget."""
        return self.load(rung) <= load and self.latency_s(rung) <= self.settings.latency_budget_s

    def first_good(self, ladder: Sequence[Rung], load: float) -> Rung | None:
        """The highest good rung of (a part of) the ladder with restyling."""
        return next((rung for rung in ladder if not rung.camera and self.is_good(rung, load)), None)

    def least_bad(self, ladder: Sequence[Rung]) -> Rung | None:
        """Where no rung is good: the quickest of those the engine can follow, or else the lowest; None without any."""
        restyled = [rung for rung in ladder if not rung.camera]
        followed = [rung for rung in restyled if self.load(rung) <= STAY_LOAD]
        return min(followed, key=self.latency_s) if followed else restyled[-1] if restyled else None

    def is_hopeless(self, rung: Rung) -> bool:
        """Whether most frames of the rung could not be rendered."""
        return self.load(rung) > HOPELESS_LOAD

    def is_too_late(self, rung: Rung) -> bool:
        """Whether more than LOST_PART of each chunk would come too late to be shown, were its session alone."""
        others_s = self.chunks_s(rung) * (1 - 1 / max(1, len(self.wishes)))
        alone_s = self.latency_s(rung) - MARGIN_S - others_s
        shown_s = alone_s - LOST_PART * self.capacity.chunk_frames / rung.fps
        return shown_s > self.settings.latency_budget_s + TOLERANCE_S

    def leaves(self, rung: Rung) -> tuple[object, ...]:
        """What the rung leaves of the wishes: equal for rungs that only deny steps that nobody wishes."""
        return tuple(min(wish, rung.steps) for wish in self.wishes), rung.small, rung.light, rung.fps, rung.camera

    def in_words(self, rung: Rung) -> str:
        """What the rung needs and what there is, the end of a sentence."""
        whose = "" if len(self.wishes) < 2 else f" for each of {len(self.wishes)} sessions"
        there_s = self.capacity.chunk_frames / rung.fps
        return f"the engine needs {self.chunks_s(rung) * 1e3:.0f} ms a chunk{whose}, {there_s * 1e3:.0f} ms are there"


class Misses:
    """The missed share of the frames of the last second, or of a longer time. Pure: instants are passed in."""

    def __init__(self, window_s: float = WINDOW_S) -> None:
        self._window_s = window_s
        self._samples: deque[tuple[float, int, int]] = deque()

    def note(self, now: float, due: int, missed: int) -> tuple[float, bool]:
        """Take in what was due and missed since the last call; returns the share, and whether more than one sample has
        a part in it."""
        self._samples.append((now, due, missed))
        while self._samples[0][0] <= now - self._window_s:
            self._samples.popleft()
        all_due = sum(sample[1] for sample in self._samples)
        all_missed = sum(sample[2] for sample in self._samples)
        goes_on = sum(sample[2] > 0 for sample in self._samples) > 1
        return (min(1.0, all_missed / all_due) if all_due >= MIN_DUE else 0.0), goes_on

    def clear(self) -> None:
        """Forget what was."""
        self._samples.clear()


class Ladder:
    """The rung that all sessions of a server stand on. Pure: instants are passed in.

    Begins on the best rung for one session that wishes `wish` steps, which is no move that anyone sees.
    """

    def __init__(self, settings: ServerSettings, capacity: Capacity, *, steps_max: int, wish: int, now: float) -> None:
        self._settings = settings
        self._steps_max = steps_max
        self._wishes: tuple[int, ...] = (wish,)
        self._misses, self._losses = Misses(), Misses(LAST_S)
        self._too_late_since: float | None = None
        self._overloaded = 0
        self._clean_since, self._clean_s = now, CLEAN_S
        self._moved_at = self._rose_at = float("-inf")
        demand = Demand(capacity, self._wishes, settings)
        ladder = self._rungs(capacity)
        self._rung = demand.first_good(ladder, PROMISE_LOAD) or demand.least_bad(ladder) or ladder[0]
        self._depth = ladder.index(self._rung)
        self._reason = demand.in_words(ladder[0])

    @property
    def rung(self) -> Rung:
        """Where all sessions stand."""
        return self._rung

    @property
    def depth(self) -> int:
        """How many rungs that is below the wish."""
        return self._depth

    @property
    def reason(self) -> str:
        """Why they stand no higher, for one who comes now: of the last move down."""
        return self._reason

    def load(self, capacity: Capacity, wishes: tuple[int, ...]) -> float:
        """Share of the engine's time that the sessions need where they stand."""
        return Demand(capacity, wishes, self._settings).load(self._rung)

    def hold(self, now: float) -> None:
        """The engine does not render (it loads, or was lost): what is missed meanwhile tells nothing."""
        self._misses.clear()
        self._losses.clear()
        self._too_late_since = None
        self._overloaded = 0
        self._clean_since = now

    def decide(self, now: float, signals: Signals) -> Move | None:
        """The move to make now, which is made when this returns; None to stay.

        now: seconds, never less than at the call before.
        """
        demand = Demand(signals.capacity, signals.wishes, self._settings)
        ladder = self._rungs(signals.capacity)
        at = self._find(ladder, demand)
        missed, goes_on = self._misses.note(now, signals.due, signals.missed)
        lost, _ = self._losses.note(now, signals.due, signals.lost)
        best = demand.least_bad(ladder)
        if best is None or not demand.is_too_late(best):
            self._too_late_since = None
        elif self._too_late_since is None:
            self._too_late_since = now
        self._overloaded = self._overloaded + 1 if demand.load(self._rung) > STAY_LOAD else 0
        higher = self._higher(ladder, at, demand)
        if self._overloaded or missed > MISSED_SHARE or higher is None:
            self._clean_since = now
        # One sample may be noise; a newcomer or a new wish is none.
        overloaded = self._overloaded > 1 or (self._overloaded == 1 and signals.wishes != self._wishes)
        self._wishes = signals.wishes
        if now - self._moved_at < MOVE_PERIOD_S:
            return None
        if overloaded or (missed > MISSED_SHARE and goes_on):
            return self._down(now, ladder, at, demand, missed, lost)
        if higher is not None and now - self._clean_since >= self._clean_s:
            reason = "trying again" if self._rung.camera else f"the engine has had room for {self._clean_s:.0f} s"
            self._rose_at = now
            return self._move(now, ladder, higher, reason)
        return None

    def _rungs(self, capacity: Capacity) -> list[Rung]:
        return rungs(
            self._settings, steps_max=self._steps_max, has_small=capacity.has_small, has_light=capacity.has_light
        )

    def _find(self, ladder: list[Rung], demand: Demand) -> int:
        """Where we stand: the engine may have got or lost its smaller size or its light VAE, and who wished many steps
        may have left."""
        if self._rung not in ladder:
            capacity = demand.capacity
            self._rung = replace(self._rung, steps=1, small=capacity.has_small, light=capacity.has_light)
        at = ladder.index(self._rung)
        while at > 0 and demand.leaves(ladder[at - 1]) == demand.leaves(self._rung):
            at -= 1
        self._rung, self._depth = ladder[at], at
        return at

    def _down(self, now: float, ladder: list[Rung], at: int, demand: Demand, missed: float, lost: float) -> Move | None:
        reason = demand.in_words(self._rung)
        if demand.load(self._rung) <= STAY_LOAD:
            reason = f"{missed:.0%} of the frames of the last second came too late"
        too_late = self._too_late_since is not None and now - self._too_late_since >= LAST_S
        target = self._lower(ladder, at, demand, gives_up=too_late or lost > LOST_SHARE)
        if target is None:
            return None
        if target.camera:
            if lost > LOST_SHARE:
                reason = f"{lost:.0%} of the frames of the last {LAST_S:.0f} s came far too late"
            reason += ", and no other setting would be in time"
        self._clean_s = min(2 * self._clean_s, MAX_CLEAN_S) if now - self._rose_at < RELAPSE_S else CLEAN_S
        self._reason = reason
        return self._move(now, ladder, target, reason)

    def _lower(self, ladder: list[Rung], at: int, demand: Demand, *, gives_up: bool) -> Rung | None:
        here, camera = self._rung, ladder[-1]
        if here.camera:
            return None
        below = [rung for rung in ladder[at + 1 : -1] if demand.load(rung) < (1 - REAL_GAIN) * demand.load(here)]
        if good := demand.first_good(below, PROMISE_LOAD):
            return good
        if demand.load(here) <= STAY_LOAD:
            # It is the latency then, and at fewer frames a chunk fills more slowly.
            below = [rung for rung in below if demand.latency_s(rung) < demand.latency_s(here)]
        target = demand.least_bad(below)
        if demand.is_hopeless(target or here):
            return camera
        return target or (camera if gives_up else None)

    def _higher(self, ladder: list[Rung], at: int, demand: Demand) -> Rung | None:
        good = demand.first_good(ladder[:at], RISE_LOAD)
        # Of what the engine could do now, the camera tells nothing: it has to be tried.
        return demand.least_bad(ladder) if good is None and self._rung.camera else good

    def _move(self, now: float, ladder: list[Rung], target: Rung, reason: str) -> Move:
        move = Move(self._rung, target, reason)
        self._rung, self._depth, self._moved_at = target, ladder.index(target), now
        self.hold(now)
        return move
