"""A run of the load generator: reach the server, open the sessions, measure all in one window, say goodbye."""

from __future__ import annotations

import asyncio
import ipaddress
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import psutil

from server.load_client import LoadClient, Refusal
from server.load_clip import EncodedClip, encode_clip
from server.load_figures import ServerClock, fairness
from server.metrics import quantile
from server.settings import WEB_DIR

DEMO_CLIP = WEB_DIR / "demo" / "people.mp4"
HTTP_TIMEOUT_S = 10.0
RESOLVE_TIMEOUT_S = 5.0
FIRST_PICTURE_TIMEOUT_S = 30.0
# What the page sends above the side that the server works on (OVERSAMPLING in web/connection.js).
OVERSAMPLING = 1.25
LAG_PERIOD_S = 0.05
POLL_S = 0.2
# On the way here, by session; and of this program's own making.
LOSSES = ("packets_lost", "frames_skipped", "messages_malformed")
GENERATOR_COUNTERS = ("camera_late", "camera_stalls", "video_decode_dropped", "video_decode_errors")


class LoadError(Exception):
    """The run cannot be made; the text says what is wrong and the cure. `misuse`: of the command, not of the server."""

    def __init__(self, message: str, *, misuse: bool = False) -> None:
        super().__init__(message)
        self.misuse = misuse


@dataclass(frozen=True, slots=True)
class LoadJob:
    """What to do.

    sessions: offered, spread evenly over ramp_s. seconds: measured, after every session has shown its first restyled
    picture and warmup_s more. fps: of the camera. params: of the offer. decode: which sessions decode their pictures:
    all, first or none; the figures do not need it.
    """

    url: str
    sessions: int
    seconds: float
    fps: float = 30.0
    params: tuple[tuple[str, object], ...] = (("prompt", "watercolour painting"),)
    ramp_s: float = 0.0
    warmup_s: float = 2.0
    decode: str = "none"
    clip: Path = DEMO_CLIP
    allow_remote: bool = False


async def run_load(job: LoadJob, say: Callable[[str], None]) -> dict[str, Any]:
    """Make the run; SIGINT or SIGTERM ends it early with what was measured until then.

    Returns: the report, as `--json` prints it.
    Raises: LoadError, if the target is refused or cannot be reached; server.clip.ClipError for the clip.
    """
    if not job.allow_remote:
        await check_target(job.url)
    timeout = aiohttp.ClientTimeout(total=HTTP_TIMEOUT_S)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(timeout=timeout, connector=connector) as http:
        short_side_px = round(OVERSAMPLING * await _short_side_px(http, job.url))
        say("encoding the clip")
        clip = await asyncio.to_thread(encode_clip, job.clip, job.fps, short_side_px)
        pool = ThreadPoolExecutor(1, thread_name_prefix="load-decode")
        run = _Run(job, http, clip, pool, say)
        try:
            with _signals() as stop:
                return await run.run(stop)
        finally:
            await run.close()
            pool.shutdown(wait=False)


class _Run:
    """The sessions of one run."""

    def __init__(
        self,
        job: LoadJob,
        http: aiohttp.ClientSession,
        clip: EncodedClip,
        pool: ThreadPoolExecutor,
        say: Callable[[str], None],
    ) -> None:
        self._job = job
        self._http = http
        self._clip = clip
        self._pool = pool
        self._say = say
        self._clock = ServerClock()
        self._clients: list[LoadClient] = []
        self._admitted: list[LoadClient] = []
        self._refusals: list[Refusal] = []

    async def run(self, stop: asyncio.Event) -> dict[str, Any]:
        """Open, warm up, measure. Sessions stay open: `close` ends them."""
        opening = asyncio.create_task(self._open())
        await _first_of(opening, stop)
        self._say(f"{len(self._admitted)} sessions open, {len(self._refusals)} refused; warming up")
        await _wait(stop, self._job.warmup_s if self._live() else 0.0)
        begun_at = time.monotonic()
        for client in self._admitted:
            client.figures.begin(begun_at)
        lag = _LoopLag()
        cpu_before_s = _cpu_s()
        psutil.cpu_percent()  # begins its interval
        self._say(f"measuring for {self._job.seconds:g} s")
        while self._live() and not stop.is_set() and (left_s := begun_at + self._job.seconds - time.monotonic()) > 0:
            await _wait(stop, min(left_s, POLL_S))
        now = time.monotonic()
        report = self._report(begun_at, now)
        report["interrupted"] = stop.is_set()
        report["generator"] |= {
            "cpu_share_of_a_core": round((_cpu_s() - cpu_before_s) / (now - begun_at), 3) if now > begun_at else None,
            "machine_cpu_share": round(psutil.cpu_percent() / 100, 3),
            **lag.stop(),
        }
        return report

    async def close(self) -> None:
        """Say goodbye for every session, refused ones included."""
        await asyncio.gather(*(client.close() for client in self._clients))

    async def _open(self) -> None:
        """Offer the sessions over the ramp; returns when each shows a restyled picture, is over or was refused."""
        job = self._job
        began_at = time.monotonic()
        openings: list[asyncio.Task[None]] = []
        try:
            for number in range(job.sessions):
                due_at = began_at + job.ramp_s * number / job.sessions
                await asyncio.sleep(max(0.0, due_at - time.monotonic()))
                decodes = job.decode == "all" or (job.decode == "first" and number == 0)
                client = LoadClient(number, job.url, self._http, self._clip, self._pool, self._clock, decodes=decodes)
                self._clients.append(client)
                openings.append(asyncio.create_task(self._open_one(client)))
            await asyncio.gather(*openings)
        finally:
            for opening in openings:
                opening.cancel()
            await asyncio.gather(*openings, return_exceptions=True)

    async def _open_one(self, client: LoadClient) -> None:
        refusal = await client.open(dict(self._job.params))
        if refusal is not None:
            self._refusals.append(refusal)
            return
        self._admitted.append(client)
        await client.until_restyled(FIRST_PICTURE_TIMEOUT_S)
        if client.ended_at is None and not client.figures.has_restyled:
            client.errors.append(f"no restyled picture within {FIRST_PICTURE_TIMEOUT_S:g} s of the answer")

    def _live(self) -> bool:
        return any(client.ended_at is None for client in self._admitted)

    def _report(self, begun_at: float, now: float) -> dict[str, Any]:
        sessions = []
        generator = dict.fromkeys(GENERATOR_COUNTERS, 0)
        for client in sorted(self._admitted, key=lambda client: client.session):
            until = now if client.ended_at is None else max(begun_at, client.ended_at)
            figures = client.figures.figures(until)
            figures["losses"] |= {name: client.counters[name] for name in LOSSES if client.counters[name]}
            decoded = client.counters["pictures_decoded"]
            sessions.append(
                {"session": client.session, **figures, "pictures_decoded": decoded, "errors": list(client.errors)}
            )
            for name in GENERATOR_COUNTERS:
                generator[name] += client.counters[name]
        refusals = [asdict(refusal) for refusal in self._refusals]
        clip = self._clip
        return {
            "url": self._job.url,
            "seconds": round(now - begun_at, 3),
            "asked": self._job.sessions,
            "sessions": sessions,
            "refused": len(refusals),
            "refused_ms_max": max((refusal.refused_ms for refusal in self._refusals), default=None),
            "refusals": refusals,
            "fairness": fairness(sessions),
            "camera": {"size": f"{clip.width}x{clip.height}", "fps": clip.fps, "bitrate": clip.bitrate},
            "generator": generator,
        }


class _LoopLag:
    """How late this program's own event loop is: with a lag it measures itself and not the server."""

    def __init__(self) -> None:
        self._lags: list[float] = []
        self._task = asyncio.create_task(self._watch())

    def stop(self) -> dict[str, float | None]:
        """End the watch and say what it saw."""
        self._task.cancel()
        p99_s = quantile(self._lags, 0.99)
        return {"loop_lag_p99_s": None if p99_s is None else round(p99_s, 4)}

    async def _watch(self) -> None:
        while True:
            before = time.monotonic()
            await asyncio.sleep(LAG_PERIOD_S)
            self._lags.append(max(0.0, time.monotonic() - before - LAG_PERIOD_S))


async def check_target(url: str) -> None:
    """Let pass only what is on this machine, whatever its name: a load test is an attack on anybody else.

    Raises: LoadError, if the name is not known, or one of its addresses is not this machine's.
    """
    parts = urlsplit(url)
    host = parts.hostname or ""
    try:
        async with asyncio.timeout(RESOLVE_TIMEOUT_S):
            found = await asyncio.get_running_loop().getaddrinfo(host, parts.port, type=socket.SOCK_STREAM)
    except (TimeoutError, OSError) as error:
        raise LoadError(f"{host} is not known: {error or 'no answer'}; check the name in --url") from error
    own = {_bare(item.address) for items in psutil.net_if_addrs().values() for item in items}
    for address in dict.fromkeys(_bare(str(item[4][0])) for item in found):
        if address not in own and not ipaddress.ip_address(address).is_loopback:
            name = host if host == address else f"{host} ({address})"
            raise LoadError(
                f"{name} is not this machine, and a load test of somebody else's server is an attack on it;"
                " give --allow-remote if it is yours",
                misuse=True,
            )


async def _short_side_px(http: aiohttp.ClientSession, url: str) -> int:
    """Ask a server what size it works at, to see that it is one."""
    try:
        async with http.get(url + "/api/v1/models") as response:
            answer = await response.json(content_type=None)
            if response.status != 200:
                reason = answer.get("message") if isinstance(answer, dict) else response.reason
                raise LoadError(f"{url} answers {response.status}: {reason}")
            return min(int(side) for side in answer["models"][0]["size"].split("x"))
    except (aiohttp.ClientConnectionError, TimeoutError, OSError) as error:
        number = getattr(error, "errno", None)
        reason = os.strerror(number) if number else str(error) or f"no answer in {HTTP_TIMEOUT_S:g} s"
        raise LoadError(f"no server at {url} ({reason}); start one with `livebrush serve`, or check --url") from error
    except (aiohttp.ClientError, ValueError, KeyError, TypeError, IndexError) as error:
        raise LoadError(f"{url} is no Livebrush server: it did not say what it serves; check --url") from error


@contextmanager
def _signals() -> Iterator[asyncio.Event]:
    """An event that the first SIGINT or SIGTERM sets; the second has its usual effect."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    numbers = (signal.SIGINT, signal.SIGTERM)

    def on_signal() -> None:
        stop.set()
        print("livebrush: ending early", file=sys.stderr)
        for number in numbers:
            loop.remove_signal_handler(number)

    for number in numbers:
        loop.add_signal_handler(number, on_signal)
    try:
        yield stop
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)


async def _first_of(task: asyncio.Task[None], stop: asyncio.Event) -> None:
    """Wait for the task; when stopped before, cancel it and wait for that."""
    stopped = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait([task, stopped], return_when=asyncio.FIRST_COMPLETED)
    finally:
        stopped.cancel()
        if not task.done():
            task.cancel()
            await asyncio.wait([task])
    if not task.cancelled():
        task.result()


async def _wait(stop: asyncio.Event, seconds: float) -> None:
    try:
        async with asyncio.timeout(seconds):
            await stop.wait()
    except TimeoutError:
        return


def _bare(address: str) -> str:
    return address.split("%", 1)[0]


def _cpu_s() -> float:
    times = psutil.Process().cpu_times()
    return float(times.user + times.system)
