"""Where the DTLS of foreign peers needs more patience than aiortc has.

- FFmpeg's WHIP muxer (seen with 9.0.2) drops the datagram by which it notices that DTLS has begun, and OpenSSL
  repeats one only after 1 s: every FFmpeg would start a second late. So the first is repeated sooner. A peer that had
  it ignores a repetition or answers once more, as DTLS has it for lost datagrams.
- OBS with a libdatachannel before 0.23 on OpenSSL has a certificate of X.509 version 2, which aiortc's parser refuses.
  Only its digest is asked for, so nothing of it is parsed here.

Hooks: `_send` and `_recv` of one RTCIceTransport and `_validate_peer_identity` of one RTCDtlsTransport are replaced on
the instance; tests/server/test_dtls.py fails when an upgrade moves them.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence

from aiortc import RTCDtlsParameters, RTCDtlsTransport, RTCIceTransport
from aiortc.rtcdtlstransport import State

PAUSES_S = (0.05, 0.1, 0.2, 0.4)
# Name in SDP -> name in OpenSSL, as aiortc has them.
DIGESTS = {"sha-256": "sha256", "sha-384": "sha384", "sha-512": "sha512"}


class FirstFlight:
    """Repeats what is sent first until anything comes back, at most once for each pause. Counts `dtls_repeated`."""

    def __init__(self, transport: RTCIceTransport, counters: Counter[str], pauses_s: Sequence[float] = PAUSES_S):
        self._plain_send = transport._send
        self._plain_recv = transport._recv
        self._counters = counters
        self._pauses_s = pauses_s
        self._task: asyncio.Task[None] | None = None
        transport._send = self._send
        transport._recv = self._recv

    def stop(self) -> None:
        """Repeat no more."""
        if self._task is not None:
            self._task.cancel()

    async def _send(self, data: bytes) -> None:
        await self._plain_send(data)
        if self._task is None:
            self._task = asyncio.create_task(self._repeat(data), name="peer/first-flight")

    async def _recv(self) -> bytes:
        data: bytes = await self._plain_recv()
        self.stop()
        return data

    async def _repeat(self, data: bytes) -> None:
        for pause_s in self._pauses_s:
            await asyncio.sleep(pause_s)
            try:
                await self._plain_send(data)
            except ConnectionError:
                return
            self._counters["dtls_repeated"] += 1


def check_digests_alone(transport: RTCDtlsTransport) -> None:
    """Let a peer in by its certificate's digests: each of a known kind must match, and one must be there."""

    def validate(remoteParameters: RTCDtlsParameters) -> None:
        assert transport._ssl is not None
        certificate = transport._ssl.get_peer_certificate()
        told = [
            (DIGESTS[name], one.value)
            for one in remoteParameters.fingerprints
            if (name := one.algorithm.lower()) in DIGESTS
        ]
        matches = [
            certificate is not None and certificate.digest(name).decode().upper() == value.upper()
            for name, value in told
        ]
        if not matches or not all(matches):
            transport._set_state(State.FAILED)

    transport._validate_peer_identity = validate  # type: ignore[method-assign]
