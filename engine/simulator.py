"""What given devices would hold: discrete events over the same policy that the engine runs. Pure, seeded, no torch.

`simulate` is our system: `engine.scheduler` decides what is rendered next and what is given up, the VAE is cut into
units, and units and transformer blocks are laid over the ranks of a group so that the slowest is as fast as can be. The
public code that it is held against is `engine.simulator_published`.

All figures are predictions. Times come from `engine.devices` or from a measured profile.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from math import ceil

from engine.cost_model import Costs
from engine.simulator_devices import Clock, Devices, Making, Policy, our_policy
from engine.simulator_load import CHUNK_FRAMES, MAX_SESSIONS, Camera, Chunk, Workload, starts_of
from engine.simulator_outcome import Book, Outcome, bottleneck_words
from engine.simulator_ranks import RankShare
from engine.simulator_server import Served, Server

MISSES_HELD = 0.01


def simulate(
    groups: Sequence[Sequence[RankShare]],
    steps: int,
    workload: Workload,
    *,
    policy: Callable[[Costs, int], Policy] = our_policy,
    micro_batch: int = 1,
    server: Server | None = None,
) -> Outcome:
    """Our engine on these groups of ranks.

    A group of one rank takes all steps of a pass at once, as `engine.worker` does, and may take chunks of several
    sessions together. In a group of more a chunk goes round once a step, beside others; chunks in flight go first.

    Args:
        groups: see `arrange`.
        policy: makes what decides; one for each group.
        micro_batch: most chunks in one pass.
        server: around it; without one every session has its wish whatever becomes of it, and frames count when they
            are rendered.
    """
    return _Run([tuple(group) for group in groups], steps, workload, policy, micro_batch, server).outcome()


class _Run:
    """One simulation: sessions, the devices, and what became of every chunk."""

    def __init__(
        self,
        groups: list[tuple[RankShare, ...]],
        steps: int,
        workload: Workload,
        policy: Callable[[Costs, int], Policy],
        micro_batch: int,
        server: Server | None,
    ) -> None:
        self._workload = workload
        self._clock, self._book = Clock(), Book(workload)
        noise = random.Random(workload.seed)
        self._devices = Devices(
            groups, Making(steps), workload, self._clock, noise, self, policy=policy, micro_batch=micro_batch
        )
        starts = starts_of(workload, noise)
        self._cameras = [Camera(workload, session, start, noise) for session, start in enumerate(starts)]
        self._served = None
        if server is not None:
            self._served = Served(server, workload, self._clock, self._devices, self._book, self._cameras)
        self._next = [0] * workload.sessions
        for session, start in enumerate(starts):
            self._clock.at(start, partial(self._open, session))

    def outcome(self) -> Outcome:
        """Run it."""
        self._clock.run()
        ranks = self._devices.used()
        used = [share for _, share in ranks]
        slowest = used.index(max(used))
        parts_s = ranks[slowest][0].parts_s(self._devices.making.steps)
        return self._book.outcome(used, bottleneck_words(parts_s, slowest, used[slowest], self._workload))

    # --- what becomes of chunks, see `engine.simulator_devices.Follower`

    def on_taken(self, chunk: Chunk, now: float) -> None:
        """Where a chunk of each session always waits, the next one comes."""
        if self._workload.saturated:
            self._clock.at(now, partial(self._refill, chunk.session))

    def on_dropped(self, chunk: Chunk) -> None:
        """Its frames are missed."""
        if self._served is not None:
            self._served.on_dropped(chunk)

    def on_done(self, chunk: Chunk, taken_at: float, now: float) -> None:
        """Its frames have come out, or wait to be shown."""
        if self._served is not None:
            self._served.on_done(chunk, now)
            return
        captured = chunk.captured
        if self._workload.saturated:
            captured = (taken_at,) * len(captured)
            self._book.came(chunk.session, captured)
        for captured_at in captured:
            self._book.shown(chunk.session, captured_at, now)

    # --- what comes in

    def _open(self, session: int, now: float) -> None:
        self._devices.open(session)
        if self._served is not None:
            self._served.open(session, now)
        if self._workload.saturated:
            self._refill(session, now)
        else:
            self._expect(session)

    def _expect(self, session: int) -> None:
        if (entry := next(self._cameras[session], None)) is not None:
            when, chunk = entry
            self._clock.at(when, partial(self._arrive, chunk))

    def _arrive(self, chunk: Chunk, now: float) -> None:
        self._book.came(chunk.session, chunk.captured)
        if self._served is None or self._served.takes(chunk):
            self._devices.push(chunk, now)
        self._expect(chunk.session)

    def _refill(self, session: int, now: float) -> None:
        """The next chunk of a saturated session."""
        if now < self._workload.seconds:
            index = self._next[session]
            self._next[session] += 1
            count = CHUNK_FRAMES if index else self._workload.first_frames
            self._devices.push(Chunk(session, index, (now,) * count, ceil(count / CHUNK_FRAMES)), now)


def sessions_held(run: Callable[[Workload], Outcome], workload: Workload, most: int = MAX_SESSIONS) -> int:
    """The most sessions of which none misses 1 % of its frames or more, found by doubling and halving; 0 if not one.

    Args:
        run: simulates a workload.
        workload: all but its sessions.
        most: not tried beyond.
    """

    def holds(sessions: int) -> bool:
        return run(replace(workload, sessions=sessions)).worst_dmr < MISSES_HELD

    low, high = 0, 1
    while high <= most and holds(high):
        low, high = high, 2 * high
    high = min(high, most + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low
