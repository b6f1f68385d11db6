"""Make the pictures of docs/obs.md: the overlay over a checkerboard, and the panel "Use it".

    .venv/bin/python scripts/obs_pictures.py

Starts a server with the embedded model and a Chromium with the demo clip as its camera; takes about a minute.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

from playwright.sync_api import sync_playwright

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from tests.e2e.chromium import chromium, write_fake_camera  # noqa: E402
from tests.e2e.publishing import publish  # noqa: E402
from tests.e2e.serving import Server, has_model  # noqa: E402

PICTURES = ROOT / "docs" / "pictures"
CHECKERBOARD = "repeating-conic-gradient(#e4e4e4 0 25%, #bdbdbd 0 50%) 0 0 / 32px 32px"
PICTURES_BEFORE = 40
"""Pictures to let pass: the painting has faded in, the bitrate risen."""
PASS = """count => new Promise((done) => {
  const video = document.getElementById("video");
  const next = () => (--count > 0 ? video.requestVideoFrameCallback(next) : done());
  next();
})"""


def main() -> None:
    """Write docs/pictures/overlay.png and docs/pictures/use-it.png."""
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as driver:
        camera = write_fake_camera(Path(folder) / "people.y4m")
        engine = "local" if has_model() else "fake"
        with (
            Server(Path(folder) / "log", engine=engine, patient=True) as server,
            chromium(driver, camera=camera) as browser,
        ):
            while not server.is_ready():
                time.sleep(0.5)
            publish(browser, server, "/whip/studio?prompt=oil+painting")
            page = browser.new_page(viewport={"width": 640, "height": 640})
            page.goto(f"{server.url}/overlay?stream=studio&alpha=1")
            page.wait_for_selector("body[data-state=playing]", timeout=60_000)
            page.evaluate(PASS, PICTURES_BEFORE)
            page.evaluate("colour => { document.documentElement.style.background = colour; }", CHECKERBOARD)
            page.screenshot(path=PICTURES / "overlay.png")
            page.set_viewport_size({"width": 1280, "height": 900})
            page.goto(server.url)
            page.get_by_text("Use it in OBS, a player or a call").click()
            page.locator("#use-overlay").wait_for()
            page.wait_for_function("document.getElementById('use-overlay').value !== ''")
            page.locator("#use").screenshot(path=PICTURES / "use-it.png")


if __name__ == "__main__":
    main()
