"""Devices at work in a simulation: groups of ranks that take chunks up, hand them on and finish them, by events."""

from __future__ import annotations

import heapq
import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import inf
from typing import Protocol

from engine.cost_model import Costs
from engine.scheduler import Drop, Item, Picked, Scheduler
from engine.simulator_load import Chunk, Workload, stretch
from engine.simulator_ranks import RankShare, RingCosts, Visit, route, slowest_s

# Chunks on their way in a group of several ranks, for each rank: live, and saturated, where latency is no matter.
IN_FLIGHT = (1, 3)


class Policy(Protocol):
    """What decides in `simulate`; `engine.scheduler.Scheduler`, or another to compare it with."""

    def open(self, stream: int, *, steps: int = 1) -> None:
        """See `Scheduler`."""
        ...

    def change(self, stream: int, *, steps: int, small: bool, light: bool = False) -> None:
        """See `Scheduler`; asked only where there is a ladder."""
        ...

    def push(self, item: Item) -> list[Drop]:
        """See `Scheduler`."""
        ...

    def pick(self, now: float) -> Picked:
        """See `Scheduler`; `work` is not read."""
        ...


def our_policy(costs: Costs, micro_batch: int) -> Policy:
    """The engine's own."""
    return Scheduler(costs, micro_batch=micro_batch)


class Clock:
    """Events, in order of time."""

    def __init__(self) -> None:
        self._events: list[tuple[float, int, Callable[[float], None]]] = []
        self._count = 0

    def at(self, when: float, event: Callable[[float], None]) -> None:
        """Have `event` called with the instant `when`."""
        self._count += 1
        heapq.heappush(self._events, (when, self._count, event))

    def run(self) -> None:
        """Until nothing is left to do."""
        while self._events:
            now, _, event = heapq.heappop(self._events)
            event(now)


@dataclass(frozen=True)
class Making:
    """How chunks are rendered: in so many steps, at the smaller size, by the light VAE."""

    steps: int
    small: bool = False
    light: bool = False


class Follower(Protocol):
    """Who is told what becomes of chunks."""

    def on_taken(self, chunk: Chunk, now: float) -> None:
        """It is being rendered."""
        ...

    def on_dropped(self, chunk: Chunk) -> None:
        """It was given up before."""
        ...

    def on_done(self, chunk: Chunk, taken_at: float, now: float) -> None:
        """It has been rendered."""
        ...


@dataclass
class _Job:
    """Chunks on their way through a group. stays: at ranks, done with."""

    chunks: list[Chunk]
    latents: int
    taken_at: float
    making: Making
    route: tuple[Visit, ...]
    stays: int = 0


@dataclass
class _Group:
    """One copy of the model over some devices. first: the rank that chunks come to."""

    ranks: tuple[RankShare, ...]
    policy: Policy
    most_in_flight: int
    first: int
    routes: dict[int, tuple[Visit, ...]] = field(default_factory=dict)
    in_flight: int = 0

    def __post_init__(self) -> None:
        self.queues: list[deque[_Job]] = [deque() for _ in self.ranks]
        self.busy = [False] * len(self.ranks)
        self.busy_s = [0.0] * len(self.ranks)

    def way(self, steps: int) -> tuple[Visit, ...]:
        """Of a chunk of so many steps."""
        if steps not in self.routes:
            self.routes[steps] = route(self.ranks, steps)
        return self.routes[steps]


class Devices:
    """Groups of ranks, and the chunks in them. All sessions' chunks are made alike."""

    def __init__(
        self,
        groups: Sequence[tuple[RankShare, ...]],
        making: Making,
        workload: Workload,
        clock: Clock,
        noise: random.Random,
        follower: Follower,
        *,
        policy: Callable[[Costs, int], Policy],
        micro_batch: int,
    ) -> None:
        self.making = making
        """How chunks are made that are taken up now."""
        self._workload, self._clock, self._noise, self._told = workload, clock, noise, follower
        self._groups = [
            _Group(
                ring,
                policy(RingCosts(ring), micro_batch if len(ring) == 1 else 1),
                1 if len(ring) == 1 else IN_FLIGHT[workload.saturated] * len(ring),
                route(ring, making.steps)[0].rank,
            )
            for ring in groups
        ]
        self._waiting: dict[tuple[int, int], Chunk] = {}
        self._home = self._place()
        self._open: list[int] = []
        # How the last chunk of a session was made.
        self._made: dict[int, Making] = {}

    def open(self, session: int) -> None:
        """Take chunks of this session from now on."""
        self._open.append(session)
        policy, making = self._home[session].policy, self.making
        policy.open(session, steps=making.steps)
        if making.small or making.light:
            policy.change(session, steps=making.steps, small=making.small, light=making.light)

    def change(self, making: Making) -> None:
        """Make all chunks so that are taken up from now on."""
        self.making = making
        for session in self._open:
            self._home[session].policy.change(session, steps=making.steps, small=making.small, light=making.light)

    def push(self, chunk: Chunk, now: float) -> None:
        """A chunk is complete."""
        group = self._home[chunk.session]
        deadline = inf if self._workload.saturated else chunk.captured[0] + self._workload.budget_s
        self._waiting[chunk.session, chunk.index] = chunk
        self._forget(group.policy.push(Item(chunk.session, chunk.index, 0, len(chunk.captured), deadline)))
        self._start(group, group.first, now)

    def used(self) -> list[tuple[RankShare, float]]:
        """Every rank, as chunks are made now, with the share of the time in which it was busy."""
        making, seconds = self.making, self._workload.seconds
        return [
            (share.at(small=making.small, light=making.light), min(group.busy_s[place] / seconds, 1.0))
            for group in self._groups
            for place, share in enumerate(group.ranks)
        ]

    def _place(self) -> list[_Group]:
        """Each session to the group with the least load."""
        load = [0] * len(self._groups)
        speed = [1 / slowest_s(group.ranks, self.making.steps) for group in self._groups]
        home = []
        for _ in range(self._workload.sessions):
            best = min(range(len(load)), key=lambda i: (load[i] + 1) / speed[i])
            load[best] += 1
            home.append(self._groups[best])
        return home

    def _forget(self, drops: Sequence[Drop]) -> None:
        for drop in drops:
            self._told.on_dropped(self._waiting.pop((drop.item.stream, drop.item.chunk)))

    def _start(self, group: _Group, rank: int, now: float) -> None:
        """Give an idle rank something to do."""
        if group.busy[rank]:
            return
        queue = group.queues[rank]
        if queue:
            # First those that have the longest way to go: they are what the other ranks wait for.
            job = min(queue, key=lambda waiting: waiting.stays)
            queue.remove(job)
        elif rank == group.first and group.in_flight < group.most_in_flight:
            picked = group.policy.pick(now)
            self._forget(picked.drops)
            if not picked.items:
                return
            job = self._take_up(group, picked, now)
        else:
            return
        group.busy[rank] = True
        making = job.making
        share = group.ranks[rank].at(small=making.small, light=making.light)
        mean_s = share.costs.fixed_s + job.route[job.stays].time_s(share, job.latents)
        took_s = mean_s * stretch(self._noise, share.costs.noise)
        group.busy_s[rank] += max(0.0, min(now + took_s, self._workload.seconds) - now)
        self._clock.at(now + took_s, partial(self._finish, group, rank, job))

    def _take_up(self, group: _Group, picked: Picked, now: float) -> _Job:
        making = self.making
        chunks = [self._waiting.pop((item.stream, item.chunk)) for item in picked.items]
        latents = sum(chunk.latents + self._begins_anew(chunk.session) for chunk in chunks)
        group.in_flight += 1
        for chunk in chunks:
            self._told.on_taken(chunk, now)
        return _Job(chunks, latents, now, making, group.way(making.steps))

    def _begins_anew(self, session: int) -> bool:
        """Whether the session's VAE takes a latent frame more for its next chunk, as it does at a stream's first: it
        is another one or at another size, and takes its first frame alone."""
        before, making = self._made.get(session), self.making
        self._made[session] = making
        moved = before is not None and (before.small, before.light) != (making.small, making.light)
        return moved and self._workload.first_frames > 1

    def _finish(self, group: _Group, rank: int, job: _Job, now: float) -> None:
        group.busy[rank] = False
        job.stays += 1
        if job.stays < len(job.route):
            following = job.route[job.stays].rank
            self._clock.at(now + group.ranks[following].costs.hop_s, partial(self._hopped, group, following, job))
        else:
            group.in_flight -= 1
            for chunk in job.chunks:
                self._told.on_done(chunk, job.taken_at, now)
            self._start(group, group.first, now)
        self._start(group, rank, now)

    def _hopped(self, group: _Group, rank: int, job: _Job, now: float) -> None:
        group.queues[rank].append(job)
        self._start(group, rank, now)
