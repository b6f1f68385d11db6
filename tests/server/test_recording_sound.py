"""Films of sessions with sound, without, and with sound that comes late: whole, at their times, and without holes."""

from __future__ import annotations

import asyncio
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import av
import numpy as np
import pytest
from aiortc.mediastreams import AudioStreamTrack

from server.recording import MAX_SOUND, Recordings
from server.recording_process import Recorder
from server.settings import RecordingSettings
from tests.server.test_whip import House, open_house
from tests.server.waiting import until
from tests.server.whip_client import Client

RATE = 48_000


@pytest.fixture(autouse=True)
def only_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aioice.ice.get_host_addresses", lambda use_ipv4, use_ipv6: ["127.0.0.1"])


class Tone(AudioStreamTrack):
    """A tone, from when it may sound."""

    def __init__(self) -> None:
        super().__init__()
        self.may_sound = asyncio.Event()

    async def recv(self) -> av.AudioFrame:
        await self.may_sound.wait()
        frame = await super().recv()
        assert isinstance(frame, av.AudioFrame) and frame.pts is not None
        wave = (8000 * np.sin((frame.pts + np.arange(frame.samples)) * 0.3)).astype(np.int16)
        made = av.AudioFrame.from_ndarray(wave.reshape(1, -1), format="s16", layout="mono")
        made.sample_rate, made.pts, made.time_base = frame.sample_rate, frame.pts, frame.time_base
        return made


async def recording(house: House, method: str) -> dict[str, object]:
    url = f"{house.base}/api/v1/streams/live/recording"
    body = {"what": ["input", "output"]} if method == "POST" else None
    async with house.http.request(method, url, json=body) as response:
        assert response.status in (200, 201), await response.text()
        return dict(await response.json())


async def filmed(player: Client, pictures: int) -> None:
    """Wait for so many pictures more, which the recording gets too."""
    goal = len(player.pictures) + pictures
    await until(lambda: len(player.pictures) >= goal, "pictures")


def picture_times(path: Path) -> list[Fraction]:
    with av.open(str(path)) as film:
        return [Fraction(frame.pts or 0) * Fraction(frame.time_base or 0) for frame in film.decode(video=0)]


def loudness(path: Path) -> np.ndarray:
    """Of every tenth of a second of sound; AssertionError where it has a hole."""
    with av.open(str(path)) as film:
        frames = list(film.decode(audio=0))
    for earlier, later in pairwise(frames):
        assert (earlier.pts or 0) + earlier.samples == later.pts
    samples = np.concatenate([frame.to_ndarray()[0] for frame in frames])
    tenths = samples[: len(samples) // (RATE // 10) * (RATE // 10)].reshape(-1, RATE // 10)
    return np.asarray(np.sqrt(np.mean(np.square(tenths), axis=1)))


@pytest.mark.parametrize("sound", ["none", "from the start", "late"])
async def test_a_film_is_whole_whatever_the_sound_does_and_is_there_after_its_session(
    sound: str, tmp_path: Path
) -> None:
    async with open_house(recordings=RecordingSettings(dir=tmp_path, min_free_bytes=0)) as house:
        publisher, tone = house.publisher(sound=sound != "none"), Tone()
        if sound != "none":
            (audio,) = (one for one in publisher.connection.getTransceivers() if one.kind == "audio")
            audio.sender.replaceTrack(tone)
        assert (await publisher.enter("/whip/live")).status == 201
        player = house.player(sound=True)
        await player.enter("/whep/live")
        await until(lambda: player.pictures, "a picture")
        if sound == "from the start":
            tone.may_sound.set()
            await until(lambda: player.sounds > 10, "sound")
        begun = await recording(house, "POST")
        assert begun["recording"]
        await filmed(player, 60)
        tone.may_sound.set()
        if sound != "none":
            await until(lambda: player.sounds > 10, "sound beside the recording")
        await filmed(player, 60)
        # The session ends, by its publisher, and the recording with it; the files stay.
        assert await publisher.leave() == 200
        async with asyncio.timeout(60):
            while len(list(tmp_path.rglob("*.mp4"))) < 2:
                await asyncio.sleep(0.1)
    for path in tmp_path.rglob("*.mp4"):
        with av.open(str(path)) as film:
            types = sorted(stream.type for stream in film.streams)
        assert types == (["video"] if sound == "none" else ["audio", "video"])
        times = picture_times(path)
        assert len(times) >= 20 and 0 <= times[0] < Fraction(1, 2)
        assert all(earlier < later for earlier, later in pairwise(times))
        # Real time: 24 a second at most, as agreed, and no hole where the sound came.
        assert len(times) / 60 < times[-1] - times[0]
        assert max(later - earlier for earlier, later in pairwise(times)) < 5
        if sound != "none":
            loud = loudness(path) > 0.05
            assert abs(len(loud) / 10 - float(times[-1])) < 1.5
            assert loud.mean() > 0.8 if sound == "from the start" else (not loud[:5].any() and loud.any())


def test_sound_has_its_place_and_holes_are_silence(tmp_path: Path) -> None:
    """By the recorder itself, with times of the test's own: a second of tone, one of nothing, one of tone, nothing."""
    recorder = Recorder(tmp_path, 0)
    black = np.zeros((1, 64, 64, 3), np.uint8)
    tone = (12000 * np.sin(np.arange(RATE // 50) * 0.3)).astype(np.int16)
    stereo = np.repeat(tone, 2).tobytes()

    def sound_at(second: float) -> None:
        recorder.take({"sound": "output", "ticks": round(90_000 * second), "bytes": len(stereo)}, stereo)

    sound_at(0.0)  # before the film begins: nothing to add it to
    for tenth in range(40):
        header = {"file": "output", "shape": black.shape[:3], "ticks": 9000 * tenth, "has_sound": True}
        recorder.take(header, black.tobytes())
        if tenth < 10 or 20 <= tenth < 30:
            for part in range(5):
                # 10 ms of jitter is not a hole, nor a reason to leave out.
                sound_at(tenth / 10 + part / 50 + (0.01 if part % 2 else 0.0))
        if tenth == 35:
            sound_at(0.5)  # far too late
    recorder.close()
    path = tmp_path / "output.mp4"
    assert len(picture_times(path)) == 40
    loud = loudness(path) > 0.1
    assert loud[1:9].all() and not loud[11:19].any() and loud[21:29].all() and not loud[32:].any()
    assert 38 <= len(loud) <= 42


def test_a_film_without_sound_has_no_track_for_it(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path, 0)
    recorder.take({"file": "input", "shape": (1, 64, 64), "ticks": 0}, bytes(64 * 64 * 3))
    recorder.take({"sound": "input", "ticks": 0, "bytes": 4}, bytes(4))
    recorder.close()
    with av.open(str(tmp_path / "input.mp4")) as film:
        assert [stream.type for stream in film.streams] == ["video"]
        assert len(list(film.decode(video=0))) == 1


@pytest.mark.parametrize("sound", [True, False])
async def test_who_is_recorded_is_told_of_the_sound(sound: bool, tmp_path: Path) -> None:
    told: list[str] = []
    async with Recordings(RecordingSettings(dir=tmp_path, min_free_bytes=0)) as book:
        one = book.start(["output"], lambda _, message: told.append(message), has_sound=sound)
        await one.begun
        assert ("Sound is recorded too" in told[0]) == sound == one.wants_sound_of("output")
        # It never waits: what comes faster than it is written makes way.
        for packet in range(MAX_SOUND + 10):
            one.sound("output", bytes(4), float(packet))
        assert one.counters["sound_dropped"] == (10 if sound else 0)
        assert not one.wants_sound_of("input")
