"""What drills over bad networks have in common: cases in turn, each against a server of its own, one row each."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import tempfile
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import aioice.ice
from numpy.typing import NDArray

from tests.e2e.serving import Server
from tests.net.client import HEIGHT, WIDTH, demo_pictures


class Named(Protocol):
    """A case; `--only` goes by its name."""

    @property
    def name(self) -> str:
        """As the table shows it."""
        ...


C = TypeVar("C", bound=Named)
Measure = Callable[[C, Server, list[NDArray[Any]], argparse.Namespace], Awaitable[dict[str, Any]]]


def case_parser(description: str | None) -> argparse.ArgumentParser:
    """The arguments that all such drills take."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="cases whose name holds this")
    parser.add_argument("--seconds", type=float, default=10.0, help="of each bad time that has no length of its own")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    return parser


async def run_cases(
    cases: Sequence[C],
    measure: Measure[C],
    row: Callable[[dict[str, Any]], str],
    head: str,
    options: argparse.Namespace,
) -> int:
    """Measure every case that is asked for and print its row; returns the exit status, 1 where a target was missed."""
    aioice.ice.get_host_addresses = lambda use_ipv4, use_ipv6: []  # loopback only
    pictures = await asyncio.to_thread(demo_pictures)
    print(f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} CPUs\n{head}", file=sys.stderr)
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for case in cases:
            if options.only not in case.name:
                continue
            with Server(
                Path(folder) / "server.log",
                engine="fake",
                LIVEBRUSH_MAX_FPS="24",
                LIVEBRUSH_ENGINE__WIDTH=str(WIDTH),
                LIVEBRUSH_ENGINE__HEIGHT=str(HEIGHT),
            ) as server:
                results.append(await measure(case, server, pictures, options))
            print(row(results[-1]), file=sys.stderr, flush=True)
    if options.json:
        print(json.dumps({"load_average": os.getloadavg()[0], "cases": results}, indent=1))
    return 1 if any(found["missed"] for found in results) else 0
