"""Time budgets and checkpoints of training runs that may be cut off and go on later."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch


class Budget:
    """Wall-clock seconds of one stage over all its runs, and the learning-rate schedule that follows from them."""

    def __init__(self, seconds: float, spent_s: float = 0.0) -> None:
        self._seconds = seconds
        self._before = spent_s
        self._began = time.monotonic()
        self._saved = self._began

    @property
    def spent_s(self) -> float:
        """Seconds used so far, earlier runs included."""
        return self._before + time.monotonic() - self._began

    @property
    def share(self) -> float:
        """Part of the budget used, from 0 to 1 and beyond."""
        return self.spent_s / self._seconds

    def rate(self, step: int, *, warmup_steps: int, hold: float, floor: float = 0.02) -> float:
        """Factor on the learning rate: linear warm-up, constant until `hold` of the budget, linear down to floor."""
        decay = 1.0 if self.share < hold else max(floor, (1.0 - self.share) / (1.0 - hold))
        return min(1.0, (step + 1) / warmup_steps) * decay

    def save_due(self, every_s: float = 100.0) -> bool:
        """True once every `every_s` seconds."""
        due = time.monotonic() - self._saved >= every_s
        if due:
            self._saved = time.monotonic()
        return due


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write in one step: a cut-off run leaves the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".part")
    torch.save(state, partial)
    partial.rename(path)


def load_checkpoint(path: Path) -> dict[str, Any] | None:
    """What was saved last, or None. Tensors and plain values only: the file is not trusted to run code."""
    if not path.exists():
        return None
    state: dict[str, Any] = torch.load(path, weights_only=True, map_location="cpu")
    return state


def log(path: Path, line: str) -> None:
    """Append a line with the time of day to a log and show it."""
    stamped = f"{time.strftime('%H:%M:%S')} {line}"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(stamped + "\n")
    print(stamped, flush=True)
