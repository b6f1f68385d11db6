"""Safe by default: tokens and links, the gate before the handlers, limits, headers, the operator's part, the log."""

from __future__ import annotations

import asyncio
import base64
import logging
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import make_mocked_request
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import generate_latest
from pydantic import ValidationError

from engine.config import EngineSettings
from engine.fake import FakeEngine
from server.access import Access
from server.app import _with_tokens, running_server
from server.cli import main
from server.configure import SettingsError, load_settings
from server.errors import Forbidden, TooManyRequests, Unauthorized
from server.guard import Guard, is_offer, needed_role, session_of
from server.limits import (
    ALL_OFFERS_BURST,
    BAD_BURST,
    CHANGES_BURST,
    MAX_CLIENTS,
    OFFERS_BURST,
    Connections,
    GuardedSite,
    RateLimits,
    address_key,
)
from server.redaction import RedactingFormatter, RepeatLimit, redact
from server.roles import Role
from server.session_context import SessionContext
from server.settings import ServerSettings, TokenSettings

PATIENCE_S = 30.0
VIEW, PUBLISH, ADMIN = "v" * 20, "p" * 20, "a" * 20
TOKENS = {"view": VIEW, "publish": PUBLISH, "admin": ADMIN}
NOW = 1_800_000_000.0
SDP = {"Content-Type": "application/sdp"}


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


class House:
    """A server with a stand-in engine."""

    def __init__(self, base: str, context: SessionContext, http: aiohttp.ClientSession) -> None:
        self.base, self.context, self.http = base, context, http

    async def ask(self, method: str, path: str, token: str = "", **options: Any) -> tuple[int, Any, Any]:
        headers = options.pop("headers", {}) | (bearer(token) if token else {})
        async with self.http.request(method, self.base + path, headers=headers, **options) as response:
            body = await response.json() if "json" in response.content_type else await response.text()
            return response.status, body, response.headers

    async def status(self, method: str, path: str, token: str = "", **options: Any) -> int:
        return (await self.ask(method, path, token, **options))[0]

    def refused(self) -> dict[str, int]:
        text = generate_latest(self.context.metrics.registry).decode()
        rows = re.findall(r'livebrush_requests_refused_total\{reason="(\w+)"\} ([\d.]+)', text)
        return {reason: int(float(count)) for reason, count in rows}


@asynccontextmanager
async def house(**settings: Any) -> AsyncIterator[House]:
    chosen = ServerSettings(port=0, engine_kind="fake", engine=EngineSettings(width=64, height=64), **settings)
    async with (
        running_server(chosen, FakeEngine(64, 64, max_streams=4)) as (context, port),
        aiohttp.ClientSession() as http,
    ):
        yield House(f"http://127.0.0.1:{port}", context, http)


async def offer_sdp() -> str:
    from aiortc import RTCConfiguration, RTCPeerConnection

    connection = RTCPeerConnection(RTCConfiguration(iceServers=[]))
    try:
        connection.addTransceiver("video", "sendonly")
        await connection.setLocalDescription(await connection.createOffer())
        return str(connection.localDescription.sdp)
    finally:
        await connection.close()


@pytest.fixture(autouse=True)
def only_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aioice.ice.get_host_addresses", lambda use_ipv4, use_ipv6: ["127.0.0.1"])


# --- tokens and links


def access() -> Access:
    return Access(TokenSettings(**TOKENS).by_role())


def test_each_token_has_its_role_and_holders_are_told_apart() -> None:
    gate = access()
    grants = [gate.grant(token, unix_now=NOW) for token in (VIEW, PUBLISH, ADMIN)]
    assert [grant.role for grant in grants] == [Role.VIEW, Role.PUBLISH, Role.ADMIN]
    assert len({grant.owner for grant in grants}) == 3
    assert not any(token in repr(grants) for token in (VIEW, PUBLISH, ADMIN))


@given(st.text(max_size=600))
def test_no_other_text_is_a_token(text: str) -> None:
    with pytest.raises(Unauthorized):
        access().grant(text, unix_now=NOW)


def test_bytes_that_are_no_text_are_a_wrong_token_and_no_fault() -> None:
    with pytest.raises(Unauthorized):
        access().grant("\udcff\udcfe" * 8, unix_now=NOW)


@given(st.sampled_from([Role.VIEW, Role.PUBLISH]), st.from_regex(r"[A-Za-z0-9_-]{0,64}", fullmatch=True))
def test_a_link_is_good_for_its_role_and_stream_until_it_expires(role: Role, stream: str) -> None:
    gate = access()
    link = gate.link(role, stream, hours=2, unix_now=NOW)
    grant = gate.grant(link.token, unix_now=NOW + 7199)
    assert (grant.role, grant.stream, grant.is_link) == (role, stream, True)
    with pytest.raises(Unauthorized, match="expired"):
        gate.grant(link.token, unix_now=NOW + 7200)
    # Another server with the same tokens, or this one started again, takes it; one with other tokens does not.
    assert access().grant(link.token, unix_now=NOW).role is role
    with pytest.raises(Unauthorized, match="not signed"):
        Access({Role.ADMIN: "b" * 20}).grant(link.token, unix_now=NOW)


@pytest.mark.parametrize(
    ("old", "new"), [("link.view", "link.publish"), (".studio.", ".other."), (".studio.", ".."), (".18", ".19")]
)
def test_a_changed_link_is_no_link(old: str, new: str) -> None:
    token = access().link(Role.VIEW, "studio", hours=1, unix_now=NOW).token
    with pytest.raises(Unauthorized):
        access().grant(token.replace(old, new, 1), unix_now=NOW)


@pytest.mark.parametrize(
    ("role", "stream", "hours"),
    [(Role.ADMIN, "", 1), (Role.VIEW, "", 0), (Role.VIEW, "", 721), (Role.VIEW, "a b", 1), (Role.VIEW, "x" * 65, 1)],
)
def test_links_have_bounds(role: Role, stream: str, hours: float) -> None:
    with pytest.raises(ValueError):
        access().link(role, stream, hours=hours, unix_now=NOW)


def test_who_may_only_view_can_sign_nothing() -> None:
    with pytest.raises(ValidationError, match="publish or admin"):
        TokenSettings(view=VIEW)


@pytest.mark.parametrize("tokens", [{"publish": "short"}, {"publish": PUBLISH, "admin": PUBLISH}, {"admin": "ä" * 20}])
def test_a_weak_or_shared_token_is_refused_without_being_shown(tokens: dict[str, str]) -> None:
    environment = {f"LIVEBRUSH_TOKENS__{role.upper()}": token for role, token in tokens.items()}
    with pytest.raises(SettingsError) as refused:
        load_settings(None, environment, {("engine_kind",): ("test", "fake")})
    assert "tokens" in str(refused.value) and not any(token in str(refused.value) for token in tokens.values())


def test_livebrush_link_prints_one_that_the_server_takes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LIVEBRUSH_TOKENS__PUBLISH", PUBLISH)
    assert main(["link", "--role", "view", "--stream", "studio", "--url", "https://live.example/"]) == 0
    url, _, token = capsys.readouterr().out.strip().partition("#token=")
    assert url == "https://live.example/overlay?stream=studio"
    assert Access({Role.PUBLISH: PUBLISH}).grant(token, unix_now=0).stream == "studio"
    monkeypatch.delenv("LIVEBRUSH_TOKENS__PUBLISH")
    assert main(["link", "--stream", "studio"]) == 1
    assert "set tokens.publish" in capsys.readouterr().err


# --- a server that is reached from elsewhere


def test_a_public_server_without_tokens_makes_some_and_prints_them_once(capsys: pytest.CaptureFixture[str]) -> None:
    settings = _with_tokens(ServerSettings(host="0.0.0.0"))
    printed = capsys.readouterr()
    tokens = settings.tokens.by_role()
    assert len(tokens) == 3 and all(printed.out.count(token) == 1 for token in tokens.values())
    assert "plain HTTP" in printed.err
    kept = _with_tokens(ServerSettings(host="0.0.0.0", tokens=TokenSettings(**TOKENS)))
    assert kept.tokens.by_role()[Role.VIEW] == VIEW and VIEW not in capsys.readouterr().out
    assert _with_tokens(ServerSettings()).tokens.by_role() == {}


def test_a_server_behind_a_proxy_is_reached_from_elsewhere_too(capsys: pytest.CaptureFixture[str]) -> None:
    settings = _with_tokens(ServerSettings(trusted_proxies=("127.0.0.1",)))
    printed = capsys.readouterr()
    assert len(settings.tokens.by_role()) == 3 and "plain HTTP" not in printed.err


async def test_a_public_server_without_tokens_does_not_start() -> None:
    settings = ServerSettings(host="0.0.0.0", port=0, engine_kind="fake", engine=EngineSettings(width=64, height=64))
    with pytest.raises(ValueError, match="no token"):
        async with running_server(settings, FakeEngine(64, 64)):
            pass


# --- roles


@pytest.mark.parametrize(
    ("method", "path", "role"),
    [
        ("GET", "/", None),
        ("GET", "/overlay", None),
        ("GET", "/client.js", None),
        ("GET", "/livez", None),
        ("GET", "/readyz", None),
        ("OPTIONS", "/whip/live", None),
        ("POST", "/whep/live", Role.VIEW),
        ("POST", "/live/whep", Role.VIEW),
        ("DELETE", "/whep/live/id", Role.VIEW),
        ("POST", "/whip/whep", Role.PUBLISH),
        ("POST", "/whip/live", Role.PUBLISH),
        ("POST", "/live/whip", Role.PUBLISH),
        ("GET", "/api/v1/models", Role.VIEW),
        ("GET", "/api/v1/streams", Role.VIEW),
        ("PATCH", "/api/v1/streams/live", Role.PUBLISH),
        ("POST", "/api/v1/webrtc/offer", Role.PUBLISH),
        ("POST", "/api/v1/links", Role.PUBLISH),
        ("GET", "/api/v1/sessions", Role.ADMIN),
        ("GET", "/api/v1/of/tomorrow", Role.PUBLISH),
        ("DELETE", "/api/v2/anything", Role.PUBLISH),
    ],
)
def test_what_each_request_needs(method: str, path: str, role: Role | None) -> None:
    assert needed_role(method, path) is role


def test_urls_of_sessions_and_offers_are_known() -> None:
    assert session_of("/whip/live/abc") == session_of("/api/v1/webrtc/offer/abc/close") == "abc"
    assert session_of("/api/v1/sessions/abc/scenes") == "abc" and session_of("/live/whip") is None
    assert is_offer("POST", "/live/whip") and is_offer("POST", "/api/v1/webrtc/offer")
    assert not is_offer("POST", "/api/v1/webrtc/offer/abc/close") and not is_offer("DELETE", "/whip/live/abc")


async def test_every_route_of_the_server_but_the_open_ones_asks_for_a_token() -> None:
    async with house(tokens=TokenSettings(**TOKENS)) as here:
        for path in ("/", "/livez", "/readyz", "/client.js"):
            assert await here.status("GET", path) in (200, 503), path
        for method, path in (
            ("GET", "/api/v1/models"),
            ("GET", "/api/v1/ice-servers"),
            ("GET", "/api/v1/capacity"),
            ("GET", "/api/v1/streams"),
            ("GET", "/api/v1/sessions"),
            ("POST", "/api/v1/webrtc/offer"),
            ("POST", "/whip/live"),
            ("POST", "/live/whep"),
            ("DELETE", "/whip/live/abc"),
        ):
            status, body, headers = await here.ask(method, path)
            assert (status, body["code"], headers["WWW-Authenticate"]) == (401, "unauthorized", "Bearer"), path
        assert here.refused()["unauthorized"] == 9


async def test_a_role_is_not_enough_for_a_higher_one() -> None:
    async with house(tokens=TokenSettings(**TOKENS)) as here:
        status, body, _ = await here.ask("POST", "/api/v1/webrtc/offer", VIEW, json={})
        assert (status, body["code"]) == (403, "role") and "publish" in body["message"]
        assert await here.status("POST", "/api/v1/webrtc/offer", PUBLISH, json={}) == 400
        assert await here.status("GET", "/api/v1/models", PUBLISH) == 200


async def test_a_wrong_token_waits_and_the_right_one_of_the_same_address_does_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pauses: list[tuple[float, float]] = []

    def no_pause(least_s: float, most_s: float) -> float:
        pauses.append((least_s, most_s))
        return 0.0

    monkeypatch.setattr("server.guard.random.uniform", no_pause)
    async with house(tokens=TokenSettings(publish=PUBLISH)) as here:
        statuses = [await here.status("GET", "/api/v1/models", f"wrong-{number}") for number in range(BAD_BURST + 20)]
        assert statuses[0] == 401 and statuses[-1] == 429 and set(statuses) == {401, 429}
        assert pauses == [(0.1, 0.5)] * statuses.count(401)
        assert await here.status("GET", "/api/v1/models", PUBLISH) == 200
        assert here.refused()["too_many_bad_requests"] == statuses.count(429)


# --- sessions belong to who made them


async def test_a_session_is_its_makers_and_the_admins() -> None:
    tokens = TokenSettings(publish=PUBLISH, admin=ADMIN)
    async with house(tokens=tokens) as here:
        made = (await here.ask("POST", "/api/v1/links", PUBLISH, json={"role": "publish"}))[1]
        stranger = made["token"]
        offer = await offer_sdp()
        status, _, headers = await here.ask("POST", "/whip/live", PUBLISH, data=offer, headers=SDP)
        assert status == 201
        location = headers["Location"]
        assert await here.status("DELETE", location, stranger) == 404
        assert await here.status("DELETE", "/api/v1/sessions/" + location.rpartition("/")[2], stranger) == 404
        assert await here.status("DELETE", location, PUBLISH) == 200
        _, _, headers = await here.ask("POST", "/whip/live", PUBLISH, data=offer, headers=SDP)
        assert await here.status("DELETE", headers["Location"], ADMIN) == 200
        assert here.refused()["owner"] == 2


async def test_a_link_by_rest_is_for_its_stream_alone_and_makes_no_further_links() -> None:
    async with house(tokens=TokenSettings(**TOKENS)) as here:
        wish = {"role": "publish", "stream": "studio", "hours": 1}
        status, made, _ = await here.ask("POST", "/api/v1/links", PUBLISH, json=wish)
        assert (status, made["path"], made["stream"]) == (201, "/whip/studio", "studio")
        link = made["token"]
        assert await here.status("POST", "/whip/studio", link, data="v=0", headers=SDP) == 422
        status, body, _ = await here.ask("POST", "/whip/other", link, data="v=0", headers=SDP)
        assert (status, body["code"]) == (403, "other_stream")
        assert await here.status("GET", "/api/v1/streams", link) == 403
        assert await here.status("GET", "/api/v1/ice-servers", link) == 200
        assert await here.status("POST", "/api/v1/links", VIEW, json=wish) == 403
        made = (await here.ask("POST", "/api/v1/links", PUBLISH, json={"role": "publish"}))[1]
        assert await here.status("POST", "/api/v1/links", made["token"], json=wish) == 403
        assert await here.status("POST", "/api/v1/links", PUBLISH, json={"role": "admin"}) == 400
        assert await here.status("POST", "/api/v1/links", PUBLISH, json={"role": "view", "hours": 1000}) == 400
    async with house() as here:
        assert (await here.ask("POST", "/api/v1/links", json={"role": "view"}))[1]["code"] == "no_tokens"


async def test_a_websocket_shows_its_token_as_a_subprotocol() -> None:
    async with house(tokens=TokenSettings(view=VIEW, publish=PUBLISH)) as here:
        url = here.base + "/api/v1/socket"
        for token, status in (("", 401), (VIEW, 403), ("wrong" * 4, 401), ("\xff" * 16, 401)):
            coded = base64.urlsafe_b64encode(token.encode("latin-1")).decode().rstrip("=")
            with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
                await here.http.ws_connect(url, protocols=["livebrush", f"bearer.{coded}"] if token else ["livebrush"])
            assert refused.value.status == status
        coded = base64.urlsafe_b64encode(PUBLISH.encode()).decode().rstrip("=")
        async with here.http.ws_connect(url, protocols=["livebrush", f"bearer.{coded}"]) as socket:
            assert socket.protocol == "livebrush"


# --- other pages


async def test_only_under_its_own_names() -> None:
    async with house(allowed_hosts=("localhost", "127.0.0.1", "live.example")) as here:
        for host, status in (
            ("live.example", 200),
            ("localhost:99", 200),
            ("evil.example", 403),
            ("127.0.0.1.evil.example", 403),
            ("10.1.2.3", 403),
            ("", 403),
        ):
            assert await here.status("GET", "/api/v1/models", headers={"Host": host}) == status, host
        assert here.refused()["host"] == 4


async def test_a_public_server_answers_to_its_addresses_and_to_no_strange_name() -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        return web.Response()

    guard = Guard(ServerSettings(host="0.0.0.0"), Access({}))
    for host in ("10.1.2.3:8080", "[fe80::1]:8080", "[::1]", "localhost"):
        request = make_mocked_request("GET", "/", headers={"Host": host})
        assert (await guard.middleware(request, handler)).status == 200, host
    for host in ("evil.example", "10.1.2.3.evil.example:8080", "0x7f000001", ""):
        with pytest.raises(Forbidden):
            await guard.middleware(make_mocked_request("GET", "/", headers={"Host": host}), handler)


async def test_a_page_of_another_origin_changes_nothing() -> None:
    async with house(allowed_origins=("https://studio.example",)) as here:
        own = here.base
        for origin, status in (
            (own, 400),
            ("https://studio.example", 400),
            ("http://evil.example", 403),
            ("null", 403),
            ("https://studio.example.evil.example", 403),
        ):
            asked = here.status("POST", "/api/v1/webrtc/offer", json={}, headers={"Origin": origin})
            assert await asked == status, origin
        assert await here.status("OPTIONS", "/whip/live", headers={"Origin": "http://evil.example"}) == 200


@pytest.mark.parametrize(
    "content_type", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "", "application/xml"]
)
async def test_what_a_form_can_send_is_refused(content_type: str) -> None:
    async with house() as here:
        for method, path in (("POST", "/api/v1/webrtc/offer"), ("POST", "/whip/live"), ("PATCH", "/api/v1/streams/x")):
            sent = {"Content-Type": content_type} if content_type else {}
            assert await here.status(method, path, data=b"{}", headers=sent) == 415, path


async def test_a_compressed_body_is_refused_and_never_unpacked() -> None:
    import gzip

    async with house() as here:
        bomb = gzip.compress(b"0" * 30_000_000)
        headers = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
        assert await here.status("POST", "/api/v1/webrtc/offer", data=bomb, headers=headers) == 415
        assert await here.status("GET", "/api/v1/models", data=bomb, headers=headers) == 415


async def test_no_answer_sets_a_cookie_and_each_has_the_headers() -> None:
    async with house() as here:
        for path in ("/", "/client.js", "/api/v1/models", "/livez", "/nothing", "/whip/live"):
            _, _, headers = await here.ask("GET", path)
            policy = headers["Content-Security-Policy"]
            assert policy.startswith("default-src 'self'") and "frame-ancestors 'none'" in policy
            assert "unsafe" not in policy
            assert headers["X-Content-Type-Options"] == "nosniff" and headers["Referrer-Policy"] == "no-referrer"
            assert "camera=(self)" in headers["Permissions-Policy"] and "Set-Cookie" not in headers


# --- limits


def test_offers_have_a_rate_for_each_client_and_one_for_all() -> None:
    limits = RateLimits()
    for _ in range(OFFERS_BURST):
        limits.offer(("10.0.0.1", ""), 0.0)
    with pytest.raises(TooManyRequests) as refused:
        limits.offer(("10.0.0.1", ""), 0.0)
    assert refused.value.retry_after_s == 1.0
    limits.offer(("10.0.0.1", "a token"), 0.0)
    limits.offer(("10.0.0.1", ""), 1.0)
    taken = OFFERS_BURST + 2
    with pytest.raises(TooManyRequests, match="all clients"):
        for number in range(ALL_OFFERS_BURST + 20 - taken):
            limits.offer((f"10.0.1.{number}", ""), 1.0)


def test_changes_and_refusals_have_a_rate() -> None:
    limits = RateLimits()
    for _ in range(CHANGES_BURST):
        limits.change(("a", ""), 0.0)
    with pytest.raises(TooManyRequests):
        limits.change(("a", ""), 0.0)
    for _ in range(BAD_BURST):
        limits.refused(("a", ""), 0.0)
    limits.check(("a", ""), 0.0)
    limits.refused(("a", ""), 0.0)
    with pytest.raises(TooManyRequests):
        limits.check(("a", ""), 0.5)
    limits.check(("b", ""), 0.5)
    limits.check(("a", ""), 1.1)


def test_the_table_of_clients_is_bounded() -> None:
    limits = RateLimits()
    for number in range(2 * MAX_CLIENTS):
        limits.check((str(number), ""), 0.0)
    assert len(limits) == MAX_CLIENTS


def test_one_client_has_a_whole_64_of_ipv6() -> None:
    assert address_key("2001:db8::1") == address_key("2001:db8::ffff:2") != address_key("2001:db8:0:1::1")
    assert address_key("::ffff:10.0.0.1") == address_key("10.0.0.1") == "10.0.0.1"
    assert address_key("fe80::1%eth0") == address_key("fe80::2") and len(address_key("x" * 999)) == 64


async def test_a_flood_of_offers_is_answered_429_with_a_time_and_counted() -> None:
    async with house() as here:
        answers = [await here.ask("POST", "/whip/live", data="v=0", headers=SDP) for _ in range(OFFERS_BURST + 15)]
        late = [headers for status, _, headers in answers if status == 429]
        assert late and all(int(headers["Retry-After"]) >= 1 for headers in late)
        assert {status for status, _, _ in answers} == {422, 429}
        assert here.refused()["too_many_requests"] == len(late)


async def test_the_clients_of_a_trusted_proxy_are_told_apart_and_nobody_elses_word_counts() -> None:
    for proxies, apart in ((("127.0.0.1",), True), ((), False)):
        async with house(trusted_proxies=proxies, tokens=TokenSettings(**TOKENS)) as here:
            statuses = []
            for number in range(OFFERS_BURST + 8):
                headers = SDP | {"X-Forwarded-For": f"6.6.6.6, 10.0.0.{number}"}
                statuses.append(await here.status("POST", "/whip/live", PUBLISH, data="v=0", headers=headers))
            assert (429 not in statuses) is apart


async def test_connections_are_counted_by_address_and_in_all() -> None:
    refused: list[str] = []
    connections = Connections(refused.append, of_address=3, in_all=4)
    async with listener(connections) as port:
        streams = [await asyncio.open_connection("127.0.0.1", port) for _ in range(3)]
        assert await get(port) == b"HTTP/1.1 429 Too Many Requests" and refused == ["connections_of_address"]
        streams.append(await asyncio.open_connection("127.0.0.1", port, local_addr=("127.0.0.2", 0)))
        assert await get(port, source="127.0.0.3") == b"HTTP/1.1 429 Too Many Requests"
        assert refused[1:] == ["connections"]
        # One that never asks is closed all the same.
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        async with asyncio.timeout(PATIENCE_S):
            await reader.read()
        writer.close()
        for _, one in streams:
            one.close()
        async with asyncio.timeout(PATIENCE_S):
            while len(connections):
                await asyncio.sleep(0.01)
        assert await get(port) == b"HTTP/1.1 200 OK"


async def test_headers_that_do_not_come_end_the_connection_and_a_slow_handler_does_not() -> None:
    refused: list[str] = []
    async with listener(Connections(refused.append, header_deadline_s=0.3)) as port:
        for said in (b"", b"GET / HTTP/1.1\r\nHost: x\r\nX-Slow: "):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(said)
            async with asyncio.timeout(PATIENCE_S):
                with pytest.raises(ConnectionResetError):
                    assert not await reader.read(1)
                    raise ConnectionResetError
            writer.close()
        assert refused == ["header_deadline"] * 2
        assert await get(port, "/slow") == b"HTTP/1.1 200 OK"
        assert refused == ["header_deadline"] * 2


@asynccontextmanager
async def listener(connections: Connections) -> AsyncIterator[int]:
    @web.middleware
    async def counted(request: web.Request, handler: Any) -> web.StreamResponse:
        with connections.request(request.transport):
            answer: web.StreamResponse = await handler(request)
            return answer

    async def slow(request: web.Request) -> web.Response:
        await asyncio.sleep(1.0 if request.path == "/slow" else 0)
        return web.Response()

    app = web.Application(middlewares=[counted])
    app.add_routes([web.get("/", slow), web.get("/slow", slow)])
    runner = web.AppRunner(app, shutdown_timeout=1)
    await runner.setup()
    try:
        await GuardedSite(runner, "127.0.0.1", 0, connections).start()
        yield runner.addresses[0][1]
    finally:
        await runner.cleanup()


async def get(port: int, path: str = "/", source: str = "127.0.0.1") -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", port, local_addr=(source, 0))
    writer.write(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    async with asyncio.timeout(PATIENCE_S):
        line = await reader.readline()
    writer.close()
    return line.strip()


# --- the operator's listener


async def test_metrics_stand_on_the_operators_listener_alone(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "server.health")
    async with house(tokens=TokenSettings(**TOKENS)) as here:
        found = re.search(r"metrics at (http://127\.0\.0\.1:\d+)/metrics", caplog.text)
        assert found is not None
        assert await here.status("GET", "/metrics", ADMIN) == 404
        assert (await here.http.get(here.base + "/livez")).status == 200
        for path, headers, status in (
            ("/metrics", {}, 200),
            ("/livez", {}, 200),
            ("/api/v1/models", {}, 404),
            ("/metrics", {"Host": "evil.example"}, 403),
            ("/metrics", {"Origin": "http://evil.example"}, 403),
        ):
            async with here.http.get(found[1] + path, headers=headers) as response:
                text = await response.text()
                assert response.status == status, path
            assert path != "/metrics" or status != 200 or "livebrush_http_connections" in text


# --- the log

SECRETS = ("s3cretTOKEN12345", "icepassword12345678901234", "a castle in the rain")


@pytest.mark.parametrize(
    "line",
    [
        "Authorization: Bearer s3cretTOKEN12345",
        "{'Authorization': 'Bearer s3cretTOKEN12345', 'Host': 'x'}",
        "GET /overlay?stream=a#token=s3cretTOKEN12345",
        "link.view.studio.1800000000.s3cretTOKEN12345",
        "a=ice-pwd:icepassword12345678901234\r\na=setup:actpass",
        'offer "v=0\\r\\na=ice-pwd:icepassword12345678901234\\r\\n"',
        "StreamParams(prompt='a castle in the rain', strength=1.0)",
        '{"prompt": "a castle in the rain", "steps": 2}',
        "[type=string_too_long, input_value='a castle in the rain', input_type=str]",
    ],
)
def test_the_log_holds_no_secret(line: str) -> None:
    assert not any(secret in redact(line) for secret in SECRETS), redact(line)


def test_the_log_is_redacted_with_its_tracebacks_bounded_and_no_client_writes_lines_of_its_own() -> None:
    formatter = RedactingFormatter("%(levelname)s %(message)s")
    try:
        raise ValueError("Authorization: Bearer s3cretTOKEN12345")
    except ValueError as error:
        fault = (type(error), error, None)
        record = logging.LogRecord("x", 20, "", 0, "%s failed", ("/a\nERROR forged\x1b[31m",), fault)
    text = formatter.format(record)
    assert "s3cretTOKEN12345" not in text and "\nERROR" not in text and "\x1b" not in text and "ValueError" in text
    assert len(formatter.format(logging.LogRecord("x", 20, "", 0, "y" * 100_000, (), None))) < 17_000


def test_the_same_complaint_is_logged_at_a_bounded_rate_and_the_rest_is_counted() -> None:
    limit = RepeatLimit()

    def say(text: str, at_s: float, level: int = logging.ERROR) -> str | None:
        record = logging.LogRecord("aiohttp.server", level, "", 0, text, ("10.0.0.1",), None)
        record.created = NOW + at_s
        return record.getMessage() if limit.filter(record) else None

    said = [say("no HTTP from %s", 0.0) for _ in range(1000)]
    assert said[:10] == ["no HTTP from 10.0.0.1"] * 10 and set(said[10:]) == {None}
    assert say("something else from %s", 0.0) and say("no HTTP from %s", 0.0, logging.INFO)
    assert say("no HTTP from %s", 6.0) == "no HTTP from 10.0.0.1 (and 990 more before this one)"
    for number in range(1000):
        assert say(f"kind {number} of %s", 7.0)
    assert len(limit._seen) == 256
