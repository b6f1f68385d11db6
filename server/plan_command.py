"""`livebrush plan`: what given devices would hold, by simulation. A prediction: it runs no model and needs no GPU."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

if TYPE_CHECKING:
    from engine.devices import ChunkCosts
    from engine.simulator_load import Workload
    from engine.simulator_outcome import Outcome

NOTE = (
    "A prediction by simulation. GPU figures rest on the published tables of StreamDiffusionV2 (H100, RTX 4090) and "
    "are scaled by data sheet for other cards. The engine does cut the VAE over devices; what "
    "that gains was never measured on GPUs. See docs/scheduler.md and docs/scale.md."
)
SIZE_STEP, MIN_SIDE, MAX_SIDE = 16, 64, 2048
FITTED_SIZES = ((832, 480), (512, 512))
# Of a device's memory, what is left to the driver and to fragments.
MEMORY_SPARED = 0.1
SATURATED_S = 60.0
MIN_SLOWER, MAX_SLOWER = 0.1, 100.0
MAX_MICRO_BATCH = 16


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
    parser.add_argument("--vae", choices=("full", "light"), default="full", help="of a Wan model")
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
    parser.add_argument("--as-published", action="store_true", help="the public implementation of StreamDiffusionV2")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument("--plot", type=Path, metavar="FILE.svg", help="misses and frames a second over sessions")


@dataclass(frozen=True)
class Setup:
    """What is asked about. costs: of each device, as the chosen system runs the model. fits: `arrange`'s."""

    devices: tuple[str, ...]
    model: str
    width: int
    height: int
    steps: int
    vae: Literal["full", "light"]
    as_published: bool
    micro_batch: int
    costs: tuple[ChunkCosts, ...]
    fits: Callable[[int], int] | None
    basis: str

    def run(self, workload: Workload) -> Outcome:
        """Simulate. Raises ValueError, if the model does not fit into memory."""
        from engine.simulator import simulate
        from engine.simulator_published import simulate_published
        from engine.simulator_ranks import arrange

        if self.as_published:
            return simulate_published(self.costs, self.steps, workload)
        groups = arrange(self.costs, self.steps, workload, self.fits)
        return simulate(groups, self.steps, workload, micro_batch=self.micro_batch)

    def groups(self, workload: Workload) -> list[int]:
        """Devices of each copy of the model."""
        from engine.simulator_ranks import arrange

        if self.as_published:
            return [len(self.costs)]
        return [len(group) for group in arrange(self.costs, self.steps, workload, self.fits)]

    def most_sessions(self, workload: Workload) -> int:
        """That fit into memory."""
        from engine.simulator_load import MAX_SESSIONS

        if self.fits is None or self.as_published:
            return MAX_SESSIONS
        return min(MAX_SESSIONS, sum(self.fits(size) for size in self.groups(workload)))


def plan(options: argparse.Namespace) -> int:
    """Predict and print."""
    try:
        if options.plot is not None:
            _check_plot(options.plot)
        setup, workload = _setup(options), _workload(options)
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
        first_frames=1 if _model(options) == "livebrush-tiny" else 5,
    )


def _model(options: argparse.Namespace) -> str:
    from engine.devices import CPU_MODEL, parse_devices
    from engine.wan.presets import PRESETS

    cpu = "cpu" in parse_devices(options.devices)
    model = options.model or (CPU_MODEL if cpu else "wan2.1-1.3b")
    if model not in PRESETS:
        raise ValueError(f"model {model!r} is not known; known are {', '.join(PRESETS)}")
    if options.profile is None and cpu != (model == CPU_MODEL):
        raise ValueError(
            f"no times of {model} on {options.devices} are known: plan {CPU_MODEL} on cpu, a Wan model on GPUs, or "
            "give measured costs by --profile"
        )
    return str(model)


def _setup(options: argparse.Namespace) -> Setup:
    from engine.config import MAX_STEPS, WAN_SERVING
    from engine.devices import CPU_MODEL, DEVICES, cpu_costs, measured_costs, parse_devices, wan_costs
    from engine.wan.presets import PRESETS

    devices, model = parse_devices(options.devices), _model(options)
    width, height = _size(options.size) if options.size else (256, 256) if model == CPU_MODEL else WAN_SERVING.sizes[0]
    steps = (1 if model == CPU_MODEL else WAN_SERVING.steps) if options.steps is None else options.steps
    if not 1 <= steps <= MAX_STEPS:
        raise ValueError(f"steps must be 1 to {MAX_STEPS}, not {steps}")
    if not 1 <= options.micro_batch <= MAX_MICRO_BATCH:
        raise ValueError(f"micro-batch must be 1 to {MAX_MICRO_BATCH}, not {options.micro_batch}")
    vae = cast(Literal["full", "light"], options.vae)
    if options.as_published and (options.profile is not None or model == CPU_MODEL or vae == "light"):
        raise ValueError("--as-published is known for Wan models with their own VAE on GPUs, and without --profile")
    costs: Sequence[ChunkCosts]
    if options.profile is not None:
        profile = measured_costs(_profile(options.profile), window=PRESETS[model].window_frames)
        costs, basis = [profile] * len(devices), f"measured: {options.profile.name}"
    elif model == CPU_MODEL:
        costs, basis = [cpu_costs(width, height)] * len(devices), "measured on one core of the developers' machine"
    else:
        costs = [wan_costs(DEVICES[name], model, width, height, vae=vae) for name in devices]
        if not options.as_published:
            costs = [each.with_graphs() for each in costs]
        basis = "; ".join(f"{name}: {DEVICES[name].basis}" for name in dict.fromkeys(devices))
        if (width, height) not in FITTED_SIZES:
            basis += f"; no figures are published for {width}x{height}"
    if not MIN_SLOWER <= options.slower <= MAX_SLOWER:
        raise ValueError(f"slower must be {MIN_SLOWER} to {MAX_SLOWER:g}, not {options.slower}")
    if options.slower != 1:
        costs, basis = [each.times(options.slower) for each in costs], f"{options.slower:g} times: {basis}"
    fits = None
    if options.profile is None and model != CPU_MODEL:
        fits = _memory(model, width, height, vae, min(DEVICES[name].memory_bytes for name in devices))
        if options.as_published and fits(1) < 1:
            raise ValueError(
                f"{model} at {width}x{height} does not fit into one of these devices, as each must hold it"
            )
    return Setup(
        devices, model, width, height, steps, vae, options.as_published, options.micro_batch, tuple(costs), fits, basis
    )


def _memory(
    model: str, width: int, height: int, vae: Literal["full", "light"], device_bytes: int
) -> Callable[[int], int]:
    from engine.memory import Demand, known_shape, needed

    parts = needed(known_shape(model), Demand(width, height, vae=vae)).parts
    shared = sum(part.size_bytes for part in parts if part.kind != "stream")
    stream = sum(part.size_bytes for part in parts if part.kind == "stream")
    return lambda devices: int(max((1 - MEMORY_SPARED) * device_bytes * devices - shared, 0) // stream)


def _size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d{1,5})[xX](\d{1,5})", text.strip())
    if match:
        width, height = int(match[1]), int(match[2])
        if all(MIN_SIDE <= side <= MAX_SIDE and side % SIZE_STEP == 0 for side in (width, height)):
            return width, height
    raise ValueError(
        f"size {text!r} must be WIDTHxHEIGHT, each a multiple of {SIZE_STEP} from {MIN_SIDE} to {MAX_SIDE}; "
        "figures are published for 832x480 and 512x512"
    )


def _profile(path: Path) -> dict[str, Any]:
    """A cost model's snapshot or a list of costs, at the top of the file or below `measured` (doctor)."""
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if isinstance(found, dict) and "measured" in found:
        found = found["measured"]
    if not isinstance(found, dict):
        raise ValueError(f"{path}: expected an object of measured costs; doctor --json writes one where the engine ran")
    return found


def _check_plot(path: Path) -> None:
    if path.suffix.lower() != ".svg":
        raise ValueError(f"--plot {path}: only .svg is drawn")


def predict(setup: Setup, workload: Workload, *, find_held: bool) -> dict[str, Any]:
    """All figures; times in seconds. `fps` is of one stream that is never waited for, or, where sessions are given, of
    each session's mean.

    Args:
        find_held: look for the most sessions that are held; else `sessions_held` tells whether those given are.
    Raises: ValueError, if the model does not fit into memory.
    """
    from engine.simulator import MISSES_HELD, sessions_held

    flat_out = setup.run(replace(workload, sessions=1, saturated=True, seconds=max(SATURATED_S, workload.seconds)))
    live = setup.run(workload)
    most = setup.most_sessions(workload)
    held: int | None
    if find_held:
        held = sessions_held(setup.run, workload, most)
    else:
        held = workload.sessions if live.worst_dmr < MISSES_HELD and workload.sessions <= most else None
    # The paper counts the wait for four frames and one chunk of the steady stream.
    ttff_s = 4 / workload.fps + 4 / flat_out.fps if setup.as_published else live.ttff_s
    return {
        "prediction": True,
        "note": NOTE,
        "system": "as published" if setup.as_published else "livebrush",
        "devices": list(setup.devices),
        "groups": setup.groups(workload),
        "model": setup.model,
        "size": f"{setup.width}x{setup.height}",
        "steps": setup.steps,
        "vae": setup.vae,
        "basis": setup.basis,
        "camera_fps": workload.fps,
        "budget_s": workload.budget_s,
        "sessions": workload.sessions,
        "sessions_held": held,
        "sessions_in_memory": None if setup.fits is None or setup.as_published else most,
        "fps": round(flat_out.fps if find_held else live.fps / workload.sessions, 2),
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
    }


def _steps(count: int) -> str:
    return f"{count} step{'s' if count > 1 else ''}"


def _finite(seconds: float) -> float | None:
    return round(seconds, 4) if isfinite(seconds) else None


def _table(result: dict[str, Any]) -> str:
    def seconds(name: str) -> str:
        return "none came" if result[name] is None else f"{result[name]:.3f} s"

    held = result["sessions_held"]
    rows = [
        ("devices", f"{', '.join(result['devices'])} in groups of {', '.join(map(str, result['groups']))}"),
        ("model", f"{result['model']}, {result['size']}, {_steps(result['steps'])}, {result['vae']} VAE"),
        ("system", result["system"]),
        ("frames a second, one stream flat out", f"{result['throughput_fps']:.1f}"),
        ("sessions held below 1 % misses", "not these" if held is None else str(held)),
        (
            f"with {result['sessions']} at {result['camera_fps']:g} fps: frames late or never shown",
            f"{result['dmr']:.1%}, the worst session {result['worst_dmr']:.1%}",
        ),
        ("  first frame", seconds("ttff_s")),
        ("  latency, mean", seconds("latency_s")),
        ("  latency, 95 %", seconds("latency_p95_s")),
        ("  busy", ", ".join(f"{share:.0%}" for share in result["utilisation"])),
        ("bottleneck", result["bottleneck"]),
        ("basis", result["basis"]),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join([f"{name:<{width}}  {value}" for name, value in rows] + ["", result["note"]])


def plot(setup: Setup, workload: Workload, held: int) -> str:
    """An SVG of two panels over the number of sessions, to beyond what is held: misses, and frames a second of each."""
    from engine.simulator_load import MAX_SESSIONS

    last = min(max(8, 2 * held), MAX_SESSIONS)
    stride = max(1, last // 24)
    counts = [*range(1, last + 1, stride)]
    runs = [setup.run(replace(workload, sessions=count)) for count in counts]
    title = (
        f"{', '.join(f'{setup.devices.count(name)} {name}' for name in dict.fromkeys(setup.devices))}, {setup.model}, "
        f"{setup.width}x{setup.height}, {_steps(setup.steps)}, {workload.fps:g} fps, "
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
