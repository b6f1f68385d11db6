"""What came of a simulation: every frame's fate, and the sum of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import ceil, inf
from statistics import fmean, median

from engine.simulator_load import CHUNK_FRAMES, Workload


def quantile_s(latency_s: Sequence[float], share: float) -> float:
    """Of sorted latencies, the one that this share stays at or below; infinite if there are none."""
    return latency_s[max(ceil(share * len(latency_s)) - 1, 0)] if latency_s else inf


@dataclass(frozen=True)
class SessionOutcome:
    """One session: frames a second that came out, seconds to the first one, share of frames late or never shown.

    by_camera: share of frames that were shown as the camera's own, which are in time and do not count as come out.
    latency_s: of every judged frame that came out, from its capture, sorted; saturated, from when the engine took it.
    """

    fps: float
    ttff_s: float
    dmr: float
    by_camera: float
    latency_s: tuple[float, ...]


@dataclass(frozen=True)
class Outcome:
    """What a simulation gave. utilisation: busy share of each rank. bottleneck: in words."""

    sessions: tuple[SessionOutcome, ...]
    utilisation: tuple[float, ...]
    bottleneck: str

    @cached_property
    def latency_s(self) -> tuple[float, ...]:
        """Of all sessions together, sorted."""
        return tuple(sorted(latency for session in self.sessions for latency in session.latency_s))

    @property
    def fps(self) -> float:
        """All sessions together, frames a second."""
        return sum(session.fps for session in self.sessions)

    @property
    def dmr(self) -> float:
        """Share of all sessions' frames that missed their deadline, the never shown among them."""
        return fmean(session.dmr for session in self.sessions)

    @property
    def worst_dmr(self) -> float:
        """Of the session that fared worst."""
        return max(session.dmr for session in self.sessions)

    @property
    def ttff_s(self) -> float:
        """Median over sessions, from the first frame's capture; infinite if nothing came."""
        return median(session.ttff_s for session in self.sessions)

    @property
    def mean_latency_s(self) -> float:
        """Infinite if nothing came."""
        return fmean(self.latency_s) if self.latency_s else inf

    def latency_quantile_s(self, share: float) -> float:
        """The latency that this share of frames stays at or below; infinite if nothing came."""
        return quantile_s(self.latency_s, share)


@dataclass
class _Tally:
    """Of one session: frames that count, and of those that came out."""

    judged: int = 0
    on_time: int = 0
    shown: int = 0
    by_camera: int = 0
    first_s: float = inf
    latencies_s: list[float] = field(default_factory=list)


class Book:
    """What became of every frame."""

    def __init__(self, workload: Workload) -> None:
        self._workload = workload
        self._sessions = [_Tally() for _ in range(workload.sessions)]

    def came(self, session: int, captured: Sequence[float]) -> None:
        """A chunk has been captured; a saturated one counts by when it was taken up."""
        self._sessions[session].judged += sum(at >= self._workload.warm_up_s for at in captured)

    def shown(self, session: int, captured_at: float, at: float) -> None:
        """A frame has been rendered, or where there is playout, shown."""
        workload, tally = self._workload, self._sessions[session]
        latency_s = at - captured_at
        if tally.first_s == inf:
            tally.first_s = latency_s
        if workload.warm_up_s <= at < workload.seconds:
            tally.shown += 1
        if captured_at >= workload.warm_up_s:
            tally.latencies_s.append(latency_s)
            tally.on_time += latency_s <= workload.budget_s

    def by_camera(self, session: int, captured: Sequence[float]) -> None:
        """Frames were shown at once as the camera's own: in time, and not the model's."""
        count = sum(at >= self._workload.warm_up_s for at in captured)
        self._sessions[session].on_time += count
        self._sessions[session].by_camera += count

    def has_shown(self, session: int) -> bool:
        """Whether a frame of the session has come out."""
        return self._sessions[session].first_s < inf

    def outcome(self, utilisation: Sequence[float], bottleneck: str) -> Outcome:
        """The sum of it."""
        span_s = self._workload.seconds - self._workload.warm_up_s
        sessions = tuple(
            SessionOutcome(
                tally.shown / span_s,
                tally.first_s,
                1 - tally.on_time / tally.judged if tally.judged else 0.0,
                tally.by_camera / tally.judged if tally.judged else 0.0,
                tuple(sorted(tally.latencies_s)),
            )
            for tally in self._sessions
        )
        return Outcome(sessions, tuple(utilisation), bottleneck)


def bottleneck_words(parts_s: dict[str, float], rank: int, used: float, workload: Workload) -> str:
    """What stands in the way, and by how much."""
    part = max(parts_s, key=lambda name: parts_s[name])
    total_s = sum(parts_s.values())
    where = f"{part} on device {rank + 1}: {parts_s[part] * 1e3:.0f} of its {total_s * 1e3:.0f} ms a chunk"
    if workload.saturated or used >= 0.7:
        return where
    filled_s = (CHUNK_FRAMES - 1) / workload.fps
    return f"no device ({used:.0%} busy at most); of the latency {filled_s * 1e3:.0f} ms are the filling of a chunk"
