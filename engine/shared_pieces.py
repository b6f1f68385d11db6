"""Pieces of a payload in memory that two ranks of one machine share: one writes, one reads, nothing goes through TCP.

The memory is an anonymous file of the writer, which the reader opens by the writer's process and descriptor: it has no
name in any file system, so nothing can be left behind. Two counts stand before the pieces, of those written and of
those taken; each is written by one side alone. That a piece is there before its count says so rests on stores being
seen in their order, which x86 promises; elsewhere `SharedPieces.create` declines.
"""

from __future__ import annotations

import mmap
import os
import platform
import secrets
import stat
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

HEADER_BYTES = 192
# Places of int64 in it: which memory this is, the processes that write and read it, pieces written, pieces taken; the
# counts in cache lines of their own.
_TOKEN, _WRITER, _READER, _WRITTEN, _TAKEN = 0, 1, 2, 8, 16
# Numbers of an offer: the machine in two, process, descriptor, token; all 0 where nothing is offered.
OFFER_NUMBERS = 5
_POLL_S, _LOOK_S = 0.0002, 0.05


class Late(Exception):
    """The other side did not come to it in time, or is no more."""


class SharedPieces:
    """A ring of `pieces` pieces of `values` values each, for one writer and one reader."""

    def __init__(self, fd: int, pieces: int, values: int, dtype: torch.dtype) -> None:
        """Map the file `fd`, which may be closed then. Raises OSError or ValueError."""
        self.pieces = pieces
        self._offered: int | None = None
        self._map = mmap.mmap(fd, _size(pieces, values, dtype))
        self._counts = memoryview(self._map)[:HEADER_BYTES].cast("q")
        rows = torch.frombuffer(self._map, dtype=dtype, offset=HEADER_BYTES, count=pieces * values)
        self._pieces = rows.view(pieces, values)

    @classmethod
    def create(cls, pieces: int, values: int, dtype: torch.dtype) -> tuple[SharedPieces | None, list[int]]:
        """Memory to write to, and the offer for the reader; (None, no offer) where this machine cannot share."""
        if platform.machine() not in ("x86_64", "AMD64") or not hasattr(os, "memfd_create"):
            return None, [0] * OFFER_NUMBERS
        try:
            fd = os.memfd_create("livebrush-pieces")
        except OSError:
            return None, [0] * OFFER_NUMBERS
        try:
            os.ftruncate(fd, _size(pieces, values, dtype))
            made = cls(fd, pieces, values, dtype)
            made._counts[_TOKEN], made._counts[_WRITER], made._offered = secrets.randbits(62), os.getpid(), fd
            offer = [*_machine(), os.getpid(), fd, made._counts[_TOKEN]]
        except (OSError, ValueError):
            os.close(fd)
            return None, [0] * OFFER_NUMBERS
        return made, offer

    @classmethod
    def join(cls, offer: Sequence[int], pieces: int, values: int, dtype: torch.dtype) -> SharedPieces | None:
        """The memory of an offer, to read from; None where it is of another machine, or cannot be reached from here."""
        machine, (pid, descriptor, token) = list(offer[:2]), offer[2:]
        if not token:
            return None
        try:
            if machine != _machine():
                return None
            fd = os.open(f"/proc/{pid}/fd/{descriptor}", os.O_RDWR | os.O_NONBLOCK)
        except OSError:
            return None
        try:
            found = os.fstat(fd)
            if not stat.S_ISREG(found.st_mode) or found.st_size != _size(pieces, values, dtype):
                return None
            made = cls(fd, pieces, values, dtype)
        except (OSError, ValueError):
            return None
        finally:
            os.close(fd)
        if made._counts[_TOKEN] != token:
            # In a container of its own the same numbers may stand for another process.
            return None
        made._counts[_READER] = os.getpid()
        return made

    def settle(self) -> None:
        """The offer was taken or refused, and stands no longer."""
        if self._offered is not None:
            os.close(self._offered)
            self._offered = None

    @property
    def free(self) -> int:
        """Pieces that can be written without waiting."""
        return self.pieces - (self._counts[_WRITTEN] - self._counts[_TAKEN])

    def put(self, rows: Sequence[Tensor], timeout_s: float) -> float:
        """Write the next piece, which may be shorter; returns the seconds waited for a free one. Raises Late."""
        waited_s = self._wait_for(lambda: self.free > 0, _READER, timeout_s)
        written = self._counts[_WRITTEN]
        fill(self._pieces[written % self.pieces], rows)
        self._counts[_WRITTEN] = written + 1
        return waited_s

    def take(self, into: Tensor, timeout_s: float) -> None:
        """Read the next piece. Raises Late."""
        self._wait_for(lambda: self.free < self.pieces, _WRITER, timeout_s)
        taken = self._counts[_TAKEN]
        into.copy_(self._pieces[taken % self.pieces, : into.shape[0]])
        self._counts[_TAKEN] = taken + 1

    def _wait_for(self, ready: Callable[[], bool], other: int, timeout_s: float) -> float:
        if ready():
            return 0.0
        began = looked = time.monotonic()
        while not ready():
            now = time.monotonic()
            if now > began + timeout_s:
                raise Late(f"a piece was not taken or not written within {timeout_s:g} s")
            if now > looked + _LOOK_S:
                looked = now
                self._check(self._counts[other])
            time.sleep(_POLL_S)
        return time.monotonic() - began

    @staticmethod
    def _check(pid: int) -> None:
        """Raises Late, where there is no such process."""
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            raise Late(f"process {pid} has ended") from None
        except PermissionError:
            pass


def fill(buffer: Tensor, rows: Sequence[Tensor]) -> None:
    """Copy rows into a buffer, one after another."""
    start = 0
    for row in rows:
        buffer[start : start + row.shape[0]].copy_(row)
        start += row.shape[0]


def _size(pieces: int, values: int, dtype: torch.dtype) -> int:
    return HEADER_BYTES + pieces * values * dtype.itemsize


def _machine() -> list[int]:
    """Which kernel this is, since when: in two numbers."""
    words = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip().replace("-", "")
    return [int(words[:15], 16), int(words[15:30], 16)]
