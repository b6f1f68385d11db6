"""Requests of the page that wait for the first frame that shows them. Pure: instants are passed in."""

from __future__ import annotations

from dataclasses import dataclass, field

# Nothing is rendered (the camera is off): said to be stored after this long.
ACK_TIMEOUT_S = 2.0
# Pictures flow, but the words are still being read: a text encoder of billions of weights takes seconds on a CPU.
SLOW_ACK_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True)
class Ack:
    """The answer to request `request_id`: the first frame and chunk that show it, or None when none will soon."""

    request_id: int
    first_frame: int | None
    first_chunk: int | None = None


@dataclass(slots=True)
class AckBook:
    """Pending requests: (id, revision that shows it, asked at). Bounded by the rate limit and the timeouts."""

    _pending: list[tuple[int, int, float]] = field(default_factory=list)

    def add(self, request_id: int, revision: int, now: float) -> None:
        """Wait for a frame shaped by `revision` or a later one."""
        self._pending.append((request_id, revision, now))

    def shown(self, frame_index: int, revision: int, chunk: int | None = None) -> list[Ack]:
        """A frame of `chunk`, shaped by `revision`, went out: the requests it answers."""
        return self._take([entry for entry in self._pending if entry[1] <= revision], frame_index, chunk)

    def expired(self, now: float, *, released_at: float = float("-inf")) -> list[Ack]:
        """The requests that have waited long enough: stored, and shown whenever frames flow again.

        released_at: when a picture last went out; while they do, a slow answer is waited for.
        """
        wait_s = SLOW_ACK_TIMEOUT_S if now - released_at < ACK_TIMEOUT_S else ACK_TIMEOUT_S
        return self._take([entry for entry in self._pending if entry[2] + wait_s < now], None)

    def clear(self) -> list[Ack]:
        """Every request: revisions start anew, on a stream that is opened with the current parameters."""
        return self._take(self._pending, None)

    def _take(
        self, entries: list[tuple[int, int, float]], first_frame: int | None, first_chunk: int | None = None
    ) -> list[Ack]:
        self._pending = [entry for entry in self._pending if entry not in entries]
        return [Ack(request_id, first_frame, first_chunk) for request_id, _, _ in entries]
