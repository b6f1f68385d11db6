"""The record button in a real Chromium: what it records plays, and it is not there where nothing can be recorded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import av
import pytest
from playwright.sync_api import BrowserContext, expect

from tests.e2e.chromium import wait_for_figures
from tests.e2e.serving import Server

pytestmark = [pytest.mark.browser, pytest.mark.slow]

PATIENCE_S = 90


def test_a_person_records_what_they_see(windows: Callable[[], BrowserContext], tmp_path: Path) -> None:
    folder = tmp_path / "recordings"
    options = ("--size", "64x64", "--fps", "8", "--recordings", str(folder))
    with Server(tmp_path / "server.log", engine="fake", patient=True, options=options) as server:
        page = windows().new_page()
        page.set_default_timeout(PATIENCE_S * 1000)
        page.goto(f"{server.url}/?autostart=1&source=clip&prompt=chalk")
        wait_for_figures(page, "s.state === 'live'", timeout_s=PATIENCE_S)
        button, note = page.locator("#record"), page.locator("#record-field .note")
        button.click()
        expect(button).to_have_text("Stop recording", timeout=PATIENCE_S * 1000)
        expect(note).to_contain_text("Recording.")
        wait_for_figures(page, "s.frames_shown > 40", timeout_s=PATIENCE_S)
        button.click()
        expect(button).to_have_text("Record", timeout=PATIENCE_S * 1000)
        expect(note).to_contain_text("The recording is finished.", timeout=PATIENCE_S * 1000)
        (path,) = folder.rglob("output.mp4")
        with av.open(str(path)) as container:
            assert sum(1 for _ in container.decode(video=0)) > 20
        page.goto("about:blank")


def test_no_button_where_nothing_can_be_recorded(windows: Callable[[], BrowserContext], tmp_path: Path) -> None:
    with Server(tmp_path / "server.log", engine="fake", options=("--size", "64x64")) as server:
        page = windows().new_page()
        page.goto(server.url)
        expect(page.locator("#ready")).to_contain_text("ready", timeout=PATIENCE_S * 1000)
        expect(page.locator("#record-field")).to_be_hidden()
        page.goto("about:blank")
