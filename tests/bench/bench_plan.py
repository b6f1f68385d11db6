"""The simulator beside a real run on this machine: cameras at a fixed rate into the engine, and the same simulated.

    python tests/bench/bench_plan.py [--sessions 1 2 3 4] [--fps 16] [--seconds 15] [--json]
    python tests/bench/bench_plan.py --server [--sessions 1 2 3] [--fps 24] [--seconds 30] [--json]

The embedded model in its rank process, frames handed over by the engine's own contract (no network). The simulation is
given nothing of the run but the seconds that the rank took for its chunks: their mean and their spread.

With --server there is a whole server around it, and `livebrush load` before that: ladder, pacer and WebRTC. The
simulation is given the costs that the engine told meanwhile, on average, at each size and number of steps, when each
session's chunks began, and what they took on their way through the server beside the engine, on average. With
--delay-ms the engine is the stand-in (`engine.fake`) at 128x128, which waits so long for a chunk and leaves the cores
to others; it has a light VAE too.
"""

import argparse
import asyncio
import contextlib
import json
import os
import statistics
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import asdict, dataclass, field, replace
from math import log
from pathlib import Path
from typing import Any

# A script of its own: its folder, not the repository, is on the path.
sys.path.insert(0, str(Path(__file__).parents[2]))

import aiohttp
import numpy as np

from engine.api import ChunkCostAt, Engine, EngineStream, FrameChunk, RenderedChunk, StreamParams
from engine.client import LocalEngine
from engine.config import EngineSettings
from engine.devices import ChunkCosts, measured_costs
from engine.fake import FakeEngine
from engine.simulator import simulate
from engine.simulator_load import CHUNK_FRAMES, WARM_UP_S, Workload
from engine.simulator_outcome import Outcome, quantile_s
from engine.simulator_ranks import split
from server.app import running_server
from server.plan_server import SETTLED_S, PlannedServer
from server.session_terms import rung_name
from server.settings import ServerSettings

LEAD_S = 1.0
DRAIN_S = 3.0
LOAD_SCRIPT = Path(sys.executable).with_name("livebrush")
SAMPLE_S = 0.5
LOAD_TIMEOUT_S = 60.0
FAKE_LIGHT_SHARE, FAKE_SIZE = 0.2, (128, 128)


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


@dataclass
class Told:
    """What a server and its engine said while sessions ran: costs, and rungs by their name."""

    costs: list[tuple[ChunkCostAt, ...]] = field(default_factory=list)
    rungs: Counter[str] = field(default_factory=Counter)

    def mean_costs(self) -> list[dict[str, Any]]:
        """On average."""
        columns = zip(*self.costs, strict=True)
        return [
            asdict(
                replace(
                    column[0],
                    mean_s=statistics.fmean(cost.mean_s for cost in column),
                    upper_s=statistics.fmean(cost.upper_s for cost in column),
                )
            )
            for column in columns
        ]


async def _load(url: str, workload: Workload, engine: Engine) -> tuple[dict[str, Any], Told]:
    """Have `livebrush load` put sessions on a server; listen to it while they run."""
    counts = {"--sessions": workload.sessions, "--seconds": workload.seconds, "--fps": workload.fps}
    arguments = [part for name, count in counts.items() for part in (name, str(count))]
    load = await asyncio.create_subprocess_exec(
        str(LOAD_SCRIPT),
        "load",
        *arguments,
        *("--warmup", str(SETTLED_S), "--url", url, "--json"),
        stdout=asyncio.subprocess.PIPE,
    )
    report, told = asyncio.create_task(load.communicate()), Told()
    async with asyncio.timeout(workload.seconds + LOAD_TIMEOUT_S), aiohttp.ClientSession() as http:
        while not report.done():
            await asyncio.wait({report}, timeout=SAMPLE_S)
            async with http.get(f"{url}/api/v1/capacity") as reply:
                capacity = await reply.json()
            if capacity["open"]:
                told.costs.append(engine.capacity.costs)
                told.rungs[_name(capacity["rung"])] += 1
    return json.loads(report.result()[0]), told


class _Phases:
    """Stands before an engine and notes what the simulation is told: when the chunks of each stream begin, and what
    they take from their last frame's arrival to the engine, and from there to the server."""

    def __init__(self, engine: Engine) -> None:
        self._open = engine.open_stream
        self.begun_at: list[float] = []
        self._in_s: list[float] = []
        self._out_s: list[float] = []
        engine.open_stream = self.open_stream  # type: ignore[method-assign]

    @contextlib.asynccontextmanager
    async def open_stream(self, stream_id: str, params: StreamParams) -> AsyncIterator[EngineStream]:
        async with self._open(stream_id, params) as stream:
            submit = stream.submit

            def noted(chunk: FrameChunk) -> None:
                if chunk.index == 0:
                    self.begun_at.append(chunk.captured_at[0])
                self._in_s.append(time.monotonic() - chunk.captured_at[-1])
                submit(chunk)

            stream.submit = noted  # type: ignore[method-assign]
            yield _Heard(stream, self._out_s)

    def starts_s(self) -> tuple[float, ...]:
        """From the first on."""
        return tuple(sorted(at - min(self.begun_at) for at in self.begun_at))

    def way_s(self) -> float:
        """There and back, on average."""
        return statistics.fmean(self._in_s) + statistics.fmean(self._out_s)


class _Heard:
    """A stream of which is noted how long after the engine was done a chunk comes out of it."""

    def __init__(self, stream: EngineStream, out_s: list[float]) -> None:
        self._stream, self._out_s = stream, out_s

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    async def __aiter__(self) -> AsyncIterator[RenderedChunk]:
        async for chunk in self._stream:
            self._out_s.append(time.monotonic() - chunk.engine_finished_at)
            yield chunk


def _name(rung: dict[str, Any]) -> str:
    light = "light VAE, " if rung["light"] else ""
    return "camera" if rung["camera"] else f"{light}{'small' if rung['small'] else 'full'}, {rung['fps']:g} fps"


def _served_row(real: dict[str, Any], told: Told, phases: _Phases, workload: Workload) -> dict[str, Any]:
    """A real server's sessions beside simulated ones on an engine of the same costs."""
    costs = measured_costs({"costs": told.mean_costs()}, window=0)
    group = split([costs], 1)
    server = PlannedServer([group], 1, workload)
    starts_s = phases.starts_s()
    in_place = replace(workload, sessions=len(starts_s), starts_s=starts_s, warm_up_s=SETTLED_S + starts_s[-1])
    in_place = replace(in_place, jitter_s=0.0, way_s=phases.way_s(), seconds=in_place.warm_up_s + workload.seconds)
    run = simulate([group], 1, in_place, server=server)
    simulated = [session for session in run.sessions if session.latency_s]

    def mean(name: str) -> float:
        return statistics.fmean(session[name] for session in real["sessions"])

    return {
        "sessions": workload.sessions,
        "refused_real": real["refused"],
        "refused_simulated": max(0, workload.sessions - server.seats),
        "chunk_ms": [round(cost["mean_s"] * 1e3) for cost in told.mean_costs() if cost["steps"] == 1],
        "way_ms": round(phases.way_s() * 1e3),
        "rung_real": told.rungs.most_common(1)[0][0],
        "rung_simulated": _name(asdict(server.rung)),
        "fps_real": round(mean("fps"), 2),
        "fps_simulated": round(statistics.fmean(session.fps for session in run.sessions), 2),
        "age_p50_real_s": round(mean("server_age_p50_s"), 3),
        "age_p50_simulated_s": round(statistics.fmean(quantile_s(s.latency_s, 0.5) for s in simulated), 3),
        "age_p95_real_s": round(mean("server_age_p95_s"), 3),
        "age_p95_simulated_s": round(statistics.fmean(quantile_s(s.latency_s, 0.95) for s in simulated), 3),
        "dmr_real": round(mean("dmr"), 3),
        "dmr_simulated": round(run.dmr, 3),
        "moves_simulated": [f"{moved.at_s:.1f} s: {rung_name(moved.move.target)}" for moved in server.moves],
        "machine_load": round(os.getloadavg()[0], 1),
    }


async def _compare_served(options: argparse.Namespace) -> list[dict[str, Any]]:
    """A server for each number of sessions, so that none begins with what another has learned."""
    rows = []
    for sessions in options.sessions:
        workload = Workload(sessions, options.fps, options.budget, options.seconds, first_frames=1)
        width, height = FAKE_SIZE if options.delay_ms else (256, 256)
        engine_settings = EngineSettings(width=width, height=height, costs_dir="off")
        settings = ServerSettings(
            port=0,
            max_fps=options.fps,
            latency_budget_s=options.budget,
            engine=engine_settings,
            engine_kind="fake" if options.delay_ms else "local",
        )
        engine: LocalEngine | FakeEngine = LocalEngine(engine_settings)
        if options.delay_ms:
            engine = FakeEngine(*FAKE_SIZE, delay_s=options.delay_ms / 1e3, light_share=FAKE_LIGHT_SHARE)
        async with running_server(settings, engine) as (_, port):
            await engine.wait_ready()
            phases = _Phases(engine)
            real, told = await _load(f"http://127.0.0.1:{port}", workload, engine)
        rows.append(_served_row(real, told, phases, workload))
    return rows


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--server", action="store_true", help="a whole server, and sessions by WebRTC")
    parser.add_argument("--delay-ms", type=float, default=0.0, help="with --server: the stand-in, so long for a chunk")
    parser.add_argument("--sessions", type=int, nargs="+", default=[1, 2, 3, 4])
    parser.add_argument("--fps", type=float, default=16.0)
    parser.add_argument("--budget", type=float, default=0.5)
    parser.add_argument("--seconds", type=float, default=15.0)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rows = asyncio.run(_compare_served(options) if options.server else _compare(options))
    if options.json:
        print(json.dumps(rows, indent=2))
        return
    for row in rows:
        print(
            "  ".join(
                f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}" for name, value in row.items()
            )
        )


if __name__ == "__main__":
    main()
