"""What `livebrush doctor` finds without starting the engine: packages, CPU, memory, GPU, model, port, codecs.

torch is asked in a process of its own.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

import psutil

from engine.choose import CPU, GIB, Choice
from engine.cost_file import cost_file, cpu_title
from engine.frame_memory import FrameLayout, FrameMemory
from engine.memory import plan_of
from server.machine import GpuError, find_gpus
from server.settings import ServerSettings

# Larger files are compared by size here, and by hash in `livebrush models verify`.
MAX_HASHED_BYTES = 100_000_000
PROBE_TIMEOUT_S = 60.0
# Measured: the engine process with torch and the small model 0.4 GB, the process beside it 0.1 to 0.2 GB.
NEEDED_BYTES = 1 << 30
COMFORTABLE_BYTES = 2 << 30
BUSY_SHARE = 0.5
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
CODECS = {"libvpx": "WebRTC's VP8", "libx264": "WebRTC's H.264 and .mp4", "libopus": "sound", "libvpx-vp9": ".webm"}
REINSTALL = "run `make run`, or .venv/bin/pip install -e ."
TORCH_PROBE = (
    "import json, torch; print(json.dumps({'cuda': torch.cuda.is_available(),"
    " 'capability': torch.backends.cpu.get_cpu_capability()}))"
)


class Level(StrEnum):
    """How a finding stands. PROBLEM: it prevents serving."""

    OK = "ok"
    WARNING = "warning"
    PROBLEM = "problem"


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the screen. cure: what to do about a warning or problem."""

    name: str
    level: Level
    text: str
    cure: str = ""


def look_around(settings: ServerSettings) -> list[Finding]:
    """Everything that needs no running engine."""
    return [
        *check_versions(),
        check_cpu(settings.engine.threads),
        check_memory(psutil.virtual_memory().available),
        check_torch(settings.engine.device),
        check_gpu(),
        check_model(settings),
        check_learned(settings),
        check_frame_memory(settings),
        check_port(settings.host, settings.port),
        check_codecs(),
        check_browser(),
    ]


def check_versions() -> Iterator[Finding]:
    """Python, Livebrush, and every package that is pinned to one version."""
    wrong = []
    for requirement in requires("livebrush") or []:
        name, pinned, wanted = requirement.partition("==")
        if not pinned or ";" in requirement:  # behind the semicolon: extras
            continue
        try:
            found = version(name).partition("+")[0]
        except PackageNotFoundError:
            found = "missing"
        if found != wanted:
            wrong.append(f"{name} {found}, tested with {wanted}")
    text = f"livebrush {version('livebrush')}, Python {platform.python_version()}, {platform.system()}"
    yield Finding("versions", Level.OK, text)
    if wrong:
        yield Finding("packages", Level.PROBLEM, "; ".join(wrong), REINSTALL)


def check_cpu(threads: int) -> Finding:
    """Model, cores, and whether something else is at work on them."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    text = f"{cpu_title()}, {cores} core{'s' if cores > 1 else ''}; the model uses {threads}, video the others"
    if cores <= threads:
        cure = "a second core roughly doubles the rate"
        return Finding("cpu", Level.WARNING, f"{text}: they share it", cure)
    if os.getloadavg()[0] > BUSY_SHARE * cores:
        busy = f"{text}; busy (load {os.getloadavg()[0]:.1f})"
        return Finding("cpu", Level.WARNING, busy, "stop other work: the speed below is measured beside it")
    return Finding("cpu", Level.OK, text)


def check_memory(available_bytes: int) -> Finding:
    """Room for the engine process and the server."""
    text = f"{available_bytes / 1e9:.1f} GB available"
    if available_bytes < NEEDED_BYTES:
        return Finding("memory", Level.PROBLEM, text, f"close programs until {NEEDED_BYTES / 1e9:.1f} GB are available")
    if available_bytes < COMFORTABLE_BYTES:
        return Finding("memory", Level.WARNING, text, "enough to serve, not much beside it")
    return Finding("memory", Level.OK, text)


@functools.cache
def check_torch(device: str) -> Finding:
    """torch as the engine process will find it; asked once, for it takes seconds to load."""
    try:
        probe = subprocess.run(
            [sys.executable, "-P", "-c", TORCH_PROBE], capture_output=True, text=True, timeout=PROBE_TIMEOUT_S
        )
    except subprocess.TimeoutExpired:
        return Finding("torch", Level.PROBLEM, f"does not load within {PROBE_TIMEOUT_S:.0f} s", REINSTALL)
    if probe.returncode:
        reason = (probe.stderr.strip().splitlines() or ["no message"])[-1]
        return Finding("torch", Level.PROBLEM, f"does not load: {reason}", REINSTALL)
    found = json.loads(probe.stdout)
    text = f"torch {version('torch')} on {device}, CPU kernels {found['capability']}"
    if device.startswith("cuda") and not found["cuda"]:
        return Finding("torch", Level.PROBLEM, f"{text}; it sees no GPU", "install the CUDA driver, or use device cpu")
    if found["capability"] == "DEFAULT":
        return Finding("torch", Level.WARNING, f"{text}: no AVX2", "a CPU with AVX2 is several times faster")
    return Finding("torch", Level.OK, text)


def check_gpu() -> Finding:
    """What nvidia-smi knows."""
    try:
        gpus = find_gpus()
    except GpuError as error:
        return Finding("gpu", Level.WARNING, str(error), "look at the driver; the CPU does the work")
    if not gpus:
        return Finding("gpu", Level.OK, "none found: the CPU does the work")
    free = ["" if gpu.memory_bytes is None else f", {size_words(gpu.memory_bytes)} free" for gpu in gpus]
    return Finding(
        "gpu", Level.OK, "; ".join(f"{gpu.name} {gpu.title}{room}" for gpu, room in zip(gpus, free, strict=True))
    )


def check_choice(choice: Choice | None, refusal: str = "") -> Iterator[Finding]:
    """What `serve` would run here and why, and what that needs by part."""
    if refusal:
        yield Finding("choice", Level.PROBLEM, refusal, "`livebrush doctor --model auto` shows what fits")
    if choice is None:
        return
    yield Finding("choice", Level.OK, choice.reason)
    need = choice.need
    for place, parts in ((choice.settings.device, need.device), ("main memory", need.host)):
        if parts:
            listed = ", ".join(f"{name} {size_words(size)}" for name, size in parts.items())
            yield Finding("needs", Level.OK, f"{size_words(sum(parts.values()))} on {place}: {listed}")


def size_words(count: int) -> str:
    """Bytes as a person reads them."""
    return f"{count / GIB:.1f} GiB" if count >= GIB else f"{count / (1 << 20):.0f} MiB"


def check_model(settings: ServerSettings) -> Finding:
    """The model folder, and its weights against config.json: by hash, large ones by size."""
    try:
        folder = settings.engine.model_dir
        config = json.loads((folder / "config.json").read_text())
        if config.get("files"):
            return _check_files(folder, config["files"])
        wanted = config["sha256"]
        with (folder / "model.safetensors").open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except (OSError, ValueError, KeyError) as error:
        return Finding(
            "model", Level.PROBLEM, f"{settings.engine.model}: {error}", "get the folder again: git checkout"
        )
    size_mb = (folder / "model.safetensors").stat().st_size / 1e6
    text = f"{folder.name}, {size_mb:.1f} MB, sha256 {found[:12]}"
    if found != wanted:
        cure = "get the folder again: git checkout engine/models"
        return Finding("model", Level.PROBLEM, f"{text} is not {wanted[:12]} of config.json", cure)
    return Finding("model", Level.OK, text)


def _check_files(folder: Path, files: dict[str, dict[str, object]]) -> Finding:
    """A model of several files."""
    wrong, unhashed = [], 0
    for name, record in files.items():
        path = folder / name
        size = path.stat().st_size if path.is_file() else 0
        if size != record["size_bytes"]:
            wrong.append(f"{name} has {size} bytes, not {record['size_bytes']}")
        elif size > MAX_HASHED_BYTES:
            unhashed += 1
        else:
            with path.open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != record["sha256"]:
                    wrong.append(f"{name} has another SHA-256")
    total = sum(int(str(record["size_bytes"])) for record in files.values())
    text = f"{folder.name}, {size_words(total)} in {len(files)} files"
    if wrong:
        cure = "get the model again: livebrush models download, or convert"
        return Finding("model", Level.PROBLEM, f"{text}: {'; '.join(wrong)}", cure)
    if unhashed:
        text += f", {unhashed} of them by size alone (`livebrush models verify` reads them)"
    return Finding("model", Level.OK, text)


def check_learned(settings: ServerSettings) -> Finding:
    """What earlier runs of the engine have learned of its costs, with which the next one begins."""
    engine = settings.engine
    if engine.costs_folder is None:
        return Finding("learned", Level.OK, "nothing is kept from run to run: engine.costs_dir is off")
    title, free = cpu_title(), psutil.virtual_memory().available
    if engine.device != CPU:
        with contextlib.suppress(GpuError, StopIteration):
            gpu = next(gpu for gpu in find_gpus() if gpu.name == engine.device)
            title, free = gpu.title, gpu.memory_bytes
    try:
        file = cost_file(engine, title, plan_of(engine, free).demand.vae)
    except (OSError, ValueError):
        return Finding("learned", Level.OK, "depends on the model")
    assert file is not None  # there is a folder
    try:
        learned = file.read()
    except (OSError, ValueError) as error:
        text = f"{file.path} is ignored: {(str(error).splitlines() or [''])[0]}"
        return Finding("learned", Level.WARNING, text, "delete it; the next sessions make another")
    if learned is None:
        return Finding("learned", Level.OK, f"no costs of such an engine yet in {file.path.parent}")
    saved = time.strftime("%Y-%m-%d %H:%M", time.localtime(learned.saved_at))
    text = f"{learned.chunk_cost_s * 1e3:.0f} ms a chunk in service, {learned.costs.passes} passes until {saved}"
    return Finding("learned", Level.OK, f"{text}: {file.path}")


def check_frame_memory(settings: ServerSettings) -> Finding:
    """Shared memory for the frames of every stream."""
    try:
        layout = FrameLayout.of(settings.engine)
    except (FileNotFoundError, ValueError):
        return Finding("frame memory", Level.OK, "depends on the model")
    try:
        memory = FrameMemory.create(layout)
    except (OSError, ValueError) as error:
        return Finding("frame memory", Level.PROBLEM, f"{layout.total_bytes / 1e6:.0f} MB: {error}", "free memory")
    memory.close()
    kind = "memfd" if hasattr(os, "memfd_create") else "a temporary file"
    return Finding("frame memory", Level.OK, f"{layout.total_bytes / 1e6:.0f} MB through {kind}")


def check_port(host: str, port: int) -> Finding:
    """Whether the page's port is free."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            cure = "fine if that is Livebrush; else choose another: livebrush serve --port 8081"
            return Finding("port", Level.WARNING, f"{host}:{port}: {error.strerror}", cure)
    return Finding("port", Level.OK, f"{host}:{port} is free")


def check_codecs() -> Finding:
    """The codecs inside PyAV."""
    try:
        import av
    except ImportError as error:
        return Finding("codecs", Level.PROBLEM, f"PyAV does not load: {error}", REINSTALL)
    missing = [f"{name} ({use})" for name, use in CODECS.items() if name not in av.codecs_available]
    if missing:
        return Finding(
            "codecs", Level.PROBLEM, f"PyAV lacks {', '.join(missing)}", "install av from PyPI, not a distribution"
        )
    return Finding("codecs", Level.OK, f"PyAV {version('av')} has {', '.join(CODECS)}")


def check_browser() -> Finding:
    """Chromium, which only the tests need."""
    wanted = os.environ.get("LIVEBRUSH_CHROMIUM")
    found = next((path for name in ((wanted,) if wanted else BROWSERS) if (path := shutil.which(name))), None)
    if found is None:
        return Finding("chromium", Level.WARNING, "not found; only `make test` needs it", "apt-get install chromium")
    return Finding("chromium", Level.OK, found)
