"""A drill: one page's session through faults that are no network's, and what became of its picture.

    stalled      the server is stopped for 5 s, as by a busy host, and goes on (F8)
    storm        1000 changes of the prompt a second for 5 s (F17)
    rubbish      26 kinds of bad messages over and over, and 200 channels (F18)
    sizes        the camera turns, grows and shrinks in mid-stream (F19)

A change of the client's address (F7) is tests/e2e/test_resume.py, in a browser.

Told are the share of frames shown, the longest gap and the age of what was shown; and what was answered, kept, grown.
Status 1 when a target is missed.

    .venv/bin/python tests/bench/drill_faults.py [--only storm] [--json]

The server is a process of its own with the stand-in engine; 320x240 at 15 fps.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

# A script of its own: its folder, not the repository, is on the path.
sys.path.insert(0, str(Path(__file__).parents[2]))

import aioice.ice
import cv2
import numpy as np
from numpy.typing import NDArray

from server.decoding import Picture
from tests.bench.drill_network import LATE_S, WARM_UP_S
from tests.e2e.serving import Server
from tests.net.client import FPS, HEIGHT, WIDTH, HardClient, demo_pictures, linked_as

STALL_S = 5.0
STORM_S, STORM_PER_S = 5.0, 1000
RUBBISH_S, CHANNELS = 5.0, 200
SIZE_S = 2.0
# Rows and columns; the number that is drawn into a picture needs 320 of these.
SIZES = ((HEIGHT, WIDTH), (640, 480), (360, 640), (720, 1280), (428, 320))
RUBBISH: tuple[str | bytes, ...] = (
    "",
    "hello",
    "[]",
    "null",
    "1e999",
    "{",
    '{"v": 1}',
    '{"type": "params"}',
    '{"v": 2, "type": "ping", "id": 1}',
    '{"v": 1, "type": "fly", "id": 1}',
    '{"v": 1, "type": "params", "id": "one"}',
    '{"v": 1, "type": "params", "id": 1, "strength": 7}',
    '{"v": 1, "type": "params", "id": 1, "strength": NaN}',
    '{"v": 1, "type": "params", "id": 1, "steps": 1.5}',
    '{"v": 1, "type": "params", "id": 1, "prompt": 5}',
    '{"v": 1, "type": "params", "id": 1, "prompt": "%s"}' % ("x" * 1001),
    '{"v": 1, "type": "params", "id": 1, "seed": -1}',
    '{"v": 1, "type": "params", "id": 1, "model": "../../etc/passwd"}',
    '{"v": 1, "type": "params", "id": 1, "blend": []}',
    '{"v": 1, "type": "bypass", "id": 1, "on": "yes"}',
    '{"v": 1, "type": "scene", "id": 1, "go": 1e9}',
    '{"v": 1, "type": "scenes", "id": 1, "scenes": {}}',
    "[" * 4000,
    '{"v": 1, "type": "params", "id": 1, "prompt": "\\ud800"}',
    b"\xff\xfe\x00binary",
    "x" * 8193,
)


class TalkingClient(HardClient):
    """One that counts what its control channel says: by type, and of errors by code; and remembers the last ack."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.said: Counter[str] = Counter()
        self.last_ack: dict[str, Any] = {}
        self.returned: list[float] = []
        """When each picture came back, whatever its size."""

    def _on_decoded(self, picture: Picture, arrived_at: float) -> None:
        self.returned.append(time.monotonic())
        super()._on_decoded(picture, arrived_at)

    def _take(self, message: dict[str, Any], now: float) -> None:
        self.said[message["code"] if message["type"] == "error" else message["type"]] += 1
        if message["type"] == "ack":
            self.last_ack = message
        super()._take(message, now)

    def say(self, **message: Any) -> None:
        """One message of the protocol."""
        self._control.send(json.dumps({"v": 1, **message}))

    def errors_but(self, code: str) -> list[str]:
        """What went wrong, without the refusals of this code."""
        return [error for error in self.errors if not error.startswith(f"{code}:")]

    @property
    def replies(self) -> int:
        """Answers to what was said, of every kind."""
        return sum(count for what, count in self.said.items() if what not in ("stats", "marks", "notice", "pong"))


Fault = Callable[[TalkingClient, Server], Awaitable[dict[str, Any]]]


def missed(**checks: tuple[float | None, float, bool]) -> list[str]:
    """What is not within its bound, in words: (value, bound, whether the bound is the most)."""
    return [
        f"{name} {value} instead of {bound:g}"
        for name, (value, bound, is_most) in checks.items()
        if value is None or (value > bound if is_most else value < bound)
    ]


async def stalled(client: TalkingClient, server: Server) -> dict[str, Any]:
    """Nothing is lost, nothing comes in a burst, and what is shown is new at once."""
    pid = server.family()[0].pid
    os.kill(pid, signal.SIGSTOP)
    await asyncio.sleep(STALL_S)
    os.kill(pid, signal.SIGCONT)
    on_at = time.monotonic()
    await asyncio.sleep(4.0)
    after = [(at - on_at, number) for at, number in client.journal.seen if at >= on_at]
    first_s = after[0][0] if after else None
    # Of what is shown from half a second on: what waited in the sockets may pass by before that.
    ages = sorted(on_at + at - client.journal.sent_at[number] for at, number in after if at >= 0.5)
    age_s = ages[round(0.95 * (len(ages) - 1))] if ages else None
    burst = max((sum(at <= one < at + 1.0 for one, _ in after) for at, _ in after), default=0) / FPS
    found = {"first_s": first_s, "age_p95_s": age_s, "burst": burst, "errors": client.errors}
    checks = missed(first_s=(first_s, 2.0, True), age_p95_s=(age_s, 1.0, True), burst=(burst, 2.0, True))
    return found | {"missed": checks + client.errors}


async def storm(client: TalkingClient, server: Server) -> dict[str, Any]:
    """The picture goes on, few answers are given, and the last wish is what is in force."""
    replies, begin = client.replies, time.monotonic()
    sent = 0
    while (passed_s := time.monotonic() - begin) < STORM_S:
        while sent < passed_s * STORM_PER_S:
            sent += 1
            client.say(type="params", id=sent, prompt=f"style {sent}")
        await asyncio.sleep(0.005)
    client.say(type="params", id=sent + 1, prompt="the last")
    end = time.monotonic()
    in_force_s: float | None = None
    while in_force_s is None and time.monotonic() - end < 10:
        if client.last_ack.get("id") == sent + 1:
            in_force_s = time.monotonic() - end
        await asyncio.sleep(0.01)
    seen = client.journal.between(begin, end, LATE_S)
    per_s = (client.replies - replies) / (time.monotonic() - begin)
    prompt = client.last_ack.get("params", {}).get("prompt")
    checks = missed(shown=(seen.shown, 0.8, False), in_force_s=(in_force_s, 1.0, True), replies_per_s=(per_s, 40, True))
    return {
        "sent": sent,
        "shown": seen.shown,
        "gap_s": seen.gap_s,
        "in_force_s": in_force_s,
        "replies_per_s": per_s,
        "prompt": prompt,
        "missed": checks + client.errors_but("too_fast") + ([] if prompt == "the last" else [f"prompt {prompt}"]),
    }


async def rubbish(client: TalkingClient, server: Server) -> dict[str, Any]:
    """The picture goes on and so does the channel, after 40 bad messages and hundreds of channels."""
    before_mb, begin = server.memory_mb(), time.monotonic()
    for number in range(CHANNELS):
        client._connection.createDataChannel(f"other {number}")
    said = 0
    while time.monotonic() - begin < RUBBISH_S:
        # 50 end a session; below that each is answered.
        if said < 40:
            client._control.send(RUBBISH[said % len(RUBBISH)])
            said += 1
        await asyncio.sleep(RUBBISH_S / 60)
    end = time.monotonic()
    client.say(type="params", id=7, prompt="still here")
    await client.until(lambda: client.last_ack.get("id") == 7, "an answer after the rubbish")
    seen, grown = client.journal.between(begin, end, LATE_S), server.memory_mb() - before_mb
    checks = missed(shown=(seen.shown, 0.9, False), gap_s=(seen.gap_s, 0.7, True), grown_mb=(grown, 16, True))
    return {"shown": seen.shown, "gap_s": seen.gap_s, "grown_mb": grown, "said": dict(client.said), "missed": checks}


async def sizes(client: TalkingClient, server: Server) -> dict[str, Any]:
    """Each size is shown, without a gap that is seen, and its buffers go with it."""
    usual, before_mb = client._pictures, 0.0
    gaps: list[float] = []
    found: list[str] = []
    # Twice: the first round fills what libraries keep.
    for height, width in (*SIZES, (HEIGHT, WIDTH), *SIZES, (HEIGHT, WIDTH)):
        if len(gaps) == len(SIZES) + 1:
            before_mb = server.memory_mb()
        client._pictures = await asyncio.to_thread(resized, usual, width, height)
        count, begin = len(client.returned), time.monotonic()
        await asyncio.sleep(SIZE_S)
        instants = [begin, *client.returned[count:], time.monotonic()]
        gaps.append(max(later - earlier for earlier, later in pairwise(instants)))
        found.append(f"{width}x{height} {gaps[-1]:.2f} s")
    client._pictures = usual
    await asyncio.sleep(SIZE_S)
    grown = server.memory_mb() / before_mb
    checks = missed(gap_s=(max(gaps), 1.0, True), grown=(grown, 1.1, True))
    return {"gaps": found, "gap_s": max(gaps), "grown": grown, "missed": checks + client.errors}


def resized(pictures: list[NDArray[np.uint8]], width: int, height: int) -> list[NDArray[np.uint8]]:
    """The same at another size, as copies; the number drawn into them later needs 320 pixels."""
    return [np.asarray(cv2.resize(picture, (width, height)), np.uint8) for picture in pictures]


FAULTS: dict[str, Fault] = {"stalled": stalled, "storm": storm, "rubbish": rubbish, "sizes": sizes}


def serving(log: Path, *, patient: bool = False) -> Server:
    """The server of these drills."""
    return Server(
        log,
        engine="fake",
        patient=patient,
        LIVEBRUSH_MAX_FPS="24",
        LIVEBRUSH_ENGINE__WIDTH=str(WIDTH),
        LIVEBRUSH_ENGINE__HEIGHT=str(HEIGHT),
    )


async def suffer(fault: Fault, server: Server, pictures: list[NDArray[np.uint8]], warm_up_s: float) -> dict[str, Any]:
    """One session through one fault: what was found, with what missed its target in words under `missed`."""
    async with linked_as(TalkingClient, server.url, pictures) as (client, _):
        await client.until(lambda: client._control.readyState == "open", "the control channel")
        await asyncio.sleep(warm_up_s)
        return await fault(client, server)


def main() -> int:
    """Parse the arguments and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="faults whose name holds this")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    aioice.ice.get_host_addresses = lambda use_ipv4, use_ipv6: []  # loopback only
    load, pictures, results = os.getloadavg()[0], demo_pictures(), {}
    for name, fault in FAULTS.items():
        if options.only in name:
            with tempfile.TemporaryDirectory() as folder, serving(Path(folder) / "server.log") as server:
                results[name] = asyncio.run(suffer(fault, server, pictures, WARM_UP_S))
            print(name, {key: value for key, value in results[name].items() if key != "said"}, file=sys.stderr)
    if options.json:
        print(json.dumps({"load_average": load, **results}, indent=1))
    return 1 if any(found["missed"] for found in results.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
