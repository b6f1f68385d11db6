"""A page in a real Chromium, reloaded or cut off, finds its session, with one seat for everybody."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import BrowserContext, Page, Route

from tests.e2e.chromium import wait_for_figures
from tests.e2e.serving import Server
from tests.net.link import Impairment, Link


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with Server(tmp_path / "server.log", engine="fake", patient=True, LIVEBRUSH_MAX_SESSIONS="1") as running:
        yield running


def test_reloads_keep_what_was_set_and_a_stop_forgets_it(context: BrowserContext, server: Server) -> None:
    page = context.new_page()
    page.goto(server.url + "?autostart=1&source=clip&prompt=ink+wash")
    wait_for_figures(page, "s.restyled_shown > 0")
    page.evaluate("() => window.livebrush.set({ prompt: 'neon', strength: 0.75, seed: 9 })")
    for _ in range(3):
        page.reload()
        wait_for_figures(page, "s.restyled_shown > 0")
        settings = page.evaluate("() => window.livebrush.settings")
        assert (settings["prompt"], settings["strength"], settings["seed"]) == ("neon", 0.75, 9)
        ack = page.evaluate("() => window.livebrush.set({ steps: 1 })")
        assert (ack["params"]["prompt"], ack["params"]["seed"]) == ("neon", 9)
    page.get_by_role("button", name="Stop").click()
    page.reload()
    wait_for_figures(page, "s.restyled_shown > 0")
    assert page.evaluate("() => window.livebrush.settings")["prompt"] == "ink wash"


class Links:
    """A link for each connection that a page makes, on a loop of its own."""

    def __init__(self) -> None:
        self.made: list[Link] = []
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()

    def put_before(self, page: Page) -> None:
        """Every connection of the page goes through one from now on."""
        page.route("**/api/v1/webrtc/**", self._on_request)

    def cut(self, number: int) -> None:
        """From now on nothing comes through."""
        self._loop.call_soon_threadsafe(self.made[number].set, Impairment(down=True))

    def close(self) -> None:
        """End them and the loop."""
        for link in self.made:
            asyncio.run_coroutine_threadsafe(link.__aexit__(None, None, None), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _on_request(self, route: Route) -> None:
        if route.request.method == "PATCH":
            route.fulfill(status=204)  # its own addresses would lead around the link
            return
        if route.request.method != "POST" or not route.request.url.endswith("/offer"):
            route.continue_()
            return
        link = Link(len(self.made) + 1)
        asyncio.run_coroutine_threadsafe(link.__aenter__(), self._loop).result(10)
        self.made.append(link)
        offer = json.loads(route.request.post_data or "")
        offer["sdp"] = link.towards_server_unseen(offer["sdp"])
        response = route.fetch(post_data=json.dumps(offer))
        answer = response.json()
        answer["sdp"] = link.towards_client(answer["sdp"])
        route.fulfill(status=response.status, content_type="application/json", body=json.dumps(answer))


@pytest.fixture
def links() -> Iterator[Links]:
    made = Links()
    yield made
    made.close()


def test_a_page_whose_address_is_no_longer_good_comes_back_from_another_as_it_was(
    context: BrowserContext, server: Server, links: Links
) -> None:
    page = context.new_page()
    links.put_before(page)
    page.goto(server.url + "?autostart=1&source=clip&prompt=ink+wash")
    session = wait_for_figures(page, "s.restyled_shown > 12")["session"]
    page.evaluate("() => window.livebrush.set({ prompt: 'neon', strength: 0.75, seed: 9 })")
    assert len(links.made) == 1 and links.made[0].down.counters["carried"] > 20
    links.cut(0)
    cut_at = time.monotonic()
    # The engine's stream went on: the counts of what was shown begin anew with the connection.
    page.wait_for_function("() => !(window.livebrush.stats()?.restyled_shown > 0)", polling=50, timeout=60_000)
    figures = wait_for_figures(page, "s.restyled_shown > 0")
    print(f"restyled again {time.monotonic() - cut_at:.1f} s after the address was lost")
    assert len(links.made) == 2 and links.made[1].down.counters["carried"] > 0
    assert figures["session"] == session
    ack = page.evaluate("() => window.livebrush.set({ steps: 1 })")
    assert (ack["params"]["prompt"], ack["params"]["strength"], ack["params"]["seed"]) == ("neon", 0.75, 9)
    assert server.capacity()["open"] == 1
