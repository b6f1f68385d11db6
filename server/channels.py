"""The data channels of a peer, behind a wall: nothing a peer sends can raise into the transport.

A synchronous handler that raises ends aiortc's DTLS reader and with it the session, so every handler is walled.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections import Counter, deque
from collections.abc import Callable
from typing import TypeVar

from aiortc import InvalidStateError, RTCDataChannel

log = logging.getLogger(__name__)

MAX_MESSAGE_BYTES = 8 * 1024
MAX_MESSAGES = 64
MAX_BAD_MESSAGES = 50
MAX_BUFFERED_BYTES = 64 * 1024
# Said before the page's control channel is up (that the model is loading, say): kept for it.
MAX_EARLY = 8
LABELS = ("control", "telemetry")
T = TypeVar("T")


class Channels:
    """The two channels that the page opens, by label; any other is closed."""

    def __init__(self, counters: Counter[str]) -> None:
        self._counters = counters
        self._channels: dict[str, RTCDataChannel] = {}
        self._messages: deque[str] = deque()
        self._early: deque[str] = deque(maxlen=MAX_EARLY)
        self._changed = asyncio.Event()
        self._ended = False
        self._bad_messages = 0

    def adopt(self, channel: RTCDataChannel) -> None:
        """Take a channel that the peer opened, or close it."""
        known = self._channels.get(channel.label)
        if channel.label not in LABELS or (known is not None and known.readyState == "open"):
            self._counters["channels_refused"] += 1
            channel.close()
            return
        self._channels[channel.label] = channel
        handler = self._take_control if channel.label == "control" else self._take_telemetry
        channel.on("message", walled(handler, self._counters))
        while channel.label == "control" and self._early:
            self.send("control", self._early.popleft())

    async def next_message(self) -> str | None:
        """Wait for the next text of the control channel; None once ended."""
        while not self._messages:
            if self._ended:
                return None
            self._changed.clear()
            await self._changed.wait()
        return self._messages.popleft()

    def send(self, label: str, text: str, *, max_buffered: int | None = None) -> None:
        """Send a text; counted `<label>_unsent` while the channel is not open or has too much buffered.

        Control texts from before the channel's opening are kept for it, the newest MAX_EARLY.
        """
        channel = self._channels.get(label)
        if channel is None and label == "control":
            self._early.append(text)
            return
        is_full = max_buffered is not None and channel is not None and channel.bufferedAmount > max_buffered
        if channel is None or channel.readyState != "open" or is_full:
            self._counters[f"{label}_unsent"] += 1
            return
        try:
            channel.send(text)
        except (InvalidStateError, ConnectionError, ValueError):  # closing, or over the peer's message size
            self._counters[f"{label}_unsent"] += 1

    def end(self) -> None:
        """Take nothing more; who waits in `next_message` gets what is queued and then None."""
        self._ended = True
        self._changed.set()

    def _take_control(self, message: str | bytes) -> None:
        if isinstance(message, bytes):
            self._refuse("binary", "control messages are JSON text, not binary")
        elif len(message) > MAX_MESSAGE_BYTES or len(message.encode(errors="replace")) > MAX_MESSAGE_BYTES:
            self._refuse("too_large", f"a control message has at most {MAX_MESSAGE_BYTES} bytes")
        else:
            if len(self._messages) >= MAX_MESSAGES:
                self._messages.popleft()
                self._counters["control_dropped"] += 1
            self._messages.append(message)
            self._changed.set()

    def _take_telemetry(self, message: str | bytes) -> None:
        self._counters["telemetry_received"] += 1

    def _refuse(self, code: str, message: str) -> None:
        self._counters["control_refused"] += 1
        self._bad_messages += 1
        if self._bad_messages > MAX_BAD_MESSAGES:
            self._channels["control"].close()
        else:
            self.send("control", json.dumps({"v": 1, "type": "error", "code": code, "message": message}))


def walled(handler: Callable[[T], object], counters: Counter[str]) -> Callable[[T], None]:
    """Return a handler that counts what it raises."""

    def safe(argument: T) -> None:
        try:
            handler(argument)
        except Exception:  # the wall: what escapes here ends the session
            counters["handler_errors"] += 1
            log.exception("a handler of a peer connection failed")

    return safe
