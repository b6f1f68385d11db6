"""What a rank renders before it serves: until everything runs at its usual speed, and what that speed is."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import numpy as np

from engine.api import EngineState, StreamParams
from engine.config import EngineSettings
from engine.cost_book import CostBook
from engine.cost_model import Work
from engine.pipeline import Pipeline
from engine.session import SessionState

WARM_UP_CHUNKS = 5
WARM_UP_PROMPT = "watercolor painting"
# What the profile of other steps, sizes and numbers of streams may take at the start; the rest is learned in service.
PROFILE_S = 5.0
# Passes of each number of steps in the profile; the first is not counted.
PROFILE_PASSES = 4
Passes = list[tuple[Work, float]]
Tell = Callable[[EngineState, int, str], None]


def warm_up(
    pipeline: Pipeline, small: Pipeline | None, settings: EngineSettings, book: CostBook, tell: Tell
) -> Passes | None:
    """Render until everything runs at its usual speed; returns what passes of each kind took then, in seconds.

    With compiled passes also what else may come: other numbers of steps, and several streams in a pass. None where the
    usual pass takes what an earlier run has learned: the others run once and are not measured again.
    """
    return _WarmUp(settings, tell).run(pipeline, small, book)


class _WarmUp:
    def __init__(self, settings: EngineSettings, tell: Tell) -> None:
        self._settings, self._tell = settings, tell
        profile = settings.profile
        self._params = StreamParams(prompt=WARM_UP_PROMPT, steps=profile.steps)
        self._first, self._later = (
            np.zeros((count, settings.height, settings.width, 3), np.uint8)
            for count in (profile.first_chunk_frames, profile.chunk_frames)
        )
        self._taken: dict[Work, list[float]] = {}

    def run(self, pipeline: Pipeline, small: Pipeline | None, book: CostBook) -> Passes | None:
        # Past the filling of the window: from then on every chunk costs the same.
        chunks = max(WARM_UP_CHUNKS, pipeline.pool.window + 2)
        states = [pipeline.open(self._params)]
        for done in range(chunks):
            self._tell(EngineState.WARMING, 55 + 40 * done // chunks, "warming up")
            self._chunk(pipeline, states)
        known = any(work == pipeline.work and book.stands(work, seconds) for work, seconds in self._medians())
        until = time.monotonic() + PROFILE_S
        self._measure(pipeline, states, 95, chunks, until, briefly=known)
        if small is not None:
            states = [small.open(self._params)]
            for _ in range(1 if known else chunks):
                self._chunk(small, states)
            self._measure(small, states, 97, chunks, until, briefly=known)
        return None if known else self._medians()

    def _measure(
        self, pipeline: Pipeline, states: list[SessionState], percent: int, chunks: int, until: float, *, briefly: bool
    ) -> None:
        """Other steps, the light VAE and several streams in a pass; closes the streams. briefly: what has kernels of
        its own once, and nothing else."""
        compiled = self._settings.compile
        if not briefly:
            self._measure_steps(pipeline, states, percent, until)
        if pipeline.model.light_vae is not None:
            self._tell(EngineState.WARMING, percent, "measuring the light VAE")
            pipeline.set_params(states[0], self._params.model_copy(update={"light": True}))
            for _ in range(1 if briefly else PROFILE_PASSES):
                self._chunk(pipeline, states)
            pipeline.set_params(states[0], self._params)
            # Back to the full one, whose first chunk is longer than the others.
            self._chunk(pipeline, states)
        for count in range(2, self._settings.micro_batch + 1):
            if briefly:
                break
            self._tell(EngineState.WARMING, percent, f"measuring {count} streams in a pass")
            states.append(pipeline.open(self._params))
            for _ in range(chunks):
                if compiled or time.monotonic() < until:
                    self._chunk(pipeline, states)
        for state in states:
            pipeline.close(state)

    def _measure_steps(self, pipeline: Pipeline, states: list[SessionState], percent: int, until: float) -> None:
        compiled = self._settings.compile
        # Cost goes straight with steps; only compilation has to see each number.
        ends = {1, self._params.steps, pipeline.max_steps}
        for steps in range(1, pipeline.max_steps + 1) if compiled else sorted(ends):
            self._tell(EngineState.WARMING, percent, f"measuring {steps} steps")
            pipeline.set_params(states[0], self._params.model_copy(update={"steps": steps}))
            for _ in range(max(PROFILE_PASSES, steps + 2)):
                if compiled or time.monotonic() < until:
                    self._chunk(pipeline, states)
        pipeline.set_params(states[0], self._params)

    def _chunk(self, pipeline: Pipeline, streams: Sequence[SessionState]) -> None:
        started = time.monotonic()
        jobs = [(state, pipeline.upload(self._later if state.chunks else self._first)) for state in streams]
        for rendered in pipeline.tick(jobs):
            if rendered.frames is not None:
                pipeline.lanes.download(rendered.frames).wait()
        if pipeline.work is not None:
            self._taken.setdefault(pipeline.work, []).append(time.monotonic() - started)

    def _medians(self) -> Passes:
        # The first pass of a kind may be slow, and those over a window that is not yet full come once.
        return [(work, statistics.median(seconds[1:])) for work, seconds in self._taken.items() if len(seconds) > 1]
