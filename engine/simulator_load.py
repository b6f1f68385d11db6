"""What comes into a simulation: cameras, and when their chunks are complete. Pure, seeded."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil, exp
from typing import Literal

CHUNK_FRAMES = 4
# A stream's first chunk may be twice as long.
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
    warm_up_s: frames captured before are shown but not judged. starts_s: when each camera begins, where that is known.
    way_s: what a chunk takes from the camera to the engine and back beside it.
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
    warm_up_s: float = WARM_UP_S
    starts_s: tuple[float, ...] = ()
    way_s: float = 0.0

    def __post_init__(self) -> None:
        """Raises ValueError for values out of bounds."""
        if not 1 <= self.sessions <= MAX_SESSIONS:
            raise ValueError(f"sessions must be 1 to {MAX_SESSIONS}, not {self.sessions}")
        if self.starts_s and len(self.starts_s) != self.sessions:
            raise ValueError(f"{len(self.starts_s)} starts must be one for each of {self.sessions} sessions, or none")
        if not 1 <= self.fps <= 240:
            raise ValueError(f"fps must be 1 to 240, not {self.fps}")
        if not 0.01 <= self.budget_s <= 60:
            raise ValueError(f"budget must be 0.01 to 60 s, not {self.budget_s}")
        if not self.warm_up_s < self.seconds <= 3600:
            raise ValueError(f"seconds must be above {self.warm_up_s:g} and at most 3600, not {self.seconds}")

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


class Camera:
    """One session's camera: when each of its chunks is complete, and the chunk.

    fps: may be changed, which counts from the next chunk on.
    """

    def __init__(self, workload: Workload, session: int, start: float, noise: random.Random) -> None:
        self.fps = workload.fps
        self._workload, self._session, self._noise = workload, session, noise
        self._next_at, self._index, self._frames = start, 0, 0
        self._last: tuple[float, ...] = ()

    def __iter__(self) -> Iterator[tuple[float, Chunk]]:
        return self

    def __next__(self) -> tuple[float, Chunk]:
        """The next chunk."""
        workload = self._workload
        if self._next_at >= workload.seconds:
            raise StopIteration
        count = CHUNK_FRAMES if self._index else workload.first_frames
        captured = tuple(self._next_at + i / self.fps for i in range(count))
        chunk = Chunk(self._session, self._index, captured, ceil(count / CHUNK_FRAMES))
        self._frames += len(self._last)
        self._last, self._next_at, self._index = captured, captured[-1] + 1 / self.fps, self._index + 1
        full_at = max(at + self._noise.uniform(0, workload.jitter_s) for at in captured)
        return full_at + workload.way_s, chunk

    def captured_by(self, now: float) -> int:
        """Frames captured until now."""
        return self._frames + sum(at <= now for at in self._last)


def starts_of(workload: Workload, noise: random.Random) -> list[float]:
    """When each camera begins."""
    if workload.starts_s:
        return list(workload.starts_s)
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
