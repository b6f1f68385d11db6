"""What there is on this machine for `engine.choose`: the CPU, GPUs by nvidia-smi, and installed models. No torch."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import psutil

from engine.choose import CPU, Device, Machine, Model, Need
from engine.config import CONFIG_FILE, MODELS_DIR, EngineSettings, serving_profile, user_models_dir
from engine.cost_file import cpu_title
from engine.memory import plan_of

PROBE_TIMEOUT_S = 60.0
QUERY = "--query-gpu=index,name,memory.free"
MIB = 1 << 20
DEV = Path("/dev")


class GpuError(Exception):
    """nvidia-smi is there and does not answer as it should."""


def find_machine() -> Machine:
    """Devices and installed models; a GPU tool that fails means no GPU here (`doctor` says so)."""
    try:
        gpus = find_gpus()
    except GpuError:
        gpus = []
    host = Device(CPU, cpu_title(), psutil.virtual_memory().available)
    return Machine((host, *gpus), installed_models())


def find_gpus() -> list[Device]:
    """GPUs with their free memory, as torch will number them. Raises: GpuError.

    Without nvidia-smi (in a slim container, say) the driver's device files tell how many, not how large.
    """
    tool = shutil.which("nvidia-smi")
    if tool is None:
        files = sorted(DEV.glob("nvidia[0-9]*"))
        return visible([Device(f"cuda:{index}", "NVIDIA GPU", None) for index in range(len(files))], os.environ)
    command = [tool, QUERY, "--format=csv,noheader,nounits"]
    try:
        query = subprocess.run(command, capture_output=True, text=True, timeout=PROBE_TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise GpuError("nvidia-smi does not answer") from error
    if query.returncode or not query.stdout.strip():
        raise GpuError("nvidia-smi finds none")
    return visible(parse_gpus(query.stdout), os.environ)


def visible(gpus: list[Device], environment: Mapping[str, str]) -> list[Device]:
    """Those that CUDA_VISIBLE_DEVICES leaves, numbered anew in its order; names other than numbers are left alone."""
    shown = environment.get("CUDA_VISIBLE_DEVICES")
    if shown is None or not all(part.strip().lstrip("-").isdigit() for part in shown.split(",") if part.strip()):
        return gpus
    by_number = {gpu.name: gpu for gpu in gpus}
    chosen = [by_number.get(f"cuda:{part.strip()}") for part in shown.split(",") if part.strip()]
    return [replace(gpu, name=f"cuda:{index}") for index, gpu in enumerate(gpu for gpu in chosen if gpu)]


def parse_gpus(text: str) -> list[Device]:
    """Lines of `index, name, free MiB`; memory that is not a number (shared with the host, say) is unknown."""
    devices = []
    for line in text.strip().splitlines():
        cells = [cell.strip() for cell in line.split(",")]
        if len(cells) < 3 or not cells[0].isdigit():
            raise GpuError(f"nvidia-smi says {line!r}")
        free = int(cells[-1]) * MIB if cells[-1].isdigit() else None
        devices.append(Device(f"cuda:{cells[0]}", ", ".join(cells[1:-1]), free))
    return devices


def installed_models() -> tuple[Model, ...]:
    """Every readable model folder, shipped or downloaded; the first of a name counts, as in EngineSettings."""
    found: dict[str, Model] = {}
    for root in (MODELS_DIR, user_models_dir()):
        for config in sorted(root.glob(f"*/{CONFIG_FILE}")):
            folder = config.parent
            if folder.name not in found and (model := _read_model(folder)):
                found[folder.name] = model
    return tuple(found.values())


def _read_model(folder: Path) -> Model | None:
    """None for a folder that cannot be read: naming it serves the error, having it lie there breaks nothing."""
    try:
        weights = sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
        return Model(folder.name, serving_profile(folder), weights)
    except (OSError, ValueError):
        return None


def need_of(settings: EngineSettings, available_bytes: int | None = None) -> Need:
    """Bytes by part, as the engine will count them when it starts (`engine.memory.plan_of`).

    available_bytes: free on the device, which decides whether both VAEs are held where that is left open.
    Raises: FileNotFoundError or ValueError for a model folder that is not one.
    """
    plan = plan_of(settings, available_bytes)
    text_bytes = 0 if plan.demand.text_here else plan.shape.text_bytes
    return Need({part.name: part.size_bytes for part in plan.parts}, {"text encoder": text_bytes} if text_bytes else {})
