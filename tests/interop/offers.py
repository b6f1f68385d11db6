"""Offers of OBS, rebuilt from the source of obs-webrtc and libdatachannel: no real OBS was seen yet.

One payload type a section, credentials and fingerprint at session level, no candidates: OBS gathers after the answer.
"""

from __future__ import annotations

FINGERPRINT = ":".join(["3A", "C7", "51", "E9"] * 8)
VIDEO_FMTP = {
    "H264": "profile-level-id={profile};packetization-mode=1;level-asymmetry-allowed=1",
    "H265": "profile-id=1;tier-flag=0;level-id=93",
    "AV1": "profile=0;level-idx=5;tier=0",
}


def obs_offer(
    *,
    codec: str = "H264",
    profile: str = "42e01f",
    sound: bool = True,
    layers: int = 1,
    direction: str = "sendonly",
    setup: str = "actpass",
) -> str:
    """The text that OBS posts; a player's with direction recvonly."""
    mids = "0 1" if sound else "1"
    lines = [
        "v=0",
        "o=rtc 3097548120 0 IN IP4 127.0.0.1",
        "s=-",
        "t=0 0",
        f"a=group:BUNDLE {mids}",
        f"a=group:LS {mids}",
        "a=msid-semantic:WMS *",
        f"a=setup:{setup}",
        "a=ice-ufrag:p9Kd",
        "a=ice-pwd:Q0wq8rTz2m4nVb6cXy1LsE",
        "a=ice-options:ice2,trickle",
        f"a=fingerprint:sha-256 {FINGERPRINT}",
    ]
    if sound:
        lines += [
            *_section("audio", 111, "0", direction, 2701),
            "a=rtpmap:111 opus/48000/2",
            "a=fmtp:111 minptime=10;maxaveragebitrate=160000;stereo=1;sprop-stereo=1;useinbandfec=1",
        ]
    lines += [
        *_section("video", 96, "1", direction, 2702),
        f"a=rtpmap:96 {codec}/90000",
        "a=rtcp-fb:96 nack",
        "a=rtcp-fb:96 nack pli",
        "a=rtcp-fb:96 goog-remb",
        f"a=fmtp:96 {VIDEO_FMTP[codec].format(profile=profile)}",
    ]
    if layers > 1:
        lines += [f"a=rid:{layer} send" for layer in range(layers)]
        lines.append("a=simulcast:send " + ";".join(map(str, range(layers))))
    return "\r\n".join(lines) + "\r\n"


def _section(kind: str, payload_type: int, mid: str, direction: str, ssrc: int) -> list[str]:
    sent = direction == "sendonly"
    return [
        f"m={kind} 9 UDP/TLS/RTP/SAVPF {payload_type}",
        "c=IN IP4 0.0.0.0",
        f"a=mid:{mid}",
        f"a={direction}",
        *([f"a=ssrc:{ssrc} cname:obs", f"a=ssrc:{ssrc} msid:obs {kind}"] if sent else []),
        "a=rtcp-mux",
    ]
