"""The text of an offer is checked here before any parser sees it, and the answer gets its hints.

Why: parsing is quadratic in places (a 1.6 MB offer held the event loop for 20 s, 20 000 ssrc lines for 4.6 s), and
every candidate is an instruction to send packets somewhere. A Chromium offer with sound, picture and data channels
has 5.5 kB and 168 lines.

Candidates: a peer that can reach this server is learnt from its own checks, so a candidate that is left out costs
nothing. Left out are all but UDP ones to plain unicast addresses. mDNS names too: each would cost a multicast
query, and the answer would wait up to 1 s for it. So is `end-of-candidates`: after it aioice gives up although the
browser may still come; the connect timer decides instead.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable
from dataclasses import dataclass

from server.errors import BadRequest, TooLarge, Unsupported
from server.settings import MediaSettings

MAX_BYTES = 32 * 1024
MAX_LINES = 400
MAX_LINE_CHARS = 1024
MAX_CANDIDATES = 24
# Chromium with every H.264, H.265, AV1 and VP9 profile of the hardware offers some 60.
MAX_RTPMAPS = 96
MAX_SSRC_LINES = 32
KINDS = ("audio", "video", "application")
HINTED_CODECS = re.compile(r"a=rtpmap:(\d+) (VP8|H264)/90000", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Offer:
    """An offer that passed."""

    sdp: str
    """The text without the candidates that are not used."""
    kinds: tuple[str, ...]
    """Kind of each media section, in order."""
    setup: str
    """DTLS role: actpass, active or passive."""
    primary_mid: str
    """The section whose transport carries all of them."""
    candidates_refused: int

    def sends(self, kind: str) -> bool:
        """Whether the peer may send in a section of this kind."""
        sections = self.sdp.split("\nm=")[1:]
        return any(
            section.startswith(kind) and not re.search(r"^a=(recvonly|inactive)\s*$", section, re.MULTILINE)
            for section in sections
        )


def check_offer(sdp: str, *, watches: bool = False) -> Offer:
    """Check the text of an offer against the limits of this server.

    watches: the offer is one of a viewer, who sends nothing.

    Raises: TooLarge, over a bound; BadRequest, if it is no SDP or lacks what WebRTC needs; Unsupported, if it is
        well formed and asks for something else than one camera, one microphone and data channels.
    """
    lines = _checked_lines(sdp)
    sections = _sections(lines)
    kinds = tuple(section[0][2:].split(" ", 1)[0] for section in sections[1:])
    _check_kinds(kinds)
    for section in sections[1:]:
        _check_section(sections[0] + section)
    primary_mid = _check_bundle(sections)
    _check_video(sections[1 + kinds.index("video")], watches=watches)
    kept = _without_refused_candidates(lines)
    refused = sum(line.startswith("a=candidate:") for line in lines) - sum(
        line.startswith("a=candidate:") for line in kept
    )
    setup = next(line for line in lines if line.startswith("a=setup:")).removeprefix("a=setup:")
    return Offer("\r\n".join(kept) + "\r\n", kinds, setup, primary_mid, refused)


def is_usable_candidate(text: str) -> bool:
    """Whether a candidate, `candidate:...` without `a=`, names a UDP address that this server may send to."""
    parts = text.removeprefix("candidate:").split()
    if len(parts) < 8 or parts[1] != "1" or parts[2].lower() != "udp" or parts[6] != "typ":
        return False
    if parts[7] not in ("host", "srflx", "relay") or not (parts[3].isdecimal() and parts[5].isdecimal()):
        return False
    try:
        address = ipaddress.ip_address(parts[4])
    except ValueError:
        return False
    is_odd = address.is_multicast or address.is_unspecified or address.is_reserved or address.is_link_local
    # Below 1024 lie the services that one could probe by having this server send to them.
    return not is_odd and 1024 <= int(parts[5]) <= 65535


def with_bitrate_hints(answer: str, settings: MediaSettings) -> str:
    """Return the answer with x-google bitrates for each video codec.

    Chromium begins at 300 kbit/s without them, and a 720p camera then comes as 480x270; others ignore them.
    """
    hints = ";".join(
        f"x-google-{name}-bitrate={bitrate // 1000}"
        for name, bitrate in (
            ("min", settings.min_bitrate),
            ("start", settings.start_bitrate),
            ("max", settings.max_bitrate),
        )
    )
    lines = answer.splitlines()
    payload_types = [match[1] for line in lines if (match := HINTED_CODECS.match(line))]
    for payload_type in payload_types:
        prefix = f"a=fmtp:{payload_type} "
        at = next((i for i, line in enumerate(lines) if line.startswith(prefix)), None)
        if at is not None:
            lines[at] += f";{hints}"
        else:
            at = next(i for i, line in enumerate(lines) if line.startswith(f"a=rtpmap:{payload_type} "))
            lines.insert(at + 1, prefix + hints)
    return "\r\n".join(lines) + "\r\n"


def _checked_lines(sdp: str) -> list[str]:
    if len(sdp) > MAX_BYTES or len(sdp.encode(errors="replace")) > MAX_BYTES:
        raise TooLarge(f"the offer has {len(sdp)} characters, over the {MAX_BYTES} bytes that are read")
    if any(not character.isprintable() and character not in "\r\n" for character in sdp):
        raise BadRequest("the offer has control characters; send the SDP as the browser made it")
    lines = [line.rstrip("\r") for line in sdp.split("\n")]
    lines = [line for line in lines if line]
    if not lines or lines[0] != "v=0":
        raise BadRequest("the offer is not SDP: its first line is not v=0")
    longest = max(len(line) for line in lines)
    _check_count("lines", len(lines), MAX_LINES)
    _check_count("characters in a line", longest, MAX_LINE_CHARS)
    _check_count("rtpmap lines", _count(lines, "a=rtpmap:"), MAX_RTPMAPS)
    _check_count("ssrc lines", _count(lines, "a=ssrc"), MAX_SSRC_LINES)
    if any(len(line) < 2 or line[1] != "=" for line in lines):
        raise BadRequest("the offer has a line that is not of the form letter=value")
    return lines


def _count(lines: Iterable[str], prefix: str) -> int:
    return sum(line.startswith(prefix) for line in lines)


def _check_count(what: str, found: int, bound: int) -> None:
    if found > bound:
        raise TooLarge(f"the offer has {found} {what}, over the {bound} that are read")


def _sections(lines: list[str]) -> list[list[str]]:
    """Return the session section and then each media section."""
    sections: list[list[str]] = [[]]
    for line in lines:
        if line.startswith("m="):
            sections.append([])
        sections[-1].append(line)
    return sections


def _check_kinds(kinds: tuple[str, ...]) -> None:
    if unknown := [kind for kind in kinds if kind not in KINDS]:
        raise Unsupported(f"media section {unknown[0]!r} is not supported, only {', '.join(KINDS)}")
    if doubled := [kind for kind in KINDS if kinds.count(kind) > 1]:
        raise Unsupported(f"the offer has {kinds.count(doubled[0])} {doubled[0]} sections; offer one of each kind")
    if "video" not in kinds:
        raise Unsupported("the offer has no video section; there is nothing to restyle")


def _check_section(lines: list[str]) -> None:
    """Check one media section together with the session's own lines."""
    parted = [line.partition(":") for line in lines]
    for prefix, what in (
        ("a=ice-ufrag:", "ICE user fragment"),
        ("a=ice-pwd:", "ICE password"),
        ("a=fingerprint:sha-256 ", "sha-256 fingerprint"),
        ("a=setup:", "DTLS role"),
        ("a=mid:", "mid"),
    ):
        # Names of attributes are case-sensitive, those of hash functions are not.
        if not any(f"{name}:{value.lower()}".startswith(prefix) for name, _, value in parted):
            raise BadRequest(f"a media section of the offer has no {what}")
    if any(line.startswith("a=simulcast:") and ";" in line for line in lines):
        raise Unsupported("simulcast is not supported; offer one encoding")


def _check_bundle(sections: list[list[str]]) -> str:
    """Check that one group holds every section; return its first mid."""
    mids = [line.removeprefix("a=mid:") for section in sections[1:] for line in section if line.startswith("a=mid:")]
    groups = [line.split()[1:] for line in sections[0] if line.startswith("a=group:BUNDLE")]
    if len(set(mids)) != len(sections) - 1:
        raise BadRequest("the media sections of the offer do not have one mid each")
    if len(groups) != 1 or sorted(groups[0]) != sorted(mids):
        raise Unsupported("the offer does not bundle all its sections; use a peer connection's default policy")
    return groups[0][0]


def _check_video(section: list[str], *, watches: bool) -> None:
    if watches and any(line in ("a=sendonly", "a=inactive") for line in section):
        raise Unsupported("the video section receives nothing; offer it recvonly to watch a stream")
    if not watches and any(line in ("a=recvonly", "a=inactive") for line in section):
        raise Unsupported("the video section sends nothing; add the camera track before the offer is made")
    if "a=rtcp-mux" not in section:
        raise Unsupported("the video section does not offer rtcp-mux")


def _without_refused_candidates(lines: list[str]) -> list[str]:
    kept, candidates = [], 0
    for line in lines:
        if line.startswith("a=candidate:"):
            if candidates >= MAX_CANDIDATES or not is_usable_candidate(line.removeprefix("a=")):
                continue
            candidates += 1
        if line != "a=end-of-candidates":
            kept.append(line)
    return kept
