"""Films of sessions with sound, without, and with sound that comes late: pictures alone, all there, at their times."""

from __future__ import annotations

import asyncio
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import av
import pytest
from aiortc.mediastreams import AudioStreamTrack

from server.settings import RecordingSettings
from tests.server.test_whip import Client, House, open_house, until

SOUNDS = {"none": None, "from the start": 0.0, "late": 1.5}


@pytest.fixture(autouse=True)
def only_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aioice.ice.get_host_addresses", lambda use_ipv4, use_ipv6: ["127.0.0.1"])


class LateSound(AudioStreamTrack):
    """Silence, but no packet of it for so long."""

    def __init__(self, late_s: float) -> None:
        super().__init__()
        self._late_s = late_s

    async def recv(self) -> av.AudioFrame:
        if self._late_s:
            await asyncio.sleep(self._late_s)
            self._late_s = 0.0
        frame = await super().recv()
        assert isinstance(frame, av.AudioFrame)
        return frame


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


@pytest.mark.parametrize("sound", SOUNDS)
async def test_a_film_is_whole_whatever_the_sound_does_and_is_there_after_its_session(
    sound: str, tmp_path: Path
) -> None:
    async with open_house(recordings=RecordingSettings(dir=tmp_path, min_free_bytes=0)) as house:
        publisher, late_s = house.publisher(sound=SOUNDS[sound] is not None), SOUNDS[sound]
        if late_s is not None:
            (audio,) = (one for one in publisher.connection.getTransceivers() if one.kind == "audio")
            audio.sender.replaceTrack(LateSound(late_s))
        assert (await publisher.enter("/whip/live")).status == 201
        player = house.player(sound=True)
        await player.enter("/whep/live")
        await until(lambda: player.pictures, "a picture")
        await recording(house, "POST")
        await filmed(player, 40)
        if late_s is not None:
            await until(lambda: player.sounds > 10, "sound beside the recording")
            await filmed(player, 20)
        # The session ends, by its publisher; the recording with it, and the files stay.
        assert await publisher.leave() == 200
        async with asyncio.timeout(60):
            while len(list(tmp_path.rglob("*.mp4"))) < 2:
                await asyncio.sleep(0.1)
    for path in tmp_path.rglob("*.mp4"):
        with av.open(str(path)) as film:
            assert [stream.type for stream in film.streams] == ["video"]
            times = [Fraction(frame.pts or 0) * Fraction(frame.time_base or 0) for frame in film.decode(video=0)]
        assert len(times) >= 20 and 0 <= times[0] < Fraction(1, 2)
        assert all(earlier < later for earlier, later in pairwise(times))
        # Real time: 24 a second at most, as agreed, and no hole where the sound came.
        assert len(times) / 60 < times[-1] - times[0]
        assert max(later - earlier for earlier, later in pairwise(times)) < 5
