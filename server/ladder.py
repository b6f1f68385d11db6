"""What a session gives up when the engine is too slow, and when it gets it back: pure policy, the clock is passed in."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Rung:
    """What a session may have at most. camera: no restyling at all, the plain camera is shown."""

    steps: int
    small: bool
    fps: float
    camera: bool = False
