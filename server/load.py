"""`livebrush load`: sessions with real moving pictures against a server, and what each of them got.

The pictures go over WebRTC as a browser sends them; without sound. Decoding nothing and encoding once for all keeps
it light, so that the server is what is measured; `generator` in the report says whether that was so.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

MAX_SESSIONS = 256
MAX_SECONDS = 86_400.0
BUSY_SHARE = 0.95
LOCAL_URL = "http://127.0.0.1:8080"
MEANING = (
    "dmr is the share of due frames that came late or never, by the server's book over the measured time; age is from "
    "the frame handed to the sender here until its restyled picture was received here, server age the server's part."
)
COLUMNS = (
    ("session", "session", "{:d}"),
    ("fps", "fps", "{:.1f}"),
    ("agreed", "agreed_fps", "{:g}"),
    ("dmr", "dmr", "{:.2%}"),
    ("ttff s", "ttff_s", "{:.2f}"),
    ("age p50 s", "age_p50_s", "{:.3f}"),
    ("p95 s", "age_p95_s", "{:.3f}"),
    ("server p50 s", "server_age_p50_s", "{:.3f}"),
    ("p95 s", "server_age_p95_s", "{:.3f}"),
    ("interval p50 s", "interval_p50_s", "{:.3f}"),
    ("p99 s", "interval_p99_s", "{:.3f}"),
    ("freezes", "freezes", "{:d}"),
)


def add_load_parser(commands: argparse._SubParsersAction[Any]) -> None:
    """Add the command to the console script's."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "load", help="put sessions on a server and measure what each gets", epilog=MEANING
    )
    parser.set_defaults(command=load)
    parser.add_argument("--sessions", type=_count, required=True, metavar="N", help=f"to open, 1 to {MAX_SESSIONS}")
    parser.add_argument("--seconds", type=_seconds, required=True, metavar="S", help="to measure for")
    parser.add_argument("--url", type=_url, default=LOCAL_URL, help=f"of the server (default: {LOCAL_URL})")
    parser.add_argument("--fps", type=_fps, default=30.0, help="of the camera, 1 to 60 (default: 30)")
    parser.add_argument("--prompt", default="watercolour painting", help="the style (default: watercolour painting)")
    parser.add_argument("--steps", type=int, help="denoising steps, 1 to 4 (default: the server's)")
    parser.add_argument(
        "--ramp",
        type=_seconds_or_none,
        default=1.0,
        metavar="S",
        help="spread the offers over it (default: 1; a server takes 30 at once, then 2 a second)",
    )
    parser.add_argument(
        "--warmup", type=_seconds_or_none, default=2.0, metavar="S", help="not measured, once all run (default: 2)"
    )
    parser.add_argument("--clip", type=Path, metavar="FILE", help="video to send (default: the page's people)")
    parser.add_argument(
        "--decode", choices=("none", "first", "all"), default="none", help="sessions that decode what they get"
    )
    parser.add_argument("--allow-remote", action="store_true", help="let the server be on another machine: yours")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def load(options: argparse.Namespace) -> int:
    """Make the run and print it: 0 when it measured, 1 when it could not, 2 for misuse."""
    import asyncio
    import logging

    from server.clip import ClipError
    from server.load_run import DEMO_CLIP, LoadError, LoadJob, run_load

    # aiortc and aioice tell of every candidate pair and every close.
    logging.basicConfig(level=logging.ERROR, format="%(levelname)s %(name)s: %(message)s")
    steps = () if options.steps is None else (("steps", options.steps),)
    job = LoadJob(
        url=options.url,
        sessions=options.sessions,
        seconds=options.seconds,
        fps=options.fps,
        params=(("prompt", options.prompt), *steps),
        ramp_s=options.ramp,
        warmup_s=options.warmup,
        decode=options.decode,
        clip=options.clip or DEMO_CLIP,
        allow_remote=options.allow_remote,
    )
    try:
        report = asyncio.run(run_load(job, lambda line: print(line, file=sys.stderr, flush=True)))
    except (LoadError, ClipError) as error:
        print(f"livebrush: {error}", file=sys.stderr)
        return 2 if isinstance(error, LoadError) and error.misuse else 1
    print(json.dumps(report) if options.json else to_text(report))
    return 0


def to_text(report: dict[str, Any]) -> str:
    """The report as a table, with a line for everything that went wrong."""
    camera, fair, generator = report["camera"], report["fairness"], report["generator"]
    lines = [
        f"{report['url']}: {len(report['sessions'])} of {report['asked']} sessions, measured for"
        f" {report['seconds']:.1f} s, camera {camera['size']} at {camera['fps']:g} fps"
    ]
    if report["interrupted"]:
        lines.append("ended early")
    if sessions := report["sessions"]:
        rows = [[_cell(session[key], form) for _, key, form in COLUMNS] for session in sessions]
        lines += _table([[title for title, _, _ in COLUMNS], *rows])
    if len(sessions) > 1:
        lines.append(
            f"dmr: worst {_cell(fair['worst_dmr'], '{:.2%}')}, mean {_cell(fair['mean_dmr'], '{:.2%}')};"
            f" frame rates {_cell(fair['share_min'], '{:.2f}')} to {_cell(fair['share_max'], '{:.2f}')} of their mean"
        )
    for session in sessions:
        for name in ("dropped", "rung_moves", "notices", "losses"):
            if session[name]:
                counted = ", ".join(f"{what} {count}" for what, count in sorted(session[name].items()))
                lines.append(f"session {session['session']} {name}: {counted}")
        lines += [f"session {session['session']}: {error}" for error in session["errors"]]
    if report["refused"]:
        codes = sorted({f"{refusal['code']}: {refusal['message']}" for refusal in report["refusals"]})
        waits = [refusal["retry_after_s"] for refusal in report["refusals"] if refusal["retry_after_s"] is not None]
        back = f", come back after {min(waits):g} to {max(waits):g} s" if waits else ""
        lines.append(
            f"refused: {report['refused']} ({'; '.join(codes)}), in {report['refused_ms_max']:.0f} ms at most{back}"
        )
    lines.append(
        f"generator: {_cell(generator['cpu_share_of_a_core'], '{:.0%}')} of a core, event loop late by"
        f" {_cell(generator['loop_lag_p99_s'], '{:.3f}')} s (p99), {generator['camera_late']} frames sent late"
    )
    if generator["machine_cpu_share"] > BUSY_SHARE:
        lines.append(
            f"this machine was busy to {generator['machine_cpu_share']:.0%} while it was measured:"
            " unless the server alone was the cause, the figures are not of the server"
        )
    return "\n".join(lines)


def _table(rows: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]


def _cell(value: object, form: str) -> str:
    return "-" if value is None else form.format(value)


def _count(text: str) -> int:
    count = int(text)
    if not 1 <= count <= MAX_SESSIONS:
        raise argparse.ArgumentTypeError(f"{count} is not between 1 and {MAX_SESSIONS} sessions")
    return count


def _seconds(text: str) -> float:
    seconds = float(text)
    if not 0 < seconds <= MAX_SECONDS:
        raise argparse.ArgumentTypeError(f"{text} is not above 0 and at most {MAX_SECONDS:g} seconds")
    return seconds


def _seconds_or_none(text: str) -> float:
    return 0.0 if math.isclose(float(text), 0.0) else _seconds(text)


def _fps(text: str) -> float:
    fps = float(text)
    if not 1 <= fps <= 60:
        raise argparse.ArgumentTypeError(f"{text} is not between 1 and 60 frames a second")
    return fps


def _url(text: str) -> str:
    """An address as typed, without the slash at its end."""
    url = text if "://" in text else f"http://{text}"
    try:
        parts = urlsplit(url)
        known = parts.scheme in ("http", "https") and parts.hostname and (parts.port is None or parts.port > 0)
    except ValueError:
        known = False
    if not known:
        raise argparse.ArgumentTypeError(f"{text!r} is no address of a server, such as {LOCAL_URL}")
    return url.rstrip("/")
