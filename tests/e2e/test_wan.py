"""A Wan model with random weights, from `livebrush serve` to the page: loaded while the camera passes, then painted."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from playwright.sync_api import BrowserContext, expect

from tests.e2e.chromium import figures, wait_for_figures
from tests.e2e.serving import Server

pytestmark = [pytest.mark.browser, pytest.mark.slow]

expect.set_options(timeout=60_000)

WIDTH, HEIGHT, FPS, STEPS = 96, 64, 16, 2
# In a process of its own, so that torch is not loaded beside the browser's driver.
WRITE = """
import sys
from pathlib import Path
from engine.config import ServingProfile
from engine.wan.untrained import write_untrained_wan
serving = ServingProfile(fps={fps}, sizes=(({width}, {height}), (64, 64)), first_chunk_frames=5, steps={steps})
write_untrained_wan(Path(sys.argv[1]), name="wan-small", serving=serving)
"""
# What a person sees over the camera, noted whenever it changes.
WATCH_LOADING = """() => {
  window.seen = [];
  const note = () => {
    const on = document.getElementById("loading").classList.contains("on");
    const line = `${document.getElementById("state").textContent} | ${on} | `
      + `${document.getElementById("loading-percent").textContent}`;
    if (window.seen.at(-1) !== line) window.seen.push(line);
  };
  const everything = { subtree: true, childList: true, characterData: true, attributes: true };
  new MutationObserver(note).observe(document.body, everything);
}"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "wan-small"
    code = WRITE.format(fps=FPS, width=WIDTH, height=HEIGHT, steps=STEPS)
    subprocess.run([sys.executable, "-c", code, str(folder)], check=True, timeout=120)
    return folder


@pytest.fixture(params=["sequential", "batch"])
def server(request: pytest.FixtureRequest, model: Path, tmp_path: Path) -> Iterator[Server]:
    """The server as users start it, told nothing but the model, the device and the mode."""
    options = ("--model", str(model), "--devices", "cpu", "--mode", request.param)
    with Server(tmp_path / "server.log", engine="local", options=options, patient=True) as running:
        yield running


def test_wan_is_loaded_before_ones_eyes_and_then_paints_at_its_own_size_and_rate(
    windows: Callable[[], BrowserContext], server: Server
) -> None:
    page = windows().new_page()
    page.set_default_timeout(60_000)
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(f"{server.url}/")
    page.evaluate(WATCH_LOADING)
    page.get_by_role("button", name="Start camera").click()

    passing = wait_for_figures(page, "s.state === 'loading' && s.frames_shown > 4 && s.server")
    assert passing["restyled_shown"] == 0 and passing["server"]["state"] == "passthrough"
    # Agreed before the cost of a chunk on this machine is known: the model's own rate.
    assert passing["agreed_fps"] == FPS
    expect(page.locator("#loading")).to_have_class("loading on")
    expect(page.locator("#restyled-caption")).to_have_text("Camera")

    shown = wait_for_figures(page, "s.state === 'live' && s.restyled_shown >= 24", timeout_s=120)
    expect(page.locator("#loading")).to_have_class("loading")
    seen = page.evaluate("() => window.seen")
    assert any("Model loading" in line and "| true |" in line and "%" in line for line in seen), seen
    percents = [int(line.rpartition("| ")[2].removesuffix(" %")) for line in seen if line.endswith("%")]
    assert percents == sorted(percents) and len(set(percents)) >= 2, seen

    (told,) = json.loads(server.get("/api/v1/models"))["models"]
    assert (told["name"], told["size"], told["steps"]) == ("wan-small", f"{WIDTH}x{HEIGHT}", STEPS)
    assert 0 < shown["agreed_fps"] <= FPS
    size = page.evaluate(
        "() => { const v = document.getElementById('restyled'); return [v.videoWidth, v.videoHeight]; }"
    )
    assert size == [WIDTH, HEIGHT]
    expect(page.locator("#steps-value")).to_have_text(str(STEPS))

    ack = page.evaluate("() => window.livebrush.set({ prompt: 'ink wash on grey paper', transition_s: 1 })")
    assert ack["params"]["prompt"] == "ink wash on grey paper" and ack["params"]["steps"] == STEPS
    assert ack["first_frame"] > shown["frame_index"] and ack["first_chunk"] > 0
    after = wait_for_figures(page, f"s.frame_index >= {ack['first_frame'] + 8}")
    assert after["session"] == shown["session"]
    mixed = page.evaluate(
        "() => window.livebrush.set({ blend: [{ text: 'neon', weight: 2 }, { text: 'ink', weight: 1 }], steps: 1 })"
    )
    assert mixed["first_chunk"] > ack["first_chunk"] and len(mixed["params"]["blend"]) == 2
    assert figures(page)["server"]["withheld"].keys() <= {"text_pending"}
    assert errors == []


def test_a_model_that_does_not_load_is_told_over_the_moving_camera(
    windows: Callable[[], BrowserContext], model: Path, tmp_path: Path
) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(model, damaged)
    weights = damaged / "transformer.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with Server(tmp_path / "server.log", engine="local", options=("--model", str(damaged))) as server:
        page = windows().new_page()
        page.set_default_timeout(60_000)
        page.goto(f"{server.url}/?autostart=1")
        expect(page.locator("#state")).to_have_text("Model not running")
        expect(page.locator("#loading-text")).to_contain_text("transformer.safetensors has")
        before = figures(page)["frames_shown"]
        wait_for_figures(page, f"s.frames_shown > {before + 8} && s.server.state === 'passthrough'")
        page.goto("about:blank")
