"""A drill: one session over bad networks, one after another, and what of its picture came through.

For each network: a good one, then the bad one, then a good one again. Told are, of the frames that the camera sent in
the bad time, the share that was shown and the share of those that was late; the longest gap; the age from camera to
picture; and how long after the bad time it took to show 80 % of the rate. Status 1 when a target is missed.

    .venv/bin/python tests/bench/drill_network.py [--only loss] [--seconds 10] [--seed 1] [--json]

The server is a process of its own with the stand-in engine. Client and link share this one; 320x240 at 15 fps.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

# A script of its own: its folder, not the repository, is on the path.
sys.path.insert(0, str(Path(__file__).parents[2]))

import numpy as np
from numpy.typing import NDArray

from tests.e2e.serving import Server
from tests.net.client import linked
from tests.net.drilling import case_parser, run_cases
from tests.net.link import Impairment

DELAY_S = 0.02
WARM_UP_S = 3.0
AFTER_S = 4.0
BACK_SHARE = 0.8
# A picture older than the promise (latency_budget_s), the way there and back, and two encodings.
LATE_S = 0.7
SEAT_FREE_S = 20.0
SUMMARY = ": summary "
SUMMARY_FIGURES = ("due", "thinned", "camera_overwritten", "dropped", "late", "peer")
HEAD = f"{'network':<20}shown%  late%    gap    p50    p95   back (ms)"


@dataclass(frozen=True, slots=True)
class Target:
    """What must hold. Shares of frames, times in seconds; None is not judged. settle_s: not measured at the begin."""

    shown: float | None = None
    gap_s: float | None = None
    late: float | None = None
    age_p95_s: float | None = None
    back_s: float = 1.0
    settle_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Case:
    """A bad network and what must hold on it. lasts_s: None for --seconds. ends: the session may not outlast it."""

    name: str
    how: Impairment
    target: Target
    lasts_s: float | None = None
    ends: bool = False


CASES = (
    Case("clean", Impairment(), Target(0.97, 0.3, 0.01)),
    Case("loss 1 %", Impairment(loss=0.01, delay_s=DELAY_S), Target(0.95, 0.3, 0.01)),
    Case("loss 5 %", Impairment(loss=0.05, delay_s=DELAY_S), Target(0.90, 0.5, 0.02)),
    Case("loss 10 %", Impairment(loss=0.10, delay_s=DELAY_S), Target(0.75, 0.7, 0.10)),
    Case("loss 20 %", Impairment(loss=0.20, delay_s=DELAY_S), Target(0.50, 1.5, 0.25)),
    Case("bursts 5 % of 5", Impairment(loss=0.05, burst=5, delay_s=DELAY_S), Target(0.95, 0.7)),
    Case("reorder 10 % 15 ms", Impairment(reorder=0.10, delay_s=DELAY_S), Target(0.95, 0.3)),
    Case("corruption 1 %", Impairment(corruption=0.01, delay_s=DELAY_S), Target(0.95, 0.3)),
    Case("duplication 10 %", Impairment(duplication=0.10, delay_s=DELAY_S), Target(0.95, 0.3)),
    Case("jitter 40+-20 ms", Impairment(delay_s=0.04, jitter_s=0.02), Target(0.95, 0.3)),
    Case("300 kbit/s", Impairment(rate_bps=300e3, delay_s=DELAY_S), Target(None, 1.0, None, 1.0, 2.0, 3.0), 12.0),
    Case("black hole 3 s", Impairment(down=True), Target(back_s=1.0), 3.0),
    Case("black hole 12 s", Impairment(down=True), Target(back_s=1.5), 12.0),
    Case("black hole 45 s", Impairment(down=True), Target(), 45.0, ends=True),
)


async def measure(case: Case, server: Server, pictures: list[NDArray[np.uint8]], options: argparse.Namespace) -> Any:
    """One case: its figures, with what missed its target in words under `missed`, and the session's counters."""
    target, lasts_s = case.target, case.lasts_s or options.seconds
    async with linked(server.url, pictures, seed=options.seed) as (client, link):
        link.set(Impairment(delay_s=case.how.delay_s))
        await asyncio.sleep(WARM_UP_S)
        begin = time.monotonic()
        link.set(case.how)
        if case.ends:
            freed_s = await until_free(server, lasts_s)
            missed = [] if freed_s is not None and freed_s <= SEAT_FREE_S else [f"seat free after {freed_s} s"]
            return {"case": case.name, "seat_free_s": freed_s, "missed": missed}
        await asyncio.sleep(lasts_s)
        end = time.monotonic()
        link.set(Impairment(delay_s=case.how.delay_s))
        await asyncio.sleep(AFTER_S)
        seen = client.journal.between(begin + target.settle_s, end, LATE_S)
        gap_s = client.journal.between(begin, end, LATE_S).gap_s
        back_s = client.journal.back_s(end, BACK_SHARE)
        found = {"case": case.name, **asdict(seen), "gap_s": gap_s, "back_s": back_s}
        found["up"], found["down"] = dict(link.up.counters), dict(link.down.counters)
        found["client"] = {name: count for name, count in sorted(client.counters.items()) if count}
        found["errors"] = client.errors
    found["server"] = await server_summary(server)
    missed = [
        f"{name} {value:.2f} instead of {bound:g}"
        for name, value, bound, is_most in (
            ("shown", seen.shown, target.shown, False),
            ("gap_s", gap_s, target.gap_s, True),
            ("late", seen.late, target.late, True),
            ("age_p95_s", float("inf") if seen.age_p95_s is None else seen.age_p95_s, target.age_p95_s, True),
            ("back_s", float("inf") if back_s is None else back_s, target.back_s, True),
        )
        if bound is not None and (value > bound if is_most else value < bound)
    ]
    return found | {"missed": missed}


async def server_summary(server: Server, timeout_s: float = 5.0) -> dict[str, Any]:
    """What the server says of the session that has just ended; empty when it says nothing in time."""
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        lines = [line for line in server.log_text().splitlines() if SUMMARY in line]
        if lines:
            summary: dict[str, Any] = json.loads(lines[-1].partition(SUMMARY)[2])
            return {name: summary[name] for name in SUMMARY_FIGURES}
        await asyncio.sleep(0.1)
    return {}


async def until_free(server: Server, timeout_s: float) -> float | None:
    """Seconds until the server has no session any more; None when it still has in the end."""
    begin = time.monotonic()
    while time.monotonic() - begin < timeout_s:
        if not (await asyncio.to_thread(server.capacity))["open"]:
            return round(time.monotonic() - begin, 1)
        await asyncio.sleep(0.25)
    return None


def row(found: dict[str, Any]) -> str:
    """One line of the table."""
    if "seat_free_s" in found:
        figures = f"seat free after {found['seat_free_s']} s"
    else:

        def ms(name: str) -> str:
            return "-" if found[name] is None else f"{1e3 * found[name]:.0f}"

        figures = (
            f"{100 * found['shown']:5.1f} {100 * found['late']:5.1f} {ms('gap_s'):>6} {ms('age_p50_s'):>6}"
            f" {ms('age_p95_s'):>6} {ms('back_s'):>6}"
        )
    return f"{found['case']:<20}{figures}  {'MISSED: ' + '; '.join(found['missed']) if found['missed'] else ''}"


def main() -> int:
    """Parse the arguments and run."""
    parser = case_parser(__doc__)
    return asyncio.run(run_cases(CASES, measure, row, HEAD, parser.parse_args()))


if __name__ == "__main__":
    sys.exit(main())
