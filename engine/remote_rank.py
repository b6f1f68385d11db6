"""A rank on another machine: the messages of `engine.messages` over one TCP connection, frames right behind them.

    server: RemoteRank ──TCP──▶ node: RankHost ──socket, frame memory──▶ rank process (engine.worker, ring_start)
                                another node: start_follower ──TCP──▶ ▲  a further rank of the same ring

Both ends hold a `FrameMemory` of the same layout. A `Submit` is followed by the camera frames of its slot, a `Done` by
the restyled ones, as they lie in memory. Uncompressed, a stream of 256x256 at 24 frames/s is 4.7 MB/s each way; nothing
has to be encoded for it, and a frame waits for no other connection.

Clocks of two machines differ. Instants travel as seconds from the moment of sending, so what they lose is the way over
the network, half a round trip. Whoever connects first names a secret that the host was started with; what goes over
the wire is not encrypted: both belong on one private network, as Ray does.

The ranks of a ring over several machines are started one by one. Each after the first connects to rank 0's host, which
hands the connection to rank 0's process: it tells where the ranks meet, and its end is the end of the other side.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
import os
import secrets
import socket
import time
from collections.abc import Callable
from typing import TypeVar, cast

import psutil

from engine.api import Frames
from engine.config import EngineSettings
from engine.frame_memory import FrameLayout, FrameMemory
from engine.launch import RankProcess, start_process
from engine.messages import (
    MAX_LINE_BYTES,
    Done,
    FromRank,
    Submit,
    ToRank,
    decode_from_rank,
    decode_to_rank,
    encode,
)
from engine.ring_start import Place

log = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 10.0
SECRET_TIMEOUT_S = 5.0
CLOSE_TIMEOUT_S = 2.0
# A machine that vanishes closes no connection: after so long without an answer it is gone.
SILENCE_S = 3

INSTANTS = {"submit": ("deadline",), "done": ("started_at", "finished_at")}

Message = TypeVar("Message", bound=ToRank | FromRank)


class RemoteRank:
    """A rank behind a `RankHost` (`engine.launch.Rank`)."""

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        memory: FrameMemory,
        on_stop: Callable[[], None],
    ) -> None:
        self._on_stop = on_stop
        self._reader = reader
        self._writer = writer
        self._frames = _Frames(memory)
        # A `Done` whose frames are still on their way: `receive` may be cancelled between the two.
        self._head: FromRank | None = None
        self._why = "connection closed"

    @classmethod
    async def connect(
        cls, host: str, port: int, secret: str, memory: FrameMemory, *, on_stop: Callable[[], None] = lambda: None
    ) -> RemoteRank:
        """Connect to a host, which then starts its rank. on_stop: gives its place back; must not wait.

        Raises: OSError, TimeoutError included.
        """
        async with asyncio.timeout(CONNECT_TIMEOUT_S):
            reader, writer = await asyncio.open_connection(host, port, limit=MAX_LINE_BYTES)
        _notice_silence(writer.get_extra_info("socket"))
        writer.write(secret.encode() + b"\n")
        return cls(reader, writer, memory, on_stop)

    @property
    def pid(self) -> None:
        """See `Rank.pid`: it is not on this machine."""
        return

    def send(self, message: ToRank) -> None:
        """See `Rank.send`."""
        if not self._writer.is_closing():
            self._frames.write(self._writer, message)

    async def receive(self) -> FromRank | None:
        """See `Rank.receive`."""
        if self._head is None:
            line = await self._reader.readline()
            if not line:
                return None
            self._head = decode_from_rank(line)
        try:
            await self._frames.read(self._reader, self._head)
        except asyncio.IncompleteReadError:
            return None
        message, self._head = self._head, None
        return _from_now(message, time.monotonic())

    def leave(self, why: str) -> None:
        """Give the rank up, as though it were lost: its streams go elsewhere."""
        self._why = why
        self._writer.close()

    async def stop(self) -> str:
        """See `Rank.stop`: the host stops the rank when the connection ends."""
        await _close(self._writer)
        self._on_stop()
        return self._why


class RankHost:
    """One rank on this machine for one server elsewhere. Frames and rank are gone with the server's connection."""

    def __init__(self, settings: EngineSettings, place: Place | None = None) -> None:
        """place: of rank 0 of a ring whose other ranks connect here before the server does, see `start_follower`."""
        self._settings = settings
        self._place = place
        # File descriptors of the connections to the other ranks.
        self._others: dict[int, int] = {}
        self._missing = set(range(1, settings.rank_count)) if place else set()
        self._all_there = asyncio.Event()
        self._secret = secrets.token_hex(32)
        self._taken = False
        self._ended = asyncio.Event()
        self._server: asyncio.Server | None = None

    async def open(self, address: str) -> tuple[int, str]:
        """Listen on an address of this machine; returns the port, and the secret that others must send first.

        Raises: OSError.
        """
        self._server = await asyncio.start_server(self._serve, address, 0, limit=MAX_LINE_BYTES)
        port: int = self._server.sockets[0].getsockname()[1]
        return port, self._secret

    async def close(self) -> None:
        """Listen no more, and return once the rank of a connection that has ended is gone."""
        if self._server is not None:
            self._server.close()
        if self._taken:
            await self._ended.wait()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(SECRET_TIMEOUT_S):
                line = await reader.readline()
        except (TimeoutError, ConnectionError, ValueError):
            line = b""
        secret, _, rank = line.strip().partition(b" ")
        known = hmac.compare_digest(secret, self._secret.encode())
        if known and rank:
            self._take_in(rank, writer)
        if not known or rank or self._taken:
            await _close(writer)
            return
        self._taken = True
        _notice_silence(writer.get_extra_info("socket"))
        await self._serve_server(reader, writer)

    def _take_in(self, rank: bytes, writer: asyncio.StreamWriter) -> None:
        """Keep the connection of another rank for rank 0's process."""
        number = int(rank) if rank.isdigit() else 0
        if number not in self._missing:
            return
        connection: socket.socket = writer.get_extra_info("socket")
        _notice_silence(connection)
        self._others[number] = os.dup(connection.fileno())
        self._missing.discard(number)
        if not self._missing:
            self._all_there.set()

    async def _serve_server(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        memory = FrameMemory.create(FrameLayout.of(self._settings))
        try:
            rank = await self._start(memory)
            frames = _Frames(memory)
            ways = [
                asyncio.create_task(_to_rank(reader, rank, frames)),
                asyncio.create_task(_from_rank(rank, writer, frames)),
            ]
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
            for way in ways:
                way.cancel()
            for result in await asyncio.gather(*ways, return_exceptions=True):
                if isinstance(result, Exception):
                    log.warning("rank given up: %s", result)
            # First, so that the server knows while the rank is still on its way out.
            await _close(writer)
            log.info("rank stopped: %s", await rank.stop())
        except OSError as error:
            log.error("the rank cannot be started: %s", error)
        finally:
            await _close(writer)
            memory.close()
            self._ended.set()

    async def _start(self, memory: FrameMemory) -> RankProcess:
        """Start the rank, once those that it needs are there. Raises OSError."""
        assert self._server is not None
        try:
            if self._missing:
                async with asyncio.timeout(CONNECT_TIMEOUT_S):
                    await self._all_there.wait()
            others = [fd for _, fd in sorted(self._others.items())]
            return await RankProcess.start(self._settings, memory, self._place, others)
        except TimeoutError:
            missing = ", ".join(map(str, sorted(self._missing)))
            raise TimeoutError(f"rank {missing} did not connect in {CONNECT_TIMEOUT_S:.0f} s") from None
        finally:
            self._server.close()
            # The rank's process has its own.
            for fd in self._others.values():
                os.close(fd)
            self._others.clear()


async def start_follower(
    settings: EngineSettings, rank: int, place: Place, port: int, secret: str
) -> asyncio.subprocess.Process:
    """Start a rank after the first on this machine. It ends with rank 0, and on Linux with this process.

    port, secret: of the `RankHost` of rank 0, at place.host. Raises: OSError.
    """
    try:
        connection = await asyncio.to_thread(socket.create_connection, (place.host, port), CONNECT_TIMEOUT_S)
    except OSError as error:
        raise ConnectionError(
            f"rank {rank} cannot reach rank 0 at {place.host}: {error}; nodes must reach each other at all ports"
        ) from error
    with connection:
        _notice_silence(connection)
        connection.sendall(f"{secret} {rank}\n".encode())
        arguments = [str(connection.fileno()), str(rank), settings.model_dump_json(), "follow", place.text]
        return await start_process("engine.ring_start", arguments, settings.threads, [connection.fileno()])


def interface_of(address: str) -> str:
    """The network interface of this machine that has an address. Raises OSError."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(each.address == address for each in addresses):
            return str(name)
    raise OSError(f"no network interface of this machine has the address {address} that it is known by in the cluster")


async def _to_rank(reader: asyncio.StreamReader, rank: RankProcess, frames: _Frames) -> None:
    while line := await reader.readline():
        message = decode_to_rank(line)
        await frames.read(reader, message)
        rank.send(_from_now(message, time.monotonic()))


async def _from_rank(rank: RankProcess, writer: asyncio.StreamWriter, frames: _Frames) -> None:
    while (message := await rank.receive()) is not None:
        frames.write(writer, message)


class _Frames:
    """Messages with their frames, over one connection. A slot comes back with as many frames as it went out with."""

    def __init__(self, memory: FrameMemory) -> None:
        self._memory = memory
        self._counts: dict[tuple[int, int], int] = {}

    def write(self, writer: asyncio.StreamWriter, message: ToRank | FromRank) -> None:
        """Queue a message and its frames: no more of them than there are slots."""
        writer.write(encode(_from_now(message, -time.monotonic())))
        if isinstance(message, Submit | Done):
            writer.write(self._slot(message).tobytes())

    async def read(self, reader: asyncio.StreamReader, message: ToRank | FromRank) -> None:
        """Put the frames of a message, where it has some, into its slot. Raises IncompleteReadError, ValueError."""
        if isinstance(message, Submit | Done):
            slot = self._slot(message)
            slot.data.cast("B")[:] = await reader.readexactly(slot.nbytes)

    def _slot(self, message: Submit | Done) -> Frames:
        place = (message.stream, message.slot)
        if isinstance(message, Submit):
            self._counts[place] = message.frames
        if place not in self._counts:
            raise ValueError(f"slot {message.slot} of stream {message.stream} came back and was never sent")
        return self._memory.slot(*place, self._counts[place])


def _from_now(message: Message, now: float) -> Message:
    """The message with `now` added to its instants."""
    instants = {name: getattr(message, name) + now for name in INSTANTS.get(message.kind, ())}
    return cast(Message, message.model_copy(update=instants))


def _notice_silence(connection: socket.socket) -> None:
    """Have the kernel ask a silent peer, and end the connection when it does not answer for SILENCE_S."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (
        ("TCP_KEEPIDLE", 1),
        ("TCP_KEEPINTVL", 1),
        ("TCP_KEEPCNT", SILENCE_S - 1),
        ("TCP_USER_TIMEOUT", SILENCE_S * 1000),
    ):
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


async def _close(writer: asyncio.StreamWriter) -> None:
    writer.close()
    with contextlib.suppress(OSError, TimeoutError):
        async with asyncio.timeout(CLOSE_TIMEOUT_S):
            await writer.wait_closed()
