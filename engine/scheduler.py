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
        drops = []
        for waiting in self._waiting.values():
            while len(waiting) > 1 and waiting[0].deadline < now + cost_s:
                drops.append(Drop(waiting.popleft(), "late"))
        heads = [waiting[0] for waiting in self._waiting.values() if waiting]
        if not heads:
            return None, drops
        # Deadlines may be equal (two pages, one camera): the stream number makes the choice deterministic.
        item = min(heads, key=lambda head: (head.deadline, head.stream))
        self._waiting[item.stream].popleft()
        return item, drops
