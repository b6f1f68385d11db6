"""Where every due frame is, by its index, and figures kept over a whole session. Pure: instants are passed in.

A frame is settled once and for good: on time, late, or dropped for one reason; until then it is inside. Showing a
frame a second time (restyled, after the camera stood in for it) changes nothing. So at every instant
`due == on_time + late + dropped + inside`.
"""

from __future__ import annotations

from collections import Counter as Counts
from collections.abc import Iterable
from enum import StrEnum

# Frames on time that may still turn out to have been lost behind their release: two wait there at most, and losses
# are told twice a second.
MAX_RECALL = 256
TALLY_STEP_S = 0.001
TALLY_MAX_S = 10.0


class Outcome(StrEnum):
    """How a release settled a frame; SHOWN_BEFORE: it had been settled."""

    ON_TIME = "on_time"
    LATE = "late"
    SHOWN_BEFORE = "shown_before"


class FrameLedger:
    """Due frames of one session. budget_s: released later than this after its arrival, a frame is late."""

    def __init__(self, budget_s: float) -> None:
        self.due = self.on_time = self.late = 0
        self.dropped: Counts[str] = Counts()
        self._budget_s = budget_s
        # Both by index, oldest first; the pipeline bounds what is inside, for each of its queues is bounded.
        self._inside: dict[int, float] = {}
        self._recall: dict[int, None] = {}

    @property
    def inside(self) -> int:
        """Frames not settled yet."""
        return len(self._inside)

    @property
    def missed(self) -> int:
        """Frames late or dropped."""
        return self.late + self.dropped.total()

    def overdue(self, now: float) -> int:
        """Frames inside that can only be missed any more."""
        return sum(now - arrived_at > self._budget_s for arrived_at in self._inside.values())

    def arrive(self, index: int, arrived_at: float) -> None:
        """A frame of the agreed rate came in."""
        self.due += 1
        self._inside[index] = arrived_at

    def release(self, index: int, now: float) -> Outcome:
        """A picture of this frame goes to the encoder."""
        arrived_at = self._inside.pop(index, None)
        if arrived_at is None:
            return Outcome.SHOWN_BEFORE
        if now - arrived_at > self._budget_s:
            self.late += 1
            return Outcome.LATE
        self.on_time += 1
        self._recall[index] = None
        if len(self._recall) > MAX_RECALL:
            del self._recall[next(iter(self._recall))]
        return Outcome.ON_TIME

    def drop(self, indices: Iterable[int], reason: str) -> int:
        """Frames are given up; returns how many were not settled yet and so are dropped for this reason."""
        lost = sum(self._inside.pop(index, None) is not None for index in indices)
        if lost:
            self.dropped[reason] += lost
        return lost

    def unsent(self, index: int, reason: str) -> bool:
        """A released frame never left: it is dropped instead of on time. A late one was missed already: False."""
        if index not in self._recall:
            return False
        del self._recall[index]
        self.on_time -= 1
        self.dropped[reason] += 1
        return True


class Tally:
    """Quantiles over a whole session in bounded space: counts by whole milliseconds, up to ten seconds."""

    def __init__(self) -> None:
        self._counts: Counts[int] = Counts()

    def add(self, value_s: float) -> None:
        """Count one value; beyond ten seconds it counts as ten."""
        self._counts[round(min(max(0.0, value_s), TALLY_MAX_S) / TALLY_STEP_S)] += 1

    def quantile_s(self, share: float) -> float | None:
        """The smallest value with at least `share` of the values at or below it; None without values."""
        wanted = share * self._counts.total()
        below = 0
        for step in sorted(self._counts):
            below += self._counts[step]
            if below >= wanted:
                return step * TALLY_STEP_S
        return None
