"""StreamDiffusionV2's public code in a simulation: the VAE whole at the two ends of one ring, one queue, first in first
out, nothing dropped, the steps of a chunk in one stream batch. Pure, seeded.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from math import ceil

from engine.cost_model import Work
from engine.devices import ChunkCosts
from engine.simulator_load import Camera, Chunk, Workload, backlog, starts_of, stretch
from engine.simulator_outcome import Book, Outcome, bottleneck_words
from engine.simulator_ranks import RankShare, split

# The public demo asks its queue every 100 ms whether four frames are there. What it then spends on the way out
# (queues between processes, JPEG) is fitted to the published latencies of one H100: mean and spread, the two constants.
POLL_S = 0.1
HOST_S, HOST_SPREAD = 0.058, 0.55


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


def simulate_published(costs: Sequence[ChunkCosts], steps: int, workload: Workload, *, batched: bool = True) -> Outcome:
    """The public implementation: all sessions in one ring's queue, as they come.

    A tick waits for four frames, for the first rank, and for the ring to close: with W ranks the buffer of the tick W
    before. A chunk comes out (steps - 1) W ticks after the one it went in with. The first chunk of the run takes its
    steps alone. Sessions share the ring's one state, and the pictures mix: only times are modelled.
    """
    noise = random.Random(workload.seed)
    book = Book(workload)
    ring = split(costs, steps, batched=batched, whole_vae=True)
    ranks = len(ring)
    lag = (steps - 1) * ranks if batched else 0
    rank_s = [_published_rank_s(share, steps, batched, ranks) for share in ring]
    free, busy_s = [0.0] * ranks, [0.0] * ranks
    ends: list[float] = []
    taken: list[tuple[Chunk, tuple[float, ...]]] = []
    period_s = max(rank_s)
    if workload.saturated:
        source = backlog(workload, ceil(workload.seconds / period_s) + 4)
    else:
        starts = starts_of(workload, noise)
        streams = [list(Camera(workload, session, start, noise)) for session, start in enumerate(starts)]
        source = sorted((entry for stream in streams for entry in stream), key=lambda entry: entry[0])
    phase = noise.uniform(0, POLL_S)
    for tick, (complete, chunk) in enumerate(source):
        seen = complete if workload.saturated else ceil((complete - phase) / POLL_S) * POLL_S + phase
        closed = ends[tick - ranks] if tick >= ranks else 0.0
        begin = max(seen, free[0], closed)
        captured = (begin,) * len(chunk.captured) if workload.saturated else chunk.captured
        book.came(chunk.session, captured)
        taken.append((chunk, captured))
        if tick == 0:
            work = Work(chunk.latents, steps, steps * chunk.latents)
            at = begin + costs[0].mean_s(work)
            free = [at] * ranks
        else:
            at = begin
            for rank, mean_s in enumerate(rank_s):
                at = max(at, free[rank])
                took_s = mean_s * stretch(noise, ring[rank].costs.noise)
                busy_s[rank] += max(0.0, min(at + took_s, workload.seconds) - at)
                at += took_s
                free[rank] = at
        ends.append(at)
        emitted = 0 if tick == 0 else tick - lag
        if tick == 0 or emitted > 0:
            shown, when = taken[emitted]
            host_s = 0.0 if workload.saturated else HOST_S * stretch(noise, HOST_SPREAD)
            for captured_at in when:
                book.shown(shown.session, captured_at, at + host_s)
    used = [min(busy / workload.seconds, 1.0) for busy in busy_s]
    slowest = rank_s.index(max(rank_s))
    words = bottleneck_words(ring[slowest].parts_s(steps, batched=batched), slowest, used[slowest], workload)
    return book.outcome(used, words)
