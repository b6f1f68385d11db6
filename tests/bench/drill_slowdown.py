"""A drill: the engine becomes four times slower in mid-stream, and well again; what a session is shown meanwhile.

The server with the fake engine, whose delay is set here, in this process; a camera of moving people by WebRTC from
`livebrush load` in another. Prints a line a second, then what was promised and what was:

    .venv/bin/python tests/bench/drill_slowdown.py [--delay-ms 85] [--factor 4] [--slow 20] [--after 60] [--json]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# A script of its own: its folder, not the repository, is on the path.
sys.path.insert(0, str(Path(__file__).parents[2]))

import aiohttp

from engine.fake import FakeEngine
from server.app import running_server
from server.metrics import ServerMetrics
from server.settings import ServerSettings

LOAD_SCRIPT = Path(sys.executable).with_name("livebrush")
BEFORE_S = 15
FIRST_PICTURE_TIMEOUT_S = 30.0
STOP_TIMEOUT_S = 15.0


@dataclass(frozen=True, slots=True)
class Second:
    """One second of the stream. in_budget, in_tolerance: share of its frames no older than the budget, and 0.1 s more.

    moves: of the ladder since the beginning, down and up.
    """

    at_s: int
    factor: float
    fps: float
    in_budget: float
    in_tolerance: float
    rung: dict[str, Any]
    load: float


async def drill(delay_s: float, factor: float, slow_s: int, after_s: int) -> list[Second]:
    """Run it; returns its seconds."""
    engine = FakeEngine(delay_s=delay_s)
    settings = ServerSettings(port=0, engine_kind="fake")
    total_s = BEFORE_S + slow_s + after_s
    async with running_server(settings, engine) as (context, port), aiohttp.ClientSession() as http:
        url = f"http://127.0.0.1:{port}"
        load = await asyncio.create_subprocess_exec(
            *(LOAD_SCRIPT, "load", "--sessions", "1", "--seconds", str(total_s + 10), "--url", url, "--json"),
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.DEVNULL,
        )
        try:
            async with asyncio.timeout(FIRST_PICTURE_TIMEOUT_S):
                while _ages(context.metrics)[0] < settings.max_fps:
                    await asyncio.sleep(0.1)
            seconds = []
            before = _ages(context.metrics)
            for at_s in range(total_s):
                slowed = BEFORE_S <= at_s < BEFORE_S + slow_s
                engine.delay_s = delay_s * (factor if slowed else 1.0)
                await asyncio.sleep(1.0)
                now = _ages(context.metrics)
                count, budget, tolerance = (after - first for after, first in zip(now, before, strict=True))
                before = now
                async with http.get(f"{url}/api/v1/capacity") as reply:
                    capacity = await reply.json()
                share = 1 / count if count else 0.0
                second = Second(
                    at_s,
                    factor if slowed else 1.0,
                    count,
                    budget * share,
                    tolerance * share,
                    capacity["rung"],
                    capacity["load"],
                )
                seconds.append(second)
                print(_line(second), file=sys.stderr, flush=True)
            return seconds
        finally:
            load.terminate()
            async with asyncio.timeout(STOP_TIMEOUT_S):
                await load.wait()


def _ages(metrics: ServerMetrics) -> tuple[float, float, float]:
    """Frames shown so far, and those of them no older than 0.5 and 0.6 s."""
    samples = next(iter(metrics.age.collect())).samples
    buckets = {sample.labels["le"]: sample.value for sample in samples if sample.name.endswith("_bucket")}
    return buckets["+Inf"], buckets["0.5"], buckets["0.6"]


def judge(seconds: list[Second], slow_s: int) -> dict[str, Any]:
    """The figures that were promised: a step down within a second or so, latency bounded, all the way back up."""
    slow = seconds[BEFORE_S : BEFORE_S + slow_s]
    full = seconds[BEFORE_S - 1].rung
    first_move = next((second.at_s - BEFORE_S for second in slow if second.rung != full), None)
    shown = sum(second.fps for second in slow)
    back = next((s.at_s - BEFORE_S - slow_s for s in seconds[BEFORE_S + slow_s :] if s.rung == full), None)
    return {
        "down_within_s": None if first_move is None else first_move + 1,
        "slow_in_budget": round(sum(s.fps * s.in_budget for s in slow) / shown, 4) if shown else 0.0,
        "slow_within_100_ms_more": round(sum(s.fps * s.in_tolerance for s in slow) / shown, 4) if shown else 0.0,
        "slow_fps_min_max": [min(s.fps for s in slow), max(s.fps for s in slow)],
        "back_up_after_s": back,
        "camera": any(second.rung["camera"] for second in slow),
    }


def _line(second: Second) -> str:
    rung = second.rung
    stands = "camera" if rung["camera"] else f"{rung['steps']} steps{', small' if rung['small'] else ''}"
    return (
        f"{second.at_s:4d} s  x{second.factor:g}  {second.fps:3.0f} fps  in budget {second.in_budget:6.1%}"
        f"  +0.1 s {second.in_tolerance:6.1%}  rung {stands}, {rung['fps']:g} fps  load {second.load:.2f}"
    )


def main() -> int:
    """Run the drill; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--delay-ms", type=float, default=85.0, help="of a chunk at first (default: the small model's)")
    parser.add_argument("--factor", type=float, default=4.0, help="how much slower it becomes")
    parser.add_argument("--slow", type=int, default=20, help="seconds of slowness")
    parser.add_argument("--after", type=int, default=60, help="seconds after it")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    seconds = asyncio.run(drill(options.delay_ms / 1e3, options.factor, options.slow, options.after))
    result = judge(seconds, options.slow)
    print(json.dumps(result) if options.json else "\n".join(f"{name}: {value}" for name, value in result.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
