"""Scenes, keys, MIDI and the ES module in a real Chromium; and the examples of docs/steering.md as they stand there."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from playwright.sync_api import BrowserContext, Page, expect

from tests.e2e.chromium import wait_for_figures
from tests.e2e.serving import Server

pytestmark = [pytest.mark.browser, pytest.mark.slow]

ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "docs" / "steering.md").read_text()
PATIENCE_S = 90
FAKE_MIDI = """
  window.pads = { name: "Pads" };
  navigator.requestMIDIAccess = async () => ({ inputs: new Map([["1", window.pads]]) });
  window.midi = (...bytes) => window.pads.onmidimessage({ data: Uint8Array.from(bytes) });
"""


@pytest.fixture(scope="module")
def fake(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("server") / "server.log"
    with Server(log, engine="fake", patient=True, options=("--size", "64x64", "--fps", "8")) as running:
        yield running


@pytest.fixture
def page(windows: Callable[[], BrowserContext], fake: Server) -> Iterator[Page]:
    context = windows()
    context.add_init_script(FAKE_MIDI)
    made = context.new_page()
    made.set_default_timeout(PATIENCE_S * 1000)
    made.goto(f"{fake.url}/?autostart=1&source=clip&prompt=chalk")
    wait_for_figures(made, "s.state === 'live'", timeout_s=PATIENCE_S)
    yield made


def until_prompt(page: Page, prompt: str) -> None:
    page.wait_for_function("prompt => window.livebrush.settings.prompt === prompt", arg=prompt)


def until_scene(page: Page, server: Server, prompt: str, index: int) -> None:
    """Until the one session of that prompt stands at that scene; the page may know a little before the list does."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        sessions = json.loads(server.get("/api/v1/sessions"))["sessions"]
        found = [one["scene"]["index"] for one in sessions if one["params"]["prompt"] == prompt]
        if found == [index]:
            return
        assert time.monotonic() < deadline, sessions
        page.wait_for_timeout(100)


def test_a_scene_list_is_written_played_by_the_server_and_kept(page: Page, tmp_path: Path, fake: Server) -> None:
    page.locator("#scenes-details > summary").click()
    expect(page.locator("#scenes p.note")).to_have_text("")
    page.get_by_role("button", name="Add this style").click()
    file = tmp_path / "scenes.json"
    scenes = [{"prompt": "ink", "hold_s": 1}, {"prompt": "neon", "name": "night"}, {"prompt": "oil"}]
    file.write_text(json.dumps({"scenes": scenes}))
    expect(page.get_by_label("Style of scene 1")).to_have_value("chalk")
    page.locator("#scenes input[type=file]").set_input_files(str(file))
    expect(page.locator("#scenes li")).to_have_count(3)
    page.get_by_role("button", name="Play", exact=True).click()
    until_prompt(page, "neon")
    expect(page.locator("#scenes li").nth(1)).to_have_attribute("data-stands", "")
    expect(page.locator("#prompt")).to_have_value("neon")
    page.get_by_role("button", name="Go to scene 3").click()
    until_prompt(page, "oil")
    page.get_by_role("button", name="Next", exact=True).click()
    expect(page.locator("#scenes p.note")).to_contain_text("no next scene")
    page.get_by_label("Style of scene 2").fill("mosaic")
    page.keyboard.press("Tab")
    page.get_by_role("button", name="Previous", exact=True).click()
    until_prompt(page, "mosaic")
    until_scene(page, fake, "mosaic", 1)
    with page.expect_download() as download:
        page.get_by_role("button", name="Export").click()
    assert json.loads(download.value.path().read_text())["scenes"][1] == {"prompt": "mosaic", "name": "night"}
    file.write_text("[]")
    page.locator("#scenes input[type=file]").set_input_files(str(file))
    expect(page.locator("#scenes p.note")).to_contain_text("needs")
    page.reload()
    expect(page.locator("#scenes li")).to_have_count(3)


def test_keys_steer_but_never_while_somebody_types(page: Page) -> None:
    page.evaluate("() => window.livebrush.set({ strength: 1 })")
    page.locator("h1").click()
    page.keyboard.press("[")
    page.wait_for_function("() => Math.abs(window.livebrush.settings.strength - 0.9) < 1e-6")
    page.keyboard.press("o")
    page.wait_for_function("() => window.livebrush.session.bypass")
    page.keyboard.press("/")
    expect(page.locator("#prompt")).to_be_focused()
    page.keyboard.type("o[?v")
    expect(page.locator("#prompt")).to_have_value("o[?v")
    page.keyboard.press("Escape")
    assert page.evaluate("() => window.livebrush.session.bypass && window.livebrush.settings.strength < 1")
    page.keyboard.press("?")
    expect(page.locator("#help")).to_be_visible()
    expect(page.locator("#help")).to_contain_text("next scene")
    page.keyboard.press("o")
    assert page.evaluate("() => window.livebrush.session.bypass")
    page.keyboard.press("Escape")
    expect(page.locator("#help")).to_be_hidden()


def test_midi_moves_strength_and_scenes_and_learns(page: Page) -> None:
    page.locator("#midi-details > summary").click()
    page.get_by_role("button", name="Connect MIDI").click()
    expect(page.locator("#midi")).to_contain_text("Listening to Pads.")
    page.evaluate("() => midi(0xb3, 1, 64)")
    page.wait_for_function("() => window.livebrush.settings.strength === 0.5")
    page.get_by_role("button", name="Learn Strength").click()
    page.evaluate("() => midi(0xb0, 20, 5)")
    expect(page.locator("#midi output").first).to_have_text("CC 20")
    page.evaluate("() => { midi(0xb0, 1, 127); midi(0xb0, 20, 0); midi(0xf8); midi(0x90, 36, 0); }")
    page.wait_for_function("() => window.livebrush.settings.strength === 0")
    page.evaluate("""() => localStorage.setItem("livebrush.scenes", JSON.stringify(
        { scenes: [{ prompt: "ink" }, { prompt: "neon" }], loop: false }))""")
    page.reload()
    wait_for_figures(page, "s.state === 'live'", timeout_s=PATIENCE_S)
    page.locator("#midi-details > summary").click()
    page.get_by_role("button", name="Connect MIDI").click()
    expect(page.locator("#midi output").first).to_have_text("CC 20")
    page.evaluate("() => midi(0x91, 37, 100)")
    until_prompt(page, "neon")


def examples(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", GUIDE, re.MULTILINE | re.DOTALL)


def test_the_guides_page_runs(windows: Callable[[], BrowserContext], fake: Server) -> None:
    (html,) = examples("html")
    page = windows().new_page()
    page.set_default_timeout(PATIENCE_S * 1000)
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    # An inline script needs a page of one's own: the server's own pages allow none.
    page.route("**/example.html", lambda route: route.fulfill(body=html, content_type="text/html"))
    page.goto(fake.url + "/example.html")
    page.wait_for_function("() => Number(document.body.dataset.shownSince) >= 0 && document.title.endsWith(' ms')")
    page.wait_for_function("() => document.getElementById('painted').videoWidth > 0")
    assert errors == []


@pytest.mark.parametrize("number", [0, 1])
def test_the_guides_programs_run(fake: Server, number: int) -> None:
    program = examples("python")[number].replace("http://127.0.0.1:8080", fake.url)
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_S, check=False
    )
    assert done.returncode == 0, done.stderr
    assert ("neon since frame" if number == 0 else "not_live") in done.stdout


def test_the_guides_scene_list_is_one_that_the_server_takes() -> None:
    from server.control import SceneList

    (text,) = examples("json")
    assert SceneList.model_validate_json(text).loop
