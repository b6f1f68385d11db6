"""A WHIP or WHEP client made of aiortc, and what it publishes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import aiohttp
import av
import numpy as np
from aiortc import RTCConfiguration, RTCPeerConnection, RTCRtpSender, RTCSessionDescription
from aiortc.mediastreams import AudioStreamTrack, MediaStreamError, MediaStreamTrack, VideoStreamTrack

SDP = {"Content-Type": "application/sdp"}


class MovingPicture(VideoStreamTrack):
    """A bright bar that moves over a grey, 320x240 at 30 fps."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    async def recv(self) -> av.VideoFrame:
        pts, time_base = await self.next_timestamp()
        picture = np.full((240, 320, 3), 100, np.uint8)
        left = 4 * self.count % 288
        picture[:, left : left + 32] = 230
        self.count += 1
        frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
        frame.pts, frame.time_base = pts, time_base
        return frame


class Client:
    """A WHIP or WHEP client: one peer connection that only sends or only receives."""

    def __init__(self, base: str, *, publishes: bool, codec: str = "video/VP8", sound: bool = False) -> None:
        self.base = base
        self.http = aiohttp.ClientSession()
        self.connection = RTCPeerConnection(RTCConfiguration(iceServers=[]))
        self.pictures: list[tuple[float, np.ndarray]] = []
        self.sounds = 0
        self.url = ""
        self._readers: list[asyncio.Task[None]] = []
        self.connection.on("track", lambda track: self._readers.append(asyncio.create_task(self._read(track))))
        direction = "sendonly" if publishes else "recvonly"
        if sound:
            self.connection.addTransceiver(AudioStreamTrack() if publishes else "audio", direction=direction)
        video = self.connection.addTransceiver(MovingPicture() if publishes else "video", direction=direction)
        codecs = RTCRtpSender.getCapabilities("video").codecs
        video.setCodecPreferences([one for one in codecs if one.mimeType in (codec, "video/rtx")])

    async def _read(self, track: MediaStreamTrack) -> None:
        while True:
            try:
                frame = await track.recv()
            except MediaStreamError:
                return
            if isinstance(frame, av.VideoFrame):
                self.pictures.append((time.monotonic(), frame.to_ndarray(format="rgb24")))
            else:
                self.sounds += 1

    async def offer(self) -> str:
        await self.connection.setLocalDescription(await self.connection.createOffer())
        return self.connection.localDescription.sdp

    async def enter(self, path: str, edit: Callable[[str], str] = str) -> aiohttp.ClientResponse:
        response = await self.http.post(self.base + path, data=edit(await self.offer()), headers=SDP)
        if response.status == 201:
            self.url = self.base + response.headers["Location"]
            await self.connection.setRemoteDescription(RTCSessionDescription(await response.text(), "answer"))
        return response

    async def leave(self) -> int:
        async with self.http.delete(self.url) as response:
            return response.status

    async def close(self) -> None:
        await self.connection.close()
        # One that never connected has a track that never ends.
        for reader in self._readers:
            reader.cancel()
        await asyncio.gather(*self._readers, return_exceptions=True)
        await self.http.close()
