"""FakeEngine: the engine's contract with a programmable delay and no torch, for tests and `serve --engine fake`.

It keeps the true behaviour of memory and time: chunks are copied, one is rendered at a time, the same scheduler drops
what is late. The "style" tints the frame by a colour made from the prompt, so that a change can be seen and tested.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
import zlib
from collections import deque
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

import numpy as np

from engine.api import (
    Capacity,
    EngineError,
    EngineFull,
    EngineNotReady,
    EngineState,
    EngineStatus,
    FrameChunk,
    Frames,
    RankLost,
    RenderedChunk,
    StreamCounters,
    StreamParams,
    Understood,
)
from engine.chunks import check_shape
from engine.config import CHUNK_FRAMES, MAX_STEPS
from engine.cost_model import CostModel, Work, chunk_costs
from engine.readiness import Readiness
from engine.results import ResultQueue
from engine.scheduler import Drop, Item, Scheduler

# A loading fake tells its progress in steps of this.
LOAD_PERCENT = 5
# Of a chunk of one step, the share of its encode and decode; the rest is the step's, and nothing takes anything else.
ENDS_SHARE = 0.3
NOTHING_S = 1e-9


def tint(frames: Frames, params: StreamParams) -> Frames:
    """The fake style of [T, H, W, 3]: inverted, then mixed with the prompts' colour; strength 0 is the input."""
    total = sum(prompt.weight for prompt in params.prompts)
    colour = np.zeros(3, np.float32)
    for prompt in params.prompts:
        digest = zlib.crc32(prompt.text.encode())
        own = np.array([digest & 255, digest >> 8 & 255, digest >> 16 & 255], np.float32)
        colour += np.float32(prompt.weight / total) * own
    styled = 0.6 * (255.0 - frames) + 0.4 * colour
    mixed = frames + params.strength * (styled - frames)
    return (mixed + 0.5).clip(0, 255).astype(np.uint8)


@dataclass
class FakeStream:
    """One stream of the fake engine (`engine.api.EngineStream`)."""

    engine: FakeEngine
    number: int
    params: StreamParams

    def __post_init__(self) -> None:
        self.counters = StreamCounters()
        self.waiting: dict[int, FrameChunk] = {}
        self.revision = 0
        self.pending: tuple[int, StreamParams] | None = None
        # Rendered, but inside until as many newer ones have been taken up as the engine holds.
        self.held: deque[tuple[FrameChunk, Frames, int, float, str]] = deque()
        self.results = ResultQueue(self.counters)
        self._updates = 0

    def submit(self, chunk: FrameChunk) -> None:
        """See `EngineStream.submit`."""
        if self.results.error is not None:
            raise self.results.error
        check_shape(chunk, self.engine.frame_size, self.engine.capacity)
        self.counters.submitted += 1
        self.waiting[chunk.index] = chunk
        self.engine.push(Item(self.number, chunk.index, 0, len(chunk.frames), chunk.deadline))

    def update(self, params: StreamParams) -> int:
        """See `EngineStream.update`."""
        if self.results.error is not None:
            raise self.results.error
        self._updates += 1
        self.pending = (self._updates, params)
        self.engine.change(self.number, params)
        return self._updates

    def __aiter__(self) -> AsyncIterator[RenderedChunk]:
        """See `EngineStream.__aiter__`."""
        return aiter(self.results)

    def fail(self, error: EngineError) -> None:
        """End the stream with an error, as a lost rank does."""
        for chunk in self.waiting.values():
            self.counters.drop("rank_lost", len(chunk.frames))
        self.waiting.clear()
        self.results.fail(error)


class FakeEngine:
    """The contract of `engine.api.Engine` in this process.

    delay_s: how long a chunk of one step takes at full size; may be changed while it runs, which the capacity follows
        as chunks are rendered. More steps multiply 0.7 of it. small_share: what the small size takes of that; 0: there
        is none. light_share: what the light VAE takes of the rest; 0: there is none. load_s: how long `start`
        takes to become ready.
    first_chunk_frames: of a stream's first chunk. held_chunks: a chunk comes back when this many newer ones have been
        taken up, as in mode `batch` with one step more.
    understands: what a prompt is taken for, by its text; nothing else is told of.
    fault: while not empty, chunks come back as the camera's own with this reason. reanchor: the next chunk that
        comes back has begun its stream's cache anew.
    """

    def __init__(
        self,
        width: int = 256,
        height: int = 256,
        *,
        delay_s: float = 0.02,
        load_s: float = 0.0,
        max_streams: int = 4,
        first_chunk_frames: int = 1,
        held_chunks: int = 0,
        small_share: float = 0.56,
        light_share: float = 0.0,
    ) -> None:
        self.delay_s = delay_s
        self.small_share, self.light_share = small_share, light_share
        self.load_s = load_s
        self.max_streams = max_streams
        self.first_chunk_frames = first_chunk_frames
        self.held_chunks = held_chunks
        self.understands: dict[str, Understood] = {}
        self.fault = ""
        self.reanchor = False
        self.streams: dict[int, FakeStream] = {}
        self._size = (width, height)
        self._readiness = Readiness()
        ends_s = max(ENDS_SHARE * delay_s, NOTHING_S)
        step_s = max((1 - ENDS_SHARE) * delay_s, NOTHING_S)
        self._costs = CostModel(
            (NOTHING_S, NOTHING_S, ends_s, step_s, NOTHING_S),
            small_share=small_share or 1.0,
            light_share=light_share or 1.0,
        )
        self._scheduler = Scheduler(self._costs)
        self._work = asyncio.Event()
        self._loop_task: asyncio.Task[None] | None = None

    @property
    def status(self) -> EngineStatus:
        """See `Engine.status`."""
        return self._readiness.status

    @property
    def capacity(self) -> Capacity:
        """See `Engine.capacity`."""
        steps, has_small, has_light = range(1, MAX_STEPS + 1), self.small_share > 0, self.light_share > 0
        costs = chunk_costs(self._costs, steps, has_small=has_small, has_light=has_light) if self.delay_s else ()
        return Capacity(
            chunk_cost_s=costs[0].mean_s if costs else 0.0,
            max_streams=self.max_streams,
            open_streams=len(self.streams),
            chunk_frames=CHUNK_FRAMES,
            first_chunk_frames=self.first_chunk_frames,
            costs=costs,
        )

    @property
    def frame_size(self) -> tuple[int, int]:
        """See `Engine.frame_size`."""
        return self._size

    async def start(self) -> None:
        """See `Engine.start`."""
        self._loop_task = asyncio.create_task(self._run(), name="engine/fake")

    async def close(self) -> None:
        """See `Engine.close`."""
        if self._loop_task is not None:
            self._loop_task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._loop_task
            self._loop_task = None
            self._lose_streams("the engine was closed")
            await self._readiness.set(EngineStatus(EngineState.CLOSED, 0))

    async def wait_ready(self) -> None:
        """See `Engine.wait_ready`."""
        await self._readiness.wait()

    @contextlib.asynccontextmanager
    async def open_stream(self, stream_id: str, params: StreamParams) -> AsyncIterator[FakeStream]:
        """See `Engine.open_stream`."""
        if self.status.state is not EngineState.READY:
            raise EngineNotReady(f"engine is {self.status.state}: wait until it is ready")
        number = next((n for n in range(self.max_streams) if n not in self.streams), None)
        if number is None:
            raise EngineFull(f"all {self.max_streams} streams are open: close one or raise max_streams")
        stream = self.streams[number] = FakeStream(self, number, params)
        self._scheduler.open(number, steps=params.steps, small=self._is_small(params), light=self._is_light(params))
        try:
            yield stream
        finally:
            if self.streams.get(number) is stream:
                del self.streams[number]
                self._scheduler.close(number)

    async def lose_rank(self, *, down_s: float = 0.0) -> None:
        """Behave as if the rank had died: every stream fails; ready again after `down_s`."""
        self._lose_streams("told to")
        await self._readiness.set(EngineStatus(EngineState.STARTING, 0, "restarting"))
        await asyncio.sleep(down_s)
        await self._readiness.set(EngineStatus(EngineState.READY, 100))

    def push(self, item: Item) -> None:
        """Take a chunk from a stream."""
        self._drop(self._scheduler.push(item))
        self._work.set()

    def change(self, number: int, params: StreamParams) -> None:
        """Take note of what a stream's next chunk will be rendered with."""
        self._scheduler.change(number, steps=params.steps, small=self._is_small(params), light=self._is_light(params))

    def _is_small(self, params: StreamParams) -> bool:
        return params.small and self.small_share > 0

    def _is_light(self, params: StreamParams) -> bool:
        return params.light and self.light_share > 0

    async def _run(self) -> None:
        for percent in range(0, 100, LOAD_PERCENT if self.load_s else 100):
            await self._readiness.set(EngineStatus(EngineState.LOADING, percent, "loading the fake"))
            await asyncio.sleep(self.load_s * LOAD_PERCENT / 100)
        await self._readiness.set(EngineStatus(EngineState.READY, 100))
        while True:
            picked = self._scheduler.pick(time.monotonic())
            self._drop(picked.drops)
            if picked.work is None:
                self._work.clear()
                await self._work.wait()
            for item in picked.items:
                if stream := self.streams.get(item.stream):
                    await self._render(stream, item)

    async def _render(self, stream: FakeStream, item: Item) -> None:
        started = time.monotonic()
        if stream.pending is not None:
            stream.revision, stream.params = stream.pending
            stream.pending = None
        chunk = stream.waiting[item.chunk]
        frames = chunk.frames if self.fault else tint(chunk.frames, stream.params)
        stream.held.append((chunk, frames, stream.revision, started, self.fault))
        params = stream.params
        small, light = self._is_small(params), self._is_light(params)
        ends = ENDS_SHARE * (self.light_share if light else 1.0)
        seconds = self.delay_s * (ends + (1 - ENDS_SHARE) * params.steps) * (self.small_share if small else 1.0)
        await asyncio.sleep(seconds)
        # The time meant, not the time slept: what else this process does is no cost of the engine.
        self._costs.observe(Work.of_chunk(params.steps, small=small, light=light), seconds)
        while len(stream.held) > self.held_chunks:
            self._hand_back(stream, *stream.held.popleft())

    def _hand_back(
        self, stream: FakeStream, chunk: FrameChunk, frames: Frames, revision: int, started: float, fault: str
    ) -> None:
        if stream.waiting.pop(chunk.index, None) is None:
            return
        counters = stream.counters
        if fault:
            counters.faults[fault] = counters.faults.get(fault, 0) + 1
        if self.reanchor:
            counters.reanchored += 1
            self.reanchor = False
        stream.results.put(
            RenderedChunk(
                index=chunk.index,
                frames=frames,
                frame_indices=chunk.frame_indices,
                captured_at=chunk.captured_at,
                revision=revision,
                engine_started_at=started,
                engine_finished_at=time.monotonic(),
                fault=fault,
                understood=tuple(
                    self.understands[prompt.text] for prompt in stream.params.prompts if prompt.text in self.understands
                ),
            )
        )

    def _drop(self, drops: Sequence[Drop]) -> None:
        for drop in drops:
            if stream := self.streams.get(drop.item.stream):
                chunk = stream.waiting.pop(drop.item.chunk)
                stream.counters.drop(drop.reason, len(chunk.frames))

    def _lose_streams(self, reason: str) -> None:
        streams, self.streams = self.streams, {}
        for number, stream in streams.items():
            self._scheduler.close(number)
            stream.fail(RankLost(f"the engine process of this stream is gone ({reason})"))
