"""Remote track to FrameChunk: thin to the agreed rate, crop and resize, group. Newest wins, nothing queues."""

from __future__ import annotations

import itertools

import av
import cv2
import numpy as np

from engine.api import FrameChunk, Frames

# Frames that may come at once after a gap, as a packet that was lost and repeated brings them.
BURST_FRAMES = 4


class RateGate:
    """Thins a stream of frames evenly to an agreed rate. Pure: instants are passed in.

    Frames of a gap that come together after it belong to the agreed rate too, up to BURST_FRAMES; at 20 % loss
    one frame in twelve was thinned for coming right behind another.
    """

    def __init__(self, fps: float) -> None:
        self._interval_s = 1.0 / fps
        self._next = float("-inf")

    def set_rate(self, fps: float) -> None:
        """Thin to another rate from the next frame on."""
        self._interval_s = 1.0 / fps

    def admit(self, arrived_at: float) -> bool:
        """Whether the frame that arrived now is one of the agreed rate."""
        # A camera at the agreed rate jitters: a quarter interval early is still on time.
        if arrived_at < self._next - self._interval_s / 4:
            return False
        self._next = max(self._next, arrived_at - BURST_FRAMES * self._interval_s) + self._interval_s
        return True


class ChunkAssembler:
    """Groups frames into chunks. No I/O and no clock, so a test needs neither.

    The first chunk has a length of its own: one frame where the model can, so that the first restyled picture does not
    wait for four; five where its VAE begins with a frame alone.
    """

    def __init__(self, chunk_frames: int, latency_budget_s: float, *, first_chunk_frames: int = 1) -> None:
        self._chunk_frames = chunk_frames
        self._latency_budget_s = latency_budget_s
        self._chunk_indices = itertools.count()
        self._wanted = first_chunk_frames
        self._pending: list[tuple[int, float, Frames]] = []

    def clear(self) -> tuple[int, ...]:
        """Give up the frames that wait for their chunk to fill; returns their indices. Chunk numbers go on."""
        indices = tuple(index for index, _, _ in self._pending)
        self._pending = []
        return indices

    def push(self, rgb: Frames, *, index: int, arrived_at: float) -> FrameChunk | None:
        """Take one [H, W, 3] frame; return a chunk when this frame completes it."""
        self._pending.append((index, arrived_at, rgb))
        if len(self._pending) < self._wanted:
            return None
        indices, times, frames = zip(*self._pending, strict=True)
        self._pending = []
        self._wanted = self._chunk_frames
        # The chunk is due with its oldest frame.
        deadline = times[0] + self._latency_budget_s
        return FrameChunk(next(self._chunk_indices), np.stack(frames), indices, times, deadline)


def to_rgb(picture: av.VideoFrame, width: int, height: int) -> Frames:
    """The centre of a decoded frame, cropped to the target's aspect ratio and resized: [height, width, 3] uint8.

    Runs in a thread: 1 to 4 ms for 640x480, whatever size the browser sends in mid-stream.
    """
    # The fast conversion is about one grey level dark; the exact one takes 14 ms of a core instead of 0.2.
    # One thread: left to itself swscale starts two for every frame, and they outlive the session that made them.
    rgb = picture.reformat(format="rgb24", threads=1).to_ndarray()
    source_height, source_width = rgb.shape[:2]
    scale = min(source_width / width, source_height / height)
    crop_width, crop_height = round(width * scale), round(height * scale)
    left, top = (source_width - crop_width) // 2, (source_height - crop_height) // 2
    cropped = rgb[top : top + crop_height, left : left + crop_width]
    if cropped.shape[:2] == (height, width):
        return np.ascontiguousarray(cropped)
    interpolation = cv2.INTER_AREA if scale > 1 else cv2.INTER_LINEAR
    return np.asarray(cv2.resize(cropped, (width, height), interpolation=interpolation), np.uint8)
