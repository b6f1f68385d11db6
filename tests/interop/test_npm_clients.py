"""Foreign clients: the npm packages that pages publish and play with, in a real Chromium, from a page of another
origin. Skipped without the packages, which scripts/setup installs by their lock file."""

from __future__ import annotations

import json
import subprocess
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from tests.e2e.chromium import chromium, write_fake_camera
from tests.e2e.serving import Server

CLIENTS = Path(__file__).parent / "clients"
ESBUILD = CLIENTS / "node_modules" / ".bin" / "esbuild"
TOKEN = "a-token-of-the-tests"
PICTURES = 20
PAGE = '<!doctype html><meta charset="utf-8"><video autoplay muted></video><script src="bundle.js"></script>'

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not ESBUILD.exists(), reason=f"npm ci --prefix {CLIENTS} was not run"),
]


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture(scope="module")
def foreign_origin(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A page of somebody else with the clients on it."""
    folder = tmp_path_factory.mktemp("page")
    subprocess.run([ESBUILD, CLIENTS / "page.js", "--bundle", f"--outfile={folder / 'bundle.js'}"], check=True)
    (folder / "index.html").write_text(PAGE)
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder))) as site:
        threading.Thread(target=site.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{site.server_port}"
        site.shutdown()


@pytest.fixture(scope="module")
def server(foreign_origin: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server(
        tmp_path_factory.mktemp("server") / "log",
        engine="fake",
        patient=True,
        LIVEBRUSH_ALLOWED_ORIGINS=json.dumps([foreign_origin]),
        LIVEBRUSH_TOKENS__PUBLISH=TOKEN,
    ) as running:
        yield running


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    camera = write_fake_camera(tmp_path_factory.mktemp("camera") / "people.y4m", frames=60)
    with sync_playwright() as driver, chromium(driver, camera=camera) as running:
        yield running


@pytest.fixture
def page(browser: Browser, foreign_origin: str) -> Iterator[Page]:
    window = browser.new_context(permissions=["camera", "microphone"])
    page = window.new_page()
    page.set_default_timeout(90_000)
    page.goto(foreign_origin)
    yield page
    window.close()


@pytest.mark.parametrize("publish", ["publishMedooze", "publishEyevinn"])
def test_a_page_publishes_and_plays_with_npm_clients(page: Page, server: Server, publish: str) -> None:
    faults: list[str] = []
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("response", lambda r: faults.append(f"{r.request.method} {r.url}: {r.status}") if r.status >= 400 else None)
    statuses: list[tuple[str, int]] = []
    page.on("response", lambda response: statuses.append((response.request.method, response.status)))
    call = f"([url, ...rest]) => window.{publish}(url, ...rest)"
    page.evaluate(call, [f"{server.url}/whip/{publish}?prompt=neon", TOKEN])
    size = page.evaluate("rest => window.watchMedooze(...rest)", [f"{server.url}/whep/{publish}", TOKEN, PICTURES])
    page.evaluate("() => window.leave()")
    assert size[0] > 0 and size[1] > 0
    assert statuses.count(("POST", 201)) == 2 and statuses.count(("DELETE", 200)) == 2
    assert ("PATCH", 204) in statuses
    assert faults == []
