"""A drill: a stream with several players, one of them on a bad network; what came through to it, and to another.

For each network: a good one for all, then the bad one for the one player, then a good one again. Of the bad time are
told the share of the publisher's frames that was shown, the longest gap, the age from the publisher's camera to the
picture, and the bits that came through; and how often the server encoded a picture, and made a key frame on demand.
Status 1 when a target is missed.

    .venv/bin/python tests/bench/drill_viewers.py [--only loss] [--players 2] [--seconds 10] [--seed 1] [--json]

The server is a process of its own with the stand-in engine. Clients and links share this one; 320x240 at 15 fps.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

# A script of its own: its folder, not the repository, is on the path.
sys.path.insert(0, str(Path(__file__).parents[2]))

import numpy as np
from numpy.typing import NDArray

from tests.bench.drill_network import AFTER_S, BACK_SHARE, DELAY_S, LATE_S, WARM_UP_S
from tests.e2e.serving import Server
from tests.net.drilling import case_parser, run_cases
from tests.net.link import Impairment
from tests.net.watching import STREAM, watched

# Of a player whose network stays good, whatever the other's does; of its bitrate before.
GOOD_SHOWN = 0.95
GOOD_GAP_S = 0.5
GOOD_KEEPS = 0.6
HEAD = f"{'network':<16}poor%    gap    p95 kbit/s | good%    gap    p95 kbit/s |   back encoded/s keys"


@dataclass(frozen=True, slots=True)
class Case:
    """A bad network of one player, and what must hold there."""

    name: str
    how: Impairment
    shown: float | None = None
    gap_s: float | None = None
    lasts_s: float | None = None
    back_s: float = 1.5


CASES = (
    Case("clean", Impairment(), 0.97, 0.3),
    Case("loss 5 %", Impairment(loss=0.05, delay_s=DELAY_S), 0.90, 0.5),
    Case("loss 10 %", Impairment(loss=0.10, delay_s=DELAY_S), 0.75, 0.7),
    Case("loss 20 %", Impairment(loss=0.20, delay_s=DELAY_S), 0.50, 1.5),
    Case("300 kbit/s", Impairment(rate_bps=300e3, delay_s=DELAY_S), None, 1.0, 12.0, 2.0),
    Case("black hole 3 s", Impairment(down=True), lasts_s=3.0),
)


def broadcast_counters(server: Server) -> Counter[str]:
    """What the stream's broadcast has counted so far."""
    streams = json.loads(server.get("/api/v1/streams"))["streams"]
    return Counter(next(one["broadcast"] for one in streams if one["stream"] == STREAM))


async def measure(case: Case, server: Server, pictures: list[NDArray[np.uint8]], options: argparse.Namespace) -> Any:
    """One case: the figures of both players, with what missed its target in words under `missed`."""
    async with watched(server.url, pictures, options.players, seed=options.seed) as (publisher, players):
        (poor, poor_link), (good, good_link) = players[:2]
        for _, link in players:
            link.set(Impairment(delay_s=case.how.delay_s))
        await asyncio.sleep(WARM_UP_S / 2)
        usual_bps = -8 * good_link.down.carried_bytes / (WARM_UP_S / 2)
        await asyncio.sleep(WARM_UP_S / 2)
        usual_bps += 8 * good_link.down.carried_bytes / (WARM_UP_S / 2)
        before = await asyncio.to_thread(broadcast_counters, server)
        carried = {"poor": poor_link.down.carried_bytes, "good": good_link.down.carried_bytes}
        begin = time.monotonic()
        poor_link.set(case.how)
        await asyncio.sleep(case.lasts_s or options.seconds)
        end = time.monotonic()
        bps = {
            name: 8 * (link.down.carried_bytes - carried[name]) / (end - begin)
            for name, link in (("poor", poor_link), ("good", good_link))
        }
        after = await asyncio.to_thread(broadcast_counters, server)
        poor_link.set(Impairment(delay_s=case.how.delay_s))
        await asyncio.sleep(AFTER_S)
        seen = {"poor": poor.journal.between(begin, end, LATE_S), "good": good.journal.between(begin, end, LATE_S)}
        back_s = poor.journal.back_s(end, BACK_SHARE)
        counted = {name: after[name] - before[name] for name in sorted(after) if after[name] != before[name]}
        clients = {"publisher": publisher.counters, "poor": poor.counters, "good": good.counters}
    checks = (
        ("shown to the poor", seen["poor"].shown, case.shown, False),
        ("gap_s of the poor", seen["poor"].gap_s, case.gap_s, True),
        ("back_s of the poor", float("inf") if back_s is None else back_s, case.back_s, True),
        ("shown to the good", seen["good"].shown, GOOD_SHOWN, False),
        ("gap_s of the good", seen["good"].gap_s, GOOD_GAP_S, True),
        ("of the bitrate of the good", bps["good"] / usual_bps, GOOD_KEEPS, False),
    )
    missed = [
        f"{name} {value:.2f} instead of {bound:g}"
        for name, value, bound, is_most in checks
        if bound is not None and (value > bound if is_most else value < bound)
    ]
    return {
        "case": case.name,
        **{name: asdict(one) | {"bps": round(bps[name])} for name, one in seen.items()},
        "usual_bps": round(usual_bps),
        "back_s": back_s,
        "seconds": end - begin,
        "broadcast": counted,
        "link": {"poor": dict(poor_link.down.counters), "good": dict(good_link.down.counters)},
        "clients": {name: {key: n for key, n in sorted(one.items()) if n} for name, one in clients.items()},
        "missed": missed,
    }


def row(found: dict[str, Any]) -> str:
    """One line of the table."""

    def ms(value: float | None) -> str:
        return "-" if value is None else f"{1e3 * value:.0f}"

    figures = f"{found['case']:<16}"
    for name in ("poor", "good"):
        one = found[name]
        figures += (
            f"{100 * one['shown']:6.1f} {ms(one['gap_s']):>6} {ms(one['age_p95_s']):>6} {one['bps'] / 1e3:6.0f} |"
        )
    counted = found["broadcast"]
    figures += f" {ms(found['back_s']):>6} {counted.get('frames_encoded', 0) / found['seconds']:8.1f}"
    figures += f" {counted.get('key_frames_asked', 0):4d}"
    return f"{figures}  {'MISSED: ' + '; '.join(found['missed']) if found['missed'] else ''}"


def main() -> int:
    """Parse the arguments and run."""
    parser = case_parser(__doc__)
    parser.add_argument("--players", type=int, default=2, help="2 or more; all but one on a good network")
    return asyncio.run(run_cases(CASES, measure, row, HEAD, parser.parse_args()))


if __name__ == "__main__":
    sys.exit(main())
