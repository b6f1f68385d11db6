"""A WHEP viewer whose screen is a virtual camera (camera_command.py).

    WHEP -> MediaReceiver -> one newest picture -> every 1/fps s -> fitted -> Webcam.send

The webcam gets a picture at every tick, because programs take a silent camera for a broken one: the last picture again
while none is newer, and the last at half brightness while the stream is away. It tries again until it is back.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol
from urllib.parse import urljoin

import aiohttp
import av
import cv2
import numpy as np
from aiortc import (
    RTCBundlePolicy,
    RTCConfiguration,
    RTCIceServer,
    RTCPeerConnection,
    RTCRtpTransceiver,
    RTCSessionDescription,
)
from numpy.typing import NDArray

from server.ice_guard import IceGuard
from server.rtp_receiver import MediaReceiver
from server.settings import MediaSettings

Image = NDArray[np.uint8]

HTTP_TIMEOUT_S, CLOSE_TIMEOUT_S = 10.0, 3.0
CONNECT_TIMEOUT_S = 15.0
# The server sends a picture a second even while nobody publishes.
SILENCE_S = 5.0
FIRST_WAIT_S, LONGEST_WAIT_S = 0.5, 10.0
# What no further try would cure.
HOPELESS = (400, 401, 403, 405, 415, 422)
DARK = 24


class Webcam(Protocol):
    """What is used of pyvirtualcam.Camera."""

    width: int
    height: int
    device: str

    def send(self, frame: Image) -> None:
        """Show a [height, width, 3] RGB picture."""
        ...

    def close(self) -> None:
        """Give the device back."""
        ...


class Refused(Exception):
    """The server says no, and would again."""


class Lost(Exception):
    """The stream is away; it is worth another try, after `retry_after_s` where the server named that."""

    def __init__(self, why: str, retry_after_s: float = 0.0) -> None:
        super().__init__(why)
        self.retry_after_s = retry_after_s


def fitted(picture: Image, width: int, height: int, *, mirror: bool = False) -> Image:
    """The whole picture in the middle of a [height, width, 3] frame, black beside it."""
    scale = min(width / picture.shape[1], height / picture.shape[0])
    inner = (max(1, round(picture.shape[1] * scale)), max(1, round(picture.shape[0] * scale)))
    resized = cv2.resize(picture, inner, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)
    frame = np.zeros((height, width, 3), np.uint8)
    left, top = (width - inner[0]) // 2, (height - inner[1]) // 2
    frame[top : top + inner[1], left : left + inner[0]] = resized[:, ::-1] if mirror else resized
    return frame


class CameraPlayer:
    """Plays a stream into a webcam until cancelled."""

    def __init__(self, url: str, stream: str, token: str, webcam: Webcam, *, fps: float, mirror: bool) -> None:
        self.counters: Counter[str] = Counter()
        """shown, repeated, skipped (a newer one came before its tick), tries, and what the receiver counts."""
        self._base = url.rstrip("/")
        self._stream = stream
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._webcam = webcam
        self._period_s = 1 / fps
        self._mirror = mirror
        self._picture: av.VideoFrame | None = None
        self._shown: Image = np.full((webcam.height, webcam.width, 3), DARK, np.uint8)
        self._heard_at = 0.0
        self._heard = asyncio.Event()
        self._is_live = False

    async def run(self, tell: Callable[[str], None]) -> None:
        """Play. `tell` gets a line for people at every change. Raises Refused where another try would not help."""
        with ThreadPoolExecutor(2, "camera") as pool:
            timeout = aiohttp.ClientTimeout(total=HTTP_TIMEOUT_S)
            async with aiohttp.ClientSession(headers=self._headers, timeout=timeout) as http:
                showing = asyncio.create_task(self._show(pool), name="camera/show")
                playing = asyncio.create_task(self._play(http, pool, tell), name="camera/play")
                try:
                    await asyncio.wait({showing, playing}, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    for task in (showing, playing):
                        task.cancel()
                    ends = await asyncio.gather(showing, playing, return_exceptions=True)
        for end in ends:
            if isinstance(end, Exception):
                raise end

    # --- to the webcam

    async def _show(self, pool: ThreadPoolExecutor) -> None:
        """A picture at every tick; ticks that were missed are left out."""
        loop = asyncio.get_running_loop()
        due_at = loop.time()
        while True:
            picture, self._picture = self._picture, None
            if picture is not None:
                self._shown = await loop.run_in_executor(pool, self._fitted, picture)
                self.counters["shown"] += 1
            else:
                self.counters["repeated"] += 1
            frame = self._shown if self._is_live else self._shown // 2
            await loop.run_in_executor(pool, self._webcam.send, frame)
            due_at = max(due_at + self._period_s, loop.time())
            await asyncio.sleep(due_at - loop.time())

    def _fitted(self, picture: av.VideoFrame) -> Image:
        rgb = np.asarray(picture.reformat(format="rgb24", threads=1).to_ndarray(), np.uint8)
        return fitted(rgb, self._webcam.width, self._webcam.height, mirror=self._mirror)

    # --- from the server

    async def _play(self, http: aiohttp.ClientSession, pool: ThreadPoolExecutor, tell: Callable[[str], None]) -> None:
        tries, told = 0, ""
        while True:
            self.counters["tries"] += 1
            try:
                await self._watch(http, pool, tell)
            except Lost as lost:
                tries = 0 if self._is_live else tries + 1
                self._is_live = False
                if str(lost) != told:
                    told = str(lost)
                    tell(f"{told}; trying again until it comes")
                wait_s = min(FIRST_WAIT_S * 2**tries, LONGEST_WAIT_S) * random.uniform(0.75, 1.25)
                await asyncio.sleep(max(wait_s, lost.retry_after_s))

    async def _watch(self, http: aiohttp.ClientSession, pool: ThreadPoolExecutor, tell: Callable[[str], None]) -> None:
        """One connection. Raises Lost when it is over, Refused."""
        try:
            connection = RTCPeerConnection(
                RTCConfiguration(await self._ice_servers(http), bundlePolicy=RTCBundlePolicy.MAX_BUNDLE)
            )
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise Lost(f"{self._base} does not answer ({error or type(error).__name__})") from error
        resource = ""
        try:
            self._install(connection, pool)
            await connection.setLocalDescription(await connection.createOffer())
            resource, answer = await self._offer(http, connection.localDescription.sdp)
            self._heard.clear()
            await connection.setRemoteDescription(RTCSessionDescription(answer, "answer"))
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                await self._heard.wait()
            self._is_live = True
            tell(f"{self._stream} plays")
            while (silent_s := time.monotonic() - self._heard_at) < SILENCE_S:
                if connection.connectionState in ("failed", "closed"):
                    raise Lost("the connection broke")
                await asyncio.sleep(min(1.0, SILENCE_S - silent_s))
            raise Lost(f"nothing has come for {SILENCE_S:g} s")
        except TimeoutError:
            raise Lost(f"no picture came within {CONNECT_TIMEOUT_S:g} s") from None
        except (aiohttp.ClientError, OSError, ValueError) as error:
            raise Lost(f"the offer failed ({error or type(error).__name__})") from error
        finally:
            await self._leave(http, connection, resource)

    async def _ice_servers(self, http: aiohttp.ClientSession) -> list[RTCIceServer]:
        async with http.get(f"{self._base}/api/v1/ice-servers") as response:
            if response.status != 200:
                # A server that refuses says so again, and better, to the offer.
                return []
            return [RTCIceServer(**one) for one in (await response.json())["iceServers"]]

    async def _offer(self, http: aiohttp.ClientSession, sdp: str) -> tuple[str, str]:
        """The session's URL and the answer. Raises Lost or Refused, in the server's words."""
        url = f"{self._base}/whep/{self._stream}"
        async with http.post(url, data=sdp, headers={"Content-Type": "application/sdp"}) as response:
            text = await response.text()
            if response.status == 201:
                return urljoin(url, response.headers["Location"]), text
            words = f"the server answered {response.status}"
            if "json" in response.content_type:
                problem: dict[str, Any] = await response.json(content_type=None)
                words = str(problem.get("detail", words))
            if response.status in HOPELESS:
                raise Refused(words)
            retry_after = response.headers.get("Retry-After", "")
            raise Lost(words, float(retry_after) if retry_after.isdigit() else 0.0)

    def _install(self, connection: RTCPeerConnection, pool: ThreadPoolExecutor) -> None:
        """The server's receiver in the place of the stock one, which holds pictures back and freezes under loss."""
        transceiver: RTCRtpTransceiver = connection.addTransceiver("video", direction="recvonly")
        transport = transceiver.receiver.transport
        IceGuard(self.counters).attach(transport.transport.iceGatherer)
        receiver = MediaReceiver("video", transport, pool, MediaSettings(), self.counters, self._take, lambda: None)
        receiver._set_rtcp_ssrc(transceiver.sender._ssrc)
        transceiver._RTCRtpTransceiver__receiver = receiver  # type: ignore[attr-defined]

    def _take(self, picture: object, arrived_at: float) -> None:
        if isinstance(picture, av.VideoFrame):
            self.counters["skipped"] += self._picture is not None
            self._picture, self._heard_at = picture, arrived_at
            self._heard.set()

    async def _leave(self, http: aiohttp.ClientSession, connection: RTCPeerConnection, resource: str) -> None:
        """Say goodbye and close, each within bounded time."""
        transports = [item.receiver.transport for item in connection.getTransceivers()]
        steps = [connection.close(), *(step for one in transports for step in (one.stop(), one.transport.stop()))]
        if resource:
            steps.insert(0, _goodbye(http, resource))
        for step in steps:
            try:
                async with asyncio.timeout(CLOSE_TIMEOUT_S):
                    await step
            except Exception:  # noqa: BLE001  (the wall: no step may keep the next from running)
                self.counters["close_errors"] += 1


async def _goodbye(http: aiohttp.ClientSession, resource: str) -> None:
    async with http.delete(resource):
        pass
