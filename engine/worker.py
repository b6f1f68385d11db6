"""One rank's loop: read commands, ask the scheduler for the next chunk, render it, hand it on.

Started by `engine.launch` with the control socket, the frame memory and the settings as arguments. End of file on the
control socket is the order to stop.
"""

from __future__ import annotations

import logging
import selectors
import socket
import statistics
import sys
import time
from dataclasses import dataclass

import numpy as np
import torch

from engine.api import EngineError, EngineState, StreamParams
from engine.config import CHUNK_FRAMES, EngineSettings
from engine.frame_memory import FrameLayout, FrameMemory
from engine.messages import (
    Close,
    Closed,
    Done,
    Dropped,
    FromRank,
    Open,
    Status,
    StreamFailed,
    Submit,
    ToRank,
    Update,
    decode_to_rank,
    encode,
)
from engine.pipeline import Pipeline
from engine.scheduler import Drop, Item, Scheduler
from engine.session import SessionState
from engine.wan.weights import load_model

log = logging.getLogger(__name__)

WARM_UP_CHUNKS = 5
RECEIVE_BYTES = 64 * 1024


class Disconnected(Exception):
    """The server closed the control connection: time to go."""


class Connection:
    """The control socket as messages in and out. Reads wait only when told to."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._selector = selectors.DefaultSelector()
        self._selector.register(sock, selectors.EVENT_READ)
        self._buffer = b""

    def send(self, message: FromRank) -> None:
        """Write one message. Raises Disconnected when nobody reads any more."""
        try:
            self._sock.sendall(encode(message))
        except OSError as error:
            raise Disconnected from error

    def receive(self, *, wait: bool) -> list[ToRank]:
        """Every message that has arrived; with `wait`, at least one. Raises Disconnected at end of file."""
        messages: list[ToRank] = []
        while self._selector.select(None if wait and not messages else 0):
            try:
                data = self._sock.recv(RECEIVE_BYTES)
            except OSError as error:
                raise Disconnected from error
            if not data:
                raise Disconnected
            *lines, self._buffer = (self._buffer + data).split(b"\n")
            messages += [decode_to_rank(line) for line in lines]
        return messages


@dataclass(slots=True)
class _Stream:
    """A stream in this rank: its model state, and a parameter change that waits for the next chunk border."""

    state: SessionState
    revision: int = 0
    pending: Update | None = None


class Worker:
    """Holds the model, the streams and what waits for them."""

    def __init__(self, connection: Connection, memory: FrameMemory, settings: EngineSettings) -> None:
        self._connection = connection
        self._memory = memory
        self._settings = settings
        self._scheduler = Scheduler()
        self._streams: dict[int, _Stream] = {}
        self._cost_s = 0.0
        self._pipeline: Pipeline

    def load(self) -> None:
        """Load and warm up the model, reporting progress; `ready` carries the measured cost of a chunk."""
        send = self._connection.send
        settings = self._settings
        send(Status(state=EngineState.LOADING, percent=10, detail=f"loading {settings.model}"))
        model = load_model(settings.model_dir, torch.device(settings.device), torch.float32)
        self._pipeline = Pipeline(model, settings.width, settings.height)
        state = self._pipeline.open(StreamParams(prompt="watercolor"))
        frames = np.zeros((CHUNK_FRAMES, settings.height, settings.width, 3), np.uint8)
        costs = []
        for done in range(WARM_UP_CHUNKS):
            percent = 50 + 50 * done // WARM_UP_CHUNKS
            send(Status(state=EngineState.WARMING, percent=percent, detail="warming up"))
            started = time.monotonic()
            self._pipeline.render(state, frames)
            costs.append(time.monotonic() - started)
        self._cost_s = statistics.median(costs)
        send(
            Status(
                state=EngineState.READY,
                percent=100,
                chunk_frames=CHUNK_FRAMES,
                chunk_cost_s=self._cost_s,
            )
        )

    def run(self) -> None:
        """Serve until the server closes the connection, which raises Disconnected."""
        while True:
            item, drops = self._scheduler.pick(time.monotonic(), self._cost_s)
            self._report(drops)
            if item is not None:
                self._render(item)
            for message in self._connection.receive(wait=item is None):
                self._handle(message)

    def _handle(self, message: ToRank) -> None:
        match message:
            case Open():
                self._streams[message.stream] = _Stream(self._pipeline.open(message.params))
                self._scheduler.open(message.stream)
            case Submit():
                item = Item(message.stream, message.chunk, message.slot, message.frames, message.deadline)
                self._report(self._scheduler.push(item))
            case Update():
                if stream := self._streams.get(message.stream):
                    stream.pending = message
            case Close():
                self._scheduler.close(message.stream)
                self._streams.pop(message.stream, None)
                self._connection.send(Closed(stream=message.stream))

    def _report(self, drops: list[Drop]) -> None:
        for drop in drops:
            item = drop.item
            self._connection.send(Dropped(stream=item.stream, chunk=item.chunk, slot=item.slot, reason=drop.reason))

    def _render(self, item: Item) -> None:
        """Render one chunk in its slot. A fault ends this stream and no other."""
        stream = self._streams[item.stream]
        started = time.monotonic()
        try:
            if stream.pending is not None:
                self._pipeline.set_params(stream.state, stream.pending.params)
                stream.revision, stream.pending = stream.pending.revision, None
            slot = self._memory.slot(item.stream, item.slot, item.frames)
            slot[:] = self._pipeline.render(stream.state, slot)
        except (RuntimeError, ValueError) as error:
            log.exception("stream %d failed at chunk %d", item.stream, item.chunk)
            self._scheduler.close(item.stream)
            del self._streams[item.stream]
            self._connection.send(StreamFailed(stream=item.stream, message=f"rendering failed: {error}"))
            return
        finished = time.monotonic()
        self._cost_s += 0.1 * (finished - started - self._cost_s)
        self._connection.send(
            Done(
                stream=item.stream,
                chunk=item.chunk,
                slot=item.slot,
                revision=stream.revision,
                started_at=started,
                finished_at=finished,
            )
        )


def main(control_fd: int, memory_fd: int, settings: EngineSettings) -> None:
    """Load, then serve until the server lets go."""
    torch.set_num_threads(settings.threads)
    layout = FrameLayout(settings.max_streams, CHUNK_FRAMES, settings.height, settings.width)
    connection = Connection(socket.socket(fileno=control_fd))
    worker = Worker(connection, FrameMemory(memory_fd, layout), settings)
    try:
        worker.load()
        worker.run()
    except Disconnected:
        log.debug("rank stops: the server closed the connection")
    except EngineError as error:
        # Starting again would not help: the model folder must be put right first.
        connection.send(Status(state=EngineState.FAILED, percent=0, detail=str(error)))


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s rank %(levelname)s %(message)s")
    main(int(sys.argv[1]), int(sys.argv[2]), EngineSettings.model_validate_json(sys.argv[3]))
