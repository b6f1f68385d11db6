"""Prompts to states in a process of their own, so that an encoder of 11 GB neither delays nor hurts a rank.

`TextService` is the rank's side: `request` never waits. A thread owns the process, feeds it one prompt at a time and
starts it anew when it dies or hangs, a bounded number of times. States once made are kept, the latest in memory and
as small files in the model folder's `prompts`: a restarted server needs no encoder for prompts it knows.

The process is started as `python -m engine.text_service`, speaks over one socket pair and ends with end of file there:
it cannot outlive its rank. A message is JSON; the states follow as bytes.

Axes in names: L text positions, K text width; P true pieces, those before the padding.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import logging
import os
import socket
import subprocess
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine.api import EngineError
from engine.wan.text_encoder import EncodedPrompt
from engine.wan.umt5 import PromptEncoder, clean_prompt, load_umt5

log = logging.getLogger(__name__)

TEXT_ENCODER_DIR, PROMPTS_DIR = "text_encoder", "prompts"
MAX_WAITING = 64
MAX_KEPT, MAX_STORED = 128, 512
MAX_FAILURES = 4  # in a row; then the encoder is gone for good
TRIES_PER_PROMPT = 2
START_TIMEOUT_S, ENCODE_TIMEOUT_S, STOP_TIMEOUT_S = 600.0, 60.0, 3.0
_POLL_S = 0.1
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class TextService:
    """Text states from the process of a model folder's encoder. See `TextEncoder`; safe to call from one thread."""

    def __init__(
        self,
        folder: Path,
        text_len: int,
        text_dim: int,
        *,
        device: str = "cpu",
        command: Sequence[str] | None = None,
        start_timeout_s: float = START_TIMEOUT_S,
        encode_timeout_s: float = ENCODE_TIMEOUT_S,
    ) -> None:
        """Start the encoder's process, without waiting for it.

        Args:
            folder: a model's, with the encoder in its `text_encoder`; without that, only known prompts are had.
            text_len: positions L of a prompt's states.
            text_dim: width K the states must have.
            device: torch device of the encoder.
            command: what to start instead; it is given the number of its socket.
            encode_timeout_s: a process silent this long over one prompt is started anew.
        """
        self._text_len, self._text_dim = text_len, text_dim
        encoder = folder / TEXT_ENCODER_DIR
        self._command = tuple(
            command or (sys.executable, "-P", "-m", "engine.text_service", str(encoder), "--device", device)
        )
        self._start_timeout_s, self._encode_timeout_s = start_timeout_s, encode_timeout_s
        self._store = PromptStore(folder / PROMPTS_DIR)
        self._kept: OrderedDict[str, Tensor] = OrderedDict()
        self._waiting: OrderedDict[str, int] = OrderedDict()
        self._failed: OrderedDict[str, str] = OrderedDict()
        self._changed = threading.Condition()
        self._closed = False
        self._gone = ""
        self.restarts = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None
        if command is None and not encoder.is_dir():
            self._gone = f"{folder} has no {TEXT_ENCODER_DIR}: `livebrush models download` or `convert` adds it"
            self._thread = None
        else:
            self._thread = threading.Thread(target=self._run, name="text-encoder", daemon=True)
            self._thread.start()

    def request(self, prompt: str) -> EncodedPrompt | None:
        """See `TextEncoder.request`. An encoder that is gone for good still has the prompts it knew."""
        text = clean_prompt(prompt)
        with self._changed:
            if (states_PK := self._kept.get(text)) is not None:
                self._kept.move_to_end(text)
                return self._padded(states_PK)
        if (stored := self._store.read(text, self._text_dim)) is not None:
            with self._changed:
                self._keep(text, stored)
            return self._padded(stored)
        with self._changed:
            # Once more: it may have come while the disk was asked.
            if (states_PK := self._kept.get(text)) is not None:
                return self._padded(states_PK)
            if why := self._failed.get(text) or self._gone:
                raise EngineError(why)
            if text not in self._waiting:
                self._waiting[text] = 0
                while len(self._waiting) > MAX_WAITING:
                    self._waiting.popitem(last=False)
                self._changed.notify_all()
        return None

    def encode(self, prompt: str) -> EncodedPrompt:
        """See `TextEncoder.encode`; waits as long as a start and a prompt may take."""
        deadline = time.monotonic() + self._start_timeout_s + self._encode_timeout_s
        while (encoded := self.request(prompt)) is None:
            if time.monotonic() > deadline:
                raise EngineError(f"no text states after {self._start_timeout_s + self._encode_timeout_s:.0f} s")
            with self._changed:
                self._changed.wait(_POLL_S)
        return encoded

    def close(self) -> None:
        """End the process; a prompt still waited for will not come. Bounded by a few seconds."""
        with self._changed:
            self._closed = True
            self._gone = self._gone or "the text encoder was closed"
            self._changed.notify_all()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(2 * STOP_TIMEOUT_S)

    def _padded(self, states_PK: Tensor) -> EncodedPrompt:
        pieces = len(states_PK)
        states_LK = torch.zeros(self._text_len, self._text_dim)
        states_LK[:pieces] = states_PK[: self._text_len]
        return EncodedPrompt(states_LK, states_PK.float().mean(0), pieces)

    def _keep(self, text: str, states_PK: Tensor) -> None:
        self._kept[text] = states_PK
        while len(self._kept) > MAX_KEPT:
            self._kept.popitem(last=False)

    # From here on: the thread.

    def _run(self) -> None:
        failures = 0
        try:
            while not self._closed:
                text: str | None = None
                try:
                    if self._connection is None:
                        self._start()
                    text = self._next()
                    if text is not None:
                        self._answer(text, self._ask(text))
                        failures = 0
                except _Hopeless as error:
                    self._give_up(str(error))
                    return
                except (EOFError, OSError, ValueError) as error:
                    if self._closed:
                        return
                    failures += 1
                    log.warning("text encoder: %s; start %d of %d", _reason(error), failures + 1, MAX_FAILURES)
                    self._stop()
                    self.restarts += 1
                    if text is not None:
                        self._blame(text, _reason(error))
                    if failures >= MAX_FAILURES:
                        self._give_up(f"the text encoder failed {failures} times in a row: {_reason(error)}")
                        return
        finally:
            self._stop()

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                self._process = subprocess.Popen(
                    [*self._command, str(theirs.fileno())],
                    pass_fds=(theirs.fileno(),),
                    stdin=subprocess.DEVNULL,
                    # The rank's own single thread would make a prompt take minutes on a CPU.
                    env=os.environ | {"OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // 2))},
                )
            except OSError as error:
                ours.close()
                raise _Hopeless(f"cannot start the text encoder: {error}") from error
        self._connection = Connection(ours.detach())
        hello = self._receive(self._start_timeout_s)
        if refusal := hello.get("error"):
            raise _Hopeless(f"the text encoder cannot be loaded: {refusal}")

    def _next(self) -> str | None:
        """The prompt that waits longest; None after a while without any, or when the process is no more."""
        with self._changed:
            if not self._waiting:
                self._changed.wait(1.0)
            text = next(iter(self._waiting), None)
        assert self._process is not None
        if text is None and self._process.poll() is not None:
            raise EOFError
        return text

    def _ask(self, text: str) -> Tensor:
        assert self._connection is not None
        self._connection.send_bytes(json.dumps({"prompt": text}).encode())
        header = self._receive(self._encode_timeout_s)
        if error := header.get("error"):
            raise ValueError(error)
        shape, dtype = [int(size) for size in header["shape"]], _DTYPES[header["dtype"]]
        self._wait(self._encode_timeout_s)
        content = bytearray(self._connection.recv_bytes())
        states_PK = torch.frombuffer(content, dtype=dtype).view(shape)
        if shape[-1] != self._text_dim or len(shape) != 2:
            raise _Hopeless(f"the text encoder gives states {shape}, the transformer takes width {self._text_dim}")
        if not bool(states_PK.isfinite().all()):
            raise ValueError("the states are not finite")
        return states_PK

    def _receive(self, timeout_s: float) -> dict[str, Any]:
        self._wait(timeout_s)
        assert self._connection is not None
        message: dict[str, Any] = json.loads(self._connection.recv_bytes())
        return message

    def _wait(self, timeout_s: float) -> None:
        """Until there is something to read. Raises: EOFError, TimeoutError (an OSError)."""
        assert self._connection is not None
        deadline = time.monotonic() + timeout_s
        while not self._connection.poll(_POLL_S):
            if self._closed:
                raise EOFError
            if time.monotonic() > deadline:
                raise TimeoutError(f"no answer within {timeout_s:g} s")

    def _answer(self, text: str, states_PK: Tensor) -> None:
        self._store.write(text, states_PK)
        with self._changed:
            self._waiting.pop(text, None)
            self._keep(text, states_PK)
            self._changed.notify_all()

    def _blame(self, text: str, reason: str) -> None:
        """Count a failure against the prompt that was being encoded; after too many it is not tried again."""
        with self._changed:
            tries = self._waiting.get(text, 0) + 1
            if text in self._waiting:
                self._waiting[text] = tries
            if tries >= TRIES_PER_PROMPT:
                self._waiting.pop(text, None)
                self._failed[text] = f"the text encoder failed {tries} times on this prompt: {reason}; try other words"
                while len(self._failed) > MAX_WAITING:
                    self._failed.popitem(last=False)
                self._changed.notify_all()

    def _give_up(self, reason: str) -> None:
        log.error("%s", reason)
        with self._changed:
            self._gone = reason
            self._waiting.clear()
            self._changed.notify_all()

    def _stop(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process = None


class _Hopeless(Exception):
    """Starting again would not help."""


def _reason(error: BaseException) -> str:
    return str(error) or ("its process ended" if isinstance(error, EOFError) else type(error).__name__)


class PromptStore:
    """States of known prompts as small files in one folder, the oldest used removed. Faults of the disk are misses."""

    def __init__(self, folder: Path, limit: int = MAX_STORED) -> None:
        self._folder, self._limit = folder, limit

    def read(self, text: str, text_dim: int) -> Tensor | None:
        """The states [P, K] of a clean prompt, None if not stored, damaged or of another width."""
        path = self._path(text)
        try:
            states_PK = load_file(path)["states"]
        except (OSError, SafetensorError, KeyError):
            return None
        with contextlib.suppress(OSError):
            path.touch()
        return states_PK if states_PK.ndim == 2 and states_PK.shape[1] == text_dim else None

    def write(self, text: str, states_PK: Tensor) -> None:
        """Store states, whole or not at all."""
        path = self._path(text)
        part = path.with_suffix(".part")
        try:
            self._folder.mkdir(exist_ok=True)
            save_file({"states": states_PK.contiguous()}, part, metadata={"prompt": text})
            part.replace(path)
            stored = sorted(self._folder.glob("*.safetensors"), key=lambda file: file.stat().st_mtime)
            for old in stored[: -self._limit]:
                old.unlink(missing_ok=True)
        except (OSError, SafetensorError) as error:
            log.info("prompt not stored: %s", error)

    def _path(self, text: str) -> Path:
        return self._folder / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.safetensors"


def serve(connection: Connection, load: Callable[[], PromptEncoder]) -> None:
    """The process's side: load, say so, then answer prompts until end of file."""
    with contextlib.suppress(EOFError, OSError):
        try:
            encode = load()
        except ImportError as error:
            _send(connection, {"error": f"{error}; install it with `pip install 'livebrush[wan]'`"})
            return
        except (EngineError, RuntimeError, OSError) as error:
            _send(connection, {"error": str(error)})
            return
        _send(connection, {"ready": True})
        while True:
            prompt = json.loads(connection.recv_bytes())["prompt"]
            states_PK = encode(prompt).contiguous()
            _send(connection, {"shape": list(states_PK.shape), "dtype": str(states_PK.dtype).removeprefix("torch.")})
            connection.send_bytes(states_PK.view(torch.uint8).numpy().tobytes())


def _send(connection: Connection, message: dict[str, object]) -> None:
    connection.send_bytes(json.dumps(message).encode())


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry of the process."""
    parser = argparse.ArgumentParser(description="Text encoder of a Wan model; started by a rank, not by hand.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("socket", type=int)
    options = parser.parse_args(arguments)
    serve(Connection(options.socket), lambda: load_umt5(options.folder, options.device))


if __name__ == "__main__":
    main()
