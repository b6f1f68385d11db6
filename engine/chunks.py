"""What every engine checks of a chunk, whichever process renders it. Pure."""

from __future__ import annotations

from engine.api import Capacity, FrameChunk


def check_shape(chunk: FrameChunk, frame_size: tuple[int, int], capacity: Capacity) -> None:
    """Raises ValueError for frames that are not of the engine's size or not of a chunk's length."""
    width, height = frame_size
    lengths = sorted({capacity.first_chunk_frames, capacity.chunk_frames})
    if chunk.frames.shape[1:] != (height, width, 3) or len(chunk.frames) not in lengths:
        wanted = " or ".join(map(str, lengths))
        raise ValueError(f"chunk of shape {chunk.frames.shape}, expected [{wanted}, {height}, {width}, 3]")
