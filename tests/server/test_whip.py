"""WHIP in and WHEP out through the real parts: HTTP, WebRTC on loopback, sessions, and the stand-in engine."""

from __future__ import annotations

import asyncio
import re
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, cast

import aiohttp
import numpy as np
import pytest
from aioice import stun
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import generate_latest

from engine.api import StreamParams
from engine.config import EngineSettings
from engine.fake import FakeEngine, tint
from server.app import running_server
from server.broadcast import Broadcast
from server.errors import ServerError
from server.session_context import SessionContext
from server.settings import ServerSettings, TokenSettings
from server.viewers import MAX_PICTURES
from server.whip import DEAF_TICKS, Stream, count_deaf
from server.whip_sdp import check_codecs, nearest_first, parse_fragment
from tests.server.waiting import until
from tests.server.whip_client import SDP, Client

PATIENCE_S = 30.0
FRAGMENT = {"Content-Type": "application/trickle-ice-sdpfrag"}


@pytest.fixture(autouse=True)
def only_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    """The client too: aioice leaves 127.0.0.1 out, and no test sends anywhere else."""
    monkeypatch.setattr("aioice.ice.get_host_addresses", lambda use_ipv4, use_ipv6: ["127.0.0.1"])


class House:
    """A server and its clients."""

    def __init__(self, base: str, context: SessionContext) -> None:
        self.base = base
        self.context = context
        self.http = aiohttp.ClientSession()
        self.clients: list[Client] = []

    def publisher(self, **options: Any) -> Client:
        self.clients.append(Client(self.base, publishes=True, **options))
        return self.clients[-1]

    def player(self, **options: Any) -> Client:
        self.clients.append(Client(self.base, publishes=False, **options))
        return self.clients[-1]

    async def get(self, path: str) -> Any:
        async with self.http.get(self.base + path) as response:
            return await response.json()

    async def stream(self, name: str) -> dict[str, Any]:
        streams = (await self.get("/api/v1/streams"))["streams"]
        return next((one for one in streams if one["stream"] == name), {})


@asynccontextmanager
async def open_house(**settings: Any) -> AsyncIterator[House]:
    chosen = ServerSettings(
        port=0,
        engine_kind="fake",
        engine=EngineSettings(width=64, height=64),
        **{"max_sessions": 2, "max_fps": 24, **settings},
    )
    async with running_server(chosen, FakeEngine(64, 64, delay_s=0.02, max_streams=4)) as (context, port):
        house = House(f"http://127.0.0.1:{port}", context)
        try:
            yield house
        finally:
            for client in house.clients:
                await client.close()
            await house.http.close()


@pytest.fixture
async def house() -> AsyncIterator[House]:
    async with open_house() as made:
        yield made


def shows(client: Client, **params: Any) -> bool:
    """Whether the newest picture is the grey as the parameters paint it."""
    if not client.pictures:
        return False
    grey = tint(np.full((1, 1, 1, 3), 100, np.uint8), StreamParams(**params))[0, 0, 0].astype(float)
    return bool(np.abs(np.median(client.pictures[-1][1], axis=(0, 1)) - grey).max() < 25)


def has_shown(client: Client, count: int) -> bool:
    """Whether over `count` pictures have come."""
    return len(client.pictures) > count


# --- the picture


@pytest.mark.parametrize("codec", ["video/VP8", "video/H264"])
async def test_two_viewers_get_the_restyled_picture_and_it_is_encoded_once(house: House, codec: str) -> None:
    publisher = house.publisher(codec=codec, sound=True)
    response = await publisher.enter("/whip/studio?prompt=neon&strength=1.0&seed=3")
    assert response.status == 201 and response.headers["ETag"].startswith('"')
    players = [house.player(codec=codec, sound=True), house.player(codec=codec)]
    for player in players:
        assert (await player.enter("/whep/studio")).status == 201
    for player in players:
        await until(partial(shows, player, prompt="neon", seed=3), "the restyled picture")
    await until(lambda: players[0].sounds > 20, "sound")
    before = Counter((await house.stream("studio"))["broadcast"])
    for player in players:
        await until(partial(has_shown, player, len(player.pictures) + 24), "a second of pictures")
    figures = Counter((await house.stream("studio"))["broadcast"])
    encoded, sent = (figures[name] - before[name] for name in ("frames_encoded", "video_frames_sent"))
    # What waited for a sender at either instant makes the difference to twice as many.
    assert encoded >= 20 and abs(sent - 2 * encoded) <= 2 * MAX_PICTURES
    assert (await house.stream("studio"))["viewers"] == 2


async def test_without_viewers_nothing_is_encoded_and_with_two_codecs_there_are_two_encoders(house: House) -> None:
    await house.publisher().enter("/whip/live")
    async with asyncio.timeout(PATIENCE_S):
        while not (figures := await house.stream("live")) or figures["stats"]["state"] != "restyled":
            await asyncio.sleep(0.05)
    assert figures["broadcast"].get("frames_encoded", 0) == 0
    vp8, h264 = house.player(), house.player(codec="video/H264")
    await vp8.enter("/whep/live")
    await h264.enter("/whep/live")
    await until(lambda: len(vp8.pictures) > 30 and len(h264.pictures) > 30, "pictures in both codecs")
    assert await vp8.leave() == await h264.leave() == 200
    before = (await house.stream("live"))["broadcast"]
    await asyncio.sleep(0.5)
    after = await house.stream("live")
    assert after["broadcast"] == before and after["viewers"] == 0
    text = generate_latest(house.context.metrics.registry).decode()
    assert "livebrush_viewers 0.0" in text
    assert f'livebrush_broadcast_total{{what="frames_encoded"}} {before["frames_encoded"]}.0' in text


async def test_a_stream_is_restyled_by_rest(house: House) -> None:
    await house.publisher().enter("/live/whip?prompt=neon")
    player = house.player()
    await player.enter("/live/whep")
    await until(lambda: shows(player, prompt="neon"), "neon")
    url = house.base + "/api/v1/streams/live"
    async with house.http.patch(url, json={"prompt": "a calm sea"}) as response:
        assert response.status == 200 and (await response.json())["params"]["prompt"] == "a calm sea"
    await until(lambda: shows(player, prompt="a calm sea"), "the new style")
    async with house.http.patch(url, json={"bypass": True}) as response:
        assert (await response.json())["bypass"] is True
    await until(lambda: shows(player, strength=0.0), "the camera")
    for body, status in (({"strength": 3}, 400), ({"nonsense": 1}, 400)):
        async with house.http.patch(url, json=body) as response:
            assert response.status == status
    async with house.http.patch(house.base + "/api/v1/streams/other", json={}) as response:
        assert response.status == 404
    async with house.http.get(house.base + "/api/v1/streams/other") as response:
        assert response.status == 404 and (await response.json())["code"] == "not_live"


async def test_viewers_stay_when_the_publisher_goes_and_see_it_return(house: House) -> None:
    first = house.publisher()
    await first.enter("/whip/live?prompt=neon")
    player = house.player()
    await player.enter("/whep/live")
    await until(lambda: shows(player, prompt="neon"), "neon")
    assert await first.leave() == 200
    assert (await house.stream("live"))["live"] is False
    neon = tint(np.full((1, 1, 1, 3), 100, np.uint8), StreamParams(prompt="neon"))[0, 0, 0].astype(float)
    await until(
        lambda: np.abs(np.median(player.pictures[-1][1], axis=(0, 1)) - neon / 2).max() < 20, "a darker picture"
    )
    late = house.player()
    assert (await late.enter("/whep/live")).status == 201
    await until(lambda: late.pictures, "the last picture for who comes now")
    await house.publisher().enter("/whip/live?prompt=neon")
    await until(lambda: shows(player, prompt="neon") and shows(late, prompt="neon"), "the picture after the return")


async def test_a_stream_ends_when_its_publisher_stays_away(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.whip.RETURN_S", 0.5)
    publisher, player = house.publisher(), house.player()
    await publisher.enter("/whip/live")
    await player.enter("/whep/live")
    await until(lambda: player.pictures, "a picture")
    await publisher.leave()
    await until(lambda: player.connection.connectionState == "closed", "the end of the stream")
    assert (await house.get("/api/v1/streams"))["streams"] == []


async def test_a_silent_publisher_makes_way(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.whip.SILENT_S", 0.0)
    first, second = house.publisher(), house.publisher()
    await first.enter("/whip/live")
    assert (await second.enter("/whip/live")).status == 201
    async with house.http.get(first.url) as response:
        assert response.status == 404


async def test_a_client_that_closes_its_connection_first_may_still_delete_its_session(house: House) -> None:
    await house.publisher().enter("/whip/live")
    player = house.player()
    await player.enter("/whep/live")
    await until(lambda: player.pictures, "a picture")
    await player.connection.close()
    async with asyncio.timeout(PATIENCE_S):
        while (await house.stream("live"))["viewers"]:
            await asyncio.sleep(0.02)
    assert await player.leave() == 200
    async with house.http.get(player.url) as response:
        assert response.status == 404


@pytest.mark.parametrize("profile", ["42e01f", "42001f", "4d001f", "64001f", "640c1f", "640028"])
async def test_every_profile_that_obs_names_is_taken(house: House, profile: str) -> None:
    publisher = house.publisher(codec="video/H264")

    def as_obs(sdp: str) -> str:
        """One H.264 payload type and no candidates, as libdatachannel offers it."""
        kept = [line for line in sdp.splitlines() if not line.startswith(("a=candidate", "a=end-of"))]
        text = "\r\n".join(kept) + "\r\n"
        return re.sub(r"profile-level-id=\w+", f"profile-level-id={profile}", text)

    response = await publisher.enter("/whip/obs", as_obs)
    answer = await response.text()
    assert response.status == 201, answer
    assert f"profile-level-id={profile[:4]}" in answer
    assert "a=recvonly" in answer and "a=candidate:" in answer and "a=setup:passive" in answer
    assert answer.count("a=rtcp-mux-only") == 1


# --- HTTP


async def test_status_codes_and_headers(house: House) -> None:
    publisher = house.publisher()
    offer = await publisher.offer()
    whip, whep = house.base + "/whip/live", house.base + "/whep/live"
    table: list[tuple[str, str, dict[str, Any], int]] = [
        ("POST", whip, {"data": offer, "headers": {"Content-Type": "application/json"}}, 415),
        ("POST", whip, {"data": "hello", "headers": SDP}, 400),
        ("POST", whip, {"data": "v=0\r\n" + "a=x\r\n" * 4000, "headers": SDP}, 413),
        ("POST", whip, {"data": "x" * 50_000, "headers": SDP}, 413),
        ("POST", whip, {"data": b"\xff\xfe", "headers": SDP}, 400),
        ("POST", whip + "?strength=7", {"data": offer, "headers": SDP}, 400),
        ("POST", whip + "?steps=99", {"data": offer, "headers": SDP}, 400),
        ("POST", whip + "?strenght=1", {"data": offer, "headers": SDP}, 400),
        ("POST", house.base + "/whip/no%20name", {"data": offer, "headers": SDP}, 400),
        ("POST", whip, {"data": offer.replace("a=sendonly", "a=recvonly"), "headers": SDP}, 422),
        ("POST", whip, {"data": re.sub("VP8/90000", "H265/90000", offer), "headers": SDP}, 422),
        ("POST", whip, {"data": re.sub("VP8/90000", "AV1/90000", offer), "headers": SDP}, 422),
        ("POST", whep, {"data": offer, "headers": SDP}, 422),
        ("POST", whep, {"data": offer.replace("a=sendonly", "a=recvonly"), "headers": SDP}, 404),
        ("PUT", whip, {"data": offer, "headers": SDP}, 405),
        ("DELETE", whip, {}, 405),
        ("GET", whip, {}, 204),
        ("HEAD", whep, {}, 200),
        ("OPTIONS", whip, {}, 200),
        ("OPTIONS", whep, {}, 200),
        ("OPTIONS", whip + "/any", {}, 200),
        ("PATCH", whip + "/any", {"data": "a=end-of-candidates\r\n", "headers": FRAGMENT}, 404),
        ("DELETE", whip + "/any", {}, 404),
        ("DELETE", whep + "/any", {}, 404),
        ("POST", whip + "/any", {}, 405),
    ]
    for method, url, rest, status in table:
        async with house.http.request(method, url, **rest) as response:
            assert response.status == status, (method, url, rest, await response.text())
            if status >= 400:
                assert response.content_type == "application/problem+json"
                problem = await response.json()
                assert set(problem) >= {"code", "message", "retryable", "title", "detail"}
                assert problem["status"] == status
            if status == 405:
                assert "OPTIONS" in response.headers["Allow"]
            if method == "OPTIONS" and not url.endswith("any"):
                assert response.headers["Accept-Post"] == "application/sdp"
            if url == whep and status == 404:
                assert int(response.headers["Retry-After"]) > 0
    assert (await house.get("/api/v1/capacity"))["open"] == 0


async def test_a_session_is_trickled_not_restarted_and_deleted(house: House) -> None:
    publisher = house.publisher()
    response = await publisher.enter("/whip/live")
    url, etag = publisher.url, response.headers["ETag"]
    ufrag = re.search(r"a=ice-ufrag:(\S+)", publisher.connection.localDescription.sdp)
    assert ufrag is not None
    good = f"a=ice-ufrag:{ufrag[1]}\r\na=ice-pwd:x\r\nm=video 9 UDP/TLS/RTP/SAVPF 0\r\na=mid:0\r\n"
    good += "a=candidate:1 1 udp 2130706431 127.0.0.1 40000 typ host\r\na=candidate:2 1 tcp 1 nonsense\r\n"
    for body, headers, status in (
        (good, FRAGMENT, 204),
        (good, FRAGMENT | {"If-Match": etag}, 204),
        (good, FRAGMENT | {"If-Match": '"another"'}, 412),
        (good, SDP, 415),
        ("hello", FRAGMENT, 400),
        ("", FRAGMENT, 400),
        (good.replace(ufrag[1], "other"), FRAGMENT | {"If-Match": "*"}, 422),
    ):
        async with house.http.patch(url, data=body, headers=headers) as patched:
            assert patched.status == status, (body, await patched.text())
    async with house.http.delete(url, headers={"If-Match": '"ignored"'}) as deleted:
        assert deleted.status == 200
    assert (await house.get("/api/v1/capacity"))["open"] == 0


async def test_one_publisher_a_stream_and_as_many_as_there_are_seats(house: House) -> None:
    assert (await house.publisher().enter("/whip/a")).status == 201
    taken = await house.publisher().enter("/whip/a")
    assert taken.status == 409 and (await taken.json())["code"] == "already_published"
    second = house.publisher()
    assert (await second.enter("/whip/b")).status == 201
    full = await house.publisher().enter("/whip/c")
    assert full.status == 503 and int(full.headers["Retry-After"]) > 0
    assert await second.leave() == 200
    assert (await house.publisher().enter("/whip/c")).status == 201


async def test_viewers_are_bounded() -> None:
    async with open_house(max_viewers=1) as house:
        await house.publisher().enter("/whip/live")
        first = house.player()
        assert (await first.enter("/whep/live")).status == 201
        refused = await house.player().enter("/whep/live")
        assert refused.status == 503 and int(refused.headers["Retry-After"]) > 0
        assert await first.leave() == 200
        assert (await house.player().enter("/whep/live")).status == 201


async def test_a_token_is_asked_for_when_there_is_one() -> None:
    async with open_house(tokens=TokenSettings(publish="a-secret-of-sixteen")) as house:
        offer = await house.publisher().offer()
        for given, status in (
            ({}, 401),
            ({"Authorization": "Bearer wrong"}, 401),
            ({"Authorization": "Basic a-secret-of-sixteen"}, 401),
            ({"Authorization": "Bearer a-secret-of-sixteen"}, 201),
        ):
            async with house.http.post(house.base + "/whip/live", data=offer, headers=SDP | given) as response:
                assert response.status == status
                location = response.headers.get("Location")
                assert status == 201 or response.headers["WWW-Authenticate"].startswith("Bearer")
        async with house.http.delete(f"{house.base}{location}") as response:
            assert response.status == 401
        async with house.http.get(house.base + "/api/v1/streams") as response:
            assert response.status == 401


async def test_pages_of_other_origins_need_leave() -> None:
    async with open_house(allowed_origins=("https://studio.example",)) as house:
        offer = await house.publisher().offer()
        url = house.base + "/whip/live"
        for origin, status in (("https://elsewhere.example", 403), ("https://studio.example", 201)):
            async with house.http.options(url, headers={"Origin": origin}) as response:
                assert response.status == 200
                assert response.headers.get("Access-Control-Allow-Origin") == (origin if status == 201 else None)
            async with house.http.post(url, data=offer, headers=SDP | {"Origin": origin}) as response:
                assert response.status == status
        for name in ("Location", "Link", "ETag", "Retry-After"):
            assert name in response.headers["Access-Control-Expose-Headers"]


class StunServer(asyncio.DatagramProtocol):
    """Tells whoever asks where it asks from."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.DatagramTransport, transport)

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        asked = stun.parse_message(data)
        answer = stun.Message(stun.Method.BINDING, stun.Class.RESPONSE, asked.transaction_id)
        answer.attributes["XOR-MAPPED-ADDRESS"] = addr
        self._transport.sendto(bytes(answer), addr)


async def test_ice_servers_are_linked() -> None:
    loop = asyncio.get_running_loop()
    transport, _ = await loop.create_datagram_endpoint(StunServer, local_addr=("127.0.0.1", 0))
    server = f"stun:127.0.0.1:{transport.get_extra_info('sockname')[1]}"
    async with open_house(media={"ice_servers": (server,)}) as house:
        response = await house.publisher().enter("/whip/live")
        assert response.headers["Link"] == f'<{server}>; rel="ice-server"'
    transport.close()


# --- parts


def test_a_fragment_is_read_by_section() -> None:
    fragment = parse_fragment("a=ice-ufrag:abc\na=ice-pwd:x\nm=audio 9 X 0\na=mid:7\na=candidate:1 1 udp\n")
    assert fragment.ufrag == "abc"
    assert fragment.candidates == [{"candidate": "candidate:1 1 udp", "sdpMid": "7"}]
    assert parse_fragment("a=candidate:1 1 udp\n").candidates == [{"candidate": "candidate:1 1 udp"}]
    assert parse_fragment("a=end-of-candidates\n").candidates == []


@given(st.text(alphabet="a=candidte:ufrgmsw 0192.\r\n\x00é", max_size=200))
def test_a_fragment_of_any_text_is_read_or_refused(text: str) -> None:
    try:
        assert len(parse_fragment(text).candidates) <= text.count("a=candidate:")
    except ServerError as error:
        assert error.status in (400, 413)


def test_a_publisher_that_does_not_hear_is_told_of_once(caplog: pytest.LogCaptureFixture) -> None:
    stream, said = Stream("live", cast(Broadcast, None)), []
    answered_now_and_then = [3, 6, 9, 9, 12, 15, 15]
    for asked in (*answered_now_and_then, *range(18, 18 + 3 * DEAF_TICKS, 3), 60, 63):
        count_deaf(stream, asked)
        said.append(len(caplog.records))
    assert said == [0] * (len(answered_now_and_then) + DEAF_TICKS - 1) + [1] * 3
    assert "stream live: no key frame for 3 s" in caplog.text and "interval to 1 s" in caplog.text


def candidates(*hosts: str) -> str:
    return "".join(f"a=candidate:{host} 1 udp 1 {host} 5000 typ host\r\n" for host in hosts)


@pytest.mark.parametrize(
    ("reached", "order"),
    [
        ("127.0.0.1", ["127.0.0.1", "172.17.0.1", "10.0.0.5", "fd00::2"]),
        ("10.0.0.5", ["10.0.0.5", "172.17.0.1", "fd00::2", "127.0.0.1"]),
        ("", ["172.17.0.1", "10.0.0.5", "fd00::2", "127.0.0.1"]),
    ],
    ids=["loopback", "network", "proxy"],
)
def test_a_client_that_tries_the_first_candidate_alone_finds_this_server(reached: str, order: list[str]) -> None:
    run = candidates("127.0.0.1", "172.17.0.1", "10.0.0.5", "fd00::2")
    section = "m=audio 5000 X 0\r\n{}a=end-of-candidates\r\n"
    answer = nearest_first(section.format(run) * 2, reached)
    assert answer == section.format(candidates(*order)) * 2


async def test_an_answer_through_a_proxy_names_loopback_last() -> None:
    async with open_house() as house:
        for forwarded, first in (({}, True), ({"X-Forwarded-For": "192.0.2.7"}, False)):
            client = house.publisher()
            headers = {"Content-Type": "application/sdp", **forwarded}
            async with client.http.post(house.base + "/whip/live", data=await client.offer(), headers=headers) as made:
                assert made.status == 201
                run = [line.split()[4] for line in (await made.text()).splitlines() if line.startswith("a=candidate:")]
                assert (run[0] == "127.0.0.1") == (first or set(run) == {"127.0.0.1"})
            await client.http.delete(house.base + made.headers["Location"])


async def test_a_refusal_is_logged_for_who_runs_the_server(caplog: pytest.LogCaptureFixture) -> None:
    async with open_house() as house:
        client = house.publisher()
        with caplog.at_level("INFO", "server.signalling"):
            response = await client.enter(
                "/whip/live", lambda offer: offer.replace("VP8", "H265").replace("H264", "AV1")
            )
        assert response.status == 422
    assert [record.getMessage() for record in caplog.records if "POST /whip/live refused: 422" in record.getMessage()]


def test_a_refused_codec_is_named_with_the_cure() -> None:
    with pytest.raises(ServerError, match=r"has H265; .*H\.264 encoder") as caught:
        check_codecs("m=video\r\na=rtpmap:96 H265/90000\r\na=rtpmap:97 rtx/90000\r\n")
    assert caught.value.status == 422
    check_codecs("a=rtpmap:96 AV1/90000\r\na=rtpmap:98 h264/90000\r\n")
