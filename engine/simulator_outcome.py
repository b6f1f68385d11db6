"""What came of a simulation: every frame's fate, and the sum of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import ceil, inf
from statistics import fmean, median

from engine.simulator_load import CHUNK_FRAMES, WARM_UP_S, Chunk, Workload


@dataclass(frozen=True)
class SessionOutcome:
    """One session: frames a second that came out, seconds to the first one, share of frames late or never shown."""

    fps: float
    ttff_s: float
    dmr: float


@dataclass(frozen=True)
class Outcome:
    """What a simulation gave.

    latency_s: of every judged frame that came out, from its capture, sorted; saturated, from when the engine took it.
    utilisation: busy share of each rank. bottleneck: in words.
    """

    sessions: tuple[SessionOutcome, ...]
    latency_s: tuple[float, ...]
    utilisation: tuple[float, ...]
    bottleneck: str

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
        return self.latency_s[max(ceil(share * len(self.latency_s)) - 1, 0)] if self.latency_s else inf


@dataclass
class Book:
    """What became of every frame."""

    workload: Workload
    latencies: list[float] = field(default_factory=list)
    first_s: dict[int, float] = field(default_factory=dict)
    shown: dict[int, int] = field(default_factory=dict)
    judged: dict[int, int] = field(default_factory=dict)
    on_time: dict[int, int] = field(default_factory=dict)

    def came(self, chunk: Chunk, captured: Sequence[float] | None = None) -> None:
        """A chunk has been captured; a saturated one counts by when it was taken up."""
        count = sum(at >= WARM_UP_S for at in captured or chunk.captured)
        self.judged[chunk.session] = self.judged.get(chunk.session, 0) + count

    def done(self, chunk: Chunk, captured: Sequence[float], at: float) -> None:
        """A chunk has been rendered."""
        workload, session = self.workload, chunk.session
        self.first_s.setdefault(session, at - captured[0])
        if WARM_UP_S <= at < workload.seconds:
            self.shown[session] = self.shown.get(session, 0) + len(captured)
        judged = [at - captured_at for captured_at in captured if captured_at >= WARM_UP_S]
        self.latencies += judged
        on_time = sum(latency <= workload.budget_s for latency in judged)
        self.on_time[session] = self.on_time.get(session, 0) + on_time

    def outcome(self, utilisation: Sequence[float], bottleneck: str) -> Outcome:
        """The sum of it."""
        span_s = self.workload.seconds - WARM_UP_S
        sessions = tuple(
            SessionOutcome(
                self.shown.get(session, 0) / span_s,
                self.first_s.get(session, inf),
                1 - self.on_time.get(session, 0) / judged if (judged := self.judged.get(session, 0)) else 0.0,
            )
            for session in range(self.workload.sessions)
        )
        return Outcome(sessions, tuple(sorted(self.latencies)), tuple(utilisation), bottleneck)


def bottleneck_words(parts_s: dict[str, float], rank: int, used: float, workload: Workload) -> str:
    """What stands in the way, and by how much."""
    part = max(parts_s, key=lambda name: parts_s[name])
    total_s = sum(parts_s.values())
    where = f"{part} on device {rank + 1}: {parts_s[part] * 1e3:.0f} of its {total_s * 1e3:.0f} ms a chunk"
    if workload.saturated or used >= 0.7:
        return where
    filled_s = (CHUNK_FRAMES - 1) / workload.fps
    return f"no device ({used:.0%} busy at most); of the latency {filled_s * 1e3:.0f} ms are the filling of a chunk"
