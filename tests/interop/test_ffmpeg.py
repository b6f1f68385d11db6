"""A foreign client: the whip muxer of FFmpeg 9, from a newer Debian (newer_debian.py), against `livebrush serve`.

Skipped, with the reason, where that FFmpeg cannot be had. What is seen is the fake engine's tint: a grey that was
published as it is would not pass.
"""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager

import numpy as np
import pytest

from engine.api import StreamParams
from engine.fake import tint
from tests.e2e.serving import Server
from tests.interop.asking import ask
from tests.interop.newer_debian import Unavailable, command_of
from tests.server.waiting import until
from tests.server.whip_client import Client

TOKEN = "a-token-of-the-tests"
BEARER = {"Authorization": f"Bearer {TOKEN}"}
TIMEOUT_S = 60.0
GREY = 100
PAINTED = tint(np.full((1, 1, 1, 3), GREY, np.uint8), StreamParams(prompt="neon"))[0, 0, 0].astype(float)
TOLERANCE = 12.0
SOURCES = (
    "-f",
    "lavfi",
    "-i",
    f"color=0x{GREY:02x}{GREY:02x}{GREY:02x}:s=320x240:r=30",
    "-f",
    "lavfi",
    "-i",
    "sine=440",
)
VIDEO = (
    "-c:v",
    "libx264",
    "-preset",
    "ultrafast",
    "-tune",
    "zerolatency",
    "-bf",
    "0",
    "-g",
    "30",
    "-pix_fmt",
    "yuv420p",
)
AUDIO = ("-c:a", "libopus", "-ar", "48000", "-ac", "2")


@pytest.fixture(autouse=True)
def only_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    """The viewer too: aioice leaves 127.0.0.1 out, and no test sends anywhere else."""
    monkeypatch.setattr("aioice.ice.get_host_addresses", lambda use_ipv4, use_ipv6: ["127.0.0.1"])


@pytest.fixture(scope="module")
def ffmpeg() -> list[str]:
    try:
        command = command_of("ffmpeg", "ffmpeg")
    except Unavailable as reason:
        pytest.skip(str(reason))
    muxers = subprocess.run([*command, "-hide_banner", "-muxers"], capture_output=True, text=True, timeout=TIMEOUT_S)
    assert " whip " in muxers.stdout, muxers.stdout + muxers.stderr
    return command


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server(
        tmp_path_factory.mktemp("server") / "log",
        engine="fake",
        patient=True,
        LIVEBRUSH_TOKENS__PUBLISH=TOKEN,
        LIVEBRUSH_MAX_SESSIONS="1",
    ) as running:
        yield running


class Publisher:
    """One ffmpeg, publishing until it is stopped."""

    def __init__(self, command: list[str], server: Server, path: str, *options: str, token: str = TOKEN) -> None:
        patient = ("-handshake_timeout", "60000")
        whip = (*patient, "-authorization", token, *options, "-f", "whip", server.url + path)
        self._process = subprocess.Popen(
            [*command, "-hide_banner", "-loglevel", "info", "-re", *SOURCES, *VIDEO, *AUDIO, *whip],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )

    def said(self) -> tuple[int, str]:
        """Its exit status and what it wrote; kills one that does not end by itself."""
        try:
            _, text = self._process.communicate(timeout=TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()
            raise
        return self._process.returncode, text

    def stop(self) -> str:
        """As Ctrl-C does."""
        self._process.send_signal(signal.SIGINT)
        return self.said()[1]


@contextmanager
def publishing(command: list[str], server: Server, path: str, *options: str) -> Iterator[None]:
    publisher = Publisher(command, server, path, *options)
    try:
        yield
    finally:
        said = publisher.stop()
    assert "rror" not in said, said


def open_sessions(server: Server) -> int:
    return int(json.loads(ask("GET", server.url + "/api/v1/capacity", headers=BEARER).text)["open"])


def live(server: Server, name: str) -> bool:
    """Whether somebody publishes the stream."""
    streams = json.loads(ask("GET", server.url + "/api/v1/streams", headers=BEARER).text)["streams"]
    return any(one["stream"] == name and one["live"] and one["stats"]["restyled"] > 0 for one in streams)


@asynccontextmanager
async def viewer(server: Server, path: str) -> AsyncIterator[Client]:
    client = Client(server.url, publishes=False, sound=True)
    client.http.headers.update(BEARER)
    try:
        response = await client.enter(path)
        assert response.status == 201, await response.text()
        yield client
        assert await client.leave() == 200
    finally:
        await client.close()


def is_painted(client: Client) -> bool:
    """Whether the newest picture is the grey as the prompt tints it."""
    if not client.pictures:
        return False
    shown = np.median(client.pictures[-1][1].astype(float), axis=(0, 1))
    return bool(np.abs(shown - PAINTED).max() < TOLERANCE)


@pytest.mark.parametrize(
    "options",
    [("-profile:v", "baseline"), ("-profile:v", "high", "-whip_flags", "dtls_active")],
    ids=["baseline", "high, dtls_active"],
)
async def test_ffmpeg_publishes_leaves_and_comes_back(
    ffmpeg: list[str], server: Server, options: tuple[str, ...]
) -> None:
    assert np.abs(PAINTED - GREY).max() > 3 * TOLERANCE
    ended = server.ended().get("closed", 0)
    async with AsyncExitStack() as watching:
        with publishing(ffmpeg, server, "/whip/ff?prompt=neon", *options):
            await until(lambda: live(server, "ff"), "the first restyled frame")
            client = await watching.enter_async_context(viewer(server, "/whep/ff"))
            await until(lambda: is_painted(client) and client.sounds > 50, "the painted picture and the sound")
        # Its DELETE: long before a peer that fell silent is given up.
        await until(lambda: server.ended().get("closed", 0) == ended + 1, "the seat to be free")
        await until(lambda: not is_painted(client), "the last picture at half brightness")
        with publishing(ffmpeg, server, "/whip/ff?prompt=neon", *options):
            await until(lambda: is_painted(client), "the painted picture to be back in the same connection")
    await until(lambda: open_sessions(server) == 0, "the end")


@pytest.mark.parametrize(
    ("path", "token", "status"),
    [("/whip/ff?prompt=neon", "not-the-token-at-all", 401), ("/whip/ff?brush=7", TOKEN, 400)],
    ids=["wrong token", "unknown parameter"],
)
async def test_a_refusal_is_told(ffmpeg: list[str], server: Server, path: str, token: str, status: int) -> None:
    code, said = Publisher(ffmpeg, server, path, token=token).said()
    assert code != 0 and str(status) in said, said
    assert open_sessions(server) == 0
    assert f"POST /whip/ff refused: {status}, " in server.log_text()


async def test_a_second_one_finds_no_seat_and_the_first_goes_on(ffmpeg: list[str], server: Server) -> None:
    with publishing(ffmpeg, server, "/whip/ff?prompt=neon"):
        await until(lambda: live(server, "ff"), "the first restyled frame")
        for path, status in (("/whip/other", 503), ("/whip/ff", 409)):
            code, said = Publisher(ffmpeg, server, path).said()
            assert code != 0 and str(status) in said, said
            assert f"POST {path} refused: {status}, " in server.log_text()
        async with viewer(server, "/whep/ff") as client:
            await until(lambda: is_painted(client), "the painted picture")
