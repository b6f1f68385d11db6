"""`livebrush plan`: what given devices would hold, by simulation. A prediction: it runs no model and needs no GPU."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

from server.plan_setup import Setup, model_of, setup_of

if TYPE_CHECKING:
    from engine.simulator_load import Workload
    from engine.simulator_outcome import Outcome, SessionOutcome

NOTE = (
    "A prediction by simulation. GPU figures rest on the published tables of StreamDiffusionV2 (H100, RTX 4090) and "
    "are scaled by data sheet for other cards. The engine does cut the VAE over devices; what "
    "that gains was never measured on GPUs. See docs/scheduler.md and docs/scale.md."
)
SATURATED_S = 60.0
# In the table; the JSON has all.
MOVES_SHOWN, SESSIONS_SHOWN = 6, 8


def add_plan_parser(commands: argparse._SubParsersAction[Any]) -> None:
    """Add the command to the console script's."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "plan", help="predict what given devices would hold, by simulation", epilog=NOTE
    )
    parser.set_defaults(command=plan)
    parser.add_argument("--devices", default="cpu", metavar="KIND[:N],…", help="such as h100:4, cpu, h100:2,a100:2")
    parser.add_argument("--model", help="wan2.1-1.3b, wan2.1-14b or livebrush-tiny (default: by device)")
    parser.add_argument("--size", metavar="WxH", help="in pixels (default: the model's own)")
    parser.add_argument("--steps", type=int, help="denoising steps, 1 to 4 (default: the model's own)")
    parser.add_argument(
        "--vae",
        choices=("auto", "full", "light"),
        default="auto",
        help="of a Wan model; auto: its own, and the light one for when that is too slow (default)",
    )
    parser.add_argument("--micro-batch", type=int, default=1, help="sessions one pass may take together (default: 1)")
    parser.add_argument("--sessions", type=int, help="cameras (default: one, and how many would be held)")
    parser.add_argument("--fps", type=float, default=16.0, help="of each camera (default: 16)")
    parser.add_argument(
        "--budget", type=float, default=0.5, help="seconds from capture; later is a miss (default: 0.5)"
    )
    parser.add_argument(
        "--arrivals", choices=("even", "poisson"), default="even", help="how the sessions lie to each other"
    )
    parser.add_argument("--seconds", type=float, default=20.0, help="simulated (default: 20)")
    parser.add_argument("--profile", type=Path, metavar="FILE", help="measured costs of each device: JSON from doctor")
    parser.add_argument(
        "--slower",
        type=float,
        default=1.0,
        metavar="TIMES",
        help="what a chunk takes over what is known: 1.5 for cpu beside a browser on its cores (126 against 85 ms)",
    )
    parser.add_argument(
        "--no-ladder", action="store_true", help="the engine alone: every session keeps its wish, whatever it misses"
    )
    parser.add_argument("--as-published", action="store_true", help="the public implementation of StreamDiffusionV2")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument("--plot", type=Path, metavar="FILE.svg", help="misses and frames a second over sessions")


def plan(options: argparse.Namespace) -> int:
    """Predict and print."""
    try:
        if options.plot is not None:
            _check_plot(options.plot)
        setup, workload = setup_of(options), _workload(options)
        result = predict(setup, workload, find_held=options.sessions is None)
        if options.plot is not None:
            options.plot.write_text(plot(setup, workload, result["sessions_held"] or options.sessions or 1))
    except (ValueError, OSError) as error:
        if options.json:
            print(json.dumps({"ok": False, "error": str(error)}, indent=2))
        print(f"livebrush plan: {error}", file=sys.stderr)
        return 1
    print(json.dumps(result, indent=2) if options.json else _table(result))
    return 0


def _workload(options: argparse.Namespace) -> Workload:
    from engine.simulator_load import Workload

    return Workload(
        1 if options.sessions is None else options.sessions,
        options.fps,
        options.budget,
        options.seconds,
        options.arrivals,
        first_frames=1 if model_of(options) == "livebrush-tiny" else 5,
    )


def _check_plot(path: Path) -> None:
    if path.suffix.lower() != ".svg":
        raise ValueError(f"--plot {path}: only .svg is drawn")


def predict(setup: Setup, workload: Workload, *, find_held: bool) -> dict[str, Any]:
    """All figures; times in seconds. `fps` is of one stream that is never waited for, or, where sessions are given, of
    each session's mean.

    Args:
        find_held: look for the most sessions that are held at their wish; else `sessions_held` tells whether those
            given are, on the rung that they stand on.
    Raises: ValueError, if the model does not fit into memory.
    """
    from engine.simulator import MISSES_HELD, sessions_held

    flat_out = setup.run(replace(workload, sessions=1, saturated=True, seconds=max(SATURATED_S, workload.seconds)))
    live, server = _live(setup, workload)
    most = setup.most_sessions(workload)
    held: int | None
    if find_held:
        held = sessions_held(setup.run, workload, most)
    else:
        all_in = len(live.sessions) == workload.sessions <= most
        held = workload.sessions if all_in and live.worst_dmr < MISSES_HELD else None
    # The paper counts the wait for four frames and one chunk of the steady stream.
    ttff_s = 4 / workload.fps + 4 / flat_out.fps if setup.as_published else live.ttff_s
    return {
        "prediction": True,
        "note": NOTE,
        "system": "as published" if setup.as_published else "livebrush",
        "devices": list(setup.devices),
        "groups": setup.groups(workload),
        "model": setup.form.model,
        "size": f"{setup.form.size[0]}x{setup.form.size[1]}",
        "steps": setup.steps,
        "vae": setup.form.vae,
        "basis": setup.basis,
        "camera_fps": workload.fps,
        "budget_s": workload.budget_s,
        "sessions": workload.sessions,
        "sessions_held": held,
        "sessions_in_memory": None if setup.fits is None or setup.as_published else most,
        "fps": round(flat_out.fps if find_held else live.fps / len(live.sessions), 2),
        "fps_total": round(flat_out.fps if find_held else live.fps, 2),
        "throughput_fps": round(flat_out.fps, 2),
        "throughput_latency_s": _finite(flat_out.mean_latency_s),
        "ttff_s": _finite(ttff_s),
        "ttff_first_chunk_s": _finite(live.ttff_s),
        "dmr": round(live.dmr, 4),
        "worst_dmr": round(live.worst_dmr, 4),
        "latency_s": _finite(live.mean_latency_s),
        "latency_p50_s": _finite(live.latency_quantile_s(0.5)),
        "latency_p95_s": _finite(live.latency_quantile_s(0.95)),
        "latency_p99_s": _finite(live.latency_quantile_s(0.99)),
        "utilisation": [round(share, 3) for share in live.utilisation],
        "bottleneck": flat_out.bottleneck if find_held else live.bottleneck,
        "server": server,
        "per_session": [_of_session(session) for session in live.sessions],
    }


def _live(setup: Setup, workload: Workload) -> tuple[Outcome, dict[str, object] | None]:
    """The sessions live; of a server those that it lets in, and what it did with them."""
    if not setup.has_ladder:
        return setup.run(workload), None
    from server.plan_server import SETTLED_S

    server = setup.server(workload)
    admitted = min(workload.sessions, server.seats)
    live = setup.run(replace(workload, sessions=admitted, warm_up_s=SETTLED_S), server)
    return live, server.as_json(workload.sessions)


def _of_session(session: SessionOutcome) -> dict[str, object]:
    from engine.simulator_outcome import quantile_s

    return {
        "fps": round(session.fps, 2),
        "dmr": round(session.dmr, 4),
        "by_camera": round(session.by_camera, 4),
        "ttff_s": _finite(session.ttff_s),
        "latency_p50_s": _finite(quantile_s(session.latency_s, 0.5)),
        "latency_p95_s": _finite(quantile_s(session.latency_s, 0.95)),
    }


def _steps(count: int) -> str:
    return f"{count} step{'s' if count > 1 else ''}"


def _finite(seconds: float) -> float | None:
    return round(seconds, 4) if isfinite(seconds) else None


def _table(result: dict[str, Any]) -> str:
    def seconds(name: str) -> str:
        return "none came" if result[name] is None else f"{result[name]:.3f} s"

    held, server = result["sessions_held"], result["server"]
    rows = [
        ("devices", f"{', '.join(result['devices'])} in groups of {', '.join(map(str, result['groups']))}"),
        ("model", f"{result['model']}, {result['size']}, {_steps(result['steps'])}, {result['vae']} VAE"),
        ("system", result["system"]),
        ("frames a second, one stream flat out", f"{result['throughput_fps']:.1f}"),
        ("sessions held below 1 % misses", "not these" if held is None else str(held)),
        *(_server_rows(server) if server else ()),
        (
            f"with {len(result['per_session'])} at {result['camera_fps']:g} fps: frames late or never shown",
            f"{result['dmr']:.1%}, the worst session {result['worst_dmr']:.1%}",
        ),
        *_session_rows(result["per_session"]),
        ("  first frame", seconds("ttff_s")),
        ("  latency, mean", seconds("latency_s")),
        ("  latency, 95 %", seconds("latency_p95_s")),
        ("  busy", ", ".join(f"{share:.0%}" for share in result["utilisation"])),
        ("bottleneck", result["bottleneck"]),
        ("basis", result["basis"]),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join([f"{name:<{width}}  {value}" for name, value in rows] + ["", result["note"]])


def _server_rows(server: dict[str, Any]) -> list[tuple[str, str]]:
    seats = f"{server['seats']}, as {server['limit']}"
    if server["refused"]:
        seats += f"; {server['refused']} of {server['admitted'] + server['refused']} are refused"
    down = server["rungs_down"]
    rows = [
        ("seats of a server", seats),
        ("rung held", server["rung"]["name"] + (f", {down} below the wish" if down else ", the wish")),
    ]
    rows += [
        (f"  after {move['at_s']:.1f} s", f"{move['from']} -> {move['to']}: {move['reason']}")
        for move in server["moves"][:MOVES_SHOWN]
    ]
    if (more := len(server["moves"]) - MOVES_SHOWN) > 0:
        rows.append(("  …", f"{more} moves more"))
    return rows


def _session_rows(sessions: list[dict[str, Any]]) -> list[tuple[str, str]]:
    if not 2 <= len(sessions) <= SESSIONS_SHOWN:
        rates = [session["fps"] for session in sessions]
        text = f"{min(rates):.1f}" if min(rates) == max(rates) else f"{min(rates):.1f} to {max(rates):.1f}"
        return [("  frames a second of each", text)]
    return [
        (f"  session {number}", f"{session['fps']:.1f} fps, {session['dmr']:.1%} late or never shown")
        for number, session in enumerate(sessions, 1)
    ]


def plot(setup: Setup, workload: Workload, held: int) -> str:
    """An SVG of two panels over the number of sessions, to beyond what is held: misses, and frames a second of each."""
    from engine.simulator_load import MAX_SESSIONS

    last = min(max(8, 2 * held), MAX_SESSIONS)
    stride = max(1, last // 24)
    counts = [*range(1, last + 1, stride)]
    runs = [setup.run(replace(workload, sessions=count)) for count in counts]
    form = setup.form
    title = (
        f"{', '.join(f'{setup.devices.count(name)} {name}' for name in dict.fromkeys(setup.devices))}, {form.model}, "
        f"{form.size[0]}x{form.size[1]}, {_steps(setup.steps)}, {workload.fps:g} fps, "
        f"{'as published' if setup.as_published else 'Livebrush'}: prediction"
    )
    panels = (
        ("frames late or never shown, %", [100 * run.dmr for run in runs], 100.0),
        ("frames a second a session", [run.fps / count for run, count in zip(runs, counts, strict=True)], workload.fps),
    )
    parts = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 720 300" font-family="sans-serif" font-size="12">',
        '<rect width="720" height="300" fill="#ffffff"/>',
        f'<text x="360" y="20" text-anchor="middle" font-weight="bold">{title}</text>',
    ]
    for left, (name, values, top) in zip((50, 410), panels, strict=True):
        parts += _panel(left, name, counts, values, top * 1.05)
    return "\n".join([*parts, "</svg>"]) + "\n"


def _panel(left: int, name: str, counts: Sequence[int], values: Sequence[float], top: float) -> list[str]:
    width, height, above = 280, 200, 50
    base = above + height
    across = width / max(counts[-1] - 1, 1)
    points = [
        (left + (count - 1) * across, base - height * min(value / top, 1.0))
        for count, value in zip(counts, values, strict=True)
    ]
    parts = [
        f'<text x="{left}" y="{above - 8}">{name}</text>',
        f'<path d="M{left} {above}V{base}H{left + width}" fill="none" stroke="#444444"/>',
    ]
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        value = share * top / 1.05
        y = base - height * value / top
        parts.append(f'<path d="M{left} {y:.1f}h{width}" stroke="#dddddd"/>')
        parts.append(f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{value:g}</text>')
    for count in counts[:: max(1, len(counts) // 8)]:
        x = left + (count - 1) * across
        parts.append(f'<text x="{x:.1f}" y="{base + 16}" text-anchor="middle">{count}</text>')
    parts.append(f'<text x="{left + width / 2}" y="{base + 34}" text-anchor="middle">sessions</text>')
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    parts.append(f'<polyline points="{line}" fill="none" stroke="#1f6feb" stroke-width="2"/>')
    parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5" fill="#1f6feb"/>' for x, y in points]
    return parts
