"""Several groups behind one `engine.api.Engine`: whole models side by side (replicas), each on one rank or on a ring.

A stream lives on one group. It is opened on the ready group where it will have most of the engine's time: the least
(open streams + 1) x cost of a chunk, of those with room. A group that is lost takes its own streams and no others; who
opens them anew gets another group with room, or is refused until one is back. Groups share nothing, so one that fails
for good only leaves fewer seats.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence

from engine.api import (
    Capacity,
    Engine,
    EngineError,
    EngineFull,
    EngineNotReady,
    EngineState,
    EngineStatus,
    EngineStream,
    StreamParams,
)
from engine.config import AUTO, EngineSettings

# What a start goes through, the furthest last; the best group tells for all.
_PROGRESS = (EngineState.CLOSED, EngineState.FAILED, EngineState.STARTING, EngineState.LOADING, EngineState.WARMING)


def arrange(settings: EngineSettings) -> tuple[list[EngineSettings], str]:
    """Which groups the settings ask for: the settings of each, with nothing left open, and a line that says why.

    On GPUs the groups take those from the named one on, `ranks` each.
    """
    on_gpu = settings.device != "cpu"
    ranks, replicas = settings.rank_count, settings.replica_count
    kind, _, first = settings.device.partition(":")
    devices = [f"{kind}:{int(first) + group * ranks}" if on_gpu else kind for group in range(replicas)]
    each = [settings.model_copy(update={"device": device, "ranks": ranks, "replicas": 1}) for device in devices]
    open_ones = [name for name, value in (("ranks", settings.ranks), ("replicas", settings.replicas)) if value == AUTO]
    why = ""
    if open_ones:
        one = (
            "the one GPU that was chosen; give a number for more" if on_gpu else "processes on one CPU share its cores"
        )
        why = f" ({' and '.join(open_ones)} auto: {one})"
    reason = f"{replicas} x {ranks} {'rank' if ranks == 1 else 'ranks'} from {settings.device} on{why}"
    return each, reason


class Cluster:
    """Groups of equal models (`engine.api.Engine`)."""

    def __init__(self, groups: Sequence[Engine]) -> None:
        """Join groups, none of them started. All must have one frame size."""
        self.groups = tuple(groups)

    @property
    def status(self) -> EngineStatus:
        """That of the group that is furthest. See `Engine.status`."""
        states = [group.status for group in self.groups]
        ready = [status for status in states if status.state is EngineState.READY]
        if ready:
            return ready[0]
        return max(states, key=lambda status: (_PROGRESS.index(status.state), status.percent))

    @property
    def capacity(self) -> Capacity:
        """Seats of all groups that render, at the costs of the slowest. See `Engine.capacity`."""
        capacities = [group.capacity for group in self._ready() or self.groups]
        slowest = max(capacities, key=lambda capacity: capacity.chunk_cost_s)
        return Capacity(
            chunk_cost_s=slowest.chunk_cost_s,
            max_streams=sum(capacity.max_streams for capacity in capacities),
            open_streams=sum(capacity.open_streams for capacity in capacities),
            chunk_frames=slowest.chunk_frames,
            first_chunk_frames=slowest.first_chunk_frames,
            costs=slowest.costs,
            state_bytes=slowest.state_bytes,
            groups=len(capacities),
            transit_s=max(capacity.transit_s for capacity in capacities),
        )

    @property
    def frame_size(self) -> tuple[int, int]:
        """See `Engine.frame_size`."""
        return self.groups[0].frame_size

    async def start(self) -> None:
        """Start all groups. See `Engine.start`."""
        for group in self.groups:
            await group.start()

    async def close(self) -> None:
        """See `Engine.close`."""
        await asyncio.gather(*(group.close() for group in self.groups))

    async def wait_ready(self) -> None:
        """Return when one group renders. Raises EngineError when all have failed or were closed."""
        waits = [asyncio.create_task(group.wait_ready()) for group in self.groups]
        failures: list[EngineError] = []
        try:
            for wait in asyncio.as_completed(waits):
                try:
                    await wait
                except EngineError as error:
                    failures.append(error)
                else:
                    return
            raise failures[0]
        finally:
            for task in waits:
                task.cancel()
            await asyncio.gather(*waits, return_exceptions=True)

    @contextlib.asynccontextmanager
    async def open_stream(self, stream_id: str, params: StreamParams) -> AsyncIterator[EngineStream]:
        """See `Engine.open_stream`."""
        ready = self._ready()
        if not ready:
            status = self.status
            raise EngineNotReady(f"no group is ready, the best is {status.state} ({status.percent} %): wait for one")
        async with contextlib.AsyncExitStack() as held:
            for group in sorted(ready, key=_load_with_one_more):
                try:
                    stream = await held.enter_async_context(group.open_stream(stream_id, params))
                except (EngineFull, EngineNotReady):
                    continue
                break
            else:
                missing = len(self.groups) - len(ready)
                gone = f", and {missing} of {len(self.groups)} groups are not ready" if missing else ""
                raise EngineFull(
                    f"all {self.capacity.max_streams} streams are open{gone}: close one or raise max_streams"
                )
            yield stream

    def _ready(self) -> list[Engine]:
        return [group for group in self.groups if group.status.state is EngineState.READY]


def _load_with_one_more(group: Engine) -> tuple[float, int]:
    capacity = group.capacity
    count = capacity.open_streams + 1
    return count * capacity.chunk_cost_s, count
