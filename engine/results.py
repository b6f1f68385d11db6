"""What an engine hands back to one stream's reader: bounded, newest kept, an error last. Shared by every engine."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator

from engine.api import EngineError, RenderedChunk, StreamCounters

# A reader this far behind (two thirds of a second at 24 fps) has no use for the oldest chunk any more.
MAX_UNREAD = 4


class ResultQueue:
    """Rendered chunks of one stream, in order. One reader."""

    def __init__(self, counters: StreamCounters) -> None:
        self._counters = counters
        self._chunks: deque[RenderedChunk] = deque()
        self._error: EngineError | None = None
        self._arrived = asyncio.Event()

    def put(self, chunk: RenderedChunk) -> None:
        """Add a chunk; past MAX_UNREAD the oldest is dropped and counted as `reader_behind`."""
        self._counters.rendered += 1
        self._chunks.append(chunk)
        while len(self._chunks) > MAX_UNREAD:
            self._counters.drop("reader_behind", len(self._chunks.popleft().frames))
        self._arrived.set()

    def fail(self, error: EngineError) -> None:
        """End the stream: the reader gets what was rendered, then the error."""
        self._error = error
        self._arrived.set()

    @property
    def error(self) -> EngineError | None:
        """Why the stream ended, if it has."""
        return self._error

    async def __aiter__(self) -> AsyncIterator[RenderedChunk]:
        """Chunks as they come; raises the error that ended the stream."""
        while True:
            while self._chunks:
                yield self._chunks.popleft()
            if self._error is not None:
                raise self._error
            self._arrived.clear()
            await self._arrived.wait()
