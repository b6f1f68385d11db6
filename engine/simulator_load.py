"""What comes into a simulation: cameras, and when their chunks are complete. Pure, seeded."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil, exp
from typing import Literal

CHUNK_FRAMES = 4
# Frames captured before are shown but not judged: a stream's first chunk may be twice as long.
WARM_UP_S = 2.0
MAX_SESSIONS = 512

Arrivals = Literal["even", "poisson"]


@dataclass(frozen=True)
class Workload:
    """What comes in.

    sessions: cameras. fps: of each. budget_s: a frame shown later after its capture is a miss. seconds: simulated.
    arrivals: whether the cameras' chunks are spread evenly, or the sessions come at random instants of the first
    second and lie as they fall. jitter_s: the most by which a frame arrives late. saturated: a chunk of every session
    always waits, and nothing is ever late: how much can be rendered at all. first_frames: of a stream's first chunk.
    """

    sessions: int = 1
    fps: float = 16.0
    budget_s: float = 0.5
    seconds: float = 20.0
    arrivals: Arrivals = "even"
    jitter_s: float = 0.005
    saturated: bool = False
    first_frames: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        """Raises ValueError for values out of bounds."""
        if not 1 <= self.sessions <= MAX_SESSIONS:
            raise ValueError(f"sessions must be 1 to {MAX_SESSIONS}, not {self.sessions}")
        if not 1 <= self.fps <= 240:
            raise ValueError(f"fps must be 1 to 240, not {self.fps}")
        if not 0.01 <= self.budget_s <= 60:
            raise ValueError(f"budget must be 0.01 to 60 s, not {self.budget_s}")
        if not WARM_UP_S < self.seconds <= 3600:
            raise ValueError(f"seconds must be above {WARM_UP_S} and at most 3600, not {self.seconds}")

    @property
    def period_s(self) -> float:
        """Between chunks of one session."""
        return CHUNK_FRAMES / self.fps


@dataclass
class Chunk:
    """Frames of one camera that are rendered together. captured: instants; latents: latent frames."""

    session: int
    index: int
    captured: tuple[float, ...]
    latents: int


def chunks_of(workload: Workload, session: int, start: float, noise: random.Random) -> Iterator[tuple[float, Chunk]]:
    """When each chunk of a camera is complete, and the chunk."""
    index, frame = 0, 0
    while True:
        count = workload.first_frames if index == 0 else CHUNK_FRAMES
        captured = tuple(start + (frame + i) / workload.fps for i in range(count))
        if captured[0] >= workload.seconds:
            return
        chunk = Chunk(session, index, captured, ceil(count / CHUNK_FRAMES))
        yield max(at + noise.uniform(0, workload.jitter_s) for at in captured), chunk
        index, frame = index + 1, frame + count


def starts_of(workload: Workload, noise: random.Random) -> list[float]:
    """When each camera begins."""
    if workload.arrivals == "even":
        return [workload.period_s * i / workload.sessions for i in range(workload.sessions)]
    return sorted(noise.uniform(0, max(1.0, workload.period_s)) for _ in range(workload.sessions))


def stretch(noise: random.Random, spread: float) -> float:
    """A factor of mean 1."""
    return exp(noise.gauss(-spread * spread / 2, spread)) if spread else 1.0


def backlog(workload: Workload, count: int) -> list[tuple[float, Chunk]]:
    """As many chunks, all there at once, the sessions in turn."""
    frames = [workload.first_frames] + [CHUNK_FRAMES] * count
    return [(0.0, Chunk(i % workload.sessions, i, (0.0,) * n, ceil(n / CHUNK_FRAMES))) for i, n in enumerate(frames)]
