"""The contract of engine.api, kept by the fake and by a real rank process alike."""

import asyncio
import json
import os
import shutil
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Literal
from unittest.mock import Mock

import numpy as np
import psutil
import pytest

from engine.api import (
    EngineError,
    EngineFull,
    EngineNotReady,
    EngineState,
    EngineStream,
    FrameChunk,
    RankLost,
    RenderedChunk,
    StreamParams,
    Understood,
)
from engine.client import LocalEngine, LocalStream
from engine.config import EngineSettings
from engine.fake import FakeEngine, tint
from engine.frame_memory import FrameLayout, FrameMemory
from engine.messages import Done, Status

SIZE = 64
FAR = 1e12
AnyEngine = LocalEngine | FakeEngine


def chunk(index: int, frames: int = 4, *, seed: int = 0, deadline: float = FAR) -> FrameChunk:
    pixels = np.random.default_rng([seed, index]).integers(0, 256, (frames, SIZE, SIZE, 3)).astype(np.uint8)
    first = index * 10
    return FrameChunk(index, pixels, tuple(range(first, first + frames)), tuple(map(float, range(frames))), deadline)


async def next_chunk(stream: EngineStream) -> RenderedChunk:
    async with asyncio.timeout(60):
        return await anext(aiter(stream))


async def render(stream: EngineStream, chunks: list[FrameChunk]) -> list[RenderedChunk]:
    """Submit one by one, waiting for each, so that nothing is dropped."""
    rendered = []
    for one in chunks:
        stream.submit(one)
        rendered.append(await next_chunk(stream))
    return rendered


@pytest.fixture(params=["fake", "local"])
async def engine(request: pytest.FixtureRequest, model_dir: Path) -> AsyncIterator[AnyEngine]:
    settings = EngineSettings(model=str(model_dir), width=SIZE, height=SIZE, max_streams=2)
    made: AnyEngine = (
        FakeEngine(SIZE, SIZE, delay_s=0.01, max_streams=2) if request.param == "fake" else LocalEngine(settings)
    )
    await made.start()
    async with asyncio.timeout(120):
        await made.wait_ready()
    yield made
    await made.close()


async def test_frames_come_back_with_their_identity(engine: AnyEngine) -> None:
    sent = [chunk(0, frames=1), chunk(1), chunk(2)]
    async with engine.open_stream("s", StreamParams(prompt="neon")) as stream:
        rendered = await render(stream, sent)
    for before, after in zip(sent, rendered, strict=True):
        assert (after.index, after.frame_indices, after.captured_at) == (
            before.index,
            before.frame_indices,
            before.captured_at,
        )
        assert after.frames.shape == before.frames.shape and after.frames.dtype == np.uint8
        assert not np.array_equal(after.frames, before.frames)
        assert after.engine_started_at <= after.engine_finished_at
    assert stream.counters.submitted == stream.counters.rendered == 3
    assert stream.counters.frames_dropped == 0


async def test_an_update_shows_from_a_chunk_border_on_and_says_which(engine: AnyEngine) -> None:
    async with engine.open_stream("s", StreamParams(prompt="neon")) as stream:
        (before,) = await render(stream, [chunk(0)])
        revision = stream.update(StreamParams(prompt="watercolor"))
        (after,) = await render(stream, [chunk(1)])
    assert before.revision == 0
    assert after.revision == revision == 1


async def test_two_streams_never_touch_each_other(engine: AnyEngine) -> None:
    """Interleaved streams give bit for bit what each gives alone."""
    ours, theirs = [chunk(i, seed=1) for i in range(6)], [chunk(i, seed=2) for i in range(6)]
    async with engine.open_stream("alone", StreamParams(prompt="neon")) as stream:
        alone = await render(stream, ours)
    async with (
        engine.open_stream("one", StreamParams(prompt="neon")) as one,
        engine.open_stream("two", StreamParams(prompt="ink", seed=7)) as two,
    ):
        together = []
        for our, their in zip(ours, theirs, strict=True):
            two.submit(their)
            together += await render(one, [our])
            await next_chunk(two)
            two.update(StreamParams(prompt=f"water {our.index}"))
    for a, b in zip(alone, together, strict=True):
        np.testing.assert_array_equal(a.frames, b.frames)


async def test_a_flood_is_dropped_and_counted_never_queued(engine: AnyEngine) -> None:
    async with engine.open_stream("s", StreamParams()) as stream:
        for index in range(40):
            stream.submit(chunk(index))
        newest = -1
        while stream.counters.rendered + sum(stream.counters.dropped.values()) < 40:
            rendered = await next_chunk(stream)
            assert rendered.index > newest
            newest = rendered.index
    assert stream.counters.dropped and stream.counters.rendered < 40
    assert stream.counters.frames_dropped == 4 * sum(stream.counters.dropped.values())


async def test_seats_are_bounded_and_given_back(engine: AnyEngine) -> None:
    async with engine.open_stream("a", StreamParams()), engine.open_stream("b", StreamParams()):
        assert engine.capacity.open_streams == 2
        with pytest.raises(EngineFull, match="2 streams"):
            async with engine.open_stream("c", StreamParams()):
                pass
    assert engine.capacity.open_streams == 0
    for _ in range(5):
        async with engine.open_stream("again", StreamParams()) as stream:
            await render(stream, [chunk(0)])


async def test_frames_of_a_wrong_shape_are_refused_by_name(engine: AnyEngine) -> None:
    async with engine.open_stream("s", StreamParams()) as stream:
        bad = FrameChunk(0, np.zeros((4, SIZE, SIZE // 2, 3), np.uint8), (0, 1, 2, 3), (0.0,) * 4, FAR)
        with pytest.raises(ValueError, match="shape"):
            stream.submit(bad)
        await render(stream, [chunk(1)])


async def test_a_closed_engine_hangs_nobody(engine: AnyEngine) -> None:
    async with engine.open_stream("s", StreamParams()) as stream:
        waiting = asyncio.create_task(next_chunk(stream))
        await asyncio.sleep(0)
        await engine.close()
        with pytest.raises(RankLost):
            await waiting
        with pytest.raises(RankLost):
            stream.submit(chunk(0))
    assert engine.status.state is EngineState.CLOSED
    with pytest.raises(EngineError):
        await engine.wait_ready()


async def test_a_fake_that_loads_says_not_ready() -> None:
    engine = FakeEngine(load_s=60)
    await engine.start()
    with pytest.raises(EngineNotReady):
        async with engine.open_stream("s", StreamParams()):
            pass
    await engine.close()


async def test_a_killed_rank_is_reported_and_replaced(model_dir: Path) -> None:
    engine = LocalEngine(EngineSettings(model=str(model_dir), width=SIZE, height=SIZE))
    await engine.start()
    try:
        async with asyncio.timeout(120):
            await engine.wait_ready()
            first = engine.pid
            assert first is not None
            async with engine.open_stream("s", StreamParams()) as stream:
                await render(stream, [chunk(0)])
                os.kill(first, signal.SIGKILL)
                with pytest.raises(RankLost):
                    await next_chunk(stream)
            await engine.wait_ready()
            assert engine.pid != first and engine.restarts == 1
            async with engine.open_stream("s", StreamParams()) as stream:
                await render(stream, [chunk(0)])
    finally:
        await engine.close()


async def test_closing_leaves_no_process_descriptor_or_task(model_dir: Path) -> None:
    us = psutil.Process()
    before = us.num_fds()
    engine = LocalEngine(EngineSettings(model=str(model_dir), width=SIZE, height=SIZE))
    await engine.start()
    async with asyncio.timeout(120):
        await engine.wait_ready()
    pid = engine.pid
    async with engine.open_stream("s", StreamParams()) as stream:
        await render(stream, [chunk(0)])
    await engine.close()
    assert pid is not None and not psutil.pid_exists(pid)
    assert asyncio.all_tasks() == {asyncio.current_task()}
    assert us.num_fds() <= before + 1  # the loop's own child watcher may keep one


async def test_an_unknown_model_is_refused_before_any_process() -> None:
    engine = LocalEngine(EngineSettings(model="nothing-like-it"))
    with pytest.raises(FileNotFoundError, match="known:"):
        await engine.start()


async def test_a_damaged_model_fails_once_with_its_reason(model_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(model_dir, tmp_path / "damaged")
    weights = tmp_path / "damaged" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    engine = LocalEngine(EngineSettings(model=str(tmp_path / "damaged")))
    await engine.start()
    try:
        async with asyncio.timeout(60):
            with pytest.raises(EngineError, match=r"model\.safetensors"):
                await engine.wait_ready()
        assert engine.restarts == 0 and engine.status.state is EngineState.FAILED
    finally:
        await engine.close()


# --- models that want to be served in their own way


def serving(folder: Path, model_dir: Path, **serving: object) -> Path:
    """A copy of the model folder whose config.json says how it wants to be served."""
    shutil.copytree(model_dir, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"serving": serving}))
    return folder


def settings_of(model: Path, mode: Literal["sequential", "batch"] = "sequential") -> EngineSettings:
    return EngineSettings(model=str(model), width=SIZE, height=SIZE, max_streams=2, mode=mode)


def test_slots_hold_the_longer_kind_of_chunk_and_those_inside_a_batch(model_dir: Path, tmp_path: Path) -> None:
    tiny = FrameLayout.of(settings_of(model_dir))
    assert tiny == FrameLayout(2, 4, SIZE, SIZE) and tiny.slots == 4
    wan = serving(tmp_path / "wan", model_dir, first_chunk_frames=5)
    assert FrameLayout.of(settings_of(wan)) == FrameLayout(2, 5, SIZE, SIZE)
    assert FrameLayout.of(settings_of(wan, "batch")).slots == 7


def test_no_two_slots_share_a_byte() -> None:
    layout = FrameLayout(2, 5, 16, 16, slots=7)
    memory = FrameMemory.create(layout)
    views = [memory.slot(stream, slot, 5) for stream in range(2) for slot in range(7)]
    for number, view in enumerate(views):
        view[:] = number
    assert [int(view.min()) for view in views] == [int(view.max()) for view in views] == list(range(14))
    del views, view
    memory.close()


async def test_a_first_chunk_of_five_comes_back_whole_and_other_lengths_are_refused() -> None:
    engine = FakeEngine(SIZE, SIZE, delay_s=0.0, first_chunk_frames=5)
    await engine.start()
    await engine.wait_ready()
    assert (engine.capacity.first_chunk_frames, engine.capacity.chunk_frames) == (5, 4)
    async with engine.open_stream("s", StreamParams(prompt="neon")) as stream:
        for wrong in (1, 3, 6):
            with pytest.raises(ValueError, match=r"expected \[4 or 5, 64, 64, 3\]"):
                stream.submit(chunk(0, frames=wrong))
        rendered = await render(stream, [chunk(0, frames=5), chunk(1)])
    assert [len(one.frames) for one in rendered] == [5, 4]
    await engine.close()


async def test_a_batch_hands_chunks_back_late_in_order_and_unmixed() -> None:
    engine = FakeEngine(SIZE, SIZE, delay_s=0.0, held_chunks=2)
    await engine.start()
    await engine.wait_ready()
    async with engine.open_stream("s", StreamParams(prompt="neon")) as stream:
        sent = [chunk(index) for index in range(5)]
        for one in sent:
            stream.submit(one)
            await asyncio.sleep(0.01)
        back = [await next_chunk(stream) for _ in range(3)]
        assert stream.counters.rendered == 3
    for before, after in zip(sent, back, strict=False):
        assert before.index == after.index
        np.testing.assert_array_equal(after.frames, tint(before.frames, StreamParams(prompt="neon")))
    await engine.close()


def rank_says(*messages: Done) -> tuple[LocalStream, list[RenderedChunk]]:
    """What a stream makes of a rank's answers to chunks it was given, without a rank."""
    engine = LocalEngine(EngineSettings(width=SIZE, height=SIZE, max_streams=1))
    engine.memory = FrameMemory.create(FrameLayout.of(engine.settings))
    stream = LocalStream(engine, 0, "s")
    for message in messages:
        stream.submit(chunk(message.chunk))
        stream.on_done(message)
    rendered = list(stream._results._chunks)
    engine.memory.close()
    return stream, rendered


def test_faults_and_new_beginnings_are_counted_and_named() -> None:
    done = Done(stream=0, chunk=0, slot=3, revision=0, started_at=1.0, finished_at=1.1)
    faulty = done.model_copy(update={"chunk": 1, "fault": "nan"})
    ink = (Understood(styles=(("ink", 1.0),), score=0.5),)
    anew = done.model_copy(update={"chunk": 2, "reanchored": True, "understood": ink})
    after = done.model_copy(update={"chunk": 3})
    stream, rendered = rank_says(done, faulty, anew, after)
    assert [one.fault for one in rendered] == ["", "nan", "", ""]
    assert [one.understood for one in rendered] == [(), (), ink, ink]
    np.testing.assert_array_equal(rendered[1].frames, chunk(1).frames)
    assert (stream.counters.faults, stream.counters.reanchored) == ({"nan": 1}, 1)


async def test_a_start_may_take_long_but_not_be_silent() -> None:
    engine = LocalEngine(EngineSettings(width=SIZE, height=SIZE, start_timeout_s=0.4))
    says: asyncio.Queue[Status] = asyncio.Queue()
    reading = asyncio.create_task(engine._read_messages(Mock(receive=says.get)))
    for percent in range(8):
        says.put_nowait(Status(state=EngineState.LOADING, percent=percent))
        await asyncio.sleep(0.1)
    assert (engine.status.percent, reading.done()) == (7, False)
    assert await reading == "no progress for 0 s while starting"


async def test_what_a_chunk_costs_is_told_by_steps(engine: AnyEngine) -> None:
    costs = engine.capacity.costs
    assert [cost.steps for cost in costs if not cost.small] == [1, 2, 3, 4]
    means = [engine.capacity.mean_s(steps) for steps in range(1, 5)]
    assert means[0] > 0 and means == sorted(means)
    assert all(cost.mean_s <= cost.upper_s for cost in costs)
    assert engine.capacity.chunk_cost_s == means[0]


async def test_the_fakes_costs_are_its_delay_by_steps_and_size_and_follow_it() -> None:
    engine = FakeEngine(SIZE, SIZE, delay_s=0.002)
    await engine.start()
    await engine.wait_ready()
    before = engine.capacity
    assert before.chunk_cost_s == pytest.approx(0.002, rel=1e-3)
    assert before.has_small
    assert before.mean_s(2) == pytest.approx(1.7 * 0.002, rel=1e-3)
    assert before.mean_s(1, small=True) == pytest.approx(0.56 * 0.002, rel=1e-3)
    engine.delay_s = 0.004
    async with engine.open_stream("s", StreamParams(steps=2)) as stream:
        started = [one.engine_started_at for one in await render(stream, [chunk(index) for index in range(20)])]
        stream.update(StreamParams(steps=1, small=True))
        await render(stream, [chunk(20)])
    assert len(set(started)) == 20
    after = engine.capacity
    # Those not seen since have become slower with those that were.
    for steps in (1, 2, 4):
        assert after.mean_s(steps) == pytest.approx(2 * before.mean_s(steps), rel=0.05)
    await engine.close()
    engine = FakeEngine(SIZE, SIZE, delay_s=0.0, small_share=0.0)
    assert (engine.capacity.chunk_cost_s, engine.capacity.costs, engine.capacity.has_small) == (0.0, (), False)
