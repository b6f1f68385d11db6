"""Bitrate policy, encoders, and the sender's answers to RTCP."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import av
import numpy as np
import pytest
from aiortc.codecs import CODECS, depayload
from aiortc.rtcrtpparameters import RTCRtpCodecParameters
from aiortc.rtp import (
    RTCP_PSFB_APP,
    RTCP_PSFB_PLI,
    RTCP_RTPFB_NACK,
    RtcpPsfbPacket,
    RtcpRtpfbPacket,
    pack_remb_fci,
)

from server.decoding import Decoder, PictureTooLargeError
from server.egress import OutgoingVideo
from server.encoding import AUDIO_SAMPLES, DRAIN_S, AudioEncoder, BitratePolicy, VideoEncoder
from server.frames import OutgoingFrame
from server.reassembly import EncodedFrame, is_h264_key_frame, is_vp8_key_frame
from server.sender import VideoSender
from server.settings import MediaSettings

SETTINGS = MediaSettings()
VIDEO = {name: next(codec for codec in CODECS["video"] if codec.name == name) for name in ("VP8", "H264")}
KEY_TESTS = {"VP8": is_vp8_key_frame, "H264": is_h264_key_frame}


class Wire:
    """The transport of a sender that is not connected: it keeps what is sent."""

    state = "connected"

    def __init__(self) -> None:
        self.sent: list[bytes] = []

    async def _send_rtp(self, data: bytes) -> None:
        self.sent.append(data)


def test_bitrate_begins_at_the_honest_start_within_its_bounds() -> None:
    assert BitratePolicy(1500, 300, 4000).bitrate(0.0) == 1500
    assert BitratePolicy(100, 300, 4000).bitrate(0.0) == 300


@pytest.mark.parametrize(
    ("estimate", "after_s", "bitrate"),
    [
        (1200, 100.0, 1000),  # under 25 %: not worth a key frame
        (2000, 2.9, 1000),
        (2000, 3.0, 2000),
        (9000, 3.0, 4000),
        (700, 0.9, 1000),
        (700, 1.0, 700),  # fallen: soon, sending on would fill the network's queue
        (400, 1.0, 400),
        (1, 1.0, 300),
    ],
)
def test_bitrate_moves_in_coarse_steps(estimate: int, after_s: float, bitrate: int) -> None:
    policy = busy_policy(1000)
    policy.report(1000, -1.0)
    policy.report(estimate, 0.0)
    assert policy.bitrate(after_s) == bitrate


def busy_policy(sent: int) -> BitratePolicy:
    """A policy at 1000 bit/s, of 300 to 4000, with `sent` bit/s on the wire."""
    policy = BitratePolicy(1000, 300, 4000)
    policy.sent(sent, -2.0)
    policy.sent(0, -1.0)
    policy.bitrate(0.0)
    return policy


def test_calm_scene_does_not_lower_the_bitrate() -> None:
    policy = busy_policy(200)
    for second in range(30):
        policy.report(310, float(second))  # 1.5 times what comes, as receivers bound it
        assert policy.bitrate(float(second)) == 1000


def test_estimate_that_lags_behind_a_livelier_scene_is_waited_for_while_it_rises() -> None:
    policy = busy_policy(1000)
    for second in range(15):
        policy.report(round(320 * 1.08**second), float(second))
        assert policy.bitrate(float(second)) == 1000


def test_low_estimate_that_does_not_rise_is_followed() -> None:
    policy = busy_policy(1000)
    used: list[int] = []
    for second in range(6):
        policy.report(320, float(second))
        used.append(policy.bitrate(float(second)))
    assert used == [1000, 1000, 320, 320, 320, 320]


def test_steady_rise_rebuilds_the_encoder_every_few_seconds_only() -> None:
    policy = BitratePolicy(500_000, 300_000, 4_000_000)
    used: list[int] = []
    for step in range(24 * 30):
        now = step / 24
        policy.sent(used[-1] // 24 if used else 0, now)
        policy.report(round(500_000 * 1.08**now), now)
        used.append(policy.bitrate(now))
    assert 4 <= len(set(used)) <= 11
    assert used == sorted(used) and used[-1] > 3_000_000


def test_a_fallen_estimate_is_followed_up_and_down_and_its_wavering_is_no_lag() -> None:
    policy = busy_policy(1000)
    policy.report(1000, 0.0)
    for step, estimate in enumerate((700, 500, 540, 460, 500, 430, 470)):
        policy.report(estimate, 1.0 + 0.1 * step)
    assert policy.bitrate(2.0) == 470
    policy.sent(470, 2.0)
    for second in range(3, 12):
        policy.sent(470, float(second))
        policy.report(470 + 15 * second, float(second))
    assert policy.bitrate(12.0) == 635  # and up again with it, by steps of 25 %


def test_loss_by_chance_costs_half_the_bitrate_at_most_and_no_picture_and_a_clean_line_raises_it_again() -> None:
    policy = busy_policy(800)
    policy.lost(0.05, 0.0, 0.0)
    assert policy.bitrate(3.0) == 1000
    policy.lost(0.2, 0.0, 3.0)
    assert policy.bitrate(3.0) == 720  # 800 less half of the loss
    for second in range(4, 24):
        policy.lost(0.2, 0.05, float(second))
    assert policy.bitrate(24.0) == 400 and policy.has_room(24.0)
    for second in range(24, 32):
        policy.lost(0.0, 0.0, float(second))
    assert policy.bitrate(32.0) == 1000


@pytest.mark.parametrize(("share", "queue_s"), [(0.2, 0.3), (0.5, 0.0)], ids=["queue", "share"])
def test_loss_of_a_full_queue_lowers_the_bitrate_to_its_least(share: float, queue_s: float) -> None:
    policy = busy_policy(800)
    for second in range(40):
        policy.lost(share, queue_s, float(second))
    assert policy.bitrate(40.0) == 300 and not policy.sends_twice


def test_packets_are_sent_twice_while_many_are_lost_by_chance() -> None:
    policy = busy_policy(800)
    told = []
    for second, share in enumerate((0.2, 0.2, 0.2, 0.0, 0.0)):
        policy.lost(share, 0.0, float(second))
        told.append(policy.sends_twice)
    assert told == [False, True, True, False, False]
    policy.report(800, 5.0)
    policy.lost(0.2, 0.0, 5.0)
    policy.report(600, 6.0)  # the delay complains: what is lost is lost to a queue
    for _ in range(4):
        policy.lost(0.2, 0.0, 6.0)
    assert not policy.sends_twice


def test_what_was_lost_before_an_estimate_fell_does_not_lower_the_bitrate_further() -> None:
    policy = busy_policy(1000)
    policy.report(1000, 0.0)
    policy.report(600, 1.0)
    policy.lost(0.6, 0.5, 1.1)
    policy.lost(0.6, 0.5, 1.9)
    assert policy.bitrate(2.0) == 600
    policy.lost(0.6, 0.5, 2.1)
    assert policy.bitrate(3.0) == 420


def test_pictures_are_left_out_while_the_receiver_complains_and_more_was_sent_than_it_takes() -> None:
    policy = busy_policy(1000)
    policy.sent(5000, -0.5)
    assert policy.has_room(0.0)  # a key frame on a good line
    policy.report(1000, 0.0)
    policy.report(500, 0.5)
    assert not policy.has_room(0.5)
    assert policy.has_room(0.5 + 6000 / 500)
    policy.report(1000, 19.0)
    policy.report(500, 20.0)
    policy.sent(100, 20.5)
    assert policy.has_room(20.5)
    policy.sent(100, 20.5)
    assert not policy.has_room(20.5)  # repeated packets count too


def test_nothing_is_sent_into_a_full_queue_until_it_has_drained_a_little() -> None:
    policy = busy_policy(1000)
    policy.report(1000, 10.0)
    policy.report(900, 10.1)
    assert policy.has_room(10.1)
    policy.report(600, 10.2)
    assert not policy.has_room(10.2) and policy.has_room(10.2 + DRAIN_S)
    policy.report(400, 10.6)
    assert policy.has_room(10.6)  # once: the rest is the bitrate's


def moving(number: int, size: tuple[int, int] = (128, 128)) -> np.ndarray[Any, np.dtype[np.uint8]]:
    rows, columns = np.mgrid[: size[0], : size[1]]
    shades = [(rows * 3 + 5 * number) % 256, (columns * 2 + 3 * number) % 256, (rows + columns + number) % 256]
    return np.stack(shades, axis=-1).astype(np.uint8)


def encoded(codec: RTCRtpCodecParameters, payloads: list[bytes]) -> bytes:
    return b"".join(depayload(codec, payload) for payload in payloads)


@pytest.mark.parametrize("name", ["VP8", "H264"])
def test_pictures_survive_the_codec_at_any_size(name: str) -> None:
    codec = VIDEO[name]
    encoder, decoder = VideoEncoder(codec), Decoder(codec, 1920 * 1080)
    for number, size in enumerate([(128, 128), (128, 128), (97, 131), (64, 256)]):
        picture = np.full((*size, 3), (200, 90, 40), np.uint8)
        data = encoded(codec, encoder.encode(picture, number * 3000, 1_000_000, False))
        (frame,) = decoder.decode(EncodedFrame(data, number * 3000, 0.0))
        assert isinstance(frame, av.VideoFrame)
        assert (frame.height, frame.width) == (size[0] & ~1, size[1] & ~1)
        colour = frame.to_ndarray(format="rgb24").reshape(-1, 3).mean(axis=0)
        assert np.abs(colour - (200, 90, 40)).max() < 6


@pytest.mark.parametrize("name", ["VP8", "H264"])
def test_key_frames_come_first_when_asked_for_and_with_a_new_bitrate(name: str) -> None:
    codec, encoder, keys = VIDEO[name], VideoEncoder(VIDEO[name]), []
    for number in range(12):
        bitrate = 1_000_000 if number < 8 else 2_000_000
        data = encoded(codec, encoder.encode(moving(number), number * 3750, bitrate, number == 4))
        keys.append(KEY_TESTS[name](data))
    assert [number for number, key in enumerate(keys) if key] == [0, 4, 8]


@pytest.mark.parametrize(("name", "fps"), [("VP8", 12), ("VP8", 24), ("H264", 24)])
def test_bitrate_is_kept_at_the_real_frame_rate(name: str, fps: int) -> None:
    encoder, noise = VideoEncoder(VIDEO[name]), np.random.default_rng(0)
    bits = 0
    for number in range(5 * fps):
        payloads = encoder.encode(
            noise.integers(0, 255, (128, 128, 3), np.uint8), number * 90000 // fps, 600_000, False
        )
        assert payloads, "no frame is held back"
        bits += 8 * sum(map(len, payloads))
    assert 0.8 < bits / 5 / 600_000 < 1.2


def test_picture_far_over_the_bound_is_refused_before_it_is_decoded() -> None:
    codec = VIDEO["VP8"]
    data = encoded(codec, VideoEncoder(codec).encode(moving(0, (720, 1280)), 0, 1_000_000, False))
    with pytest.raises(PictureTooLargeError) as refused:
        Decoder(codec, 160 * 120).decode(EncodedFrame(data, 0, 0.0))
    # By FFmpeg, which has made no buffer yet, and not by the size of a decoded picture.
    assert isinstance(refused.value.__cause__, av.ArgumentError)
    (frame,) = Decoder(codec, 1280 * 720).decode(EncodedFrame(data, 0, 0.0))
    assert isinstance(frame, av.VideoFrame)


def test_full_hd_fits_the_default_bound() -> None:
    for codec in VIDEO.values():
        data = encoded(codec, VideoEncoder(codec).encode(moving(0, (1080, 1920)), 0, 4_000_000, False))
        assert len(Decoder(codec, SETTINGS.max_input_pixels).decode(EncodedFrame(data, 0, 0.0))) == 1


def test_sound_of_any_packet_length_becomes_20_ms_packets_with_its_own_times() -> None:
    encoder, times = AudioEncoder(), []
    pts = 5000
    for samples in (960, 960, 2880, 480, 480, 960):
        times += [time for time, payload, level in encoder.encode(tone(samples, pts)) if payload and -20 < level < 0]
        pts += samples
    assert times == [5000 + 960 * number for number in range(7)]
    later = pts + 9600  # a gap stays a gap
    assert [time for time, _, _ in encoder.encode(tone(960, later))] == [later]


def tone(samples: int, pts: int) -> av.AudioFrame:
    wave = (8000 * np.sin(np.arange(2 * samples) * 0.05)).astype(np.int16).reshape(1, -1)
    frame = av.AudioFrame.from_ndarray(wave, format="s16", layout="stereo")
    frame.sample_rate, frame.pts = 48000, pts
    assert AUDIO_SAMPLES == 960
    return frame


async def test_sender_follows_the_receiver_and_limits_what_it_can_be_made_to_do() -> None:
    counters: Counter[str] = Counter()
    track, wire = OutgoingVideo(counters), Wire()
    with ThreadPoolExecutor(1) as pool:
        sender = VideoSender(track, cast(Any, wire), pool, SETTINGS, counters)
        remb = RtcpPsfbPacket(fmt=RTCP_PSFB_APP, ssrc=1, media_ssrc=0, fci=pack_remb_fci(3_000_000, [sender._ssrc]))
        await sender._handle_rtcp_packet(remb)
        assert sender.policy.bitrate(1e9) == 1_500_000 and sender.policy.bitrate(2e9) == 3_000_000
        await sender._handle_rtcp_packet(RtcpPsfbPacket(fmt=RTCP_PSFB_APP, ssrc=1, media_ssrc=0, fci=b"junk"))
        assert counters["rtcp_malformed"] == 1

        nack = RtcpRtpfbPacket(fmt=RTCP_RTPFB_NACK, ssrc=1, media_ssrc=sender._ssrc)
        nack.lost = [7] * 5000
        await sender._handle_rtcp_packet(nack)
        assert counters["repeats_gone"] == 1

        kinds = []
        for number in range(3):
            await sender._handle_rtcp_packet(RtcpPsfbPacket(fmt=RTCP_PSFB_PLI, ssrc=1, media_ssrc=sender._ssrc))
            track.push(OutgoingFrame(number, 0.0, moving(number), 0), 100.0 + number)
            frame = await sender._next_encoded_frame(VIDEO["VP8"])
            assert frame is not None and frame.timestamp == number * 90000
            kinds.append(is_vp8_key_frame(encoded(VIDEO["VP8"], frame.payloads)))
        assert kinds == [True, False, False] and counters["key_frames_sent"] == 1


async def test_left_out_pictures_do_not_swell_the_next_one() -> None:
    """Constant bitrate in time would give the one picture that is sent in a second what all of them save."""
    counters: Counter[str] = Counter()
    track = OutgoingVideo(counters)
    noise = np.random.default_rng(0)
    with ThreadPoolExecutor(1) as pool:
        sender = VideoSender(track, cast(Any, Wire()), pool, SETTINGS, counters)
        sizes = []
        for number in range(60):
            # 15 a second, then one a second as the rest finds no room.
            if number >= 40 and number % 4:
                sender.policy.has_room = lambda now: False  # type: ignore[method-assign]
            else:
                sender.policy.has_room = lambda now: True  # type: ignore[method-assign]
            picture = noise.integers(0, 255, (128, 128, 3), np.uint8)
            track.push(OutgoingFrame(number, 0.0, picture, 0), 100.0 + number / 15)
            if (frame := await sender._next_encoded_frame(VIDEO["VP8"])) is not None:
                sizes.append(sum(map(len, frame.payloads)))
    assert counters["network_behind"] == 15 and len(sizes) == 45
    assert max(sizes[40:]) < 1.5 * max(sizes[20:40])
