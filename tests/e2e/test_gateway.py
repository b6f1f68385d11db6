"""A page in a real Chromium behind the gateway: its server is emptied, it goes on at the other with all it had set."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from playwright.sync_api import BrowserContext, Page

from tests.e2e.chromium import wait_for_figures
from tests.e2e.serving import SCRIPT, GatewayProcess, Server

RESTYLED = "s.restyled_shown > 5 && s.state === 'live'"
# When each picture was shown, over all connections.
NOTE_PICTURES = """() => {
  const video = document.getElementById("restyled");
  window.shownAt = [];
  const note = (now) => { window.shownAt.push(now); video.requestVideoFrameCallback(note); };
  video.requestVideoFrameCallback(note);
}"""
LONGEST_GAP_S = "() => Math.max(...window.shownAt.slice(1).map((at, index) => at - window.shownAt[index])) / 1000"
SCENES = "[{ prompt: 'neon', strength: 0.5 }, { prompt: 'ink', hold_s: 3000 }, { prompt: 'comic', hold_s: 3000 }]"


class House:
    """Two servers behind a gateway."""

    def __init__(self, servers: tuple[Server, Server], url: str) -> None:
        self.servers, self.url = servers, url

    def holder(self, page: Page) -> Server:
        """The server that has the page's session."""
        session: str = page.evaluate("() => window.livebrush.stats().session")
        return next(server for server in self.servers if session.startswith(server.capacity()["node"]))


def drain(server: Server, *options: str) -> None:
    subprocess.run([SCRIPT, "drain", server.url, *options], check=True, timeout=120, stdout=subprocess.DEVNULL)


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    with ExitStack() as stack:
        one, two = (
            stack.enter_context(Server(tmp_path / name, engine="fake", patient=True, LIVEBRUSH_MAX_SESSIONS="2"))
            for name in ("one", "two")
        )
        gateway = stack.enter_context(GatewayProcess(tmp_path / "gateway", one, two, options=("--admin-port", "0")))
        yield House((one, two), gateway.url)


@pytest.mark.parametrize("way", ["", "&transport=socket"])
def test_an_emptied_server_hands_its_page_to_the_other(
    context: BrowserContext, house: House, way: str, capsys: pytest.CaptureFixture[str]
) -> None:
    page = context.new_page()
    refused: list[str] = []
    page.on("console", lambda message: refused.append(message.text) if "Content Security" in message.text else None)
    page.goto(house.url + "?autostart=1&source=clip&prompt=ink+wash" + way)
    wait_for_figures(page, RESTYLED)
    page.evaluate("() => window.livebrush.set({ strength: 0.75, seed: 9 })")
    page.evaluate(f"() => window.livebrush.loadScenes({SCENES}, {{ loop: true, begin: 1 }})")
    page.wait_for_function("() => window.livebrush.settings.prompt === 'ink'")
    page.evaluate(NOTE_PICTURES)
    before = house.holder(page)
    drain(before, "--wait", "1")
    assert before.capacity()["open"] == 0
    wait_for_figures(page, RESTYLED)
    after = house.holder(page)
    assert after is not before and after.capacity()["open"] == 1
    settings = page.evaluate("() => window.livebrush.settings")
    assert (settings["prompt"], settings["strength"], settings["seed"]) == ("ink", 0.75, 9)
    assert page.evaluate("() => window.livebrush.session.overSocket") is bool(way)
    # The server has them too, and the list goes on with the scene that stood.
    ack = page.evaluate("() => window.livebrush.goToScene('next')")
    assert (ack["params"]["prompt"], ack["params"]["seed"]) == ("comic", 9)
    with capsys.disabled():
        print(f"\nlongest gap{way}: {page.evaluate(LONGEST_GAP_S):.2f} s")
    # And back again: both are restarted in turn under one page.
    drain(before, "--undo")
    before.stop()
    before.start()
    drain(after, "--wait", "0")
    wait_for_figures(page, RESTYLED)
    assert house.holder(page) is before
    assert page.evaluate("() => window.livebrush.settings")["prompt"] == "comic"
    page.get_by_role("button", name="Stop").click()
    page.wait_for_function("() => window.livebrush.state === 'stopped'")
    assert not refused


def test_a_page_whose_server_is_killed_goes_on_at_the_other(context: BrowserContext, house: House) -> None:
    page = context.new_page()
    page.goto(house.url + "?autostart=1&source=clip&prompt=ink+wash")
    wait_for_figures(page, RESTYLED)
    page.evaluate("() => window.livebrush.set({ prompt: 'neon', seed: 9 })")
    before = house.holder(page)
    before.kill()
    wait_for_figures(page, f"{RESTYLED} && s.session !== '{page.evaluate('() => window.livebrush.stats().session')}'")
    (after,) = (server for server in house.servers if server is not before)
    assert after.capacity()["open"] == 1
    assert page.evaluate("() => window.livebrush.set({ steps: 1 })")["params"]["prompt"] == "neon"
