"""A real Chromium with a fake camera of moving people, for the browser tests and the benchmark."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import av
from playwright.sync_api import Browser, Page, Playwright

CLIP = Path(__file__).parents[2] / "web" / "demo" / "people.mp4"
CAMERA_FRAMES = 150
CAMERA_FPS = 30
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = (
    "--no-sandbox",  # containers run it as root
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--allow-loopback-in-peer-connection",  # a machine without a network has no other address
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--autoplay-policy=no-user-gesture-required",
)


def chromium_path() -> str | None:
    """The browser to drive: $LIVEBRUSH_CHROMIUM, or the system's; None leaves it to playwright's own."""
    if given := os.environ.get("LIVEBRUSH_CHROMIUM"):
        return given
    return next((path for name in NAMES if (path := shutil.which(name))), None)


def write_fake_camera(path: Path, *, clip: Path = CLIP, frames: int = CAMERA_FRAMES) -> Path:
    """Write the first frames of the bundled clip as the Y4M file that Chromium plays as its camera, 30 a second."""
    with av.open(str(clip)) as source, path.open("wb") as out:
        video = source.streams.video[0]
        out.write(f"YUV4MPEG2 W{video.width} H{video.height} F{CAMERA_FPS}:1 Ip A1:1 C420jpeg\n".encode())
        for count, frame in enumerate(source.decode(video)):
            if count == frames:
                break
            out.write(b"FRAME\n" + frame.to_ndarray(format="yuv420p").tobytes())
    return path


@contextmanager
def chromium(driver: Playwright, *, camera: Path | None, allow: bool = True) -> Iterator[Browser]:
    """A headless browser.

    Args:
        camera: the file it plays as its camera; None for a machine that has no camera.
        allow: whether a page that asks for the camera gets it; a page that may not is refused as by a person.
    """
    args = list(FLAGS)
    if camera is not None:
        args += ["--use-fake-device-for-media-stream", f"--use-file-for-fake-video-capture={camera}"]
    if allow:
        args.append("--use-fake-ui-for-media-stream")
    browser = driver.chromium.launch(executable_path=chromium_path(), headless=True, args=args)
    try:
        yield browser
    finally:
        browser.close()


def figures(page: Page, **options: float) -> dict[str, Any]:
    """What `window.livebrush.stats()` returns now."""
    found: dict[str, Any] = page.evaluate("options => window.livebrush.stats(options)", options)
    return found


def wait_for_figures(page: Page, condition: str, *, timeout_s: float = 60) -> dict[str, Any]:
    """Wait until `condition`, a JavaScript expression over the figures `s`, holds; return them."""
    try:
        page.wait_for_function(
            f"() => {{ const s = window.livebrush?.stats(); return Boolean(s && ({condition})); }}",
            timeout=timeout_s * 1000,
            polling=100,
        )
    except Exception as error:
        error.add_note(f"waited for {condition}; the page shows {figures(page)}")
        raise
    return figures(page)
