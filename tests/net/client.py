"""A page without a browser behind a bad network, whose every picture tells which camera frame it shows.

The number of a frame is drawn into it as blocks of black and white, which survive two encodings and a restyling of
strength 0. So what was sent and what was shown are compared by one clock, the client's, and by nothing the server says.
"""

from __future__ import annotations

import asyncio
import bisect
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, TypeVar

import aiohttp
import av
import numpy as np
from aiortc import RTCRtpSender
from numpy.typing import NDArray

from livebrush_client import Answer, Api
from server.clip import ClipFrame, ClipReader
from server.decoding import Picture
from server.egress import OutgoingVideo
from server.frames import OutgoingFrame
from server.ice_guard import IceGuard
from server.load_client import LoadClient
from server.load_clip import ClipPicture, ClipTrack, EncodedClip
from server.load_figures import ServerClock
from server.load_run import DEMO_CLIP
from server.metrics import quantile
from server.rtp_receiver import MediaReceiver
from server.sender import VideoSender
from server.settings import MediaSettings
from tests.net.link import Link

WIDTH, HEIGHT, FPS = 320, 240, 15.0
PARAMS: dict[str, object] = {"prompt": "neon", "strength": 0.0}
BLOCK_PX = 20
NUMBER_BITS, CHECK_BITS = 12, 4
CLIP_FRAMES = 60
FREEZE_SLOTS = 2.5


def stamp(picture: NDArray[np.uint8], number: int) -> NDArray[np.uint8]:
    """A copy with the number, modulo 4096, in its first rows."""
    value = number % (1 << NUMBER_BITS)
    value = value << CHECK_BITS | _check(value)
    bits = [value >> place & 1 for place in reversed(range(NUMBER_BITS + CHECK_BITS))]
    stamped = picture.copy()
    stamped[:BLOCK_PX, : BLOCK_PX * len(bits)] = np.repeat(np.array(bits, np.uint8) * 255, BLOCK_PX)[None, :, None]
    return stamped


def read_stamp(luma: NDArray[np.uint8]) -> int | None:
    """The number in a picture of [H, W] luma; None where there is none that agrees with its check."""
    inner = slice(BLOCK_PX // 4, 3 * BLOCK_PX // 4)
    row = luma[inner, : BLOCK_PX * (NUMBER_BITS + CHECK_BITS)].mean(axis=0).reshape(-1, BLOCK_PX)
    value = 0
    for bit in row[:, inner].mean(axis=1) > 127:
        value = value << 1 | int(bit)
    value, check = value >> CHECK_BITS, value & ((1 << CHECK_BITS) - 1)
    return value if check == _check(value) else None


def _check(value: int) -> int:
    return (value ^ value >> 4 ^ value >> 8 ^ 0b0101) & 0xF


def demo_pictures() -> list[NDArray[np.uint8]]:
    """The first frames of the demo clip, at the size of the tests."""
    pictures = []
    with ClipReader(DEMO_CLIP) as reader:
        for item in reader.items(WIDTH, HEIGHT):
            if isinstance(item, ClipFrame):
                pictures.append(item.picture)
            if len(pictures) == CLIP_FRAMES:
                break
    return pictures


@dataclass(frozen=True, slots=True)
class Seen:
    """What was seen of the frames sent in some time. ages: from the camera to the picture decoded.

    shown: share of the frames that were seen at all. late: share of those seen whose age was over the bound asked for.
    """

    sent: int
    shown: float
    late: float
    gap_s: float
    age_p50_s: float | None
    age_p95_s: float | None


class Journal:
    """When each frame was sent and first seen. Pure."""

    def __init__(self) -> None:
        self.sent_at: list[float] = []
        self.seen: list[tuple[float, int]] = []
        """Instant and number of every picture seen first, rising in time."""
        self._seen_numbers: set[int] = set()

    def on_sent(self, now: float) -> None:
        """The next frame leaves the camera."""
        self.sent_at.append(now)

    def on_seen(self, stamped: int, now: float) -> None:
        """A picture with this number, modulo 4096, is there."""
        period = 1 << NUMBER_BITS
        newest = len(self.sent_at) - 1
        number = newest - (newest - stamped) % period
        if number >= 0 and number not in self._seen_numbers:
            self._seen_numbers.add(number)
            self.seen.append((now, number))

    def between(self, begin: float, end: float, late_s: float) -> Seen:
        """Of the frames sent from `begin` to `end`; the longest gap between pictures seen in that time."""
        first, last = (bisect.bisect_left(self.sent_at, at) for at in (begin, end))
        ages = sorted(now - self.sent_at[number] for now, number in self.seen if first <= number < last)
        instants = [begin, *(now for now, _ in self.seen if begin <= now < end), end]
        return Seen(
            last - first,
            len(ages) / max(1, last - first),
            sum(age > late_s for age in ages) / max(1, len(ages)),
            max(later - earlier for earlier, later in pairwise(instants)),
            quantile(ages, 0.5),
            quantile(ages, 0.95),
        )

    def back_s(self, since: float, share: float) -> float | None:
        """Time from `since` until the begin of the first second in which `share` of the rate was seen; or None."""
        instants = [now for now, _ in self.seen if now >= since]
        for place, instant in enumerate(instants):
            if bisect.bisect_left(instants, instant + 1.0) - place >= share * FPS:
                return instant - since
        return None


Client = TypeVar("Client", bound="HardClient")


class LinkedApi(Api):
    """Offers through a link."""

    def __init__(self, url: str, link: Link, http: aiohttp.ClientSession) -> None:
        super().__init__(url, http=http)
        self._link = link

    async def offer(self, sdp: str, params: dict[str, Any], *, bypass: bool = False, resume: str = "") -> Answer:
        """See Api."""
        answer = await super().offer(self._link.towards_server(sdp), params, bypass=bypass, resume=resume)
        return replace(answer, sdp=self._link.towards_client(answer.sdp))


class HardClient(LoadClient):
    """One session behind a link. Both ways it has the codecs, the bitrate policy and the receiver of the server."""

    def __init__(
        self,
        url: str,
        link: Link,
        http: aiohttp.ClientSession,
        pictures: list[NDArray[np.uint8]],
        pool: ThreadPoolExecutor,
        *,
        fps: float = FPS,
    ) -> None:
        self.journal = Journal()
        self.unread = 0
        self._pictures = pictures
        self._fps = fps
        none = EncodedClip((ClipPicture((), True),), fps, WIDTH, HEIGHT)
        super().__init__(0, url, http, none, pool, ServerClock(), decodes=True)
        self._api = LinkedApi(url, link, http)

    def _install(self, track: ClipTrack, pool: Any, *, decodes: bool) -> None:
        transceiver = self._connection.addTransceiver("video")
        transport = transceiver.receiver.transport
        IceGuard(self.counters).attach(transport.transport.iceGatherer)
        settings = MediaSettings()
        self._outgoing = OutgoingVideo(self.counters)
        sender = VideoSender(self._outgoing, transport, pool, settings, self.counters)
        receiver = MediaReceiver("video", transport, pool, settings, self.counters, self._on_decoded, lambda: None)
        receiver._set_rtcp_ssrc(sender._ssrc)
        transceiver._RTCRtpTransceiver__sender = sender  # type: ignore[attr-defined]
        transceiver._RTCRtpTransceiver__receiver = receiver  # type: ignore[attr-defined]
        codecs = RTCRtpSender.getCapabilities("video").codecs
        transceiver.setCodecPreferences([one for one in codecs if one.mimeType in ("video/VP8", "video/rtx")])

    def film(self) -> None:
        """Send the clip over and over from now on."""
        self._start(self._film())

    async def _film(self) -> None:
        due_at = time.monotonic()
        while True:
            number = len(self.journal.sent_at)
            picture = stamp(self._pictures[number % len(self._pictures)], number)
            now = time.monotonic()
            self.journal.on_sent(now)
            self._outgoing.push(OutgoingFrame(number, now, picture, 0), now)
            due_at = max(due_at + 1 / self._fps, now - 1 / self._fps)
            await asyncio.sleep(max(0.0, due_at - time.monotonic()))

    def _on_decoded(self, picture: Picture, arrived_at: float) -> None:
        assert isinstance(picture, av.VideoFrame)
        plane = picture.planes[0]
        luma = np.frombuffer(bytes(plane), np.uint8).reshape(plane.height, plane.line_size)[:, : picture.width]
        stamped = read_stamp(luma) if picture.width >= WIDTH else None
        if stamped is None:
            self.unread += 1
        else:
            self.journal.on_seen(stamped, time.monotonic())

    async def until(self, condition: Callable[[], object], what: str, timeout_s: float = 60.0) -> None:
        """Wait until it holds; AssertionError when it does not in time."""
        try:
            async with asyncio.timeout(timeout_s):
                while not condition():
                    await asyncio.sleep(0.02)
        except TimeoutError:
            raise AssertionError(f"waited {timeout_s:g} s in vain for {what}; {self.errors}") from None

    async def until_seen(self, count: int) -> None:
        """Wait for so many pictures more than there are."""
        goal = len(self.journal.seen) + count
        await self.until(lambda: len(self.journal.seen) >= goal, f"{count} pictures")


@asynccontextmanager
async def linked_as(
    kind: type[Client], url: str, pictures: list[NDArray[np.uint8]], *, seed: int = 1
) -> AsyncIterator[tuple[Client, Link]]:
    """A client that films, its picture on the screen, behind a link that is still good."""
    pool = ThreadPoolExecutor(2, thread_name_prefix="client-codec")
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=30)) as http, Link(seed) as link:
        client = kind(url, link, http, pictures, pool)
        try:
            refusal = await client.open(PARAMS)
            assert refusal is None, refusal
            client.film()
            await client.until_seen(5)
            yield client, link
        finally:
            await client.close()
            pool.shutdown(wait=False)


def linked(
    url: str, pictures: list[NDArray[np.uint8]], *, seed: int = 1
) -> AbstractAsyncContextManager[tuple[HardClient, Link]]:
    """The usual client."""
    return linked_as(HardClient, url, pictures, seed=seed)
