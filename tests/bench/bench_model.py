"""Median milliseconds per chunk of 4 frames, by part, on one thread: `python tests/bench/bench_model.py`.

Uses the model folder given, else the shipped one, else random weights of the same size. CPU time stands beside wall
time, since on a shared machine only the former compares.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from engine.api import StreamParams
from engine.config import DEFAULT_MODEL, MODELS_DIR, EngineSettings
from engine.pipeline import Pipeline
from engine.wan.untrained import untrained_model
from engine.wan.weights import Model, load_model
from engine.worker import dtype_of


class PartTimer:
    """Times every call of the methods it wraps."""

    def __init__(self) -> None:
        self.calls: dict[str, list[tuple[float, float]]] = {}

    def wrap(self, owner: Any, method: str, part: str) -> None:
        """Replace owner.method by itself plus a record of wall and CPU seconds under `part`."""
        inner = getattr(owner, method)

        def timed(*args: Any, **kwargs: Any) -> Any:
            return self.measure(part, lambda: inner(*args, **kwargs))

        setattr(owner, method, timed)

    def measure(self, part: str, call: Callable[[], Any]) -> Any:
        """Run `call` and record it."""
        wall, cpu = time.perf_counter(), time.process_time()
        result = call()
        self.calls.setdefault(part, []).append((time.perf_counter() - wall, time.process_time() - cpu))
        return result


def find_model(folder: Path | None, dtype: torch.dtype) -> Model:
    """The model to time."""
    folder = folder or MODELS_DIR / DEFAULT_MODEL
    if (folder / "config.json").is_file():
        return load_model(folder, "cpu", dtype)
    return untrained_model()


def bench(model: Model, width: int, height: int, steps: int, chunks: int) -> dict[str, object]:
    """Medians over `chunks` chunks in the full window, after a warm-up."""
    pipeline = Pipeline(model, width, height)
    state = pipeline.open(StreamParams(prompt="watercolour painting", steps=steps))
    frames = np.random.default_rng(0).integers(0, 256, (4, height, width, 3), dtype=np.uint8)
    for _ in range(model.config.transformer.window_frames + 2):
        pipeline.render(state, frames)
    timer = PartTimer()
    timer.wrap(model.vae, "encode", "encode")
    timer.wrap(model.transformer, "forward", "transformer step")
    timer.wrap(model.transformer, "leave", "of which head and refiner")
    timer.wrap(model.vae, "decode", "decode")
    for _ in range(chunks):
        timer.measure("whole chunk", lambda: pipeline.render(state, frames))
    parts = {
        part: {
            "wall_ms": round(1000 * statistics.median(wall for wall, _ in calls), 2),
            "cpu_ms": round(1000 * statistics.median(cpu for _, cpu in calls), 2),
        }
        for part, calls in timer.calls.items()
    }
    return {
        "model": model.config.name,
        "size": f"{width}x{height}",
        "steps": steps,
        "dtype": str(model.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "parts": parts,
        "fps": round(4000 / parts["whole chunk"]["wall_ms"], 1),
        "fps_cpu_time": round(4000 / parts["whole chunk"]["cpu_ms"], 1),
    }


def main() -> None:
    """Print a table, or one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, help="a model folder")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--height", type=int, default=256)
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--chunks", type=int, default=40)
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="auto: as served here")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = find_model(options.model, dtype_of(EngineSettings(dtype=options.dtype)))
    result = bench(model, options.width, options.height, options.steps, options.chunks)
    if options.json:
        print(json.dumps(result))
        return
    parts = result.pop("parts")
    print(", ".join(f"{key} {value}" for key, value in result.items()))
    assert isinstance(parts, dict)
    for part, figures in parts.items():
        print(f"  {part:32s} {figures['wall_ms']:8.2f} ms wall {figures['cpu_ms']:8.2f} ms CPU")


if __name__ == "__main__":
    main()
