"""What goes back to the peer: pictures at their release time, sound held back by as much as the picture.

RTP timestamps of the picture are release times in 90 kHz and not capture times: a browser plays by them, and
spread releases with release stamps came out most even (gap P95 36 ms at 30 fps; capture stamps 67 ms).
aiortc ties the RTP time to the time of sending, so lip sync in the browser is sync at our sender.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass

import av
from aiortc.mediastreams import VIDEO_CLOCK_RATE, VIDEO_TIME_BASE, MediaStreamError, MediaStreamTrack

from server.frames import OutgoingFrame

MAX_WAITING = 2
MAX_UNSENT = 256
MAX_SOUND = 150  # 3 s of 20 ms frames
POLL_S = 0.1


@dataclass(frozen=True, slots=True)
class ReleasedFrame:
    """A picture with its release time, monotonic s, and the same in 90 kHz ticks since the first one."""

    frame: OutgoingFrame
    released_at: float
    ticks: int


class OutgoingVideo(MediaStreamTrack):
    """Pictures on their way to the encoder: `push` never waits, at most two are held, the newest win.

    unsent: (frame index, reason) of pictures that were released and never left, until someone takes them.
    """

    kind = "video"

    def __init__(self, counters: Counter[str], first_at: float | None = None) -> None:
        """first_at: the instant of tick 0; that of the first picture where none is given."""
        super().__init__()
        self.unsent: deque[tuple[int, str]] = deque(maxlen=MAX_UNSENT)
        self._counters = counters
        self._held: deque[ReleasedFrame] = deque()
        self._ready = asyncio.Event()
        self._first_at = first_at
        self._ticks = -1

    def push(self, frame: OutgoingFrame, now: float) -> None:
        """Release a picture at this instant."""
        if self._first_at is None:
            self._first_at = now
        self._ticks = max(self._ticks + 1, round((now - self._first_at) * VIDEO_CLOCK_RATE))
        if len(self._held) >= MAX_WAITING:
            self.unsent.append((self._held.popleft().frame.index, "encoder_behind"))
            self._counters["outgoing_dropped"] += 1
        self._held.append(ReleasedFrame(frame, now, self._ticks))
        self._ready.set()

    async def next(self) -> ReleasedFrame:
        """Wait for the oldest picture held.

        Raises: MediaStreamError, once the track has been stopped.
        """
        while not self._held:
            if self.readyState != "live":
                raise MediaStreamError
            self._ready.clear()
            await self._ready.wait()
        return self._held.popleft()

    async def recv(self) -> av.VideoFrame:
        """Return the next picture as any aiortc sender expects it."""
        released = await self.next()
        picture = av.VideoFrame.from_ndarray(released.frame.rgb, format="rgb24")
        picture.pts, picture.time_base = released.ticks, VIDEO_TIME_BASE
        return picture

    def stop(self) -> None:
        """End the track; who waits in `next` is told."""
        super().stop()
        self._ready.set()


class DelayedAudio(MediaStreamTrack):
    """Received sound, given out at its arrival plus the delay of the picture at that time."""

    kind = "audio"

    def __init__(self, delay_s: Callable[[], float], counters: Counter[str]) -> None:
        super().__init__()
        self._delay_s = delay_s
        self._counters = counters
        self._held: deque[tuple[float, av.AudioFrame]] = deque()
        self._ready = asyncio.Event()

    def push(self, frame: av.AudioFrame, arrived_at: float) -> None:
        """Take a decoded frame. Three seconds are held at most, the oldest are dropped."""
        if len(self._held) >= MAX_SOUND:
            self._held.popleft()
            self._counters["audio_dropped"] += 1
        self._held.append((arrived_at, frame))
        self._ready.set()

    async def recv(self) -> av.AudioFrame:
        """Wait until the oldest frame held is due.

        Raises: MediaStreamError, once the track has been stopped.
        """
        while self.readyState == "live":
            if not self._held:
                self._ready.clear()
                await self._ready.wait()
                continue
            wait_s = self._held[0][0] + self._delay_s() - time.monotonic()
            if wait_s <= 0:
                return self._held.popleft()[1]
            # In short steps, because the delay may shrink meanwhile.
            await asyncio.sleep(min(wait_s, POLL_S))
        raise MediaStreamError

    def stop(self) -> None:
        """End the track; who waits in `recv` is told."""
        super().stop()
        self._ready.set()
