"""A video file through the engine, without a server: every frame in comes out, in its place and time.

Unlike a live stream nothing may be dropped: two chunks are in flight at most, the next is handed over when a result is
back, and a chunk that does not come back in bounded time is an error that names it.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from engine.api import Engine, EngineStream, FrameChunk, RenderedChunk, StreamParams
from engine.config import MAX_PIXELS, SIZE_MULTIPLE_PX
from server.clip import ClipError, ClipFrame, ClipReader, ClipWriter, encoder_for
from server.starting import start_engine

DEFAULT_SIZE = (256, 256)
MIN_SIDE_PX = 64
# One renders while the next waits: the engine never idles, and never holds so many that it drops one.
MAX_IN_FLIGHT = 2
CHUNK_TIMEOUT_S = 120.0
# For the words of the style to be read, by a text encoder of billions of weights on a CPU.
TEXT_TIMEOUT_S = 180.0
TEXT_PENDING = "text_pending"
# Chunks of a file are never late; the engine compares deadlines, so there has to be one.
NO_DEADLINE_S = 86_400.0
# How much a smaller picture may cost against a bent one when the work size is chosen: 10 % of area weighs as
# much as 2.5 % of stretching.
AREA_WEIGHT = 0.25


class RestyleError(Exception):
    """The clip was not restyled; the text says why and the cure."""


@dataclass(frozen=True, slots=True)
class RestyleJob:
    """What to do. size: (width, height) whose area the engine's pictures may have; their shape is the clip's."""

    source: Path
    target: Path
    params: StreamParams
    size: tuple[int, int] = DEFAULT_SIZE
    audio: bool = True
    force: bool = False


@dataclass(frozen=True, slots=True)
class Progress:
    """done, total: frames written and expected (None: unknown). stage: what the engine is doing, for people."""

    stage: str
    done: int
    total: int | None


@dataclass(frozen=True, slots=True)
class RestyleSummary:
    """What was done. frames_per_s: rendered, decoding and encoding included, loading the model not.

    withheld_frames: left as they were, because the model's picture was not fit to be shown.
    """

    source: str
    target: str
    frames: int
    size: str
    engine_size: str
    clip_fps: float
    audio_streams: int
    damaged_packets: int
    engine_start_s: float
    elapsed_s: float
    frames_per_s: float
    withheld_frames: int = 0


EngineFactory = Callable[[int, int], Engine]
Watcher = Callable[[Progress], None]


def work_size(width: int, height: int, largest: tuple[int, int] = DEFAULT_SIZE) -> tuple[int, int]:
    """The engine's picture size for a clip of `width` x `height` shown pixels.

    Returns: (width, height), multiples of 16, as near to the clip's shape as the area of `largest` allows; the
        picture is stretched by the rest (under 4 % for common shapes) and stretched back afterwards.
    Raises: ValueError for a `largest` below 64x64 or over the engine's bound.
    """
    area = largest[0] * largest[1]
    if min(largest) < MIN_SIDE_PX or area > MAX_PIXELS:
        bounds = f"from {MIN_SIDE_PX}x{MIN_SIDE_PX} to {MAX_PIXELS} pixels in all (832x480)"
        raise ValueError(f"size {largest[0]}x{largest[1]} is outside the engine's range: {bounds}")
    step = SIZE_MULTIPLE_PX
    sides = range(MIN_SIDE_PX, area // MIN_SIDE_PX + 1, step)
    sizes = [(w, h) for w in sides for h in sides if w * h <= area]

    def badness(size: tuple[int, int]) -> float:
        bent = abs(math.log(size[0] / size[1] * height / width))
        return bent + AREA_WEIGHT * math.log(area / (size[0] * size[1]))

    return min(sizes, key=badness)


async def restyle(job: RestyleJob, make_engine: EngineFactory, watch: Watcher = lambda _: None) -> RestyleSummary:
    """Restyle `job.source` into `job.target`; the target appears whole or not at all, also when cancelled.

    make_engine: called with the chosen picture size. watch: told of every step, in the event loop.
    Raises: ClipError for the files, RestyleError or EngineError for the engine, ValueError for the size.
    """
    _check_paths(job)
    with ClipReader(job.source) as reader:
        info = reader.info
        shape = (max(1, round(info.width * info.pixel_aspect)), info.height)
        engine = make_engine(*work_size(*shape, job.size))
        sound = reader.sound if job.audio else []
        # The pool is left before the files are closed: no thread is inside a codec by then.
        with ClipWriter(job.target, info, sound) as writer, ThreadPoolExecutor(1, "codec") as pool:
            try:
                opened_at = time.monotonic()
                await start_engine(
                    engine, lambda status: watch(Progress(f"model {status.state} {status.percent} %", 0, None))
                )
                started_at = time.monotonic()
                run = _Run(reader, writer, engine, pool, watch, copy_sound=job.audio)
                frames = await run.render(job.params)
            finally:
                await engine.close()
            await asyncio.get_running_loop().run_in_executor(pool, writer.finish)
        elapsed_s = time.monotonic() - started_at
        width, height = engine.frame_size
        return RestyleSummary(
            source=str(job.source),
            target=str(job.target),
            frames=frames,
            size=f"{info.width}x{info.height}",
            engine_size=f"{width}x{height}",
            clip_fps=round(float(info.rate), 3),
            audio_streams=len(sound),
            damaged_packets=reader.damaged_packets,
            engine_start_s=round(started_at - opened_at, 2),
            elapsed_s=round(elapsed_s, 2),
            frames_per_s=round(frames / elapsed_s, 1),
            withheld_frames=run.withheld,
        )


def _check_paths(job: RestyleJob) -> None:
    """Refuse early what would fail after minutes of work."""
    encoder_for(job.target)
    if not job.target.parent.is_dir():
        raise ClipError(f"{job.target.parent}: no such folder; make it first")
    if job.target.is_dir():
        raise ClipError(f"{job.target}: is a folder; name a file in it")
    if job.target.exists():
        if job.source.exists() and job.target.samefile(job.source):
            raise ClipError(f"{job.target}: input and output are the same file; name another output")
        if not job.force:
            raise ClipError(f"{job.target}: exists already; --force overwrites it")


class _TextPending(Exception):
    """The first chunk came back before the words of the style had been read."""


class _Run:
    """One clip on its way through one stream."""

    def __init__(
        self,
        reader: ClipReader,
        writer: ClipWriter,
        engine: Engine,
        pool: ThreadPoolExecutor,
        watch: Watcher,
        *,
        copy_sound: bool,
    ) -> None:
        self._items = reader.items(*engine.frame_size)
        self._info = reader.info
        self._writer = writer
        self._engine = engine
        self._pool = pool
        self._watch = watch
        self._copy_sound = copy_sound
        self._chunk_frames = engine.capacity.chunk_frames
        # Nobody waits for the first picture of a file: it is only another chunk where the model needs it longer.
        self._first_frames = max(engine.capacity.first_chunk_frames, self._chunk_frames)
        self._began_at = time.monotonic()
        self._read: deque[list[ClipFrame]] = deque()
        self._taken = 0
        self._written = 0
        self.withheld = 0

    async def render(self, params: StreamParams) -> int:
        """Every frame through the engine; returns how many were written."""
        while True:
            try:
                return await self._render(params)
            except _TextPending:
                if time.monotonic() - self._began_at > TEXT_TIMEOUT_S:
                    raise RestyleError(f"the prompt was not read within {TEXT_TIMEOUT_S:.0f} s") from None
                await asyncio.sleep(0.5)

    async def _render(self, params: StreamParams) -> int:
        """One stream over the clip. Raises _TextPending, with all that was read kept, for another try."""
        waiting: deque[list[ClipFrame]] = deque()
        async with aclosing(self._batches()) as batches, self._engine.open_stream("restyle", params) as stream:
            results = aiter(stream)
            submitted = 0
            async for batch in batches:
                stream.submit(self._to_chunk(batch, submitted))
                submitted += 1
                waiting.append(batch)
                if len(waiting) == MAX_IN_FLIGHT:
                    await self._take(stream, results, waiting.popleft())
            while waiting:
                await self._take(stream, results, waiting.popleft())
        return self._written

    async def _batches(self) -> AsyncGenerator[list[ClipFrame], None]:
        """The clip by chunks; those read before anything was written come again in another try."""
        for batch in list(self._read):
            yield batch
        loop = asyncio.get_running_loop()
        while batch := await loop.run_in_executor(self._pool, self._read_batch):
            self._read.append(batch)
            yield batch

    def _read_batch(self) -> list[ClipFrame]:
        """The next frames of a chunk, fewer at the end of the clip; sound met on the way is passed on."""
        wanted = self._chunk_frames if self._read or self._taken else self._first_frames
        batch: list[ClipFrame] = []
        for item in self._items:
            if isinstance(item, ClipFrame):
                batch.append(item)
                if len(batch) == wanted:
                    break
            elif self._copy_sound:
                self._writer.copy(item)
        return batch

    def _to_chunk(self, batch: list[ClipFrame], index: int) -> FrameChunk:
        """A full chunk; the last one of a clip is filled up with its last frame."""
        wanted = self._chunk_frames if index else self._first_frames
        padded = batch + [batch[-1]] * (wanted - len(batch))
        first = self._first_frames + (index - 1) * self._chunk_frames if index else 0
        return FrameChunk(
            index=index,
            frames=np.stack([frame.picture for frame in padded]),
            frame_indices=tuple(range(first, first + len(padded))),
            captured_at=tuple(self._began_at + float(frame.pts * self._info.time_base) for frame in padded),
            deadline=time.monotonic() + NO_DEADLINE_S,
        )

    async def _take(self, stream: EngineStream, results: AsyncIterator[RenderedChunk], batch: list[ClipFrame]) -> None:
        """Wait for the oldest chunk in flight and write its frames, those added as padding left out."""
        expected = self._taken
        try:
            async with asyncio.timeout(CHUNK_TIMEOUT_S):
                rendered = await anext(results)
        except (TimeoutError, StopAsyncIteration):
            lost = f"chunk {expected} did not come back within {CHUNK_TIMEOUT_S:.0f} s"
            raise RestyleError(f"{lost} (dropped: {stream.counters.dropped}); try a smaller --size") from None
        if rendered.index != expected:
            raise RestyleError(f"the engine lost chunk {expected} (dropped: {stream.counters.dropped})")
        if rendered.fault == TEXT_PENDING and not self._taken:
            raise _TextPending
        self._taken += 1
        self._read.popleft()
        if rendered.fault:
            self.withheld += len(batch)
        await asyncio.get_running_loop().run_in_executor(self._pool, self._write_batch, rendered, batch)
        self._watch(Progress("restyling", self._written, self._info.total_frames))

    def _write_batch(self, rendered: RenderedChunk, batch: list[ClipFrame]) -> None:
        for picture, frame in zip(rendered.frames, batch, strict=False):
            self._writer.write(ClipFrame(picture, frame.pts, frame.duration))
            self._written += 1
