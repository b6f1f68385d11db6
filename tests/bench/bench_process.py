"""How many sessions the server process itself carries (decoding, scaling, encoding), with an engine of next to no time.

The server with the fake engine, which only inverts and needs a millisecond a chunk, in this process; cameras of moving
people by WebRTC from `livebrush load` in another, one after the other, more of them than there is room for. Prints
a line every two seconds, then what was promised, who was refused and why, and what each of the others got. With
`--min-fps 24` no session is given less than that, so that seats and sessions that kept their rate are the same thing:

    .venv/bin/python tests/bench/bench_process.py [--sessions 12] [--every 3] [--seconds 30] [--min-fps 8]
        [--size 256x256] [--json]
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import math
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# A script of its own: its folder, not the repository, is on the path.
sys.path.insert(0, str(Path(__file__).parents[2]))

import aiohttp

from engine import fake as stand_in
from engine.api import Frames, StreamParams
from engine.config import EngineSettings
from engine.fake import FakeEngine
from server.app import running_server
from server.configure import parse_size
from server.event_loop import BusyLoop, busy_s
from server.session_context import SessionContext
from server.settings import ServerSettings

LOAD_SCRIPT = Path(sys.executable).with_name("livebrush")
DELAY_S = 0.001
PERIOD_S = 2.0
LOOKS = 40
# Beside ramp and measurement, for starting and stopping.
SPARE_S = 60.0
MAX_SESSIONS = 64
# A session keeps what it was promised with so much of the least rate, and no more missed than that.
KEPT_SHARE = 0.97
KEPT_DMR = 0.02


def invert(frames: Frames, params: StreamParams) -> Frames:
    """The cheapest style there is."""
    return 255 - frames


@dataclass(frozen=True, slots=True)
class Moment:
    """One look at the server.

    fps: what each session may have. process_load, engine_load: shares of what there is, as the server counts them.
    cores: CPU seconds a second of the process; loop: share of the time in which its event loop was busy; lag_ms: by
    which it was late at most; due, missed: frames of all sessions. All since the moment before.
    """

    at_s: float
    open: int
    seats: int
    fps: float
    process_load: float
    engine_load: float
    cores: float
    loop: float
    lag_ms: float
    due: int
    missed: int


async def measure(
    sessions: int, every_s: float, seconds: float, size: tuple[int, int], min_fps: float
) -> dict[str, Any]:
    """Run it; returns the figures. Raises RuntimeError, if the load could not be made."""
    width, height = size
    engine = EngineSettings(width=width, height=height, max_streams=sessions)
    settings = ServerSettings(port=0, engine_kind="fake", max_sessions=sessions, min_fps=min_fps, engine=engine)
    fake = FakeEngine(width, height, delay_s=DELAY_S, max_streams=sessions)
    moments: list[Moment] = []
    async with running_server(settings, fake) as (context, port):
        load = await asyncio.create_subprocess_exec(
            *(LOAD_SCRIPT, "load", "--json", "--url", f"http://127.0.0.1:{port}"),
            *("--sessions", str(sessions), "--seconds", str(seconds), "--ramp", str(sessions * every_s)),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
        )
        watching = asyncio.create_task(_watch(context, f"http://127.0.0.1:{port}", moments))
        try:
            async with asyncio.timeout(sessions * every_s + seconds + SPARE_S):
                told, _ = await load.communicate()
        finally:
            watching.cancel()
            await asyncio.wait({watching})
            if load.returncode is None:
                load.kill()
                await load.wait()
    if load.returncode:
        raise RuntimeError("`livebrush load` could not measure: run it by hand against `livebrush serve --engine fake`")
    return _figures(f"{width}x{height}", min_fps, sessions * every_s, json.loads(told), moments)


async def _watch(context: SessionContext, url: str, moments: list[Moment]) -> None:
    """Look every PERIOD_S, until cancelled."""
    began_at = before = time.monotonic()
    cpu_s, loop_s, lag_s = time.process_time(), busy_s(), 0.0
    counted = _frames(context)
    async with aiohttp.ClientSession() as http:
        while True:
            async with http.get(f"{url}/api/v1/capacity") as reply:
                told = await reply.json()
            value = context.metrics.registry.get_sample_value
            now = time.monotonic()
            spent_s, (cpu_s, loop_s) = (cpu_s, loop_s), (time.process_time(), busy_s())
            seconds, before = max(now - before, 1e-3), now
            frames_before, counted = counted, _frames(context)
            moment = Moment(
                round(now - began_at, 1),
                told["open"],
                told["seats"],
                told["fps"],
                round(value("livebrush_process_load") or 0.0, 2),
                told["load"],
                round((cpu_s - spent_s[0]) / seconds, 2),
                round((loop_s - spent_s[1]) / seconds, 2),
                round(1e3 * lag_s),
                *(after - first for first, after in zip(frames_before, counted, strict=True)),
            )
            moments.append(moment)
            print(moment, file=sys.stderr, flush=True)
            lag_s = 0.0
            for _ in range(LOOKS):
                expected = time.monotonic() + PERIOD_S / LOOKS
                await asyncio.sleep(PERIOD_S / LOOKS)
                lag_s = max(lag_s, time.monotonic() - expected)


def _frames(context: SessionContext) -> tuple[int, int]:
    """Frames due and missed so far."""
    counted = Counter[str]()
    for metric in context.metrics.registry.collect():
        for sample in metric.samples:
            counted[sample.name] += round(sample.value) if math.isfinite(sample.value) else 0
    missed = counted["livebrush_frames_late_total"] + counted["livebrush_frames_dropped_total"]
    return counted["livebrush_frames_due_total"], missed


def _missed(moments: list[Moment]) -> float | None:
    due = sum(moment.due for moment in moments)
    return round(sum(moment.missed for moment in moments) / due, 4) if due else None


def _figures(size: str, min_fps: float, ramp_s: float, report: dict[str, Any], moments: list[Moment]) -> dict[str, Any]:
    sessions, generator = report["sessions"], report["generator"]
    most = max(moment.open for moment in moments)
    # With the rate settled, and without the moments in which the last one came and the first one left.
    full = [moment for moment in moments if moment.open == most and moment.fps == moments[-1].fps][1:-1]
    return {
        "size": size,
        "asked": report["asked"],
        "refused": report["refused"],
        "because": sorted({refusal["message"] for refusal in report["refusals"]}),
        "refused_in_ms": report["refused_ms_max"],
        "missed_while_others_ask": _missed([moment for moment in full if moment.at_s < ramp_s]),
        "missed_after": _missed([moment for moment in full if moment.at_s >= ramp_s]),
        "seats": [seats for seats, _ in itertools.groupby(moment.seats for moment in moments if moment.open)],
        "kept": sum(
            session["fps"] >= KEPT_SHARE * min_fps and session["dmr"] is not None and session["dmr"] <= KEPT_DMR
            for session in sessions
        ),
        "rates": [rate for rate, _ in itertools.groupby(moment.fps for moment in moments)],
        "process_load_max": max(moment.process_load for moment in moments),
        "engine_load_max": max(moment.engine_load for moment in moments),
        "fps": [session["fps"] for session in sessions],
        "dmr": [session["dmr"] for session in sessions],
        "age_p95_s": [session["age_p95_s"] for session in sessions],
        "interval_p99_s": [session["interval_p99_s"] for session in sessions],
        "rung_moves": [session["rung_moves"] for session in sessions],
        "generator_cores": generator["cpu_share_of_a_core"],
        "machine_busy": generator["machine_cpu_share"],
    }


def main() -> int:
    """Run the bench; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sessions", type=int, default=12, help=f"cameras that ask, 1 to {MAX_SESSIONS}")
    parser.add_argument("--every", type=float, default=3.0, metavar="S", help="seconds from one to the next")
    parser.add_argument("--seconds", type=float, default=30.0, help="measured once all have asked")
    parser.add_argument("--min-fps", type=float, default=8.0, metavar="F", help="the least a session is given")
    parser.add_argument("--size", type=parse_size, default=(256, 256), metavar="WxH")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if not 1 <= options.sessions <= MAX_SESSIONS:
        parser.error(f"--sessions {options.sessions}: 1 to {MAX_SESSIONS}")
    stand_in.tint = invert  # the stand-in's own would be half of the process's time
    with asyncio.Runner(loop_factory=BusyLoop) as runner:
        result = runner.run(measure(options.sessions, options.every, options.seconds, options.size, options.min_fps))
    print(json.dumps(result) if options.json else "\n".join(f"{name}: {value}" for name, value in result.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
