"""Pictures to person mattes, in a process of its own: `python -m server.matte_process`.

Reads pictures of one fixed size from standard input and writes a matte for each to standard output; ends with the
end of its input, so it cannot outlive the server. After each picture it rests: it never takes more than SHARE of a
core, whatever it is asked, and runs at a lower priority, so that the engine and the codecs come first.

The network is MediaPipe's selfie segmentation for wide pictures (Apache-2.0; see NOTICE), run by OpenCV: 20 ms on one
core of a 2-core server, where the model of 256x256 took 37 ms for about the same outline.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

MODEL = Path(__file__).with_name("matte_model") / "person.tflite"
WIDTH, HEIGHT = 256, 144
PICTURE_BYTES, MATTE_BYTES = WIDTH * HEIGHT * 3, WIDTH * HEIGHT
SHARE = 0.5
NICE = 5


class PersonMatte:
    """The network. Not for two threads at once."""

    def __init__(self) -> None:
        import cv2

        cv2.setNumThreads(1)
        self._blob = cv2.dnn.blobFromImage
        self._net = cv2.dnn.readNetFromTFLite(str(MODEL))

    def __call__(self, rgb: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """[HEIGHT, WIDTH, 3] RGB -> [HEIGHT, WIDTH]: 255 where a person is, 0 where none is."""
        self._net.setInput(self._blob(rgb, 1 / 255))
        share = np.asarray(self._net.forward(), np.float32).reshape(HEIGHT, WIDTH)
        return (share * 255 + 0.5).clip(0, 255).astype(np.uint8)


def rest_s(worked_s: float, share: float = SHARE) -> float:
    """How long to rest after `worked_s` of work, so that work takes `share` of the time."""
    return worked_s * (1 - share) / share


def main() -> None:
    """Serve until the end of the input."""
    # Ctrl-C in a terminal reaches the whole group; the server ends this process in its own order.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with contextlib.suppress(OSError):
        os.nice(NICE)
    matte = PersonMatte()
    source, sink = sys.stdin.buffer, sys.stdout.buffer
    while len(data := source.read(PICTURE_BYTES)) == PICTURE_BYTES:
        began = time.perf_counter()
        found = matte(np.frombuffer(data, np.uint8).reshape(HEIGHT, WIDTH, 3))
        with contextlib.suppress(BrokenPipeError):
            sink.write(found.tobytes())
            sink.flush()
        time.sleep(rest_s(time.perf_counter() - began))


if __name__ == "__main__":
    main()
