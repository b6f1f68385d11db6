"""What `livebrush doctor` measures: the engine as users start it, for a few seconds."""

from __future__ import annotations

import asyncio
import itertools
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from engine.api import Capacity, Engine, FrameChunk, StreamParams
from engine.config import CHUNK_FRAMES
from server.admission import seats
from server.doctor_checks import Finding, Level, size_words
from server.ladder import Ladder
from server.settings import ServerSettings
from server.starting import start_engine

MEASURED_CHUNKS = 12
# For the measurement alone, with the time that the words of a style take to be read.
MEASURE_TIMEOUT_S = 300.0


@dataclass(frozen=True, slots=True)
class Cost:
    """A chunk at a number of steps, full or small size, with either VAE: ms in the mean, and nearly never above."""

    steps: int
    small: bool
    mean_ms: float
    upper_ms: float
    light: bool = False


@dataclass(frozen=True, slots=True)
class Measured:
    """What the engine did here. sessions: that many at `min_fps`; fps: for one session alone.

    costs: of a chunk by steps and size, from the engine's cost model. state_bytes: of one session's stream.
    """

    chunk_ms: float
    start_s: float
    fps: float
    sessions: int
    costs: tuple[Cost, ...] = ()
    state_bytes: int = 0


async def measure_engine(engine: Engine, settings: ServerSettings) -> Measured:
    """Start the engine and render chunks one after the other."""
    began_at = time.monotonic()
    try:
        await start_engine(engine)
        start_s = time.monotonic() - began_at
        async with asyncio.timeout(MEASURE_TIMEOUT_S):
            took_s = await _chunk_costs(engine, settings)
        capacity = engine.capacity
    finally:
        await engine.close()
    cost_s = statistics.median(took_s)
    if not capacity.costs:
        capacity = Capacity(cost_s, settings.engine.max_streams, 0, CHUNK_FRAMES)
    alone = Ladder(settings, capacity, steps_max=settings.steps, wish=settings.steps, now=0.0).rung
    costs = tuple(
        Cost(cost.steps, cost.small, round(cost.mean_s * 1e3, 1), round(cost.upper_s * 1e3, 1), cost.light)
        for cost in capacity.costs
    )
    return Measured(
        chunk_ms=round(cost_s * 1e3, 1),
        start_s=round(start_s, 1),
        fps=alone.fps,
        sessions=seats(capacity, settings),
        costs=costs,
        state_bytes=capacity.state_bytes,
    )


async def _chunk_costs(engine: Engine, settings: ServerSettings) -> list[float]:
    """Engine seconds of each of MEASURED_CHUNKS chunks of noise, with the steps that `serve` begins with."""
    width, height = engine.frame_size
    capacity = engine.capacity
    first = max(capacity.first_chunk_frames, capacity.chunk_frames)
    noise = np.random.default_rng(0).integers(0, 256, (first, height, width, 3), np.uint8)
    # A stream batch gives a chunk back when the last of its steps is done: with as many newer ones inside.
    inside = settings.steps - 1 if settings.engine.mode == "batch" else 0
    costs: list[float] = []
    finished_at = 0.0
    params = StreamParams(prompt="watercolour painting", steps=settings.steps)
    async with engine.open_stream("doctor", params) as stream:
        results = aiter(stream)
        for index in itertools.count():
            now = time.monotonic()
            frames = noise if index == 0 else noise[: capacity.chunk_frames]
            indices = tuple(range(index * first, index * first + len(frames)))
            stream.submit(FrameChunk(index, frames, indices, (now,) * len(frames), now + MEASURE_TIMEOUT_S))
            if index < inside:
                # Until it is taken up: more than two that wait would push it out.
                await asyncio.sleep(2 * capacity.chunk_cost_s)
                continue
            rendered = await anext(results)
            # One that was withheld (its words are not read yet) costs less than it will.
            if not rendered.fault:
                costs.append(rendered.engine_finished_at - max(rendered.engine_started_at, finished_at))
            finished_at = rendered.engine_finished_at
            if len(costs) == MEASURED_CHUNKS:
                break
    return costs


def check_costs(measured: Measured) -> Iterator[Finding]:
    """What the cost model says of a chunk by steps, VAE and size, and what a session keeps in memory."""
    for light, small in ((False, False), (False, True), (True, False), (True, True)):
        told = [
            f"{cost.steps} step{'s' if cost.steps > 1 else ''} {cost.mean_ms:.0f} ({cost.upper_ms:.0f})"
            for cost in measured.costs
            if (cost.light, cost.small) == (light, small)
        ]
        if told:
            size = "smaller size, ms" if small else "full size, ms in the mean (nearly always below)"
            vae = "light VAE, " if light else ""
            yield Finding("chunk cost", Level.OK, f"{vae}{size}: {', '.join(told)}")
    if measured.state_bytes:
        yield Finding("state", Level.OK, f"{size_words(measured.state_bytes)} a session")


def judge(measured: Measured, settings: ServerSettings) -> Finding:
    """How fast that is, beside what the settings promise."""
    size = f"{settings.engine.width}x{settings.engine.height}"
    possible = CHUNK_FRAMES / measured.chunk_ms * 1e3
    steps = f" with {settings.steps} steps" if settings.steps > 1 else ""
    text = (
        f"{measured.chunk_ms:.0f} ms for {CHUNK_FRAMES} frames of {size}{steps}, {measured.start_s:.1f} s to start:"
        f" {measured.fps:g} fps for one session, {measured.sessions} session{'s' if measured.sessions > 1 else ''}"
        f" at {settings.min_fps:g} fps or more"
    )
    if possible < settings.min_fps:
        return Finding("speed", Level.WARNING, f"{text} would need a faster machine", "serve a smaller --size")
    if measured.fps < settings.max_fps:
        return Finding(
            "speed", Level.WARNING, text, f"{settings.max_fps:g} fps need a faster or idle CPU, or less --size"
        )
    return Finding("speed", Level.OK, text)
