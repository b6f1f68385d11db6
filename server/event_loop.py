"""An event loop that knows how busy it is: all the time in which it is not waiting for something to happen.

CPU time tells too little. At 12 sessions of 24 fps on two busy cores the loop's thread had used 0.34 of a core and was
late for everything: for the rest of the time it waited for a core, or for Python's lock, which the codec threads hold
now and then.
"""

from __future__ import annotations

import asyncio
import selectors
import time
from collections.abc import Callable


class IdleSelector(selectors.DefaultSelector):
    """Counts `idle_s`. What a wait takes beyond its timeout is lateness, and so not idle."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self.idle_s = 0.0
        self._clock = clock

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        """See `selectors.BaseSelector`."""
        began_at = self._clock()
        ready = super().select(timeout)
        waited_s = self._clock() - began_at
        self.idle_s += waited_s if timeout is None else min(waited_s, max(0.0, timeout))
        return ready


class BusyLoop(asyncio.SelectorEventLoop):
    """The loop of `livebrush serve`."""

    def __init__(self) -> None:
        self._idle = IdleSelector()
        self._began_at = time.monotonic()
        super().__init__(self._idle)

    def busy_s(self) -> float:
        """Seconds in which it was not waiting, since it was made."""
        return time.monotonic() - self._began_at - self._idle.idle_s


def busy_s() -> float:
    """Seconds in which the loop that runs was busy; of one that does not count them, its thread's CPU time."""
    loop = asyncio.get_running_loop()
    return loop.busy_s() if isinstance(loop, BusyLoop) else time.thread_time()
