"""A server with tokens, seen by a real Chromium: the link, the question, the goodbye, and the page's policy."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import BrowserContext, Page, expect

from tests.e2e.chromium import wait_for_figures
from tests.e2e.serving import Server

pytestmark = [pytest.mark.browser, pytest.mark.slow]

TOKEN = "a publisher's token".replace(" ", "_")
PATIENCE_S = 60
LIVE = "s.state === 'live' && s.restyled_shown >= 12"


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("guarded") / "server.log"
    with Server(log, engine="fake", patient=True, LIVEBRUSH_TOKENS__PUBLISH=TOKEN) as running:
        yield running


def watched(context: BrowserContext) -> tuple[Page, list[str]]:
    """A page, and what its console says of the policy."""
    page = context.new_page()
    page.set_default_timeout(PATIENCE_S * 1000)
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(f"page error: {error}"))
    return page, said


def wait_for_goodbyes(server: Server, count: int) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while sum((found := server.ended()).values()) < count:
        assert time.monotonic() < deadline, found
        time.sleep(0.2)


def test_a_link_opens_the_page_which_keeps_its_token_and_breaks_no_rule_of_its_policy(
    context: BrowserContext, guarded: Server
) -> None:
    page, said = watched(context)
    page.goto(f"{guarded.url}/?autostart=1&source=clip#token={TOKEN}")
    wait_for_figures(page, LIVE)
    assert TOKEN not in page.url
    page.goto(f"{guarded.url}/?autostart=1&source=clip")
    wait_for_figures(page, LIVE)
    page.goto("about:blank")
    wait_for_goodbyes(guarded, 2)
    assert not [text for text in said if re.search(r"Content.Security.Policy|page error|Permissions.Policy", text)], (
        said
    )


def test_without_a_token_the_page_asks_for_one_until_it_is_right(context: BrowserContext, guarded: Server) -> None:
    page, said = watched(context)
    page.goto(f"{guarded.url}/?autostart=1&source=clip")
    dialog = page.get_by_role("dialog")
    for typed in ("not the right one", TOKEN):
        expect(dialog).to_have_count(1)
        dialog.get_by_label("Token").fill(typed)
        dialog.get_by_role("button", name="Go on").click()
        if typed != TOKEN:
            expect(dialog).to_contain_text("not one of this server")
    wait_for_figures(page, LIVE)
    expect(dialog).to_have_count(0)
    assert not [text for text in said if "page error" in text], said


def test_nobody_may_frame_the_page(context: BrowserContext, guarded: Server, tmp_path: Path) -> None:
    page, said = watched(context)
    frame = tmp_path / "frame.html"
    frame.write_text(f'<iframe src="{guarded.url}/"></iframe>')
    page.goto(frame.as_uri())
    page.wait_for_timeout(500)
    assert any("frame-ancestors" in text for text in said), said
