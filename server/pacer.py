"""When a picture is due. Pure: the clock is passed in.

The engine hands over four pictures at once; shown at once, a browser shows one of them. The pacer releases them on an
even grid: the measured period apart, and a delay after their capture. The delay is a quantile of the latencies of the
last chunks, so that most chunks are there before their first picture is due. Pictures ahead of or behind the delay find
it a little with each interval. A picture never waits past its deadline as long as its whole chunk can be in time; where
the engine is too slow for that, the period stretches and the picture stays even. What is past its deadline by more than
TOLERANCE_S is not shown while a newer picture waits: latency ends there, however slow the engine has become. Between
the two a picture is late and shown. Where most chunks are, the delay is taken from all of them, so that they come late
but evenly (chunks 0.50 to 0.58 s old, budget 0.5: interval P99 81 ms instead of 117).

Beside it stood a form without a delay, which spread a chunk over its measured period and played faster while more
than one picture waited. Simulated over 60 s each (30 fps camera, 24 agreed, budget 0.5 s, ms). "Busy": 15 of 100
releases come 10 to 60 ms after they are due, as on a machine whose cores the engine keeps busy too.

    engine, ms a chunk          interval P99   jitter P99    mean age    late of 1441
                                without with  without with  without with  without with
    60, always                    51     45     20     6     185   196       0     0
    100, +-30 %                   54     49     23    17     249   251       0     0
    130, +-30 %                   58     52     27    20     286   287       0     0
    80, lognormal, sigma 0.35     78     78     45    47     252   253       0     0
    200 (more than there is)      71     85     34    46     426   421     110    44
    80, then 320                 133    173     90   141     576   570     496   488
    80, a stall of 1 s in 6 s     75     51    922   885     255   292      48    48
    60, always; busy              95     96     59    61     300   231       0     0
    100, +-30 %; busy             94     95     59    66     327   278       0     0
    200; busy                    105    102     61    65     543   448     864   200

So a late release does not stay delay for good, and what can be carried is evener at the same age (11 ms more where
nothing but the thinning of the camera is uneven). Beyond what can be carried more frames are in time, for a less even
picture until the ladder has lowered the rate; after stalls more delay is kept for some seconds.
"""

from __future__ import annotations

import bisect
import math
from collections import deque
from collections.abc import Sequence
from typing import Generic, TypeVar

Picture = TypeVar("Picture")

MAX_CHUNKS = 3
# Pictures that may wait when they come one by one: the camera's, right after the engine's last chunks.
MIN_ROOM = 12
# The delay is this quantile of the latencies of the last chunks: of those within the budget, where they are the more.
LATENCY_SHARE = 0.85
LATENCY_CHUNKS = 32
# One dropped chunk is no slower engine, a row of them is: a period counts as MAX_PERIOD times the median at most.
PERIODS = 3
MAX_PERIOD = 1.3
PERIOD_SMOOTHING = 0.1
PHASE_SMOOTHING = 0.1
# Share of the distance to the delay that one interval makes good, and how far an interval may be cut or stretched.
CATCH_UP = 0.25
MAX_CUT = 0.4
MAX_STRETCH = 0.15
# Pictures that would miss their deadline are hurried, but not closer together than this share of an interval.
MIN_SPACING = 0.85
# A release comes a little after it is due: the timer's lateness, and the time to hand the picture over.
DEADLINE_MARGIN_S = 0.015
TOLERANCE_S = 0.1
# After a gap of so many intervals (tab hidden, chunks dropped) the picture starts at its delay, not on the old grid.
RESTART_INTERVALS = 5.0


class Pacer(Generic[Picture]):
    """Release times of the pictures of one session, in the order they came.

    fps: agreed rate. budget_s: a picture released this long after its capture is still in time.
    """

    def __init__(self, fps: float, budget_s: float) -> None:
        self._interval_s = 1.0 / fps
        self._budget_s = budget_s
        # Picture, its capture, its place on the even grid of captures, and the latest release in time; inf where there
        # is none.
        self._waiting: deque[tuple[Picture, float, float, float]] = deque()
        self._latencies_s: deque[float] = deque(maxlen=LATENCY_CHUNKS)
        self._periods_s: deque[float] = deque(maxlen=PERIODS)
        self._delay_s = 0.0
        self._count = self._backlog = 0
        self._last_captured = self._grid_at = float("-inf")
        self._last_release = float("-inf")

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def interval_s(self) -> float:
        """Seconds between pictures, as measured: the agreed rate's, or more where the engine is slower."""
        return self._interval_s

    @property
    def delay_s(self) -> float:
        """From a picture's capture to its release, as long as its deadline is not sooner."""
        return self._delay_s

    def set_rate(self, fps: float) -> None:
        """A new agreed rate: start measuring from it."""
        self._interval_s = 1.0 / fps
        self._periods_s.clear()
        self._latencies_s.clear()

    def push(self, pictures: Sequence[Picture], captured_at: Sequence[float], now: float) -> list[Picture]:
        """Queue the pictures of one chunk; returns those dropped, oldest first, when MAX_CHUNKS wait already."""
        self._backlog = len(self._waiting)
        self._measure_period(captured_at)
        grid = [self._on_grid(captured) for captured in captured_at]
        self._measure_latency(now - grid[0], len(grid))
        for picture, captured, place in zip(pictures, captured_at, grid, strict=True):
            latest = captured + self._budget_s - DEADLINE_MARGIN_S
            self._waiting.append((picture, captured, place, latest if latest >= now else math.inf))
        dropped = []
        while len(self._waiting) > max(MIN_ROOM, MAX_CHUNKS * len(pictures)):
            dropped.append(self._waiting.popleft()[0])
        return dropped

    def due_at(self) -> float | None:
        """When the next picture is due (it may be in the past: at once); None when nothing waits."""
        if not self._waiting:
            return None
        interval_s = self._interval_s
        target = self._waiting[0][2] + self._delay_s
        even = self._last_release + interval_s
        if even < target - RESTART_INTERVALS * interval_s:
            even = target
        else:
            # What waited when the last chunk came is delay that can go; where nothing did, haste ends in a gap.
            most = MAX_CUT if self._backlog else 0.0
            change = min(most * interval_s, max(-MAX_STRETCH * interval_s, CATCH_UP * (even - target)))
            even -= change
        return min(even, max(self._latest_in_time(), self._last_release + MIN_SPACING * interval_s))

    def _latest_in_time(self) -> float:
        """When the next picture must go for every waiting one to be in time; inf once one of them cannot be."""
        spacing_s = MIN_SPACING * self._interval_s
        if any(latest == math.inf for *_, latest in self._waiting):
            return math.inf
        return min(latest - place * spacing_s for place, (*_, latest) in enumerate(self._waiting))

    def shed(self, now: float) -> list[Picture]:
        """Give up pictures that are over TOLERANCE_S past the budget, while a newer one waits; oldest first."""
        oldest = now - self._budget_s - TOLERANCE_S
        shed = []
        while len(self._waiting) > 1 and self._waiting[0][1] < oldest:
            shed.append(self._waiting.popleft()[0])
        return shed

    def pop(self, now: float) -> Picture:
        """Take the next picture, released at `now`. Raises IndexError when nothing waits."""
        due = self.due_at()
        # A release a little late keeps its grid, or every late timer would lower the rate for good.
        self._last_release = due if due is not None and now - due < self._interval_s / 2 else now
        return self._waiting.popleft()[0]

    def _measure_period(self, captured_at: Sequence[float]) -> None:
        self._periods_s.append((captured_at[-1] - self._last_captured) / len(captured_at))
        self._last_captured = captured_at[-1]
        usual_s = sorted(self._periods_s)[PERIODS // 2] if len(self._periods_s) == PERIODS else math.inf
        if math.isfinite(usual_s):
            period_s = min(self._periods_s[-1], MAX_PERIOD * usual_s)
            self._interval_s += PERIOD_SMOOTHING * (period_s - self._interval_s)

    def _on_grid(self, captured: float) -> float:
        """Captures on an even grid: 30 thinned to 24 a second are 33 or 67 ms apart, and dropped chunks leave more."""
        grid_at = self._grid_at + self._interval_s
        if abs(captured - grid_at) > RESTART_INTERVALS * self._interval_s:
            grid_at = captured
        self._grid_at = grid_at + PHASE_SMOOTHING * (captured - grid_at)
        return self._grid_at

    def _measure_latency(self, latency_s: float, count: int) -> None:
        if count != self._count:  # filling another number of pictures takes another time
            self._latencies_s.clear()
        self._count = count
        if latency_s <= self._budget_s + TOLERANCE_S:
            self._latencies_s.append(latency_s)
        ordered = sorted(self._latencies_s)
        in_time = bisect.bisect_right(ordered, self._budget_s)
        # A chunk late once is hurried after and no delay kept for it; where most are, there is nothing to hurry for.
        if 2 * in_time >= len(ordered):
            ordered = ordered[:in_time]
        if ordered:
            self._delay_s = ordered[math.ceil(LATENCY_SHARE * len(ordered)) - 1]
