"""Pictures to files, in a process of its own: `python -m server.recording_process FOLDER MIN_FREE_BYTES`.

Reads messages from standard input, a JSON line each with the bytes of its pictures behind it, and ends with the end of
its input, so it cannot outlive the server and loses nothing when the server dies. It runs at the lowest priority: the
engine and the codecs come first. What it says on standard output is a JSON line each: that it is ready, how many bytes
it has written, and why it ended.

Pictures for people are H.264 in fragmented MP4, a fragment a second, with AAC sound where the session carries some;
those for a replay are FFV1 in Matroska, which gives every bit back. Both can be read as far as they go when this
process is killed.
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
# Of sound, as the codec of every peer has it: 16 bit, stereo.
SAMPLES_PER_S = 48_000
SOUND_BYTES = 4
# Sound that comes so much too late for its place is left out, and a hole longer than this is filled with silence.
LATE_S, HOLE_S = 0.25, 0.12
# So long before a picture its sound has come.
SOUND_AHEAD_S = 0.3
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


class SoundTrack:
    """The sound of a film, without a hole: players stop at one, so where no sound came there is silence."""

    def __init__(self, container: OutputContainer) -> None:
        self._container = container
        self._at = 0
        stream = container.add_stream("aac", rate=SAMPLES_PER_S)
        assert isinstance(stream, av.AudioStream)
        self._stream = stream
        stream.codec_context.layout = "stereo"
        stream.codec_context.bit_rate = 96_000

    def write(self, samples: NDArray[np.int16], ticks: int) -> None:
        """Add [N, 2] samples at their time, or behind the last ones where that is nearly the same. Raises OSError."""
        ahead_s = ticks / TICKS_PER_S - self._at / SAMPLES_PER_S
        if ahead_s < -LATE_S:
            return
        if ahead_s > HOLE_S:
            self.fill(ticks)
        self._add(samples)

    def fill(self, ticks: int) -> None:
        """Silence up to this time. Raises OSError."""
        missing = ticks * SAMPLES_PER_S // TICKS_PER_S - self._at
        while missing > 0:
            count = min(missing, SAMPLES_PER_S)
            self._add(np.zeros((count, 2), np.int16))
            missing -= count

    def close(self) -> None:
        """Write what the encoder holds. Raises OSError."""
        self._container.mux(self._stream.encode(None))

    def _add(self, samples: NDArray[np.int16]) -> None:
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(samples).reshape(1, -1), format="s16", layout="stereo")
        frame.sample_rate, frame.pts, frame.time_base = SAMPLES_PER_S, self._at, Fraction(1, SAMPLES_PER_S)
        self._at += len(samples)
        self._container.mux(self._stream.encode(frame))


class VideoFile:
    """One file of pictures of one size, and of sound if there is some."""

    def __init__(self, file: DiskFile, form: Form, width: int, height: int, *, has_sound: bool = False) -> None:
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
        self.sound = SoundTrack(self._container) if has_sound else None
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
            if self.sound is not None:
                self.sound.fill(self._ticks - round(SOUND_AHEAD_S * TICKS_PER_S))
        self._container.mux(self._stream.encode(picture))

    def close(self) -> None:
        """Write what the encoder holds, and the end. On a full disk the file ends with what is there."""
        with contextlib.suppress(OSError, av.FFmpegError):
            self._container.mux(self._stream.encode(None))
        with contextlib.suppress(OSError, av.FFmpegError):
            if self.sound is not None:
                self.sound.fill(self._ticks)
                self.sound.close()
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

        header: line, a line for session.jsonl; file, one of FILES, with shape [T, H, W] and ticks of the first picture,
            and whether the film is to have sound; sound, the film that the bytes are sound of, with their ticks.
        """
        if "sound" in header:
            if (film := self._videos.get(header["sound"])) is not None and film.sound is not None:
                film.sound.write(np.frombuffer(data, np.int16).reshape(-1, 2), header["ticks"])
            return
        if "file" in header:
            count, height, width = header["shape"]
            name = header["file"]
            if name not in self._videos:
                form = EXACT_FORM if name == "frames" else WATCHED
                file = DiskFile(self._folder / FILES[name], self.disk)
                has_sound = header.get("has_sound", False)
                self._videos[name] = VideoFile(file, form, width, height, has_sound=has_sound)
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
