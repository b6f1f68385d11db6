"""Encoded frame -> pictures or sound, on a worker thread, with a bound on the picture size."""

from __future__ import annotations

import fractions
from typing import cast

import av
from aiortc.rtcrtpparameters import RTCRtpCodecParameters
from av.audio.codeccontext import AudioCodecContext
from av.codec.context import Flags
from av.video.codeccontext import VideoCodecContext

from server.reassembly import EncodedFrame

Picture = av.VideoFrame | av.AudioFrame

VIDEO_DECODERS = {"vp8": "libvpx", "h264": "h264", "jpeg": "mjpeg"}


class PictureTooLargeError(Exception):
    """The stream asks for a picture over the bound."""


class Decoder:
    """One decoder for one negotiated codec. Not for two threads at once."""

    def __init__(self, codec: RTCRtpCodecParameters, max_pixels: int) -> None:
        self.codec = codec
        self._max_pixels = max_pixels
        self._time_base = fractions.Fraction(1, codec.clockRate)
        self._extended = 0
        name = codec.name.lower()
        if name == "opus":
            self._context: AudioCodecContext | VideoCodecContext = _opus()
        else:
            self._context = cast(VideoCodecContext, av.CodecContext.create(VIDEO_DECODERS[name], "r"))
            self._context.thread_count = 1
            self._context.flags |= Flags.low_delay
            # Refused before a buffer is made: a 16383x16383 key frame would take 400 MB. FFmpeg compares the size
            # of its buffers, which are aligned (1080 lines are 1088), hence the slack; the exact bound comes after.
            self._context.options = {"max_pixels": str(2 * max_pixels + 65536)}

    def decode(self, frame: EncodedFrame) -> list[Picture]:
        """Decode one frame; pts is the RTP timestamp without wrapping.

        Raises: PictureTooLargeError; av.FFmpegError, if the data is damaged (the decoder stays usable). H.264 that is
            far over the bound cannot be told from damage.
        """
        step = (frame.timestamp - self._extended) & 0xFFFFFFFF
        self._extended += step if step < 0x80000000 else step - 0x100000000
        packet = av.Packet(frame.data)
        packet.pts, packet.time_base = self._extended, self._time_base
        try:
            pictures = cast(list[Picture], self._context.decode(packet))
        except av.ArgumentError as error:
            # Damaged data is InvalidDataError; EINVAL comes of max_pixels.
            raise PictureTooLargeError from error
        if any(isinstance(item, av.VideoFrame) and item.width * item.height > self._max_pixels for item in pictures):
            raise PictureTooLargeError
        return pictures


def _opus() -> AudioCodecContext:
    context = av.CodecContext.create("libopus", "r")
    context.format = "s16"
    context.layout = "stereo"
    context.sample_rate = 48000
    return context
