"""What passes have cost, kept from one run of an engine to the next: a small JSON file for each kind. No torch.

A warm-up measures passes on an engine that has nothing else to do; in service they take longer, beside video on the
same cores, and only service tells by how much they scatter. So what a run has learned is written down when its last
stream has gone and when it ends, and the next run of the same kind begins with it: before its own warm-up as it is, and
after it blended, see `CostModel.profile`.

A file is of one model (its config.json, by hash), one device and all settings that a pass may depend on, each of them
in the file; another value of any of these is another file. It is replaced as a whole. One that cannot be read, is too
old or was made by another version is as good as none, with one line in the log.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import platform
import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from engine.api import ChunkCostAt
from engine.config import CONFIG_FILE, EngineSettings
from engine.cost_model import CostModel

log = logging.getLogger(__name__)

FORMAT: Literal[1] = 1
MAX_BYTES = 64 * 1024
# The oldest are deleted beyond these: a kind of engine that is not used any more is not missed.
MAX_FILES = 64
MAX_AGE_S = 90 * 86_400.0
# Of settings, what passes do not depend on: the others are part of the kind.
NO_MATTER = {"model", "costs_dir", "loras", "text_device", "max_streams", "replicas", "start_timeout_s"}


@dataclass(frozen=True, slots=True)
class Learned:
    """What a run has learned.

    costs: of passes. chunk_cost_s, chunks: what the server is told of them, see `Capacity`. saved_at: Unix time.
    """

    costs: CostModel
    chunk_cost_s: float
    chunks: tuple[ChunkCostAt, ...]
    saved_at: float


class _Stored(BaseModel):
    """The file. measured: a cost model's snapshot, under the name that `livebrush plan --profile` looks for."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    format: Literal[1]
    kind: dict[str, Any]
    saved_at: float = Field(gt=0)
    chunk_cost_s: float = Field(gt=0)
    chunks: tuple[ChunkCostAt, ...] = Field(min_length=1, max_length=64)
    measured: dict[str, Any]


class CostFile:
    """The file of one kind of engine."""

    def __init__(self, folder: Path, kind: Mapping[str, Any]) -> None:
        """kind: JSON values; all that costs depend on."""
        self._kind = dict(kind)
        text = json.dumps(self._kind, sort_keys=True)
        self.path = folder / f"costs-{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"
        self._writable = True

    def read(self, now: float | None = None) -> Learned | None:
        """What there is; None where nothing was kept.

        now: Unix time.
        Raises: ValueError or OSError for a file that is no such record, is of another kind or older than MAX_AGE_S.
        """
        try:
            with self.path.open("rb") as file:
                data = file.read(MAX_BYTES + 1)
        except FileNotFoundError:
            return None
        if len(data) > MAX_BYTES:
            raise ValueError(f"it is over {MAX_BYTES} bytes")
        stored = _Stored.model_validate_json(data)
        if stored.kind != self._kind:
            raise ValueError("it is of another kind of engine")
        if not all(0 < cost.mean_s <= cost.upper_s for cost in stored.chunks):
            raise ValueError("costs must be above 0, and nearly always below what they are in the mean")
        age_s = (time.time() if now is None else now) - stored.saved_at
        if age_s > MAX_AGE_S:
            raise ValueError(f"it is {age_s / 86_400:.0f} days old, over {MAX_AGE_S / 86_400:.0f}")
        costs = CostModel.from_snapshot(stored.measured)
        return Learned(costs, stored.chunk_cost_s, stored.chunks, stored.saved_at)

    def load(self) -> Learned | None:
        """As `read`; what cannot be read is told in the log and ignored."""
        try:
            return self.read()
        except (ValueError, OSError) as error:
            log.warning("learned costs in %s are ignored: %s", self.path, _first_line(error))
            return None

    def save(self, costs: CostModel, chunk_cost_s: float, chunks: tuple[ChunkCostAt, ...]) -> bool:
        """Replace the file. Returns False where that cannot be, which is told in the log once, and not tried again."""
        if not self._writable:
            return False
        stored = _Stored(
            format=FORMAT,
            kind=self._kind,
            saved_at=time.time(),
            chunk_cost_s=chunk_cost_s,
            chunks=chunks,
            measured=costs.snapshot(),
        )
        # Beside it, so that the change is a rename; by process, for several ranks may end at once.
        draft = self.path.with_suffix(f".{os.getpid()}.tmp")
        try:
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            draft.write_text(stored.model_dump_json(indent=1) + "\n")
            draft.replace(self.path)
            _prune(self.path.parent)
        except OSError as error:
            self._writable = False
            with contextlib.suppress(OSError):
                draft.unlink(missing_ok=True)
            log.warning("learned costs are not kept in %s (%s): set engine.costs_dir", self.path.parent, error.strerror)
            return False
        return True


def cost_file(settings: EngineSettings, device_title: str, vae: str) -> CostFile | None:
    """Where an engine of these settings keeps what it learns; None where that is switched off.

    Args:
        device_title: the device's name for people.
        vae: which are held (`engine.memory.Demand`).

    Raises: OSError for a model folder that cannot be read.
    """
    folder = settings.costs_folder
    if folder is None:
        return None
    model_dir = settings.model_dir
    kind = {
        **settings.model_dump(mode="json", exclude=NO_MATTER),
        "model": model_dir.name,
        "config_sha256": hashlib.sha256((model_dir / CONFIG_FILE).read_bytes()).hexdigest(),
        "dtype": settings.precision,
        "ranks": settings.rank_count,
        "vae": vae,
        "device_title": device_title,
        "livebrush": _version("livebrush"),
        "torch": _version("torch"),
    }
    return CostFile(folder, kind)


def cpu_title() -> str:
    """The CPU's name."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _prune(folder: Path) -> None:
    """Delete our oldest files beyond MAX_FILES, drafts that a killed process left among them."""
    ages = []
    for path in (*folder.glob("costs-*.json"), *folder.glob("costs-*.tmp")):
        with contextlib.suppress(OSError):  # gone meanwhile
            ages.append((path.stat().st_mtime, path))
    for _, path in sorted(ages, reverse=True)[MAX_FILES:]:
        path.unlink(missing_ok=True)
