"""What every engine checks and measures of a chunk, whichever process renders it. Pure."""

from __future__ import annotations

from collections import deque

from engine.api import Capacity, FrameChunk

COST_SMOOTHING = 0.1
# More chunks than a stream batch and its micro-batch ever hold.
MAX_PASSES = 64


class ChunkCost:
    """Engine seconds of a chunk, followed from when chunks were taken up and done with.

    With one chunk in the rank that is their difference. In a stream batch a chunk is done in the pass that takes a
    newer one up, so a pass lasts from a chunk's start to the first finish after it, and chunks that one pass took up
    together share it.
    """

    def __init__(self, chunk_cost_s: float = 0.0) -> None:
        self.chunk_cost_s = chunk_cost_s
        self._finishes: deque[float] = deque(maxlen=MAX_PASSES)
        self._pass_started_at = float("-inf")
        self._pass_cost_s = 0.0
        self._pass_chunks = 0

    def on_done(self, started_at: float, finished_at: float) -> None:
        """A chunk came back. The cost moves once its pass is complete: with the first chunk of another one."""
        if not self._finishes or self._finishes[-1] < finished_at:
            self._finishes.append(finished_at)
        if started_at == self._pass_started_at:
            self._pass_chunks += 1
            return
        if self._pass_chunks:
            cost_s = self._pass_cost_s / self._pass_chunks
            self.chunk_cost_s += COST_SMOOTHING * (cost_s - self.chunk_cost_s)
        ended_at = next((finish for finish in self._finishes if finish > started_at), finished_at)
        self._pass_started_at, self._pass_cost_s, self._pass_chunks = started_at, ended_at - started_at, 1


def check_shape(chunk: FrameChunk, frame_size: tuple[int, int], capacity: Capacity) -> None:
    """Raises ValueError for frames that are not of the engine's size or not of a chunk's length."""
    width, height = frame_size
    lengths = sorted({capacity.first_chunk_frames, capacity.chunk_frames})
    if chunk.frames.shape[1:] != (height, width, 3) or len(chunk.frames) not in lengths:
        wanted = " or ".join(map(str, lengths))
        raise ValueError(f"chunk of shape {chunk.frames.shape}, expected [{wanted}, {height}, {width}, 3]")
