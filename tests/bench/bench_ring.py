"""How much faster two ranks on a core each are than one rank on one core: chunks a second, by pairs in turns.

    python tests/bench/bench_ring.py [--model deep|embedded] [--size 256] [--steps 1] [--chunks 40] [--pairs 3]

Both kinds of ring run for the whole time and are given work in turns, so that what the machine is busy with falls on
both alike. Two streams fill each; whoever gives and takes is on the second core. Told for every pair, by the clock:
chunks a second and their ratio. And, because a machine with other work makes a clock tell of that work: by the CPU
time of each rank's process (all of it: units, messages, scheduling), CPU seconds a chunk of the one rank over those of
the busier of the two, which is what the ratio would be if no rank ever waited; what of that went to messages (packing,
copies, calls, waiting to send; not what gloo's own threads do beside it); and what the best split of the units gives
by their times on one rank alone.
"""

import argparse
import math
import os
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

# A script of its own, and so in each rank's process: its folder, not the repository, is on the path.
sys.path.insert(0, str(Path(__file__).parents[2]))

from engine.api import StreamParams
from engine.launch import RANK_ENVIRONMENT
from engine.partition import partition
from engine.ring_group import RingGroup, RingStats
from engine.ring_rank import Loader, RingSpec
from tests.engine.ring_models import deep, embedded
from tests.engine.streams import camera

MODELS: dict[str, Loader] = {"deep": deep, "embedded": embedded}
STREAMS = ("a", "b")
WARM_UP_CHUNKS = 12


def pinned(group: RingGroup, cores: list[int]) -> None:
    """Every thread of rank i onto the i-th core."""
    for pid, core in zip(group.pids, cores, strict=True):
        for task in Path(f"/proc/{pid}/task").iterdir():
            os.sched_setaffinity(int(task.name), {core})


@dataclass(frozen=True)
class Taken:
    """Of a chunk: seconds by the clock; on every rank seconds of CPU, seconds on messages, and their bytes."""

    wall_s: float
    cpu_s: tuple[float, ...]
    wire_s: tuple[float, ...]
    wire_bytes: tuple[float, ...]


def cpu_seconds(group: RingGroup) -> list[float]:
    """CPU time of every rank's process so far."""
    times = (psutil.Process(pid).cpu_times() for pid in group.pids)
    return [time.user + time.system for time in times]


def timed(group: RingGroup, frames: torch.Tensor, chunks: int) -> Taken:
    """Give chunks with the ring full from start to end of the count.

    Counting begins when everything given at first has come out: until then results pile up while more is handed in,
    and would be counted without having been waited for.
    """
    held = 4 * len(STREAMS)
    sent = done = first = 0
    began, cpu, before = 0.0, cpu_seconds(group), group.stats()
    while not began or done < first + chunks:
        while sent - done < held:
            group.submit(STREAMS[sent % len(STREAMS)], frames)
            sent += 1
        done += len(group.collect())
        if not began and done >= held:
            # The clock before the question, here as at the end: the ring answers when it comes to it.
            began, first, cpu = time.perf_counter(), done, cpu_seconds(group)
            before = group.stats()
    taken = (time.perf_counter() - began) / (done - first)
    # What is still in the ring is as much as was in it when the count began.
    spent = tuple((after - before) / (done - first) for before, after in zip(cpu, cpu_seconds(group), strict=True))
    after = group.stats()
    seconds, sizes = (
        tuple((late - early) / (done - first) for early, late in zip(*both, strict=True))
        for both in ((before.wire_s, after.wire_s), (before.wire_bytes, after.wire_bytes))
    )
    group.finish()
    return Taken(taken, spent, seconds, sizes)


def units_s(stats: RingStats, steps: int) -> list[float]:
    """What each unit takes of a chunk."""
    passes = {"block", "head", "refine"}
    return [time_s * (steps if kind in passes else 1) for kind, time_s in zip(stats.kinds, stats.unit_s, strict=True)]


def per_chunk(stats: RingStats, steps: int) -> float:
    """What a chunk takes in all."""
    return stats.home_s + sum(units_s(stats, steps))


def bound(alone: RingStats, steps: int) -> float:
    """The most that two ranks can gain with units that cannot be cut, by the times measured on one rank."""
    units = units_s(alone, steps)
    split = partition([[alone.home_s, *units], [math.inf, *units]])
    return per_chunk(alone, steps) / split.slowest_s


def report(found: Sequence[tuple[Taken, Taken]], own: RingStats, stats: RingStats, steps: int) -> None:
    """Print what all pairs say together. own, stats: of the ring of one rank and of that of two."""
    for rank in range(2):
        wire_s, cpu_s, size = (
            statistics.median(getattr(both, name)[rank] for _, both in found)
            for name in ("wire_s", "cpu_s", "wire_bytes")
        )
        print(
            f"rank {rank}: {1000 * wire_s:.2f} ms a chunk on messages of {size / 1e6:.2f} MB, "
            f"{100 * wire_s / cpu_s:.1f} % of its {1000 * cpu_s:.1f} ms of CPU"
        )
    by_clock = statistics.median(a.wall_s / b.wall_s for a, b in found)
    by_cpu = statistics.median(a.cpu_s[0] / max(b.cpu_s) for a, b in found)
    units = ", ".join(
        f"{kind} {1000 * own.total_s(kind):.1f}" for kind in ("encode", "block", "head", "refine", "decode")
    )
    print(f"one rank, ms: {units}, beside its units {1000 * own.home_s:.1f}")
    print(
        f"median {by_clock:.3f}x by the clock, {by_cpu:.3f}x by CPU time if none waits; the best split of "
        f"{len(own.kinds)} units gives {bound(own, steps):.3f}x; bounds {stats.bounds}"
    )
    # Two cores at work may each be slower than one alone: memory, caches, whatever else runs.
    slower = per_chunk(stats, steps) / per_chunk(own, steps)
    print(
        f"the same work takes {slower:.3f} times as long there: {by_clock * slower:.3f}x and "
        f"{by_cpu * slower:.3f}x at equal compute"
    )


def main() -> int:
    """Run the benchmark; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted(MODELS), default="deep")
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--chunks", type=int, default=40)
    parser.add_argument("--pairs", type=int, default=3)
    options = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        print("two cores are needed", file=sys.stderr)
        return 1
    frames = torch.from_numpy(camera(4, width=options.size, height=options.size))
    load = MODELS[options.model]
    # Rank 0 has more to do than others; who feeds it stays off its core, and has no threads that wait for work there.
    os.sched_setaffinity(0, {cores[1]})
    torch.set_num_threads(1)
    # As a server starts its ranks.
    os.environ.update(RANK_ENVIRONMENT)
    specs = [RingSpec(ranks=n, width=options.size, height=options.size, balance=n > 1) for n in (1, 2)]
    found: list[tuple[Taken, Taken]] = []
    with RingGroup(load, specs[0]) as one, RingGroup(load, specs[1]) as two:
        for group, chosen in ((one, cores[:1]), (two, cores[:2])):
            pinned(group, chosen)
            for stream in STREAMS:
                group.open(stream, StreamParams(prompt="neon", steps=options.steps))
            timed(group, frames, WARM_UP_CHUNKS)
        # Blocks move in steps: until the split stays.
        for _ in range(4):
            timed(two, frames, WARM_UP_CHUNKS)
        for pair in range(options.pairs):
            found.append((timed(one, frames, options.chunks), timed(two, frames, options.chunks)))
            alone, together = found[-1]
            ranks = " and ".join(f"{1000 * cpu_s:.1f}" for cpu_s in together.cpu_s)
            print(
                f"pair {pair}: {1 / alone.wall_s:.2f} and {1 / together.wall_s:.2f} chunks/s, "
                f"{alone.wall_s / together.wall_s:.3f}x by the clock; CPU {1000 * alone.cpu_s[0]:.1f} ms a chunk, over "
                f"two ranks {ranks} ms: {alone.cpu_s[0] / max(together.cpu_s):.3f}x if none waits",
                flush=True,
            )
        report(found, one.stats(), two.stats(), options.steps)
    return 0


if __name__ == "__main__":
    sys.exit(main())
