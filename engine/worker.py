"""One rank's loop: read commands, ask the scheduler for the next pass, render it, learn what it took, hand it on.

Started by `engine.launch` with the control socket, the frame memory and the settings as arguments. End of file on the
control socket is the order to stop.
"""

from __future__ import annotations

import logging
import selectors
import socket
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
from engine.config import CacheConfig, EngineSettings, SamplingConfig
from engine.cost_book import CostBook, Kinds
from engine.cost_file import cpu_title
from engine.cost_model import Work
from engine.frame_memory import FrameLayout, FrameMemory
from engine.health import ChunkFigures, Verdict
from engine.lanes import Download
from engine.memory import MemoryPlan, check, plan_of, pool_streams, small_size
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
from engine.scheduler import Drop, Item, Picked, Scheduler
from engine.session import SessionState
from engine.wan.weights import Model, load_model
from engine.warm_up import WARM_UP_PROMPT, warm_up

log = logging.getLogger(__name__)

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
class Entered:
    """A chunk, or two as one, that the model has taken up and not yet given back."""

    items: tuple[Item, ...]
    started_at: float


@dataclass(slots=True)
class Stream:
    """A stream in this rank: the pipeline of its size with its state there, a parameter change that waits for the next
    chunk border, and the chunks inside, oldest first. told: what the server knows the prompts were taken for."""

    pipeline: Pipeline
    state: SessionState
    pending: Update | None = None
    entered: deque[Entered] = field(default_factory=deque)
    told: tuple[Understood, ...] = ()


@dataclass(frozen=True, slots=True)
class Result:
    """One finished chunk on its way to the host."""

    stream: int
    state: SessionState
    revision: int
    frames: Download | None
    figures: Download | None
    understood: tuple[Understood, ...]


@dataclass(frozen=True, slots=True)
class _Pass:
    """A pass that may still be running on the device. work: None where its time tells nothing."""

    results: list[Result]
    started_at: float
    work: Work | None


class Worker:
    """Holds the model, the streams and what waits for them."""

    def __init__(self, connection: Connection, memory: FrameMemory, settings: EngineSettings) -> None:
        self._connection = connection
        self._memory = memory
        self._settings = settings
        self._book = CostBook(settings, connection.send)
        self._scheduler: Scheduler
        self._streams: dict[int, Stream] = {}
        # The results of one pass are copied out while the next is made.
        self._passes: deque[_Pass] = deque()
        self._last_finish = float("-inf")
        self._pipeline: Pipeline
        # The same model at a smaller size, where it has one.
        self._small: Pipeline | None = None

    def load(self) -> None:
        """Load and warm up the model, reporting progress; before `ready` comes what chunks cost.

        Raises: EngineError for a model that does not fit the device or its own description.
        """
        settings = self._settings
        profile = settings.profile
        self._tell(EngineState.LOADING, 1, f"loading {settings.model}")
        device = torch.device(settings.device)
        dtype = dtype_of(settings)
        plan = check_fits(settings, device)
        self._recall(device, plan)
        model = load_model(
            settings.model_dir,
            device,
            dtype,
            vae=plan.demand.vae,
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
        if (size := small_size(settings, profile)) is not None:
            self._small = make_pipeline(model, settings, size=size, beside=self._pipeline)
        passes = warm_up(self._pipeline, self._small, settings, self._book, self._tell)
        pool = self._pipeline.pool
        kinds = Kinds(
            profile.steps,
            self._pipeline.max_steps,
            pool.window,
            small=self._small is not None,
            light=model.light_vae is not None,
        )
        self._book.begin(passes, kinds, time.monotonic())
        self._pipeline.batch.seal()
        self._scheduler = Scheduler(
            self._book.model,
            micro_batch=settings.micro_batch,
            chunk_latents=settings.chunk_latents,
            pipeline=settings.mode == "batch",
            window=pool.window,
        )
        self._connection.send(Status(state=EngineState.READY, percent=100, chunk_frames=profile.chunk_frames))

    def _recall(self, device: torch.device, plan: MemoryPlan) -> None:
        title = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_title()
        self._book.recall(title, plan)

    def keep_costs(self) -> None:
        """Write down what was learned, for the next run."""
        self._book.keep()

    def close(self) -> None:
        """Stop what the model keeps running beside this process."""
        if hasattr(self, "_pipeline"):
            self._pipeline.model.text.close()

    def run(self) -> None:
        """Serve until the server closes the connection, which raises Disconnected."""
        while True:
            picked = self._scheduler.pick(time.monotonic())
            self._report(picked.drops)
            if picked.items:
                self._render(picked)
            # The newest pass goes on while the one before is delivered; with nothing to do it is waited for.
            while len(self._passes) > (1 if picked.items and self._pipeline.lanes.overlapping else 0):
                self._deliver(self._passes.popleft())
            for message in self._connection.receive(wait=not picked.items):
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
                    self._plan(message.stream, message.params)
            case Close():
                self._forget(message.stream)
                self._connection.send(Closed(stream=message.stream))
                if not self._streams:
                    self._book.keep()

    def _open(self, message: Open) -> None:
        pipeline = self._pipeline_for(message.params)
        try:
            state = pipeline.open(message.params)
        except (ValueError, MemoryError) as error:
            self._connection.send(StreamFailed(stream=message.stream, message=f"cannot open: {error}"))
            return
        self._streams[message.stream] = Stream(pipeline, state)
        self._scheduler.open(message.stream)
        self._plan(message.stream, message.params)

    def _pipeline_for(self, params: StreamParams) -> Pipeline:
        return self._small if params.small and self._small is not None else self._pipeline

    def _plan(self, number: int, params: StreamParams) -> None:
        """Tell the scheduler what the stream's next chunk will be made with."""
        small = params.small and self._small is not None
        light = params.light and self._pipeline.model.light_vae is not None
        self._scheduler.change(number, steps=params.steps if params.strength > 0 else 0, small=small, light=light)

    def _forget(self, number: int) -> None:
        self._scheduler.close(number)
        if stream := self._streams.pop(number, None):
            stream.pipeline.close(stream.state)

    def _fail(self, number: int, error: Exception) -> None:
        log.error("stream %d failed", number, exc_info=error)
        self._forget(number)
        self._connection.send(StreamFailed(stream=number, message=f"rendering failed: {error}"))

    def _report(self, drops: Sequence[Drop]) -> None:
        for drop in drops:
            item = drop.item
            self._connection.send(Dropped(stream=item.stream, chunk=item.chunk, slot=item.slot, reason=drop.reason))

    # --- one pass

    def _render(self, picked: Picked) -> None:
        """Queue one pass over the chunks given. A fault ends the streams of this pass and no other."""
        chunks: dict[int, tuple[Item, ...]] = {}
        for item in picked.items:
            chunks[item.stream] = (*chunks.get(item.stream, ()), item)
        for number in chunks:
            self._take_up_change(number, self._streams[number])
        # A change that was refused may have been counted on.
        of_pipeline: dict[int, list[int]] = {}
        for number in chunks:
            of_pipeline.setdefault(id(self._streams[number].pipeline), []).append(number)
        for numbers in of_pipeline.values():
            self._render_together({number: chunks[number] for number in numbers}, picked.pipelined)

    def _render_together(self, chunks: dict[int, tuple[Item, ...]], pipelined: frozenset[int]) -> None:
        jobs: list[tuple[SessionState, Tensor]] = []
        numbers: dict[int, int] = {}
        started = time.monotonic()
        pipeline = self._streams[next(iter(chunks))].pipeline
        try:
            for number, items in chunks.items():
                stream = self._streams[number]
                stream.state.pipelined = number in pipelined
                stream.entered.append(Entered(items, started))
                parts = [self._memory.slot(number, item.slot, item.frames) for item in items]
                frames = parts[0] if len(parts) == 1 else np.concatenate(parts)
                jobs.append((stream.state, pipeline.upload(frames)))
                numbers[id(stream.state)] = number
            download = pipeline.lanes.download
            results = [
                Result(
                    numbers[id(done.state)],
                    done.state,
                    done.revision,
                    None if done.frames is None else download(done.frames),
                    None if done.figures is None else download(done.figures),
                    done.understood,
                )
                for done in pipeline.tick(jobs)
            ]
        except (RuntimeError, ValueError, EngineError) as error:
            for number in chunks:
                self._fail(number, error)
            return
        self._passes.append(_Pass(results, started, pipeline.work))

    def _take_up_change(self, number: int, stream: Stream) -> None:
        """Follow a parameter change; one that the model cannot follow leaves the stream as it is."""
        if stream.pending is None:
            return
        pending, stream.pending = stream.pending, None
        pipeline = self._pipeline_for(pending.params)
        try:
            if pipeline is stream.pipeline:
                pipeline.set_params(stream.state, pending.params, pending.revision)
                return
            state = pipeline.adopt(stream.state, pending.params, pending.revision)
        except (ValueError, MemoryError) as error:
            log.warning("parameters refused: %s", error)
            self._plan(number, stream.state.params)
            return
        # What was made of the old state is this stream's still.
        while self._passes:
            self._deliver(self._passes.popleft())
        stream.pipeline.close(stream.state)
        stream.pipeline, stream.state = pipeline, state

    def _deliver(self, done: _Pass) -> None:
        for result in done.results:
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
        # Behind the pass before it on the same device it has only waited.
        now = time.monotonic()
        seconds, self._last_finish = now - max(done.started_at, self._last_finish), now
        if done.work is not None:
            self._book.observe(done.work, seconds, now)

    def _send(self, result: Result, stream: Stream, frames: Frames | None, figures: Sequence[float] | None) -> None:
        """Hand one chunk over: the model's picture, or the camera's where that must not be shown."""
        verdict = Verdict("text_pending")
        if figures is not None:
            verdict = stream.state.health.judge(ChunkFigures.from_values(figures))
        entered = stream.entered.popleft()
        if frames is not None and not verdict.fault:
            begin = 0
            for item in entered.items:
                self._memory.slot(result.stream, item.slot, item.frames)[:] = frames[begin : begin + item.frames]
                begin += item.frames
        if verdict.fault and verdict.fault != "text_pending":
            log.warning("stream %d: chunk %d withheld: %s", result.stream, entered.items[0].chunk, verdict.fault)
        self._done(result, stream, entered, verdict)
        if verdict.drifted:
            stream.pipeline.reanchor(stream.state)
        if verdict.reset:
            self._reset(result, stream, verdict)

    def _reset(self, result: Result, stream: Stream, verdict: Verdict) -> None:
        """Begin a stream anew: what was made of its old state goes out first, then what was lost, as the camera's."""
        while self._passes:
            self._deliver(self._passes.popleft())
        lost = stream.pipeline.reset(stream.state)
        for _ in lost:
            self._done(result, stream, stream.entered.popleft(), verdict)

    def _done(self, result: Result, stream: Stream, entered: Entered, verdict: Verdict) -> None:
        finished = time.monotonic()
        news = result.understood if result.understood != stream.told else None
        stream.told = result.understood
        for item in entered.items:
            self._connection.send(
                Done(
                    stream=result.stream,
                    chunk=item.chunk,
                    slot=item.slot,
                    revision=result.revision,
                    started_at=entered.started_at,
                    finished_at=finished,
                    fault=verdict.fault,
                    reanchored=item is entered.items[0] and (verdict.drifted or verdict.reset),
                    understood=news if item is entered.items[0] else None,
                )
            )


def dtype_of(settings: EngineSettings) -> torch.dtype:
    """Of weights and activations."""
    return torch.bfloat16 if settings.precision == "bfloat16" else torch.float32


def free_bytes(device: torch.device) -> int:
    """What is free on a device now. Raises EngineError where there is none."""
    if device.type != "cuda":
        return int(psutil.virtual_memory().available)
    if not torch.cuda.is_available():
        raise EngineError(f"device {device}: torch {torch.__version__} sees no GPU; use --devices cpu")
    free, _ = torch.cuda.mem_get_info(device)
    return free


def check_fits(settings: EngineSettings, device: torch.device) -> MemoryPlan:
    """Compare what the model will need with what the device has, before anything is loaded; returns the need.

    Raises: EngineError with the parts, the bound and the cures.
    """
    available = free_bytes(device)
    try:
        plan = plan_of(settings, available)
    except ValueError as error:
        raise EngineError(str(error)) from error
    check(plan, available)
    return plan


def make_pipeline(
    model: Model, settings: EngineSettings, *, size: tuple[int, int] | None = None, beside: Pipeline | None = None
) -> Pipeline:
    """The pipeline that the settings ask for.

    Args:
        size: to render at in place of the settings'; frames stay of theirs.
        beside: the pipeline with which this one takes turns.

    Raises: EngineError for settings that this model cannot follow.
    """
    try:
        return Pipeline(
            model,
            *(size or (settings.width, settings.height)),
            frame_size=(settings.width, settings.height),
            lanes=None if beside is None else beside.lanes,
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
        worker.keep_costs()
    except (EngineError, FileNotFoundError) as error:
        # Starting again would not help: the model folder or the settings must be put right first.
        connection.send(Status(state=EngineState.FAILED, percent=0, detail=str(error)))
    finally:
        worker.close()


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s rank %(levelname)s %(message)s")
    main(int(sys.argv[1]), int(sys.argv[2]), EngineSettings.model_validate_json(sys.argv[3]))
