"""The engine over a rank process: submits chunks, receives frames, restarts a lost rank and says so."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator

from engine.api import (
    Capacity,
    EngineError,
    EngineFull,
    EngineNotReady,
    EngineState,
    EngineStatus,
    FrameChunk,
    RankLost,
    RenderedChunk,
    StreamCounters,
    StreamParams,
    Understood,
)
from engine.chunks import check_shape
from engine.config import EngineSettings, ServingProfile
from engine.frame_memory import FrameLayout, FrameMemory
from engine.launch import Launcher, Rank, RankProcess
from engine.messages import (
    Close,
    Closed,
    Costs,
    Done,
    Dropped,
    FromRank,
    Open,
    Status,
    StreamFailed,
    Submit,
    ToRank,
    Update,
)
from engine.readiness import Readiness
from engine.results import ResultQueue

log = logging.getLogger(__name__)

RESTART_DELAYS_S = (0.1, 1.0, 2.0, 4.0)
# This many deaths within BREAKER_WINDOW_S and the engine is given up: a person must look.
BREAKER_DEATHS = 4
BREAKER_WINDOW_S = 60.0
# With chunks unanswered, a rank that says nothing for so long, or for so many chunks' time, hangs.
HANG_S = 15.0
HANG_CHUNKS = 20
# A closed stream's memory comes back after the chunk being rendered, of whichever stream.
REGION_TIMEOUT_S = 5.0


class LocalStream:
    """One stream on a local rank (`engine.api.EngineStream`)."""

    def __init__(self, engine: LocalEngine, region: int, name: str) -> None:
        self.counters = StreamCounters()
        self.region = region
        self.name = name
        self._engine = engine
        self._free = list(range(engine.memory.layout.slots))
        self._in_flight: dict[int, tuple[int, FrameChunk]] = {}
        self._results = ResultQueue(self.counters)
        self._revision = 0
        self._understood: tuple[Understood, ...] = ()

    def submit(self, chunk: FrameChunk) -> None:
        """See `EngineStream.submit`."""
        if self._results.error is not None:
            raise self._results.error
        count = len(chunk.frames)
        check_shape(chunk, self._engine.frame_size, self._engine.capacity)
        self.counters.submitted += 1
        if not self._free:
            self.counters.drop("no_slot", count)
            return
        slot = self._free.pop()
        self._engine.memory.slot(self.region, slot, count)[:] = chunk.frames
        self._in_flight[chunk.index] = (slot, chunk)
        self._engine.send(
            Submit(stream=self.region, chunk=chunk.index, slot=slot, frames=count, deadline=chunk.deadline)
        )

    @property
    def waits(self) -> bool:
        """Whether the rank owes an answer."""
        return bool(self._in_flight)

    def update(self, params: StreamParams) -> int:
        """See `EngineStream.update`."""
        if self._results.error is not None:
            raise self._results.error
        self._revision += 1
        self._engine.send(Update(stream=self.region, revision=self._revision, params=params))
        return self._revision

    def __aiter__(self) -> AsyncIterator[RenderedChunk]:
        """See `EngineStream.__aiter__`."""
        return aiter(self._results)

    def on_done(self, message: Done) -> None:
        """The rank finished a chunk: copy it out of its slot, which is free again."""
        slot, chunk = self._in_flight.pop(message.chunk)
        if message.fault:
            self.counters.faults[message.fault] = self.counters.faults.get(message.fault, 0) + 1
        self.counters.reanchored += message.reanchored
        if message.understood is not None:
            self._understood = message.understood
        frames = self._engine.memory.slot(self.region, slot, len(chunk.frames)).copy()
        self._free.append(slot)
        self._results.put(
            RenderedChunk(
                index=chunk.index,
                frames=frames,
                frame_indices=chunk.frame_indices,
                captured_at=chunk.captured_at,
                revision=message.revision,
                engine_started_at=message.started_at,
                engine_finished_at=message.finished_at,
                fault=message.fault,
                understood=self._understood,
            )
        )

    def on_dropped(self, message: Dropped) -> None:
        """The rank gave a chunk up."""
        slot, chunk = self._in_flight.pop(message.chunk)
        self._free.append(slot)
        self.counters.drop(message.reason, len(chunk.frames))

    def fail(self, error: EngineError) -> None:
        """End the stream: what is in flight is counted, the reader and later calls see the error."""
        for _, chunk in self._in_flight.values():
            self.counters.drop("rank_lost", len(chunk.frames))
        self._in_flight.clear()
        self._results.fail(error)


class LocalEngine:
    """One rank in a process of its own (`engine.api.Engine`)."""

    def __init__(self, settings: EngineSettings, launch: Launcher = RankProcess.start) -> None:
        """launch: starts its rank, on this machine unless told otherwise."""
        self.settings = settings
        self._launch = launch
        self.memory: FrameMemory
        self.restarts = 0
        self._readiness = Readiness()
        self._profile = ServingProfile()
        self._costs = Costs(chunk_cost_s=0.0, costs=(), state_bytes=0)
        self._rank: Rank | None = None
        self._supervisor: asyncio.Task[None] | None = None
        self._regions_changed = asyncio.Condition()
        self._free_regions: list[int] = []
        self._streams: dict[int, LocalStream] = {}

    @property
    def status(self) -> EngineStatus:
        """See `Engine.status`."""
        return self._readiness.status

    @property
    def capacity(self) -> Capacity:
        """See `Engine.capacity`."""
        return Capacity(
            chunk_cost_s=self._costs.chunk_cost_s,
            max_streams=self.settings.max_streams,
            open_streams=len(self._streams),
            chunk_frames=self._profile.chunk_frames,
            first_chunk_frames=self._profile.first_chunk_frames,
            costs=self._costs.costs,
            state_bytes=self._costs.state_bytes,
            transit_s=self._costs.transit_s,
        )

    @property
    def frame_size(self) -> tuple[int, int]:
        """See `Engine.frame_size`."""
        return self.settings.width, self.settings.height

    @property
    def pid(self) -> int | None:
        """Process id of the rank, for `doctor` and drills."""
        return self._rank.pid if self._rank else None

    async def start(self) -> None:
        """See `Engine.start`. Raises FileNotFoundError or ValueError for a wrong model, OSError without memory."""
        self._profile = self.settings.profile
        self.memory = FrameMemory.create(FrameLayout.of(self.settings))
        self._supervisor = asyncio.create_task(self._supervise(), name="engine/supervisor")

    async def close(self) -> None:
        """See `Engine.close`."""
        if self._supervisor is None:
            return
        self._supervisor.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._supervisor
        self._supervisor = None
        self._lose_streams("the engine was closed")
        self.memory.close()
        await self._set_status(EngineStatus(EngineState.CLOSED, 0))

    async def wait_ready(self) -> None:
        """See `Engine.wait_ready`."""
        await self._readiness.wait()

    @contextlib.asynccontextmanager
    async def open_stream(self, stream_id: str, params: StreamParams) -> AsyncIterator[LocalStream]:
        """See `Engine.open_stream`."""
        if self.status.state is not EngineState.READY:
            raise EngineNotReady(f"engine is {self.status.state} ({self.status.percent} %): wait until it is ready")
        region = await self._take_region()
        stream = LocalStream(self, region, stream_id)
        self._streams[region] = stream
        self.send(Open(stream=region, params=params))
        try:
            yield stream
        finally:
            # A lost rank has already dropped the stream, and the region with it.
            if self._streams.get(region) is stream:
                del self._streams[region]
                self.send(Close(stream=region))

    async def _take_region(self) -> int:
        """A memory region no stream uses; waits while the rank is still letting go of a closed one."""
        async with self._regions_changed:
            try:
                async with asyncio.timeout(REGION_TIMEOUT_S):
                    while not self._free_regions:
                        if len(self._streams) >= self.settings.max_streams:
                            raise EngineFull(
                                f"all {self.settings.max_streams} streams are open: close one or raise max_streams"
                            )
                        await self._regions_changed.wait()
            except TimeoutError:
                raise EngineError(f"the rank did not let go of a closed stream in {REGION_TIMEOUT_S:.0f} s") from None
            return self._free_regions.pop()

    def send(self, message: ToRank) -> None:
        """Queue a control message; its volume is bounded by the slots and the control channel's rate limit."""
        if self._rank is not None:
            self._rank.send(message)

    async def _set_status(self, status: EngineStatus) -> None:
        if status.state is not self.status.state:
            log.info("engine %s%s", status.state, f": {status.detail}" if status.detail else "")
        await self._readiness.set(status)

    async def _supervise(self) -> None:
        """Keep one rank running, with a growing pause after a death, until closed or given up."""
        deaths: list[float] = []
        while True:
            reason = await self._run_rank()
            self._lose_streams(reason)
            if self.status.state is EngineState.FAILED:
                return
            now = time.monotonic()
            deaths = [at for at in deaths if now - at < BREAKER_WINDOW_S] + [now]
            if len(deaths) >= BREAKER_DEATHS:
                detail = f"{reason}; {len(deaths)} deaths in {BREAKER_WINDOW_S:.0f} s, see the log"
                await self._set_status(EngineStatus(EngineState.FAILED, 0, detail))
                return
            self.restarts += 1
            log.error("engine rank lost (%s), starting another", reason)
            await self._set_status(EngineStatus(EngineState.STARTING, 0, f"restarting: {reason}"))
            await asyncio.sleep(RESTART_DELAYS_S[min(len(deaths), len(RESTART_DELAYS_S)) - 1])

    async def _run_rank(self) -> str:
        """Start a rank and serve it until it is gone; returns why."""
        self._free_regions = list(range(self.settings.max_streams))
        try:
            self._rank = await self._launch(self.settings, self.memory)
        except Exception as error:
            # A wall: a launcher of another kind may raise anything, and whoever waits for the rank must hear of it.
            log.exception("the engine's rank cannot be started")
            return f"cannot start: {error}"
        reason = "connection closed"
        try:
            reason = await self._read_messages(self._rank)
        finally:
            rank, self._rank = self._rank, None
            end = await asyncio.shield(rank.stop())
        return f"{reason}, {end}"

    async def _read_messages(self, rank: Rank) -> str:
        """Handle what the rank says until end of file; a rank that should say something and does not is given up."""
        while True:
            starting = self.status.state is not EngineState.READY
            limit_s = self.settings.start_timeout_s if starting else self._hang_s
            owed = starting or self._owed
            try:
                # `wait_for` of Python 3.11 loses a cancellation that comes together with a message.
                async with asyncio.timeout(limit_s):
                    message = await rank.receive()
            except TimeoutError:
                if starting:
                    return f"no progress for {limit_s:.0f} s while starting"
                # What was handed over meanwhile gets as long.
                if owed and self._owed:
                    return f"no answer for {limit_s:.0f} s: it hangs"
                continue
            except (ConnectionError, ValueError) as error:
                return f"connection broke: {error}"
            if message is None:
                return "process ended"
            await self._handle(message)

    @property
    def _owed(self) -> bool:
        return any(stream.waits for stream in self._streams.values())

    @property
    def _hang_s(self) -> float:
        return max(HANG_S, HANG_CHUNKS * max((cost.upper_s for cost in self._costs.costs), default=0.0))

    async def _handle(self, message: FromRank) -> None:
        match message:
            case Status():
                await self._set_status(EngineStatus(message.state, message.percent, message.detail))
            case Costs():
                self._costs = message
            case Closed():
                async with self._regions_changed:
                    self._free_regions.append(message.stream)
                    self._regions_changed.notify_all()
            case Done():
                if stream := self._streams.get(message.stream):
                    stream.on_done(message)
            case Dropped():
                if stream := self._streams.get(message.stream):
                    stream.on_dropped(message)
            case StreamFailed():
                if stream := self._streams.get(message.stream):
                    stream.fail(EngineError(message.message))

    def _lose_streams(self, reason: str) -> None:
        streams, self._streams = self._streams, {}
        for stream in streams.values():
            stream.fail(RankLost(f"the engine process of this stream is gone ({reason})"))
