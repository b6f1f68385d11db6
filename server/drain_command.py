"""`livebrush drain`: empty a server before it is stopped, and wait until it is."""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import time
from typing import Any

TOKEN_VARIABLE = "LIVEBRUSH_TOKEN"
DEFAULT_WAIT_S = 30.0
# Over the wait: for the last sessions to be moved and their connections to close.
MARGIN_S = 30.0
LOOK_S = 0.5
ASK_TIMEOUT_S = 10.0


def add_drain_parser(commands: argparse._SubParsersAction[Any]) -> None:
    """Add the command to the console script's."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "drain",
        help="empty a server: no new sessions, the rest moved to others (docs/scale.md)",
        epilog=f"A server with tokens asks for the admin's: the variable {TOKEN_VARIABLE}.",
    )
    parser.set_defaults(command=drain)
    parser.add_argument("url", metavar="URL", help="of the server itself, not of the gateway before it")
    parser.add_argument(
        "--wait",
        type=float,
        default=DEFAULT_WAIT_S,
        metavar="SECONDS",
        help=f"for sessions to end by themselves before they are moved (default: {DEFAULT_WAIT_S:g})",
    )
    parser.add_argument("--undo", action="store_true", help="take new sessions again")


def drain(options: argparse.Namespace) -> int:
    """Return 0 once the server is empty, or takes sessions again; 1 where that failed."""
    import aiohttp

    from livebrush_client import Refused

    try:
        return asyncio.run(_undo(options.url) if options.undo else _drain(options.url, options.wait))
    except Refused as refused:
        print(f"livebrush: {options.url} refuses ({refused.status}): {refused}", file=sys.stderr)
    except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
        print(f"livebrush: {options.url} does not answer: {error or type(error).__name__}", file=sys.stderr)
    return 1


async def _drain(url: str, wait_s: float) -> int:
    from livebrush_client import Api

    async with Api(url, token=os.environ.get(TOKEN_VARIABLE)) as api:
        left = (await _ask(api, "POST", "/api/v1/drain", {"wait_s": wait_s}))["open"]
        print(f"{left} sessions are open; no new ones are taken", flush=True)
        until = time.monotonic() + wait_s + MARGIN_S
        while left and time.monotonic() < until:
            await asyncio.sleep(LOOK_S)
            now = (await _ask(api, "GET", "/api/v1/capacity"))["open"]
            if now != left:
                print(f"{now} are left", flush=True)
            left = now
    if left:
        print(f"livebrush: {left} sessions have not ended within {wait_s + MARGIN_S:g} s", file=sys.stderr)
        return 1
    print("The server is empty: stop it, or take new sessions again with --undo.")
    return 0


async def _undo(url: str) -> int:
    from livebrush_client import Api

    async with Api(url, token=os.environ.get(TOKEN_VARIABLE)) as api:
        await _ask(api, "DELETE", "/api/v1/drain")
    print("The server takes new sessions again.")
    return 0


async def _ask(api: Any, method: str, path: str, body: object = None) -> Any:
    async with asyncio.timeout(ASK_TIMEOUT_S):
        return await api.call(method, path, body)
