"""The gateway: whom it asks, where it sends what, and what it says when nobody answers.

Here before nodes that only pretend; tests/server/test_gateway_live.py has real ones.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Callable
from typing import Any

import aiohttp
import pytest
from aiohttp import WSMsgType, web
from pydantic import ValidationError

from server.cli import main
from server.gateway import Gateway, about, resume_token, running_gateway, stream_of
from server.gateway_nodes import OUT_AFTER, SENT_S, Node, Nodes, Report, by_room
from server.gateway_settings import GatewaySettings
from server.node_name import new_resume_token, new_session_id

PATIENCE_S = 30.0
OFFER = "/api/v1/webrtc/offer"
SDP = {"Content-Type": "application/sdp"}
DEFAULT = Report(node="aaaaaaaa", ready=True, draining=False, streams={}, open=0, seats=4, load=0.0, retry_after_s=20.0)


class Pretender:
    """A node that answers what it is told to, and remembers what it was asked."""

    def __init__(self, name: str, **report: Any) -> None:
        self.name = name
        self.report: dict[str, Any] = DEFAULT.model_dump() | {"node": name} | report
        self.asked: list[tuple[str, str, dict[str, str], bytes]] = []
        self.url = ""
        self.refuses: dict[str, Any] | None = None
        """The problem that offers are answered with, status and all."""
        self.token = ""
        self.hangs = asyncio.Event()
        self._runner: web.AppRunner | None = None
        self._port = 0

    async def start(self) -> None:
        """Listen, at the port that it had before; harmless when repeated."""
        if self._runner is not None:
            return
        app = web.Application()
        app.add_routes(
            [
                web.get("/api/v1/capacity", self._capacity),
                web.get("/api/v1/socket", self._socket),
                web.get("/large", self._large),
                web.route("*", "/{path:.*}", self._any),
            ]
        )
        self._runner = web.AppRunner(app, access_log=None, auto_decompress=False, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", self._port).start()
        self._port = self._runner.addresses[0][1]
        self.url = f"http://127.0.0.1:{self._port}"

    async def stop(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    def paths(self) -> list[str]:
        return [path for _, path, _, _ in self.asked]

    async def _capacity(self, request: web.Request) -> web.Response:
        if self.token and request.headers.get("Authorization") != f"Bearer {self.token}":
            return web.Response(status=401)
        return web.json_response(self.report)

    async def _any(self, request: web.Request) -> web.Response:
        body = await request.read()
        self.asked.append((request.method, request.raw_path, dict(request.headers), body))
        if "hang" in request.path:
            await self.hangs.wait()
        opens = request.method == "POST" and ("webrtc" in request.path or "whip" in request.path)
        if opens and self.refuses is not None:
            headers = {"Retry-After": str(int(self.refuses.get("retry_after_s", 1)))}
            return web.json_response(self.refuses, status=self.refuses["status"], headers=headers)
        headers = {"X-Node": self.name, "Keep-Alive": "timeout=5", "Link": "<stun:a>"}
        shown = {"node": self.name, "sessions": [self.name]}
        return web.json_response(shown, status=201 if opens else 200, headers=headers)

    async def _large(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Length": str(64 * 100_000)})
        await response.prepare(request)
        for number in range(64 if request.method == "GET" else 0):
            await response.write(bytes([number]) * 100_000)
        return response

    async def _socket(self, request: web.Request) -> web.StreamResponse:
        self.asked.append(("GET", request.raw_path, dict(request.headers), b""))
        if self.token:
            return web.Response(status=401)
        line = web.WebSocketResponse(protocols=("livebrush",))
        await line.prepare(request)
        async for message in line:
            if message.type is WSMsgType.TEXT and message.data == "end":
                await line.close(code=1013)
            elif message.type is WSMsgType.TEXT:
                await line.send_str(f"{self.name}: {message.data}")
            elif message.type is WSMsgType.BINARY:
                await line.send_bytes(message.data)
        return line


class Front:
    """A gateway, and a client of it."""

    def __init__(self, gateway: Gateway, base: str, http: aiohttp.ClientSession) -> None:
        self.gateway, self.base, self.http = gateway, base, http

    async def ask(self, method: str, path: str, **options: Any) -> tuple[int, Any, Any]:
        options = {"allow_redirects": False} | options
        async with self.http.request(method, self.base + path, **options) as response:
            is_json = "json" in response.content_type
            return response.status, await (response.json() if is_json else response.text()), response.headers

    async def offer(self, **body: Any) -> tuple[int, Any, Any]:
        return await self.ask("POST", OFFER, json={"type": "offer", "sdp": "", **body})

    async def until(self, condition: Callable[[], object]) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while not condition():
                await asyncio.sleep(0.02)

    def figure(self, name: str, **labels: str) -> float:
        value = self.gateway.metrics.registry.get_sample_value(name, labels)
        return 0.0 if value is None else value


@contextlib.asynccontextmanager
async def front(*nodes: Pretender, **settings: Any) -> AsyncIterator[Front]:
    for node in nodes:
        await node.start()
    chosen = GatewaySettings.model_validate(
        {"port": 0, "admin_port": 0, "nodes": tuple(node.url for node in nodes)} | settings
    )
    try:
        async with running_gateway(chosen) as (gateway, port), aiohttp.ClientSession() as http:
            yield Front(gateway, f"http://127.0.0.1:{port}", http)
    finally:
        for node in nodes:
            node.hangs.set()
            await node.stop()


FULL = {"status": 503, "code": "full", "message": "full", "detail": "full", "retryable": True}

# --- which node


def node(**report: Any) -> Node:
    return Node("http://a", "http://a", DEFAULT.model_copy(update=report))


def test_most_room_comes_first_ready_before_loading_and_idle_before_busy() -> None:
    loading, busy, idle, roomy = node(ready=False, seats=9), node(load=0.5), node(load=0.1), node(seats=5)
    assert by_room([loading, busy, idle, roomy]) == [roomy, idle, busy, loading]
    roomy.placed = 3
    assert by_room([loading, busy, idle, roomy]) == [idle, busy, roomy, loading]


def test_of_full_nodes_the_one_with_the_next_seat_answers_and_of_drained_ones_any() -> None:
    late, early, drained = node(open=4, retry_after_s=30), node(open=4, retry_after_s=3), node(draining=True)
    assert by_room([drained, late, early]) == [early]
    assert by_room([drained]) == [drained]
    silent, refusing, unknown = node(), node(), Node("http://a", "http://a")
    silent.missed, refusing.refusal = OUT_AFTER, "no token"
    assert by_room([silent, refusing, unknown]) == []


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


async def test_a_stream_is_where_it_is_live_and_its_publisher_does_not_go_back_to_a_drained_node() -> None:
    clock = Clock()
    waits, live, other = node(streams={"a": False}), node(streams={"a": True}), node()
    async with aiohttp.ClientSession() as http:
        nodes = Nodes([waits, live, other], http, needs_tokens=False, clock=clock)
        assert nodes.with_stream("a") is nodes.with_stream("a", returns=True) is live
        assert nodes.with_stream("b") is None
        live.report = DEFAULT
        assert nodes.with_stream("a") is nodes.with_stream("a", returns=True) is waits
        waits.report = DEFAULT.model_copy(update={"streams": {"a": False}, "draining": True})
        assert (nodes.with_stream("a"), nodes.with_stream("a", returns=True)) == (waits, None)
        # A second publisher of the same name meets the first, who was sent on and has not arrived.
        nodes.note_publisher("a", other)
        assert nodes.with_stream("a") is nodes.with_stream("a", returns=True) is other
        other.report = DEFAULT.model_copy(update={"draining": True})
        assert nodes.with_stream("a", returns=True) is None
        clock.now += SENT_S
        assert nodes.with_stream("a", returns=True) is None


def test_paths_are_told_apart() -> None:
    assert stream_of("/whip/a") == stream_of("/a/whip") == ("whip", "a")
    assert stream_of("/whep/a") == ("whep", "a")
    assert stream_of("/api/v1/streams/a/scenes/go") == ("", "a")
    assert stream_of("/api/v1/streams") == stream_of("/a/b") == stream_of("/whip/a/b") == ("", "")
    asked = [("POST", OFFER), ("GET", "/api/v1/socket"), ("PATCH", OFFER + "/x.0"), ("DELETE", "/whip/a/b")]
    asked += [("POST", "/whip/a"), ("GET", "/api/v1/streams/a"), ("GET", "/api/v1/models"), ("GET", "/client.js")]
    words = ["offer", "socket", "session", "session", "whip", "stream", "api", "page"]
    assert [about(*one) for one in asked] == words


@pytest.mark.parametrize("body", [b"", b"[]", b"{", b'{"resume": 1}', b'{"resume": {"token": 7}}', b"[" * 40_000])
def test_what_is_no_offer_has_no_token(body: bytes) -> None:
    assert resume_token(body) == ""


@pytest.mark.parametrize(
    ("nodes", "words"),
    [
        ((), "at least 1"),
        (("10.0.0.1:8080",), "http://HOST:PORT"),
        (("http://a:8080/path",), "http://HOST:PORT"),
        (("http://user@a:8080",), "http://HOST:PORT"),
        (("http://a:x",), "http://HOST:PORT"),
        (("http://a=ftp://b",), "http://HOST:PORT"),
        (("http://a", "http://a=http://b"), "twice"),
    ],
)
def test_nodes_that_cannot_be_are_refused(nodes: tuple[str, ...], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        GatewaySettings(nodes=nodes)


def test_the_command_says_what_is_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["gateway", "--nodes", "http://a,nonsense"]) == 2
    assert main(["gateway", "--nodes", "http://a", "--tls-cert", "a.pem"]) == 2
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert main(["gateway", "--nodes", "http://127.0.0.1:9", "--port", port]) == 1
    said = capsys.readouterr().err
    assert "'nonsense' must be of the form" in said and "go together" in said and "choose other ports" in said


# --- offers


async def test_offers_go_where_there_is_room_and_spread_before_the_next_poll() -> None:
    small, large = Pretender("aaaaaaaa", seats=2), Pretender("bbbbbbbb", seats=4)
    async with front(small, large) as door:
        answers = [(await door.offer())[1]["node"] for _ in range(6)]
        assert sorted(answers) == ["aaaaaaaa"] * 2 + ["bbbbbbbb"] * 4
        assert answers[0] == "bbbbbbbb"


async def test_a_node_that_refuses_is_passed_over_and_all_refusing_give_the_shortest_wait() -> None:
    first, second = Pretender("aaaaaaaa", seats=8, retry_after_s=50.0), Pretender("bbbbbbbb", retry_after_s=60.0)
    first.refuses = FULL | {"retry_after_s": 40.0}
    async with front(first, second) as door:
        assert (await door.offer())[1]["node"] == "bbbbbbbb"
        second.refuses = FULL | {"retry_after_s": 7.0}
        status, body, headers = await door.offer()
        assert (status, body["code"], headers["Retry-After"]) == (503, "full", "7")
        assert body["seats"] == 12 and "12 seats of 2 servers" in body["message"]
        assert door.figure("livebrush_gateway_passed_over_total", why="refused") == 3


async def test_other_refusals_are_told_as_they_are_and_not_tried_elsewhere() -> None:
    first, second = Pretender("aaaaaaaa", seats=8), Pretender("bbbbbbbb")
    async with front(first, second) as door:
        for status, code in ((400, "bad_request"), (401, "unauthorized"), (429, "too_many_requests")):
            first.refuses = {"status": status, "code": code, "message": code, "retryable": False}
            answer, body, _ = await door.offer()
            assert (answer, body["code"]) == (status, code)
        assert not second.asked
        first.refuses = second.refuses = FULL | {"code": "udp_ports_exhausted", "retry_after_s": 5}
        assert (await door.offer())[1]["code"] == "udp_ports_exhausted"


async def test_known_full_nodes_are_asked_one_for_all_with_the_shortest_wait() -> None:
    late, early = Pretender("aaaaaaaa", open=4, retry_after_s=9.0), Pretender("bbbbbbbb", open=4, retry_after_s=4.0)
    early.refuses = FULL | {"retry_after_s": 4.0}
    async with front(late, early) as door:
        status, body, headers = await door.offer()
        assert (status, body["code"], headers["Retry-After"]) == (503, "full", "4")
        assert not late.asked
        # Room that has come since the last poll is found.
        late.report["open"] = 3
        await asyncio.sleep(0.25)
        assert (await door.offer())[1]["node"] == "aaaaaaaa"


async def test_a_dead_node_is_passed_over_at_once_and_comes_back_with_a_poll() -> None:
    dying, living = Pretender("aaaaaaaa", seats=8), Pretender("bbbbbbbb")
    async with front(dying, living) as door:
        await dying.stop()
        assert (await door.offer())[1]["node"] == "bbbbbbbb"
        assert door.figure("livebrush_gateway_node_up", node=dying.url) == 0
        assert door.figure("livebrush_gateway_passed_over_total", why="lost") == 1
        await dying.start()
        await door.until(lambda: door.figure("livebrush_gateway_node_up", node=dying.url))
        assert (await door.offer())[1]["node"] == "aaaaaaaa"


async def test_without_any_node_it_says_so_and_recovers() -> None:
    only = Pretender("aaaaaaaa")
    async with front(only) as door:
        await only.stop()
        for method, path in (("POST", OFFER), ("GET", "/"), ("POST", "/whip/a"), ("GET", "/api/v1/capacity")):
            body = {"json": {"type": "offer", "sdp": ""}} if path == OFFER else {}
            status, body, headers = await door.ask(method, path, **body)
            assert (status, body["code"], headers["Retry-After"]) == (503, "no_node", "2"), path
            assert "does not answer" in body["message"] and body["retryable"]
        assert (await door.ask("GET", "/readyz"))[0] == 503
        assert (await door.ask("GET", "/livez"))[0] == 200
        await only.start()
        await door.until(lambda: door.figure("livebrush_gateway_node_up", node=only.url))
        assert (await door.offer())[0] == 201
        assert (await door.ask("GET", "/readyz"))[1]["ready"]


async def test_a_node_that_hangs_is_not_asked_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    timeout = aiohttp.ClientTimeout(total=0.3)
    monkeypatch.setattr("server.forward.TIMEOUT", timeout)
    one, other = Pretender("aaaaaaaa"), Pretender("bbbbbbbb")
    async with front(one, other) as door:
        status, body, _ = await door.ask("POST", "/whip/hang", headers=SDP | {"Origin": "http://x"}, data=b"v=0")
        assert (status, body["code"]) == (504, "no_answer")
        assert (await door.ask("GET", "/hang"))[0] == 504
        assert len(one.asked) + len(other.asked) == 2


# --- polls


async def test_a_silent_node_is_out_after_three_polls_and_its_last_answer_has_an_age(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("server.gateway_nodes.POLL_S", 0.05)
    monkeypatch.setattr("server.gateway_nodes.ASK_TIMEOUT_S", 0.05)
    silent, other = Pretender("aaaaaaaa"), Pretender("bbbbbbbb")
    async with front(silent, other) as door:
        known = door.gateway._nodes.all[0]

        async def never(request: web.Request) -> web.Response:
            await silent.hangs.wait()
            return web.Response()

        monkeypatch.setattr(silent, "_capacity", never)
        await silent.stop()
        await silent.start()
        await door.until(lambda: not known.is_up)
        assert known.missed >= OUT_AFTER and known.report is not None and other.report["open"] == 0
        assert door.figure("livebrush_gateway_node_age_seconds", node=silent.url) > 0
        assert door.figure("livebrush_gateway_polls_failed_total", node=silent.url) >= OUT_AFTER
        assert [(await door.offer())[1]["node"] for _ in range(3)] == ["bbbbbbbb"] * 3


async def test_nodes_with_tokens_are_asked_with_one_and_open_ones_are_not_used_from_elsewhere() -> None:
    guarded = Pretender("aaaaaaaa")
    guarded.token = "a token of the tests"
    async with front(guarded) as door:
        known = door.gateway._nodes.all[0]
        assert not known.is_up and "LIVEBRUSH_TOKEN" in known.refusal
    async with front(guarded, token=guarded.token, trusted_proxies=("127.0.0.1",)) as door:
        assert door.gateway._nodes.all[0].is_up
    async with front(Pretender("bbbbbbbb"), trusted_proxies=("127.0.0.1",)) as door:
        known = door.gateway._nodes.all[0]
        assert not known.is_up and "asks nobody for a token" in known.refusal
        assert (await door.offer())[1]["code"] == "no_node"


async def test_what_answers_as_something_else_is_not_used() -> None:
    stranger = Pretender("no name at all")
    async with front(stranger) as door:
        known = door.gateway._nodes.all[0]
        assert not known.is_up and "this version" in known.refusal
        stranger.report["node"] = "aaaaaaaa"
        await door.until(lambda: known.is_up)


# --- sessions and streams


async def test_tokens_and_session_urls_reach_their_node() -> None:
    one, other = Pretender("aaaaaaaa"), Pretender("bbbbbbbb", seats=9)
    async with front(one, other) as door:
        token = new_resume_token("aaaaaaaa")
        assert (await door.offer(resume={"token": token}))[1]["node"] == "aaaaaaaa"
        session = new_session_id("aaaaaaaa")
        for method, path in (
            ("PATCH", f"{OFFER}/{session}.0"),
            ("DELETE", f"{OFFER}/{session}.0"),
            ("POST", f"{OFFER}/{session}.0/close"),
            ("GET", f"/api/v1/sessions/{session}"),
            ("PATCH", f"/whip/studio/{session}"),
            ("DELETE", f"/whep/studio/{session}"),
        ):
            assert (await door.ask(method, path))[2]["X-Node"] == "aaaaaaaa"
        # Full or being emptied, it still has the page's own seat; and if not, another has one.
        one.report |= {"open": 4, "draining": True}
        await door.until(lambda: (found := door.gateway._nodes.all[0].report) and found.draining)
        assert (await door.offer(resume={"token": token}))[1]["node"] == "aaaaaaaa"
        one.refuses = FULL | {"code": "draining", "retry_after_s": 5}
        assert (await door.offer(resume={"token": token}))[1]["node"] == "bbbbbbbb"
        # A name that nobody has any more: the node was started anew.
        assert (await door.offer(resume={"token": new_resume_token("cccccccc")}))[1]["node"] == "bbbbbbbb"
        await one.stop()
        status, body, _ = await door.ask("DELETE", f"{OFFER}/{session}.0")
        assert (status, body["code"]) == (503, "node_gone")


async def test_streams_reach_their_node_asked_at_that_moment() -> None:
    one, other = Pretender("aaaaaaaa"), Pretender("bbbbbbbb", seats=9)
    async with front(one, other, redirects=False) as door:
        # Nowhere: any node says so itself.
        assert (await door.ask("POST", "/whep/studio", headers=SDP, data=b"v=0"))[2]["X-Node"] == "aaaaaaaa"
        one.report["streams"] = {"studio": True}
        await asyncio.sleep(0.25)  # nodes are asked at most five times a second
        for method, path in (("POST", "/whep/studio"), ("POST", "/studio/whep"), ("POST", "/whip/studio")):
            assert (await door.ask(method, path, headers=SDP, data=b"v=0"))[2]["X-Node"] == "aaaaaaaa"
        for method, path in (("PATCH", ""), ("PUT", "/scenes"), ("GET", "/still")):
            assert (await door.ask(method, f"/api/v1/streams/studio{path}"))[2]["X-Node"] == "aaaaaaaa"
        assert (await door.ask("POST", "/whip/fresh", headers=SDP, data=b"v=0"))[2]["X-Node"] == "bbbbbbbb"
        assert [path for path in other.paths() if "studio" in path] == []


async def test_whip_and_whep_clients_are_redirected_with_their_query_where_they_lose_nothing() -> None:
    one = Pretender("aaaaaaaa", streams={"live": True})
    await one.start()
    async with front(one, nodes=(f"{one.url}=https://n1.example:8443",)) as door:
        for path in ("/whip/studio?prompt=neon+at%20night", "/whep/live?alpha=packed"):
            status, _, headers = await door.ask("POST", path, headers=SDP, data=b"v=0")
            assert (status, headers["Location"]) == (307, "https://n1.example:8443" + path)
        for kept in ({"Origin": door.base}, {"Authorization": "Bearer abc"}):
            status, _, _ = await door.ask("POST", "/whip/studio?prompt=neon", headers=SDP | kept, data=b"v=0")
            assert status == 201
        assert one.asked[-1][1:2] == ("/whip/studio?prompt=neon",) and one.asked[-1][3] == b"v=0"
        assert one.asked[-1][2]["Authorization"] == "Bearer abc"
        # Nobody to be redirected to: a stream that is nowhere, a full house.
        assert (await door.ask("POST", "/whep/nowhere", headers=SDP, data=b"v=0"))[0] == 200
        one.report["open"] = 4
        one.refuses = FULL | {"retry_after_s": 3.0}
        await asyncio.sleep(0.25)
        status, _, headers = await door.ask("POST", "/whip/other", headers=SDP, data=b"v=0")
        assert (status, headers["Retry-After"]) == (503, "3")
        assert door.figure("livebrush_gateway_redirects_total") == 2


async def test_two_publishers_of_one_name_meet_on_one_node() -> None:
    one, other = Pretender("aaaaaaaa"), Pretender("bbbbbbbb")
    async with front(one, other) as door:
        asked = [door.ask("POST", "/whip/studio", headers=SDP, data=b"v=0") for _ in range(8)]
        assert len({headers["Location"] for _, _, headers in await asyncio.gather(*asked)}) == 1


# --- what is passed on


async def test_names_pages_and_clients_are_told_as_they_are_and_connections_are_not() -> None:
    one = Pretender("aaaaaaaa")
    async with front(one) as door:
        told = {"Host": "live.example", "Origin": "https://live.example", "If-Match": "*"}
        told |= {"X-Forwarded-For": "192.0.2.1"}
        hops = {"Connection": "x-mine, close", "X-Mine": "1", "TE": "trailers"}
        status, _, headers = await door.ask("PATCH", "/some%2Fwhere?a=%20b", headers=told | hops, data=b"{}")
        assert status == 200 and "Keep-Alive" not in headers and headers["Link"] == "<stun:a>"
        method, path, seen, body = one.asked[-1]
        assert (method, path, body) == ("PATCH", "/some%2Fwhere?a=%20b", b"{}")
        assert (seen["Host"], seen["Origin"], seen["If-Match"]) == ("live.example", "https://live.example", "*")
        assert seen["X-Forwarded-For"] == "127.0.0.1"
        assert not {"X-Mine", "TE"} & set(seen) and seen["Connection"] == "close"
    async with front(one, trusted_proxies=("127.0.0.1",), token="unused") as door:
        one.token = "unused"
        await door.until(lambda: door.gateway._nodes.all[0].is_up)
        await door.ask("GET", "/", headers={"X-Forwarded-For": "made up, 192.0.2.7"})
        assert one.asked[-1][2]["X-Forwarded-For"] == "192.0.2.7"


@pytest.mark.parametrize("path", ["@evil.example/", "//evil.example/", "*"])
async def test_no_path_leads_to_another_host(path: str) -> None:
    one = Pretender("aaaaaaaa")
    async with front(one) as door:
        reader, writer = await asyncio.open_connection("127.0.0.1", int(door.base.rpartition(":")[2]))
        writer.write(f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n".encode())
        answer = (await reader.read(4096)).decode()
        writer.close()
        assert answer.split()[1] in ("400", "404") and not one.asked


async def test_bodies_are_bounded_and_long_answers_come_whole() -> None:
    one = Pretender("aaaaaaaa")
    async with front(one) as door:
        status, body, _ = await door.ask("PUT", "/x", data=b"x" * 50_000)
        assert (status, body["code"]) == (413, "too_large") and not one.asked
        async with door.http.get(door.base + "/large") as response:
            assert await response.read() == b"".join(bytes([number]) * 100_000 for number in range(64))
        async with door.http.head(door.base + "/large") as response:
            assert response.headers["Content-Length"] == str(64 * 100_000)


async def test_lists_are_joined_figures_added_and_a_refusal_is_everybodys() -> None:
    one, other = Pretender("aaaaaaaa", seats=3, open=1), Pretender("bbbbbbbb", ready=False, retry_after_s=2.5)
    async with front(one, other) as door:
        assert (await door.ask("GET", "/api/v1/sessions"))[1] == {"sessions": ["aaaaaaaa", "bbbbbbbb"]}
        status, body, _ = await door.ask("GET", "/api/v1/capacity")
        assert (status, body["open"], body["seats"], body["ready"], body["draining"]) == (200, 1, 7, True, False)
        assert body["retry_after_s"] == 2.5 and [one["node"] for one in body["nodes"]] == ["aaaaaaaa", "bbbbbbbb"]
        one.token = "set meanwhile"
        assert (await door.ask("GET", "/api/v1/capacity"))[0] == 401
        status, body, _ = await door.ask("POST", "/api/v1/drain", json={})
        assert status == 404 and "livebrush drain" in body["message"]


# --- WebSockets


async def test_a_websocket_goes_through_both_ways_with_its_end() -> None:
    one, other = Pretender("aaaaaaaa"), Pretender("bbbbbbbb", seats=9)
    async with front(one, other) as door:
        url = door.base + "/api/v1/socket"
        headers = {"Origin": door.base}
        async with door.http.ws_connect(url, protocols=("livebrush", "bearer.abc"), headers=headers) as line:
            assert line.protocol == "livebrush"
            await line.send_str("hello")
            assert await line.receive_str() == "bbbbbbbb: hello"
            await line.send_bytes(b"\x01" * 300_000)
            assert await line.receive_bytes() == b"\x01" * 300_000
            await line.send_str("end")
            assert (await line.receive()).type is WSMsgType.CLOSE and line.close_code == 1013
        seen = other.asked[-1][2]
        assert (seen["Origin"], seen["Host"]) == (door.base, door.base.partition("://")[2])
        assert seen["Sec-WebSocket-Protocol"] == "livebrush,bearer.abc" and seen["X-Forwarded-For"] == "127.0.0.1"
        async with door.http.ws_connect(url + "?node=aaaaaaaa") as line:
            await line.send_str("again")
            assert await line.receive_str() == "aaaaaaaa: again"
            assert door.figure("livebrush_gateway_sockets") == 1
        one.report["draining"] = True
        await asyncio.sleep(0.25)
        async with door.http.ws_connect(url + "?node=aaaaaaaa") as line:
            await line.send_str("moved")
            assert await line.receive_str() == "bbbbbbbb: moved"
        one.report["draining"] = False
        await door.until(lambda: door.figure("livebrush_gateway_sockets") == 0)
        await other.stop()
        await asyncio.sleep(0.25)
        async with door.http.ws_connect(url) as line:
            await line.send_str("who")
            assert await line.receive_str() == "aaaaaaaa: who"


async def test_a_refused_websocket_is_refused_and_a_gateway_that_ends_closes_those_it_has() -> None:
    one = Pretender("aaaaaaaa")
    async with front(one) as door:
        line = await door.http.ws_connect(door.base + "/api/v1/socket")
        one.token = "asked for from now on"
        with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
            await door.http.ws_connect(door.base + "/api/v1/socket")
        assert refused.value.status == 401
        one.token = ""
        reading = asyncio.create_task(line.receive())
    assert (await reading).type in (WSMsgType.CLOSE, WSMsgType.CLOSING, WSMsgType.CLOSED)


# --- figures


async def test_what_is_counted_stands_on_the_operators_listener(caplog: pytest.LogCaptureFixture) -> None:
    one = Pretender("aaaaaaaa", open=1)
    with caplog.at_level("INFO"):
        async with front(one) as door:
            await door.offer()
            await door.ask("GET", "/")
            (url,) = {record.getMessage().split()[-1] for record in caplog.records if "metrics at" in record.message}
            async with door.http.get(url) as response:
                text = await response.text()
            assert 'livebrush_gateway_requests_total{about="offer",status="201"} 1.0' in text
            assert f'livebrush_gateway_node_seats{{node="{one.url}"}} 4.0' in text
            # On the clients' listener it is a path as any other.
            assert (await door.ask("GET", "/metrics"))[2]["X-Node"] == "aaaaaaaa"
