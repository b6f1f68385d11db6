"""What anybody may send to the UDP port of a live session, from an address that is none of its peer's."""

from __future__ import annotations

import asyncio
import os
import random
import socket
from collections.abc import AsyncIterator, Callable

import psutil
import pytest
from aioice import stun

from engine.config import EngineSettings
from engine.fake import FakeEngine
from server.app import running_server
from server.settings import ServerSettings
from tests.net.client import HEIGHT, WIDTH, HardClient, demo_pictures, linked
from tests.net.link import LOOPBACK, Link

FRAMES = 30
SHARE = 0.6
MAX_GROWTH_BYTES = 20e6
PACE = 20
_RANDOM = random.Random(25)


def _record(kind: int, body: bytes) -> bytes:
    """A DTLS 1.2 record of epoch 0."""
    return bytes([kind, 0xFE, 0xFD]) + bytes(8) + len(body).to_bytes(2, "big") + body


def _hello() -> bytes:
    body = b"\xfe\xfd" + _RANDOM.randbytes(32) + b"\x00\x00\x00\x02\xc0\x2b\x01\x00"
    length = len(body).to_bytes(3, "big")
    return _record(22, b"\x01" + length + bytes(2) + bytes(3) + length + body)


def _binding(user: str, *, controlled: bool = False) -> bytes:
    message = stun.Message(message_method=stun.Method.BINDING, message_class=stun.Class.REQUEST)
    message.attributes["USERNAME"] = user
    message.attributes["PRIORITY"] = 1
    message.attributes["ICE-CONTROLLED" if controlled else "ICE-CONTROLLING"] = 1
    message.add_message_integrity(b"wrong")
    return bytes(message)


CASES: dict[str, Callable[[], bytes]] = {
    "empty": lambda: b"",
    "one byte": lambda: b"\x16",
    "random": lambda: _RANDOM.randbytes(_RANDOM.randrange(1, 1400)),
    "largest": lambda: b"\x80" + _RANDOM.randbytes(65_000),
    "rtp": lambda: b"\x80\x60" + _RANDOM.randbytes(200),
    "rtcp bye": lambda: b"\x80\xcb\x00\x01" + _RANDOM.randbytes(4),
    "dtls hello": _hello,
    "dtls fatal alert": lambda: _record(21, b"\x02\x28"),
    "dtls close": lambda: _record(21, b"\x01\x00"),
    "dtls cut short": lambda: _hello()[: _RANDOM.randrange(1, 20)],
    "stun wrong password": lambda: _binding("somebody:else"),
    "stun role conflict": lambda: _binding("somebody:else", controlled=True),
    "stun broken": lambda: b"\x00\x01\xff\xff\x21\x12\xa4\x42" + _RANDOM.randbytes(40),
}


@pytest.fixture(autouse=True)
def only_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aioice.ice.get_host_addresses", lambda use_ipv4, use_ipv6: [])


@pytest.fixture
async def session() -> AsyncIterator[tuple[HardClient, Link]]:
    settings = ServerSettings(
        port=0, engine_kind="fake", engine=EngineSettings(width=WIDTH, height=HEIGHT), max_fps=24, latency_budget_s=2.0
    )
    async with (
        running_server(settings, FakeEngine(WIDTH, HEIGHT, delay_s=0.005)) as (_, port),
        linked(f"http://127.0.0.1:{port}", demo_pictures()) as found,
    ):
        yield found


async def test_a_live_session_survives_whatever_a_stranger_sends_to_its_port(
    session: tuple[HardClient, Link],
) -> None:
    """Thirteen kinds in turn, each for the length of thirty frames."""
    client, link = session
    journal = client.journal
    process = psutil.Process(os.getpid())
    before_bytes = process.memory_info().rss
    shares: dict[str, float] = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as stranger:
        stranger.bind((LOOPBACK, 0))
        stranger.setblocking(False)
        for name, make in CASES.items():
            first = len(journal.sent_at)
            while len(journal.sent_at) < first + FRAMES:
                for _ in range(PACE):
                    try:
                        stranger.sendto(make(), link.server_address)
                    except BlockingIOError:
                        break
                await asyncio.sleep(0.05)
            await asyncio.sleep(0.7)
            shares[name] = sum(first <= number < first + FRAMES for _, number in journal.seen) / FRAMES
    assert len(shares) == 13
    assert {name: share for name, share in shares.items() if share < SHARE} == {}
    assert client._connection.connectionState == "connected"
    assert process.memory_info().rss - before_bytes < MAX_GROWTH_BYTES
