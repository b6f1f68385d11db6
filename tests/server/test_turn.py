"""TURN: credentials that a real coturn takes, and a session whose every packet goes through it."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import hmac
import shutil
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest
from aiortc import RTCConfiguration, RTCIceServer
from aiortc.rtcconfiguration import RTCIceTransportPolicy
from pydantic import SecretStr, ValidationError

from engine.config import EngineSettings
from engine.fake import FakeEngine
from server.app import running_server
from server.settings import MediaSettings, ServerSettings
from server.turn import LIFETIME_S, IceServer, credentials, ice_servers
from tests.server.test_server import Visitor

SECRET = "north"
COTURN = shutil.which("turnserver")


def test_credentials_are_the_scheme_of_coturn() -> None:
    username, password = credentials("north", "k7", 1_700_000_600)
    assert username == "1700000600:k7"
    expected = hmac.new(b"north", b"1700000600:k7", hashlib.sha1).digest()
    assert base64.b64decode(password) == expected


def test_every_client_has_its_own_credentials_for_ten_minutes() -> None:
    settings = MediaSettings(
        ice_servers=("stun:s:3478",), turn_urls=("turn:relay:3478",), turn_secret=SecretStr(SECRET)
    )
    stun, turn = ice_servers(settings, now_s=1000.0)
    assert stun.as_json() == {"urls": "stun:s:3478"}
    assert stun.as_link() == '<stun:s:3478>; rel="ice-server"'
    assert turn.username.startswith(f"{1000 + LIFETIME_S}:")
    assert turn.as_json() == {"urls": turn.url, "username": turn.username, "credential": turn.credential}
    assert turn.as_link() == (
        f'<turn:relay:3478>; rel="ice-server"; username="{turn.username}"; credential="{turn.credential}";'
        ' credential-type="password"'
    )
    assert ice_servers(settings, now_s=1000.0)[1].username != turn.username


@pytest.mark.parametrize(
    ("urls", "secret", "words"),
    [
        (("turn:relay:3478",), None, "go together"),
        ((), SECRET, "go together"),
        (('turn:relay">; x="',), SECRET, "not of the form"),
        (("http://relay",), SECRET, "not of the form"),
    ],
)
def test_half_or_broken_settings_are_refused(urls: tuple[str, ...], secret: str | None, words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        MediaSettings(turn_urls=urls, turn_secret=secret and SecretStr(secret))


def free_port() -> int:
    with socket.socket(type=socket.SOCK_DGRAM) as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port


@contextlib.asynccontextmanager
async def coturn(folder: Path) -> AsyncIterator[str]:
    """A relay on loopback; yields its URL."""
    assert COTURN is not None
    port = free_port()
    process = await asyncio.create_subprocess_exec(
        COTURN,
        *("-n", "--listening-ip=127.0.0.1", "--relay-ip=127.0.0.1", f"--listening-port={port}", "--realm=livebrush"),
        *("--use-auth-secret", f"--static-auth-secret={SECRET}", "--allow-loopback-peers", "--no-tls", "--no-dtls"),
        *("--no-cli", "--relay-threads=1", "--log-file=stdout", f"--pidfile={folder / 'pid'}", "--fingerprint"),
        *("--cli-password=unused", f"--userdb={folder / 'db'}"),
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        async with asyncio.timeout(30):
            while True:  # its TCP side opens with the UDP one
                with contextlib.suppress(OSError):
                    _, writer = await asyncio.open_connection("127.0.0.1", port)
                    writer.close()
                    await writer.wait_closed()
                    break
                assert process.returncode is None, "coturn did not start"
                await asyncio.sleep(0.1)
        yield f"turn:127.0.0.1:{port}"
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        await process.wait()


def relayed_only(server: IceServer) -> RTCConfiguration:
    """Have a client use the relay alone."""
    given = RTCIceServer(urls=server.url, username=server.username, credential=server.credential)
    return RTCConfiguration(iceServers=[given], iceTransportPolicy=RTCIceTransportPolicy.RELAY)


@pytest.mark.skipif(COTURN is None, reason="coturn is not installed")
async def test_a_session_runs_through_the_relay_alone(tmp_path: Path) -> None:
    async with coturn(tmp_path) as url:
        settings = ServerSettings(
            port=0,
            engine_kind="fake",
            engine=EngineSettings(width=64, height=64),
            max_sessions=1,
            media=MediaSettings(turn_urls=(url,), turn_secret=SecretStr(SECRET)),
        )
        async with running_server(settings, FakeEngine(64, 64, delay_s=0.02)) as (_, port):
            base = f"http://127.0.0.1:{port}"
            async with aiohttp.ClientSession() as http, http.get(base + "/api/v1/ice-servers") as response:
                (told,) = (await response.json())["iceServers"]
            server = IceServer(told["urls"], told["username"], told["credential"])
            visitor = Visitor(base, relayed_only(server))
            assert (await visitor.enter()).status == 201
            offered = [line for line in visitor.connection.localDescription.sdp.splitlines() if "a=candidate" in line]
            assert offered and all(" typ relay" in line for line in offered)
            await visitor.until(lambda: len(visitor.pictures) > 10, "pictures through the relay")
            await visitor.leave()


@pytest.mark.skipif(COTURN is None, reason="coturn is not installed")
async def test_the_relay_refuses_credentials_of_another_secret(tmp_path: Path) -> None:
    async with coturn(tmp_path) as url:
        username, password = credentials("south", "k7", 4_000_000_000)
        visitor = Visitor("", relayed_only(IceServer(url, username, password)))
        await visitor.connection.setLocalDescription(await visitor.connection.createOffer())
        assert "a=candidate" not in visitor.connection.localDescription.sdp
        await visitor.leave()


async def test_used_up_ports_are_told_with_a_time_and_counted_and_the_seat_stays_free() -> None:
    with socket.socket(type=socket.SOCK_DGRAM) as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        settings = ServerSettings(
            port=0,
            engine_kind="fake",
            engine=EngineSettings(width=64, height=64),
            max_sessions=1,
            media=MediaSettings(udp_ports=f"{port}-{port}"),
        )
        async with running_server(settings, FakeEngine(64, 64)) as (context, http_port):
            visitor = Visitor(f"http://127.0.0.1:{http_port}")
            response = await visitor.enter()
            body = await response.json()
            assert (response.status, body["code"]) == (503, "udp_ports_exhausted")
            assert body["retryable"] and "Retry-After" in response.headers
            assert context.metrics.refused.labels("udp_ports_exhausted")._value.get() == 1
            async with visitor.http.get(visitor.base + "/api/v1/capacity") as capacity:
                assert (await capacity.json())["open"] == 0
            await visitor.leave()


@pytest.mark.parametrize("ports", ["40000", "40000-39999", "80-90", "40000-70000", "a-b", "40000-40000"])
def test_a_range_that_is_none_or_too_small_is_refused(ports: str) -> None:
    with pytest.raises(ValidationError, match="udp_ports"):
        ServerSettings(max_sessions=2, media=MediaSettings(udp_ports=ports))
