"""Make the pictures of ways in and out that docs/obs.md does not show: publishing, a token, recording, scenes, no UDP.

    .venv/bin/python scripts/ways_pictures.py

Starts servers with the embedded model and a Chromium with the demo clip as its camera; takes about a minute.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

from PIL import Image
from playwright.sync_api import Locator, Page, sync_playwright

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from tests.e2e.chromium import chromium, wait_for_figures, write_fake_camera  # noqa: E402
from tests.e2e.serving import Server, has_model  # noqa: E402

PICTURES = ROOT / "docs" / "pictures"
COLOURS = 160
LIVE = "s.restyled_shown > 40"


def shoot(what: Page | Locator, name: str) -> None:
    """Write docs/pictures/NAME, small: a PNG of few colours, or a JPEG."""
    path = PICTURES / name
    if path.suffix == ".jpg":
        what.screenshot(path=path, type="jpeg", quality=80)
        return
    what.screenshot(path=path)
    with Image.open(path) as picture:
        picture.convert("RGB").quantize(COLOURS).save(path, optimize=True)


def ready(server: Server) -> Server:
    """The server, once its model renders."""
    while not server.is_ready():
        time.sleep(0.5)
    return server


def main() -> None:
    """Write them all."""
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as driver:
        engine = "local" if has_model() else "fake"
        options = ("--recordings", str(Path(folder) / "recordings"))
        camera = write_fake_camera(Path(folder) / "people.y4m")
        with (
            Server(Path(folder) / "log", engine=engine, patient=True, options=options) as server,
            Server(Path(folder) / "other", engine="fake", LIVEBRUSH_TOKENS__PUBLISH="p" * 32) as guarded,
            chromium(driver, camera=camera) as browser,
        ):
            ready(server)
            page = browser.new_context(permissions=["camera"]).new_page()
            page.set_viewport_size({"width": 640, "height": 720})
            page.goto(f"{server.url}/publish.html?stream=studio&prompt=oil+painting")
            page.get_by_role("button", name="Publish camera").click()
            page.wait_for_selector("#state[data-tone=live], #state[data-tone=good]", timeout=60_000)
            time.sleep(2)
            shoot(page, "publish.jpg")
            page.close()

            page = browser.new_page(viewport={"width": 1280, "height": 900})
            page.goto(f"{server.url}/?autostart=1&source=clip&prompt=watercolour+painting&transport=socket")
            wait_for_figures(page, LIVE)
            page.locator("#details summary").click()
            time.sleep(1)
            shoot(page.locator("#details"), "socket.png")
            page.locator("#record").click()
            page.get_by_role("button", name="Stop recording").wait_for()
            time.sleep(1)
            shoot(page.locator("#record-field"), "recording.png")
            page.locator("#record").click()
            page.locator("#scenes-details summary").click()
            for style in ("neon", "ink wash"):
                page.get_by_role("button", name="Add this style").click()
                page.evaluate("prompt => window.livebrush.set({ prompt })", style)
            page.get_by_role("button", name="Add this style").click()
            time.sleep(1)
            shoot(page.locator("#scenes-details"), "scenes.png")
            page.close()

            page = browser.new_page(viewport={"width": 900, "height": 620})
            page.goto(f"{guarded.url}/?autostart=1&source=clip")
            page.get_by_role("dialog").wait_for()
            shoot(page, "token.png")


if __name__ == "__main__":
    main()
