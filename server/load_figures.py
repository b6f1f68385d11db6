"""What a client of the load generator saw -> its figures. Pure: no I/O, the clock is an argument.

Two ages are told apart. `age_s` is of one frame from end to end: from the instant its picture was handed to the
sender here until the last packet of its restyled picture was received here; neither the camera before nor the screen
after is in it. `server_age_s` is the server's share: arrived there until handed to its encoder.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from server.metrics import quantile

# Clock samples count this long; the one with the least round trip is believed.
CLOCK_WINDOW_S = 30.0
# Time for the way up to be free once, before it is decided which frame was which.
SETTLE_S = 5.0
CLOCK_SLACK_S = 0.001
# Over half a minute at 30 fps: what waits for its mark, or mark for its picture.
MAX_UNMATCHED = 1024
# Over an hour at 24 fps; of a longer run the quantiles are of its last part.
MAX_SAMPLES = 100_000
FREEZE_S = 0.5
# Stats come twice a second; a dmr from older ones would be of another time.
STALE_S = 3.0
RESTYLED = 1
DIGITS = 4


class ServerClock:
    """The offset of the server's monotonic clock, from pings."""

    def __init__(self) -> None:
        self._samples: deque[tuple[float, float, float]] = deque()

    def on_pong(self, sent_at: float, now: float, server_s: float) -> None:
        """A ping of `sent_at` came back `now`, stamped `server_s` on the way."""
        self._samples.append((now, now - sent_at, server_s - (sent_at + now) / 2))
        while self._samples[0][0] < now - CLOCK_WINDOW_S:
            self._samples.popleft()

    @property
    def best(self) -> tuple[float, float] | None:
        """Least round trip and its offset (server minus here), in seconds; None before the first pong."""
        if not self._samples:
            return None
        _, round_trip_s, offset_s = min(self._samples, key=lambda sample: sample[1])
        return round_trip_s, offset_s


class SentFrames:
    """Which frame sent here is which frame of the server.

    The server counts the frames it decodes. If n were sent when one arrived there, it is the n-th at the latest; the
    difference to its count is what was lost before it and what was still under way behind it. The first never falls,
    so the least difference at it or at a later frame is the loss alone, once the way was free for one of them.
    Until then the frame is taken for a later one: its age is said too small, never too large.
    """

    def __init__(self) -> None:
        self._at: deque[float] = deque(maxlen=MAX_UNMATCHED)
        self._sent = 0
        # Index, instant of arrival and difference of the server's last frames.
        self._notes: deque[tuple[int, float, int]] = deque(maxlen=MAX_UNMATCHED)

    def on_sent(self, now: float) -> None:
        """The next frame was handed to the sender."""
        self._at.append(now)
        self._sent += 1

    def note(self, index: int, arrived_at: float, slack_s: float) -> None:
        """The server's frame `index` arrived there at `arrived_at` of our clock, give or take `slack_s`."""
        newest = self._forgotten + bisect_right(self._at, arrived_at + slack_s) - 1
        self._notes.append((index, arrived_at, newest - index))
        while self._notes[0][1] < arrived_at - 2 * SETTLE_S:
            self._notes.popleft()

    def sent_at(self, index: int) -> float | None:
        """When the server's frame `index` was handed to the sender; None if that is forgotten or cannot be."""
        differences = [difference for later, _, difference in self._notes if later >= index]
        place = index + min(differences) - self._forgotten if differences else -1
        return self._at[place] if 0 <= place < len(self._at) else None

    @property
    def _forgotten(self) -> int:
        return self._sent - len(self._at)


class SessionFigures:
    """What one session saw. Everything before `begin` counts only for the first picture."""

    def __init__(self, clock: ServerClock) -> None:
        """`clock` may be shared by all sessions of one server: the best sample of any serves all."""
        self.clock = clock
        self.sent = SentFrames()
        self.losses: Counter[str] = Counter()
        """What these figures could not use, by reason."""
        self.notices: Counter[str] = Counter()
        self._offered_at: float | None = None
        self._answered_at: float | None = None
        self._connected_at: float | None = None
        self._restyled_at: float | None = None
        self._begun_at: float | None = None
        self._pictures = 0
        self._restyled = self._camera = 0
        self._received_at: float | None = None
        self._intervals: deque[float] = deque(maxlen=MAX_SAMPLES)
        self._ages: deque[float] = deque(maxlen=MAX_SAMPLES)
        self._server_ages: deque[float] = deque(maxlen=MAX_SAMPLES)
        # Index and instant of receipt of pictures whose age is not decided yet.
        self._undecided: deque[tuple[int, float]] = deque(maxlen=MAX_UNMATCHED)
        # By RTP timestamp: pictures whose mark has not come, and marks whose picture has not.
        self._unmarked: dict[int, float] = {}
        self._unseen: dict[int, tuple[int, float, float, int]] = {}
        self._stats: Mapping[str, Any] | None = None
        self._stats_at = float("-inf")
        self._stats_before: Mapping[str, Any] | None = None

    @property
    def has_restyled(self) -> bool:
        """Whether a restyled picture has been received."""
        return self._restyled_at is not None

    def on_offer(self, now: float) -> None:
        """The offer is being sent."""
        self._offered_at = now

    def on_answer(self, now: float) -> None:
        """The server's answer came."""
        self._answered_at = now

    def on_connected(self, now: float) -> None:
        """The connection is up."""
        self._connected_at = now

    def begin(self, now: float) -> None:
        """From here on it is measured."""
        self._begun_at = now
        self._stats_before = self._stats

    def on_picture(self, rtp_timestamp: int, received_at: float) -> None:
        """The last packet of a picture was received."""
        if self._begun_at is not None and received_at >= self._begun_at:
            self._pictures += 1
            if self._received_at is not None:
                self._intervals.append(received_at - self._received_at)
        self._received_at = received_at
        if (row := self._unseen.pop(rtp_timestamp, None)) is not None:
            self._match(received_at, *row)
            return
        self._unmarked[rtp_timestamp] = received_at
        self._bound(self._unmarked, "pictures_without_mark")

    def on_marks(self, rows: Iterable[Sequence[float]]) -> None:
        """Telemetry `marks`: rows of RTP timestamp, frame index, arrived and released there, kind."""
        frames = [(int(row[0]), int(row[1]), float(row[2]), float(row[3]), int(row[4])) for row in rows]
        if (best := self.clock.best) is not None:
            round_trip_s, offset_s = best
            for _, index, arrived_at, _, _ in frames:
                self.sent.note(index, arrived_at - offset_s, round_trip_s / 2 + CLOCK_SLACK_S)
        for rtp_timestamp, index, arrived_at, released_at, kind in frames:
            received_at = self._unmarked.pop(rtp_timestamp, None)
            if received_at is None:
                self._unseen[rtp_timestamp] = (index, arrived_at, released_at, kind)
                self._bound(self._unseen, "marks_without_picture")
            else:
                self._match(received_at, index, arrived_at, released_at, kind)

    def on_stats(self, stats: Mapping[str, Any], now: float) -> None:
        """Telemetry `stats`; one that was overtaken on its unordered way is left aside."""
        if self._stats is not None and stats["due"] < self._stats["due"]:
            self.losses["stats_overtaken"] += 1
            return
        self._stats, self._stats_at = stats, now
        if self._begun_at is not None and self._stats_before is None:
            self._stats_before = stats

    def on_notice(self, code: str) -> None:
        """The server told the page something."""
        if self._begun_at is not None:
            self.notices[code] += 1

    def figures(self, now: float) -> dict[str, Any]:
        """Figures from `begin` until `now`, in seconds and shares; None where nothing was seen to say it by.

        dmr is the deadline miss rate by the server's own book: of the frames due in this time and settled, the share
        that came late or never. None of the frames that it thins out to the agreed rate is due. It is None where the
        server's figures stopped coming.
        """
        begun_at = now if self._begun_at is None else self._begun_at
        seconds = max(0.0, now - begun_at)
        # A picture that stands still at the end, or never comes, is a freeze too.
        gaps = [*self._intervals, now - max(begun_at, self._received_at or begun_at)]
        matched = self._restyled + self._camera
        undecided = [self._age_s(*picture) for picture in self._undecided]
        ages = [*self._ages, *(age_s for age_s in undecided if age_s is not None)]
        unknown = undecided.count(None)
        losses = self.losses + Counter(ages_unknown=unknown) if unknown else self.losses
        stats = self._stats or {}
        return {
            "seconds": round(seconds, DIGITS),
            "fps": round(self._pictures / seconds, 2) if seconds else 0.0,
            "pictures": self._pictures,
            "restyled_share": round(self._restyled / matched, DIGITS) if matched else None,
            **self._deadlines(now),
            "ttff_s": self._since_offer(self._restyled_at),
            "server_ttff_s": _seconds(stats.get("ttff_ms")),
            "server_ttff_stages_s": {
                name.removesuffix("_ms") + "_s": _seconds(ms) for name, ms in stats.get("ttff", {}).items()
            },
            "answer_s": self._since_offer(self._answered_at),
            "connect_s": self._since_offer(self._connected_at),
            **_quantiles("age", ages),
            "clock_error_s": round(self.clock.best[0] / 2, DIGITS) if self.clock.best else None,
            **_quantiles("server_age", self._server_ages),
            **_quantiles("interval", self._intervals),
            "freezes": sum(gap > FREEZE_S for gap in gaps),
            "longest_gap_s": round(max(gaps), DIGITS),
            "agreed_fps": stats.get("agreed_fps"),
            "rung": stats.get("rung"),
            "notices": dict(self.notices),
            "losses": dict(losses),
        }

    def _deadlines(self, now: float) -> dict[str, Any]:
        before, after = self._stats_before, self._stats
        if before is None or after is None or self._begun_at is None:
            return {"dmr": None, "due": 0, "late": 0, "dropped": {}, "rung_moves": {}}
        due, late = after["due"] - before["due"], after["late"] - before["late"]
        lost = _risen(before["dropped"], after["dropped"])
        settled = due - (after.get("inside", 0) - before.get("inside", 0))
        missed = late + sum(lost.values())
        is_known = settled > 0 and now - self._stats_at <= STALE_S
        dmr = round(min(1.0, missed / settled), DIGITS) if is_known else None
        return {
            "dmr": dmr,
            "due": due,
            "late": late,
            "dropped": lost,
            "rung_moves": _risen(before.get("rung_moves", {}), after.get("rung_moves", {})),
        }

    def _match(self, received_at: float, index: int, arrived_at: float, released_at: float, kind: int) -> None:
        if kind == RESTYLED and (self._restyled_at is None or received_at < self._restyled_at):
            self._restyled_at = received_at
        if self._begun_at is None or received_at < self._begun_at:
            return
        if kind == RESTYLED:
            self._restyled += 1
        else:
            self._camera += 1
        self._server_ages.append(released_at - arrived_at)
        self._undecided.append((index, received_at))
        while self._undecided[0][1] < received_at - SETTLE_S:
            age_s = self._age_s(*self._undecided.popleft())
            if age_s is None:
                self.losses["ages_unknown"] += 1
            else:
                self._ages.append(age_s)

    def _age_s(self, index: int, received_at: float) -> float | None:
        sent_at = self.sent.sent_at(index)
        return None if sent_at is None else received_at - sent_at

    def _bound(self, waiting: dict[int, Any], loss: str) -> None:
        if len(waiting) > MAX_UNMATCHED:
            del waiting[next(iter(waiting))]
            self.losses[loss] += 1

    def _since_offer(self, at: float | None) -> float | None:
        return None if at is None or self._offered_at is None else round(at - self._offered_at, DIGITS)


def fairness(sessions: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """How even it was: worst and mean dmr; least and largest frame rate as a share of the mean, 1 when all had it."""
    misses = [session["dmr"] for session in sessions if session["dmr"] is not None]
    rates = [session["fps"] for session in sessions]
    mean_fps = sum(rates) / len(rates) if rates else 0.0
    return {
        "worst_dmr": max(misses, default=None),
        "mean_dmr": round(sum(misses) / len(misses), DIGITS) if misses else None,
        "share_min": round(min(rates) / mean_fps, DIGITS) if mean_fps else None,
        "share_max": round(max(rates) / mean_fps, DIGITS) if mean_fps else None,
    }


def _quantiles(name: str, values: Iterable[float]) -> dict[str, float | None]:
    ordered = sorted(values)
    found = {share: quantile(ordered, share) for share in (0.5, 0.95, 0.99)}
    return {
        f"{name}_p{round(100 * share)}_s": None if value is None else round(value, DIGITS)
        for share, value in found.items()
    }


def _risen(before: Mapping[str, int], after: Mapping[str, int]) -> dict[str, int]:
    """By how much counters have risen, those that have."""
    return {name: count - before.get(name, 0) for name, count in after.items() if count > before.get(name, 0)}


def _seconds(ms: float | None) -> float | None:
    return None if ms is None else round(ms / 1000, DIGITS)
