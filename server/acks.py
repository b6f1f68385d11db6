"""Requests of the page that wait for the first frame that shows them. Pure: instants are passed in."""

from __future__ import annotations

from dataclasses import dataclass, field

ACK_TIMEOUT_S = 2.0


@dataclass(frozen=True, slots=True)
class Ack:
    """The answer to request `request_id`: the first frame that shows it, or None when none will soon."""

    request_id: int
    first_frame: int | None


@dataclass(slots=True)
class AckBook:
    """Pending requests: (id, revision that shows it, when waiting ends). Bounded by the rate limit and the timeout."""

    _pending: list[tuple[int, int, float]] = field(default_factory=list)

    def add(self, request_id: int, revision: int, now: float) -> None:
        """Wait for a frame shaped by `revision` or a later one."""
        self._pending.append((request_id, revision, now + ACK_TIMEOUT_S))

    def shown(self, frame_index: int, revision: int) -> list[Ack]:
        """A frame shaped by `revision` went out: the requests it answers."""
        return self._take([entry for entry in self._pending if entry[1] <= revision], frame_index)

    def expired(self, now: float) -> list[Ack]:
        """The requests that have waited long enough: stored, and shown whenever frames flow again."""
        return self._take([entry for entry in self._pending if entry[2] < now], None)

    def clear(self) -> list[Ack]:
        """Every request: revisions start anew, on a stream that is opened with the current parameters."""
        return self._take(self._pending, None)

    def _take(self, entries: list[tuple[int, int, float]], first_frame: int | None) -> list[Ack]:
        self._pending = [entry for entry in self._pending if entry not in entries]
        return [Ack(request_id, first_frame) for request_id, _, _ in entries]
