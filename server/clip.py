"""Video files in and out: frames with their timestamps, sound copied as it is, and nothing of engines.

A clip is read in file order, so that sound packets reach the writer beside the frames they belong to. A rotated clip
(telephones) is turned upright here, for the model to see people the right way up; the writer has no rotation to keep.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TypeAlias

import av
import numpy as np
from av.container import InputContainer, OutputContainer
from av.stream import Disposition, Stream
from av.video.reformatter import Interpolation
from numpy.typing import NDArray

Picture = NDArray[np.uint8]
# PyAV types packets by their stream, but only in its stubs.
Packet: TypeAlias = "av.Packet[Stream]"

# The container and the video encoders to try, by the extension of the output.
CONTAINERS = {
    ".mp4": ("mp4", ("libx264",)),
    ".m4v": ("mp4", ("libx264",)),
    ".mov": ("mov", ("libx264",)),
    ".mkv": ("matroska", ("libx264",)),
    ".webm": ("webm", ("libvpx-vp9", "libvpx")),
}
# Presets that keep up with the engine from the core beside it; the crf values are visually lossless for each codec.
ENCODER_OPTIONS = {
    "libx264": {"crf": "18", "preset": "veryfast"},
    "libvpx-vp9": {"crf": "24", "b": "0", "deadline": "realtime", "cpu-used": "6", "row-mt": "1"},
    "libvpx": {"crf": "10", "b": "4M", "deadline": "realtime", "cpu-used": "6"},
}
FALLBACK_RATE = Fraction(30)
# Untagged video of this height and over is BT.709 by convention, below it BT.601.
HD_HEIGHT = 720
BT709, BT601, LIMITED_RANGE = 1, 6, 1
# Without these swscale rounds down and drops half the chroma: a picture through it and back is off by 2.5 grey
# levels instead of 1.4, and 1.5 darker. They cost 0.25 ms a frame.
EXACT = Interpolation.FULL_CHR_H_INT | Interpolation.ACCURATE_RND


class ClipError(Exception):
    """A video file cannot be read or written as asked; the text says which, why and the cure."""


@dataclass(frozen=True, slots=True)
class ClipInfo:
    """What a clip looks like. width, height: as shown (upright); total_frames: an estimate, None where unknown."""

    width: int
    height: int
    rate: Fraction
    time_base: Fraction
    pixel_aspect: Fraction
    bt709: bool
    total_frames: int | None


@dataclass(frozen=True, slots=True)
class ClipFrame:
    """One upright [H, W, 3] RGB picture at the reader's size. pts, duration: in units of `ClipInfo.time_base`."""

    picture: Picture
    pts: int
    duration: int


class ClipReader:
    """Frames and sound packets of a file, in file order. Used by one thread at a time.

    damaged_packets: packets that did not decode; decoding goes on behind them.
    """

    def __init__(self, path: Path) -> None:
        """Open `path` and decode its first frame. Raises ClipError for anything that is no video file."""
        if not path.is_file():
            raise ClipError(f"{path}: no such file" if not path.exists() else f"{path}: not a file")
        self.damaged_packets = 0
        with contextlib.ExitStack() as cleanup:
            try:
                self._container: InputContainer = cleanup.enter_context(av.open(str(path)))
            except (av.FFmpegError, OSError) as error:
                raise ClipError(f"{path}: not a video file ({_reason(error)})") from error
            self._video = self._pick_video(path)
            self.sound: list[Stream] = list(self._container.streams.audio)
            self._items = self._demux(path)
            head, first = self._until_first_frame(path)
            self.info = self._describe(first)
            self._turns = round(first.rotation / 90) % 4
            self._items = itertools.chain(head, self._items)
            self._last_pts: int | None = None
            self._cleanup = cleanup.pop_all()

    def __enter__(self) -> ClipReader:
        return self

    def __exit__(self, *exc: object) -> None:
        self._cleanup.close()

    def items(self, width: int, height: int) -> Iterator[ClipFrame | Packet]:
        """Every frame scaled to `width` x `height`, and every sound packet; to be iterated over once."""
        for item in self._items:
            yield self._to_clip_frame(item, width, height) if isinstance(item, av.VideoFrame) else item

    def _pick_video(self, path: Path) -> av.VideoStream:
        for stream in self._container.streams.video:
            if not stream.disposition & Disposition.attached_pic:
                # Decoding frames side by side would report damage late and lose whole frames around it.
                stream.thread_type = "SLICE"
                return stream
        raise ClipError(f"{path}: holds no video stream")

    def _demux(self, path: Path) -> Iterator[av.VideoFrame | Packet]:
        packets = self._container.demux([self._video, *self.sound])
        try:
            for packet in packets:
                if packet.stream.index == self._video.index:
                    yield from self._decode(packet)
                elif packet.size:  # an empty packet marks the end of a stream
                    yield packet
        except (av.FFmpegError, OSError) as error:
            raise ClipError(f"{path}: cannot be read on ({_reason(error)})") from error

    def _decode(self, packet: Packet) -> list[av.VideoFrame]:
        try:
            return self._video.decode(packet)
        except av.InvalidDataError:
            self.damaged_packets += 1
            return []

    def _until_first_frame(self, path: Path) -> tuple[list[av.VideoFrame | Packet], av.VideoFrame]:
        head: list[av.VideoFrame | Packet] = []
        for item in self._items:
            head.append(item)
            if isinstance(item, av.VideoFrame):
                return head, item
        raise ClipError(f"{path}: holds no frame that can be decoded")

    def _describe(self, first: av.VideoFrame) -> ClipInfo:
        stream = self._video
        pixel_aspect = Fraction(stream.sample_aspect_ratio or 1)
        width, height = first.width, first.height
        if round(first.rotation / 90) % 2:
            width, height, pixel_aspect = height, width, 1 / pixel_aspect
        rate = Fraction(stream.average_rate or stream.guessed_rate or FALLBACK_RATE)
        if stream.duration is not None and stream.time_base is not None:
            seconds: float | None = float(stream.duration * stream.time_base)
        else:
            seconds = self._container.duration / av.time_base if self._container.duration else None
        return ClipInfo(
            width=width,
            height=height,
            rate=rate,
            time_base=first.time_base or stream.time_base or 1 / rate,
            pixel_aspect=pixel_aspect,
            bt709=first.colorspace == BT709 or (first.colorspace == 2 and first.height >= HD_HEIGHT),
            total_frames=stream.frames or (round(seconds * rate) if seconds else None),
        )

    def _to_clip_frame(self, frame: av.VideoFrame, width: int, height: int) -> ClipFrame:
        step = round(1 / (self.info.rate * self.info.time_base)) or 1
        pts = frame.pts
        if pts is None or (self._last_pts is not None and pts <= self._last_pts):
            # No muxer takes a time twice: a broken stamp is replaced by the next possible one.
            pts = 0 if self._last_pts is None else self._last_pts + (1 if pts is not None else step)
        self._last_pts = pts
        if self._turns % 2:
            width, height = height, width
        scaled = frame.reformat(
            width,
            height,
            "rgb24",
            src_colorspace="ITU709" if self.info.bt709 else "ITU601",
            interpolation=EXACT | (Interpolation.AREA if frame.width >= width else Interpolation.BICUBIC),
        )
        picture = np.ascontiguousarray(np.rot90(scaled.to_ndarray(), self._turns).astype(np.uint8, copy=False))
        return ClipFrame(picture, pts, frame.duration or step)


class ClipWriter:
    """Writes `path` under the name `path`.part and renames it in `finish`; left without, the part file is removed."""

    def __init__(self, path: Path, info: ClipInfo, sound: list[Stream]) -> None:
        """Open the output. Raises ClipError for an extension, codec or folder that does not do."""
        container_name, codec = encoder_for(path)
        self._path = path
        self._part = path.with_name(path.name + ".part")
        self._info = info
        options = {"movflags": "+faststart"} if container_name in ("mp4", "mov") else {}
        with contextlib.ExitStack() as cleanup:
            cleanup.callback(self._part.unlink, missing_ok=True)
            try:
                output = av.open(str(self._part), "w", format=container_name, container_options=options)
                self._container: OutputContainer = cleanup.enter_context(output)
                self._video = self._add_video(codec)
                self._sound = {stream.index: self._add_sound(stream) for stream in sound}
                # Opens the file and the encoder now, not with the first packet after a second of work.
                output.start_encoding()
            except (av.FFmpegError, OSError) as error:
                raise ClipError(f"{path}: cannot be written ({_reason(error)})") from error
            self._cleanup = cleanup.pop_all()

    def __enter__(self) -> ClipWriter:
        return self

    def __exit__(self, *exc: object) -> None:
        self._cleanup.close()

    def write(self, frame: ClipFrame) -> None:
        """Encode one picture of any size at its own time. Raises ClipError when the file cannot grow."""
        info, encoder = self._info, self._video.codec_context
        picture = av.VideoFrame.from_ndarray(frame.picture, "rgb24").reformat(
            info.width,
            info.height,
            encoder.pix_fmt,
            dst_colorspace="ITU709" if info.bt709 else "ITU601",
            dst_color_range="MPEG",
            interpolation=EXACT | Interpolation.BICUBIC,
        )
        picture.pts, picture.time_base, picture.duration = frame.pts, info.time_base, frame.duration
        self._encode(picture)

    def copy(self, packet: Packet) -> None:
        """Pass a sound packet on as it is."""
        packet.stream = self._sound[packet.stream.index]
        self._mux([packet])

    def finish(self) -> None:
        """Write what the encoder still holds and give the file its name."""
        self._encode(None)
        try:
            self._container.close()
            self._part.replace(self._path)
        except (av.FFmpegError, OSError) as error:
            raise ClipError(f"{self._path}: cannot be written ({_reason(error)})") from error

    def _add_video(self, codec: str) -> av.VideoStream:
        info = self._info
        stream = self._container.add_stream(codec, rate=info.rate, options=ENCODER_OPTIONS[codec])
        if not isinstance(stream, av.VideoStream):
            raise TypeError(f"{codec} is no video codec")
        encoder = stream.codec_context
        # 4:2:0 halves both sides: H.264 keeps an odd size only in 4:4:4.
        odd = info.width % 2 or info.height % 2
        encoder.width, encoder.height = info.width, info.height
        encoder.pix_fmt = "yuv444p" if odd and codec == "libx264" else "yuv420p"
        encoder.time_base = info.time_base
        encoder.sample_aspect_ratio = info.pixel_aspect
        encoder.colorspace = encoder.color_primaries = encoder.color_trc = BT709 if info.bt709 else BT601
        encoder.color_range = LIMITED_RANGE
        return stream

    def _add_sound(self, stream: Stream) -> Stream:
        try:
            return self._container.add_stream_from_template(stream)
        except (av.FFmpegError, ValueError) as error:
            name = stream.codec_context.name if stream.codec_context else "its"
            cure = "name the output .mkv, which holds any sound, or leave the sound out with --no-audio"
            raise ClipError(f"{self._path}: {self._path.suffix} cannot hold {name} sound; {cure}") from error

    def _encode(self, picture: av.VideoFrame | None) -> None:
        try:
            packets = self._video.encode(picture)
        except (av.FFmpegError, OSError) as error:
            raise ClipError(f"{self._path}: cannot be encoded ({_reason(error)})") from error
        self._mux(packets)

    def _mux(self, packets: list[Packet]) -> None:
        try:
            self._container.mux(packets)
        except (av.FFmpegError, OSError) as error:
            raise ClipError(f"{self._path}: cannot be written ({_reason(error)})") from error


def encoder_for(path: Path) -> tuple[str, str]:
    """The container format and the video encoder for an output name.

    Raises: ClipError for an unknown extension, or where this PyAV has no encoder for it.
    """
    if path.suffix.lower() not in CONTAINERS:
        raise ClipError(f"{path}: unknown extension {path.suffix!r}; use one of {', '.join(CONTAINERS)}")
    container_name, codecs = CONTAINERS[path.suffix.lower()]
    for codec in codecs:
        if codec in av.codecs_available:
            return container_name, codec
    raise ClipError(f"{path}: this PyAV has no {' or '.join(codecs)} encoder; reinstall av from PyPI")


def _reason(error: Exception) -> str:
    """The system's own words for an error, without numbers and paths."""
    return str(getattr(error, "strerror", None) or error)
