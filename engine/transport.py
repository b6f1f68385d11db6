"""Tensors between the ranks of one ring: fixed shapes, receives posted ahead, two buffers each way.

A message is a row of numbers, the words, and a payload of tensors one after another. Words travel as float64: whole
numbers up to 2**53 and every float32 come out as they went in. A payload is cut into pieces of one fixed size, so that
no shape is ever announced and the receive of the next message is posted before it is sent; most are one piece.

gloo reads a buffer after `isend` has returned, so a message is copied into a private one, and a buffer is filled again
only once its last send is done. On a GPU words stay on the host (gloo) and payloads go by NCCL: that path is written
and has never been run by us.
"""

import os
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import TCPStore

DEPTH = 2
HOST = "127.0.0.1"
# Waiting for work has no other end: a peer that dies breaks the connection at once.
IDLE_LIMIT_S = 30 * 86_400.0
JOIN_TIMEOUT_S = 60.0


class PeerGone(Exception):
    """A peer's connection broke or a send was not taken in time."""


@dataclass(frozen=True)
class WireShape:
    """What one wire carries: words a message, values a piece of its payload, and where those lie."""

    words: int
    values: int
    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True)
class Wire:
    """A named way for messages; both groups hold all ranks."""

    words: dist.ProcessGroup
    payload: dist.ProcessGroup
    shape: WireShape


@dataclass(frozen=True)
class Message:
    """words: as they were sent. payload: all pieces in one row, the end of the last one without meaning."""

    words: list[float]
    payload: Tensor

    def split(self, *shapes: Sequence[int]) -> list[Tensor]:
        """The payload's tensors, given their shapes, as views."""
        parts, start = [], 0
        for shape in shapes:
            count = torch.Size(shape).numel()
            parts.append(self.payload[start : start + count].view(*shape))
            start += count
        return parts


def meet(rank: int, ranks: int, port: int, *, host: str = HOST, interface: str = "lo") -> None:
    """Join the process group whose store listens at host:port. Blocks until all ranks have come, at most a minute."""
    os.environ["GLOO_SOCKET_IFNAME"] = interface
    limit = timedelta(seconds=JOIN_TIMEOUT_S)
    store = TCPStore(host, port, None, False, timeout=limit)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=limit)


def open_wire(shape: WireShape) -> Wire:
    """Make a wire; every rank does so, in one order."""
    payload = "nccl" if shape.device.type == "cuda" else "gloo"
    return Wire(dist.new_group(backend="gloo"), dist.new_group(backend=payload), shape)


class Outbox:
    """Sends to one rank. Returns as soon as a buffer is free, which bounds what is under way."""

    def __init__(self, wire: Wire, to: int, *, timeout_s: float) -> None:
        """timeout_s: how long the receiver may leave a message untaken."""
        shape = wire.shape
        self._wire, self._to, self._timeout = wire, to, timedelta(seconds=timeout_s)
        words = [torch.zeros(shape.words + 1, dtype=torch.float64) for _ in range(DEPTH)]
        pieces = [torch.zeros(shape.values, dtype=shape.dtype, device=shape.device) for _ in range(DEPTH)]
        self._words: deque[tuple[Tensor, dist.Work | None]] = deque((buffer, None) for buffer in words)
        self._pieces: deque[tuple[Tensor, dist.Work | None]] = deque((buffer, None) for buffer in pieces)

    def send(self, words: Sequence[float], tensors: Sequence[Tensor] = ()) -> None:
        """Copy a message and send it on its way. Raises PeerGone."""
        flat = [tensor.reshape(-1) for tensor in tensors]
        payload = flat[0] if len(flat) == 1 else torch.cat(flat) if flat else None
        size = self._wire.shape.values
        pieces = () if payload is None else torch.split(payload, size)
        row = torch.tensor([len(pieces), *words], dtype=torch.float64)
        self._put(self._words, self._wire.words, row)
        for piece in pieces:
            self._put(self._pieces, self._wire.payload, piece)

    def flush(self) -> None:
        """Wait until all that was sent is taken. Raises PeerGone."""
        for _, work in (*self._words, *self._pieces):
            _wait(work, self._timeout)

    def _put(self, buffers: deque[tuple[Tensor, dist.Work | None]], group: dist.ProcessGroup, values: Tensor) -> None:
        buffer, work = buffers.popleft()
        _wait(work, self._timeout)
        buffer[: values.shape[0]].copy_(values)
        try:
            buffers.append((buffer, dist.isend(buffer, self._to, group)))
        except RuntimeError as error:
            raise PeerGone(f"rank {self._to}: {error}") from error


class Inbox:
    """Receives from one rank, with the next receives always posted."""

    def __init__(self, wire: Wire, source: int) -> None:
        shape = wire.shape
        self._wire, self._source = wire, source
        self._words: deque[tuple[Tensor, dist.Work | None]] = deque()
        self._pieces: deque[tuple[Tensor, dist.Work | None]] = deque()
        for _ in range(DEPTH):
            self._post(self._words, wire.words, torch.zeros(shape.words + 1, dtype=torch.float64))
            piece = torch.zeros(shape.values, dtype=shape.dtype, device=shape.device)
            self._post(self._pieces, wire.payload, piece)

    def receive(self) -> Message:
        """The next message; blocks until it is there. Raises PeerGone."""
        count, *words = self._take(self._words, self._wire.words).tolist()
        pieces = [self._take(self._pieces, self._wire.payload) for _ in range(int(count))]
        if not pieces:
            return Message(words, torch.empty(0, dtype=self._wire.shape.dtype, device=self._wire.shape.device))
        return Message(words, pieces[0] if len(pieces) == 1 else torch.cat(pieces))

    def _take(self, buffers: deque[tuple[Tensor, dist.Work | None]], group: dist.ProcessGroup) -> Tensor:
        buffer, work = buffers.popleft()
        _wait(work, timedelta(seconds=IDLE_LIMIT_S))
        taken = buffer.clone()
        self._post(buffers, group, buffer)
        return taken

    def _post(self, buffers: deque[tuple[Tensor, dist.Work | None]], group: dist.ProcessGroup, buffer: Tensor) -> None:
        try:
            buffers.append((buffer, dist.irecv(buffer, self._source, group)))
        except RuntimeError as error:
            raise PeerGone(f"rank {self._source}: {error}") from error


def _wait(work: dist.Work | None, limit: timedelta) -> None:
    if work is None:
        return
    try:
        work.wait(limit)
    except RuntimeError as error:
        raise PeerGone(str(error)) from error
