"""A real Chromium that gets no UDP through falls back to the WebSocket by itself; one without WebCodecs sends JPEG."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, Playwright

from tests.e2e.chromium import chromium, wait_for_figures
from tests.e2e.serving import Server

# A browser that may use relays alone, and has none: it sends no UDP at all.
NO_UDP = """
const Native = window.RTCPeerConnection;
window.RTCPeerConnection = class extends Native {
  constructor(configuration) { super({ ...configuration, iceTransportPolicy: "relay" }); }
};
"""
RESTYLED = "s.restyled_shown > 12 && s.latency_p50_ms > 0"


@pytest.fixture(scope="module")
def window(driver: Playwright, camera_file: Path) -> Iterator[Browser]:
    with chromium(driver, camera=camera_file) as running:
        yield running


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with Server(tmp_path / "server.log", engine="fake", patient=True, LIVEBRUSH_MAX_SESSIONS="1") as running:
        yield running


def open_page(browser: Browser, url: str, script: str) -> Page:
    page = browser.new_context(permissions=["camera", "microphone"]).new_page()
    page.add_init_script(script)
    page.goto(url)
    return page


def test_without_udp_the_page_goes_on_over_the_socket_with_the_same_session(
    window: Browser, server: Server, tmp_path: Path
) -> None:
    page = open_page(window, server.url + "?autostart=1&source=camera&prompt=ink+wash", NO_UDP)
    figures = wait_for_figures(page, RESTYLED)
    assert page.evaluate("() => window.livebrush.session.overSocket")
    assert page.evaluate("() => window.livebrush.session.connection.media.codec").startswith("VP8 over")
    ack = page.evaluate("() => window.livebrush.set({ prompt: 'neon' })")
    assert (ack["params"]["prompt"], ack["first_frame"] >= 0) == ("neon", True)
    assert page.evaluate("() => document.getElementById('restyled').videoWidth") > 0

    page.reload()
    again = wait_for_figures(page, RESTYLED)
    assert page.evaluate("() => window.livebrush.settings.prompt") == "neon"
    assert page.evaluate("() => window.livebrush.session.overSocket")
    page.get_by_role("button", name="Stop").click()
    assert again["frames_shown"] > 0 and figures["session"]
    assert "over a WebSocket" in (tmp_path / "server.log").read_text()


def test_without_web_codecs_pictures_are_jpeg(window: Browser, server: Server) -> None:
    script = "delete window.VideoEncoder; delete window.VideoDecoder"
    page = open_page(window, server.url + "?autostart=1&source=clip&transport=socket", script)
    wait_for_figures(page, RESTYLED)
    assert page.evaluate("() => window.livebrush.session.connection.media.codec").startswith("JPEG over")
