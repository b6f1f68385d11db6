"""The status of an engine and those who wait until it renders. Shared by every engine."""

from __future__ import annotations

import asyncio

from engine.api import EngineError, EngineState, EngineStatus


class Readiness:
    """Holds the newest status and wakes whoever waits for `ready`."""

    def __init__(self) -> None:
        self.status = EngineStatus(EngineState.STARTING, 0)
        self._changed = asyncio.Condition()

    async def set(self, status: EngineStatus) -> None:
        """Take a new status."""
        self.status = status
        async with self._changed:
            self._changed.notify_all()

    async def wait(self) -> None:
        """Return when the engine is ready. Raises EngineError once it failed for good or was closed."""
        async with self._changed:
            while self.status.state is not EngineState.READY:
                if self.status.state in (EngineState.FAILED, EngineState.CLOSED):
                    raise EngineError(f"engine {self.status.state}: {self.status.detail}")
                await self._changed.wait()
