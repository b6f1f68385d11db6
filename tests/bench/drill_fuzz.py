"""A drill: malformed and oversize SDP and JSON over HTTP, for a minute, at a server in a process of its own.

What must hold: no 5xx but 503 (full), no request without an answer, memory that grows by less than 64 MB, no session
left, and a good client that connects afterwards and sees pictures:

    .venv/bin/python tests/bench/drill_fuzz.py [--seconds 60] [--seed 1]

The requests come as from many clients, and the bound on offers of all together is lifted: with both in place, most of
them would be refused before anything reads them.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

# A script of its own: its folder, not the repository, is on the path.
sys.path.insert(0, str(Path(__file__).parents[2]))

import aiohttp
import yarl

from tests.e2e.serving import Server
from tests.interop.asking import ask
from tests.interop.offers import obs_offer
from tests.server.waiting import until
from tests.server.whip_client import Client

MAX_GROWTH_MB = 64.0
TOKEN = "a-token-of-the-drill"
BEARER = {"Authorization": f"Bearer {TOKEN}"}
ANSWER_TIMEOUT_S = 10.0
# A session that nobody connects to is given up after 10 s (`connect_timeout_s`); a busy machine may be late.
GIVEN_UP_S = 30.0
CONNECTIONS = 8
PICTURES = 10
# Twenty times what the server reads; aiohttp's client warns of plain bytes beyond.
MAX_BODY_BYTES = 1_000_000
# What the server allocates once, codecs and tables, is there before its memory is read.
WARM_UP_REQUESTS = 500
WITHOUT_BOUND = """
import sys
import server.limits
server.limits.ALL_OFFERS_PER_S, server.limits.ALL_OFFERS_BURST = 1e6, 10**6
from server.cli import main
sys.exit(main(sys.argv[1:]))
"""
NUMBERS = ("0", "-1", "65536", "4294967296", "9" * 40, "1e9", "NaN", "")
STRINGS = (
    "",
    "\x00",
    "\r\n",
    "%s%n",
    "../../etc/passwd",
    "\u202e",
    "\ud83d\ude00" * 10,
    "a" * 2000,
    "a=",
    "m=",
    "null",
)
SDP, FRAGMENT, JSON = "application/sdp", "application/trickle-ice-sdpfrag", "application/json"
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE")
OFFERS = (
    ("POST", "/api/v1/webrtc/offer"),
    ("POST", "/whip/a"),
    ("POST", "/a/whip"),
    ("POST", "/whep/a"),
)
CALLS = (
    *OFFERS * 4,
    ("GET", "/"),
    ("GET", "/..%2f..%2fetc/passwd"),
    ("PATCH", "/api/v1/webrtc/offer/none"),
    ("POST", "/api/v1/webrtc/offer/none/close"),
    ("GET", "/api/v1/streams"),
    ("GET", "/api/v1/streams/a"),
    ("PATCH", "/api/v1/streams/a"),
    ("PUT", "/api/v1/streams/a/scenes"),
    ("GET", "/api/v1/sessions"),
    ("PATCH", "/api/v1/sessions/none"),
    ("POST", "/api/v1/links"),
    ("GET", "/api/v1/socket"),
    ("GET", "/api/v1/capacity"),
    ("PATCH", "/whip/a/none"),
    ("DELETE", "/whep/a/none"),
)


@dataclass
class Outcome:
    """What the server did with the requests. grown_mb: of the server and its children, after the warm-up."""

    statuses: Counter[int] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    grown_mb: float = 0.0
    sessions_left: int = 0
    good_client_pictures: int = 0

    @property
    def failures(self) -> list[str]:
        """What did not hold, in words; nothing when all did."""
        found = list(self.faults)
        if self.grown_mb >= MAX_GROWTH_MB:
            found.append(f"memory grew by {self.grown_mb:.0f} MB, over {MAX_GROWTH_MB:.0f}")
        if self.sessions_left:
            found.append(f"{self.sessions_left} sessions are left")
        if self.good_client_pictures < PICTURES:
            found.append(f"a good client saw {self.good_client_pictures} pictures afterwards")
        return found


class Unbounded(Server):
    """A server that takes as many offers as come, from whomever X-Forwarded-For names."""

    def __init__(self, log: Path) -> None:
        super().__init__(
            log,
            engine="fake",
            patient=True,
            LIVEBRUSH_TRUSTED_PROXIES='["127.0.0.1"]',
            LIVEBRUSH_TOKENS__PUBLISH=TOKEN,
        )
        self._command[:1] = [sys.executable, "-c", WITHOUT_BOUND]


def mangled_sdp(random_: random.Random, offer: str) -> bytes:
    """An offer with up to six faults; one in ten is random bytes, one in ten is far too long."""
    kind = random_.randrange(10)
    if kind == 0:
        return random_.randbytes(random_.randrange(4096))
    if kind == 1:
        line = random_.choice(offer.splitlines())
        return (offer + f"{line}\r\n" * random_.randrange(100, 20_000)).encode()[:MAX_BODY_BYTES]
    lines = offer.split("\r\n")
    for _ in range(random_.choice((0, 1, 1, 2, 6))):
        _mangle(random_, lines)
    text = random_.choice(("\r\n", "\r\n", "\r\n", "\n", "\r")).join(lines)
    return text.encode(errors="surrogatepass")


def _mangle(random_: random.Random, lines: list[str]) -> None:
    at = random_.randrange(len(lines))
    line = lines[at]
    match random_.randrange(7):
        case 0 if len(lines) > 1:
            del lines[at]
        case 1:
            lines.insert(at, line)
        case 2:
            lines[at], lines[0] = lines[0], line
        case 3:
            cut = random_.randrange(len(line) + 1)
            lines[at] = line[:cut] + random_.choice(STRINGS) + line[cut:]
        case 4:
            words = line.split(" ")
            words[random_.randrange(len(words))] = random_.choice(NUMBERS)
            lines[at] = " ".join(words)
        case 5:
            head, colon, _ = line.partition(":")
            lines[at] = head + colon + random_.choice(NUMBERS + STRINGS)
        case _:
            lines[at] = line.swapcase()


def mangled_json(random_: random.Random, offer: str) -> bytes:
    """A body of some call with wrong types, unknown names, deep nesting, or broken text."""
    body: dict[str, object] = {
        "type": "offer",
        "sdp": mangled_sdp(random_, offer).decode(errors="replace") if random_.random() < 0.5 else offer,
        "prompt": "neon",
        "params": {"prompt": "neon", "strength": 1.0, "seed": 1},
        "candidates": [{"candidate": "candidate:1 1 udp 1 127.0.0.1 40000 typ host", "sdpMid": "0"}],
        "role": "view",
    }
    for _ in range(random_.randint(1, 4)):
        body[random_.choice([*body, "strength", "seed", "steps", "resume", "class", "\u0000"])] = _value(random_)
    if random_.random() < 0.3:
        body = dict(random_.sample(list(body.items()), random_.randrange(len(body) + 1)))
    text = json.dumps(body)
    match random_.randrange(8):
        case 0:
            text = text[: random_.randrange(len(text))]
        case 1:
            text = "[" * random_.randrange(1, 40_000)
        case 2:
            text = random_.choice(("null", "[]", "1e999", "NaN", '"x"', "{}", "{" + '"a":1,' * 9000, "\ufeff{}"))
    return text.encode(errors="surrogatepass")


def _value(random_: random.Random) -> object:
    deep: object = 1
    for _ in range(random_.randrange(60)):
        deep = [deep]
    return random_.choice(
        [None, True, -1, 2**70, 1e308, float("nan"), [], {}, deep, {"a": deep}, [None] * 200, *STRINGS, *NUMBERS]
    )


async def fuzz(url: str, seconds: float, seed: int, outcome: Outcome, memory_mb: Callable[[], float]) -> None:
    """Send mangled requests over a few connections until the time is over."""
    until_s = time.monotonic() + seconds
    begun_mb: list[float] = []

    async def send(http: aiohttp.ClientSession, random_: random.Random) -> None:
        while time.monotonic() < until_s:
            if not begun_mb and outcome.statuses.total() >= WARM_UP_REQUESTS:
                begun_mb.append(memory_mb())
            await _one(http, random_, url, outcome)

    connector = aiohttp.TCPConnector(limit=CONNECTIONS)
    timeout = aiohttp.ClientTimeout(total=ANSWER_TIMEOUT_S)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout, auto_decompress=False) as http:
        await asyncio.gather(*(send(http, random.Random(seed * 1000 + worker)) for worker in range(CONNECTIONS)))
    outcome.grown_mb = memory_mb() - begun_mb[0] if begun_mb else 0.0


async def _one(http: aiohttp.ClientSession, random_: random.Random, url: str, outcome: Outcome) -> None:
    """One request, and where it opened a session a few more at that, and its end."""
    method, path = random_.choice(CALLS)
    if random_.random() < 0.1:
        method, path = random_.choice(METHODS), random_.choice(CALLS)[1]
    if random_.random() < 0.1:
        name, value = random_.choice(("prompt", "strength", "steps", "alpha", "x")), random_.choice(STRINGS)
        path += f"?{name}={quote(value, errors='surrogatepass')}"
    client = f"10.{random_.randrange(256)}.{random_.randrange(256)}.7"
    if random_.random() < 0.01:
        client = random_.choice(("x", "", "::1, 9", "1" * 500))
    location = await _send(http, random_, url, method, path, client, outcome)
    if location is None:
        return
    more = [("PATCH", location), ("GET", location)]
    if location.startswith("/whip/"):
        stream = "/api/v1/streams/a"
        more += [("POST", "/whep/a"), ("PATCH", stream), ("PUT", f"{stream}/scenes"), ("POST", f"{stream}/recording")]
    for method, path in random_.sample(more, random_.randint(0, len(more))):
        await _send(http, random_, url, method, path, client, outcome)
    await _send(http, random_, url, "DELETE", location, client, outcome)


async def _send(
    http: aiohttp.ClientSession, random_: random.Random, url: str, method: str, path: str, client: str, outcome: Outcome
) -> str | None:
    """Send one mangled request and note what came; returns the session's URL where it opened one."""
    offer = obs_offer(direction=random_.choice(("sendonly", "recvonly")), layers=random_.choice((1, 1, 1, 1, 1, 3)))
    usual = JSON if "/api/" in path else SDP if method == "POST" else FRAGMENT
    content_type = random_.choice((SDP, FRAGMENT, JSON, "text/plain")) if random_.random() < 0.05 else usual
    data = None
    if method in ("POST", "PUT", "PATCH"):
        data = (mangled_json if content_type == JSON else mangled_sdp)(random_, offer)
    headers = {"Content-Type": content_type, "X-Forwarded-For": client, **BEARER}
    if random_.random() < 0.01:
        headers["Authorization"] = random_.choice(("", "Bearer", "Bearer \u00e4", "Basic x", "Bearer link.view..1.x"))
    if method in ("PATCH", "DELETE") and random_.random() < 0.3:
        headers["If-Match"] = random_.choice(("*", '"x"', "W/", "\u00e4"))
    what = f"{method} {path.partition('?')[0][:40]}"
    try:
        target = yarl.URL(url + path, encoded=True)
        async with http.request(method, target, data=data, headers=headers) as response:
            await response.read()
    except TimeoutError:
        outcome.faults.append(f"{what}: no answer in {ANSWER_TIMEOUT_S:.0f} s to {(data or b'')[:1000]!r}")
        return None
    except aiohttp.ClientConnectionError:
        # The server may hang up on a body that it does not want to read to its end.
        outcome.statuses[0] += 1
        return None
    outcome.statuses[response.status] += 1
    if response.status >= 500 and response.status != 503:
        outcome.faults.append(f"{what}: {response.status} for {(data or b'')[:1000]!r}")
    return response.headers.get("Location") if response.status == 201 else None


async def good_client(url: str, outcome: Outcome) -> None:
    """Publish, watch, and count the pictures."""
    publisher, player = Client(url, publishes=True), Client(url, publishes=False)
    for client in (publisher, player):
        client.http.headers.update(BEARER)
    try:
        if (response := await publisher.enter("/whip/good?prompt=neon")).status != 201:
            outcome.faults.append(f"a good client was refused: {response.status} {await response.text()}")
            return
        await player.enter("/whep/good")
        await until(lambda: len(player.pictures) >= PICTURES, "pictures")
        outcome.good_client_pictures = len(player.pictures)
        await player.leave()
        await publisher.leave()
    finally:
        await player.close()
        await publisher.close()


def drill(seconds: float, seed: int, folder: Path) -> Outcome:
    """Run it against a server whose log is in `folder`."""
    outcome = Outcome()
    with Unbounded(folder / "log") as server:
        asyncio.run(fuzz(server.url, seconds, seed, outcome, server.memory_mb))
        outcome.sessions_left = _sessions_left(server.url)
        asyncio.run(good_client(server.url, outcome))
    return outcome


def _sessions_left(url: str) -> int:
    """Sessions still open when those whose end was mangled had to be given up: nobody connected to them."""
    until = time.monotonic() + GIVEN_UP_S
    while True:
        left = int(ask("GET", url + "/api/v1/capacity", headers=BEARER).json()["open"])
        if not left or time.monotonic() >= until:
            return left
        time.sleep(0.5)


def main() -> int:
    """Print what was answered; 1 if something did not hold."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        outcome = drill(options.seconds, options.seed, Path(folder))
        log = (Path(folder) / "log").read_text()
    print(f"{outcome.statuses.total()} requests; by status (0: hung up on): {dict(sorted(outcome.statuses.items()))}")
    print(f"memory grew by {outcome.grown_mb:.1f} MB; a good client saw {outcome.good_client_pictures} pictures")
    for failure, count in Counter(outcome.failures).items():
        print(f"FAILED, {count} times: {failure}")
    if outcome.failures:
        print(f"the server's log ends:\n{log[-4000:]}")
    return 1 if outcome.failures else 0


if __name__ == "__main__":
    sys.exit(main())
