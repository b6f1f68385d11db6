from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, BrowserContext, Playwright, sync_playwright

from tests.e2e.chromium import chromium, write_fake_camera
from tests.e2e.serving import Server, has_model


@pytest.fixture(scope="session")
def camera_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_fake_camera(tmp_path_factory.mktemp("camera") / "people.y4m")


@pytest.fixture(scope="module")
def driver() -> Iterator[Playwright]:
    # Its loop lives as long as it does: tests with loops of their own come before or after this module.
    with sync_playwright() as running:
        yield running


@pytest.fixture(scope="module")
def browser(driver: Playwright, camera_file: Path) -> Iterator[Browser]:
    with chromium(driver, camera=camera_file) as running:
        yield running


@pytest.fixture
def windows(browser: Browser) -> Iterator[Callable[[], BrowserContext]]:
    """Makes windows whose pages say goodbye when the test is over, however it ends."""
    opened: list[BrowserContext] = []

    def open_window() -> BrowserContext:
        opened.append(
            browser.new_context(viewport={"width": 1280, "height": 800}, permissions=["camera", "microphone"])
        )
        return opened[-1]

    yield open_window
    for window in opened:
        for page in window.pages:
            page.goto("about:blank")
        window.close()


@pytest.fixture
def context(windows: Callable[[], BrowserContext]) -> BrowserContext:
    return windows()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The server as users start it; with the stand-in engine only where the model's weights are not built yet."""
    log = tmp_path_factory.mktemp("server") / "server.log"
    with Server(log, engine="local" if has_model() else "fake", patient=True) as running:
        yield running
