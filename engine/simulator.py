"""What given devices would hold: discrete events over the same policy that the engine runs. Pure, seeded, no torch.

`simulate` is our system: `engine.scheduler` decides what is rendered next and what is given up, the VAE is cut into
units, and units and transformer blocks are laid over the ranks of a group so that the slowest is as fast as can be. The
public code that it is held against is `engine.simulator_published`.

All figures are predictions. Times come from `engine.devices` or from a measured profile.
"""

from __future__ import annotations

import heapq
import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import ceil, inf
from typing import Protocol

from engine.cost_model import Costs
from engine.scheduler import Drop, Item, Picked, Scheduler
from engine.simulator_load import CHUNK_FRAMES, MAX_SESSIONS, Chunk, Workload, chunks_of, starts_of, stretch
from engine.simulator_outcome import Book, Outcome, bottleneck_words
from engine.simulator_ranks import RankShare, RingCosts, Visit, route, slowest_s

MISSES_HELD = 0.01
# Chunks on their way in a group of several ranks, for each rank: live, and saturated, where latency is no matter.
IN_FLIGHT = (1, 3)


class Policy(Protocol):
    """What decides in `simulate`; `engine.scheduler.Scheduler`, or another to compare it with."""

    def open(self, stream: int, *, steps: int = 1) -> None:
        """See `Scheduler`."""
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


@dataclass
class _Job:
    """Chunks on their way through a group; stays: at ranks, done with."""

    chunks: list[Chunk]
    started: float
    stays: int = 0


@dataclass
class _Group:
    """One copy of the model over some devices."""

    ranks: tuple[RankShare, ...]
    route: tuple[Visit, ...]
    policy: Policy
    queues: list[deque[_Job]]
    busy: list[bool]
    busy_s: list[float]
    most_in_flight: int
    in_flight: int = 0


def simulate(
    groups: Sequence[Sequence[RankShare]],
    steps: int,
    workload: Workload,
    *,
    policy: Callable[[Costs, int], Policy] = our_policy,
    micro_batch: int = 1,
) -> Outcome:
    """Our engine on these groups of ranks.

    A group of one rank takes all steps of a pass at once, as `engine.worker` does, and may take chunks of several
    sessions together. In a group of more a chunk goes round once a step, beside others; chunks in flight go first.

    Args:
        groups: see `arrange`.
        policy: makes what decides; one for each group.
        micro_batch: most chunks in one pass.
    """
    return _Run([tuple(group) for group in groups], steps, workload, policy, micro_batch).outcome()


class _Run:
    """The events of one simulation, in order of time."""

    def __init__(
        self,
        groups: list[tuple[RankShare, ...]],
        steps: int,
        workload: Workload,
        policy: Callable[[Costs, int], Policy],
        micro_batch: int,
    ) -> None:
        self._steps, self._workload = steps, workload
        self._noise = random.Random(workload.seed)
        self._book = Book(workload)
        self._groups = [
            _Group(
                ring,
                route(ring, steps),
                policy(RingCosts(ring), micro_batch if len(ring) == 1 else 1),
                [deque() for _ in ring],
                [False] * len(ring),
                [0.0] * len(ring),
                1 if len(ring) == 1 else IN_FLIGHT[workload.saturated] * len(ring),
            )
            for ring in groups
        ]
        self._events: list[tuple[float, int, Callable[[float], None]]] = []
        self._count = 0
        self._waiting: dict[tuple[int, int], Chunk] = {}
        self._next = [0] * workload.sessions
        self._home = self._place()
        for session, start in enumerate(starts_of(workload, self._noise)):
            self._home[session].policy.open(session, steps=steps)
            if workload.saturated:
                self._at(start, partial(self._refill, session))
            else:
                self._arrivals(session, start)

    def _place(self) -> list[_Group]:
        """Each session to the group with the least load."""
        load = [0] * len(self._groups)
        speed = [1 / slowest_s(group.ranks, self._steps) for group in self._groups]
        home = []
        for _ in range(self._workload.sessions):
            best = min(range(len(load)), key=lambda i: (load[i] + 1) / speed[i])
            load[best] += 1
            home.append(self._groups[best])
        return home

    def outcome(self) -> Outcome:
        """Run until nothing is left to do."""
        while self._events:
            now, _, event = heapq.heappop(self._events)
            event(now)
        ranks = [(share, group.busy_s[i]) for group in self._groups for i, share in enumerate(group.ranks)]
        used = [min(busy_s / self._workload.seconds, 1.0) for _, busy_s in ranks]
        slowest = used.index(max(used))
        words = bottleneck_words(ranks[slowest][0].parts_s(self._steps), slowest, used[slowest], self._workload)
        return self._book.outcome(used, words)

    def _at(self, when: float, event: Callable[[float], None]) -> None:
        self._count += 1
        heapq.heappush(self._events, (when, self._count, event))

    def _arrivals(self, session: int, start: float) -> None:
        chunks = chunks_of(self._workload, session, start, self._noise)

        def following() -> None:
            if (entry := next(chunks, None)) is not None:
                when, chunk = entry
                self._at(when, lambda now: arrive(chunk, now))

        def arrive(chunk: Chunk, now: float) -> None:
            self._book.came(chunk)
            self._push(chunk, now)
            following()

        following()

    def _push(self, chunk: Chunk, now: float) -> None:
        group = self._home[chunk.session]
        deadline = inf if self._workload.saturated else chunk.captured[0] + self._workload.budget_s
        self._waiting[chunk.session, chunk.index] = chunk
        self._forget(group.policy.push(Item(chunk.session, chunk.index, 0, len(chunk.captured), deadline)))
        self._start(group, group.route[0].rank, now)

    def _refill(self, session: int, now: float) -> None:
        """The next chunk of a saturated session."""
        if now < self._workload.seconds:
            index = self._next[session]
            self._next[session] += 1
            count = CHUNK_FRAMES if index else self._workload.first_frames
            self._push(Chunk(session, index, (now,) * count, ceil(count / CHUNK_FRAMES)), now)

    def _forget(self, drops: Sequence[Drop]) -> None:
        for drop in drops:
            del self._waiting[drop.item.stream, drop.item.chunk]

    def _start(self, group: _Group, rank: int, now: float) -> None:
        """Give an idle rank something to do."""
        if group.busy[rank]:
            return
        queue = group.queues[rank]
        if queue:
            # First those that have the longest way to go: they are what the other ranks wait for.
            job = min(queue, key=lambda waiting: waiting.stays)
            queue.remove(job)
        elif rank == group.route[0].rank and group.in_flight < group.most_in_flight:
            picked = group.policy.pick(now)
            self._forget(picked.drops)
            if not picked.items:
                return
            job = _Job([self._waiting.pop((item.stream, item.chunk)) for item in picked.items], now)
            group.in_flight += 1
            if self._workload.saturated:
                for chunk in job.chunks:
                    self._at(now, partial(self._refill, chunk.session))
        else:
            return
        group.busy[rank] = True
        share = group.ranks[rank]
        mean_s = share.costs.fixed_s + group.route[job.stays].time_s(share, sum(chunk.latents for chunk in job.chunks))
        took_s = mean_s * stretch(self._noise, share.costs.noise)
        group.busy_s[rank] += max(0.0, min(now + took_s, self._workload.seconds) - now)
        self._at(now + took_s, partial(self._finish, group, rank, job))

    def _finish(self, group: _Group, rank: int, job: _Job, now: float) -> None:
        group.busy[rank] = False
        job.stays += 1
        if job.stays < len(group.route):
            following = group.route[job.stays].rank
            self._at(now + group.ranks[following].costs.hop_s, partial(self._hopped, group, following, job))
        else:
            group.in_flight -= 1
            for chunk in job.chunks:
                if self._workload.saturated:
                    taken = (job.started,) * len(chunk.captured)
                    self._book.came(chunk, taken)
                    self._book.done(chunk, taken, now)
                else:
                    self._book.done(chunk, chunk.captured, now)
            self._start(group, group.route[0].rank, now)
        self._start(group, rank, now)

    def _hopped(self, group: _Group, rank: int, job: _Job, now: float) -> None:
        group.queues[rank].append(job)
        self._start(group, rank, now)


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
