"""Pictures to files, in a process of its own: `python -m server.recording_process FOLDER MIN_FREE_BYTES`.

Reads messages from standard input, a JSON line each with the bytes of its pictures behind it, and ends with the end of
its input, so it cannot outlive the server and loses nothing when the server dies. It runs at the lowest priority: the
engine and the codecs come first. What it says on standard output is a JSON line each: that it is ready, how many bytes
it has written, and why it ended.

Pictures for people are H.264 in fragmented MP4, a fragment a second; those for a replay are FFV1 in Matroska, which
gives every bit back. Both can be read as far as they go when this process is killed.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import signal
import sys
import time
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import IO, Any

import av
import numpy as np
from av.container import OutputContainer
from numpy.typing import NDArray

from server.clip import BT601, EXACT, LIMITED_RANGE

# Of the time stamps: MPEG's own.
TICKS_PER_S = 90_000
NICE = 15
REPORT_S = 0.5
LINES_FILE, FRAMES_FILE = "session.jsonl", "frames.mkv"
# What a recording's folder can hold, and all that is ever deleted from one.
FILES = {"input": "input.mp4", "output": "output.mp4", "frames": FRAMES_FILE}
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Disk:
    """What a recording may fill.

    written: bytes so far, of all its files. error: the first of a file that could not grow, which FFmpeg may report
    as an error of its own.
    """

    def __init__(self, folder: Path, min_free_bytes: int) -> None:
        self.written = 0
        self.error: OSError | None = None
        self._folder = folder
        self._min_free_bytes = min_free_bytes

    def take(self, count: int) -> None:
        """Ask for `count` bytes more. Raises OSError (ENOSPC) where less than the minimum would stay free."""
        if shutil.disk_usage(self._folder).free - count < self._min_free_bytes:
            raise OSError(errno.ENOSPC, f"less than {self._min_free_bytes / 1e6:.0f} MB would stay free on the disk")
        self.written += count


class DiskFile:
    """A new file that only its owner can read; an object to write to, as PyAV takes it."""

    def __init__(self, path: Path, disk: Disk) -> None:
        """Raises OSError, also where the file is there already."""
        self._fd = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
        self._disk = disk

    def write(self, data: bytes) -> int:
        """Write all of `data`. Raises OSError."""
        try:
            self._disk.take(len(data))
            left = memoryview(data)
            while left:
                left = left[os.write(self._fd, left) :]
        except OSError as error:
            self._disk.error = self._disk.error or error
            raise
        return len(data)

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)


@dataclass(frozen=True, slots=True)
class Form:
    """How pictures are written. lossless: every bit comes back."""

    codec: str
    pixels: str
    options: dict[str, str]
    container: str
    container_options: dict[str, str]
    lossless: bool


WATCHED = Form(
    "libx264",
    "yuv420p",
    # Little is held back: what the encoder holds is lost when this process is killed.
    {"preset": "veryfast", "crf": "20", "bf": "0", "rc-lookahead": "8", "forced-idr": "1"},
    "mp4",
    {"movflags": "+frag_keyframe+empty_moov+default_base_moof", "flush_packets": "1"},
    lossless=False,
)
EXACT_FORM = Form(
    "ffv1",
    "bgr0",
    {"level": "3", "slicecrc": "1"},
    "matroska",
    {"cluster_time_limit": "1000", "flush_packets": "1"},
    lossless=True,
)


class VideoFile:
    """One file of pictures of one size."""

    def __init__(self, file: DiskFile, form: Form, width: int, height: int) -> None:
        """Write the file's head. Raises OSError or FFmpegError where there is no room for it."""
        self._file = file
        self._form = form
        self._ticks = -1
        self._key_at = 0
        self._container: OutputContainer = av.open(
            file, "w", format=form.container, container_options=form.container_options
        )
        stream = self._container.add_stream(form.codec, rate=30, options=form.options)
        assert isinstance(stream, av.VideoStream)
        self._stream = stream
        encoder = stream.codec_context
        encoder.width, encoder.height, encoder.pix_fmt = width, height, form.pixels
        encoder.time_base = Fraction(1, TICKS_PER_S)
        encoder.thread_count = 1
        if not form.lossless:
            encoder.colorspace = encoder.color_primaries = encoder.color_trc = BT601
            encoder.color_range = LIMITED_RANGE
        # Now, and not with the first packet: closing a container without its head ends the process (PyAV 18.1).
        self._container.start_encoding()

    def write(self, rgb: NDArray[np.uint8], ticks: int) -> None:
        """Add an [H, W, 3] picture at its time, or just behind the last one. Raises OSError."""
        picture = av.VideoFrame.from_ndarray(rgb, "rgb24")
        if self._form.lossless:
            picture = picture.reformat(format=self._form.pixels)
        else:
            picture = picture.reformat(
                format=self._form.pixels, dst_colorspace="ITU601", dst_color_range="MPEG", interpolation=EXACT
            )
        self._ticks = max(self._ticks + 1, ticks)
        picture.pts, picture.time_base = self._ticks, Fraction(1, TICKS_PER_S)
        if self._ticks >= self._key_at:
            # A fragment begins with each, and is on the disk when the next one begins.
            picture.pict_type = av.video.frame.PictureType.I
            self._key_at = self._ticks + TICKS_PER_S
        self._container.mux(self._stream.encode(picture))

    def close(self) -> None:
        """Write what the encoder holds, and the end. On a full disk the file ends with what is there."""
        with contextlib.suppress(OSError, av.FFmpegError):
            self._container.mux(self._stream.encode(None))
        with contextlib.suppress(OSError, av.FFmpegError):
            self._container.close()
        self._file.close()


class Recorder:
    """The files of one recording."""

    def __init__(self, folder: Path, min_free_bytes: int) -> None:
        self.disk = Disk(folder, min_free_bytes)
        self._folder = folder
        self._videos: dict[str, VideoFile] = {}
        self._lines: DiskFile | None = None

    def take(self, header: dict[str, Any], data: bytes) -> None:
        """Write one message: its line, its pictures, or both. Raises OSError.

        header: line, a line for session.jsonl; file, one of FILES, with shape [T, H, W] and ticks of the first picture.
        """
        if "file" in header:
            count, height, width = header["shape"]
            name = header["file"]
            if name not in self._videos:
                form = EXACT_FORM if name == "frames" else WATCHED
                self._videos[name] = VideoFile(DiskFile(self._folder / FILES[name], self.disk), form, width, height)
            for place, rgb in enumerate(np.frombuffer(data, np.uint8).reshape(count, height, width, 3)):
                self._videos[name].write(rgb, header["ticks"] + place)
        if "line" in header:
            if self._lines is None:
                self._lines = DiskFile(self._folder / LINES_FILE, self.disk)
            self._lines.write(header["line"].encode() + b"\n")

    def close(self) -> None:
        """Close every file."""
        for video in self._videos.values():
            video.close()
        if self._lines is not None:
            self._lines.close()


def run(source: IO[bytes], sink: IO[str], recorder: Recorder) -> None:
    """Serve until the end of the input or the first file that cannot grow; says which it was."""

    def say(**fields: object) -> None:
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps(fields), file=sink, flush=True)

    end, message = "finished", ""
    said_at = time.monotonic()
    say(ready=True)
    try:
        while line := source.readline():
            header = json.loads(line)
            data = source.read(header.get("bytes", 0))
            if len(data) < header.get("bytes", 0):
                break  # the server died in the middle of it
            recorder.take(header, data)
            if time.monotonic() - said_at > REPORT_S:
                said_at = time.monotonic()
                say(written=recorder.disk.written)
    except (OSError, av.FFmpegError) as error:
        cause = recorder.disk.error or error
        end = "disk_full" if cause.errno in DISK_FULL else "failed"
        message = cause.strerror or str(cause)
    recorder.close()
    say(written=recorder.disk.written, end=end, message=message)


def main() -> None:
    """Serve until the end of the input."""
    # Ctrl-C in a terminal reaches the whole group; the server ends this process in its own order.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with contextlib.suppress(OSError):
        os.nice(NICE)
    run(sys.stdin.buffer, sys.stdout, Recorder(Path(sys.argv[1]), int(sys.argv[2])))


if __name__ == "__main__":
    main()
