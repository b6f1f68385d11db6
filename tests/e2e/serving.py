"""The server as users start it: the console script in a process of its own."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil

from engine.config import EngineSettings

SCRIPT = Path(sys.executable).with_name("livebrush")
STOP_TIMEOUT_S = 20
# However busy the machine is: a lower rate is agreed, nobody is refused and nobody falls back to the camera.
PATIENT = {"LIVEBRUSH_MIN_FPS": "0.5", "LIVEBRUSH_LATENCY_BUDGET_S": "10"}


def has_model() -> bool:
    """Whether the default model's weights are here."""
    try:
        return (EngineSettings().model_dir / "model.safetensors").is_file()
    except FileNotFoundError:
        return False


class Server:
    """`livebrush serve` on loopback, from entering the context to leaving it."""

    def __init__(
        self,
        log: Path,
        *,
        engine: str,
        port: int = 0,
        options: tuple[str, ...] = (),
        patient: bool = False,
        **settings: str,
    ) -> None:
        self.url = ""
        self.port = port
        self._log = log
        self._command = [str(SCRIPT), "serve", "--engine", engine, *options]
        self._environment = {**os.environ, "OMP_NUM_THREADS": "1", **(PATIENT if patient else {}), **settings}
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()

    def start(self) -> None:
        """Start the process and wait for the line that names its address."""
        with self._log.open("a") as log:
            self._process = subprocess.Popen(
                [*self._command, "--port", str(self.port)],
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=self._environment,
            )
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        found = re.search(r"http://[\w.]+:(\d+)", line)
        if found is None:
            self.stop()
            raise RuntimeError(f"the server did not start: {line!r}; {self._log.read_text()[-2000:]}")
        self.url, self.port = found.group(0), int(found.group(1))

    @property
    def pid(self) -> int:
        """Of the server's process."""
        assert self._process is not None
        return self._process.pid

    def stop(self) -> None:
        """Ask the process to end; kill it when it does not."""
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.communicate(timeout=STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()
            raise
        finally:
            self._process = None

    def kill(self) -> None:
        """End the process as a crash would: no goodbye to anybody."""
        assert self._process is not None
        for child in psutil.Process(self._process.pid).children(recursive=True):
            child.kill()
        self._process.kill()
        self._process.communicate()
        self._process = None

    def get(self, path: str, url: str = "") -> str:
        """The body of a GET; of another listener where its `url` is given."""
        with urllib.request.urlopen((url or self.url) + path, timeout=30) as answer:
            body: bytes = answer.read()
        return body.decode()

    def is_ready(self) -> bool:
        """Whether the model is loaded and warm."""
        try:
            return bool(json.loads(self.get("/readyz"))["ready"])
        except urllib.error.HTTPError as not_yet:
            not_yet.close()
            return False

    def capacity(self) -> dict[str, Any]:
        """GET /api/v1/capacity."""
        found: dict[str, Any] = json.loads(self.get("/api/v1/capacity"))
        return found

    def log_text(self) -> str:
        """What the server has logged so far."""
        return self._log.read_text()

    def metrics(self) -> str:
        """The text of /metrics."""
        admin = re.findall(r"metrics at (http://[\w.]+:\d+)/metrics", self._log.read_text())[-1]
        return self.get("/metrics", admin)

    def ended(self) -> dict[str, int]:
        """Sessions ended so far, by reason."""
        rows = re.findall(r'livebrush_sessions_ended_total\{reason="(\w+)"\} ([\d.]+)', self.metrics())
        return {reason: int(float(count)) for reason, count in rows}

    def family(self) -> list[psutil.Process]:
        """The server's process, and those that it has started."""
        assert self._process is not None
        process = psutil.Process(self._process.pid)
        return [process, *process.children(recursive=True)]

    def memory_mb(self) -> float:
        """Resident memory of the server and its rank processes, in MiB."""
        return float(sum(member.memory_info().rss for member in self.family())) / 2**20


class GatewayProcess(Server):
    """`livebrush gateway` on loopback, before servers."""

    def __init__(self, log: Path, *nodes: Server, options: tuple[str, ...] = ()) -> None:
        super().__init__(log, engine="fake")
        self._command = [str(SCRIPT), "gateway", "--nodes", ",".join(node.url for node in nodes), *options]
