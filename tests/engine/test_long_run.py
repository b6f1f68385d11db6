"""Streams of hours: memory flat, positions bounded, and pictures that do not depend on how long one has been on."""

import gc
import tracemalloc

import pytest
from torch import Tensor

from engine.api import StreamParams
from engine.config import CacheConfig
from engine.pipeline import Mode, Pipeline
from engine.session import SessionState
from tests.engine.streams import FLOW, camera, pooled_model, relative_rms

SIZE = 16
SHORT = FLOW.model_copy(update={"layers": 1})


def pipeline_of(mode: Mode = "sequential", **cache: object) -> Pipeline:
    return Pipeline(pooled_model(SHORT), SIZE, SIZE, mode=mode, streams=1, cache=CacheConfig.model_validate(cache))


class Run:
    """One stream over a loop of chunks."""

    def __init__(self, pipeline: Pipeline, steps: int = 1) -> None:
        self.pipeline = pipeline
        self.state: SessionState = pipeline.open(StreamParams(prompt="neon", steps=steps))
        # From bright to dark, so that no two chunks look alike.
        loop = [camera(4, seed, width=SIZE, height=SIZE) // (seed + 1) for seed in range(6)]
        self.uploads = [pipeline.upload(frames) for frames in loop]
        self.shown = 0

    def go(self, chunks: int) -> Tensor:
        """Render so many chunks; the last frames."""
        for _ in range(chunks):
            frames = self.uploads[self.state.chunks % len(self.uploads)]
            for done in self.pipeline.tick([(self.state, frames)]):
                assert done.chunk == self.shown
                assert done.frames is not None
                self.shown, last = self.shown + 1, done.frames
        return last


def test_five_thousand_chunks_take_no_more_memory_than_fifty() -> None:
    pipeline = pipeline_of()
    run, pool = Run(pipeline), pipeline.pool
    run.go(50)
    stores = (*pool.keys, *pool.values, pool.held, pool.next, pool.sink_looks)
    addresses = [store.untyped_storage().data_ptr() for store in stores]
    gc.collect()
    objects = len(gc.get_objects())
    tracemalloc.start()
    run.go(30)
    grown = []
    for _ in range(4):
        gc.collect()
        before, _ = tracemalloc.get_traced_memory()
        run.go(60)
        gc.collect()
        grown.append(tracemalloc.get_traced_memory()[0] - before)
    tracemalloc.stop()
    run.go(5000 - run.state.chunks)
    gc.collect()
    assert (run.state.chunks, run.shown, run.state.rows[0].seen) == (5000, 5000, 5001)
    assert [store.untyped_storage().data_ptr() for store in stores] == addresses
    # 60 chunks at 70 bytes each would show in every span; what other threads or a first call allocate shows in one.
    # A tensor kept from every chunk would be 5,000 objects below.
    assert min(grown) < 4096, grown
    assert len(gc.get_objects()) - objects < 200
    assert len(run.state.history) == pool.window
    assert len(pool._row_tensors) <= 4


@pytest.mark.parametrize("mode", ["sequential", "batch"])
@pytest.mark.parametrize("positions", ["relative", "refresh", "absolute"])
def test_positions_stay_within_their_bound_past_the_published_table_of_1024(mode: Mode, positions: str) -> None:
    pipeline = pipeline_of(mode, positions=positions)
    run, pool = Run(pipeline, steps=2), pipeline.pool
    run.go(8)
    # As if an hour had gone by: 5 latent frames a second.
    for row in run.state.rows[:2]:
        if positions == "absolute":
            pool.held[row.index, pool.sinks :] += 18_000
            pool.next[row.index] += 18_000
    largest = 0
    for _ in range(120):
        frames = run.go(1)
        assert frames.float().std() > 0
        held = pool.held[[run.state.rows[0].index]]
        largest = max(largest, int(pool._places(held, held.argmax(dim=1, keepdim=True)).max()))
    bound = {"relative": pool.window - 1, "refresh": pool.cache.refresh_at - 1, "absolute": 18_000 + 8 + 120}
    assert largest == bound[positions]


def test_a_loop_looks_the_same_after_a_thousand_chunks() -> None:
    """Sinks stay and positions are places in the window, so that nothing but the noise tells an hour from a minute."""
    pipeline = Pipeline(
        pooled_model(SHORT),
        SIZE,
        SIZE,
        streams=1,
        sampling=pooled_model().config.sampling.model_copy(update={"noise": "fixed"}),
    )
    run = Run(pipeline)
    run.pipeline.set_params(run.state, run.state.params.model_copy(update={"strength": 0.4}))
    early = run.go(30).float()
    late = run.go(1002).float()
    assert relative_rms(late, early) < 1e-3
    assert relative_rms(run.go(1).float(), early) > 1e-1
