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
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import psutil
import torch
from torch import Tensor

from engine.api import EngineError, EngineState, Frames, StreamParams, Understood
from engine.chunks import ChunkCost
from engine.config import MAX_STEPS, CacheConfig, EngineSettings, SamplingConfig, ServingProfile
from engine.cost_model import CostModel, Work
from engine.frame_memory import FrameLayout, FrameMemory
from engine.health import ChunkFigures, Verdict
from engine.lanes import Download
from engine.memory import Demand, check, needed, shape_of
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
from engine.wan.weights import Model, load_model

log = logging.getLogger(__name__)

WARM_UP_CHUNKS = 5
WARM_UP_PROMPT = "watercolor painting"
TEXT_POLL_S = 0.5
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


@dataclass(frozen=True, slots=True)
class _Entered:
    """A chunk that the model has taken up and not yet given back."""

    item: Item
    started_at: float


@dataclass(slots=True)
class _Stream:
    """A stream in this rank: its model state, a parameter change that waits for the next chunk border, and the
    chunks inside, oldest first. told: what the server knows the prompts were taken for."""

    state: SessionState
    pending: Update | None = None
    entered: deque[_Entered] = field(default_factory=deque)
    told: tuple[Understood, ...] = ()


@dataclass(frozen=True, slots=True)
class _Result:
    """One finished chunk on its way to the host."""

    stream: int
    state: SessionState
    revision: int
    frames: Download | None
    figures: Download | None
    understood: tuple[Understood, ...]


class Worker:
    """Holds the model, the streams and what waits for them."""

    def __init__(self, connection: Connection, memory: FrameMemory, settings: EngineSettings) -> None:
        self._connection = connection
        self._memory = memory
        self._settings = settings
        self._costs = CostModel()
        self._scheduler = Scheduler(self._costs, micro_batch=settings.micro_batch)
        self._streams: dict[int, _Stream] = {}
        # Results of passes that may still be running on the device: one is copied out while the next is made.
        self._passes: deque[list[_Result]] = deque()
        self._cost = ChunkCost()
        self._pipeline: Pipeline

    def load(self) -> None:
        """Load and warm up the model, reporting progress; `ready` carries the measured cost of a chunk.

        Raises: EngineError for a model that does not fit the device or its own description.
        """
        settings = self._settings
        profile = settings.profile
        self._tell(EngineState.LOADING, 1, f"loading {settings.model}")
        device = torch.device(settings.device)
        dtype = _dtype(settings, device)
        check_fits(settings, dtype, device)
        model = load_model(
            settings.model_dir,
            device,
            dtype,
            vae=settings.vae,
            loras=settings.loras,
            fp8=settings.fp8,
            text_device=settings.text_device,
            progress=lambda share, what: self._tell(EngineState.LOADING, 1 + round(49 * share), what),
        )
        self._pipeline = make_pipeline(model, settings)
        while model.text.request(WARM_UP_PROMPT) is None:
            # Its gigabytes may take minutes, in a process of its own; a rank that says nothing is taken for dead.
            self._tell(EngineState.WARMING, 50, "loading the text encoder")
            time.sleep(TEXT_POLL_S)
        cost_s = self._warm_up(profile)
        self._cost = ChunkCost(cost_s)
        self._costs.profile([(Work.of_chunk(profile.steps), cost_s)])
        self._pipeline.batch.seal()
        self._connection.send(
            Status(
                state=EngineState.READY,
                percent=100,
                chunk_frames=profile.chunk_frames,
                chunk_cost_s=self._cost.chunk_cost_s,
            )
        )

    def _warm_up(self, profile: ServingProfile) -> float:
        """Render until everything runs at its usual speed; returns what a chunk costs then.

        With compiled passes also what else may come: other numbers of steps, and several streams in a pass.
        """
        settings, pipeline = self._settings, self._pipeline
        states = [pipeline.open(StreamParams(prompt=WARM_UP_PROMPT, steps=profile.steps))]
        first, later = (
            np.zeros((count, settings.height, settings.width, 3), np.uint8)
            for count in (profile.first_chunk_frames, profile.chunk_frames)
        )

        def chunk(streams: Sequence[SessionState]) -> float:
            started = time.monotonic()
            jobs = [(state, pipeline.upload(later if state.chunks else first)) for state in streams]
            for rendered in pipeline.tick(jobs):
                if rendered.frames is not None:
                    pipeline.lanes.download(rendered.frames).wait()
            return time.monotonic() - started

        # Past the filling of the window: from then on every chunk costs the same.
        chunks = max(WARM_UP_CHUNKS, pipeline.pool.window + 2)
        costs = []
        for done in range(chunks):
            self._tell(EngineState.WARMING, 55 + 40 * done // chunks, "warming up")
            costs.append(chunk(states))
        if settings.compile and settings.mode == "batch":
            for steps in range(1, pipeline.max_steps + 1):
                self._tell(EngineState.WARMING, 95, f"compiling for {steps} steps")
                pipeline.set_params(states[0], StreamParams(prompt=WARM_UP_PROMPT, steps=steps))
                for _ in range(steps + 2):
                    chunk(states)
        if settings.compile:
            for count in range(2, settings.micro_batch + 1):
                self._tell(EngineState.WARMING, 97, f"compiling for {count} streams in a pass")
                states.append(pipeline.open(states[0].params))
                for _ in range(chunks):
                    chunk(states)
        for state in states:
            pipeline.close(state)
        return statistics.median(costs[-WARM_UP_CHUNKS:])

    def close(self) -> None:
        """Stop what the model keeps running beside this process."""
        if hasattr(self, "_pipeline"):
            self._pipeline.model.text.close()

    def run(self) -> None:
        """Serve until the server closes the connection, which raises Disconnected."""
        while True:
            picked = self._scheduler.pick(time.monotonic())
            items = list(picked.items)
            self._report(picked.drops)
            if items:
                self._render(items)
            # The newest pass goes on while the one before is delivered; with nothing to do it is waited for.
            while len(self._passes) > (1 if items and self._pipeline.lanes.overlapping else 0):
                self._deliver(self._passes.popleft())
            for message in self._connection.receive(wait=not items):
                self._handle(message)

    def _tell(self, state: EngineState, percent: int, detail: str) -> None:
        self._connection.send(Status(state=state, percent=percent, detail=detail))

    def _handle(self, message: ToRank) -> None:
        match message:
            case Open():
                self._open(message)
            case Submit():
                item = Item(message.stream, message.chunk, message.slot, message.frames, message.deadline)
                self._report(self._scheduler.push(item))
            case Update():
                if stream := self._streams.get(message.stream):
                    stream.pending = message
            case Close():
                self._forget(message.stream)
                self._connection.send(Closed(stream=message.stream))

    def _open(self, message: Open) -> None:
        try:
            state = self._pipeline.open(message.params)
        except (ValueError, MemoryError) as error:
            self._connection.send(StreamFailed(stream=message.stream, message=f"cannot open: {error}"))
            return
        self._streams[message.stream] = _Stream(state)
        self._scheduler.open(message.stream)

    def _forget(self, number: int) -> None:
        self._scheduler.close(number)
        if stream := self._streams.pop(number, None):
            self._pipeline.close(stream.state)

    def _fail(self, number: int, error: Exception) -> None:
        log.error("stream %d failed", number, exc_info=error)
        self._forget(number)
        self._connection.send(StreamFailed(stream=number, message=f"rendering failed: {error}"))

    def _report(self, drops: Sequence[Drop]) -> None:
        for drop in drops:
            item = drop.item
            self._connection.send(Dropped(stream=item.stream, chunk=item.chunk, slot=item.slot, reason=drop.reason))

    # --- one pass

    def _render(self, items: list[Item]) -> None:
        """Queue one pass over the chunks given. A fault ends the streams of this pass and no other."""
        jobs: list[tuple[SessionState, Tensor]] = []
        numbers: dict[int, int] = {}
        started = time.monotonic()
        try:
            for item in items:
                stream = self._streams[item.stream]
                self._take_up_change(stream)
                stream.entered.append(_Entered(item, started))
                frames = self._memory.slot(item.stream, item.slot, item.frames)
                jobs.append((stream.state, self._pipeline.upload(frames)))
                numbers[id(stream.state)] = item.stream
            download = self._pipeline.lanes.download
            results = [
                _Result(
                    numbers[id(done.state)],
                    done.state,
                    done.revision,
                    None if done.frames is None else download(done.frames),
                    None if done.figures is None else download(done.figures),
                    done.understood,
                )
                for done in self._pipeline.tick(jobs)
            ]
        except (RuntimeError, ValueError, EngineError) as error:
            for item in items:
                self._fail(item.stream, error)
            return
        self._passes.append(results)

    def _take_up_change(self, stream: _Stream) -> None:
        """Follow a parameter change; one that the model cannot follow leaves the stream as it is."""
        if stream.pending is None:
            return
        try:
            self._pipeline.set_params(stream.state, stream.pending.params, stream.pending.revision)
        except ValueError as error:
            log.warning("parameters refused: %s", error)
        stream.pending = None

    def _deliver(self, results: list[_Result]) -> None:
        for result in results:
            stream = self._streams.get(result.stream)
            if stream is None or stream.state is not result.state:
                continue  # closed meanwhile
            try:
                frames = None if result.frames is None else result.frames.wait().numpy()
                figures = None if result.figures is None else result.figures.wait().tolist()
            except RuntimeError as error:
                self._fail(result.stream, error)
                continue
            self._send(result, stream, frames, figures)

    def _send(self, result: _Result, stream: _Stream, frames: Frames | None, figures: Sequence[float] | None) -> None:
        """Hand one chunk over: the model's picture, or the camera's where that must not be shown."""
        verdict = Verdict("text_pending")
        if figures is not None:
            verdict = stream.state.health.judge(ChunkFigures.from_values(figures))
        entered = stream.entered.popleft()
        if frames is not None and not verdict.fault:
            self._memory.slot(result.stream, entered.item.slot, entered.item.frames)[:] = frames
        if verdict.fault and verdict.fault != "text_pending":
            log.warning("stream %d: chunk %d withheld: %s", result.stream, entered.item.chunk, verdict.fault)
        self._done(result, stream, entered, verdict)
        if verdict.drifted:
            self._pipeline.reanchor(stream.state)
        if verdict.reset:
            # What was made of the same state goes out first, then what was lost inside, as the camera's.
            while self._passes:
                self._deliver(self._passes.popleft())
            lost = self._pipeline.reset(stream.state)
            for _ in lost:
                self._done(result, stream, stream.entered.popleft(), verdict)

    def _done(self, result: _Result, stream: _Stream, entered: _Entered, verdict: Verdict) -> None:
        finished = time.monotonic()
        news = result.understood if result.understood != stream.told else None
        stream.told = result.understood
        self._cost.on_done(entered.started_at, finished)
        self._connection.send(
            Done(
                stream=result.stream,
                chunk=entered.item.chunk,
                slot=entered.item.slot,
                revision=result.revision,
                started_at=entered.started_at,
                finished_at=finished,
                fault=verdict.fault,
                reanchored=verdict.drifted or verdict.reset,
                understood=news,
            )
        )


def _dtype(settings: EngineSettings, device: torch.device) -> torch.dtype:
    if settings.dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return torch.bfloat16 if settings.dtype == "bfloat16" else torch.float32


def check_fits(settings: EngineSettings, dtype: torch.dtype, device: torch.device) -> None:
    """Compare what the model will need with what the device has, before anything is loaded.

    Raises: EngineError with the parts, the bound and the cures.
    """
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise EngineError(f"device {device}: torch {torch.__version__} sees no GPU; use --devices cpu")
        available, _ = torch.cuda.mem_get_info(device)
    else:
        available = psutil.virtual_memory().available
    try:
        shape = shape_of(settings.model_dir)
    except ValueError as error:
        raise EngineError(str(error)) from error
    light = settings.vae == "light" or (settings.vae == "auto" and shape.light_vae is not None)
    demand = Demand(
        settings.width,
        settings.height,
        streams=pool_streams(settings),
        rows=MAX_STEPS if settings.mode == "batch" else 1,
        dtype="bfloat16" if dtype is torch.bfloat16 else "float32",
        vae="light" if light else "full",
        micro_batch=settings.micro_batch,
        fp8=settings.fp8,
        text_here=settings.text_device == settings.device,
    )
    check(needed(shape, demand), available)


def pool_streams(settings: EngineSettings) -> int:
    """Streams to hold cache for. The warm-up is over before the first stream is opened, and takes the same rows."""
    return max(settings.max_streams, settings.micro_batch)


def make_pipeline(model: Model, settings: EngineSettings) -> Pipeline:
    """The pipeline that the settings ask for.

    Raises: EngineError for settings that this model cannot follow.
    """
    try:
        return Pipeline(
            model,
            settings.width,
            settings.height,
            streams=pool_streams(settings),
            mode=settings.mode,
            attention=settings.attention,
            compile_pass=settings.compile,
            sampling=SamplingConfig.model_validate(model.config.sampling.model_dump() | settings.sampling),
            cache=CacheConfig.model_validate(model.config.cache.model_dump() | settings.cache),
        )
    except (ValueError, RuntimeError) as error:
        raise EngineError(f"{settings.model}: {error}") from error


def main(control_fd: int, memory_fd: int, settings: EngineSettings) -> None:
    """Load, then serve until the server lets go."""
    torch.set_num_threads(settings.threads)
    connection = Connection(socket.socket(fileno=control_fd))
    worker = Worker(connection, FrameMemory(memory_fd, FrameLayout.of(settings)), settings)
    try:
        worker.load()
        worker.run()
    except Disconnected:
        log.debug("rank stops: the server closed the connection")
    except (EngineError, FileNotFoundError) as error:
        # Starting again would not help: the model folder or the settings must be put right first.
        connection.send(Status(state=EngineState.FAILED, percent=0, detail=str(error)))
    finally:
        worker.close()


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s rank %(levelname)s %(message)s")
    main(int(sys.argv[1]), int(sys.argv[2]), EngineSettings.model_validate_json(sys.argv[3]))
