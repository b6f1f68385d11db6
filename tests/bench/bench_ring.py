"""How much faster two ranks on a core each are than one rank on one core: chunks a second, by pairs in turns.

    python tests/bench/bench_ring.py [--model deep|embedded] [--size 256] [--steps 1] [--chunks 40] [--pairs 3]

Both kinds of ring run for the whole time and are given work in turns, so that what the machine is busy with falls on
both alike. Two streams fill each. Told: chunks a second and their ratio for every pair, medians, and the part of a
tick in which the busier rank computes nothing, which is communication and waiting. A model whose first and last parts
are heavy beside its blocks (the embedded one's autoencoder and refiner) divides less evenly: the best split's bound
is printed beside it.
"""

import argparse
import os
import statistics
import sys
import time
from pathlib import Path

import torch

# A script of its own, and so in each rank's process: its folder, not the repository, is on the path.
sys.path.insert(0, str(Path(__file__).parents[2]))

from engine.api import StreamParams
from engine.partition import partition, stage_times
from engine.ring_group import Loader, RingGroup, RingSpec, RingStats
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


def timed(group: RingGroup, frames: torch.Tensor, chunks: int) -> float:
    """Seconds a chunk, with the ring full from start to end of the count."""
    sent = done = first = 0
    began = 0.0
    while done < chunks + len(STREAMS):
        while sent - done < 4 * len(STREAMS) and sent < chunks + 4 * len(STREAMS):
            group.submit(STREAMS[sent % len(STREAMS)], frames)
            sent += 1
        done += len(group.collect())
        if not began and done >= len(STREAMS):
            began, first = time.perf_counter(), done
    seconds = (time.perf_counter() - began) / (done - first)
    group.finish()
    return seconds


def bound(alone: RingStats, layers: int) -> float:
    """The most that two ranks can gain with blocks that cannot be cut, by the times measured on one rank."""
    block_s = alone.rank_s[0] / layers
    units = [[alone.encode_s, *[block_s] * layers, alone.decode_s]] * 2
    split = partition(units)
    return sum(units[0]) / max(stage_times(units, split.bounds))


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
    specs = [RingSpec(ranks=n, width=options.size, height=options.size, balance=n > 1) for n in (1, 2)]
    found: list[tuple[float, float]] = []
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
            print(f"pair {pair}: {1 / alone:.2f} and {1 / together:.2f} chunks/s, {alone / together:.3f}x", flush=True)
        own, stats = one.stats(), two.stats()
        ratio = statistics.median(a / b for a, b in found)
        tick_s = statistics.median(b for _, b in found)
        layers = stats.bounds[-1]
        busy = [options.steps * seconds for seconds in stats.rank_s]
        busy[0] += stats.encode_s
        busy[-1] += stats.decode_s
        print(
            f"median {ratio:.3f}x; the best split of {layers} blocks would give {bound(own, layers):.3f}x; "
            f"bounds {stats.bounds}, tick {1000 * tick_s:.1f} ms, the busier rank computes "
            f"{100 * max(busy) / tick_s:.1f} % of it"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
