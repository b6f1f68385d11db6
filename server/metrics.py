"""Figures of one session, kept by frame identity, and the process's Prometheus registry.

A frame is due when the rate gate admitted it; it is a miss when it is dropped anywhere after that, or released later
than the latency budget. Frames the gate thins out are not due: the agreed rate is the promise.
"""

from __future__ import annotations

import math
from collections import Counter as Counts
from collections import deque
from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

WINDOW_S = 60.0
RECENT_S = 5.0


class ServerMetrics:
    """What /metrics shows: sums over all sessions since the start."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.sessions = Gauge("livebrush_sessions", "Open sessions", registry=self.registry)
        self.opened = Counter("livebrush_sessions_opened", "Sessions answered", registry=self.registry)
        self.ended = Counter(
            "livebrush_sessions_ended", "Sessions ended, by reason", ["reason"], registry=self.registry
        )
        self.refused = Counter("livebrush_offers_refused", "Offers refused, by code", ["code"], registry=self.registry)
        self.due = Counter("livebrush_frames_due", "Frames of the agreed rate", registry=self.registry)
        self.late = Counter("livebrush_frames_late", "Frames released past the budget", registry=self.registry)
        self.dropped = Counter("livebrush_frames_dropped", "Due frames never shown", ["reason"], registry=self.registry)
        self.withheld = Counter(
            "livebrush_frames_withheld",
            "Frames shown as the camera because the model's picture was not fit, by reason",
            ["reason"],
            registry=self.registry,
        )
        self.reanchored = Counter(
            "livebrush_streams_reanchored", "Times a stream had drifted and was begun anew", registry=self.registry
        )
        self.rung_moves = Counter(
            "livebrush_rung_moves",
            "Moves of a session on the ladder, by direction and the rung it came to",
            ["direction", "rung"],
            registry=self.registry,
        )
        self.faults = Counter("livebrush_faults", "Errors that reached a wall", ["where"], registry=self.registry)
        self.ttff = Histogram(
            "livebrush_ttff_seconds",
            "Offer to first restyled frame handed to the encoder",
            buckets=(0.1, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2, 5, 15, 60),
            registry=self.registry,
        )
        self.age = Histogram(
            "livebrush_frame_age_seconds",
            "Camera frame's arrival to its release",
            buckets=(0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.75, 1, 2),
            registry=self.registry,
        )
        self.chunk_cost = Gauge("livebrush_engine_chunk_seconds", "Cost of a chunk, smoothed", registry=self.registry)
        self.cpu = Gauge("livebrush_cpu_share", "Busy share of all cores, whole machine", registry=self.registry)
        self.cpu_share = 0.0
        self.loop_lag = Gauge(
            "livebrush_loop_lag_seconds", "Worst event loop lag of the last second", registry=self.registry
        )

    def on_tick(self, loop_lag_s: float, chunk_cost_s: float, cpu_share: float) -> None:
        """What is sampled every few seconds rather than counted."""
        self.loop_lag.set(max(0.0, loop_lag_s))
        self.chunk_cost.set(chunk_cost_s)
        self.cpu.set(cpu_share)
        self.cpu_share = cpu_share


class SessionMetrics:
    """Counters and recent quantiles of one session. Instants are passed in."""

    def __init__(self, server: ServerMetrics, offered_at: float, latency_budget_s: float) -> None:
        self.offered_at = offered_at
        self.ttff_s: float | None = None
        self.due = self.released = self.restyled = self.late = self.thinned = self.reanchored = 0
        self.released_at = float("-inf")
        self.dropped: Counts[str] = Counts()
        self.withheld: Counts[str] = Counts()
        self.rung_moves: Counts[str] = Counts()
        self._server = server
        self._budget_s = latency_budget_s
        # (instant, due, missed) for the on-time share of the last WINDOW_S.
        self._events: deque[tuple[float, int, int]] = deque()
        self._ages: deque[tuple[float, float]] = deque()
        self._engine: deque[tuple[float, float]] = deque()
        self._queue: deque[tuple[float, float]] = deque()
        self._arrivals: deque[float] = deque()

    def on_arrival(self, now: float, *, admitted: bool) -> None:
        """A camera frame was decoded; `admitted` if it belongs to the agreed rate."""
        self._arrivals.append(now)
        while self._arrivals[0] < now - RECENT_S:
            self._arrivals.popleft()
        if not admitted:
            self.thinned += 1
            return
        self.due += 1
        self._server.due.inc()
        self._event(now, 1, 0)

    def on_dropped(self, now: float, reason: str, frames: int) -> None:
        """Due frames were given up."""
        if frames <= 0:
            return
        self.dropped[reason] += frames
        self._server.dropped.labels(reason).inc(frames)
        self._event(now, 0, frames)

    def on_chunk(self, now: float, queue_s: float, engine_s: float) -> None:
        """The engine returned a chunk that had waited queue_s and taken engine_s."""
        self._push(self._queue, now, queue_s)
        self._push(self._engine, now, engine_s)

    def on_withheld(self, reason: str, frames: int) -> None:
        """The model's picture was not fit to be shown; the camera's frames are on their way instead."""
        self.withheld[reason] += frames
        self._server.withheld.labels(reason).inc(frames)

    def on_rung(self, direction: str, name: str) -> None:
        """The session was moved `direction` ("down" or "up") to the rung of that name."""
        self.rung_moves[direction] += 1
        self._server.rung_moves.labels(direction, name).inc()

    def on_reanchored(self, times: int) -> None:
        """The stream had drifted, and its cache was begun anew."""
        self.reanchored += times
        self._server.reanchored.inc(times)

    def on_release(self, now: float, arrived_at: float, *, restyled: bool) -> None:
        """A frame was handed to the encoder."""
        age = now - arrived_at
        self.released += 1
        self.released_at = now
        self._server.age.observe(age)
        self._push(self._ages, now, age)
        if restyled:
            self.restyled += 1
            if self.ttff_s is None:
                self.ttff_s = now - self.offered_at
                self._server.ttff.observe(self.ttff_s)
        if age > self._budget_s:
            self.late += 1
            self._server.late.inc()
            self._event(now, 0, 1)

    def on_time(self) -> float:
        """Share of the frames due in the last minute that were released within the budget."""
        due = sum(event[1] for event in self._events)
        missed = sum(event[2] for event in self._events)
        return max(0.0, 1.0 - missed / due) if due else 1.0

    def input_fps(self) -> float:
        """Camera frames a second over the last seconds."""
        return _rate(self._arrivals)

    def stats(self) -> dict[str, object]:
        """The figures of the telemetry message `stats`."""
        ages = [age for _, age in self._ages]
        engine = [cost for _, cost in self._engine]
        queue = [wait for _, wait in self._queue]
        return {
            "fps": round(_rate([at for at, _ in self._ages]), 1),
            "input_fps": round(self.input_fps(), 1),
            "on_time": round(self.on_time(), 4),
            "due": self.due,
            "late": self.late,
            "released": self.released,
            "restyled": self.restyled,
            "thinned": self.thinned,
            "dropped": dict(self.dropped),
            "withheld": dict(self.withheld),
            "reanchored": self.reanchored,
            "engine_ms_p50": _ms(quantile(engine, 0.5)),
            "engine_ms_p95": _ms(quantile(engine, 0.95)),
            "queue_ms_p50": _ms(quantile(queue, 0.5)),
            "age_ms_p50": _ms(quantile(ages, 0.5)),
            "age_ms_p95": _ms(quantile(ages, 0.95)),
            "ttff_ms": _ms(self.ttff_s),
        }

    def _event(self, now: float, due: int, missed: int) -> None:
        self._events.append((now, due, missed))
        while self._events[0][0] < now - WINDOW_S:
            self._events.popleft()

    def _push(self, series: deque[tuple[float, float]], now: float, value: float) -> None:
        series.append((now, value))
        while series[0][0] < now - RECENT_S:
            series.popleft()


def quantile(values: Iterable[float], share: float) -> float | None:
    """The smallest value with at least `share` of the values at or below it; None without values."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)] if ordered else None


def _rate(instants: Iterable[float]) -> float:
    points = list(instants)
    return (len(points) - 1) / (points[-1] - points[0]) if len(points) > 1 and points[-1] > points[0] else 0.0


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1000, 1)
