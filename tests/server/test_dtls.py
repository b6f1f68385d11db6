"""Foreign DTLS: a peer that loses the first message, as FFmpeg does; a certificate as an older OBS makes it."""

from __future__ import annotations

import asyncio
import warnings
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiortc import (
    RTCCertificate,
    RTCConfiguration,
    RTCDtlsFingerprint,
    RTCIceGatherer,
    RTCIceTransport,
    RTCPeerConnection,
    RTCSessionDescription,
)
from aiortc.mediastreams import VideoStreamTrack
from aiortc.rtcdtlstransport import generate_certificate
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509 import InvalidVersion
from OpenSSL import SSL, crypto

from server.dtls import PAUSES_S, FirstFlight
from server.peer import Peer, answer_offer
from server.settings import MediaSettings

PATIENCE_S = 30.0


@pytest.fixture(autouse=True)
def only_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aioice.ice.get_host_addresses", lambda use_ipv4, use_ipv6: ["127.0.0.1"])


class Line:
    """An ICE transport's two ends, without a network."""

    def __init__(self) -> None:
        self.transport = RTCIceTransport(RTCIceGatherer())
        self.sent: list[bytes] = []
        self.coming: asyncio.Queue[bytes] = asyncio.Queue()
        self.transport._send = self._send
        self.transport._recv = self.coming.get

    async def _send(self, data: bytes) -> None:
        self.sent.append(data)


async def test_the_first_is_repeated_and_no_other() -> None:
    line, counters = Line(), Counter[str]()
    flight = FirstFlight(line.transport, counters, (0.0, 0.0))
    await line.transport._send(b"hello")
    await line.transport._send(b"more")
    assert flight._task is not None
    await flight._task
    assert sorted(line.sent) == [b"hello", b"hello", b"hello", b"more"] and counters == {"dtls_repeated": 2}


async def test_an_answer_ends_it() -> None:
    line, counters = Line(), Counter[str]()
    flight = FirstFlight(line.transport, counters, (PATIENCE_S,))
    await line.transport._send(b"hello")
    line.coming.put_nowait(b"answer")
    assert await line.transport._recv() == b"answer"
    assert flight._task is not None
    async with asyncio.timeout(PATIENCE_S):
        await asyncio.wait([flight._task])
    assert flight._task.cancelled() and line.sent == [b"hello"]


def der(tag: int, *parts: bytes) -> bytes:
    body = b"".join(parts)
    size = bytes([len(body)]) if len(body) < 128 else b"\x82" + len(body).to_bytes(2, "big")
    return bytes([tag]) + size + body


class OldCertificate(RTCCertificate):
    """A certificate whose version field says 2, as libdatachannel before 0.23 makes it with OpenSSL."""

    def __init__(self, lie: str = "") -> None:
        key = ec.generate_private_key(ec.SECP256R1())
        super().__init__(key, generate_certificate(key))
        version_3, version_2 = (bytes([0xA0, 3, 2, 1, version]) for version in (2, 1))
        signed = self._cert.tbs_certificate_bytes.replace(version_3, version_2, 1)
        algorithm = der(0x30, bytes.fromhex("06082a8648ce3d040302"))  # ecdsa-with-SHA256
        signature = der(3, b"\0", key.sign(signed, ec.ECDSA(hashes.SHA256())))
        self.old = crypto.load_certificate(crypto.FILETYPE_ASN1, der(0x30, signed, algorithm, signature))
        self.told = lie or self.old.digest("sha256").decode()

    def getFingerprints(self) -> list[RTCDtlsFingerprint]:
        return [RTCDtlsFingerprint("sha-256", self.told)]

    def _create_ssl_context(self, srtp_profiles: Any) -> SSL.Context:
        context = super()._create_ssl_context(srtp_profiles)
        with warnings.catch_warnings():  # no other object may hold this version
            warnings.simplefilter("ignore", DeprecationWarning)
            context.use_certificate(self.old)
        return context


@asynccontextmanager
async def publishing(
    certificate: RTCCertificate | None = None, setup: str = "actpass"
) -> AsyncIterator[tuple[Peer, RTCPeerConnection, Callable[[], Awaitable[None]]]]:
    """A peer, a client that has offered, and what lets that client take the answer."""
    client = RTCPeerConnection(RTCConfiguration(iceServers=[]))
    if certificate is not None:
        client._RTCPeerConnection__certificates = [certificate]  # type: ignore[attr-defined]
    client.addTransceiver(VideoStreamTrack(), direction="sendonly")
    await client.setLocalDescription(await client.createOffer())
    offer = client.localDescription.sdp.replace("a=setup:actpass", f"a=setup:{setup}")
    try:
        async with answer_offer(offer, MediaSettings(), publishes=True) as peer:

            async def accept() -> None:
                await client.setRemoteDescription(RTCSessionDescription(peer.answer_sdp, "answer"))

            yield peer, client, accept
    finally:
        await client.close()


async def connected(peer: Peer) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while peer.connected_at is None:
            await asyncio.sleep(0.01)


async def test_a_peer_that_loses_the_first_connects_by_a_repetition() -> None:
    async with publishing(setup="passive") as (peer, client, accept):
        ice, lost = client.getTransceivers()[0].sender.transport.transport, 0
        receive = ice._recv

        async def losing() -> bytes:
            nonlocal lost
            if not lost:
                await receive()
                lost += 1
            data: bytes = await receive()
            return data

        ice._recv = losing
        await accept()
        await connected(peer)
        assert lost == 1 and 1 <= peer.counters["dtls_repeated"] <= len(PAUSES_S)


async def test_a_certificate_of_version_2_is_let_in() -> None:
    certificate = OldCertificate()
    with pytest.raises(InvalidVersion):
        certificate.old.to_cryptography()
    async with publishing(certificate) as (peer, _, accept):
        await accept()
        await connected(peer)


async def test_a_certificate_with_another_digest_is_not() -> None:
    async with publishing(OldCertificate(lie=":".join(["3A"] * 32))) as (peer, _, accept):
        await accept()
        async with asyncio.timeout(PATIENCE_S):
            assert await peer.wait_until_gone() == "failed"
        assert peer.connected_at is None
