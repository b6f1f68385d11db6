"""Emptying a server: no new sessions, those in place told, waited for and moved; by HTTP, the command and the end."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest
from prometheus_client import generate_latest

from engine.config import EngineSettings
from engine.fake import FakeEngine
from server.app import running_server
from server.cli import main
from server.node_name import NAME_CHARS, node_of
from server.session_context import SessionContext
from server.settings import ServerSettings
from tests.server.test_server import PATIENCE_S, Visitor
from tests.server.whip_client import Client

DRAIN = "/api/v1/drain"


class House:
    """A server, and who comes to it."""

    def __init__(self, base: str, context: SessionContext) -> None:
        self.base, self.context = base, context
        self.http = aiohttp.ClientSession()
        self.visitors: list[Visitor] = []

    async def enter(self, **extra: object) -> tuple[Visitor, int, dict[str, Any]]:
        visitor = Visitor(self.base)
        self.visitors.append(visitor)
        response = await visitor.enter(**extra)
        return visitor, response.status, await response.json()

    async def ask(self, method: str, path: str, **options: Any) -> tuple[int, dict[str, Any]]:
        async with self.http.request(method, self.base + path, **options) as response:
            return response.status, await response.json()

    async def capacity(self) -> dict[str, Any]:
        return (await self.ask("GET", "/api/v1/capacity"))[1]

    async def until_empty(self) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while (await self.capacity())["open"]:
                await asyncio.sleep(0.05)

    def moved(self) -> float:
        lines = generate_latest(self.context.metrics.registry).decode().splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith("livebrush_sessions_moved_total"))


@contextlib.asynccontextmanager
async def house(**settings: Any) -> AsyncIterator[House]:
    chosen = ServerSettings(port=0, engine_kind="fake", engine=EngineSettings(width=64, height=64), **settings)
    async with running_server(chosen, FakeEngine(64, 64, delay_s=0.02, max_streams=4)) as (context, port):
        made = House(f"http://127.0.0.1:{port}", context)
        try:
            yield made
        finally:
            for visitor in made.visitors:
                await visitor.leave()
            await made.http.close()


@pytest.fixture(autouse=True)
def only_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aioice.ice.get_host_addresses", lambda use_ipv4, use_ipv6: ["127.0.0.1"])


def notices(visitor: Visitor) -> list[str]:
    return [str(message["code"]) for message in visitor.messages if message["type"] == "notice"]


async def test_ids_and_tokens_begin_with_the_servers_name() -> None:
    async with house() as one:
        _, status, answer = await one.enter()
        name = (await one.capacity())["node"]
        assert status == 201 and len(name) == NAME_CHARS
        assert node_of(answer["session"]) == node_of(answer["resume"]) == name == one.context.node
        assert node_of("../../" + name) == node_of("") == ""


async def test_who_is_in_is_told_and_stays_until_moved_and_nobody_new_comes() -> None:
    async with house() as one:
        visitor, _, answer = await one.enter(params={"prompt": "neon"})
        await visitor.until(lambda: visitor.pictures, "a picture")
        assert (await one.capacity())["draining"] is False
        status, shown = await one.ask("POST", DRAIN, json={"wait_s": 60})
        assert (status, shown) == (202, {"draining": True, "open": 1})
        await visitor.until(lambda: "draining" in notices(visitor), "word of it")
        _, status, refusal = await one.enter()
        assert (status, refusal["code"], refusal["retryable"]) == (503, "draining", True)
        # Who lost the connection, or reloaded, is no newcomer.
        back, status, fresh = await one.enter(resume={"token": answer["resume"], "keep": True})
        assert (status, fresh["session"], fresh["params"]["prompt"]) == (201, answer["session"], "neon")
        await back.until(lambda: back.pictures, "a picture")
        await one.ask("POST", DRAIN, json={"wait_s": 0})
        await back.until(lambda: "closing" in notices(back), "the move")
        told = next(message for message in back.messages if message.get("code") == "closing")
        assert told["reconnect_after_s"] == 0
        await one.until_empty()
        assert one.moved() == 1
        # Moved is moved: its token finds nothing here.
        _, status, _ = await one.enter(resume={"token": fresh["resume"], "keep": True})
        assert status == 503


async def test_it_can_be_undone_also_after_it_is_done() -> None:
    async with house() as one:
        for wait_s in (60, 0):
            await one.ask("POST", DRAIN, json={"wait_s": wait_s})
            await asyncio.sleep(0.05)
            status, shown = await one.ask("DELETE", DRAIN)
            assert (status, shown["draining"]) == (200, False)
            assert (await one.enter())[1] == 201


async def test_a_publisher_ends_with_it_and_its_viewers_do_not_wait_for_its_return() -> None:
    async with house() as one:
        publisher, player = Client(one.base, publishes=True), Client(one.base, publishes=False)
        try:
            assert (await publisher.enter("/whip/studio")).status == 201
            assert (await player.enter("/whep/studio")).status == 201
            async with asyncio.timeout(PATIENCE_S):
                while not player.pictures:
                    await asyncio.sleep(0.05)
            assert (await one.capacity())["streams"] == {"studio": True}
            await one.ask("POST", DRAIN, json={"wait_s": 0})
            await one.until_empty()
            async with asyncio.timeout(10):  # without the drain they would stay for half a minute
                while (await one.capacity())["streams"]:
                    await asyncio.sleep(0.05)
        finally:
            await publisher.close()
            await player.close()


@pytest.mark.parametrize("hurries", [False, True])
async def test_a_server_that_ends_waits_for_its_sessions_unless_it_is_hurried(hurries: bool) -> None:
    settings = ServerSettings(
        port=0, engine_kind="fake", engine=EngineSettings(width=64, height=64), drain_s=3600.0 if hurries else 0.5
    )
    hurry = asyncio.Event()
    engine = FakeEngine(64, 64, delay_s=0.02, max_streams=4)
    visitor = None
    async with running_server(settings, engine, hurry=hurry) as (_, port):
        visitor = Visitor(f"http://127.0.0.1:{port}")
        await visitor.enter()
        await visitor.until(lambda: visitor.pictures, "a picture")
        if hurries:
            asyncio.get_running_loop().call_later(0.5, hurry.set)
    codes = notices(visitor)
    assert codes.index("draining") < codes.index("closing")
    assert engine.capacity.open_streams == 0
    await visitor.leave()


async def test_only_the_admin_may(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = {"publish": "p" * 20, "admin": "a" * 20}
    async with house(tokens=tokens) as one:
        for role, status in (("publish", 403), ("admin", 202)):
            bearer = {"Authorization": f"Bearer {tokens[role]}"}
            assert (await one.ask("POST", DRAIN, json={}, headers=bearer))[0] == status
        assert (await one.ask("POST", DRAIN, json={"wait_s": -1}, headers=bearer))[0] == 400


async def test_the_command_waits_until_the_server_is_empty(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async with house() as one:
        visitor, _, _ = await one.enter()
        await visitor.until(lambda: visitor.pictures, "a picture")
        assert await asyncio.to_thread(main, ["drain", one.base, "--wait", "0.5"]) == 0
        assert (await one.capacity())["open"] == 0
        assert await asyncio.to_thread(main, ["drain", one.base, "--undo"]) == 0
        assert (await one.enter())[1] == 201
        monkeypatch.setenv("LIVEBRUSH_TOKEN", "unused where none is asked for")
        assert await asyncio.to_thread(main, ["drain", "http://127.0.0.1:9", "--wait", "0"]) == 1
    said = capsys.readouterr()
    assert "1 sessions are open" in said.out and "The server is empty" in said.out
    assert "does not answer" in said.err
