"""When a picture is due. Pure: the clock is passed in.

The engine hands over four pictures at once; shown at once, a browser shows one of them. The pacer spreads a chunk over
the measured chunk period, so that chunks of four come out as an even stream. What waits when a chunk arrives is delay:
past one picture it plays faster, by up to 40 % (measured against a constant-delay buffer, which stops being even
when the engine is too slow: this form does not).
"""

from __future__ import annotations

from collections import deque
from typing import Generic, TypeVar

Picture = TypeVar("Picture")

MAX_CHUNKS = 2
SPEED_UP_PER_WAITING = 0.15
MAX_SPEED = 1.4
PERIOD_SMOOTHING = 0.1
# A pause in the stream (tab hidden, engine lost) says nothing about the period.
PERIOD_OUTLIER = 3.0


class Pacer(Generic[Picture]):
    """Release times of the pictures of one session, in the order they came."""

    def __init__(self, fps: float) -> None:
        self._interval_s = 1.0 / fps
        self._waiting: deque[Picture] = deque()
        self._speed = 1.0
        self._last_release = float("-inf")
        self._last_push = float("-inf")

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def interval_s(self) -> float:
        """Seconds between pictures at normal speed, as measured."""
        return self._interval_s

    def set_rate(self, fps: float) -> None:
        """A new agreed rate: start measuring from it."""
        self._interval_s = 1.0 / fps

    def push(self, pictures: list[Picture], now: float) -> list[Picture]:
        """Queue the pictures of one chunk; returns those dropped, oldest first, when MAX_CHUNKS wait already."""
        count = len(pictures)
        measured = (now - self._last_push) / count
        if measured < PERIOD_OUTLIER * self._interval_s:
            self._interval_s += PERIOD_SMOOTHING * (measured - self._interval_s)
        self._last_push = now
        behind = max(0, len(self._waiting) - 1)
        self._speed = min(MAX_SPEED, 1.0 + SPEED_UP_PER_WAITING * behind)
        self._waiting.extend(pictures)
        dropped = []
        while len(self._waiting) > MAX_CHUNKS * count and len(self._waiting) > count:
            dropped.append(self._waiting.popleft())
        return dropped

    def due_at(self) -> float | None:
        """When the next picture is due (it may be in the past: at once); None when nothing waits."""
        return self._last_release + self._interval_s / self._speed if self._waiting else None

    def pop(self, now: float) -> Picture:
        """Take the next picture, released at `now`. Raises IndexError when nothing waits."""
        due = self._last_release + self._interval_s / self._speed
        # A release a little late keeps its grid, or every late timer would lower the rate for good.
        self._last_release = due if now - due < self._interval_s / 2 else now
        return self._waiting.popleft()
