"""Waiting in tests: for a condition, and never for a time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

PATIENCE_S = 90.0
POLL_S = 0.02


async def until(condition: Callable[[], object], what: str) -> None:
    """Wait until it holds; AssertionError, naming `what`, when it does not in time."""
    try:
        async with asyncio.timeout(PATIENCE_S):
            while not condition():
                await asyncio.sleep(POLL_S)
    except TimeoutError:
        raise AssertionError(f"waited {PATIENCE_S:.0f} s in vain for {what}") from None
