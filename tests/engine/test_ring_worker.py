"""A ring behind `engine.api`: the server's client over several ranks, which are lost and come back as one."""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import psutil
import pytest
from pydantic import ValidationError

from engine.api import EngineState, EngineStream, FrameChunk, RankLost, RenderedChunk, StreamParams
from engine.client import LocalEngine
from engine.config import EngineSettings
from engine.cost_book import KEPT_PASSES
from engine.wan.untrained import write_untrained_wan
from engine.wan.weights import load_model
from engine.warm_up import WARM_UP_PROMPT
from engine.worker import dtype_of, make_pipeline

SIZE = 64
FAR = 1e12
NEON = StreamParams(prompt="neon")


def settings_of(model_dir: Path, ranks: int = 2, **more: object) -> EngineSettings:
    return EngineSettings.model_validate(
        {"model": str(model_dir), "width": SIZE, "height": SIZE, "max_streams": 2, "ranks": ranks, **more}
    )


async def started(settings: EngineSettings) -> LocalEngine:
    engine = LocalEngine(settings)
    await engine.start()
    async with asyncio.timeout(240):
        await engine.wait_ready()
    return engine


def chunk(index: int, *, seed: int = 0, first_frames: int = 1) -> FrameChunk:
    frames = 4 if index else first_frames
    pixels = np.random.default_rng([seed, index]).integers(60, 200, (frames, SIZE, SIZE, 3)).astype(np.uint8)
    first = index * 10
    return FrameChunk(index, pixels, tuple(range(first, first + frames)), (0.0,) * frames, FAR + index)


async def take(stream: EngineStream, count: int) -> list[RenderedChunk]:
    async with asyncio.timeout(60):
        results = aiter(stream)
        return [await anext(results) for _ in range(count)]


async def render(stream: EngineStream, indices: Sequence[int]) -> list[RenderedChunk]:
    rendered = []
    for index in indices:
        stream.submit(chunk(index))
        rendered += await take(stream, 1)
    return rendered


def ranks_of(engine: LocalEngine) -> list[psutil.Process]:
    """Rank 0 and the others, by number."""
    assert engine.pid is not None
    first = psutil.Process(engine.pid)
    others = [child for child in first.children() if "spawn_main" in " ".join(child.cmdline())]
    return [first, *sorted(others, key=lambda process: process.pid)]


async def gone(processes: Sequence[psutil.Process]) -> None:
    async with asyncio.timeout(30):
        while any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in processes):
            await asyncio.sleep(0.05)


async def test_a_ring_shows_what_one_rank_shows_and_serves_streams_side_by_side(model_dir: Path) -> None:
    settings = settings_of(model_dir)
    engine = await started(settings)
    plain = make_pipeline(load_model(model_dir, "cpu", dtype_of(settings)), settings)
    state = plain.open(NEON)
    async with engine.open_stream("a", NEON) as a, engine.open_stream("b", StreamParams(prompt="ink", steps=3)) as b:
        for index in range(8):
            if index == 4:
                assert a.update(NEON.model_copy(update={"steps": 2})) == 1
                plain.set_params(state, NEON.model_copy(update={"steps": 2}), 1)
            b.submit(chunk(index, seed=1))
            (shown,) = await render(a, [index])
            await take(b, 1)
            assert (shown.index, shown.revision, shown.fault) == (index, int(index >= 4), "")
            np.testing.assert_array_equal(shown.frames, plain.render(state, chunk(index).frames))
        assert engine.capacity.open_streams == 2
    costs = {cost.steps: cost.mean_s for cost in engine.capacity.costs}
    assert 0 < costs[1] < costs[4] and engine.capacity.state_bytes > 0

    # A flood is dropped whole and counted, and what is shown is in order.
    async with engine.open_stream("c", NEON) as stream:
        for index in range(40):
            stream.submit(chunk(index))
        newest = -1
        while stream.counters.rendered + sum(stream.counters.dropped.values()) < 40:
            (result,) = await take(stream, 1)
            assert result.index > newest
            newest = result.index
    assert stream.counters.dropped and stream.counters.rendered

    processes = ranks_of(engine)
    assert len(processes) == 2
    await engine.close()
    await gone(processes)


def test_a_rank_starts_without_torchs_compiler(model_dir: Path) -> None:
    """Which is over half of what a start costs, and comes with any arithmetic on torch's meta device."""
    settings = settings_of(model_dir).model_dump_json()
    code = f"""
import sys
from dataclasses import replace
from engine.config import EngineSettings
from engine.cost_book import KEPT_PASSES
from engine.ring_worker import RankLoader, make_head, spec_of
settings = EngineSettings.model_validate_json({settings!r})
make_head(RankLoader(settings).load(0, print), replace(spec_of(settings), ranks=1), 0)
sys.exit(",".join({{"torch._dynamo", "sympy"}} & set(sys.modules)) or 0)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


async def test_a_ring_begins_with_what_an_earlier_one_has_learned(model_dir: Path, tmp_path: Path) -> None:
    """After a loss too: nobody said goodbye, and what was learned in service is there all the same."""
    engine = LocalEngine(settings_of(model_dir, costs_dir=tmp_path))
    details: list[str] = []

    async def ready() -> None:
        async with asyncio.timeout(240):
            while engine.status.state is not EngineState.READY:
                details.append(engine.status.detail)
                await asyncio.sleep(0.005)

    await engine.start()
    await ready()
    assert any("measuring" in detail for detail in details)
    # A machine with other work may have become twice as slow meanwhile, which is measured anew.
    for _ in range(3):
        details.clear()
        async with engine.open_stream("a", NEON) as stream:
            await render(stream, range(KEPT_PASSES + 4))
            assert list(tmp_path.iterdir())
            os.kill(ranks_of(engine)[1].pid, signal.SIGKILL)
            stream.submit(chunk(KEPT_PASSES + 4))
            with pytest.raises(RankLost):
                await take(stream, 2)
        await ready()
        assert any("warming" in detail for detail in details)
        if not any("measuring" in detail for detail in details):
            break
    else:
        raise AssertionError("measured anew each time")
    assert [cost.steps for cost in engine.capacity.costs] == [1, 2, 3, 4]
    async with engine.open_stream("a", NEON) as stream:
        assert len(await render(stream, range(6))) == 6
    await engine.close()


async def test_a_wan_model_is_spread_too(tmp_path: Path) -> None:
    write_untrained_wan(tmp_path / "wan")
    settings = settings_of(tmp_path / "wan", mode="batch")
    engine = await started(settings)
    assert engine.capacity.first_chunk_frames == 5
    async with engine.open_stream("a", StreamParams(prompt=WARM_UP_PROMPT, steps=2)) as stream:
        shown = []
        for index in range(5):
            stream.submit(chunk(index, first_frames=5))
            shown += await take(stream, 1)
    assert [len(result.frames) for result in shown] == [5, 4, 4, 4, 4]
    assert not any(result.fault == "text_pending" for result in shown)
    processes = ranks_of(engine)
    assert len(processes) == 2
    await engine.close()
    await gone(processes)


async def test_any_rank_lost_or_hanging_ends_the_group_and_another_comes(model_dir: Path) -> None:
    engine = await started(settings_of(model_dir))
    for number, how in ((1, signal.SIGKILL), (0, signal.SIGKILL), (1, signal.SIGSTOP)):
        processes = ranks_of(engine)
        assert len(processes) == 2
        async with engine.open_stream("a", NEON) as stream:
            await render(stream, range(2))
            os.kill(processes[number].pid, how)
            stream.submit(chunk(2))
            with pytest.raises(RankLost):
                # A death is seen in milliseconds (tests/bench/drill_kill.py measures it); a hang takes seconds.
                async with asyncio.timeout(5 if how == signal.SIGKILL else 40):
                    await take(stream, 2)
        assert engine.status.state is not EngineState.READY
        await gone(processes)
        if how == signal.SIGKILL:
            async with asyncio.timeout(240):
                await engine.wait_ready()
    assert engine.restarts >= 2
    await engine.close()


def test_what_a_ring_cannot_do_is_refused(model_dir: Path) -> None:
    with pytest.raises(ValidationError, match="micro_batch"):
        settings_of(model_dir, 2, micro_batch=2)
