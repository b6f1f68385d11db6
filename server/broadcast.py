"""One stream for many viewers: what a publisher's session releases is encoded once a codec and sent to everyone.

    session -> Broadcast.push -> Lanes per codec that somebody watches (lanes.py) -> viewers (viewers.py) -> senders

A viewer may ask for the person alone (matte.py): that is another form of the picture, with lanes of its own.

Without viewers nothing is encoded. A broadcast outlives its publisher: while nobody publishes, viewers see the last
picture, darkened, once a second, and the picture goes on when a publisher returns.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from concurrent.futures import Executor
from dataclasses import replace

from aiortc.rtcrtpparameters import RTCRtpCodecParameters

from server.encoding import AUDIO_RATE, AudioEncoder
from server.frames import OutgoingFrame
from server.lanes import Lanes
from server.matte import Cutter, Form, MatteProcess
from server.peer import Peer
from server.settings import MediaSettings
from server.viewers import Encoded, Pictures, Sound, Subscription

REPEAT_S = 1.0


class Broadcast:
    """One published stream. It is the outlet of the publisher's session; `close` when the stream is over."""

    def __init__(self, settings: MediaSettings, executor: Executor, matte: MatteProcess) -> None:
        self.counters: Counter[str] = Counter()
        """What was encoded, sent to viewers and dropped, by name; read only."""
        self._settings = settings
        self._executor = executor
        self._matte = matte
        self._cutter: Cutter | None = None
        self._lanes: dict[tuple[str, Form], Lanes] = {}
        self._listeners: set[Sound] = set()
        self._born_at = time.monotonic()
        self._last: OutgoingFrame | None = None
        self._pushed_at = 0.0
        self._task = asyncio.create_task(self._stand_in(), name="broadcast/stand-in")

    # --- from the publisher's session

    def push(self, frame: OutgoingFrame) -> None:
        """Release a picture to everyone who watches. Never waits, never raises."""
        self._last, self._pushed_at = frame, time.monotonic()
        self._deliver(Form.PLAIN, frame)
        if self._cutter is not None:
            self._cutter.push(frame)

    def _deliver(self, form: Form, frame: OutgoingFrame) -> None:
        now = time.monotonic()
        for (_, wanted), lanes in self._lanes.items():
            if wanted is form:
                lanes.push(frame, now)

    def _cut_forms(self) -> set[Form]:
        return {form for _, form in self._lanes if form is not Form.PLAIN}

    async def serve(self, peer: Peer) -> None:
        """Carry the publisher's sound for as long as it is there; its pictures come by `push`."""
        encoder = AudioEncoder()
        shift: int | None = None
        try:
            while (sound := await peer.next_sound()) is not None:
                if not self._listeners:
                    shift = None
                    continue
                packets = await asyncio.get_running_loop().run_in_executor(self._executor, encoder.encode, sound)
                for ticks, payload, level in packets:
                    if shift is None:
                        # The publisher's clock is another one at its return; the viewers' goes on.
                        shift = round((time.monotonic() - self._born_at) * AUDIO_RATE) - ticks
                    self._send_sound(Encoded([payload], ticks + shift, audio_level=level))
            await peer.wait_until_gone()
        finally:
            if self._last is not None:
                self._last = replace(self._last, rgb=self._last.rgb // 2)

    def _send_sound(self, packet: Encoded) -> None:
        self.counters["sound_encoded"] += 1
        for listener in self._listeners:
            listener.push(packet)

    # --- to the viewers

    def listen(self, sound: Sound) -> None:
        """Send sound to a viewer from now on."""
        if sound.readyState == "live":
            self._listeners.add(sound)

    def watch(self, pictures: Pictures, codec: RTCRtpCodecParameters, form: Form) -> None:
        """Send pictures to a viewer from now on."""
        if pictures.readyState != "live":
            return
        lanes = self._lanes.get((codec.name, form))
        if lanes is None:
            lanes = Lanes(codec, self._settings, self._executor, self.counters, self._born_at)
            self._lanes[codec.name, form] = lanes
        if form is not Form.PLAIN and self._cutter is None:
            self._cutter = Cutter(self._matte, self._executor, self.counters, self._cut_forms, self._deliver)
        lanes.add(pictures)
        if self._last is not None and form is Form.PLAIN:
            lanes.push(self._last, time.monotonic())
        elif self._last is not None and self._cutter is not None:
            self._cutter.push(self._last)

    def unsubscribe(self, subscription: Subscription) -> None:
        """Send nothing more; the last one of a codec ends its encoder. Harmless when repeated."""
        self._listeners.discard(subscription)
        for key, lanes in list(self._lanes.items()):
            lanes.discard(subscription)
            if not lanes.viewers:
                lanes.stop()
                del self._lanes[key]
        if self._cutter is not None and not self._cut_forms():
            self._cutter.stop()
            self._cutter = None

    def close(self) -> None:
        """End every subscription and encoder."""
        self._task.cancel()
        viewers = [viewer for lanes in self._lanes.values() for viewer in lanes.viewers]
        for subscription in (*self._listeners, *viewers):
            subscription.stop()

    async def _stand_in(self) -> None:
        """While no picture comes, send the last one again, so that who arrives sees something."""
        while True:
            await asyncio.sleep(REPEAT_S)
            now = time.monotonic()
            if self._last is not None and now - self._pushed_at >= REPEAT_S:
                self.counters["frames_repeated"] += len(self._lanes)
                self._deliver(Form.PLAIN, self._last)
                if self._cutter is not None:
                    self._cutter.push(self._last)
