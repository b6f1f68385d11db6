"""Pictures and sound -> RTP payloads, on a worker thread; and the decision which bitrate to encode at.

aiortc's own encoders cap VP8 at 1.5 Mbit/s, begin at 0.5 (nine rebuilds in 18 s until they are there), rebuild at
every 10 % step, and run x264 at preset medium, which costs four times veryfast for 0.1 dB. Only their packetizers
are used here, through `Encoder.pack`.
"""

from __future__ import annotations

import fractions
import math
from collections.abc import Iterator
from typing import Any

import av
import numpy as np
from aiortc.codecs import get_encoder
from aiortc.mediastreams import VIDEO_TIME_BASE
from aiortc.rtcrtpparameters import RTCRtpCodecParameters
from av.video.codeccontext import VideoCodecContext
from av.video.reformatter import VideoReformatter
from numpy.typing import NDArray

STEP = 0.25
STEP_INTERVAL_S = 3.0
FALL_INTERVAL_S = 1.0
RATE_WINDOW_S = 1.0
SPARE = 1.3
FLAT_S = 2.0
# An estimate that fell by so much has fallen; it is followed for so long.
DROP = 0.95
LIMITED_S = 10.0
# Of the receiver's reports: over the first the network is overfull or so bad that fewer packets get through better.
HEAVY_LOSS = 0.1
LIGHT_LOSS = 0.02
# What was lost before a fall, of the estimate or for losses, shows in the reports for a while after.
LOSS_INTERVAL_S = 0.3
RISE_AFTER_LOSS = 1.15
# Loss by chance: less than this, and the round trip not so much longer than its shortest.
CHANCE_LOSS = 0.35
QUEUE_S = 0.1
LOSS_SMOOTHING = 0.5
TWICE_LOSS = 0.12
# While it is tight, what was sent ahead of the bitrate, in seconds of it; beyond, pictures are left out.
AHEAD_S = 0.3
TIGHT_S = 5.0
# An estimate of so little of what arrives is of a full queue; so long nothing is sent then.
FULL_QUEUE = 0.75
DRAIN_S = 0.3
AUDIO_RATE = 48000
AUDIO_SAMPLES = 960
# libvpx goes by the time stamps. x264 at zerolatency goes by this: at 12 fps it spends half the bitrate, which is
# less than it may and no worse a picture; letting it see the times (force-cfr=0) costs one frame of delay.
NOMINAL_FPS = 24


class BitratePolicy:
    """Which bitrate to encode at, from what the receiver says it can take. Pure.

    Every change rebuilds the encoder and costs a key frame, so it moves in steps of 25 % or more, at least 3 s
    apart; a fall to less than half, or on a tight network, is followed after 1 s, because sending on would fill the
    network's queue.

    An estimate is no complaint while it is 1.3 times what arrives: receivers do not go beyond 1.5 times what they
    get, so after a calm scene (180 kbit/s) Chromium says 280 kbit/s on any network. When the scene then moves, its
    estimate lags behind, 8 % a second; as long as it rises it is not congestion either. But once one has fallen, or
    stood, it is followed up and down for `LIMITED_S`: on 300 kbit/s it wavers by a tenth from packet to packet, and a
    policy that took each rise for a lag sent 1.5 Mbit/s on.

    An encoder follows neither at once nor below what a picture needs: while the delay complains, `has_room` says which
    pictures to leave out. Where the estimate fell to much less than what is sent, the network's queue is full, and
    nothing is sent for `DRAIN_S`.

    An estimate goes by delay and says nothing once a queue is full, so losses over 10 % lower the bitrate too, from
    what is really sent: by and by where there is a queue, and to no less than half where packets are lost by chance.
    That is when the delay does not complain, the round trip is not longer than usual and at most 35 % are lost. There
    fewer packets a picture get through better, and there is room to send each twice.
    """

    def __init__(self, start: int, minimum: int, maximum: int) -> None:
        self._bounds = (minimum, maximum)
        self._current = self._wanted = min(max(start, minimum), maximum)
        self._changed_at: float | None = None
        self._estimate: int | None = None
        self._highest = 0  # of the estimates since the last that fell
        self._flat_since: float | None = None
        self._limited_until = self._tight_until = self._full_until = -math.inf
        self._sent_rate = 0.0
        self._window_bits = 0
        self._window_from: float | None = None
        self._loss = 0.0
        self._loss_counts_from = -math.inf
        self._loss_bound: float | None = None
        self._before_loss = 0.0
        self._chance_loss = 0.0
        self._is_drained = False
        self._ahead_bits = 0.0
        self._ahead_at = 0.0

    @property
    def has_heard(self) -> bool:
        """Whether the receiver has said anything of what it can take."""
        return self._estimate is not None or self._loss_bound is not None

    @property
    def target(self) -> int:
        """What the receiver can take, in bit/s; `bitrate` follows it in steps."""
        return self._wanted if self._loss_bound is None else min(self._wanted, round(self._loss_bound))

    def is_limited(self, now: float) -> bool:
        """Whether the receiver has complained of late."""
        return now < self._limited_until or self._loss_bound is not None

    def begin_at(self, bitrate: int) -> None:
        """Go on from this bitrate, in bit/s, at which others get the same pictures."""
        self._current = self._wanted = self._bounded(bitrate)

    @property
    def sends_twice(self) -> bool:
        """Whether so many packets are lost by chance that each is better sent twice."""
        return self._chance_loss > TWICE_LOSS

    def sent(self, bits: int, now: float) -> None:
        """Take note of what leaves: a frame, or packets that are repeated."""
        if self._window_from is None:
            self._window_from = now
        if now - self._window_from >= RATE_WINDOW_S:
            self._sent_rate = self._window_bits / (now - self._window_from)
            self._window_bits, self._window_from = 0, now
        self._window_bits += bits
        self._drain(now)
        self._ahead_bits += bits

    def has_room(self, now: float) -> bool:
        """Whether the next picture may be sent; always while nothing speaks of a narrow network."""
        self._drain(now)
        if now >= self._tight_until:
            return True
        return now >= self._full_until and self._ahead_bits <= AHEAD_S * self.target

    def lost(self, share: float, queue_s: float, now: float) -> None:
        """Take a receiver report: the share of packets lost, 0 to 1, and the round trip over its shortest."""
        self._loss = share
        by_chance = now >= self._tight_until and queue_s <= QUEUE_S and share <= CHANCE_LOSS
        self._chance_loss += LOSS_SMOOTHING * ((share if by_chance else 0.0) - self._chance_loss)
        if share > HEAVY_LOSS and now >= self._loss_counts_from:
            self._loss_counts_from = now + LOSS_INTERVAL_S
            sent = min(self._sent_rate or self._current, self._current)
            if self._loss_bound is None:
                self._loss_bound = self._before_loss = sent
            floor = self._before_loss / 2 if by_chance else 0.0
            self._loss_bound = max(min(self._loss_bound, sent) * (1 - share / 2), floor, self._bounds[0])
        elif share < LIGHT_LOSS and self._loss_bound is not None:
            self._loss_bound *= RISE_AFTER_LOSS
            if self._loss_bound >= max(self._wanted, self._current):
                self._loss_bound = None

    def report(self, estimate: int, now: float) -> None:
        """Take the receiver's estimate, in bit/s."""
        before, self._estimate = self._estimate, estimate
        has_dropped = estimate < DROP * self._highest
        self._highest = estimate if has_dropped else max(self._highest, estimate)
        arriving = (1 - self._loss) * self._sent_rate
        if estimate >= min(self._current, SPARE * arriving):
            self._flat_since = None
            self._wanted = self._bounded(max(estimate, self._wanted if now < self._limited_until else self._current))
            return
        if now >= self._limited_until and not has_dropped:
            if before is not None and estimate > 1.01 * before:
                self._flat_since, self._wanted = None, self._current
                return
            if self._flat_since is None:
                self._flat_since = now
            if now - self._flat_since < FLAT_S:
                return
        if now >= self._limited_until or has_dropped:
            self._is_drained = self._is_drained and now < self._tight_until
            self._limited_until, self._tight_until = now + LIMITED_S, now + TIGHT_S
        self._wanted = self._bounded(estimate)
        if has_dropped:
            self._loss_counts_from = now + FALL_INTERVAL_S
        if has_dropped and not self._is_drained and estimate < FULL_QUEUE * arriving:
            self._is_drained, self._full_until = True, now + DRAIN_S

    def bitrate(self, now: float) -> int:
        """Return the bitrate to encode the next frame at, in bit/s."""
        if self._changed_at is None:
            self._changed_at = now
        target = self.target
        is_urgent = target < self._current / 2 or (target < self._current and now < self._tight_until)
        interval_s = FALL_INTERVAL_S if is_urgent else STEP_INTERVAL_S
        is_step = abs(target - self._current) >= STEP * self._current
        if is_step and now - self._changed_at >= interval_s:
            self._current, self._changed_at = target, now
        return self._current

    def _drain(self, now: float) -> None:
        self._ahead_bits = max(0.0, self._ahead_bits - (now - self._ahead_at) * self.target)
        self._ahead_at = now

    def _bounded(self, bitrate: int) -> int:
        low, high = self._bounds
        return min(max(bitrate, low), high)


class VideoEncoder:
    """RGB pictures -> RTP payloads of VP8 or H.264. Not for two threads at once."""

    def __init__(self, codec: RTCRtpCodecParameters) -> None:
        self._name = codec.name.lower()
        self._packetizer = get_encoder(codec)
        self._reformatter = VideoReformatter()
        self._context: VideoCodecContext | None = None

    def encode(self, rgb: NDArray[np.uint8], ticks: int, bitrate: int, key_frame: bool) -> list[bytes]:
        """Encode one picture into RTP payloads; as `encode_whole`."""
        payloads: list[bytes] = []
        for packet in self.encode_whole(rgb, ticks, bitrate, key_frame):
            payloads += self._packetizer.pack(packet)[0]
        return payloads

    def encode_whole(self, rgb: NDArray[np.uint8], ticks: int, bitrate: int, key_frame: bool) -> list[av.Packet[Any]]:
        """Encode one [H, W, 3] picture; an odd last row or column is cut off. Nothing comes of one that is skipped.

        Args:
            ticks: presentation time in 90 kHz, rising.
            bitrate: bit/s; another one than before, like another size, begins anew with a key frame.
            key_frame: begin anew in any case. A key frame of an encoder that goes on costs what the pictures left out
                before it have saved: 12 kB instead of 4 at 340 kbit/s, 0.3 s of a narrow network.
        """
        height, width = rgb.shape[0] & ~1, rgb.shape[1] & ~1
        picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(rgb[:height, :width]), format="rgb24")
        planar = self._reformatter.reformat(picture, format="yuv420p", threads=1)
        planar.pts, planar.time_base = ticks, VIDEO_TIME_BASE
        context = self._context
        if (
            key_frame
            or context is None
            or (context.width, context.height, context.bit_rate) != (width, height, bitrate)
        ):
            context = self._context = _video_context(self._name, width, height, bitrate)
        return context.encode(planar)


def _video_context(name: str, width: int, height: int, bitrate: int) -> VideoCodecContext:
    context = av.CodecContext.create("libvpx", "w") if name == "vp8" else av.CodecContext.create("libx264", "w")
    context.width, context.height, context.pix_fmt = width, height, "yuv420p"
    context.bit_rate = bitrate
    context.time_base = VIDEO_TIME_BASE
    context.framerate = fractions.Fraction(NOMINAL_FPS, 1)
    context.gop_size = 3000
    context.thread_count = 1
    if name == "vp8":
        context.qmin, context.qmax = 2, 56
        # Constant bitrate with one second of buffer, as aiortc and libwebrtc set it.
        context.options = {
            "bufsize": str(bitrate),
            "cpu-used": "-6",
            "deadline": "realtime",
            "lag-in-frames": "0",
            "minrate": str(bitrate),
            "maxrate": str(bitrate),
            "noise-sensitivity": "4",
            "overshoot-pct": "15",
            "partitions": "0",
            "static-thresh": "1",
            "undershoot-pct": "100",
        }
    else:
        context.profile = "Baseline"
        context.options = {
            "level": "31",
            "tune": "zerolatency",
            "preset": "veryfast",
            # A buffer of half a second keeps key frames from being ten times a normal frame.
            "maxrate": str(bitrate),
            "bufsize": str(bitrate // 2),
        }
    return context


class AudioEncoder:
    """Sound at 48 kHz, stereo, 16 bit -> Opus packets of 20 ms. Not for two threads at once.

    Packets keep the time of their samples; a gap in the input stays a gap, which the receiver conceals.
    """

    def __init__(self) -> None:
        self._context = av.CodecContext.create("libopus", "w")
        self._context.bit_rate = 64000
        self._context.format = "s16"
        self._context.layout = "stereo"
        self._context.sample_rate = AUDIO_RATE
        self._context.time_base = fractions.Fraction(1, AUDIO_RATE)
        self._context.options = {"application": "voip"}
        self._rest: NDArray[np.int16] = np.zeros(0, np.int16)
        self._rest_at = 0

    def encode(self, frame: av.AudioFrame) -> list[tuple[int, bytes, int]]:
        """Encode a frame: for each packet that is full its time in 48 kHz, its payload and its level in dBov."""
        pts = frame.pts if frame.pts is not None else self._rest_at + len(self._rest) // 2
        if self._rest_at + len(self._rest) // 2 != pts:
            self._rest, self._rest_at = self._rest[:0], pts
        self._rest = np.concatenate([self._rest, frame.to_ndarray().reshape(-1).astype(np.int16)])
        return list(self._packets())

    def _packets(self) -> Iterator[tuple[int, bytes, int]]:
        while len(self._rest) >= 2 * AUDIO_SAMPLES:
            samples, self._rest = self._rest[: 2 * AUDIO_SAMPLES], self._rest[2 * AUDIO_SAMPLES :]
            frame = av.AudioFrame.from_ndarray(samples.reshape(1, -1), format="s16", layout="stereo")
            frame.sample_rate, frame.pts = AUDIO_RATE, self._rest_at
            for packet in self._context.encode(frame):
                yield self._rest_at, bytes(packet), _level_dbov(samples)
            self._rest_at += AUDIO_SAMPLES


def _level_dbov(samples: NDArray[np.int16]) -> int:
    """Return the level in dBov, -127 to 0 (RFC 6464)."""
    rms = float(np.sqrt(np.mean(np.square(samples.astype(np.float32)))))
    return max(-127, round(20 * np.log10(rms / 32767))) if rms > 0 else -127
