"""The simulator beside a real run on this machine: cameras at a fixed rate into the engine, and the same simulated.

    python tests/bench/bench_plan.py [--sessions 1 2 3 4] [--fps 16] [--seconds 15] [--json]

The embedded model in its rank process, frames handed over by the engine's own contract (no network). The simulation is
given nothing of the run but the seconds that the rank took for its chunks: their mean and their spread.
"""

import argparse
import asyncio
import json
import statistics
import time
from dataclasses import dataclass, field
from math import log

import numpy as np

from engine.api import Engine, EngineStream, FrameChunk, StreamParams
from engine.client import LocalEngine
from engine.config import EngineSettings
from engine.devices import ChunkCosts
from engine.simulator import simulate
from engine.simulator_load import CHUNK_FRAMES, WARM_UP_S, Workload
from engine.simulator_outcome import Outcome
from engine.simulator_ranks import split

LEAD_S = 1.0
DRAIN_S = 3.0


@dataclass
class Run:
    """latencies_s, due, shown: of frames after the warm-up; took: when the rank began and ended each chunk."""

    budget_s: float
    latencies_s: list[float] = field(default_factory=list)
    due: int = 0
    shown: int = 0
    took: list[tuple[float, float]] = field(default_factory=list)

    @property
    def dmr(self) -> float:
        """Share of due frames that came late or never."""
        return 1 - sum(latency_s <= self.budget_s for latency_s in self.latencies_s) / self.due

    def costs(self) -> ChunkCosts:
        """What a chunk took, on average and in spread; all of it counts as the transformer's row."""
        ended, seconds = 0.0, []
        for begin, end in sorted(self.took):
            seconds.append(max(end - max(begin, ended), 1e-4))
            ended = max(ended, end)
        spread = statistics.stdev(log(each) for each in seconds)
        return ChunkCosts(0.0, 0.0, 1, 0.0, statistics.fmean(seconds), noise=spread)


async def _camera(
    stream: EngineStream, run: Run, fps: float, start: float, seconds: float, shape: tuple[int, int]
) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (CHUNK_FRAMES, *shape, 3), np.uint8)
    frame = index = 0
    while frame / fps < seconds:
        count = CHUNK_FRAMES if index else 1
        captured = tuple(start + (frame + i) / fps for i in range(count))
        await asyncio.sleep(captured[-1] - time.monotonic())
        run.due += sum(at >= start + WARM_UP_S for at in captured)
        chunk = FrameChunk(
            index, frames[:count], tuple(range(frame, frame + count)), captured, captured[0] + run.budget_s
        )
        stream.submit(chunk)
        frame, index = frame + count, index + 1


async def _screen(stream: EngineStream, run: Run, start: float, seconds: float) -> None:
    async for chunk in stream:
        run.took.append((chunk.engine_started_at, chunk.engine_finished_at))
        now = time.monotonic()
        run.shown += len(chunk.captured_at) * (WARM_UP_S <= now - start < seconds)
        run.latencies_s += [now - at for at in chunk.captured_at if at >= start + WARM_UP_S]


async def measure(engine: Engine, workload: Workload) -> Run:
    """Run the workload for real."""
    width, height = engine.frame_size
    run, begin = Run(workload.budget_s), time.monotonic() + LEAD_S

    async def session(number: int) -> None:
        start = begin + workload.period_s * number / workload.sessions
        async with engine.open_stream(f"s{number}", StreamParams(prompt="watercolour painting")) as stream:
            screen = asyncio.create_task(_screen(stream, run, start, workload.seconds))
            await _camera(stream, run, workload.fps, start, workload.seconds, (height, width))
            await asyncio.sleep(DRAIN_S)
            screen.cancel()
            await asyncio.gather(screen, return_exceptions=True)

    await asyncio.gather(*(session(number) for number in range(workload.sessions)))
    return run


def _row(sessions: int, costs: ChunkCosts, real: Run, simulated: Outcome, workload: Workload) -> dict[str, float]:
    ages = sorted(real.latencies_s)
    shown_s = workload.seconds - WARM_UP_S
    return {
        "sessions": sessions,
        "chunk_ms": round(costs.row_s * 1e3, 1),
        "spread": round(costs.noise, 3),
        "fps_real": round(real.shown / shown_s / sessions, 2),
        "fps_simulated": round(simulated.fps / sessions, 2),
        "latency_real_s": round(statistics.fmean(ages), 3),
        "latency_simulated_s": round(simulated.mean_latency_s, 3),
        "p95_real_s": round(ages[int(0.95 * (len(ages) - 1))], 3),
        "p95_simulated_s": round(simulated.latency_quantile_s(0.95), 3),
        "dmr_real": round(real.dmr, 3),
        "dmr_simulated": round(simulated.dmr, 3),
    }


async def _compare(options: argparse.Namespace) -> list[dict[str, float]]:
    engine = LocalEngine(EngineSettings())
    rows = []
    try:
        await engine.start()
        await engine.wait_ready()
        for sessions in options.sessions:
            workload = Workload(sessions, options.fps, options.budget, options.seconds, first_frames=1, jitter_s=0.0)
            real = await measure(engine, workload)
            costs = real.costs()
            simulated = simulate([split([costs], 1)], 1, workload, micro_batch=1)
            rows.append(_row(sessions, costs, real, simulated, workload))
    finally:
        await engine.close()
    return rows


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sessions", type=int, nargs="+", default=[1, 2, 3, 4])
    parser.add_argument("--fps", type=float, default=16.0)
    parser.add_argument("--budget", type=float, default=0.5)
    parser.add_argument("--seconds", type=float, default=15.0)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rows = asyncio.run(_compare(options))
    if options.json:
        print(json.dumps(rows, indent=2))
        return
    for row in rows:
        print("  ".join(f"{name} {value:g}" for name, value in row.items()))


if __name__ == "__main__":
    main()
