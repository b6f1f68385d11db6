"""The overlay in a real Chromium: transparent, clean at its edges, and back by itself after every loss."""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from playwright.sync_api import Browser, BrowserContext, Page, expect

from tests.e2e.publishing import publish
from tests.e2e.serving import Server

pytestmark = [pytest.mark.browser, pytest.mark.slow]

expect.set_options(timeout=60_000)

SQUARE_PX = 16
CHECKERBOARD = f"repeating-conic-gradient(#ddd 0 25%, #777 0 50%) 0 0 / {2 * SQUARE_PX}px {2 * SQUARE_PX}px"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("server") / "server.log"
    with Server(log, engine="fake", patient=True) as running:
        yield running


@pytest.fixture
def page(windows: Callable[[], BrowserContext]) -> Page:
    page = windows().new_page()
    page.set_default_timeout(60_000)
    page.set_viewport_size({"width": 512, "height": 512})
    return page


def shot(page: Page, background: str) -> NDArray[np.float32]:
    """What is seen with this behind the overlay: [H, W, 3], 0 to 255."""
    page.evaluate("colour => { document.documentElement.style.background = colour; }", background)
    return np.asarray(Image.open(io.BytesIO(page.screenshot())).convert("RGB"), np.float32)


def wait_for_pictures(page: Page, count: int = 5) -> None:
    expect(page.locator("body")).to_have_attribute("data-state", "playing")
    page.wait_for_function(
        """count => new Promise((done) => {
          const video = document.getElementById("video");
          const next = () => (--count > 0 ? video.requestVideoFrameCallback(next) : done(true));
          next();
        })""",
        arg=count,
    )


def wait_until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, f"waited 60 s in vain for {what}"
        time.sleep(0.2)


def test_the_person_stands_over_a_checkerboard_with_clean_edges(
    browser: Browser, page: Page, server: Server, tmp_path: Path
) -> None:
    publisher = publish(browser, server, "/whip/cut?prompt=neon")
    page.goto(f"{server.url}/overlay?stream=cut&alpha=1&fit=fill")
    wait_for_pictures(page)
    page.evaluate("document.getElementById('video').pause()")
    board = shot(page, CHECKERBOARD)
    black, white = shot(page, "#000"), shot(page, "#fff")
    publisher.close()

    alpha = 1 - (white - black).mean(axis=2) / 255
    opaque, soft = alpha > 0.95, (alpha > 0.05) & (alpha <= 0.95)
    # Where nobody is, the board is there to the last grey level; the top corners are.
    bare = page.evaluate("document.querySelector('canvas').remove()") or shot(page, CHECKERBOARD)
    for corner in (np.s_[:64, :64], np.s_[:64, -64:]):
        assert np.abs(board[corner] - bare[corner]).max() <= 2
    assert 0.1 < opaque.mean() < 0.7
    # One outline and no specks.
    _, _, found, _ = cv2.connectedComponentsWithStats((alpha > 0.5).astype(np.uint8))
    assert found[1:, cv2.CC_STAT_AREA].max() > 0.97 * (alpha > 0.5).sum()
    # The edge is soft over a few pixels of the 256 that the picture has, not a veil.
    outline = cv2.morphologyEx((alpha > 0.5).astype(np.uint8), cv2.MORPH_GRADIENT, np.ones((3, 3), np.uint8))
    assert soft.sum() < 14 * outline.sum() / 2
    # And no rim of the old, bright background: the person's own colours go on to the edge.
    person = black / np.maximum(alpha, 0.05)[..., None]
    rim = (alpha > 0.3) & (alpha < 0.7)
    inside = cv2.erode(opaque.astype(np.uint8), np.ones((9, 9), np.uint8)) > 0
    near = (cv2.dilate(rim.astype(np.uint8), np.ones((25, 25), np.uint8)) > 0) & inside
    assert abs(np.median(person[rim]) - np.median(person[near])) < 40


def test_it_comes_before_its_stream_and_outlives_publisher_and_server(
    browser: Browser, page: Page, tmp_path: Path
) -> None:
    with Server(tmp_path / "server.log", engine="fake", patient=True) as server:
        page.goto(f"{server.url}/overlay?stream=later&bg=000000&mirror=1")
        expect(page.locator("body")).to_have_attribute("data-state", "waiting")
        expect(page.locator("#problem")).to_be_empty()
        assert shot(page, "").max() == 0
        publisher = publish(browser, server, "/whip/later")
        wait_for_pictures(page)
        assert shot(page, "").max() > 60
        publisher.close()

        server.kill()
        expect(page.locator("body")).to_have_attribute("data-state", "waiting")
        assert shot(page, "").max() == 0
        server.start()
        publisher = publish(browser, server, "/whip/later")
        wait_for_pictures(page)
        expect(page.locator("#problem")).to_be_empty()
        publisher.close()


def test_a_page_publishes_a_camera_and_changes_its_style(
    windows: Callable[[], BrowserContext], page: Page, tmp_path: Path
) -> None:
    with Server(tmp_path / "server.log", engine="fake", patient=True) as server:
        sender = windows().new_page()
        sender.set_default_timeout(60_000)
        sender.goto(f"{server.url}/publish.html?stream=desk&prompt=neon")
        sender.get_by_role("button", name="Publish camera").click()
        expect(sender.locator("#state")).to_have_text("Live")
        sender.locator("#prompt").fill("a calm sea")
        sender.get_by_role("button", name="Paint").click()
        wait_until(lambda: '"prompt": "a calm sea"' in server.get("/api/v1/streams"), "the new style")
        server.kill()
        expect(sender.locator("#state")).to_have_text("Trying again")
        server.start()
        page.goto(f"{server.url}/overlay?stream=desk&fit=cover")
        wait_for_pictures(page)
        assert '"prompt": "a calm sea"' in server.get("/api/v1/streams")
        sender.get_by_role("button", name="Stop").click()
        wait_until(lambda: '"live": false' in server.get("/api/v1/streams"), "the goodbye")


def test_a_green_screen_is_keyed_in_the_page(browser: Browser, page: Page, server: Server) -> None:
    publisher = publish(browser, server, "/whip/green?bypass=true")
    # The wall of the clip is near white and grey; everything grey goes.
    page.goto(f"{server.url}/overlay?stream=green&chroma=808080&similarity=0.05&smoothness=0.02&fit=fill")
    wait_for_pictures(page)
    page.evaluate("document.getElementById('video').pause()")
    alpha = 1 - (shot(page, "#fff") - shot(page, "#000")).mean(axis=2) / 255
    publisher.close()
    assert alpha[:64, 200:300].mean() < 0.1
    assert (alpha > 0.9).mean() > 0.05


@pytest.mark.parametrize(
    ("query", "words"),
    [
        ("", "stream="),
        ("?stream=a&fit=wide", "fit=wide: contain, cover, fill"),
        ("?stream=a&chroma=green", "chroma=green: six hexadecimal digits"),
        ("?stream=a&alpha=1&chroma=00ff00", "one of them only"),
        ("?stream=a&colour=1", "unknown parameter colour"),
    ],
)
def test_a_wrong_address_says_what_is_wrong(page: Page, server: Server, query: str, words: str) -> None:
    page.goto(f"{server.url}/overlay{query}")
    expect(page.locator("#problem")).to_contain_text(words)
