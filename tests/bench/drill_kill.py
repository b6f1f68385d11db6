"""Kills ranks of a running engine, one after another, and tells how long its streams were without: a drill.

    python tests/bench/drill_kill.py --ranks 2 --replicas 2 --kills 20

One stream a group is fed in real time. Each kill is a SIGKILL of one rank, the ranks in turns. Told for every kill and
over all: `seen`, from the kill until the stream is told, which is when a session shows its camera; and `restyled`,
until the first restyled chunk of the stream opened anew. Groups that were not hit must not lose a stream. Ends with
status 1 when they do, when a kill is seen later than `SEEN_LIMIT_S`, or when a process is left behind.

    python tests/bench/drill_kill.py --session --ranks 2 --kills 20

The same as a WebRTC client sees it: `livebrush serve` in a process of its own with one group, one session of the Python
client. Told for every kill, all at the client: `told`, when it hears that the engine is lost; the longest time without
a new picture; and `restyled`, the first picture of the new group. Wrong is a picture that stands for longer than
`GAP_LIMIT_S`, a client that is not restyled within `RESTYLED_LIMIT_S`, or a session that ends.

    python tests/bench/drill_kill.py --session --engine ray --ranks 2 --kills 3

The same over nodes of a Ray cluster, one for each rank: raylets of this machine, started for the drill.

An engine whose ranks die four times in a minute is given up by design, hence the pause after each kill.
"""

import argparse
import asyncio
import contextlib
import os
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

import numpy as np
import psutil

from engine.api import Engine, EngineError, EngineStream, FrameChunk, RankLost, StreamParams
from engine.client import BREAKER_DEATHS, BREAKER_WINDOW_S, LocalEngine
from engine.cluster import Cluster, arrange
from engine.config import DEFAULT_MODEL, EngineSettings

# A script of its own: its folder, not the repository, is on the path.
sys.path.insert(0, str(Path(__file__).parents[2]))

from livebrush_client import connect
from tests.e2e.killing import Kill, Watch, kill_rank, ranks_of, ranks_on
from tests.e2e.serving import Server
from tests.server.test_server import MovingPicture

SEEN_LIMIT_S = 1.0
GAP_LIMIT_S = 0.5
RESTYLED_LIMIT_S = 10.0
RETRY_S = 0.1
LEFT_TIMEOUT_S = 15.0


@dataclass
class Feed:
    """A stream that is opened again whenever it is lost. lost_at, restyled_at: instants of its last loss and of the
    first chunk after that. losses: so far."""

    engine: Engine
    name: str
    fps: float
    lost_at: float = 0.0
    restyled_at: float = 0.0
    losses: int = 0
    opened: asyncio.Event = field(default_factory=asyncio.Event)

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            try:
                async with self.engine.open_stream(self.name, StreamParams(prompt="watercolor")) as stream:
                    feeding = asyncio.create_task(self._submit(stream))
                    try:
                        async for _ in stream:
                            if not self.opened.is_set():
                                self.restyled_at = time.monotonic()
                                self.opened.set()
                    finally:
                        feeding.cancel()
            except RankLost:
                self.lost_at = time.monotonic()
                self.losses += 1
                self.opened.clear()
            except EngineError:
                await asyncio.sleep(RETRY_S)

    async def _submit(self, stream: EngineStream) -> None:
        width, height = self.engine.frame_size
        capacity = self.engine.capacity
        random = np.random.default_rng(0)
        for index in count():
            frames = capacity.chunk_frames if index else capacity.first_chunk_frames
            pixels = random.integers(0, 256, (frames, height, width, 3), np.uint8)
            now = time.monotonic()
            stream.submit(FrameChunk(index, pixels, tuple(range(frames)), (now,) * frames, now + 1.0))
            await asyncio.sleep(frames / self.fps)


def ranks_in(group: LocalEngine) -> list[psutil.Process]:
    """Rank 0 of a group and the others."""
    first = psutil.Process(group.pid)
    others = (child for child in first.children() if "spawn_main" in " ".join(child.cmdline()))
    return [first, *sorted(others, key=lambda process: process.pid)]


async def drill(options: argparse.Namespace) -> int:
    """Returns the exit status."""
    settings = EngineSettings(
        model=options.model,
        width=options.size,
        height=options.size,
        device=options.device,
        ranks=options.ranks,
        replicas=options.replicas,
        max_streams=2,
    )
    each, reason = arrange(settings)
    print(reason, flush=True)
    groups = [LocalEngine(group) for group in each]
    engine = Cluster(groups)
    await engine.start()
    for group in groups:
        await group.wait_ready()
    feeds = [Feed(engine, f"stream {number}", options.fps) for number in range(len(groups))]
    tasks = [asyncio.create_task(feed.run()) for feed in feeds]
    for feed in feeds:
        await feed.opened.wait()
    seen_s, restyled_s, faults, killed = [], [], 0, []
    for number in range(options.kills):
        group = groups[number % len(groups)]
        ranks = ranks_in(group)
        killed += ranks
        hit = group.capacity.open_streams
        before = [feed.losses for feed in feeds]
        rank = number // len(groups) % len(ranks)
        at = time.monotonic()
        os.kill(ranks[rank].pid, signal.SIGKILL)
        async with asyncio.timeout(options.timeout):
            while sum(feed.losses for feed in feeds) - sum(before) < hit:
                await asyncio.sleep(0.005)
            lost = [feed for feed, losses in zip(feeds, before, strict=True) if feed.losses > losses]
            for feed in lost:
                await feed.opened.wait()
            await group.wait_ready()
        seen = [feed.lost_at - at for feed in lost]
        again = [feed.restyled_at - at for feed in lost]
        wrong = len(lost) != hit or any(each > SEEN_LIMIT_S for each in seen)
        faults += wrong
        seen_s += seen
        restyled_s += again
        text = ", ".join(f"seen {s * 1e3:.0f} ms, restyled {r:.2f} s" for s, r in zip(seen, again, strict=True))
        whole = time.monotonic() - at
        print(f"kill {number + 1}: group {number % len(groups)} rank {rank}: {text or 'no stream'}; "
              f"group back {whole:.1f} s{' WRONG' if wrong else ''}", flush=True)  # fmt: skip
        pause_s = BREAKER_WINDOW_S / (BREAKER_DEATHS - 1) / len(groups) + 1.0
        await asyncio.sleep(max(0.0, pause_s - whole))
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    killed += [process for group in groups for process in ranks_in(group)]
    await engine.close()
    _, left = await asyncio.to_thread(psutil.wait_procs, killed, LEFT_TIMEOUT_S)
    for name, values in (("seen", seen_s), ("restyled", restyled_s)):
        if values:
            print(f"{name}: median {statistics.median(values):.3f} s, longest {max(values):.3f} s, of {len(values)}")
    print(f"wrong: {faults}; processes left behind: {len(left)}")
    return 1 if faults or left else 0


@contextlib.contextmanager
def ray_nodes(count: int) -> Iterator[list[psutil.Process]]:
    """A Ray cluster of a head that holds no rank and nodes with room for one each, all on this machine: its raylets."""
    from engine.ray_cluster import STORE_BYTES, import_ray

    import_ray()
    from ray.cluster_utils import Cluster as Raylets

    cluster = Raylets(initialize_head=True, head_node_args={"num_cpus": 0, "object_store_memory": STORE_BYTES})
    try:
        nodes = [cluster.add_node(num_cpus=1, object_store_memory=STORE_BYTES) for _ in range(count)]
        yield [psutil.Process(node.all_processes["raylet"][0].process.pid) for node in nodes]
    finally:
        cluster.shutdown()


async def drill_session(options: argparse.Namespace) -> int:
    """Returns the exit status."""
    if options.engine == "local":
        return await drill_session_of(options, ranks_of)
    with ray_nodes(options.ranks) as raylets:
        return await drill_session_of(options, lambda _: ranks_on(raylets))


async def drill_session_of(options: argparse.Namespace, find: Callable[[psutil.Process], list[psutil.Process]]) -> int:
    """Returns the exit status. find: the ranks of the server's group, 0 first."""
    kills: list[Kill] = []
    serve = ("--ranks", str(options.ranks), "--size", f"{options.size}x{options.size}", "--model", options.model)
    with tempfile.TemporaryDirectory() as folder:
        with Server(
            Path(folder) / "log", engine=options.engine, options=serve, patient=True, LIVEBRUSH_ENGINE__COSTS_DIR=folder
        ) as server:
            async with asyncio.timeout(options.timeout):
                while not await asyncio.to_thread(server.is_ready):
                    await asyncio.sleep(0.1)
            process = psutil.Process(server.pid)
            async with connect(server.url, MovingPicture(), prompt="watercolor") as live:
                watch = Watch(live)
                watching = asyncio.create_task(watch.run())
                for number in range(options.kills):
                    began = time.monotonic()
                    kill = await kill_rank(watch, process, number % options.ranks, timeout_s=options.timeout, find=find)
                    kills.append(kill)
                    wrong = kill.gap_s > GAP_LIMIT_S or kill.told_s > SEEN_LIMIT_S
                    slow = kill.restyled_s > RESTYLED_LIMIT_S
                    print(f"kill {number + 1}: {kill}{' WRONG' if wrong else ' SLOW' if slow else ''}", flush=True)
                    pause_s = BREAKER_WINDOW_S / (BREAKER_DEATHS - 1) + 1.0
                    await asyncio.sleep(max(0.0, began + pause_s - time.monotonic()))
                ended = live.ended
            await watching
            processes = {process, *process.children(recursive=True), *find(process)}
        _, left = await asyncio.to_thread(psutil.wait_procs, processes, LEFT_TIMEOUT_S)
    for name in ("told_s", "camera_s", "gap_s", "restyled_s"):
        values = [getattr(kill, name) for kill in kills]
        print(f"{name}: median {statistics.median(values):.3f}, longest {max(values):.3f}")
    gaps = sum(kill.gap_s > GAP_LIMIT_S or kill.told_s > SEEN_LIMIT_S for kill in kills)
    late = sum(kill.restyled_s > RESTYLED_LIMIT_S for kill in kills)
    print(f"of {len(kills)} kills: gaps too long {gaps}; restyled late {late}; processes left behind {len(left)}")
    return 1 if gaps or late or left or ended else 0


def main() -> int:
    """Parse the arguments and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--replicas", type=int, default=1)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--size", type=int, default=64, help="pixels of a side (default: 64)")
    parser.add_argument("--fps", type=float, default=12.0)
    parser.add_argument("--timeout", type=float, default=120.0, help="seconds for a group to come back")
    parser.add_argument("--session", action="store_true", help="through a server, as a WebRTC client sees it")
    parser.add_argument("--engine", choices=("local", "ray"), default="local", help="with --session: what to serve")
    options = parser.parse_args()
    if options.engine == "ray" and not options.session:
        parser.error("--engine ray needs --session")
    return asyncio.run(drill_session(options) if options.session else drill(options))


if __name__ == "__main__":
    sys.exit(main())
