"""The start of a ring behind the server: the other ranks' processes begin before rank 0's loads torch, or beside it.

So all of them import it at the same time, each on a core of its own, and not one after the other: with the model's
loading that is most of what a group needs to come back after a loss. They are told where to meet once rank 0 knows, and
load nothing before.

On one machine rank 0's process starts the others (`ChildRank`). Over the nodes of a Ray cluster each is started on its
own node, see `engine.remote_rank`, and holds a connection to rank 0's process (`DistantRank`). Either way rank 0 knows
at once when one of them ends, and they end with it.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import logging
import multiprocessing
import os
import signal
import socket
import sys
import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Protocol

from engine.config import EngineSettings

LOOPBACK = "127.0.0.1"
# A rank that ends because another one did: the other is to blame.
PEER_GONE = 3
PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Place:
    """Where a rank of a ring lives. host: rank 0's address, where all meet. interface: the network interface that this
    machine has to the others. sharing: ranks of the ring on this machine, which share its memory where they compute on
    the CPU. apart: started by itself, with a device of its own; else rank N of a ring has the Nth device."""

    host: str
    interface: str
    sharing: int
    apart: bool

    @classmethod
    def here(cls, ranks: int) -> Place:
        """That of all ranks of a ring on one machine."""
        return cls(LOOPBACK, "lo", ranks, apart=False)

    @classmethod
    def from_text(cls, text: str) -> Place:
        """What `text` made."""
        return cls(**json.loads(text))

    @property
    def text(self) -> str:
        """For a command line."""
        return json.dumps(asdict(self))


class Follower(Protocol):
    """A rank after the first, as rank 0 knows it."""

    @property
    def sentinel(self) -> int | socket.socket:
        """Ready, for `multiprocessing.connection.wait`, once the rank has ended."""
        ...

    def tell(self, port: int) -> None:
        """Say at which port of rank 0's address the ranks meet. Raises OSError where it has ended."""
        ...

    def end(self) -> None:
        """End it at once."""
        ...


@dataclass(frozen=True)
class ChildRank:
    """A rank that rank 0's process has started (`Follower`)."""

    process: BaseProcess
    pipe: Connection

    @classmethod
    def start(cls, settings: EngineSettings, rank: int) -> ChildRank:
        """Start its process, which waits for the port."""
        context = multiprocessing.get_context("spawn")
        theirs, ours = context.Pipe(duplex=False)
        process = context.Process(target=_follow, args=(settings, rank, theirs), name=f"ring rank {rank}", daemon=True)
        process.start()
        theirs.close()
        return cls(process, ours)

    @property
    def sentinel(self) -> int:
        """See `Follower.sentinel`."""
        return self.process.sentinel

    def tell(self, port: int) -> None:
        """See `Follower.tell`."""
        self.pipe.send(port)

    def end(self) -> None:
        """See `Follower.end`."""
        self.process.kill()


@dataclass(frozen=True)
class DistantRank:
    """A rank that was started elsewhere and has connected to rank 0's process (`Follower`). It sends nothing."""

    connection: socket.socket

    @property
    def sentinel(self) -> socket.socket:
        """See `Follower.sentinel`."""
        return self.connection

    def tell(self, port: int) -> None:
        """See `Follower.tell`."""
        self.connection.sendall(f"{port}\n".encode())

    def end(self) -> None:
        """See `Follower.end`."""
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)


def end_with_parent() -> None:
    """On Linux the kernel ends this process with its parent, even while it is stopped; elsewhere its wires break."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def main(control_fd: int, memory_fd: int, settings: EngineSettings) -> None:
    """Start the other ranks, then be rank 0."""
    followers = [ChildRank.start(settings, rank) for rank in range(1, settings.rank_count)]
    from engine.ring_worker import main as lead  # torch: after they have begun

    lead(control_fd, memory_fd, settings, followers, Place.here(settings.rank_count))


def lead_apart(
    control_fd: int, memory_fd: int, settings: EngineSettings, place: Place, connections: Sequence[int]
) -> None:
    """Be rank 0 of ranks that were started elsewhere. connections: file descriptors, that of rank 1 first."""
    end_with_parent()
    from engine.ring_worker import main as lead  # torch: not before, for whoever ends this process now

    lead(control_fd, memory_fd, settings, [DistantRank(_adopted(fd)) for fd in connections], place)


def follow_apart(connection_fd: int, rank: int, settings: EngineSettings, place: Place) -> None:
    """Be a rank after the first, started by itself. connection_fd: of the connection to rank 0's process."""
    end_with_parent()
    connection = _adopted(connection_fd)
    from engine.ring_worker import follow_worker

    follow_worker(settings, rank, place, lambda: _port_from(connection))


def _follow(settings: EngineSettings, rank: int, pipe: Connection) -> None:
    from engine.ring_worker import follow_worker  # torch: here, where it is wanted

    follow_worker(settings, rank, Place.here(settings.rank_count), pipe.recv)


def _adopted(fd: int) -> socket.socket:
    connection = socket.socket(fileno=fd)
    connection.setblocking(True)
    return connection


def _port_from(connection: socket.socket) -> int:
    """The port that rank 0 tells; from then on this process ends with rank 0's. Raises EOFError where it has ended."""
    with connection.makefile("rb") as lines:
        line = lines.readline()
    if not line.endswith(b"\n"):
        raise EOFError
    threading.Thread(target=_end_with, args=(connection,), daemon=True).start()
    return int(line)


def _end_with(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        connection.recv(1)
    os._exit(PEER_GONE)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s rank %(levelname)s %(message)s")
    first, second, settings_text, *rest = sys.argv[1:]
    chosen = EngineSettings.model_validate_json(settings_text)
    match rest:
        case []:
            main(int(first), int(second), chosen)
        case ["lead", place, *fds]:
            lead_apart(int(first), int(second), chosen, Place.from_text(place), [int(fd) for fd in fds])
        case ["follow", place]:
            follow_apart(int(first), int(second), chosen, Place.from_text(place))
