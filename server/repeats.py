"""Sending again what was lost, and hearing what the receiver can take.

The packets, their history and the RTX format are aiortc's; what differs:

* A repeat says when it is sent itself. aiortc leaves the time of the original in it (abs-send-time), which a receiver
  takes for a delay of the network: at 10 % loss its estimate fell by 15 % again and again, to where no picture was
  left.
* A packet goes once a round trip, however often it is asked for: in a full queue 352 repeats were all that 300 kbit/s
  could carry in 10 s.
* Nothing older than a key frame that was asked for: who asked for one has given up the rest.
* While the network is tight, repeats need room like pictures.

Private fields of RTCRtpSender that are read: its packet history, the time stamp of the last packet, and when its last
report left.
tests/server/test_repeats.py fails when an upgrade moves them.
"""

from __future__ import annotations

import math
import time
from collections import Counter, deque

from aiortc import RTCDtlsTransport, RTCRtpSender, clock
from aiortc.mediastreams import MediaStreamTrack
from aiortc.rtp import (
    RTCP_PSFB_APP,
    RTCP_RTPFB_NACK,
    RTP_HISTORY_SIZE,
    AnyRtcpPacket,
    RtcpPsfbPacket,
    RtcpReceiverInfo,
    RtcpRrPacket,
    RtcpRtpfbPacket,
    RtcpSrPacket,
    RtpPacket,
    unpack_remb_fci,
)

from server.encoding import BitratePolicy

SAMPLES = 32
MAX_ROUND_TRIP_S = 10.0
# Before the first report.
FIRST_ROUND_TRIP_S = 0.05
# Of a round trip: a busy machine takes longer to report than to answer.
AGAIN_SHARE = 0.5


class RoundTrip:
    """What receiver reports say of the way there and back. Pure."""

    def __init__(self) -> None:
        self.latest_s = FIRST_ROUND_TRIP_S
        self._samples_s: deque[float] = deque(maxlen=SAMPLES)

    def add(self, seconds: float) -> None:
        """Take one measurement; what cannot be one is passed over."""
        if 0 < seconds < MAX_ROUND_TRIP_S:
            self.latest_s = seconds
            self._samples_s.append(seconds)

    @property
    def queue_s(self) -> float:
        """How much longer than the shortest of the last half minute it now takes: a queue, one way or the other."""
        return self.latest_s - min(self._samples_s, default=self.latest_s)


class RepeatingSender(RTCRtpSender):
    """Answers who asks for packets again, and tells `policy` what the receiver says of the network.

    counters: `packets_repeated`, and of those asked for but not repeated `repeats_spared` (one is on its way),
    `repeats_gone` (too old) and `repeats_left_out` (no room).
    """

    def __init__(
        self, track: MediaStreamTrack, transport: RTCDtlsTransport, counters: Counter[str], policy: BitratePolicy
    ) -> None:
        super().__init__(track, transport)
        self.policy = policy
        self.round_trip = RoundTrip()
        self._repeat_counters = counters
        # By place in the history: which packet was repeated there last, and when.
        self._repeated: dict[int, tuple[int, float]] = {}

    def forget_sent(self) -> None:
        """Repeat nothing of what was sent so far."""
        self._history.clear()

    def last_frame(self, timestamp: int) -> list[int]:
        """Sequence numbers of the packets of the frame with this RTP timestamp, in order."""
        packets = [packet for packet in self._history.values() if packet.timestamp == timestamp]
        # A frame does not span more than the history, so the distance to any of its packets orders them.
        first = packets[0].sequence_number if packets else 0
        packets.sort(key=lambda packet: (packet.sequence_number - first + 0x8000) & 0xFFFF)
        return [packet.sequence_number for packet in packets]

    @property
    def wire_timestamp(self) -> int:
        """RTP timestamp of the last packet sent.

        Private, because the sending loop adds a random origin that it keeps in a local variable; this field, made
        for its sender reports, is the only place where the sum is kept.
        """
        timestamp: int = self._RTCRtpSender__rtp_timestamp  # type: ignore[attr-defined]
        return timestamp

    async def send_again_if_many_are_lost(self) -> None:
        """Send the last frame's packets a second time while so many are lost by chance that this is better."""
        if self.policy.sends_twice:
            for sequence_number in self.last_frame(self.wire_timestamp):
                await self._retransmit(sequence_number)

    @property
    def _history(self) -> dict[int, RtpPacket]:
        history: dict[int, RtpPacket] = self._RTCRtpSender__rtp_history  # type: ignore[attr-defined]
        return history

    async def _handle_rtcp_packet(self, packet: AnyRtcpPacket) -> None:
        now = time.monotonic()
        if isinstance(packet, RtcpPsfbPacket) and packet.fmt == RTCP_PSFB_APP:
            try:
                bitrate, sources = unpack_remb_fci(packet.fci)
            except ValueError:
                self._repeat_counters["rtcp_malformed"] += 1
                return
            if self._ssrc in sources:
                self.policy.report(bitrate, now)
            return
        if isinstance(packet, RtcpRtpfbPacket) and packet.fmt == RTCP_RTPFB_NACK:
            # One report may list six thousand packets, or one a thousand times; there are 128 to repeat.
            packet.lost = list(dict.fromkeys(packet.lost))[:RTP_HISTORY_SIZE]
        elif isinstance(packet, RtcpRrPacket | RtcpSrPacket):
            for report in packet.reports:
                if report.ssrc == self._ssrc:
                    self._measure(report)
                    self.policy.lost(report.fraction_lost / 256, self.round_trip.queue_s, now)
        await super()._handle_rtcp_packet(packet)

    def _measure(self, report: RtcpReceiverInfo) -> None:
        last: int | None = self._RTCRtpSender__lsr  # type: ignore[attr-defined]
        sent_at: float | None = self._RTCRtpSender__lsr_time  # type: ignore[attr-defined]
        # Without a report of ours the receiver has no delay to tell either.
        if sent_at is not None and report.lsr == last and report.dlsr:
            self.round_trip.add(time.time() - sent_at - report.dlsr / 65536)

    async def _retransmit(self, sequence_number: int) -> None:
        """Repeat one packet, if that is of use and there is room."""
        place, now = sequence_number % RTP_HISTORY_SIZE, time.monotonic()
        packet = self._history.get(place)
        if packet is None or packet.sequence_number != sequence_number:
            self._repeat_counters["repeats_gone"] += 1
            return
        repeated, repeated_at = self._repeated.get(place, (-1, -math.inf))
        if repeated == sequence_number and now - repeated_at < AGAIN_SHARE * self.round_trip.latest_s:
            self._repeat_counters["repeats_spared"] += 1
            return
        if not self.policy.has_room(now):
            self._repeat_counters["repeats_left_out"] += 1
            return
        self.policy.sent(8 * len(packet.payload), now)
        self._repeated[place] = sequence_number, now
        self._repeat_counters["packets_repeated"] += 1
        packet.extensions.abs_send_time = (clock.current_ntp_time() >> 14) & 0x00FFFFFF
        await super()._retransmit(sequence_number)
