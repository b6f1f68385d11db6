"""What given devices would hold: discrete events over the same policy that the engine runs. Pure, seeded, no torch.

Two systems are modelled. `simulate` is ours: `engine.scheduler` decides what is rendered next and what is given up,
the VAE is cut into units, and units and transformer blocks are laid over the ranks of a group so that the slowest is
as fast as can be. `simulate_published` is StreamDiffusionV2's public code: the VAE whole at the two ends of one ring,
one queue, first in first out, nothing dropped, the steps of a chunk in one stream batch.

All figures are predictions. Times come from `engine.devices` or from a measured profile.
"""

from __future__ import annotations

import heapq
import random
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from math import ceil, exp, floor, inf
from statistics import fmean, median
from typing import Literal, Protocol

from engine.cost_model import Costs, Work
from engine.devices import ChunkCosts
from engine.scheduler import Drop, Item, Picked, Scheduler

CHUNK_FRAMES = 4
ENCODER_UNITS, DECODER_UNITS = 4, 6
# Frames captured before are shown but not judged: a stream's first chunk may be twice as long.
WARM_UP_S = 2.0
MISSES_HELD = 0.01
MAX_SESSIONS = 512
# Chunks on their way in a group of several ranks, for each rank: live, and saturated, where latency is no matter.
IN_FLIGHT = (1, 3)
# The public demo asks its queue every 100 ms whether four frames are there. What it then spends on the way out
# (queues between processes, JPEG) is fitted to the published latencies of one H100: mean and spread, the two constants.
POLL_S = 0.1
HOST_S, HOST_SPREAD = 0.058, 0.55

Arrivals = Literal["even", "poisson"]


@dataclass(frozen=True)
class Workload:
    """What comes in.

    sessions: cameras. fps: of each. budget_s: a frame shown later after its capture is a miss. seconds: simulated.
    arrivals: whether the cameras' chunks are spread evenly, or the sessions come at random instants of the first
    second and lie as they fall. jitter_s: the most by which a frame arrives late. saturated: a chunk of every session
    always waits, and nothing is ever late: how much can be rendered at all. first_frames: of a stream's first chunk.
    """

    sessions: int = 1
    fps: float = 16.0
    budget_s: float = 0.5
    seconds: float = 20.0
    arrivals: Arrivals = "even"
    jitter_s: float = 0.005
    saturated: bool = False
    first_frames: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        """Raises ValueError for values out of bounds."""
        if not 1 <= self.sessions <= MAX_SESSIONS:
            raise ValueError(f"sessions must be 1 to {MAX_SESSIONS}, not {self.sessions}")
        if not 1 <= self.fps <= 240:
            raise ValueError(f"fps must be 1 to 240, not {self.fps}")
        if not 0.01 <= self.budget_s <= 60:
            raise ValueError(f"budget must be 0.01 to 60 s, not {self.budget_s}")
        if not WARM_UP_S < self.seconds <= 3600:
            raise ValueError(f"seconds must be above {WARM_UP_S} and at most 3600, not {self.seconds}")

    @property
    def period_s(self) -> float:
        """Between chunks of one session."""
        return CHUNK_FRAMES / self.fps


@dataclass(frozen=True)
class SessionOutcome:
    """One session: frames a second that came out, seconds to the first one, share of frames late or never shown."""

    fps: float
    ttff_s: float
    dmr: float


@dataclass(frozen=True)
class Outcome:
    """What a simulation gave.

    latency_s: of every judged frame that came out, from its capture, sorted; saturated, from when the engine took it.
    utilisation: busy share of each rank. bottleneck: in words.
    """

    sessions: tuple[SessionOutcome, ...]
    latency_s: tuple[float, ...]
    utilisation: tuple[float, ...]
    bottleneck: str

    @property
    def fps(self) -> float:
        """All sessions together, frames a second."""
        return sum(session.fps for session in self.sessions)

    @property
    def dmr(self) -> float:
        """Share of all sessions' frames that missed their deadline, the never shown among them."""
        return fmean(session.dmr for session in self.sessions)

    @property
    def worst_dmr(self) -> float:
        """Of the session that fared worst."""
        return max(session.dmr for session in self.sessions)

    @property
    def ttff_s(self) -> float:
        """Median over sessions, from the first frame's capture; infinite if nothing came."""
        return median(session.ttff_s for session in self.sessions)

    @property
    def mean_latency_s(self) -> float:
        """Infinite if nothing came."""
        return fmean(self.latency_s) if self.latency_s else inf

    def latency_quantile_s(self, share: float) -> float:
        """The latency that this share of frames stays at or below; infinite if nothing came."""
        return self.latency_s[max(ceil(share * len(self.latency_s)) - 1, 0)] if self.latency_s else inf


@dataclass(frozen=True)
class RankShare:
    """What one rank does of a chunk: shares of encode and decode from 0 to 1, a number of blocks."""

    costs: ChunkCosts
    encode: float
    blocks: int
    decode: float

    def parts_s(self, steps: int, *, batched: bool = False) -> dict[str, float]:
        """Seconds of one chunk by what they go to. batched: all steps in one forward."""
        forwards = 1 if batched else steps
        return {
            "VAE encode": self.encode * self.costs.encode_s,
            "the transformer": self.blocks * (forwards * self.costs.pass_s + steps * self.costs.row_s),
            "VAE decode": self.decode * self.costs.decode_s,
        }

    def chunk_s(self, steps: int, *, batched: bool = False) -> float:
        """All of it."""
        return sum(self.parts_s(steps, batched=batched).values())

    def pass_s(self, work: Work) -> float:
        """The rank's part of a pass that it has for itself."""
        costs = self.costs
        coded = self.encode * costs.encode_s + self.decode * costs.decode_s
        through = self.blocks * (work.forwards * costs.pass_s + work.rows * costs.row_s)
        return costs.fixed_s + work.latents * coded + through


@dataclass(frozen=True)
class Visit:
    """One stay of a chunk at a rank: steps it takes there, and whether the rank's parts of the VAE run too."""

    rank: int
    steps: int
    encode: bool
    decode: bool

    def time_s(self, share: RankShare, latents: int) -> float:
        """For chunks of so many latent frames in all."""
        costs = share.costs
        coded = self.encode * share.encode * costs.encode_s + self.decode * share.decode * costs.decode_s
        return latents * coded + share.blocks * self.steps * (costs.pass_s + latents * costs.row_s)


def route(ring: Sequence[RankShare], steps: int) -> tuple[Visit, ...]:
    """The way of a chunk: past every rank with a part in encode, once a step past those with blocks, then decode."""
    visits: list[Visit] = []

    def go(rank: int, steps: int = 0, *, encode: bool = False, decode: bool = False) -> None:
        if visits and visits[-1].rank == rank:
            last = visits.pop()
            visits.append(Visit(rank, last.steps + steps, last.encode or encode, last.decode or decode))
        else:
            visits.append(Visit(rank, steps, encode, decode))

    for rank, share in enumerate(ring):
        if share.encode:
            go(rank, encode=True)
    for _ in range(steps):
        for rank, share in enumerate(ring):
            if share.blocks:
                go(rank, 1)
    for rank, share in enumerate(ring):
        if share.decode:
            go(rank, decode=True)
    return tuple(visits)


def split(
    costs: Sequence[ChunkCosts], steps: int, *, batched: bool = False, whole_vae: bool = False
) -> tuple[RankShare, ...]:
    """Lay encoder, blocks and decoder over ranks in this order, contiguously, so that the slowest is fastest.

    Args:
        batched: all steps of a chunk share one forward.
        whole_vae: encode stays whole on the first rank and decode on the last, every rank has a block and loses
            its hop: the public code. Otherwise they are cut into equal units, and hops are only latency.
    """
    encoder, decoder = (1, 1) if whole_vae else (ENCODER_UNITS, DECODER_UNITS)
    blocks = costs[0].blocks
    if len(costs) == 1:
        return (RankShare(costs[0], 1.0, blocks, 1.0),)
    forwards = 1 if batched else steps
    times = [
        (each.encode_s / encoder, forwards * each.pass_s + steps * each.row_s, each.decode_s / decoder)
        for each in costs
    ]

    def fill(limit_s: float) -> list[tuple[int, int, int]] | None:
        left = [encoder, blocks, decoder]
        taken = []
        for rank, unit_s in enumerate(times):
            after = len(times) - 1 - rank
            room = limit_s - (costs[rank].hop_s if whole_vae else 0.0) + 1e-12
            took = [0, 0, 0]
            for kind in range(3):
                if any(left[:kind]):
                    break
                kept = (0, after, left[2] if after else 0)[kind] if whole_vae else 0
                took[kind] = min(left[kind] - kept, floor(room / unit_s[kind])) if room > 0 else 0
                room -= took[kind] * unit_s[kind]
                left[kind] -= took[kind]
            if whole_vae and not took[1]:
                return None
            taken.append((took[0], took[1], took[2]))
        return None if any(left) else taken

    counts = (encoder, blocks, decoder)
    low = sum(min(unit_s[i] for unit_s in times) * n for i, n in enumerate(counts)) / len(costs)
    high = sum(max(unit_s[i] for unit_s in times) * n for i, n in enumerate(counts)) + max(c.hop_s for c in costs)
    while high - low > 1e-5 * high:
        middle = (low + high) / 2
        low, high = (low, middle) if fill(middle) else (middle, high)
    return tuple(
        RankShare(each, e / encoder, b, d / decoder) for each, (e, b, d) in zip(costs, fill(high) or [], strict=True)
    )


def published_tick_s(costs: Sequence[ChunkCosts], steps: int, *, batched: bool = True) -> float:
    """Seconds between chunks of the public code's ring, without noise: its slowest rank.

    Args:
        costs: of each rank.
        batched: the steps in one stream batch; without, one after another.
    """
    ring = split(costs, steps, batched=batched, whole_vae=True)
    return max(_published_rank_s(share, steps, batched, len(ring)) for share in ring)


def _published_rank_s(share: RankShare, steps: int, batched: bool, ranks: int) -> float:
    return share.chunk_s(steps, batched=batched) + (share.costs.hop_s if ranks > 1 else 0.0)


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


@dataclass(frozen=True)
class _RingCosts:
    """What a pass takes on its way through a group alone: what the policy of a group of ranks goes by."""

    ring: tuple[RankShare, ...]

    def mean_s(self, work: Work) -> float:
        hops = work.forwards if len(self.ring) > 1 else 0
        return sum(share.pass_s(work) + hops * share.costs.hop_s for share in self.ring)

    def upper_s(self, work: Work) -> float:
        return self.mean_s(work) * max(share.costs.upper_s(work) / share.costs.mean_s(work) for share in self.ring)


@dataclass
class _Chunk:
    session: int
    index: int
    captured: tuple[float, ...]
    latents: int


@dataclass
class _Job:
    """Chunks on their way through a group; stays: at ranks, done with."""

    chunks: list[_Chunk]
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


@dataclass
class _Book:
    """What became of every frame."""

    workload: Workload
    latencies: list[float] = field(default_factory=list)
    first_s: dict[int, float] = field(default_factory=dict)
    shown: dict[int, int] = field(default_factory=dict)
    judged: dict[int, int] = field(default_factory=dict)
    on_time: dict[int, int] = field(default_factory=dict)

    def came(self, chunk: _Chunk, captured: Sequence[float] | None = None) -> None:
        """A chunk has been captured; a saturated one counts by when it was taken up."""
        count = sum(at >= WARM_UP_S for at in captured or chunk.captured)
        self.judged[chunk.session] = self.judged.get(chunk.session, 0) + count

    def done(self, chunk: _Chunk, captured: Sequence[float], at: float) -> None:
        """A chunk has been rendered."""
        workload, session = self.workload, chunk.session
        self.first_s.setdefault(session, at - captured[0])
        if WARM_UP_S <= at < workload.seconds:
            self.shown[session] = self.shown.get(session, 0) + len(captured)
        judged = [at - captured_at for captured_at in captured if captured_at >= WARM_UP_S]
        self.latencies += judged
        on_time = sum(latency <= workload.budget_s for latency in judged)
        self.on_time[session] = self.on_time.get(session, 0) + on_time

    def outcome(self, utilisation: Sequence[float], bottleneck: str) -> Outcome:
        """The sum of it."""
        span_s = self.workload.seconds - WARM_UP_S
        sessions = tuple(
            SessionOutcome(
                self.shown.get(session, 0) / span_s,
                self.first_s.get(session, inf),
                1 - self.on_time.get(session, 0) / judged if (judged := self.judged.get(session, 0)) else 0.0,
            )
            for session in range(self.workload.sessions)
        )
        return Outcome(sessions, tuple(sorted(self.latencies)), tuple(utilisation), bottleneck)


def _chunks(workload: Workload, session: int, start: float, noise: random.Random) -> Iterator[tuple[float, _Chunk]]:
    """When each chunk of a camera is complete, and the chunk."""
    index, frame = 0, 0
    while True:
        count = workload.first_frames if index == 0 else CHUNK_FRAMES
        captured = tuple(start + (frame + i) / workload.fps for i in range(count))
        if captured[0] >= workload.seconds:
            return
        chunk = _Chunk(session, index, captured, ceil(count / CHUNK_FRAMES))
        yield max(at + noise.uniform(0, workload.jitter_s) for at in captured), chunk
        index, frame = index + 1, frame + count


def _starts(workload: Workload, noise: random.Random) -> list[float]:
    if workload.arrivals == "even":
        return [workload.period_s * i / workload.sessions for i in range(workload.sessions)]
    return sorted(noise.uniform(0, max(1.0, workload.period_s)) for _ in range(workload.sessions))


def _stretch(noise: random.Random, spread: float) -> float:
    """A factor of mean 1."""
    return exp(noise.gauss(-spread * spread / 2, spread)) if spread else 1.0


def arrange(
    costs: Sequence[ChunkCosts], steps: int, workload: Workload, max_streams: Callable[[int], int] | None = None
) -> tuple[tuple[RankShare, ...], ...]:
    """Devices into groups that hold a copy of the model each, so that they carry the most sessions; saturated, the one
    group that renders one stream fastest.

    Args:
        max_streams: sessions that fit into the memory of a group of so many devices.
    Raises: ValueError, if not one session fits.
    """
    sizes = [n for n in range(1, len(costs) + 1) if max_streams is None or max_streams(n) > 0]
    if not sizes:
        raise ValueError(f"the model and one session do not fit into the memory of {len(costs)} devices: take more")
    if workload.saturated:
        runs = [costs[i : i + n] for n in sizes for i in range(len(costs) - n + 1)]
        return (min((split(run, steps) for run in runs), key=lambda ring: _slowest_s(ring, steps)),)
    plans = []
    for size in sizes:
        rings = [split(costs[i : i + size], steps) for i in range(0, len(costs), size)]
        carried = 0
        for ring in rings:
            filled_s = (CHUNK_FRAMES - 1) / workload.fps
            alone_s = sum(share.chunk_s(steps) + steps * share.costs.hop_s * (len(ring) > 1) for share in ring)
            if filled_s + alone_s <= workload.budget_s:
                held = floor(workload.period_s / _slowest_s(ring, steps))
                carried += min(held, max_streams(len(ring))) if max_streams else held
        fastest = 0.0 if carried else max(1 / _slowest_s(ring, steps) for ring in rings)
        plans.append((carried, fastest, -size, rings))
    return tuple(max(plans, key=lambda plan: plan[:3])[3])


def _slowest_s(ring: Sequence[RankShare], steps: int) -> float:
    return max(share.chunk_s(steps) for share in ring)


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
        self._book = _Book(workload)
        self._groups = [
            _Group(
                ring,
                route(ring, steps),
                policy(_RingCosts(ring), micro_batch if len(ring) == 1 else 1),
                [deque() for _ in ring],
                [False] * len(ring),
                [0.0] * len(ring),
                1 if len(ring) == 1 else IN_FLIGHT[workload.saturated] * len(ring),
            )
            for ring in groups
        ]
        self._events: list[tuple[float, int, Callable[[float], None]]] = []
        self._count = 0
        self._waiting: dict[tuple[int, int], _Chunk] = {}
        self._next = [0] * workload.sessions
        self._home = self._place()
        for session, start in enumerate(_starts(workload, self._noise)):
            self._home[session].policy.open(session, steps=steps)
            if workload.saturated:
                self._at(start, partial(self._refill, session))
            else:
                self._arrivals(session, start)

    def _place(self) -> list[_Group]:
        """Each session to the group with the least load."""
        load = [0] * len(self._groups)
        speed = [1 / _slowest_s(group.ranks, self._steps) for group in self._groups]
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
        words = _words(ranks[slowest][0].parts_s(self._steps), slowest, used[slowest], self._workload)
        return self._book.outcome(used, words)

    def _at(self, when: float, event: Callable[[float], None]) -> None:
        self._count += 1
        heapq.heappush(self._events, (when, self._count, event))

    def _arrivals(self, session: int, start: float) -> None:
        chunks = _chunks(self._workload, session, start, self._noise)

        def following() -> None:
            if (entry := next(chunks, None)) is not None:
                when, chunk = entry
                self._at(when, lambda now: arrive(chunk, now))

        def arrive(chunk: _Chunk, now: float) -> None:
            self._book.came(chunk)
            self._push(chunk, now)
            following()

        following()

    def _push(self, chunk: _Chunk, now: float) -> None:
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
            self._push(_Chunk(session, index, (now,) * count, ceil(count / CHUNK_FRAMES)), now)

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
        took_s = mean_s * _stretch(self._noise, share.costs.noise)
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


def _words(parts_s: dict[str, float], rank: int, used: float, workload: Workload) -> str:
    """What stands in the way, and by how much."""
    part = max(parts_s, key=lambda name: parts_s[name])
    total_s = sum(parts_s.values())
    where = f"{part} on device {rank + 1}: {parts_s[part] * 1e3:.0f} of its {total_s * 1e3:.0f} ms a chunk"
    if workload.saturated or used >= 0.7:
        return where
    filled_s = (CHUNK_FRAMES - 1) / workload.fps
    return f"no device ({used:.0%} busy at most); of the latency {filled_s * 1e3:.0f} ms are the filling of a chunk"


def simulate_published(costs: Sequence[ChunkCosts], steps: int, workload: Workload, *, batched: bool = True) -> Outcome:
    """The public implementation: all sessions in one ring's queue, as they come.

    A tick waits for four frames, for the first rank, and for the ring to close: with W ranks the buffer of the tick W
    before. A chunk comes out (steps - 1) W ticks after the one it went in with. The first chunk of the run takes its
    steps alone. Sessions share the ring's one state, and the pictures mix: only times are modelled.
    """
    noise = random.Random(workload.seed)
    book = _Book(workload)
    ring = split(costs, steps, batched=batched, whole_vae=True)
    ranks = len(ring)
    lag = (steps - 1) * ranks if batched else 0
    rank_s = [_published_rank_s(share, steps, batched, ranks) for share in ring]
    free, busy_s = [0.0] * ranks, [0.0] * ranks
    ends: list[float] = []
    taken: list[tuple[_Chunk, tuple[float, ...]]] = []
    period_s = max(rank_s)
    if workload.saturated:
        source = _backlog(workload, ceil(workload.seconds / period_s) + 4)
    else:
        starts = _starts(workload, noise)
        streams = [list(_chunks(workload, session, start, noise)) for session, start in enumerate(starts)]
        source = sorted((entry for stream in streams for entry in stream), key=lambda entry: entry[0])
    phase = noise.uniform(0, POLL_S)
    for tick, (complete, chunk) in enumerate(source):
        seen = complete if workload.saturated else ceil((complete - phase) / POLL_S) * POLL_S + phase
        closed = ends[tick - ranks] if tick >= ranks else 0.0
        begin = max(seen, free[0], closed)
        captured = (begin,) * len(chunk.captured) if workload.saturated else chunk.captured
        book.came(chunk, captured)
        taken.append((chunk, captured))
        if tick == 0:
            work = Work(chunk.latents, steps, steps * chunk.latents)
            at = begin + costs[0].mean_s(work)
            free = [at] * ranks
        else:
            at = begin
            for rank, mean_s in enumerate(rank_s):
                at = max(at, free[rank])
                took_s = mean_s * _stretch(noise, ring[rank].costs.noise)
                busy_s[rank] += max(0.0, min(at + took_s, workload.seconds) - at)
                at += took_s
                free[rank] = at
        ends.append(at)
        emitted = 0 if tick == 0 else tick - lag
        if tick == 0 or emitted > 0:
            shown, when = taken[emitted]
            host_s = 0.0 if workload.saturated else HOST_S * _stretch(noise, HOST_SPREAD)
            book.done(shown, when, at + host_s)
    used = [min(busy / workload.seconds, 1.0) for busy in busy_s]
    slowest = rank_s.index(max(rank_s))
    words = _words(ring[slowest].parts_s(steps, batched=batched), slowest, used[slowest], workload)
    return book.outcome(used, words)


def _backlog(workload: Workload, count: int) -> list[tuple[float, _Chunk]]:
    frames = [workload.first_frames] + [CHUNK_FRAMES] * count
    return [(0.0, _Chunk(i % workload.sessions, i, (0.0,) * n, ceil(n / CHUNK_FRAMES))) for i, n in enumerate(frames)]


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
