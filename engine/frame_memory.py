"""Preallocated shared memory for frames: one ring of slots a stream, each slot one chunk of uint8 RGB.

An anonymous file is inherited by the rank, so it has no name in any file system and nothing can be left behind: it
is gone with the last process that holds it. Pages are only committed when a stream first writes them.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from dataclasses import dataclass

import numpy as np

from engine.api import Frames
from engine.config import MAX_STEPS, EngineSettings

# One chunk being rendered, two waiting (the scheduler's bound), one being filled or read by the server.
SLOTS_PER_STREAM = 4
# In mode `batch` a chunk stays in the rank until the last of its steps, with the steps of newer ones beside it.
BATCH_SLOTS_PER_STREAM = SLOTS_PER_STREAM + MAX_STEPS - 1
# And in a ring two more for every rank, one at work and one before it.
RING_SLOTS_PER_RANK = 2


@dataclass(frozen=True, slots=True)
class FrameLayout:
    """Shape of the arena: streams x slots of [slot_frames, height, width, 3] uint8."""

    streams: int
    slot_frames: int
    height: int
    width: int
    slots: int = SLOTS_PER_STREAM

    @classmethod
    def of(cls, settings: EngineSettings) -> FrameLayout:
        """The layout that server and rank both derive from the settings: a slot holds the longer kind of chunk.

        Raises: FileNotFoundError or ValueError for a model folder that is not one.
        """
        profile = settings.profile
        slots = BATCH_SLOTS_PER_STREAM if settings.mode == "batch" else SLOTS_PER_STREAM
        if settings.rank_count > 1:
            slots += RING_SLOTS_PER_RANK * settings.rank_count
        slot_frames = max(profile.chunk_frames, profile.first_chunk_frames)
        return cls(settings.max_streams, slot_frames, settings.height, settings.width, slots)

    @property
    def slot_bytes(self) -> int:
        """Bytes of one slot."""
        return self.slot_frames * self.height * self.width * 3

    @property
    def total_bytes(self) -> int:
        """Bytes of the whole arena."""
        return self.streams * self.slots * self.slot_bytes


class FrameMemory:
    """The arena as mapped into this process. Close it in every process that opened it."""

    def __init__(self, fd: int, layout: FrameLayout) -> None:
        """Map the file `fd`, taking ownership of it. Raises ValueError if it is smaller than the layout."""
        self.fd = fd
        self.layout = layout
        size = os.fstat(fd).st_size
        if size < layout.total_bytes:
            raise ValueError(f"frame memory holds {size} bytes, the layout needs {layout.total_bytes}")
        self._map = mmap.mmap(fd, layout.total_bytes)

    @classmethod
    def create(cls, layout: FrameLayout) -> FrameMemory:
        """A new arena. Raises OSError when the machine has no room for it."""
        if hasattr(os, "memfd_create"):
            fd = os.memfd_create("livebrush-frames")
        else:
            with tempfile.TemporaryFile() as file:
                fd = os.dup(file.fileno())
        os.ftruncate(fd, layout.total_bytes)
        return cls(fd, layout)

    def slot(self, stream: int, slot: int, frames: int) -> Frames:
        """A writable view of the first `frames` frames of a slot: [frames, height, width, 3]."""
        layout = self.layout
        offset = (stream * layout.slots + slot) * layout.slot_bytes
        shape = (frames, layout.height, layout.width, 3)
        return np.ndarray(shape, np.uint8, buffer=self._map, offset=offset)

    def close(self) -> None:
        """Unmap and forget. No view may be in use any more. Idempotent."""
        if self.fd >= 0:
            self._map.close()
            os.close(self.fd)
            self.fd = -1
