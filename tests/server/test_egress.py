"""The outgoing tracks: release stamps, bounds, sound in step with the picture."""

from __future__ import annotations

import asyncio
import time
from collections import Counter

import av
import numpy as np
import pytest
from aiortc.mediastreams import MediaStreamError

from server.egress import MAX_SOUND, DelayedAudio, OutgoingVideo
from server.frames import OutgoingFrame

PATIENCE_S = 30.0


def outgoing(index: int) -> OutgoingFrame:
    return OutgoingFrame(index, 0.0, np.zeros((16, 16, 3), np.uint8), 0)


async def test_stamps_are_release_times_and_rise_even_when_the_clock_does_not() -> None:
    track = OutgoingVideo(Counter())
    ticks = []
    for index, now in enumerate([10.0, 10.0, 10.5, 10.5, 10.4, 11.0]):
        track.push(outgoing(index), now)
        released = await track.next()
        assert released.released_at == now and released.frame.index == index
        ticks.append(released.ticks)
    assert ticks == [0, 1, 45000, 45001, 45002, 90000]


async def test_two_wait_the_newest_win_and_the_rest_is_counted() -> None:
    counters: Counter[str] = Counter()
    track = OutgoingVideo(counters)
    for index in range(5):
        track.push(outgoing(index), float(index))
    assert [(await track.next()).frame.index for _ in range(2)] == [3, 4]
    assert counters["outgoing_dropped"] == 3


async def test_stopping_tells_who_waits() -> None:
    video, audio = OutgoingVideo(Counter()), DelayedAudio(lambda: 0.0, Counter())
    waiting = [asyncio.create_task(video.next()), asyncio.create_task(audio.recv())]
    await asyncio.sleep(0)
    video.stop()
    audio.stop()
    results = await asyncio.wait_for(asyncio.gather(*waiting, return_exceptions=True), PATIENCE_S)
    assert [type(result) for result in results] == [MediaStreamError, MediaStreamError]


async def test_stock_sender_could_read_the_track_too() -> None:
    track = OutgoingVideo(Counter())
    track.push(outgoing(0), 1.0)
    frame = await track.recv()
    assert (frame.width, frame.pts) == (16, 0)


def sound(pts: int) -> av.AudioFrame:
    frame = av.AudioFrame.from_ndarray(np.zeros((1, 1920), np.int16), format="s16", layout="stereo")
    frame.sample_rate, frame.pts = 48000, pts
    return frame


async def test_sound_waits_for_the_picture_and_follows_when_that_gets_faster() -> None:
    delay_s = 3600.0
    track = DelayedAudio(lambda: delay_s, Counter())
    track.push(sound(0), time.monotonic())
    waiting = asyncio.create_task(track.recv())
    done, _ = await asyncio.wait([waiting], timeout=0.2)
    assert not done
    delay_s = 0.0
    assert (await asyncio.wait_for(waiting, PATIENCE_S)).pts == 0


async def test_sound_held_is_bounded() -> None:
    counters: Counter[str] = Counter()
    track = DelayedAudio(lambda: 0.0, counters)
    for number in range(MAX_SOUND + 5):
        track.push(sound(number), 0.0)
    assert (await track.recv()).pts == 5 and counters["audio_dropped"] == 5


@pytest.mark.parametrize("delay_s", [0.0, -1.0])
async def test_late_sound_is_given_at_once(delay_s: float) -> None:
    track = DelayedAudio(lambda: delay_s, Counter())
    track.push(sound(3), time.monotonic())
    assert (await asyncio.wait_for(track.recv(), PATIENCE_S)).pts == 3
