"""What OBS offers, as seen and rebuilt, against `livebrush serve`: answered as OBS insists, or refused with words that
help who runs the server: OBS itself speaks of a stream key whatever the refusal."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from tests.e2e.serving import Server
from tests.interop.asking import SDP, ask
from tests.interop.offers import SEEN, obs_offer

HEADERS = {"Content-Type": SDP, "User-Agent": "Mozilla/5.0 (OBS-Studio/32.2.2; Windows x86_64; en-US)"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server(tmp_path_factory.mktemp("server") / "log", engine="fake", patient=True) as running:
        yield running


def without_its_own(offer: str) -> list[str]:
    """The lines, without what every run draws anew."""
    drawn = (
        r"^(o=rtc )\d+()",
        r"(ssrc:)\d+()",
        r"(cname:)\S+()",
        r"(ice-\w+:)(?!ice2)\S+()",
        r"(msid:)\w+ \w+(-)",
        r"(sha-256 )\S+()",
    )
    for pattern in drawn:
        offer = re.sub(pattern, r"\1*\2", offer, flags=re.MULTILINE)
    return offer.splitlines()


@pytest.mark.parametrize(
    ("name", "rebuilt"),
    [
        ("obs-32.2.2-libdatachannel-0.21.0", obs_offer()),
        ("obs-32.2.2-libdatachannel-0.24.1", obs_offer(credentials_once=False)),
        ("obs-32.2.2-av1", obs_offer(codec="AV1")),
        ("obs-32.2.2-simulcast", obs_offer(layers=3)),
    ],
)
def test_a_rebuilt_offer_is_what_was_seen(name: str, rebuilt: str) -> None:
    assert without_its_own(rebuilt) == without_its_own(SEEN[name])


@pytest.mark.parametrize("name", [name for name in SEEN if "libdatachannel" in name or name.startswith("ffmpeg")])
def test_an_offer_that_was_seen_is_answered(server: Server, name: str) -> None:
    reply = ask("POST", server.url + "/whip/seen", SEEN[name], HEADERS)
    assert reply.status == 201, reply.text
    assert ask("DELETE", server.url + reply.headers["Location"]).status == 200


@pytest.mark.parametrize("sound", [True, False], ids=["sound", "silent"])
@pytest.mark.parametrize("profile", ["42e01f", "42c02a", "4d0028", "640028", "640c33", "640033"])
def test_obs_is_answered_in_every_profile(server: Server, profile: str, sound: bool) -> None:
    reply = ask("POST", server.url + "/whip/obs?prompt=neon", obs_offer(profile=profile, sound=sound), HEADERS)
    assert reply.status == 201, reply.text
    answer = reply.text
    # OBS gathers its candidates after the answer and sends none, so the server's stand in it.
    assert re.findall(r"^a=candidate:\S+ 1 udp", answer, re.MULTILINE)
    assert "a=setup:passive" in answer and "a=sendrecv" not in answer and "a=sendonly" not in answer
    sections = re.findall(r"^m=(\w+) (\d+) \S+ ([\d ]+)", answer, re.MULTILINE)
    assert [kind for kind, _, _ in sections] == ["audio", "video"][not sound :]
    assert all(port != "0" for _, port, _ in sections) and sections[-1][2].split() == ["96"]
    assert ask("DELETE", server.url + reply.headers["Location"]).status == 200


@pytest.mark.parametrize(
    ("offer", "words"),
    [
        (obs_offer(codec="H265"), "choose an H.264 encoder"),
        (obs_offer(codec="AV1"), "choose an H.264 encoder"),
        (obs_offer(layers=3), "simulcast"),
        (SEEN["obs-32.2.2-av1"], "choose an H.264 encoder"),
        (SEEN["obs-32.2.2-simulcast"], "simulcast"),
    ],
    ids=["hevc", "av1", "simulcast", "av1, seen", "simulcast, seen"],
)
def test_what_is_not_taken_is_refused_in_words(server: Server, offer: str, words: str) -> None:
    reply = ask("POST", server.url + "/whip/obs", offer, HEADERS)
    assert reply.status == 422 and reply.headers.get_content_type() == "application/problem+json"
    assert words in reply.json()["detail"]
    assert words in server.log_text()
    assert server.capacity()["open"] == 0
