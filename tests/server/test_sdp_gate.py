"""The text gate in front of the SDP parser."""

from __future__ import annotations

import pytest

from server.errors import BadRequest, ServerError, TooLarge, Unsupported
from server.sdp_gate import (
    MAX_BYTES,
    MAX_CANDIDATES,
    MAX_LINE_CHARS,
    MAX_LINES,
    MAX_RTPMAPS,
    MAX_SSRC_LINES,
    check_offer,
    is_usable_candidate,
    with_bitrate_hints,
)
from server.settings import MediaSettings

CANDIDATE = "a=candidate:1 1 udp 2113937151 192.168.1.7 50000 typ host generation 0"


def section(kind: str, mid: int, *extra: str) -> list[str]:
    return [
        f"m={kind} 9 UDP/TLS/RTP/SAVPF 96",
        "c=IN IP4 0.0.0.0",
        "a=sendrecv",
        f"a=mid:{mid}",
        "a=rtcp-mux",
        "a=ice-ufrag:abcd",
        "a=ice-pwd:abcdefghijklmnopqrstuv",
        "a=fingerprint:sha-256 " + ":".join(["AB"] * 32),
        "a=setup:actpass",
        "a=rtpmap:96 VP8/90000",
        *extra,
    ]


def offer(*sections: list[str], bundle: str | None = None) -> str:
    mids = " ".join(str(number) for number in range(len(sections)))
    head = ["v=0", "o=- 1 2 IN IP4 127.0.0.1", "s=-", "t=0 0", f"a=group:BUNDLE {mids if bundle is None else bundle}"]
    return "\r\n".join([*head, *(line for part in sections for line in part)]) + "\r\n"


def test_plain_offer_passes_with_what_the_answer_needs() -> None:
    checked = check_offer(offer(section("audio", 0), section("video", 1), section("application", 2), bundle="1 0 2"))
    assert checked.kinds == ("audio", "video", "application")
    assert (checked.setup, checked.primary_mid, checked.candidates_refused) == ("actpass", "1", 0)


def test_lines_may_end_with_a_bare_newline() -> None:
    assert check_offer(offer(section("video", 0)).replace("\r\n", "\n")).kinds == ("video",)


def test_names_of_attributes_are_case_sensitive_and_hash_functions_are_not() -> None:
    good = offer(section("video", 0))
    assert check_offer(good.replace("sha-256", "SHA-256")).setup == "actpass"
    with pytest.raises(BadRequest, match="DTLS role"):
        check_offer(good.replace("a=setup:actpass", "A=SETUP:ACTPASS"))


def test_candidates_are_sieved_and_the_end_is_not_told() -> None:
    lines = [
        CANDIDATE,
        CANDIDATE.replace(" udp ", " tcp ") + " tcptype active",
        CANDIDATE.replace("192.168.1.7", "0f5a9e2c-1b.local"),
        "a=end-of-candidates",
    ]
    checked = check_offer(offer(section("video", 0, *lines)))
    assert checked.candidates_refused == 2
    assert [line for line in checked.sdp.splitlines() if "candidate" in line] == [CANDIDATE]


def test_candidates_over_the_bound_are_left_out() -> None:
    checked = check_offer(offer(section("video", 0, *[CANDIDATE] * (MAX_CANDIDATES + 3))))
    assert checked.candidates_refused == 3


@pytest.mark.parametrize(
    ("text", "usable"),
    [
        ("candidate:1 1 udp 1 127.0.0.1 50000 typ host", True),
        ("candidate:1 1 UDP 1 10.0.0.1 50000 typ srflx raddr 0.0.0.0 rport 0", True),
        ("candidate:1 1 udp 1 2001:db8::1 50000 typ relay", True),
        ("candidate:1 2 udp 1 127.0.0.1 50000 typ host", False),
        ("candidate:1 1 tcp 1 127.0.0.1 50000 typ host tcptype passive", False),
        ("candidate:1 1 udp 1 127.0.0.1 22 typ host", False),
        ("candidate:1 1 udp 1 127.0.0.1 65536 typ host", False),
        ("candidate:1 1 udp x 127.0.0.1 50000 typ host", False),
        ("candidate:1 1 udp 1 224.0.0.251 5353 typ host", False),
        ("candidate:1 1 udp 1 0.0.0.0 50000 typ host", False),
        ("candidate:1 1 udp 1 169.254.169.254 50000 typ host", False),
        ("candidate:1 1 udp 1 example.org 50000 typ host", False),
        ("candidate:1 1 udp 1 127.0.0.1 50000 typ prflx", False),
        ("candidate:", False),
        ("", False),
    ],
)
def test_usable_candidates(text: str, usable: bool) -> None:
    assert is_usable_candidate(text) is usable


def filled(prefix: str, count: int) -> str:
    return offer(section("video", 0, *[f"{prefix}{number} x" for number in range(count)]))


@pytest.mark.parametrize(
    ("fits", "too_much"),
    [
        (filled("a=rtpmap:", MAX_RTPMAPS - 1), filled("a=rtpmap:", MAX_RTPMAPS)),
        (filled("a=ssrc:", MAX_SSRC_LINES), filled("a=ssrc:", MAX_SSRC_LINES + 1)),
        (filled("a=x:", MAX_LINES - 15), filled("a=x:", MAX_LINES - 14)),
        (
            offer(section("video", 0, "a=" + "x" * (MAX_LINE_CHARS - 2))),
            offer(section("video", 0, "a=" + "x" * (MAX_LINE_CHARS - 1))),
        ),
        (
            offer(section("video", 0, *["a=" + "x" * 900] * 35)),
            offer(section("video", 0, *["a=" + "x" * 900] * (MAX_BYTES // 900 + 1))),
        ),
    ],
)
def test_each_bound_passes_n_and_bites_at_n_plus_one(fits: str, too_much: str) -> None:
    check_offer(fits)
    with pytest.raises(TooLarge, match="over the"):
        check_offer(too_much)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "hello",
        "v=0",
        "v=1\r\n",
        "{}",
        offer(section("video", 0)).replace("s=-", "s=\x00"),
        offer(section("video", 0)).replace("s=-", "nonsense"),
        offer([line for line in section("video", 0) if "ufrag" not in line]),
        offer([line for line in section("video", 0) if "ice-pwd" not in line]),
        offer([line for line in section("video", 0) if "setup" not in line]),
        offer([line.replace("sha-256", "sha-1") for line in section("video", 0)]),
        offer(section("video", 0), section("audio", 0)),
        offer(section("video", 0, "a=mid:1")),
    ],
)
def test_broken_offers_are_bad_requests(text: str) -> None:
    with pytest.raises(ServerError) as refusal:
        check_offer(text)
    assert type(refusal.value) in (BadRequest, Unsupported) and str(refusal.value)


@pytest.mark.parametrize(
    "text",
    [
        offer(section("audio", 0)),
        offer(section("video", 0), section("video", 1)),
        offer(section("video", 0), section("text", 1)),
        offer(section("video", 0), section("audio", 1), bundle="0"),
        offer(section("video", 0), bundle="0\r\na=group:BUNDLE 0"),
        offer([line.replace("sendrecv", "recvonly") for line in section("video", 0)]),
        offer([line for line in section("video", 0) if line != "a=rtcp-mux"]),
        offer(section("video", 0, "a=simulcast:send 1;2;3")),
    ],
)
def test_offers_for_something_else_are_unsupported(text: str) -> None:
    with pytest.raises(Unsupported):
        check_offer(text)


def test_answer_gets_bitrate_hints_for_the_video_codecs_only() -> None:
    answer = "\r\n".join(
        [
            "v=0",
            "a=rtpmap:96 opus/48000/2",
            "a=rtpmap:97 VP8/90000",
            "a=rtpmap:98 rtx/90000",
            "a=fmtp:98 apt=97",
            "a=rtpmap:99 H264/90000",
            "a=fmtp:99 packetization-mode=1",
        ]
    )
    hinted = with_bitrate_hints(answer, MediaSettings(min_bitrate=1000, start_bitrate=2000, max_bitrate=3000))
    hints = "x-google-min-bitrate=1;x-google-start-bitrate=2;x-google-max-bitrate=3"
    assert [line for line in hinted.splitlines() if "fmtp" in line] == [
        f"a=fmtp:97 {hints}",
        "a=fmtp:98 apt=97",
        f"a=fmtp:99 packetization-mode=1;{hints}",
    ]
