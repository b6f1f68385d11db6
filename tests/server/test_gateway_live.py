"""The gateway before real servers, each a process of its own, with real sessions through it."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from livebrush_client import Api, Ended, Live, connect
from server.gateway import Gateway, running_gateway
from server.gateway_settings import GatewaySettings
from tests.e2e.serving import SCRIPT, GatewayProcess, Server, has_model
from tests.server.test_server import PATIENCE_S, MovingPicture, Visitor
from tests.server.whip_client import Client

SMALL = ("--size", "64x64")
VIEW, PUBLISH = "v" * 20, "p" * 20


@pytest.fixture(autouse=True)
def only_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aioice.ice.get_host_addresses", lambda use_ipv4, use_ipv6: ["127.0.0.1"])


def server(log: Path, **settings: Any) -> Server:
    return Server(log, engine="fake", options=SMALL, patient=True, **settings)


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Server]]:
    folder = tmp_path_factory.mktemp("nodes")
    with (
        server(folder / "a", LIVEBRUSH_MAX_SESSIONS="1") as one,
        server(folder / "b", LIVEBRUSH_MAX_SESSIONS="2") as two,
    ):
        yield one, two


class Front:
    """A gateway and who comes to it."""

    def __init__(self, gateway: Gateway, base: str) -> None:
        self.gateway, self.base = gateway, base
        self.visitors: list[Visitor] = []
        self.clients: list[Client] = []

    async def enter(self, **extra: object) -> tuple[Visitor, int, dict[str, Any]]:
        visitor = Visitor(self.base)
        self.visitors.append(visitor)
        async with await visitor.enter(**extra) as response:
            return visitor, response.status, await response.json()

    def client(self, *, publishes: bool) -> Client:
        self.clients.append(Client(self.base, publishes=publishes))
        return self.clients[-1]

    async def get(self, path: str) -> Any:
        async with aiohttp.ClientSession() as http, http.get(self.base + path) as response:
            return await response.json()

    async def until(self, condition: Any, what: str) -> None:
        try:
            async with asyncio.timeout(PATIENCE_S):
                while not condition():
                    await asyncio.sleep(0.05)
        except TimeoutError:
            raise AssertionError(f"waited in vain for {what}") from None

    def is_up(self, node: Server) -> bool:
        return any(known.is_up for known in self.gateway._nodes.all if known.url == node.url)


@contextlib.asynccontextmanager
async def front(*nodes: Server, port: int = 0, **settings: Any) -> AsyncIterator[Front]:
    chosen = GatewaySettings(nodes=tuple(node.url for node in nodes), port=port, admin_port=0, **settings)
    async with running_gateway(chosen) as (gateway, port):
        door = Front(gateway, f"http://127.0.0.1:{port}")
        try:
            yield door
        finally:
            for visitor in door.visitors:
                with contextlib.suppress(aiohttp.ClientError):
                    async with visitor.http.delete(visitor.url or door.base) as gone:
                        await gone.read()
                await visitor.leave()
            for client in door.clients:
                with contextlib.suppress(aiohttp.ClientError, ValueError):
                    await client.leave()
                await client.close()


async def test_sessions_fill_both_servers_and_the_next_is_told_when_to_come_back(nodes: tuple[Server, Server]) -> None:
    async with front(*nodes) as door:
        for _ in range(3):
            assert (await door.enter())[1] == 201
        for visitor in door.visitors:
            await visitor.until(partial(bool, visitor.pictures), "a picture")
        assert [node.capacity()["open"] for node in nodes] == [1, 2]
        _, status, refusal = await door.enter()
        assert (status, refusal["code"], refusal["seats"], refusal["open"]) == (503, "full", 3, 3)
        assert 0 < refusal["retry_after_s"] <= 60
        found = await door.get("/api/v1/capacity")
        assert (found["open"], found["seats"]) == (3, 3)
        # The goodbye of one reaches its node, and its seat is had by the next.
        async with door.visitors[0].http.delete(door.visitors[0].url) as gone:
            assert gone.status == 204
        assert (await door.enter())[1] == 201


async def test_the_page_its_files_and_ranges_of_them_come_through(nodes: tuple[Server, Server]) -> None:
    async with front(*nodes) as door, aiohttp.ClientSession(door.base) as http:
        async with http.get("/") as page:
            assert "Livebrush" in await page.text() and "default-src 'self'" in page.headers["Content-Security-Policy"]
        async with http.get("/demo/people.mp4") as clip:
            whole = await clip.read()
        async with http.get("/demo/people.mp4", headers={"Range": "bytes=1000-1999"}) as part:
            assert (part.status, await part.read()) == (206, whole[1000:2000])
        etag = {"If-None-Match": page.headers["ETag"]}
        async with http.get("/", headers=etag) as cached:
            assert cached.status == 304 and not await cached.read()
        async with http.get("/nothing-here") as missing:
            assert missing.status == 404


async def test_a_page_comes_back_to_its_session_also_through_a_gateway_started_anew(
    nodes: tuple[Server, Server],
) -> None:
    async with front(*nodes) as door:
        port = int(door.base.rpartition(":")[2])
        visitor, _, answer = await door.enter(params={"prompt": "neon", "seed": 7})
        await visitor.until(lambda: visitor.pictures, "a picture")
        back, status, second = await door.enter(resume={"token": answer["resume"], "keep": True})
        assert (status, second["session"], second["params"]["prompt"]) == (201, answer["session"], "neon")
        await back.until(lambda: back.pictures, "a picture")
        # Pictures go past the gateway: nobody notices that it ends.
        visitors, door.visitors = door.visitors, []
    count = len(back.pictures)
    await back.until(lambda: len(back.pictures) > count + 10, "pictures without a gateway")
    async with front(*nodes, port=port) as door:
        door.visitors = visitors
        third, status, fresh = await door.enter(resume={"token": second["resume"], "keep": True})
        assert (status, fresh["session"], fresh["params"]["seed"]) == (201, answer["session"], 7)
        await third.until(lambda: third.pictures, "a picture")


async def test_a_publisher_follows_the_redirect_and_its_viewers_find_it(nodes: tuple[Server, Server]) -> None:
    async with front(*nodes) as door:
        publisher = door.client(publishes=True)
        answer = await publisher.enter("/whip/studio?prompt=neon%20at%20night")
        assert answer.status == 201
        assert [one.status for one in answer.history] == [307]
        assert str(answer.url) == f"{nodes[1].url}/whip/studio?prompt=neon%20at%20night"
        players = [door.client(publishes=False) for _ in range(2)]
        for player, path in zip(players, ("/whep/studio", "/studio/whep"), strict=True):
            assert (await player.enter(path)).status == 201
            await door.until(lambda one=player: one.pictures, "a picture")
        async with Api(door.base) as api:
            assert (await api.stream("studio").get())["params"]["prompt"] == "neon at night"
            assert (await api.stream("studio").set(prompt="ink"))["params"]["prompt"] == "ink"
            assert [one["stream"] for one in await api.streams()] == ["studio"]
        second = await door.client(publishes=True).enter("/whip/studio")
        assert second.status == 409
        # URLs of the answers name their node: the gateway takes them too.
        assert publisher.url.startswith(door.base)
        assert [await player.leave() for player in players] == [200, 200] and await publisher.leave() == 200
        assert (await door.client(publishes=False).enter("/whep/nobody")).status == 404


async def test_tokens_hold_through_the_gateway(tmp_path: Path) -> None:
    tokens = {"LIVEBRUSH_TOKENS__VIEW": VIEW, "LIVEBRUSH_TOKENS__PUBLISH": PUBLISH}
    tokens["LIVEBRUSH_TRUSTED_PROXIES"] = '["127.0.0.1"]'
    with server(tmp_path / "a", **tokens) as one, server(tmp_path / "b", **tokens) as two:
        async with front(one, two, token=VIEW, trusted_proxies=("127.0.0.1",)) as door:
            assert (await door.enter())[1] == 401
            assert (await door.get("/api/v1/capacity"))["code"] == "unauthorized"
            async with connect(door.base, MovingPicture(), token=PUBLISH, prompt="neon") as live:
                async for picture in live.frames():
                    assert (picture.width, picture.height) == (64, 64)
                    break
            # A client that would lose its token on a redirect is served through the gateway.
            publisher = door.client(publishes=True)
            publisher.http.headers["Authorization"] = f"Bearer {PUBLISH}"
            answer = await publisher.enter("/whip/studio")
            assert (answer.status, answer.history) == (201, ())
            player = door.client(publishes=False)
            player.http.headers["Authorization"] = f"Bearer {VIEW}"
            assert (await player.enter("/whep/studio")).status == 201
            await door.until(lambda: player.pictures, "a picture")
            async with player.http.delete(publisher.url) as refused:
                assert refused.status == 403
            assert await player.leave() == await publisher.leave() == 200


class Page:
    """What a page does when its server goes: it connects again when told to, with its token and its settings."""

    def __init__(self, door: Front, prompt: str) -> None:
        self.door = door
        self.params = {"prompt": prompt, "seed": 11}
        self.visits: list[tuple[Visitor, dict[str, Any]]] = []

    @property
    def node(self) -> str:
        """The name of the server that has it."""
        return str(self.visits[-1][1]["session"])[:8]

    async def connect(self) -> None:
        resume = {"resume": {"token": self.visits[-1][1]["resume"]}} if self.visits else {}
        async with asyncio.timeout(PATIENCE_S):
            while True:
                visitor, status, answer = await self.door.enter(params=self.params, **resume)
                if status == 201:
                    break
                await asyncio.sleep(answer.get("retry_after_s", 1.0))
        self.visits.append((visitor, answer))
        await visitor.until(lambda: len(visitor.pictures) > 5, "pictures")

    async def follow(self) -> None:
        """Be moved."""
        visitor = self.visits[-1][0]
        await visitor.until(lambda: [one for one in visitor.messages if one.get("code") == "closing"], "the move")
        await visitor.connection.close()
        await self.connect()

    def gaps_s(self) -> list[float]:
        """From the last picture of each connection to the first of the next."""
        pictures = [visitor.pictures for visitor, _ in self.visits]
        return [after[0][0] - before[-1][0] for before, after in pairwise(pictures)]


async def test_a_drained_server_hands_its_session_and_its_stream_to_the_other(tmp_path: Path) -> None:
    with server(tmp_path / "a") as one, server(tmp_path / "b", LIVEBRUSH_MAX_SESSIONS="2") as two:
        async with front(one, two) as door:
            page = Page(door, "neon")
            await page.connect()
            first = page.node
            assert one.capacity()["open"] == 1, "where most room is"
            publisher, viewer = door.client(publishes=True), door.client(publishes=False)
            assert (await publisher.enter("/whip/studio")).status == 201
            assert (await viewer.enter("/whep/studio")).status == 201
            following = asyncio.create_task(page.follow())
            async with Api(one.url) as api:
                assert (await api.call("POST", "/api/v1/drain", {"wait_s": 0.5}))["draining"] is True
            await following
            assert page.node != first and two.capacity()["open"] >= 1
            print(f"gap of the drained page: {page.gaps_s()[0]:.2f} s")
            answer = page.visits[-1][1]
            assert answer["params"]["prompt"] == "neon" and answer["params"]["seed"] == 11
            await door.until(lambda: one.capacity()["open"] == 0, "an empty server")
            # OBS does this by itself; the old server is the last that it goes to.
            again, watches = door.client(publishes=True), door.client(publishes=False)
            answered = await again.enter("/whip/studio")
            assert answered.status == 201 and str(answered.url).startswith(two.url)
            assert (await watches.enter("/whep/studio")).status == 201
            await door.until(lambda: watches.pictures, "a picture")


async def test_both_servers_and_the_gateway_are_restarted_under_a_live_session(tmp_path: Path) -> None:
    with (
        server(tmp_path / "a", LIVEBRUSH_DRAIN_S="0.5") as one,
        server(tmp_path / "b", LIVEBRUSH_DRAIN_S="0.5") as two,
        GatewayProcess(tmp_path / "gateway", one, two, options=("--admin-port", "0")) as gateway,
    ):
        async with front(one, two) as door:
            # Through the process; the one here only tells who is up.
            door.base = gateway.url
            page = Page(door, "ink")
            await page.connect()
            for _ in range(2):
                holder = next(node for node in (one, two) if node.capacity()["node"] == page.node)
                following = asyncio.create_task(page.follow())
                await asyncio.to_thread(holder.stop)
                await following
                await asyncio.to_thread(gateway.stop)
                await asyncio.to_thread(gateway.start)
                await asyncio.to_thread(holder.start)
                await door.until(lambda node=holder: door.is_up(node), "the server that was restarted")
            assert len(page.visits) == 3
            assert {answer["params"]["prompt"] for _, answer in page.visits} == {"ink"}
            assert one.capacity()["open"] + two.capacity()["open"] == 1
            print("gaps of the rolling restart:", ", ".join(f"{gap:.2f} s" for gap in page.gaps_s()))


async def test_a_server_that_is_killed_loses_its_connection_and_the_page_goes_on_elsewhere(tmp_path: Path) -> None:
    with server(tmp_path / "a") as one, server(tmp_path / "b", LIVEBRUSH_MAX_SESSIONS="2") as two:
        async with front(one, two) as door:
            page = Page(door, "neon")
            await page.connect()
            one.kill()
            killed_at = time.monotonic()
            # The page notices by the silence; then it asks, at once answered by the other.
            await page.connect()
            assert page.visits[-1][1]["params"]["prompt"] == "neon" and two.capacity()["open"] == 1
            print(f"elsewhere {page.visits[-1][0].pictures[0][0] - killed_at:.2f} s after it asked")


async def test_the_python_client_goes_on_at_the_other_server_with_all_that_was_set(tmp_path: Path) -> None:
    with server(tmp_path / "a") as one, server(tmp_path / "b") as two:
        async with front(one, two) as door, connect(door.base, MovingPicture(), prompt="neon", seed=11) as live:
            count = 0

            async def look() -> None:
                nonlocal count
                async for _ in live.frames():
                    count += 1

            looking = asyncio.create_task(look())
            moved: list[dict[str, Any]] = []
            live.on("moved", moved.append)
            await door.until(lambda: count > 5, "pictures")
            await live.set(strength=0.5)
            await live.load_scenes([{"prompt": "ink"}, {"prompt": "neon at night", "name": "night"}])
            await live.go(1)
            first = live.answer.session
            holder, other = (one, two) if one.capacity()["node"] == first[:8] else (two, one)
            async with Api(holder.url) as api:
                assert (await api.call("POST", "/api/v1/drain", {"wait_s": 0.5}))["draining"] is True
            await door.until(lambda: live.moves == 1, "the move")
            assert [one["resumed"] for one in moved] == [False] and live.answer.session[:8] == other.capacity()["node"]
            begun = live.answer.params
            assert (begun["prompt"], begun["strength"], begun["seed"]) == ("neon at night", 0.5, 11)
            shown = count
            await door.until(lambda: count > shown + 5, "pictures of the other server")
            # It is steered on as before, and goes on with the scene that stood.
            async with Api(door.base) as api:
                async with asyncio.timeout(PATIENCE_S):
                    while (await api.session(live.answer.session).get()).get("scene") is None:
                        await asyncio.sleep(0.05)
                assert (await api.session(live.answer.session).get())["scene"]["index"] == 1
            assert (await live.set(prompt="oil"))["params"]["prompt"] == "oil"
            assert (holder.capacity()["open"], other.capacity()["open"]) == (0, 1)
        assert live.ended == "closed"
        await looking
        await door.until(lambda: other.capacity()["open"] == 0, "the seat given back")


async def test_the_python_client_gives_up_after_some_tries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("livebrush_client.live.BACKOFF_S", (0.05, 0.05, 0.05))
    with server(tmp_path / "a") as only:
        async with connect(only.url, MovingPicture()) as live, asyncio.timeout(PATIENCE_S):
            await anext(live.frames())
            await asyncio.to_thread(only.stop)
            async for _ in live.frames():
                pass
            assert live.ended.startswith("The server is stopping") and "it did not come back" in live.ended
            with pytest.raises(Ended):
                await live.set(prompt="ink")
            assert live.moves == 0
        only.start()
        async with connect(only.url, MovingPicture(), reconnect=False) as live, asyncio.timeout(PATIENCE_S):
            await anext(live.frames())
            await asyncio.to_thread(only.stop)
            async for _ in live.frames():
                pass
            assert live.ended.startswith("The server is stopping") and "come back;" not in live.ended


@pytest.mark.skipif(not has_model(), reason="the embedded model's weights are not built")
async def test_a_real_model_behind_the_gateway_and_its_client_moves(tmp_path: Path) -> None:
    def node(name: str) -> Server:
        costs = {"LIVEBRUSH_ENGINE__COSTS_DIR": str(tmp_path)}
        return Server(tmp_path / name, engine="local", options=SMALL, patient=True, **costs)  # type: ignore[arg-type]

    restyled: Counter[int] = Counter()
    with (
        node("a") as one,
        node("b") as two,
        GatewayProcess(tmp_path / "gateway", one, two, options=("--admin-port", "0")) as gateway,
    ):
        async with front(one, two) as door:
            await door.until(lambda: one.is_ready() and two.is_ready(), "two models")
            async with connect(gateway.url, MovingPicture(), prompt="watercolor", strength=0.8, seed=5) as live:
                live.on("marks", lambda marks: restyled.update({live.moves: sum(row[4] for row in marks["frames"])}))
                looking = asyncio.create_task(looked_at(live))
                await door.until(lambda: restyled[0] > 0, "a restyled picture")
                await live.set(prompt="charcoal drawing", steps=2)
                holder, other = (one, two) if one.capacity()["open"] else (two, one)
                drain = await asyncio.create_subprocess_exec(SCRIPT, "drain", holder.url, "--wait", "0.5")
                await door.until(lambda: restyled[1] > 0, "a restyled picture of the other model")
                params = live.answer.params
                assert (params["prompt"], params["steps"]) == ("charcoal drawing", 2)
                assert (params["strength"], params["seed"]) == (0.8, 5)
                assert (holder.capacity()["open"], other.capacity()["open"], live.moves) == (0, 1, 1)
                async with asyncio.timeout(PATIENCE_S):
                    assert await drain.wait() == 0
            await looking


async def looked_at(live: Live) -> None:
    async for _ in live.frames():
        pass
