"""The chunks of a session that are inside the engine, and what becomes of each. Pure but for the figures it books."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from engine.api import EngineStream, FrameChunk, RenderedChunk
from engine.config import MAX_STEPS
from server.metrics import SessionMetrics

# Chunks whose camera frames are kept until the restyled ones return: the engine's four slots and one, and those that
# a stream batch holds until their last step.
MAX_SOURCES = 5 + MAX_STEPS - 1


class ChunkBook:
    """Camera frames of every chunk submitted, until it returns or is lost; losses and their reasons go to `metrics`."""

    def __init__(self, metrics: SessionMetrics, clock: Callable[[], float]) -> None:
        self._metrics = metrics
        self._clock = clock
        self._sources: dict[int, FrameChunk] = {}
        self._drops = self._reanchored = 0
        # Chunks that this stream lost, by reason, as far as they are in the books.
        self._reasons_given: Counter[str] = Counter()

    def open(self) -> None:
        """A stream begins, and counts anew."""
        self._sources.clear()
        self._drops = self._reanchored = 0
        self._reasons_given.clear()

    def clear(self) -> None:
        """Forget what is inside, without a word: the session has ended or the stream broke."""
        self._sources.clear()

    def add(self, stream: EngineStream, chunk: FrameChunk) -> None:
        """A chunk is about to be submitted."""
        self._sources[chunk.index] = chunk
        while len(self._sources) > MAX_SOURCES:
            self._lose(stream, next(iter(self._sources)), "source_forgotten")

    def take(self, stream: EngineStream, chunk: RenderedChunk) -> FrameChunk | None:
        """A chunk came back: its camera frames, None where it had been given up. Those it overtook are lost."""
        for index in [index for index in self._sources if index < chunk.index]:
            self._lose(stream, index, "engine_unexplained")
        return self._sources.pop(chunk.index, None)

    def count(self, stream: EngineStream) -> None:
        """Book what the stream has counted since the last call."""
        dropped = stream.counters.frames_dropped
        self._metrics.on_engine_lost(dropped - self._drops)
        self._drops = dropped
        self._metrics.on_reanchored(stream.counters.reanchored - self._reanchored)
        self._reanchored = stream.counters.reanchored

    def lose_all(self, stream: EngineStream, reason: str) -> None:
        """The stream broke: what was on its way through the engine is lost."""
        self.count(stream)
        for index in list(self._sources):
            self._lose(stream, index, reason)

    def give_up(self, reason: str) -> None:
        """Nobody waits any more for what is inside."""
        for chunk in self._sources.values():
            self._metrics.on_dropped(self._clock(), reason, chunk.frame_indices)
        self._sources.clear()

    def _lose(self, stream: EngineStream, index: int, otherwise: str) -> None:
        """A chunk will not come back, or not in time to have its camera frames beside it.

        The engine counts its losses by reason and not by chunk, and results come in order: a chunk that was
        overtaken has one of the reasons not given out yet. otherwise: the reason when there is none.
        """
        chunk = self._sources.pop(index)
        lost = stream.counters.dropped
        reason = next((name for name in lost if lost[name] > self._reasons_given[name]), None)
        if reason is not None:
            self._reasons_given[reason] += 1
            otherwise = reason if reason.startswith("engine_") else f"engine_{reason}"
        self._metrics.on_dropped(self._clock(), otherwise, chunk.frame_indices)
