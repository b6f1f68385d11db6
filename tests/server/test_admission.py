"""Who is let in: seats by measured cost, memory and class, all of them given back, and when to come back."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest
from aiortc import RTCConfiguration, RTCPeerConnection
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, generate_latest
from pydantic import ValidationError

from engine.api import Capacity, ChunkCostAt
from engine.config import EngineSettings
from engine.fake import FakeEngine
from server.admission import MAX_RETRY_S, MIN_RETRY_S, Stays, bounds, free_seats, seats
from server.app import running_server
from server.host import Host
from server.ladder import PROMISE_LOAD, Demand, rungs
from server.settings import MediaSettings, ServerSettings

PATIENCE_S = 30.0
registries: dict[str, CollectorRegistry] = {}
OFFER = "/api/v1/webrtc/offer"


def capacity_of(chunk_s: float, *, small: bool = False, max_streams: int = 8) -> Capacity:
    costs = [ChunkCostAt(1, False, chunk_s, chunk_s)]
    if small:
        costs.append(ChunkCostAt(1, True, 0.56 * chunk_s, 0.56 * chunk_s))
    return Capacity(chunk_s, max_streams, 0, 4, costs=tuple(costs))


# --- seats


def test_seats_follow_the_measured_cost_the_memory_and_the_setting() -> None:
    settings = ServerSettings(max_sessions=8, engine=EngineSettings(max_streams=8))
    assert [seats(capacity_of(cost_s), settings) for cost_s in (0.01, 0.05, 0.1, 0.2, 9.0)] == [8, 4, 2, 1, 1]
    # Where everybody can be given the smaller size, there is room for more.
    assert seats(capacity_of(0.1, small=True), settings) == 4
    assert seats(capacity_of(0.01, max_streams=3), settings) == 3
    assert seats(capacity_of(0.01), settings.model_copy(update={"max_sessions": 2})) == 2
    assert seats(Capacity(0.0, 4, 0, 4), settings) == 4  # nothing is measured yet
    assert seats(capacity_of(0.1), settings.model_copy(update={"latency_budget_s": 2.0})) == 4


def test_what_allows_no_more_is_named() -> None:
    settings = ServerSettings(max_sessions=8, engine=EngineSettings(max_streams=8))
    assert bounds(capacity_of(0.01), settings) == (8, "settings")
    assert bounds(capacity_of(0.01, max_streams=3), settings) == (3, "memory")
    assert bounds(capacity_of(0.1), settings) == (2, "engine")
    assert bounds(capacity_of(0.01), settings, Host(cpu_s=0.01)) == (3, "process")
    assert bounds(capacity_of(0.1), settings, Host(cpu_s=0.01)) == (2, "engine")
    assert bounds(capacity_of(9.0), settings, Host(cpu_s=9.0)) == (1, "process")
    assert bounds(Capacity(0.0, 8, 0, 4), settings, Host(cpu_s=0.01)) == (3, "process")


@given(st.floats(0.001, 2.0), st.booleans(), st.integers(1, 8))
def test_every_seat_is_a_promise_that_some_rung_keeps(chunk_s: float, small: bool, max_streams: int) -> None:
    settings = ServerSettings(max_sessions=8, engine=EngineSettings(max_streams=8))
    capacity = capacity_of(chunk_s, small=small, max_streams=max_streams)
    count = seats(capacity, settings)
    assert 1 <= count <= max_streams
    ladder = rungs(settings, steps_max=1, has_small=small)
    for sessions in (count, count + 1):
        rung = Demand(capacity, (1,) * sessions, settings).first_good(ladder, PROMISE_LOAD)
        if sessions == count and count > 1:
            assert rung is not None and rung.fps >= settings.min_fps
        if sessions > count and count < max_streams:
            assert rung is None


def test_reserved_seats_are_kept_for_their_class_and_no_more_than_that() -> None:
    reserved = {"publisher": 1, "paid": 1}
    assert free_seats(4, {}, reserved) == 2
    assert free_seats(4, {"": 2}, reserved) == 0
    assert free_seats(4, {"": 2}, reserved, "paid") == 1
    assert free_seats(4, {"": 2, "paid": 1}, reserved, "paid") == 0  # the last one is the publisher's
    assert free_seats(4, {"": 2, "paid": 1}, reserved, "publisher") == 1
    assert free_seats(4, {"paid": 3}, reserved) == 0
    assert free_seats(4, {"": 2, "paid": 1, "publisher": 1}, reserved, "publisher") == 0
    assert free_seats(4, {"": 3}, {}, "paid") == 1


def test_more_reserved_seats_than_seats_are_refused() -> None:
    with pytest.raises(ValidationError, match="max_sessions 4"):
        ServerSettings(reserved_seats={"paid": 3, "publisher": 2})
    with pytest.raises(ValidationError, match="0 or more"):
        ServerSettings(reserved_seats={"paid": -1})


# --- when to come back


def test_the_time_to_come_back_follows_from_who_is_there_and_how_long_people_stay() -> None:
    stays = Stays()
    # Nothing is known but the first guess: with more seats, one is free sooner.
    assert stays.retry_after_s([0.0]) == 2 * stays.retry_after_s([0.0, 100.0]) == 15.0
    for _ in range(10):
        stays.ended(20.0)
    assert stays.retry_after_s([0.0]) == pytest.approx(20.0)
    assert stays.retry_after_s([15.0]) == pytest.approx(5.0)
    assert stays.retry_after_s([0.0] * 4) == pytest.approx(5.0)
    assert stays.retry_after_s([19.9]) == MIN_RETRY_S
    assert stays.retry_after_s([40.0]) == pytest.approx(40.0)  # who has outstayed all may stay as long again


@given(st.lists(st.floats(0, 1e6), max_size=100), st.lists(st.floats(0, 1e6), max_size=8))
def test_the_time_to_come_back_is_bounded(past_s: list[float], ages_s: list[float]) -> None:
    stays = Stays()
    for stay_s in past_s:
        stays.ended(stay_s)
    assert MIN_RETRY_S <= stays.retry_after_s(ages_s) <= MAX_RETRY_S


# --- the server


@contextlib.asynccontextmanager
async def served(**settings: Any) -> AsyncIterator[tuple[str, aiohttp.ClientSession]]:
    chosen = ServerSettings(port=0, engine_kind="fake", engine=EngineSettings(width=64, height=64), **settings)
    engine = FakeEngine(64, 64, delay_s=0.01, max_streams=4)
    async with running_server(chosen, engine) as (context, port), aiohttp.ClientSession() as http:
        base = f"http://127.0.0.1:{port}"
        registries[base] = context.metrics.registry
        yield base, http


async def offer_sdp() -> str:
    """An offer of a peer that will never connect."""
    connection = RTCPeerConnection(RTCConfiguration(iceServers=[]))
    try:
        connection.addTransceiver("video", "sendrecv")
        connection.createDataChannel("control")
        await connection.setLocalDescription(await connection.createOffer())
        return str(connection.localDescription.sdp)
    finally:
        await connection.close()


async def ask(http: aiohttp.ClientSession, base: str, sdp: str, **more: str) -> tuple[int, dict[str, Any], float]:
    """Status, body and seconds of one offer."""
    began_at = time.monotonic()
    async with http.post(base + OFFER, json={"type": "offer", "sdp": sdp, **more}) as response:
        body = await response.json(content_type=None)
        if response.status == 503:
            assert float(response.headers["Retry-After"]) >= body["retry_after_s"] >= MIN_RETRY_S
        return response.status, body, time.monotonic() - began_at


async def capacity(http: aiohttp.ClientSession, base: str) -> dict[str, Any]:
    async with http.get(base + "/api/v1/capacity") as response:
        found: dict[str, Any] = await response.json()
        return found


def metrics(base: str) -> str:
    return generate_latest(registries[base]).decode()


async def test_offers_that_never_connect_take_no_more_than_the_seats_and_give_all_of_them_back() -> None:
    media = MediaSettings(connect_timeout_s=1.5)
    async with served(max_sessions=2, media=media) as (base, http):
        sdp = await offer_sdp()
        answers = await asyncio.gather(*(ask(http, base, sdp) for _ in range(60)))
        kinds = [status if status == 201 else body["code"] for status, body, _ in answers]
        assert kinds.count(201) == 2 and set(kinds) == {201, "full", "too_many_requests"}
        full = next(body for _, body, _ in answers if body.get("code") == "full")
        assert (full["seats"], full["open"], full["limit"], full["retryable"]) == (2, 2, "settings", True)
        assert full["message"] == "all 2 seats of this server are taken, and it is set to take no more"
        # A refusal does not wait for a seat: it is there long before the half-open ones are gone.
        assert (await capacity(http, base))["open"] == 2
        async with asyncio.timeout(PATIENCE_S):
            while (await capacity(http, base))["open"]:
                await asyncio.sleep(0.1)
        text = metrics(base)
        assert 'livebrush_sessions_ended_total{reason="never_connected"} 2.0' in text
        assert f'livebrush_offers_refused_total{{code="full"}} {kinds.count("full")}.0' in text
        status, _, _ = await ask(http, base, sdp)
        assert status == 201


def test_a_half_open_session_is_gone_in_twelve_seconds() -> None:
    assert MediaSettings().connect_timeout_s <= 12


async def test_an_offer_of_a_class_finds_the_seat_that_is_kept_for_it() -> None:
    async with served(max_sessions=2, reserved_seats={"paid": 1}) as (base, http):
        sdp = await offer_sdp()
        assert (await ask(http, base, sdp))[0] == 201
        status, body, _ = await ask(http, base, sdp)
        assert status == 503 and "1 of 2 seats are free, and kept for paid" in body["message"]
        assert (body["seats"], body["open"]) == (2, 1)
        assert (await ask(http, base, sdp, **{"class": "x" * 33}))[0] == 400
        assert (await ask(http, base, sdp, **{"class": "paid"}))[0] == 201
        assert (await ask(http, base, sdp, **{"class": "paid"}))[1]["code"] == "full"


async def test_an_offer_that_cannot_be_answered_gives_its_seat_back() -> None:
    async with served(max_sessions=1, reserved_seats={"paid": 1}) as (base, http):
        for _ in range(3):
            assert (await ask(http, base, "v=0", **{"class": "paid"}))[0] == 422
        assert (await capacity(http, base))["open"] == 0
        assert (await ask(http, base, await offer_sdp(), **{"class": "paid"}))[0] == 201


async def test_capacity_tells_seats_costs_load_and_the_rung() -> None:
    async with served(max_sessions=2) as (base, http):
        async with asyncio.timeout(PATIENCE_S):
            while not (found := await capacity(http, base))["chunk_cost_ms"]:
                await asyncio.sleep(0.05)
        assert (found["open"], found["seats"], found["fps"], found["load"]) == (0, 2, 24, 0)
        assert found["rung"] == {"steps": 4, "small": False, "light": False, "fps": 24, "camera": False}
        assert (await ask(http, base, await offer_sdp()))[0] == 201
        found = await capacity(http, base)
        assert found["open"] == 1 and found["load"] == pytest.approx(24 / 4 * 0.01, rel=0.5)
        assert all(cost["upper_ms"] >= cost["mean_ms"] > 0 for cost in found["costs"])
        async with asyncio.timeout(PATIENCE_S):
            while "livebrush_engine_load 0.0\n" in (text := metrics(base)):
                await asyncio.sleep(0.05)
        assert "livebrush_seats 2.0" in text and "livebrush_rungs_down 0.0" in text
