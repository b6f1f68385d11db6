"""A soak, compressed: what leaks is tied to events, not to hours, so clients come and go some forty times a minute.

A steady page and a steady stream with a viewer stay all the time; the page is steered three times a second, with a bad
message in twenty at first, and recorded on and off. Beside them pages, publishers and viewers come for 4 s and end in
every way: with a goodbye, by closing, by vanishing, by an offer that never connects, by one that is broken. Each second
the server's process is sampled: memory, threads, file descriptors, tasks of the event loop. Told are the slopes
over the last two thirds of the time, as the median of all slopes between two samples, and what is left when all have
gone, against an idle server after a first round of the same. Status 1 when a bound is broken.

    .venv/bin/python tests/bench/drill_soak.py [--minutes 15] [--seed 1] [--leak] [--json]

`--leak` plants one of 100 kB a peer, which must fail. The engine is the stand-in, in the server's process.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import re
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

# A script of its own: its folder, not the repository, is on the path.
sys.path.insert(0, str(Path(__file__).parents[2]))

import aiohttp
import aioice.ice

from livebrush_client import Refused
from server.load_client import LoadClient
from server.load_clip import EncodedClip, encode_clip
from server.load_figures import ServerClock
from server.load_run import DEMO_CLIP
from server.metrics import quantile
from tests.e2e.serving import Server
from tests.net.client import LinkedApi
from tests.net.link import Impairment, Link
from tests.net.watching import enter

SIZE_PX, FPS = 128, 10.0
LIFE_S, PAUSE_S = 4.0, 0.5
VISITORS = 3
KINDS = ("page", "page", "publisher", "viewer")
ENDS = ("goodbye",) * 12 + ("close",) * 4 + ("vanish",) * 3 + ("never",)
STEER_S = 1 / 3
BAD_MESSAGE = 0.05
# Over 50 end a session.
MAX_BAD = 40
RECORD_S = 5.0
WARM_UP_S = 20.0
SETTLE_S = 8.0
EMPTY_TIMEOUT_S = 60.0
RESTYLED_TIMEOUT_S = 30.0
GRACE_S = 5.0
MIN_PATIENT_S = 240.0

MAX_MB_PER_1000 = 40.0
# Of threads, descriptors and tasks, of their median: who is there comes and goes (a quarter, once), and a task left by
# every tenth visit would be more. What is left in the end tells it exactly.
MAX_GROWTH = 0.4
MAX_LEFT = {"threads": 4, "files": 4, "tasks": 2}
MAX_LATER = 1.5


@dataclass(frozen=True, slots=True)
class Sample:
    """The server at one instant. at_s: since the beginning."""

    at_s: float
    memory_mb: float
    threads: int
    files: int
    tasks: int


COUNTED = ("memory_mb", "threads", "files", "tasks")


@dataclass
class Soaked:
    """What came of it. ended: visits by kind and end. begun_s: how long each page waited for its picture, in order."""

    minutes: float = 0.0
    samples: list[Sample] = field(default_factory=list)
    idle_before: Sample | None = None
    idle_after: Sample | None = None
    ended: Counter[str] = field(default_factory=Counter)
    begun_s: list[float] = field(default_factory=list)
    recordings: int = 0
    errors: list[str] = field(default_factory=list)

    @property
    def visits(self) -> int:
        """All of them."""
        return sum(self.ended.values())

    def slopes(self) -> dict[str, float]:
        """Growth per minute over the last two thirds, by name."""
        last = self.samples[len(self.samples) // 3 :]
        return {name: slope([one.at_s / 60 for one in last], [getattr(one, name) for one in last]) for name in COUNTED}

    def left(self) -> dict[str, float]:
        """What an idle server has more than before, by name."""
        assert self.idle_before is not None and self.idle_after is not None
        return {name: round(getattr(self.idle_after, name) - getattr(self.idle_before, name), 1) for name in COUNTED}

    def failures(self) -> list[str]:
        """Which bounds are broken, in words. Slopes are judged from four minutes on: before they are chance."""
        found = list(self.errors)
        left = self.left()
        found += [f"{left[name]} {name} left" for name, most in MAX_LEFT.items() if left[name] > most]
        if 60 * self.minutes < MIN_PATIENT_S:
            return found
        slopes = self.slopes()
        per_1000 = 1000 * slopes["memory_mb"] * self.minutes / max(1, self.visits)
        if per_1000 > MAX_MB_PER_1000:
            found.append(f"{per_1000:.0f} MB per 1000 visits, over {MAX_MB_PER_1000:g}")
        for name in MAX_LEFT:
            usual = median(getattr(one, name) for one in self.samples)
            if slopes[name] * self.minutes > MAX_GROWTH * usual:
                found.append(f"{name} grow by {slopes[name]:.2f} a minute, of {usual:g}")
        half = len(self.begun_s) // 2
        early, late = (quantile(part, 0.95) or 0.0 for part in (self.begun_s[:half], self.begun_s[half:]))
        if late > MAX_LATER * early:
            found.append(f"p95 of the first picture {late:.2f} s late, {early:.2f} s early")
        return found


def slope(xs: list[float], ys: list[float], most: int = 300) -> float:
    """Median of the slopes between any two of the points, of at most so many that are evenly picked; 0 of one."""
    step = max(1, len(xs) // most)
    points = list(zip(xs[::step], ys[::step], strict=True))
    slopes = [(y2 - y1) / (x2 - x1) for i, (x1, y1) in enumerate(points) for x2, y2 in points[i + 1 :] if x2 > x1]
    return median(slopes) if slopes else 0.0


class LeakyServer(Server):
    """One that keeps something of every peer."""

    def __init__(self, log: Path, **options: Any) -> None:
        super().__init__(log, **options)
        self._command[:1] = [sys.executable, str(Path(__file__).with_name("leaky_server.py"))]


class Crowd:
    """Everybody who comes and goes, and those who stay."""

    def __init__(
        self, server: Server, http: aiohttp.ClientSession, clip: EncodedClip, pool: ThreadPoolExecutor
    ) -> None:
        self.soaked = Soaked()
        self.refused: Counter[str] = Counter()
        self._server = server
        self._http = http
        self._clip = clip
        self._pool = pool
        self._clock = ServerClock()
        self._number = 0
        self._is_open = asyncio.Event()

    @contextlib.asynccontextmanager
    async def client(self) -> Any:
        """A client behind a link of its own, closed in the end without a word unless it has a URL."""
        self._number += 1
        async with Link(self._number) as link:
            client = LoadClient(
                self._number, self._server.url, self._http, self._clip, self._pool, self._clock, decodes=False
            )
            client._api = LinkedApi(self._server.url, link, self._http)
            try:
                yield client, link
            finally:
                await client.close()

    async def begin(self, client: LoadClient, link: Link, kind: str, stream: str) -> bool:
        """Come in; whether there was a place."""
        if kind == "page":
            began_at = time.monotonic()
            refusal = await client.open({"prompt": "neon", "strength": 0.5})
            if refusal is not None:
                self.refused[refusal.code] += 1
                return False
            await client.until_restyled(RESTYLED_TIMEOUT_S)
            if client.figures.has_restyled:
                self.soaked.begun_s.append(time.monotonic() - began_at)
            return True
        path, direction = (f"/whip/{stream}", "sendonly") if kind == "publisher" else (f"/whep/{stream}", "recvonly")
        try:
            client._url = await enter(client, self._http, path, direction, link)
        except RuntimeError as refused:
            self.refused[str(refused)[:60]] += 1
            # Full, on a busy machine; or nobody publishes, in the moment after a round.
            if " 503 " not in str(refused) and " 404 " not in str(refused):
                self.soaked.errors.append(str(refused)[:200])
            return False
        return True

    async def visit(self, kind: str, end: str, life_s: float) -> None:
        """One of the many."""
        async with self.client() as (client, link):
            if end == "never":
                await client._connection.setLocalDescription(await client._connection.createOffer())
                with contextlib.suppress(Refused):
                    await client._api.offer(client._connection.localDescription.sdp, {})
                self.soaked.ended["offer that never connects"] += 1
                return
            if not await self.begin(client, link, kind, "steady" if kind == "viewer" else f"visit-{self._number}"):
                self.soaked.ended[f"{kind} refused"] += 1
                return
            await asyncio.sleep(life_s)
            if end == "vanish":
                link.set(Impairment(down=True))
            if end != "goodbye":
                client._url = ""
            self.soaked.ended[f"{kind} {end}"] += 1

    async def visits(self, dice: random.Random) -> None:
        """One visitor after another, until cancelled; none before those who stay are in."""
        await self._is_open.wait()
        while True:
            await asyncio.sleep(dice.expovariate(1 / PAUSE_S))
            if dice.random() < 0.05:
                await self.broken_offer(dice)
            await self.visit(dice.choice(KINDS), dice.choice(ENDS), min(20.0, dice.expovariate(1 / LIFE_S)))

    async def broken_offer(self, dice: random.Random) -> None:
        """An offer that is none."""
        path = dice.choice(("/whip/broken", "/whep/steady"))
        body = "v=0\r\nm=video 9 UDP/TLS/RTP/SAVPF 96\r\n" + "a=x\r\n" * dice.randrange(40)
        async with self._http.post(path, data=body, headers={"Content-Type": "application/sdp"}) as response:
            if response.status >= 500 and response.status != 503:
                self.soaked.errors.append(f"a broken offer was answered {response.status}")
        self.soaked.ended["broken offer"] += 1

    async def stay(self) -> None:
        """The steady page, its steering and recording, and the steady stream with its viewer."""
        async with self.client() as (page, link), self.client() as (publisher, out), self.client() as (viewer, back):
            for client, its_link, kind in (
                (page, link, "page"),
                (publisher, out, "publisher"),
                (viewer, back, "viewer"),
            ):
                if not await self.begin(client, its_link, kind, "steady"):
                    raise RuntimeError(f"no place for the steady {kind}: {dict(self.refused)}, {client.errors}")
            self._is_open.set()
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._steer(page))
                tasks.create_task(self._record(page))

    async def _steer(self, page: LoadClient) -> None:
        for number in range(10**9):
            await asyncio.sleep(STEER_S)
            message = {"v": 1, "type": "params", "id": number, "prompt": f"style {number % 50}"}
            bad = number % round(1 / BAD_MESSAGE) == 0 and number < MAX_BAD / BAD_MESSAGE
            text = '{"v": 1, "type": "fly", "id": []' if bad else json.dumps(message)
            if page._control.readyState == "open":
                page._control.send(text)
            if page.ended_at is not None:
                raise RuntimeError(f"the steady page ended: {page.errors}")

    async def _record(self, page: LoadClient) -> None:
        path = f"/api/v1/sessions/{page._url.rpartition('/')[2]}/recording"
        while True:
            await asyncio.sleep(RECORD_S)
            wish = {"what": ["output", "input", "session"]}
            async with self._http.post(path, json=wish) as response:
                if response.status != 201:
                    raise RuntimeError(f"recording was answered {response.status}: {await response.text()}")
            await asyncio.sleep(RECORD_S)
            async with self._http.delete(path) as response:
                self.soaked.recordings += response.status == 200


async def sample(server: Server, began_at: float) -> Sample:
    """The server now."""

    def read() -> Sample:
        # The stand-in engine is in it; recordings have processes that come and go, some 50 MB each.
        process = server.family()[0]
        found = re.search(r"^livebrush_tasks ([\d.e+]+)$", server.metrics(), re.MULTILINE)
        assert found is not None
        at_s, memory_mb = time.monotonic() - began_at, process.memory_info().rss / 2**20
        return Sample(at_s, memory_mb, process.num_threads(), process.num_fds(), int(float(found[1])))

    return await asyncio.to_thread(read)


async def idle(server: Server, began_at: float, errors: list[str]) -> Sample:
    """The server once everybody has gone, and what it forgets by and by is forgotten."""

    def is_empty() -> bool:
        streams = json.loads(server.get("/api/v1/streams"))["streams"]
        return not streams and not server.capacity()["open"]

    until = time.monotonic() + EMPTY_TIMEOUT_S
    while not await asyncio.to_thread(is_empty):
        if time.monotonic() > until:
            errors.append(f"somebody is still there {EMPTY_TIMEOUT_S:g} s after all have gone")
            break
        await asyncio.sleep(0.5)
    await asyncio.sleep(SETTLE_S)
    return await sample(server, began_at)


async def during(seconds: float, work: Callable[[], Coroutine[Any, Any, None]], errors: list[str]) -> None:
    """Do this for so long. What it raises is an error, and so is an early end."""
    task = asyncio.ensure_future(work())
    done, _ = await asyncio.wait([task], timeout=seconds)
    if done:
        errors.append(f"it ended after less than {seconds:g} s")
    task.cancel()
    (outcome,) = await asyncio.gather(task, return_exceptions=True)
    if outcome is not None and not isinstance(outcome, asyncio.CancelledError):
        errors.extend(repr(error) for error in leaves(outcome))


def leaves(error: BaseException) -> list[BaseException]:
    """The errors in a group, and in the groups in it."""
    if not isinstance(error, BaseExceptionGroup):
        return [error]
    return [leaf for one in error.exceptions for leaf in leaves(one)]


async def soak(server: Server, seconds: float, seed: int, recordings: Path) -> Soaked:
    """A first round, which fills what fills once; then the soak."""
    aioice.ice.get_host_addresses = lambda use_ipv4, use_ipv6: []  # loopback only
    pool = ThreadPoolExecutor(2, thread_name_prefix="client-codec")
    clip = await asyncio.to_thread(encode_clip, DEMO_CLIP, FPS, SIZE_PX)
    began_at = time.monotonic()
    async with aiohttp.ClientSession(base_url=server.url, timeout=aiohttp.ClientTimeout(total=30)) as http:
        crowd = Crowd(server, http, clip, pool)
        soaked = crowd.soaked

        async def watch() -> None:
            while True:
                soaked.samples.append(await sample(server, began_at))
                for old in sorted(recordings.glob("*"))[:-2]:
                    shutil.rmtree(old, ignore_errors=True)
                await asyncio.sleep(1.0)

        async def all_of_it() -> None:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(crowd.stay())
                tasks.create_task(watch())
                for number in range(VISITORS):
                    tasks.create_task(crowd.visits(random.Random(100 * seed + number)))

        await during(min(WARM_UP_S, seconds), all_of_it, soaked.errors)
        crowd._is_open.clear()
        soaked.idle_before = await idle(server, began_at, soaked.errors)
        soaked.samples.clear()
        soaked.ended.clear()
        await during(seconds, all_of_it, soaked.errors)
        soaked.minutes = seconds / 60
        soaked.idle_after = await idle(server, began_at, soaked.errors)
    pool.shutdown(wait=False)
    return soaked


def drill(seconds: float, seed: int, folder: Path, *, leak: bool = False) -> Soaked:
    """The whole, with a server of its own."""
    recordings = folder / "recordings"
    kind: type[Server] = LeakyServer if leak else Server
    with kind(
        folder / "server.log",
        engine="fake",
        patient=True,
        options=("--recordings", str(recordings)),
        LIVEBRUSH_MAX_FPS="12",
        LIVEBRUSH_MAX_SESSIONS="8",
        LIVEBRUSH_ENGINE__WIDTH=str(SIZE_PX),
        LIVEBRUSH_ENGINE__HEIGHT=str(SIZE_PX),
        LIVEBRUSH_ENGINE__MAX_STREAMS="8",
        LIVEBRUSH_MEDIA__VANISH_TIMEOUT_S="4",
        LIVEBRUSH_MEDIA__CONNECT_TIMEOUT_S="4",
        LIVEBRUSH_RECORDINGS__MIN_FREE_BYTES="0",
    ) as server:
        return asyncio.run(soak(server, seconds, seed, recordings))


def main() -> int:
    """Parse the arguments and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=15.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--leak", action="store_true", help="plant one: this must fail")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        soaked = drill(60 * options.minutes, options.seed, Path(folder), leak=options.leak)
    assert soaked.idle_before is not None and soaked.idle_after is not None
    slopes, left, failures = soaked.slopes(), soaked.left(), soaked.failures()
    if options.json:
        told = asdict(replace(soaked, ended=Counter())) | {"ended": dict(soaked.ended)}
        print(json.dumps({"load_average": load, **told, "slopes": slopes, "failures": failures}, indent=1))
    print(f"{soaked.visits} visits in {soaked.minutes:g} minutes, load average {load:.1f} before", file=sys.stderr)
    print(", ".join(f"{count} {what}" for what, count in soaked.ended.most_common()), file=sys.stderr)
    print(f"{soaked.recordings} recordings; first picture p95 {quantile(soaked.begun_s, 0.95)} s", file=sys.stderr)
    for name in COUNTED:
        before, after = getattr(soaked.idle_before, name), getattr(soaked.idle_after, name)
        print(f"{name:<10} {slopes[name]:+7.3f} a minute; idle {before:.0f}, then {after:.0f}", file=sys.stderr)
    per_1000 = 1000 * slopes["memory_mb"] * soaked.minutes / max(1, soaked.visits)
    print(f"{per_1000:.1f} MB per 1000 visits; left {left}", file=sys.stderr)
    print("\n".join(failures) or "all bounds held", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
