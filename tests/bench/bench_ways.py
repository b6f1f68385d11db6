"""Glass to glass of two ways through the server: the page's own, and in by WHIP and out by WHEP.

Same clip, same client code, same stand-in engine; the way from a frame handed to the encoder to the same frame decoded,
told by the number drawn into it. Prints both medians and their difference; status 1 when WHIP and WHEP are slower by
over 100 ms.

    .venv/bin/python tests/bench/bench_ways.py [--seconds 15] [--json]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

# A script of its own: its folder, not the repository, is on the path.
sys.path.insert(0, str(Path(__file__).parents[2]))

import aioice.ice

from tests.e2e.serving import Server
from tests.net.client import HEIGHT, WIDTH, Seen, demo_pictures, linked
from tests.net.watching import watched

MAX_DIFFERENCE_S = 0.1
WARM_UP_S = 3.0
LATE_S = 0.7


async def page(server: Server, seconds: float) -> Seen:
    """The page's way."""
    async with linked(server.url, demo_pictures()) as (client, _):
        await asyncio.sleep(WARM_UP_S)
        begin = time.monotonic()
        await asyncio.sleep(seconds + 1)
        return client.journal.between(begin, begin + seconds, LATE_S)


async def whip_whep(server: Server, seconds: float) -> Seen:
    """In by one connection, out by another."""
    async with watched(server.url, demo_pictures(), 1) as (_, ((player, _link),)):
        await asyncio.sleep(WARM_UP_S)
        begin = time.monotonic()
        await asyncio.sleep(seconds + 1)
        return player.journal.between(begin, begin + seconds, LATE_S)


async def bench(options: argparse.Namespace) -> int:
    """Returns the exit status."""
    aioice.ice.get_host_addresses = lambda use_ipv4, use_ipv6: []  # loopback only
    ways = {}
    for name, way in (("page", page), ("whip_whep", whip_whep)):
        with (
            tempfile.TemporaryDirectory() as folder,
            Server(
                Path(folder) / "server.log",
                engine="fake",
                LIVEBRUSH_MAX_FPS="24",
                LIVEBRUSH_ENGINE__WIDTH=str(WIDTH),
                LIVEBRUSH_ENGINE__HEIGHT=str(HEIGHT),
            ) as server,
        ):
            ways[name] = await way(server, options.seconds)
    one_s, other_s = (seen.age_p50_s for seen in ways.values())
    difference_s = None if one_s is None or other_s is None else other_s - one_s
    load = os.getloadavg()[0]
    if options.json:
        found = {name: asdict(seen) for name, seen in ways.items()}
        print(json.dumps(found | {"difference_s": difference_s, "load_average": load}, indent=1))
    else:
        for name, seen in ways.items():
            print(f"{name:<10} median {seen.age_p50_s} s, p95 {seen.age_p95_s} s, shown {100 * seen.shown:.0f} %")
        print(f"difference {difference_s} s; load average {load:.1f}")
    return 0 if difference_s is not None and difference_s <= MAX_DIFFERENCE_S else 1


def main() -> int:
    """Parse the arguments and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=15.0)
    parser.add_argument("--json", action="store_true")
    return asyncio.run(bench(parser.parse_args()))


if __name__ == "__main__":
    sys.exit(main())
