"""`livebrush replay`: run a recorded session again, and say whether the pictures are the same bit for bit."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from pathlib import Path
from typing import Any


def add_replay_parser(commands: argparse._SubParsersAction[Any]) -> None:
    """Add the command to the console script's."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "replay",
        help="run a recorded session again, exactly",
        description="Run a session that was recorded for it (docs/recording.md) through the same engine. Exit status:"
        " 0 for pictures equal bit for bit, 1 for others, or where it cannot be run.",
    )
    parser.set_defaults(command=replay)
    parser.add_argument("folder", type=Path, metavar="DIR", help="a recording's folder, with session.jsonl")
    parser.add_argument("--out", type=Path, metavar="FILE.mkv", help="keep the pictures, without loss")
    parser.add_argument("--force", action="store_true", help="overwrite FILE.mkv")
    parser.add_argument("--json", action="store_true", help="print the summary as JSON")


def replay(options: argparse.Namespace) -> int:
    """Run the command; returns the exit status."""
    from dataclasses import asdict

    from engine.api import EngineError
    from server.session_record import RecordError
    from server.session_replay import run_again

    def tell(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    try:
        summary = asyncio.run(run_again(options.folder, options.out, force=options.force, tell=tell))
    except (RecordError, EngineError, OSError, ValueError) as error:
        print(f"livebrush: {error}", file=sys.stderr)
        return 1
    if options.json:
        print(json.dumps(asdict(summary) | {"exact": summary.exact}))
    else:
        print(summary.as_text())
    return 0 if summary.exact else 1
