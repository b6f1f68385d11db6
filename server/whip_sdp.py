"""What WHIP and WHEP read in an offer and in the fragments that trickle after it. Pure."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass

from server.errors import BadRequest, TooLarge, Unsupported
from server.sdp_gate import MAX_BYTES

CANDIDATES = re.compile(r"(?:^a=candidate:[^\r\n]*\r\n)+", re.MULTILINE)
CODEC = re.compile(r"^a=rtpmap:\d+ ([A-Za-z0-9.+-]+)/90000\s*$", re.MULTILINE)
PLAYABLE = {"VP8", "H264"}
# Not pictures by themselves.
AUXILIARY = {"RTX", "RED", "ULPFEC", "FLEXFEC-03"}


@dataclass(frozen=True, slots=True)
class Fragment:
    """A trickle-ice-sdpfrag body (RFC 8840). ufrag: empty where it names none."""

    ufrag: str
    candidates: list[dict[str, object]]


def parse_fragment(text: str) -> Fragment:
    """The candidates of a PATCH, each with its section's mid. Raises BadRequest or TooLarge."""
    if len(text) > MAX_BYTES:
        raise TooLarge(f"the fragment has {len(text)} characters, over the {MAX_BYTES} that are read")
    ufrag, mid, ends = "", None, False
    candidates: list[dict[str, object]] = []
    for line in filter(None, (line.strip() for line in text.splitlines())):
        if len(line) < 2 or line[1] != "=":
            raise BadRequest("the fragment has a line that is not of the form letter=value")
        name, _, value = line.partition(":")
        match name:
            case "a=ice-ufrag":
                ufrag = value
            case "a=mid":
                mid = value
            case "a=candidate" if value:
                section = {} if mid is None else {"sdpMid": mid}
                candidates.append({"candidate": f"candidate:{value}", **section})
            case "a=end-of-candidates":
                ends = True
    if not (ufrag or candidates or ends):
        raise BadRequest("the fragment has neither ICE credentials nor candidates")
    return Fragment(ufrag, candidates)


def check_codecs(offer_sdp: str) -> None:
    """Raises Unsupported, in words that help, for an offer without a codec that is decoded here."""
    names = list(dict.fromkeys(match[1].upper() for match in CODEC.finditer(offer_sdp)))
    pictures = [name for name in names if name not in AUXILIARY]
    if not PLAYABLE & set(pictures):
        offered = ", ".join(pictures[:6]) or "no video codec"
        raise Unsupported(
            f"the offer has {offered}; this server takes H.264 and VP8. In OBS choose an H.264 encoder (x264, NVENC"
            " H.264, ...) under Settings, Output, Streaming, Video Encoder",
            code="no_common_codec",
        )


def ufrag_of(offer_sdp: str) -> str:
    """The first ICE user name fragment of an offer; empty where there is none."""
    found = re.search(r"^a=ice-ufrag:(\S+)", offer_sdp, re.MULTILINE)
    return found[1] if found else ""


def nearest_first(answer_sdp: str, reached: str) -> str:
    """The answer with its candidates in the order in which this client may reach them.

    Those of the address `reached` first, where it is one of this server's; loopback last unless it is that. Some
    clients try the first and no other (FFmpeg 9).
    """

    def distance(line: str) -> int:
        address = line.split()[4]
        if address == reached:
            return 0
        return 2 if ipaddress.ip_address(address).is_loopback else 1

    return CANDIDATES.sub(lambda run: "".join(sorted(run[0].splitlines(keepends=True), key=distance)), answer_sdp)
