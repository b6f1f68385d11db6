"""Offers of OBS: as it was seen to make them (seen/*.sdp), and rebuilt with other codecs and directions.

Each is what OBS 32.2.2 posted, with libdatachannel 0.24.1 or with 0.21.0, which its builds for Windows and macOS have:
one payload type a section, no candidates (OBS gathers after the answer), and Constrained Baseline in the words
whatever profile is sent. `test_obs_offers.py` holds the rebuilt ones against those that were seen.
"""

from __future__ import annotations

from pathlib import Path

SEEN = {
    path.stem: path.read_text().replace("\n", "\r\n") for path in sorted((Path(__file__).parent / "seen").glob("*.sdp"))
}
FINGERPRINT = ":".join(["3A", "C7", "51", "E9"] * 8)
CREDENTIALS = ["a=setup:{setup}", "a=ice-ufrag:p9Kd", "a=ice-pwd:Q0wq8rTz2m4nVb6cXy1LsE"]
STREAM = "QyVq3SgSvJ0fWxNi"


def obs_offer(
    *,
    codec: str = "H264",
    profile: str = "42e01f",
    sound: bool = True,
    layers: int = 1,
    direction: str = "sendonly",
    setup: str = "actpass",
    credentials_once: bool = True,
) -> str:
    """The text that OBS posts; a player's with direction recvonly.

    credentials_once: for all sections together, as libdatachannel has it before 0.22; else in each.
    """
    mids = "0 1" if sound else "1"
    credentials = [line.format(setup=setup) for line in CREDENTIALS]
    lines = [
        "v=0",
        "o=rtc 3097548120 0 IN IP4 127.0.0.1",
        "s=-",
        "t=0 0",
        f"a=group:BUNDLE {mids}",
        f"a=group:LS {mids}",
        "a=msid-semantic:WMS *",
        *(credentials if credentials_once else []),
        "a=ice-options:ice2,trickle",
        f"a=fingerprint:sha-256 {FINGERPRINT}",
    ]
    if sound:
        lines += [
            *_head("audio", 111, "0", []),
            *_source("audio", direction, 2701),
            "a=rtcp-mux",
            "a=rtpmap:111 opus/48000/2",
            "a=fmtp:111 minptime=10;maxaveragebitrate=96000;stereo=1;sprop-stereo=1;useinbandfec=1",
            *([] if credentials_once else credentials),
        ]
    extensions = ["mid", "rtp-stream-id"]
    lines += [
        *_head("video", 96, "1", extensions),
        *_source("video", direction, 2702 if layers == 1 else None),
    ]
    if layers > 1:
        lines += [f"a=rid:{layer} send" for layer in range(layers)]
        lines.append("a=simulcast:send " + ";".join(map(str, range(layers))))
    lines += [
        "a=rtcp-mux",
        f"a=rtpmap:96 {codec}/90000",
        "a=rtcp-fb:96 nack",
        "a=rtcp-fb:96 nack pli",
        "a=rtcp-fb:96 goog-remb",
    ]
    if codec == "H264":
        lines.append(f"a=fmtp:96 profile-level-id={profile};packetization-mode=1;level-asymmetry-allowed=1")
    lines += [] if credentials_once else credentials
    return "\r\n".join(lines) + "\r\n"


def _head(kind: str, payload_type: int, mid: str, extensions: list[str]) -> list[str]:
    return [
        f"m={kind} 9 UDP/TLS/RTP/SAVPF {payload_type}",
        "c=IN IP4 0.0.0.0",
        f"a=mid:{mid}",
        *(f"a=extmap:{number} urn:ietf:params:rtp-hdrext:sdes:{name}" for number, name in enumerate(extensions, 1)),
    ]


def _source(kind: str, direction: str, ssrc: int | None) -> list[str]:
    """What is sent; its ssrc stays unsaid where there are layers."""
    if direction != "sendonly":
        return [f"a={direction}"]
    track = f"msid:{STREAM} {STREAM}-{kind}"
    named = [] if ssrc is None else [f"a=ssrc:{ssrc} cname:k1bLrqkM5nNqWc0T", f"a=ssrc:{ssrc} {track}"]
    return [f"a={direction}", *named, f"a={track}"]
