"""The measured figures of StreamDiffusionV2, and the fit of `engine.devices` to them.

Source: arXiv 2511.07399, figures 9 (1.3B), 11 (14B) and 10 (TTFF), and the table of live latencies of its second
version. Bfloat16, chunks of four frames, the stream batch on the H100s, none on the RTX 4090s. Which row of figure 11
belongs to how many GPUs is inferred: more GPUs, more frames.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import exp, log

from engine.devices import DEVICES, Device, wan_costs
from engine.simulator_published import published_tick_s

STEPS = (1, 2, 3, 4)
SIZES = {"832x480": (832, 480), "512x512": (512, 512)}

# Frames a second: for each number of GPUs from one, at one to four steps.
_Rows = tuple[tuple[float, float, float, float], ...]
_H100: dict[tuple[str, str], _Rows] = {
    ("wan2.1-1.3b", "832x480"): (
        (20.47, 17.97, 15.68, 13.95),
        (39.77, 34.67, 30.69, 27.06),
        (43.88, 43.79, 41.13, 38.09),
        (44.38, 43.41, 43.08, 42.26),
    ),
    ("wan2.1-1.3b", "512x512"): (
        (26.21, 24.02, 21.51, 19.43),
        (51.76, 46.92, 41.09, 37.49),
        (63.45, 62.76, 56.75, 54.09),
        (64.52, 63.99, 62.43, 61.57),
    ),
    ("wan2.1-14b", "832x480"): (
        (12.68, 8.64, 6.49, 5.28),
        (25.39, 17.31, 13.23, 10.69),
        (37.55, 25.02, 19.12, 15.42),
        (39.24, 33.36, 25.02, 20.05),
    ),
    ("wan2.1-14b", "512x512"): (
        (18.71, 13.01, 10.09, 8.26),
        (37.12, 25.72, 20.11, 16.65),
        (53.84, 37.47, 29.34, 24.35),
        (58.28, 51.09, 38.41, 31.62),
    ),
}
_RTX4090: dict[tuple[str, str], _Rows] = {
    ("wan2.1-1.3b", "832x480"): (
        (8.58, 7.37, 6.27, 5.59),
        (16.59, 14.75, 13.06, 7.76),
        (16.66, 16.49, 16.17, 15.74),
        (16.64, 16.42, 15.97, 15.73),
    ),
    ("wan2.1-1.3b", "512x512"): (
        (12.87, 11.76, 10.42, 7.87),
        (24.68, 22.13, 19.33, 17.98),
        (25.64, 25.03, 24.58, 24.22),
        (25.04, 24.77, 24.30, 23.97),
    ),
}
# Seconds to the first frame on one H100, 1.3B at 832x480, two steps, by the camera's frames a second.
TTFF_S = {30: 0.365, 16: 0.47}
# Seconds of latency of a frame on one H100, 1.3B at 512x512, one step, camera at 16 frames a second; share over 1 s.
LIVE_LATENCY_S = {"mean": 0.357, "p50": 0.361, "p90": 0.484, "p95": 0.497, "p99": 0.585}
LIVE_MISSED = 0.002


@dataclass(frozen=True)
class Cell:
    """One measured throughput, in frames a second."""

    device: str
    count: int
    model: str
    size: str
    steps: int
    fps: float


def cells(device: str) -> tuple[Cell, ...]:
    """All cells of `h100` (64) or `rtx4090` (32)."""
    return tuple(_cells(device, {"h100": _H100, "rtx4090": _RTX4090}[device]))


def _cells(device: str, tables: dict[tuple[str, str], _Rows]) -> Iterator[Cell]:
    for (model, size), rows in tables.items():
        for count, row in enumerate(rows, 1):
            for steps, fps in zip(STEPS, row, strict=True):
                yield Cell(device, count, model, size, steps, fps)


def predicted_fps(cell: Cell, device: Device | None = None) -> float:
    """What the simulator says without noise, with the device's constants or with other ones."""
    width, height = SIZES[cell.size]
    costs = wan_costs(device or DEVICES[cell.device], cell.model, width, height)
    return 4 / published_tick_s([costs] * cell.count, cell.steps, batched=cell.device == "h100")


def error(cell: Cell, device: Device | None = None) -> float:
    """Predicted over measured, minus one."""
    return predicted_fps(cell, device) / cell.fps - 1


# Cells off by more than this weigh no more: two of the RTX 4090's are out of line with their neighbours.
_CLIP = 0.15
# The search ends where its corners differ by no more than this share.
SETTLED = 1e-3


def fit(start: Device, chosen: Sequence[Cell]) -> Device:
    """The four constants of a device that make the sum of squared relative errors over the chosen cells least.

    The error of a cell counts at most 15 %. A downhill simplex on the constants' logarithms; some seconds.
    """

    def device(point: Sequence[float]) -> Device:
        launch_s, traffic_s, vae_flops, hop_s = map(exp, point)
        return replace(start, launch_s=launch_s, traffic_s=traffic_s, vae_flops=vae_flops, hop_s=hop_s)

    def loss(point: Sequence[float]) -> float:
        tried = device(point)
        return sum(min(abs(error(cell, tried)), _CLIP) ** 2 for cell in chosen)

    constants = (start.launch_s, start.traffic_s, start.vae_flops, start.hop_s)
    return device(_simplex(loss, [log(each or 1e-6) for each in constants]))


def _simplex(loss: Callable[[Sequence[float]], float], start: list[float], rounds: int = 150) -> list[float]:
    """Nelder and Mead's search from `start`."""
    points = [start] + [[x + 0.2 * (i == j) for j, x in enumerate(start)] for i in range(len(start))]
    ranked = sorted((loss(point), point) for point in points)

    def step(worst: list[float], centre: list[float], factor: float) -> tuple[float, list[float]]:
        point = [c + factor * (c - w) for c, w in zip(centre, worst, strict=True)]
        return loss(point), point

    for _ in range(rounds):
        if ranked[-1][0] - ranked[0][0] < SETTLED * ranked[0][0]:
            break
        centre = [sum(column) / len(start) for column in zip(*(point for _, point in ranked[:-1]), strict=True)]
        worst_loss, worst = ranked[-1]
        tried = step(worst, centre, 1.0)
        if tried[0] < ranked[0][0]:
            tried = min(tried, step(worst, centre, 2.0))
        elif tried[0] >= ranked[-2][0]:
            tried = step(worst, centre, -0.5)
        if tried[0] < worst_loss:
            ranked[-1] = tried
        else:
            best = ranked[0][1]
            shrunk = [[(b + x) / 2 for b, x in zip(best, point, strict=True)] for _, point in ranked[1:]]
            ranked[1:] = [(loss(point), point) for point in shrunk]
        ranked.sort()
    return ranked[0][1]
