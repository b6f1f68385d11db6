"""OSC in: steer sessions from a lighting desk, TouchOSC, Max or a script (docs/steering.md).

    /livebrush/{stream or session id or *}/{prompt|blend|strength|steps|seed|transition|recache|bypass|scene} values

python-osc parses. The rest is ours: nobody is told of a mistake over UDP, so mistakes are counted, and logged once a
second at most; and a fader sends a hundred values a second, so what comes in quickly is joined before it is applied.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

from prometheus_client import Counter
from pydantic import TypeAdapter, ValidationError

from server.control import ControlError, SceneMove, SessionChange, TokenBucket
from server.errors import ServerError
from server.session import Session
from server.steering import Steering

log = logging.getLogger(__name__)

ROOT = "livebrush"
MAX_DATAGRAM_BYTES = 8 * 1024
DATAGRAMS_PER_S = 500.0
DATAGRAMS_BURST = 1000
# Values that came within this are applied together; about a chunk's time.
JOIN_S = 0.05
BUNDLE = b"#bundle\0"
TIME_TAG_BYTES = 8
LOG_PERIOD_S = 1.0
PARAMETERS = ("prompt", "blend", "strength", "steps", "seed", "transition", "recache", "bypass")
_scene_move: TypeAdapter[int | str] = TypeAdapter(SceneMove)


class OscError(OSError):
    """OSC cannot be listened to; the text says why and what to do."""


class OscRefused(Exception):
    """A message that is not followed: what was wrong, and the bound."""


class OscListener(asyncio.DatagramProtocol):
    """Takes datagrams, steers, counts."""

    def __init__(
        self,
        steering: Steering,
        count: Counter,
        clock: Callable[[], float],
        parse: Callable[[bytes], list[tuple[str, list[Any]]]],
    ) -> None:
        self._steering = steering
        self._count = count
        self._clock = clock
        self._parse = parse
        self._bucket = TokenBucket(DATAGRAMS_PER_S, DATAGRAMS_BURST)
        # By session id; as many as there are sessions.
        self._pending: dict[str, tuple[Session, dict[str, object]]] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._refused = 0
        self._logged_at = float("-inf")

    def datagram_received(self, data: bytes, addr: tuple[str | Any, int]) -> None:
        """Called by asyncio. Raises nothing: whatever a datagram holds, the next one is read."""
        if not self._bucket.take(self._clock()):
            self._refuse("too_fast", f"over {DATAGRAMS_PER_S:.0f} datagrams a second")
            return
        if len(data) > MAX_DATAGRAM_BYTES:
            self._refuse("broken", f"a datagram of {len(data)} bytes, over the {MAX_DATAGRAM_BYTES} that are read")
            return
        try:
            messages = self._parse(data)
        except Exception as error:  # noqa: BLE001  (a parser of foreign bytes: it raises more kinds than it says)
            self._refuse("broken", f"no OSC: {error!r}")
            return
        for address, values in messages:
            try:
                self._follow(address, values)
            except (OscRefused, ServerError, ControlError) as error:
                self._refuse("refused", f"{error} (at {address[:120]})")
            else:
                self._count.labels("applied").inc()

    def error_received(self, exc: Exception) -> None:
        """Called by asyncio for an ICMP error; nothing is ever sent, so there is nothing to do."""

    def close(self) -> None:
        """Apply what is left."""
        self._apply()

    def _follow(self, address: str, values: list[Any]) -> None:
        """Raises OscRefused, ControlError, or NotFound."""
        parts = address.split("/")
        if len(parts) != 4 or parts[1] != ROOT:
            raise OscRefused(f"an address is /{ROOT}/STREAM/PARAMETER")
        _, _, target, name = parts
        if name == "scene":
            self._apply()
            move = _scene(values)
            for session in self._steering.find(target):
                session.controls.scenes.move(move)
            return
        change = _change(name, values)
        for session in self._steering.find(target):
            _, pending = self._pending.setdefault(session.id, (session, {}))
            if "prompt" in change:
                pending.pop("blend", None)
            pending.update(change)
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(JOIN_S, self._apply)

    def _apply(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        pending, self._pending = self._pending, {}
        for session, change in pending.values():
            try:
                session.controls.restyle(SessionChange.model_validate(change), by="osc")
            except (ControlError, ValidationError) as error:
                self._refuse("refused", str(error))

    def _refuse(self, what: str, why: str) -> None:
        self._count.labels(what).inc()
        self._refused += 1
        now = self._clock()
        if now - self._logged_at >= LOG_PERIOD_S:
            log.warning("OSC: %d messages not followed; the last: %s", self._refused, why[:300])
            self._logged_at, self._refused = now, 0


def _change(name: str, values: list[Any]) -> dict[str, object]:
    """The values of one message as fields of a SessionChange, checked. Raises OscRefused."""
    if name not in PARAMETERS:
        raise OscRefused(f"no such parameter; there are {', '.join(PARAMETERS)} and scene")
    if name == "blend":
        if len(values) % 2:
            raise OscRefused("blend takes pairs: a text and its weight")
        weighted = [{"text": text, "weight": weight} for text, weight in zip(values[::2], values[1::2], strict=True)]
        change: dict[str, object] = {"blend": weighted}
    elif len(values) != 1:
        raise OscRefused(f"{name} takes one value, not {len(values)}")
    else:
        field = "transition_s" if name == "transition" else name
        change = {field: _number(name, values[0])}
    try:
        SessionChange.model_validate(change)
    except ValidationError as error:
        first = error.errors()[0]
        raise OscRefused(f"{first['msg']}; got {str(first.get('input'))[:40]!r}") from error
    return change


def _number(name: str, value: Any) -> Any:
    """Faders and buttons send floats for everything: whole ones are integers, 0 and 1 are off and on."""
    if name in ("steps", "seed") and isinstance(value, float) and value.is_integer():
        return int(value)
    if name in ("recache", "bypass") and value in (0, 1):
        return bool(value)
    # Of 32 bits: 0.3 comes as 0.30000001192.
    return round(value, 6) if isinstance(value, float) else value


def _scene(values: list[Any]) -> Any:
    if len(values) != 1:
        raise OscRefused("scene takes one value: a number from 0, next, previous, play or stop")
    try:
        return _scene_move.validate_python(_number("steps", values[0]), strict=True)
    except ValidationError as error:
        raise OscRefused("scene takes a number from 0, next, previous, play or stop") from error


def load_parser() -> Callable[[bytes], list[tuple[str, list[Any]]]]:
    """python-osc as a function. Raises OscError where it is not installed."""
    try:
        from pythonosc.osc_message import OscMessage
    except ImportError as error:
        raise OscError("OSC needs the package python-osc: pip install 'livebrush[osc]'") from error

    def parse(data: bytes) -> list[tuple[str, list[Any]]]:
        messages = [OscMessage(one) for one in unbundled(data)]
        return [(one.address, one.params) for one in messages]

    return parse


def unbundled(data: bytes) -> Iterator[bytes]:
    """The messages of a datagram, in order; their times are not waited for. Raises ValueError for a broken bundle.

    Our own, because python-osc's goes round for ever in a bundle that has an element of size -4.
    """
    waiting = [data]
    while waiting:
        packet = waiting.pop()
        if not packet.startswith(BUNDLE):
            if not packet.startswith(b"/"):
                raise ValueError("a packet begins with / or #bundle")
            yield packet
            continue
        elements, at = [], len(BUNDLE) + TIME_TAG_BYTES
        while at < len(packet):
            end = at + 4 + int.from_bytes(packet[at : at + 4], "big", signed=True)
            if not at + 4 < end <= len(packet):
                raise ValueError(f"a bundle of {len(packet)} bytes has an element from {at} to {end}")
            elements.append(packet[at + 4 : end])
            at = end
        waiting += reversed(elements)


@contextlib.asynccontextmanager
async def listening(
    host: str, port: int | None, steering: Steering, count: Counter, clock: Callable[[], float]
) -> AsyncIterator[int | None]:
    """Listen within the context; yields the port, None where none was asked for. Raises OscError."""
    if port is None:
        yield None
        return
    parse = load_parser()
    try:
        transport, listener = await asyncio.get_running_loop().create_datagram_endpoint(
            lambda: OscListener(steering, count, clock, parse), local_addr=(host, port)
        )
    except OSError as error:
        text = f"OSC cannot listen on {host}, UDP port {port}: {error.strerror}; choose another with --osc-port"
        raise OscError(text) from error
    try:
        address, port = transport.get_extra_info("sockname")[:2]
        log.info("OSC on %s, UDP port %d", host, port)
        if not ipaddress.ip_address(address).is_loopback:
            log.warning("OSC knows no tokens: whoever reaches %s, UDP port %d, steers every session", host, port)
        logging.getLogger().addFilter(_not_of_python_osc)
        yield port
    finally:
        logging.getLogger().removeFilter(_not_of_python_osc)
        listener.close()
        transport.close()


def _not_of_python_osc(record: logging.LogRecord) -> bool:
    """It logs every type that it does not know to the root logger: thousands of lines for one datagram."""
    return "pythonosc" not in record.pathname
