"""Figures of one session, kept by frame identity, and the process's Prometheus registry.

A frame is due when the rate gate admitted it; it is a miss when it is dropped anywhere after that, or released later
than the latency budget (`server.ledger`). Frames the gate thins out are not due: the agreed rate is the promise. Frames
shown as the camera, because the model's picture was not fit or on the camera rung, are in time and counted apart.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections import Counter as Counts
from collections import deque
from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from server.ledger import FrameLedger, Outcome, Tally

log = logging.getLogger(__name__)

WINDOW_S = 60.0
RECENT_S = 5.0
# Longer than this without a new picture, while due frames came, the picture was frozen.
FREEZE_S = 0.5
# Without a due frame for this long the camera paused: the gap in the picture is no interval.
PAUSE_S = 1.0
# An event loop later than this has stood: nothing of it may take over 20 ms.
STALL_S = 0.25
# What happens on the way to the first restyled picture, in order.
TTFF_STAGES = ("answer", "connected", "camera", "chunk", "engine", "playout")


class ServerMetrics:
    """What /metrics shows: sums over all sessions since the start."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.cpu_share = 0.0
        self._add_sessions()
        self._add_frames()
        self._add_times()
        self._add_machine()

    def _add_sessions(self) -> None:
        """Who came, who was refused, who went; and what was told to those in place."""
        self.sessions = Gauge("livebrush_sessions", "Open sessions", registry=self.registry)
        self.opened = Counter("livebrush_sessions_opened", "Sessions answered", registry=self.registry)
        self.ended = Counter(
            "livebrush_sessions_ended", "Sessions ended, by reason", ["reason"], registry=self.registry
        )
        self.moved = Counter(
            "livebrush_sessions_moved",
            "Sessions told to go on elsewhere, because the server was being emptied",
            registry=self.registry,
        )
        self.resumed = Counter(
            "livebrush_sessions_resumed",
            "Pages that came back by their token, to a session that ran or had ended",
            ["found"],
            registry=self.registry,
        )
        self.refused = Counter("livebrush_offers_refused", "Offers refused, by code", ["code"], registry=self.registry)
        self.osc = Counter("livebrush_osc_messages", "OSC messages, by outcome", ["outcome"], registry=self.registry)
        self.rung_moves = Counter(
            "livebrush_rung_moves",
            "Moves of a session on the ladder, by direction and the rung it came to",
            ["direction", "rung"],
            registry=self.registry,
        )
        self.faults = Counter("livebrush_faults", "Errors that reached a wall", ["where"], registry=self.registry)

    def _add_frames(self) -> None:
        """What became of frames."""
        self.due = Counter("livebrush_frames_due", "Frames of the agreed rate", registry=self.registry)
        self.late = Counter("livebrush_frames_late", "Frames released past the budget", registry=self.registry)
        self.thinned = Counter(
            "livebrush_frames_thinned", "Camera frames beyond the agreed rate", registry=self.registry
        )
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

    def _add_times(self) -> None:
        """How old and how even pictures were."""
        self.ttff = Histogram(
            "livebrush_ttff_seconds",
            "Offer to first restyled frame handed to the encoder",
            buckets=(0.1, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2, 5, 15, 60),
            registry=self.registry,
        )
        self.age = Histogram(
            "livebrush_frame_age_seconds",
            "Camera frame's arrival to its release",
            buckets=(0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.75, 1, 2),
            registry=self.registry,
        )
        self.ttff_stage = Histogram(
            "livebrush_ttff_stage_seconds",
            "What the time to the first restyled frame went to, by stage",
            ["stage"],
            buckets=(0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 1, 2, 5, 15, 60),
            registry=self.registry,
        )
        self.interval = Histogram(
            "livebrush_playout_interval_seconds",
            "From one released picture to the next",
            buckets=(0.01, 0.02, 0.03, 0.04, 0.05, 0.07, 0.1, 0.15, 0.2, 0.3, 0.5, 1),
            registry=self.registry,
        )
        self.jitter = Histogram(
            "livebrush_playout_jitter_seconds",
            "Difference of successive playout intervals",
            buckets=(0.001, 0.002, 0.005, 0.01, 0.02, 0.04, 0.08, 0.15, 0.3, 0.6),
            registry=self.registry,
        )
        self.freezes = Counter(
            "livebrush_freezes", "Times the picture stood over 0.5 s while frames came", registry=self.registry
        )
        self.frozen_s = Counter("livebrush_frozen_seconds", "How long it stood then", registry=self.registry)

    def _add_machine(self) -> None:
        """What there is to be had, and how busy it is."""
        self.chunk_cost = Gauge("livebrush_engine_chunk_seconds", "Cost of a chunk, smoothed", registry=self.registry)
        self.seats = Gauge("livebrush_seats", "Sessions taken at the measured costs", registry=self.registry)
        self.load = Gauge(
            "livebrush_engine_load", "Share of the engine's time that the sessions need", registry=self.registry
        )
        self.process_load = Gauge(
            "livebrush_process_load",
            "Share of the cores, or of the event loop, that the sessions' video needs",
            registry=self.registry,
        )
        self.rungs_down = Gauge(
            "livebrush_rungs_down", "Rungs of the ladder below the wish, 0 for none given up", registry=self.registry
        )
        self.cpu = Gauge("livebrush_cpu_share", "Busy share of all cores, whole machine", registry=self.registry)
        self.loop_lag = Gauge(
            "livebrush_loop_lag_seconds", "Worst event loop lag of the last second", registry=self.registry
        )
        self.loop_stalls = Counter(
            "livebrush_loop_stalls",
            "Times in which the event loop was late by over a quarter of a second",
            registry=self.registry,
        )
        self.tasks = Gauge("livebrush_tasks", "Tasks of the event loop", registry=self.registry)

    def on_tick(self, loop_lag_s: float, chunk_cost_s: float, cpu_share: float) -> None:
        """What is sampled every few seconds rather than counted."""
        self.loop_lag.set(max(0.0, loop_lag_s))
        if loop_lag_s > STALL_S:
            self.loop_stalls.inc()
            log.warning("the event loop was late by %.2f s: something held it, or the machine is busy", loop_lag_s)
        self.tasks.set(len(asyncio.all_tasks()))
        self.chunk_cost.set(chunk_cost_s)
        self.cpu.set(cpu_share)
        self.cpu_share = cpu_share


class SessionMetrics:
    """Counters, recent quantiles and those of the whole session. Instants are passed in.

    engine_missed: frames that the engine gave up, as soon as it says so, that came too late to be shown, or were late:
    what the ladder goes by; engine_lost: those that were never shown. The ledger counts the same frames by identity, a
    chunk later.
    """

    def __init__(self, server: ServerMetrics, offered_at: float, latency_budget_s: float) -> None:
        self.offered_at = offered_at
        self.ttff_s: float | None = None
        self.released = self.restyled = self.thinned = self.reanchored = self.freezes = 0
        self.engine_missed = self.engine_lost = 0
        self.frozen_s = 0.0
        self.released_at = float("-inf")
        self.withheld: Counts[str] = Counts()
        self.rung_moves: Counts[str] = Counts()
        self.ledger = FrameLedger(latency_budget_s)
        self._server = server
        self._stages: dict[str, float] = {}
        # (instant, due, missed) for the on-time share of the last WINDOW_S.
        self._events: deque[tuple[float, int, int]] = deque()
        self._recent: dict[str, deque[tuple[float, float]]] = {
            name: deque() for name in ("age", "engine", "queue", "interval", "jitter")
        }
        self._all = {name: Tally() for name in ("age", "interval", "jitter")}
        self._arrivals: deque[float] = deque()
        self._due_at = float("-inf")
        self._interval_s: float | None = None
        # Since when a due frame has been there and no new picture.
        self._waiting_since: float | None = None
        self._paused = False

    @property
    def due(self) -> int:
        """Frames of the agreed rate."""
        return self.ledger.due

    @property
    def late(self) -> int:
        """Frames released past the budget."""
        return self.ledger.late

    @property
    def dropped(self) -> Counts[str]:
        """Due frames never shown, by reason."""
        return self.ledger.dropped

    def on_stage(self, stage: str, now: float) -> None:
        """The session came to one of TTFF_STAGES; only the first time counts."""
        self._stages.setdefault(stage, now)

    def on_arrival(self, now: float, index: int, arrived_at: float, *, admitted: bool) -> None:
        """A camera frame was decoded; `admitted` if it belongs to the agreed rate."""
        self._arrivals.append(now)
        while self._arrivals[0] < now - RECENT_S:
            self._arrivals.popleft()
        self.on_stage("camera", now)
        if not admitted:
            self.thinned += 1
            self._server.thinned.inc()
            return
        self.ledger.arrive(index, arrived_at)
        self._server.due.inc()
        self._event(now, 1, 0)
        self._paused = self._paused or now - self._due_at > PAUSE_S
        self._due_at = now
        if self._waiting_since is None:
            self._waiting_since = now

    def on_dropped(self, now: float, reason: str, indices: Iterable[int]) -> None:
        """Frames were given up; those that were shown already, as the camera, do not count."""
        if lost := self.ledger.drop(indices, reason):
            self._miss(now, reason, lost)

    def on_unsent(self, now: float, reason: str, index: int) -> None:
        """A released frame was lost on its way out."""
        if self.ledger.unsent(index, reason):
            self._miss(now, reason, 1)

    def on_engine_lost(self, frames: int) -> None:
        """The engine says that it gave up so many frames more, or they came too late to be shown."""
        self.engine_missed += frames
        self.engine_lost += frames

    def on_submitted(self, now: float) -> None:
        """A chunk was handed to the engine."""
        self.on_stage("chunk", now)

    def on_chunk(self, now: float, queue_s: float, engine_s: float) -> None:
        """The engine returned a chunk that had waited queue_s and taken engine_s."""
        self.on_stage("engine", now)
        self._push("queue", now, queue_s)
        self._push("engine", now, engine_s)

    def on_withheld(self, reason: str, frames: int) -> None:
        """The camera's frames are on their way in place of the model's picture."""
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

    def on_release(self, now: float, index: int, arrived_at: float, *, restyled: bool) -> None:
        """A picture of the frame was handed to the encoder."""
        age = now - arrived_at
        self.released += 1
        self._server.age.observe(age)
        self._push("age", now, age)
        self._on_interval(now)
        if restyled:
            self.restyled += 1
            if self.ttff_s is None:
                self._on_first_restyled(now)
        if self.ledger.release(index, now) is Outcome.LATE:
            self.engine_missed += 1
            self._server.late.inc()
            self._event(now, 0, 1)

    def _on_first_restyled(self, now: float) -> None:
        self.on_stage("playout", now)
        self.ttff_s = now - self.offered_at
        self._server.ttff.observe(self.ttff_s)
        for stage, seconds in self._stage_seconds().items():
            self._server.ttff_stage.labels(stage).observe(seconds)

    def _on_interval(self, now: float) -> None:
        """Interval to the picture before, its change, and whether the picture stood."""
        interval_s = now - self.released_at
        is_first, self.released_at = self.released_at == float("-inf"), now
        waiting_since, self._waiting_since = self._waiting_since, None
        if is_first or self._paused:
            self._paused, self._interval_s = False, None
            return
        if waiting_since is not None and now - waiting_since > FREEZE_S:
            self.freezes += 1
            self.frozen_s += now - waiting_since
            self._server.freezes.inc()
            self._server.frozen_s.inc(now - waiting_since)
        self._server.interval.observe(interval_s)
        self._push("interval", now, interval_s)
        if self._interval_s is not None:
            change_s = abs(interval_s - self._interval_s)
            self._server.jitter.observe(change_s)
            self._push("jitter", now, change_s)
        self._interval_s = interval_s

    def on_time(self, now: float | None = None) -> float:
        """Share of the frames due in the last minute that were released within the budget.

        now: counts those still inside that are past it, too.
        """
        due = sum(event[1] for event in self._events)
        missed = sum(event[2] for event in self._events)
        overdue = self.ledger.overdue(now) if now is not None else 0
        return min(1.0, max(0.0, 1.0 - (missed + overdue) / due)) if due else 1.0

    def input_fps(self) -> float:
        """Camera frames a second over the last seconds."""
        return _rate(self._arrivals)

    def stats(self, now: float | None = None) -> dict[str, object]:
        """The figures of the telemetry message `stats`; those of the ledger since the start, quantiles of now."""
        on_time = self.on_time(now)
        recent = {name: [value for _, value in series] for name, series in self._recent.items()}
        return self._counted() | {
            "fps": round(_rate([at for at, _ in self._recent["age"]]), 1),
            "input_fps": round(self.input_fps(), 1),
            "on_time": round(on_time, 4),
            "dmr": round(1.0 - on_time, 4),
            "engine_ms_p50": _ms(quantile(recent["engine"], 0.5)),
            "engine_ms_p95": _ms(quantile(recent["engine"], 0.95)),
            "queue_ms_p50": _ms(quantile(recent["queue"], 0.5)),
            "age_ms_p50": _ms(quantile(recent["age"], 0.5)),
            "age_ms_p95": _ms(quantile(recent["age"], 0.95)),
            "age_ms_p99": _ms(quantile(recent["age"], 0.99)),
            "interval_ms_p50": _ms(quantile(recent["interval"], 0.5)),
            "interval_ms_p95": _ms(quantile(recent["interval"], 0.95)),
            "interval_ms_p99": _ms(quantile(recent["interval"], 0.99)),
            "jitter_ms_p99": _ms(quantile(recent["jitter"], 0.99)),
        }

    def summary(self, now: float) -> dict[str, object]:
        """The figures of the whole session at its end; shares are of the frames settled."""
        settled = self.ledger.due - self.ledger.inside
        missed = self.ledger.missed / settled if settled else 0.0
        quantiles = {
            f"{name}_ms_p{round(100 * share)}": _ms(self._all[name].quantile_s(share))
            for name, shares in {"age": (0.5, 0.95, 0.99), "interval": (0.5, 0.95, 0.99), "jitter": (0.99,)}.items()
            for share in shares
        }
        return (
            {"seconds": round(now - self.offered_at, 1), "on_time": round(1.0 - missed, 4), "dmr": round(missed, 4)}
            | self._counted()
            | quantiles
        )

    def _counted(self) -> dict[str, object]:
        return {
            "due": self.due,
            "on_time_frames": self.ledger.on_time,
            "late": self.late,
            "dropped": dict(self.dropped),
            "inside": self.ledger.inside,
            "released": self.released,
            "restyled": self.restyled,
            "thinned": self.thinned,
            "withheld": dict(self.withheld),
            "reanchored": self.reanchored,
            "freezes": self.freezes,
            "frozen_s": round(self.frozen_s, 2),
            "rung_moves": dict(self.rung_moves),
            "ttff_ms": _ms(self.ttff_s),
            "ttff": {f"{stage}_ms": _ms(seconds) for stage, seconds in self._stage_seconds().items()},
        }

    def _stage_seconds(self) -> dict[str, float]:
        """How long each stage so far took: they add up to the TTFF. One that was over before the last took no time."""
        seconds, at = {}, self.offered_at
        for stage in TTFF_STAGES:
            if stage not in self._stages:
                break
            reached = max(at, self._stages[stage])
            seconds[stage], at = reached - at, reached
        return seconds

    def _miss(self, now: float, reason: str, frames: int) -> None:
        self._server.dropped.labels(reason).inc(frames)
        self._event(now, 0, frames)

    def _event(self, now: float, due: int, missed: int) -> None:
        self._events.append((now, due, missed))
        while self._events[0][0] < now - WINDOW_S:
            self._events.popleft()

    def _push(self, name: str, now: float, value: float) -> None:
        series = self._recent[name]
        series.append((now, value))
        while series[0][0] < now - RECENT_S:
            series.popleft()
        if name in self._all:
            self._all[name].add(value)


def quantile(values: Iterable[float], share: float) -> float | None:
    """The smallest value with at least `share` of the values at or below it; None without values."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)] if ordered else None


def _rate(instants: Iterable[float]) -> float:
    points = list(instants)
    return (len(points) - 1) / (points[-1] - points[0]) if len(points) > 1 and points[-1] > points[0] else 0.0


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1000, 1)
