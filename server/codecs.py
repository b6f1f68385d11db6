"""Profiles of H.264 that aiortc can decode and does not offer to: Main, High and Constrained High.

OBS and hardware encoders send them, often under another profile's name. What this server sends stays Baseline, which
every decoder of the others plays.
"""

from __future__ import annotations

from aiortc.codecs import CODECS
from aiortc.rtcrtpparameters import RTCRtcpFeedback, RTCRtpCodecParameters

PROFILE_LEVEL_IDS = ("4d001f", "64001f", "640c1f")


def accept_h264_profiles() -> None:
    """Add the profiles to aiortc's table, once; tests/server/test_whip.py fails when an upgrade moves the table."""
    codecs = CODECS["video"]
    known = {codec.parameters.get("profile-level-id") for codec in codecs}
    payload_type = 1 + max(codec.payloadType or 0 for codec in codecs)
    for profile_level_id in PROFILE_LEVEL_IDS:
        if profile_level_id in known:
            continue
        feedback = [RTCRtcpFeedback("nack"), RTCRtcpFeedback("nack", "pli"), RTCRtcpFeedback("goog-remb")]
        codecs += [
            RTCRtpCodecParameters(
                mimeType="video/H264",
                clockRate=90000,
                payloadType=payload_type,
                rtcpFeedback=feedback,
                parameters={
                    "level-asymmetry-allowed": "1",
                    "packetization-mode": "1",
                    "profile-level-id": profile_level_id,
                },
            ),
            RTCRtpCodecParameters(
                mimeType="video/rtx",
                clockRate=90000,
                payloadType=payload_type + 1,
                parameters={"apt": payload_type},
            ),
        ]
        payload_type += 2
