"""`livebrush camera` as users start it, over a stand-in with pyvirtualcam's interface, and its refusals."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from server.camera_command import CURES
from server.camera_player import fitted
from server.cli import main
from tests.e2e.serving import Server

PATIENCE_S = 60.0
ADMIN = "an-admin-token-of-this-test-0123456789abcdef"
SCRIPT = Path(sys.executable).with_name("livebrush")
STAND_IN = '''
import os
import numpy as np

class Camera:
    """As pyvirtualcam.Camera; leaves the last picture and the number of all in a file."""

    def __init__(self, width, height, fps, *, device=None, backend=None, print_fps=False):
        if device == "/dev/none":
            raise RuntimeError("v4l2loopback backend: No v4l2loopback device found")
        self.width, self.height, self.fps, self.device = width, height, fps, device or "/dev/video10"
        self.count = 0

    def send(self, frame):
        assert frame.shape == (self.height, self.width, 3) and frame.dtype == np.uint8
        assert frame.flags["C_CONTIGUOUS"]
        self.count += 1
        path = os.environ["STAND_IN_FILE"]
        np.save(path + ".new.npy", np.concatenate([np.full((1, self.width, 3), self.count % 256, np.uint8), frame]))
        os.replace(path + ".new.npy", path)

    def close(self):
        open(os.environ["STAND_IN_FILE"] + ".closed", "w").close()
'''
PUBLISH = """
import asyncio, sys
import numpy as np, av, aiohttp
import aioice.ice
from aiortc import RTCConfiguration, RTCPeerConnection, RTCSessionDescription
from aiortc.mediastreams import VideoStreamTrack

aioice.ice.get_host_addresses = lambda use_ipv4, use_ipv6: ["127.0.0.1"]

class Grey(VideoStreamTrack):
    async def recv(self):
        pts, base = await self.next_timestamp()
        frame = av.VideoFrame.from_ndarray(np.full((240, 320, 3), 120, np.uint8), format="rgb24")
        frame.pts, frame.time_base = pts, base
        return frame

async def run(url):
    connection = RTCPeerConnection(RTCConfiguration(iceServers=[]))
    connection.addTransceiver(Grey(), direction="sendonly")
    await connection.setLocalDescription(await connection.createOffer())
    async with aiohttp.ClientSession() as http:
        headers = {"Content-Type": "application/sdp"}
        async with http.post(url, data=connection.localDescription.sdp, headers=headers) as response:
            assert response.status == 201, await response.text()
            answer = await response.text()
    await connection.setRemoteDescription(RTCSessionDescription(answer, "answer"))
    await asyncio.sleep(3600)

asyncio.run(run(sys.argv[1]))
"""


class Desk:
    """The programs of one test, and what the stand-in camera shows."""

    def __init__(self, folder: Path) -> None:
        (folder / "pyvirtualcam.py").write_text(STAND_IN)
        self.shown_at = folder / "shown.npy"
        self.environment = {**os.environ, "PYTHONPATH": str(folder), "STAND_IN_FILE": str(self.shown_at)}
        self.programs: list[subprocess.Popen[str]] = []

    def start(self, *command: str) -> subprocess.Popen[str]:
        self.programs.append(
            subprocess.Popen(
                command, env=self.environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=1
            )
        )
        return self.programs[-1]

    def shown(self) -> np.ndarray | None:
        """The picture that the webcam shows now."""
        return np.load(self.shown_at)[1:] if self.shown_at.exists() else None

    def count(self) -> int:
        return int(np.load(self.shown_at)[0, 0, 0]) if self.shown_at.exists() else 0

    def middle(self) -> float:
        shown = self.shown()
        return 0.0 if shown is None else float(shown[shown.shape[0] // 2, shown.shape[1] // 2].mean())


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    made = Desk(tmp_path)
    yield made
    for program in made.programs:
        program.kill()
        program.communicate()


def until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, f"waited {PATIENCE_S:.0f} s in vain for {what}"
        time.sleep(0.05)


@pytest.mark.slow
def test_a_stream_plays_into_the_webcam_through_every_loss(desk: Desk, tmp_path: Path) -> None:
    with Server(tmp_path / "server.log", engine="fake", patient=True) as server:
        camera = desk.start(
            str(SCRIPT), "camera", "--stream", "desk", "--url", server.url, "--size", "320x180", "--fps", "10"
        )
        # A webcam from the start, before there is anything to show.
        until(lambda: desk.shown() is not None, "a first picture")
        assert desk.middle() < 30
        publisher = desk.start(sys.executable, "-c", PUBLISH, f"{server.url}/whip/desk?bypass=true")
        until(lambda: abs(desk.middle() - 120) < 12, "the published grey")
        shown = desk.shown()
        assert shown is not None and shown.shape == (180, 320, 3)
        assert shown[:, :20].max() == 0  # fitted in, not stretched

        publisher.kill()
        server.kill()
        until(lambda: abs(desk.middle() - 60) < 12, "half brightness")
        before = desk.count()
        until(lambda: (desk.count() - before) % 256 >= 3, "pictures while the stream is away")
        server.start()
        desk.start(sys.executable, "-c", PUBLISH, f"{server.url}/whip/desk?bypass=true")
        until(lambda: abs(desk.middle() - 120) < 12, "the picture's return")

        camera.send_signal(signal.SIGINT)
        out, err = camera.communicate(timeout=PATIENCE_S)
        assert camera.returncode == 0, err
        assert "The webcam is /dev/video10, 320x180" in out and "nobody publishes" in out
        assert out.count("desk plays") == 2 and "Ended. Pictures shown:" in out
        assert desk.shown_at.with_name("shown.npy.closed").exists()
        # It said goodbye.
        until(lambda: '"viewers": 0' in server.get("/api/v1/streams"), "the viewer's place")


def test_without_a_device_it_says_what_makes_one(desk: Desk) -> None:
    camera = desk.start(str(SCRIPT), "camera", "--stream", "a", "--device", "/dev/none")
    _, err = camera.communicate(timeout=PATIENCE_S)
    assert camera.returncode == 1
    assert "No v4l2loopback device found" in err and CURES[sys.platform] in err


def test_a_server_that_refuses_for_good_ends_it(desk: Desk, tmp_path: Path) -> None:
    with Server(tmp_path / "server.log", engine="fake", LIVEBRUSH_TOKENS__ADMIN=ADMIN) as server:
        camera = desk.start(str(SCRIPT), "camera", "--stream", "a", "--url", server.url)
        _, err = camera.communicate(timeout=PATIENCE_S)
    assert camera.returncode == 1 and "token" in err.lower()


def test_without_the_library_it_says_how_to_have_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyvirtualcam", None)
    assert main(["camera", "--stream", "a"]) == 1
    assert "pip install 'livebrush[camera]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--stream", "no name"], "1 to 64 letters"),
        (["--stream", "a", "--size", "5x5"], "from 16 to 4096"),
        (["--stream", "a", "--fps", "0"], "from 1 to 60"),
    ],
)
def test_wrong_options_name_their_bound(options: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["camera", *options])
    assert words in capsys.readouterr().err


def test_a_picture_is_fitted_whole_and_mirrored() -> None:
    picture = np.zeros((64, 64, 3), np.uint8)
    picture[:, :32] = 200
    frame = fitted(picture, 160, 90)
    assert frame.shape == (90, 160, 3)
    assert frame[:, :35].max() == 0 and frame[:, 125:].max() == 0
    assert (frame[45, 36:78] == 200).all() and frame[45, 82:].max() == 0
    assert (fitted(picture, 160, 90, mirror=True)[45, 82:124] == 200).all()
