"""Where a chunk's work is queued on a GPU: encode, denoise and decode on streams of their own, and copies that overlap.

With one stream each, the decoder works on one chunk while the transformer is at the next. A lane waits for all that
the lane before it was given, so order within a chunk holds. What changes a stream between chunks runs aside of all
lanes. On a CPU everything runs in place, in order.

Never run on a GPU by us.
"""

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# One buffer being copied while the next is filled.
BUFFERS = 2


@dataclass(frozen=True)
class Download:
    """A copy on its way to the host; `wait` before reading it."""

    tensor: Tensor
    done: torch.cuda.Event | None

    def wait(self) -> Tensor:
        """The tensor on the host, whole; blocks until it is."""
        if self.done is not None:
            self.done.synchronize()
        return self.tensor


class Lanes:
    """The streams of one device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._cuda = device.type == "cuda"
        self._pinned: dict[tuple[int, ...], list[tuple[Tensor, torch.cuda.Event]]] = {}
        self._turn = 0
        if self._cuda:
            self._encode, self._denoise, self._decode = (_stream(device) for _ in range(3))

    @property
    def overlapping(self) -> bool:
        """Whether work goes on after it was queued."""
        return self._cuda

    def upload(self, frames: NDArray[np.uint8]) -> Tensor:
        """Frames on the device. On CUDA through pinned memory, without waiting for the copy."""
        if not self._cuda:
            # A tensor must not share memory with a read-only array, nor with a view that is not in order.
            owned = frames if frames.flags.writeable and frames.flags.c_contiguous else frames.copy()
            return torch.from_numpy(owned).to(self.device)
        buffers = self._pinned.setdefault(frames.shape, [])
        if len(buffers) < BUFFERS:
            buffers.append((torch.empty(frames.shape, dtype=torch.uint8, pin_memory=True), _event()))
        buffer, copied = buffers[self._turn % len(buffers)]
        self._turn += 1
        copied.synchronize()  # the copy that last used this buffer
        buffer.numpy()[:] = frames
        with torch.cuda.stream(self._encode):
            uploaded = buffer.to(self.device, non_blocking=True)
            copied.record(self._encode)
        return uploaded

    def download(self, tensor: Tensor) -> Download:
        """Begin to copy a tensor that the decode lane made to the host."""
        if not self._cuda:
            return Download(tensor.cpu(), None)
        with torch.cuda.stream(self._decode):
            host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            host.copy_(tensor, non_blocking=True)
            tensor.record_stream(self._decode)
            done = _event()
            done.record(self._decode)
        return Download(host, done)

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """Work between passes, such as a new prompt: behind all that is queued, before all that comes."""
        if not self._cuda:
            yield
            return
        lanes, own = (self._encode, self._denoise, self._decode), torch.cuda.current_stream(self.device)
        for lane in lanes:
            own.wait_stream(lane)
        yield
        for lane in lanes:
            lane.wait_stream(own)

    def encode(self) -> contextlib.AbstractContextManager[None]:
        """Queue on the first lane."""
        return self._on("_encode", None, ())

    def denoise(self, inputs: Iterable[Tensor]) -> contextlib.AbstractContextManager[None]:
        """Queue on the second lane, behind the first. inputs: tensors made there."""
        return self._on("_denoise", "_encode", inputs)

    def decode(self, *inputs: Tensor) -> contextlib.AbstractContextManager[None]:
        """Queue on the third lane, behind the second. inputs: tensors made there."""
        return self._on("_decode", "_denoise", inputs)

    @contextlib.contextmanager
    def _on(self, lane: str, before: str | None, inputs: Iterable[Tensor]) -> Iterator[None]:
        if not self._cuda:
            yield
            return
        stream: torch.cuda.Stream = getattr(self, lane)
        if before is not None:
            stream.wait_stream(getattr(self, before))
        with torch.cuda.stream(stream):
            for tensor in inputs:
                tensor.record_stream(stream)
            yield


# torch leaves these two untyped.
def _event() -> torch.cuda.Event:
    return torch.cuda.Event()  # type: ignore[no-untyped-call]


def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
