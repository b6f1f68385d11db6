"""A reloaded page in a real Chromium finds its session, with one seat for everybody."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import BrowserContext

from tests.e2e.chromium import wait_for_figures
from tests.e2e.serving import Server


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
