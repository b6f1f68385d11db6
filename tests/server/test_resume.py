"""Coming back by a token: the book of tokens, and pages that reload, lose their network, or come too late."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Any

import pytest
from prometheus_client import generate_latest

from engine.api import StreamParams
from engine.config import EngineSettings
from engine.fake import FakeEngine
from server.app import running_server
from server.control import ParamsChange
from server.resume import MAX_KEPT, MAX_TOKENS, RESUME_S, Kept, ResumeBook
from server.session_context import SessionContext
from server.settings import MediaSettings, ServerSettings
from tests.server.test_server import Visitor

KEPT = Kept(StreamParams(prompt="neon"), 0.0, False)


def test_a_token_finds_its_session_until_the_next_one_has_arrived() -> None:
    book = ResumeBook()
    first, second = book.issue("a"), book.issue("a")
    assert book.session_of(first) == book.session_of(second) == "a"
    book.confirm("a")
    assert (book.session_of(first), book.session_of(second)) == (None, "a")
    assert book.session_of("guessed") is None


def test_tokens_of_answers_that_were_lost_are_few() -> None:
    book = ResumeBook()
    tokens = [book.issue("a") for _ in range(MAX_TOKENS + 2)]
    assert [book.session_of(token) for token in tokens] == [None, None] + ["a"] * MAX_TOKENS


def test_settings_of_an_ended_session_are_given_once_and_for_half_a_minute() -> None:
    book = ResumeBook()
    early, late, running = book.issue("a"), book.issue("b"), book.issue("c")
    book.end("a", KEPT, 100.0)
    book.end("b", KEPT, 100.0)
    assert book.take(running, 100.0) is None
    assert book.take(early, 100.0 + RESUME_S - 1) == KEPT
    assert book.take(early, 100.0 + RESUME_S - 1) is None
    assert book.take(late, 100.0 + RESUME_S) is None
    assert book.session_of(running) == "c"


def test_what_is_kept_is_bounded_and_the_oldest_go_first() -> None:
    book = ResumeBook()
    tokens = [book.issue(str(number)) for number in range(MAX_KEPT + 2)]
    for number in range(MAX_KEPT + 2):
        book.end(str(number), KEPT, 100.0)
    found = [book.session_of(token) for token in tokens]
    assert found[:2] == [None, None] and None not in found[2:]
    book.end("unknown", KEPT, 100.0)


def test_what_is_given_changes_what_was_kept() -> None:
    changed = KEPT.changed(ParamsChange(strength=0.5, transition_s=2.0), None)
    assert (changed.params.prompt, changed.params.strength, changed.transition_s) == ("neon", 0.5, 2.0)
    assert KEPT.changed(ParamsChange(), True) == Kept(KEPT.params, 0.0, True)


# --- pages


class House:
    """A server with one seat, and the pages that come to it."""

    def __init__(self, base: str, engine: FakeEngine, context: SessionContext) -> None:
        self.base = base
        self.context = context
        self.engine = engine
        self.pages: list[Visitor] = []

    async def page(self, resume: dict[str, Any] | None = None, **extra: object) -> tuple[Visitor, int, dict[str, Any]]:
        """A page that offers; returns it with the status and the answer."""
        visitor = Visitor(self.base)
        self.pages.append(visitor)
        response = await visitor.enter(**extra, **({"resume": resume} if resume else {}))
        return visitor, response.status, await response.json()

    def figure(self, name: str) -> float:
        lines = generate_latest(self.context.metrics.registry).decode().splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name))


@contextlib.asynccontextmanager
async def one_seat(**media: float) -> AsyncIterator[House]:
    settings = ServerSettings(
        port=0,
        engine_kind="fake",
        engine=EngineSettings(width=64, height=64, max_streams=1),
        max_sessions=1,
        media=MediaSettings.model_validate(media),
    )
    engine = FakeEngine(64, 64, delay_s=0.02, max_streams=1)
    async with running_server(settings, engine) as (context, port):
        house = House(f"http://127.0.0.1:{port}", engine, context)
        yield house
        for page in house.pages:
            await page.leave()


@pytest.fixture
async def house() -> AsyncIterator[House]:
    async with one_seat() as built:
        yield built


def fall_silent(page: Visitor) -> None:
    """What pulling out the cable does."""
    for protocol in page.connection.getSenders()[0].transport.transport._connection._protocols:
        protocol.transport.sendto = lambda *_: None  # type: ignore[method-assign]


async def first_index(page: Visitor) -> int:
    """Index of the first camera frame that the page was shown."""
    await page.until(lambda: page.pictures, "a picture")
    await page.until(lambda: [m for m in page.telegrams if m["type"] == "marks"], "marks")
    rows = [row for m in page.telegrams if m["type"] == "marks" for row in m["frames"]]
    index: int = rows[0][1]
    return index


async def test_eight_reloads_keep_session_settings_seat_and_stream(house: House) -> None:
    page, status, answer = await house.page(params={"prompt": "neon", "seed": 7}, bypass=False)
    assert (status, answer["resumed"]) == (201, False)
    await page.until(lambda: page.pictures, "the first picture")
    await page.ask(type="params", id=1, strength=0.5, transition_s=1.0)
    (stream,) = house.engine.streams
    indices = [-1]
    for _ in range(8):
        page, status, fresh = await house.page(
            {"token": answer["resume"], "keep": True}, params={"prompt": "watercolor", "seed": 1}
        )
        assert (status, fresh["resumed"], fresh["session"]) == (201, True, answer["session"])
        assert fresh["url"] != answer["url"] and fresh["resume"] != answer["resume"]
        shown = {name: fresh["params"][name] for name in ("prompt", "seed", "strength", "transition_s")}
        assert shown == {"prompt": "neon", "seed": 7, "strength": 0.5, "transition_s": 1.0}
        # The goodbye of the page before, which may come late.
        async with page.http.post(f"{house.base}{answer['url']}/close") as late:
            assert late.status == 404
        answer = fresh
        indices.append(await first_index(page))
        assert house.figure("livebrush_sessions ") == 1
    assert list(house.engine.streams) == [stream] and indices == sorted(set(indices))
    assert house.figure('livebrush_sessions_resumed_total{found="running"}') == 8
    assert (await page.ask(type="params", id=1, prompt="ink"))["params"]["prompt"] == "ink"


async def test_a_page_cut_off_finds_its_seat_though_the_server_is_full() -> None:
    async with one_seat(vanish_timeout_s=1.0) as house:
        lost, _, answer = await house.page(params={"prompt": "neon"})
        await lost.until(lambda: lost.pictures, "the first picture")
        (stream,) = house.engine.streams
        fall_silent(lost)
        _, status, refusal = await house.page(params={"prompt": "ink"})
        assert (status, refusal["code"]) == (503, "full")
        back, status, fresh = await house.page({"token": answer["resume"]}, params={"prompt": "ink"})
        assert (status, fresh["session"], fresh["params"]["prompt"]) == (201, answer["session"], "ink")
        await back.until(lambda: back.pictures, "the picture after the return")
        assert list(house.engine.streams) == [stream]


async def test_a_page_that_stays_away_loses_its_seat_and_keeps_its_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.session.SEAT_S", 2.0)
    async with one_seat(vanish_timeout_s=1.0) as house:
        lost, _, answer = await house.page(params={"prompt": "neon", "seed": 7})
        await lost.until(lambda: lost.pictures, "the first picture")
        fall_silent(lost)
        async with house.pages[0].http.get(house.base + "/api/v1/capacity") as response:
            assert (await response.json())["open"] == 1
        await lost.until(lambda: not house.engine.streams, "a free seat")
        _, status, fresh = await house.page({"token": answer["resume"], "keep": True}, params={"prompt": "ink"})
        assert (status, fresh["resumed"]) == (201, True)
        assert fresh["session"] != answer["session"]
        assert (fresh["params"]["prompt"], fresh["params"]["seed"]) == ("neon", 7)


async def test_a_goodbye_frees_the_seat_at_once_and_a_reload_still_has_its_settings(house: House) -> None:
    page, _, answer = await house.page(params={"prompt": "neon"}, bypass=True)
    async with page.http.post(f"{house.base}{answer['url']}/close") as response:
        assert response.status == 204
    other, status, theirs = await house.page(params={"prompt": "ink"})
    assert status == 201
    _, status, _ = await house.page({"token": answer["resume"], "keep": True})
    assert status == 503
    async with other.http.delete(house.base + theirs["url"]) as response:
        assert response.status == 204
    _, status, fresh = await house.page({"token": theirs["resume"]}, params={"strength": 0.5})
    assert (status, fresh["params"]["prompt"], fresh["params"]["strength"]) == (201, "ink", 0.5)


async def test_a_broken_offer_with_a_token_leaves_the_session_as_it_is(house: House) -> None:
    page, _, answer = await house.page(params={"prompt": "neon"})
    await page.until(lambda: page.pictures, "the first picture")
    body = {"type": "offer", "sdp": "hello", "resume": {"token": answer["resume"]}}
    async with page.http.post(house.base + "/api/v1/webrtc/offer", json=body) as response:
        assert response.status == 400
    seen = len(page.pictures)
    await page.until(lambda: len(page.pictures) > seen + 5, "more pictures")
    assert (await page.ask(type="bypass", id=5, on=True))["type"] == "ack"


async def test_an_unknown_token_is_no_fault_and_needs_a_seat(house: House) -> None:
    _, status, answer = await house.page({"token": "guessed", "keep": True}, params={"prompt": "ink"})
    assert (status, answer["resumed"], answer["params"]["prompt"]) == (201, False, "ink")
    _, status, _ = await house.page({"token": "guessed"})
    assert status == 503
    _, status, _ = await house.page({"token": "x" * 65})
    assert status == 400
