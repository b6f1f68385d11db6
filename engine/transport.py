"""Tensors between the ranks of one ring: pieces of a fixed size, receives posted ahead, private buffers each way.

A message is a row of numbers, the words, and a payload of tensors one after another. Words travel as float64: whole
numbers up to 2**53 and every float32 come out as they went in; the shapes of the tensors are among them. A payload is
cut into pieces of one fixed size, so that the receive of the next message is posted before it is sent: buffers for two
pieces, or for the largest usual message and one more. Most messages are one piece.

gloo reads a buffer after `isend` has returned, so a message is copied into a private one, and a buffer is filled again
only once its last send is done. Between two ranks on the CPU of one machine payloads lie in memory that both share
(`engine.shared_pieces`): the sender offers it as the wire is opened, and they are there before their words are. On a
GPU words stay on the host (gloo) and payloads go by NCCL: that path is written and has never been run by us.
"""

import itertools
import math
import os
import socket
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import TCPStore

from engine.ring_start import LOOPBACK
from engine.shared_pieces import OFFER_NUMBERS, Late, SharedPieces, fill

DEPTH = 2
# What a message may hold: so many tensors, of so many axes.
TENSORS = 4
AXES = 5
HOST = LOOPBACK
# Waiting for work has no other end: a peer that dies breaks the connection at once.
IDLE_LIMIT_S = 30 * 86_400.0
JOIN_TIMEOUT_S = 60.0


class PeerGone(Exception):
    """A peer's connection broke or a send was not taken in time."""


@dataclass(frozen=True)
class WireShape:
    """What one wire carries: words a message, values a piece of its payload and of its largest one, and where those
    lie."""

    words: int
    values: int
    largest: int
    dtype: torch.dtype
    device: torch.device

    @property
    def row(self) -> int:
        """Numbers of a message: pieces, shapes and words."""
        return 1 + TENSORS * AXES + self.words

    @property
    def pieces(self) -> int:
        """Buffers for the payload at each end."""
        return max(DEPTH, math.ceil(self.largest / self.values) + 1)


@dataclass(frozen=True)
class Wire:
    """A named way for messages; both groups hold all ranks."""

    words: dist.ProcessGroup
    payload: dist.ProcessGroup
    shape: WireShape


@dataclass(frozen=True)
class Message:
    """words: as they were sent. tensors: likewise, as views of one row."""

    words: list[float]
    tensors: list[Tensor]


def open_store(host: str, *, timeout_s: float) -> TCPStore:
    """The store where ranks meet, on a free port of an address of this machine and of no other. Raises OSError."""
    listener = socket.create_server((host, 0))
    return TCPStore(
        host,
        listener.getsockname()[1],
        None,
        True,
        timeout=timedelta(seconds=timeout_s),
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )


def meet(rank: int, ranks: int, port: int, *, host: str = HOST, interface: str = "lo") -> None:
    """Join the process group whose store listens at host:port. Blocks until all ranks have come, at most a minute.

    interface: network interface of this machine that the other ranks reach, where gloo listens.
    """
    os.environ["GLOO_SOCKET_IFNAME"] = interface
    limit = timedelta(seconds=JOIN_TIMEOUT_S)
    store = TCPStore(host, port, None, False, timeout=limit)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=limit)


def open_wire(shape: WireShape) -> Wire:
    """Make a wire; every rank does so, in one order."""
    payload = "nccl" if shape.device.type == "cuda" else "gloo"
    return Wire(dist.new_group(backend="gloo"), dist.new_group(backend=payload), shape)


@dataclass
class Traffic:
    """What one end of a wire has done so far. cpu_s: of the thread that packs or unpacks, copies and calls; what
    torch's own threads do beside it is not in it. waited_s: for a free buffer to send from."""

    cpu_s: float = 0.0
    waited_s: float = 0.0
    bytes: int = 0

    def __add__(self, other: "Traffic") -> "Traffic":
        return Traffic(self.cpu_s + other.cpu_s, self.waited_s + other.waited_s, self.bytes + other.bytes)

    def since(self, before: "Traffic") -> tuple[float, int]:
        """Seconds, waiting to send included, and bytes since then."""
        seconds = self.cpu_s + self.waited_s - before.cpu_s - before.waited_s
        return seconds, self.bytes - before.bytes


class Outbox:
    """Sends to one rank. Returns as soon as a buffer is free, which bounds what is under way."""

    def __init__(self, wire: Wire, to: int, *, timeout_s: float, share: bool = True) -> None:
        """Offer memory to the receiver, where it can be shared, and do not wait for its answer.

        Args:
            timeout_s: how long the receiver may leave a message untaken. share: for comparisons.
        """
        shape = wire.shape
        self.traffic = Traffic()
        self._wire, self._to, self._timeout = wire, to, timedelta(seconds=timeout_s)
        words = [torch.zeros(shape.row, dtype=torch.float64) for _ in range(DEPTH)]
        self._words: deque[tuple[Tensor, dist.Work | None]] = deque((buffer, None) for buffer in words)
        self._pieces: deque[tuple[Tensor, dist.Work | None]] = deque()
        self._shared, offer = None, [0] * OFFER_NUMBERS
        if share and shape.device.type == "cpu":
            self._shared, offer = SharedPieces.create(shape.pieces, shape.values, shape.dtype)
        self._offer, self._taken = torch.tensor(offer), torch.zeros(1, dtype=torch.int64)
        self._offering: tuple[dist.Work | None, ...] = (
            dist.isend(self._offer, to, wire.words),
            dist.irecv(self._taken, to, wire.words),
        )

    @property
    def shares(self) -> bool:
        """Whether payloads go by shared memory. Raises PeerGone, when the receiver does not say."""
        for work in self._offering:
            _wait(work, self._timeout)
        if self._offering:
            self._offering = ()
            if self._shared is not None:
                self._shared.settle()
            if not self._taken.item():
                shape, self._shared = self._wire.shape, None
                empty = (torch.zeros(shape.values, dtype=shape.dtype, device=shape.device) for _ in range(shape.pieces))
                self._pieces.extend((buffer, None) for buffer in empty)
        return self._shared is not None

    def send(self, words: Sequence[float], tensors: Sequence[Tensor] = ()) -> None:
        """Copy a message and send it on its way.

        Raises: PeerGone; ValueError for more than `TENSORS` tensors, or more axes than `AXES`.
        """
        began = time.thread_time()
        if len(tensors) > TENSORS or any(not 0 < tensor.dim() <= AXES for tensor in tensors):
            raise ValueError(f"a message holds at most {TENSORS} tensors of 1 to {AXES} axes")
        pieces = _cut([tensor.reshape(-1) for tensor in tensors], self._wire.shape.values)
        shapes = [[*tensor.shape, *[0] * (AXES - tensor.dim())] for tensor in tensors]
        numbers = [len(pieces), *itertools.chain.from_iterable(shapes), *[0] * AXES * (TENSORS - len(tensors))]
        # What finds room in shared memory is there before the words that tell of it.
        ahead = self._shared.free if self.shares and self._shared is not None else 0
        for piece in pieces[:ahead]:
            self._put_piece(piece)
        self._put(self._words, self._wire.words, [torch.tensor([*numbers, *words], dtype=torch.float64)])
        for piece in pieces[ahead:]:
            self._put_piece(piece)
        self.traffic.cpu_s += time.thread_time() - began

    def flush(self) -> None:
        """Wait until all that was sent is taken. Raises PeerGone."""
        for _, work in (*self._words, *self._pieces):
            _wait(work, self._timeout)

    def _put_piece(self, piece: Sequence[Tensor]) -> None:
        if self._shared is None:
            self._put(self._pieces, self._wire.payload, piece)
            return
        try:
            self.traffic.waited_s += self._shared.put(piece, self._timeout.total_seconds())
        except Late as late:
            raise PeerGone(f"rank {self._to}: {late}") from late
        self.traffic.bytes += sum(part.nbytes for part in piece)

    def _put(
        self, buffers: deque[tuple[Tensor, dist.Work | None]], group: dist.ProcessGroup, values: Sequence[Tensor]
    ) -> None:
        buffer, work = buffers.popleft()
        began = time.perf_counter()
        _wait(work, self._timeout)
        self.traffic.waited_s += time.perf_counter() - began
        self.traffic.bytes += buffer.nbytes
        fill(buffer, values)
        try:
            buffers.append((buffer, dist.isend(buffer, self._to, group)))
        except RuntimeError as error:
            raise PeerGone(f"rank {self._to}: {error}") from error


class Inbox:
    """Receives from one rank, with the next receives always posted."""

    def __init__(self, wire: Wire, source: int, *, timeout_s: float) -> None:
        """Answer the sender's offer of memory, for which it is waited at most timeout_s, and post the first receives.

        Raises: PeerGone.
        """
        shape = wire.shape
        self.traffic = Traffic()
        self._wire, self._source, self._timeout_s = wire, source, timeout_s
        self._words: deque[tuple[Tensor, dist.Work | None]] = deque()
        self._pieces: deque[tuple[Tensor, dist.Work | None]] = deque()
        self._shared = self._accept(wire, source, timeout_s)
        for _ in range(DEPTH):
            self._post(self._words, wire.words, torch.zeros(shape.row, dtype=torch.float64))
        for _ in range(0 if self._shared is not None else shape.pieces):
            piece = torch.zeros(shape.values, dtype=shape.dtype, device=shape.device)
            self._post(self._pieces, wire.payload, piece)

    def receive(self) -> Message:
        """The next message; blocks until it is there. Raises PeerGone."""
        shape = self._wire.shape
        began = time.thread_time()
        row = torch.empty(shape.row, dtype=torch.float64)
        self._take(self._words, self._wire.words, row)
        count, *numbers = row.tolist()
        payload = torch.empty(int(count) * shape.values, dtype=shape.dtype, device=shape.device)
        for piece in torch.split(payload, shape.values) if count else ():
            self._take_piece(piece)
        tensors, start = [], 0
        for place in range(0, TENSORS * AXES, AXES):
            size = [int(length) for length in numbers[place : place + AXES] if length]
            if size:
                end = start + math.prod(size)
                tensors.append(payload[start:end].view(size))
                start = end
        self.traffic.cpu_s += time.thread_time() - began
        return Message(numbers[TENSORS * AXES :], tensors)

    @staticmethod
    def _accept(wire: Wire, source: int, timeout_s: float) -> SharedPieces | None:
        shape, limit = wire.shape, timedelta(seconds=timeout_s)
        offer, shared = torch.zeros(OFFER_NUMBERS, dtype=torch.int64), None
        try:
            _wait(dist.irecv(offer, source, wire.words), limit)
            shared = SharedPieces.join(offer.tolist(), shape.pieces, shape.values, shape.dtype)
            _wait(dist.isend(torch.tensor([int(shared is not None)]), source, wire.words), limit)
        except RuntimeError as error:
            raise PeerGone(f"rank {source}: {error}") from error
        return shared

    def _take_piece(self, into: Tensor) -> None:
        if self._shared is None:
            self._take(self._pieces, self._wire.payload, into)
            return
        try:
            self._shared.take(into, self._timeout_s)
        except Late as late:
            raise PeerGone(f"rank {self._source}: {late}") from late
        self.traffic.bytes += into.nbytes

    def _take(self, buffers: deque[tuple[Tensor, dist.Work | None]], group: dist.ProcessGroup, into: Tensor) -> None:
        buffer, work = buffers.popleft()
        _wait(work, timedelta(seconds=IDLE_LIMIT_S))
        self.traffic.bytes += buffer.nbytes
        into.copy_(buffer)
        self._post(buffers, group, buffer)

    def _post(self, buffers: deque[tuple[Tensor, dist.Work | None]], group: dist.ProcessGroup, buffer: Tensor) -> None:
        try:
            buffers.append((buffer, dist.irecv(buffer, self._source, group)))
        except RuntimeError as error:
            raise PeerGone(f"rank {self._source}: {error}") from error


def _cut(rows: Sequence[Tensor], values: int) -> list[list[Tensor]]:
    """Rows, one after another, in pieces of so many values: each what it consists of."""
    pieces: list[list[Tensor]] = []
    room = 0
    for row in rows:
        start = 0
        while start < row.shape[0]:
            if not room:
                pieces.append([])
                room = values
            part = row[start : start + room]
            pieces[-1].append(part)
            start, room = start + part.shape[0], room - part.shape[0]
    return pieces


def _wait(work: dist.Work | None, limit: timedelta) -> None:
    if work is None:
        return
    try:
        work.wait(limit)
    except RuntimeError as error:
        raise PeerGone(str(error)) from error
