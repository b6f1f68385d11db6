"""The panel "Use it": what it gives to copy works as it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from urllib.parse import parse_qs, urlsplit

import pytest
from playwright.sync_api import Browser, BrowserContext, Page, expect

from tests.e2e.publishing import publish
from tests.e2e.serving import Server

pytestmark = [pytest.mark.browser, pytest.mark.slow]

expect.set_options(timeout=60_000)

ADMIN = "an-admin-token-of-this-test-0123456789abcdef"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("server") / "server.log"
    with Server(log, engine="fake", patient=True) as running:
        yield running


@pytest.fixture
def page(windows: Callable[[], BrowserContext]) -> Page:
    context = windows()
    context.grant_permissions(["clipboard-read", "clipboard-write"])
    page = context.new_page()
    page.set_default_timeout(60_000)
    return page


def open_panel(page: Page, url: str) -> None:
    page.goto(url)
    page.get_by_text("Use it in OBS, a player or a call").click()
    expect(page.get_by_label("URL of a Browser source", exact=True)).not_to_be_empty()


def test_the_addresses_follow_the_choices_and_the_overlay_plays(browser: Browser, page: Page, server: Server) -> None:
    open_panel(page, server.url)
    page.get_by_label("Stream", exact=True).fill("desk")
    page.get_by_label("Person alone").check()
    page.locator("#prompt").fill("ink & 'wash'")
    whip = urlsplit(page.get_by_label("Server (WHIP)", exact=True).input_value())
    assert (whip.path, parse_qs(whip.query)) == ("/whip/desk", {"prompt": ["ink & 'wash'"]})
    assert page.get_by_label("Any WHEP player", exact=True).input_value() == f"{server.url}/whep/desk"
    assert page.locator("#use-camera").input_value() == f"livebrush camera --stream desk --url {server.url}"
    expect(page.get_by_label("Bearer Token", exact=True)).to_be_hidden()

    page.get_by_role("button", name="Copy: URL of a Browser source").click()
    expect(page.get_by_role("button", name="Copy: URL of a Browser source")).to_have_text("Copied")
    copied = page.evaluate("navigator.clipboard.readText()")
    assert copied == f"{server.url}/overlay?stream=desk&alpha=1"
    publisher = publish(browser, server, f"{whip.path}?{whip.query}")
    page.goto(copied)
    expect(page.locator("body")).to_have_attribute("data-state", "playing")
    publisher.close()

    open_panel(page, server.url)
    page.get_by_label("Stream", exact=True).fill("no name")
    expect(page.locator("#use-note")).to_contain_text("1 to 64 letters")
    assert "no name" not in page.get_by_label("Server (WHIP)", exact=True).input_value()


def test_with_tokens_the_panel_hands_out_links_for_one_stream(
    browser: Browser, page: Page, tmp_path_factory: pytest.TempPathFactory
) -> None:
    log = tmp_path_factory.mktemp("guarded") / "server.log"
    with Server(log, engine="fake", patient=True, LIVEBRUSH_TOKENS__ADMIN=ADMIN) as server:
        open_panel(page, f"{server.url}/#token={ADMIN}")
        token = page.get_by_label("Bearer Token", exact=True)
        expect(token).to_be_visible()
        expect(page.locator("#use-note")).to_contain_text("works until")
        overlay = page.get_by_label("URL of a Browser source", exact=True).input_value()
        assert ADMIN not in overlay and overlay.startswith(f"{server.url}/overlay?stream=studio#token=link.view.")
        publisher = publish(browser, server, "/whip/studio", token=token.input_value())
        page.goto(overlay)
        expect(page.locator("body")).to_have_attribute("data-state", "playing")
        # Of a page of its own: another fragment alone would not load the page anew.
        page.goto("about:blank")
        page.goto(f"{server.url}/overlay?stream=studio#token=wrong")
        expect(page.locator("#problem")).to_contain_text("token")
        publisher.close()
