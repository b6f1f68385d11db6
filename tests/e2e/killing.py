"""A session of a real server as its client sees it while ranks are killed: for the test and for the drill."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import psutil

from livebrush_client import Live

CAMERA, RESTYLED = 0, 1
# Marks come twice a second.
MARKS_S = 1.5
POLL_S = 0.02
ENOUGH = 24
BEFORE_S = 5.0


@dataclass(frozen=True)
class Seen:
    """A picture at the client. at: monotonic. index: of the camera's frame; kind: camera or restyled, by the marks."""

    at: float
    index: int
    kind: int


@dataclass(frozen=True)
class Kill:
    """What one kill did, seconds from it, all at the client: told, that the engine was lost; camera, the first picture
    of it; restyled, the first picture after that. gap_s: the longest time without a new picture from the kill until
    then; gap_frames: camera frames that were not shown in that time, but for those between pictures anyway.
    usual_gap_s: the longest time without a new picture in the seconds before, which is the machine's."""

    rank: int
    told_s: float
    camera_s: float
    restyled_s: float
    gap_s: float
    gap_frames: int
    usual_gap_s: float

    def __str__(self) -> str:
        return (
            f"rank {self.rank}: told {1e3 * self.told_s:.0f} ms, camera {1e3 * self.camera_s:.0f} ms, longest gap "
            f"{1e3 * self.gap_s:.0f} ms ({self.gap_frames} frames; before {1e3 * self.usual_gap_s:.0f} ms), "
            f"restyled {self.restyled_s:.2f} s"
        )


@dataclass
class Watch:
    """Notes what a client is shown and told. pictures: by their timestamps, as aiortc counts them."""

    live: Live
    pictures: dict[int, float] = field(default_factory=dict)
    marks: dict[int, tuple[int, int]] = field(default_factory=dict)
    notices: list[tuple[float, str]] = field(default_factory=list)
    first: int | None = None

    async def run(self) -> None:
        """Until the session ends."""
        self.live.on("marks", self._on_marks)
        self.live.on("notice", lambda notice: self.notices.append((time.monotonic(), notice["code"])))
        async for frame in self.live.frames():
            if frame.pts is not None:
                self.pictures.setdefault(frame.pts, time.monotonic())

    def seen(self, since: float = 0.0) -> list[Seen]:
        """Pictures whose marks have come, in the order they came."""
        if self.first is None:
            self.first = self._first()
        if self.first is None:
            return []
        stamped = (((self.first + pts) % 2**32, at) for pts, at in self.pictures.items() if at >= since)
        both = ((at, *self.marks[stamp]) for stamp, at in stamped if stamp in self.marks)
        return sorted((Seen(*row) for row in both), key=lambda seen: seen.at)

    def told(self, code: str, since: float) -> float | None:
        """When a notice came."""
        return next((at for at, said in self.notices if said == code and at >= since), None)

    def _first(self) -> int | None:
        """aiortc counts timestamps from the first it was sent: that one, once enough have been seen to tell."""
        if min(len(self.pictures), len(self.marks)) < ENOUGH:
            return None
        pictures, marks = list(self.pictures)[:ENOUGH], list(self.marks)
        votes = Counter((mark - pts) % 2**32 for pts in pictures for mark in marks)
        (first, count), *_ = votes.most_common(1)
        return first if count >= ENOUGH // 2 else None

    def _on_marks(self, message: dict[str, Any]) -> None:
        for rtp_timestamp, index, _, _, kind in message["frames"]:
            self.marks[int(rtp_timestamp)] = int(index), int(kind)

    async def restyled(self, since: float) -> float:
        """When the first restyled picture came after the camera's."""
        while True:
            kinds = self.seen(since)
            camera = next((seen.at for seen in kinds if seen.kind == CAMERA), None)
            found = next((one.at for one in kinds if camera and one.kind == RESTYLED and one.at > camera), None)
            if found is not None:
                return found
            if self.live.ended:
                raise AssertionError(f"the session ended: {self.live.ended}")
            await asyncio.sleep(POLL_S)


def ranks_of(server: psutil.Process) -> list[psutil.Process]:
    """Processes of the one group of a server's engine, rank 0 first."""
    first = next(child for child in server.children() if "engine.ring_start" in child.cmdline())
    others = (child for child in first.children() if "spawn_main" in " ".join(child.cmdline()))
    return [first, *sorted(others, key=lambda process: process.pid)]


def ranks_on(raylets: list[psutil.Process]) -> list[psutil.Process]:
    """Processes of the one group on the nodes of a Ray cluster, rank 0 first."""
    found = [child for raylet in raylets for child in raylet.children(recursive=True)]
    ranks = [child for child in found if "engine.ring_start" in child.cmdline()]
    arguments = {process: process.cmdline()[4:] for process in ranks}
    return sorted(ranks, key=lambda process: int(arguments[process][1]) if "follow" in arguments[process] else 0)


async def kill_rank(
    watch: Watch,
    server: psutil.Process,
    rank: int,
    *,
    timeout_s: float,
    find: Callable[[psutil.Process], list[psutil.Process]] = ranks_of,
) -> Kill:
    """SIGKILL to a rank under a session that is restyled, until it is again. Raises TimeoutError, AssertionError.

    find: the ranks of the server's group, 0 first.
    """
    async with asyncio.timeout(timeout_s):
        since = time.monotonic()
        while not any(seen.kind == RESTYLED for seen in watch.seen(since)):
            await asyncio.sleep(POLL_S)
        ranks = find(server)
        killed_at = time.monotonic()
        os.kill(ranks[rank].pid, signal.SIGKILL)
        restyled_at = await watch.restyled(killed_at)
        told_at = watch.told("engine_lost", killed_at)
        # The last marks of the time in question may be on their way.
        await asyncio.sleep(MARKS_S)
        await asyncio.to_thread(psutil.wait_procs, ranks, timeout_s)
    if left := [process for process in ranks if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]:
        raise AssertionError(f"left behind: {left}")
    assert told_at is not None, "nobody said that the engine was lost"
    shown = watch.seen()
    before = [one for one in shown if one.at <= killed_at]
    within = [before[-1], *(one for one in shown if killed_at < one.at <= restyled_at)]
    gap_s, gap_frames = max((after.at - one.at, after.index - one.index) for one, after in pairwise(within))
    usual = max(1, round(_median([after.index - one.index for one, after in pairwise(before)])))
    camera_at = next(one.at for one in within[1:] if one.kind == CAMERA)
    return Kill(
        rank,
        told_at - killed_at,
        camera_at - killed_at,
        restyled_at - killed_at,
        gap_s,
        max(0, gap_frames // usual - 1),
        max(after.at - one.at for one, after in pairwise(one for one in before if one.at > killed_at - BEFORE_S)),
    )


def _median(values: list[int]) -> float:
    return sorted(values)[len(values) // 2] if values else 1.0
