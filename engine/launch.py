"""Start one rank as a process of its own, and stop it. The worker module is imported in the child only.

`Rank` and `Launcher` are all that `engine.client` knows of where a rank runs; `engine.ray_cluster` has another.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import sys
from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol

from engine.config import EngineSettings
from engine.frame_memory import FrameMemory
from engine.messages import MAX_LINE_BYTES, FromRank, ToRank, decode_from_rank, encode
from engine.ring_start import Place

STOP_TIMEOUT_S = 3.0

# All of it must be in place before the process starts.
RANK_ENVIRONMENT = {
    # Spinning OpenMP threads beside other work cost a factor of ten.
    "OMP_WAIT_POLICY": "passive",
    # The activations of a chunk are freed and asked for again ten times a second: kept instead of given back to the
    # kernel, and in huge pages, a chunk of the embedded model takes 91 to 97 ms instead of 104 to 112.
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(256 << 20),
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
    "PYTHONUNBUFFERED": "1",
    # cuda:N is then the GPU that nvidia-smi, and so `engine.choose`, calls N; torch's own order is by speed.
    "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
}


class Rank(Protocol):
    """A running rank, wherever it runs. Frames are in the `FrameMemory` it was started with."""

    @property
    def pid(self) -> int | None:
        """Its process, where that is on this machine."""
        ...

    def send(self, message: ToRank) -> None:
        """Queue a message; one for a rank that is gone is lost."""
        ...

    async def receive(self) -> FromRank | None:
        """The next message; None once the rank is gone. Raises ConnectionError, or ValueError for a broken message."""
        ...

    async def stop(self) -> str:
        """Ask it to stop, then insist; bounded. Returns how it ended, in words for the log."""
        ...


async def start_process(
    module: str, arguments: Sequence[str], threads: int, fds: Sequence[int]
) -> asyncio.subprocess.Process:
    """Start a module of ours as a rank's process, which inherits file descriptors. Raises OSError."""
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-P", "-m", module, *arguments),
        pass_fds=tuple(fds),
        env=os.environ | RANK_ENVIRONMENT | {"OMP_NUM_THREADS": str(threads)},
        stdin=asyncio.subprocess.DEVNULL,
        start_new_session=True,
    )


Launcher = Callable[[EngineSettings, FrameMemory], Awaitable[Rank]]
"""Starts a rank over a frame memory; it reports its progress as `Status` messages. Raises OSError if it cannot."""


class RankProcess:
    """A running rank on this machine (`Rank`): its process and the line-based control connection.

    The rank leads its own session: Ctrl-C reaches only the server, which then closes the connection, and end of file
    there is the rank's one order to stop. So it also goes when the server is killed.
    """

    def __init__(
        self, process: asyncio.subprocess.Process, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self.process = process
        self.reader = reader
        self.writer = writer

    @classmethod
    async def start(
        cls, settings: EngineSettings, memory: FrameMemory, place: Place | None = None, others: Sequence[int] = ()
    ) -> RankProcess:
        """Start the rank; it reports its progress as `Status` messages.

        place: of rank 0 of a ring whose other ranks were started elsewhere; others: file descriptors of the connections
        to them, that of rank 1 first. Left out, rank 0 starts them.

        Raises: OSError if it cannot be started.
        """
        ours, theirs = socket.socketpair()
        arguments = [str(theirs.fileno()), str(memory.fd), settings.model_dump_json()]
        if place is not None:
            arguments += ["lead", place.text, *map(str, others)]
        module = "engine.ring_start" if settings.rank_count > 1 else "engine.worker"
        try:
            process = await start_process(module, arguments, settings.threads, (theirs.fileno(), memory.fd, *others))
        except OSError:
            ours.close()
            raise
        finally:
            theirs.close()
        reader, writer = await asyncio.open_connection(sock=ours, limit=MAX_LINE_BYTES)
        return cls(process, reader, writer)

    @property
    def pid(self) -> int:
        """See `Rank.pid`."""
        return self.process.pid

    def send(self, message: ToRank) -> None:
        """See `Rank.send`."""
        if not self.writer.is_closing():
            self.writer.write(encode(message))

    async def receive(self) -> FromRank | None:
        """See `Rank.receive`."""
        line = await self.reader.readline()
        return decode_from_rank(line) if line else None

    async def stop(self, timeout_s: float = STOP_TIMEOUT_S) -> str:
        """Ask by closing the connection, then insist; bounded by twice the timeout."""
        self.writer.close()
        with contextlib.suppress(OSError):
            await self.writer.wait_closed()
        try:
            status = await asyncio.wait_for(self.process.wait(), timeout_s)
        except TimeoutError:
            self.process.kill()
            status = await asyncio.wait_for(self.process.wait(), timeout_s)
        return f"exit status {status}"
