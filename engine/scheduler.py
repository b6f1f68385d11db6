"""Which chunk the rank renders next, and which chunks are given up: pure policy, no torch, no clock of its own.

Earliest deadline first over all streams. The input never queues: a stream holds at most MAX_WAITING chunks, the oldest
is dropped whole; a chunk that can no longer meet its deadline is dropped only when a newer one of its stream waits, so
that an overloaded engine shows late pictures rather than none.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

MAX_WAITING = 2


@dataclass(frozen=True, slots=True)
class Item:
    """One waiting chunk of one stream. deadline: monotonic seconds, of its oldest frame."""

    stream: int
    chunk: int
    slot: int
    frames: int
    deadline: float


@dataclass(frozen=True, slots=True)
class Drop:
    """A chunk given up, and why."""

    item: Item
    reason: str


@dataclass
class Scheduler:
    """The waiting chunks of every open stream."""

    _waiting: dict[int, deque[Item]] = field(default_factory=dict)

    def open(self, stream: int) -> None:
        """Take chunks of this stream from now on."""
        self._waiting[stream] = deque()

    def close(self, stream: int) -> None:
        """Forget the stream and whatever waits in it."""
        self._waiting.pop(stream, None)

    def push(self, item: Item) -> list[Drop]:
        """Add a chunk; returns the oldest ones pushed out. A chunk of a closed stream is dropped itself."""
        waiting = self._waiting.get(item.stream)
        if waiting is None:
            return [Drop(item, "stream_closed")]
        waiting.append(item)
        drops = []
        while len(waiting) > MAX_WAITING:
            drops.append(Drop(waiting.popleft(), "engine_behind"))
        return drops

    def pick(self, now: float, cost_s: float) -> tuple[Item | None, list[Drop]]:
        """The chunk to render at `now` when rendering takes `cost_s`, and the chunks given up on the way."""
        items, drops = self.pick_batch(now, cost_s, 1)
        return (items[0] if items else None), drops

    def pick_batch(self, now: float, cost_s: float, limit: int) -> tuple[list[Item], list[Drop]]:
        """The chunks to render together at `now`, each of another stream, and the chunks given up on the way.

        Args:
            cost_s: of one chunk. A chunk joins as long as the first one would be in time if all came after each other.
            limit: most chunks of one pass.
        """
        drops = []
        for waiting in self._waiting.values():
            while len(waiting) > 1 and waiting[0].deadline < now + cost_s:
                drops.append(Drop(waiting.popleft(), "late"))
        # Deadlines may be equal (two pages, one camera): the stream number makes the choice deterministic.
        heads = sorted(
            (waiting[0] for waiting in self._waiting.values() if waiting), key=lambda head: (head.deadline, head.stream)
        )
        items = [
            head
            for place, head in enumerate(heads[:limit])
            if place == 0 or now + (place + 1) * cost_s <= heads[0].deadline
        ]
        for item in items:
            self._waiting[item.stream].popleft()
        return items, drops
