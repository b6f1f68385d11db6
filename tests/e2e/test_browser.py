"""The page in a real Chromium with a camera of moving people, against the server as users start it."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import BrowserContext, Page, Playwright, expect

from tests.e2e.chromium import chromium, figures, wait_for_figures
from tests.e2e.serving import Server

pytestmark = [pytest.mark.browser, pytest.mark.slow]

expect.set_options(timeout=60_000)

RESTYLED = "s.state === 'live' && s.restyled_shown >= 12"
# No frozen picture: far above the worst interval of a busy machine, far below a reset of the stream.
MAX_GAP_MS = 2_000
MEAN_DIFFERENCE = """() => {
  const [a, b] = ["original", "restyled"].map((id) => {
    const video = document.getElementById(id);
    const canvas = Object.assign(document.createElement("canvas"), { width: 32, height: 32 });
    const side = Math.min(video.videoWidth, video.videoHeight);
    const [x, y] = [(video.videoWidth - side) / 2, (video.videoHeight - side) / 2];
    const pen = canvas.getContext("2d");
    pen.drawImage(video, x, y, side, side, 0, 0, 32, 32);
    return pen.getImageData(0, 0, 32, 32).data;
  });
  return a.reduce((sum, value, i) => sum + Math.abs(value - b[i]), 0) / a.length;
}"""


LOUDEST = """async () => {
  const hearing = new AudioContext();
  const analyser = hearing.createAnalyser();
  hearing.createMediaStreamSource(document.getElementById("audio").srcObject).connect(analyser);
  const samples = new Float32Array(analyser.fftSize);
  let loudest = 0;
  // The fake microphone beeps once a second.
  for (let turn = 0; turn < 600 && loudest < 0.01; turn += 1) {
    await new Promise((done) => setTimeout(done, 20));
    analyser.getFloatTimeDomainData(samples);
    loudest = Math.max(loudest, ...samples.map(Math.abs));
  }
  await hearing.close();
  return loudest;
}"""


def open_page(context: BrowserContext, server: Server, query: str = "") -> Page:
    page = context.new_page()
    page.set_default_timeout(60_000)
    page.goto(f"{server.url}/{query}")
    return page


def leave(page: Page) -> None:
    """As a person who closes the tab: the page may say goodbye."""
    with page.expect_event("close"):
        page.close(run_before_unload=True)


def wait_until_empty(server: Server) -> None:
    deadline = time.monotonic() + 60
    while (capacity := server.capacity())["open"]:
        assert time.monotonic() < deadline, f"sessions are left: {capacity}, ended {server.ended()}"
        time.sleep(0.1)


def test_a_click_on_start_shows_the_camera_restyled_and_measures_it(context: BrowserContext, server: Server) -> None:
    page = open_page(context, server)
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))

    page.get_by_role("button", name="Start camera").click()
    wait_for_figures(page, RESTYLED)
    shown = wait_for_figures(page, "s.latency_p50_ms !== null && s.ttff_ms !== null && s.click_to_picture_ms !== null")

    assert shown["fps"] > 0
    assert 0 < shown["latency_p50_ms"] <= shown["latency_p95_ms"]
    assert 0 <= shown["on_time"] <= 1
    # The click is before the offer, and the screen after the encoder.
    assert 0 < shown["ttff_ms"] < shown["click_to_picture_ms"]
    assert page.evaluate(MEAN_DIFFERENCE) > 5
    expect(page.locator("#state")).to_have_text("Live")
    expect(page.locator("#verdict-text")).to_contain_text("camera to screen")
    assert errors == []


def test_the_stage_budget_adds_up_to_the_way_from_camera_to_screen(context: BrowserContext, server: Server) -> None:
    page = open_page(context, server, "?autostart=1&source=clip")
    wait_for_figures(page, RESTYLED)
    page.get_by_text("Where the time goes").click()
    expect(page.locator("#budget-rows tr.total")).to_be_visible()

    rows = page.locator("#budget-rows tr td:last-child").all_text_contents()
    *legs, total = [int(text.removesuffix(" ms").replace("\N{MINUS SIGN}", "-")) for text in rows]
    # Each is rounded by itself.
    assert abs(sum(legs) - total) <= len(legs)


def test_a_prompt_is_acknowledged_with_a_frame_that_is_then_shown_without_a_gap(
    context: BrowserContext, server: Server
) -> None:
    page = open_page(context, server, "?autostart=1&source=camera&prompt=watercolour")
    before = wait_for_figures(page, RESTYLED)

    ack = page.evaluate("() => window.livebrush.set({ prompt: 'charcoal drawing', strength: 0.8 })")

    assert ack["params"]["prompt"] == "charcoal drawing"
    assert ack["params"]["strength"] == 0.8
    assert ack["first_frame"] > before["frame_index"]
    after = wait_for_figures(page, f"s.frame_index >= {ack['first_frame'] + 4}")
    assert after["session"] == before["session"]
    assert after["server"]["state"] == "restyled"
    assert figures(page, window_s=3)["largest_gap_ms"] < MAX_GAP_MS
    expect(page.locator("#prompt-note")).to_contain_text(f"since frame {ack['first_frame']}")
    expect(page.locator("#understood")).to_have_text("Understood as: Pencil")
    page.evaluate("() => window.livebrush.set({ prompt: 'a warm comic drawn in neon' })")
    expect(page.locator("#understood")).to_have_text("Understood as: Comic with Neon, warm")
    page.evaluate("() => window.livebrush.set({ prompt: 'quantum physics' })")
    expect(page.locator("#understood")).to_have_text(re.compile(r"Nearest style: .+ \(weak match\)"))
    # Of this model another seed gives no other picture.
    expect(page.locator("#seed")).to_be_hidden()


def test_a_prompt_over_the_bound_is_refused_by_name_and_the_old_one_stays(
    context: BrowserContext, server: Server
) -> None:
    page = open_page(context, server, "?autostart=1&source=clip&prompt=watercolour")
    wait_for_figures(page, RESTYLED)

    text = page.evaluate("() => window.livebrush.set({ prompt: 'x'.repeat(5000) }).catch((error) => error.message)")

    assert "1000" in text
    expect(page.locator("#prompt")).to_have_value("watercolour")
    assert figures(page)["state"] == "live"


def test_two_pages_have_their_own_prompts_and_share_the_machine_evenly(
    windows: Callable[[], BrowserContext], server: Server
) -> None:
    # Two windows: a tab behind another one is drawn once a second.
    pages = [
        open_page(windows(), server, f"?autostart=1&source=clip&prompt={prompt}") for prompt in ("mosaic", "pencil")
    ]
    found = [wait_for_figures(page, RESTYLED) for page in pages]

    assert server.capacity()["open"] == 2
    assert found[0]["session"] != found[1]["session"]
    for page in pages:
        wait_for_figures(page, f"s.server.sessions === 2 && s.agreed_fps === {server.capacity()['fps']}")
    first = pages[0].evaluate("() => window.livebrush.set({ prompt: 'oil painting' })")
    second = pages[1].evaluate("() => window.livebrush.set({ strength: 0.5 })")
    assert (first["params"]["prompt"], second["params"]["prompt"]) == ("oil painting", "pencil")


@pytest.mark.parametrize("way", ["close the tab", "go elsewhere", "stop"])
def test_leaving_frees_the_seat_with_a_goodbye(context: BrowserContext, server: Server, way: str) -> None:
    page = open_page(context, server, "?autostart=1&source=camera")
    wait_for_figures(page, RESTYLED)
    before = server.ended()

    if way == "close the tab":
        leave(page)
    elif way == "go elsewhere":
        page.goto("about:blank")
    else:
        page.get_by_role("button", name="Stop").click()
        expect(page.locator("#state")).to_have_text("Stopped")
    wait_until_empty(server)

    after = server.ended()
    assert after.get("vanished", 0) == before.get("vanished", 0)
    assert sum(after.values()) == sum(before.values()) + 1


@pytest.mark.parametrize("end", ["stopped", "crashed"])
def test_a_server_that_is_gone_is_named_and_rejoined_with_the_same_settings(
    context: BrowserContext, tmp_path: Path, end: str
) -> None:
    with Server(tmp_path / "server.log", engine="fake", patient=True) as server:
        page = open_page(context, server, "?autostart=1&source=clip&prompt=ink+wash&strength=0.75")
        before = wait_for_figures(page, RESTYLED)

        server.stop() if end == "stopped" else server.kill()
        wait_for_figures(page, "s.state === 'reconnecting' || s.problem === 'server_gone'")
        expect(page.get_by_role("alert")).to_contain_text("reconnects by itself")

        server.start()
        after = wait_for_figures(page, f"{RESTYLED} && s.session !== '{before['session']}'")
        ack = page.evaluate("() => window.livebrush.set({ steps: 2 })")

        assert after["problem"] is None
        assert (ack["params"]["prompt"], ack["params"]["strength"]) == ("ink wash", 0.75)
        expect(page.get_by_role("alert")).to_be_hidden()


def test_a_full_server_is_waited_for_and_joined_when_a_seat_is_free(
    windows: Callable[[], BrowserContext], tmp_path: Path
) -> None:
    with Server(tmp_path / "server.log", engine="fake", patient=True, LIVEBRUSH_MAX_SESSIONS="1") as server:
        first = open_page(windows(), server, "?autostart=1&source=clip")
        wait_for_figures(first, RESTYLED)
        second = open_page(windows(), server, "?autostart=1&source=clip")
        wait_for_figures(second, "s.state === 'waiting'")
        expect(second.get_by_role("alert")).to_contain_text("The server is full")

        leave(first)

        wait_for_figures(second, RESTYLED)


def test_a_refused_camera_is_told_with_its_cure_and_the_clip_still_works(
    driver: Playwright, camera_file: Path, server: Server
) -> None:
    with chromium(driver, camera=camera_file, allow=False) as browser:
        page = open_page(browser.new_context(), server)
        page.get_by_role("button", name="Start camera").click()

        expect(page.get_by_role("alert")).to_contain_text("The camera is blocked")
        expect(page.get_by_role("alert")).to_contain_text("address bar")
        assert figures(page)["problem"] == "permission_denied"

        page.get_by_role("button", name="Use the demo clip").click()
        wait_for_figures(page, RESTYLED)
        leave(page)


def test_a_machine_without_a_camera_is_told_so(driver: Playwright, server: Server) -> None:
    with chromium(driver, camera=None) as browser:
        page = open_page(browser.new_context(), server, "?autostart=1")

        expect(page.get_by_role("alert")).to_contain_text("No camera found")
        assert figures(page)["state"] == "failed"


def test_a_file_that_is_no_video_is_told_so(context: BrowserContext, server: Server, tmp_path: Path) -> None:
    file = tmp_path / "notes.mp4"
    file.write_text("not a video")
    page = open_page(context, server)

    page.locator("#file").set_input_files(file)

    expect(page.get_by_role("alert")).to_contain_text("“notes.mp4” is not a video")
    assert figures(page)["problem"] == "no_video"


def test_changing_the_source_keeps_the_session(context: BrowserContext, server: Server) -> None:
    page = open_page(context, server, "?autostart=1&source=clip")
    before = wait_for_figures(page, RESTYLED)

    page.evaluate("() => window.livebrush.start('camera')")

    after = wait_for_figures(page, f"s.frame_index > {before['frame_index'] + 12}")
    assert after["session"] == before["session"]
    expect(page.get_by_role("group", name="Source").get_by_role("button", name="Camera")).to_have_attribute(
        "aria-pressed", "true"
    )


def test_show_original_and_keys(context: BrowserContext, server: Server) -> None:
    page = open_page(context, server, "?autostart=1&source=camera")
    wait_for_figures(page, RESTYLED)

    page.keyboard.press("o")
    wait_for_figures(page, "s.server.state === 'bypass'")
    page.get_by_role("button", name="Show original").click()
    wait_for_figures(page, "s.server.state === 'restyled'")
    page.keyboard.press("/")

    expect(page.locator("#prompt")).to_be_focused()


def test_two_styles_are_mixed_by_a_slider_and_parted_again(context: BrowserContext, server: Server) -> None:
    page = open_page(context, server, "?autostart=1&source=clip")
    wait_for_figures(page, RESTYLED)
    expect(page.locator("#mix-row")).to_be_hidden()

    page.get_by_role("button", name="Mix two").click()
    page.locator(".tile").nth(4).click()
    expect(page.locator("#prompt-note")).to_contain_text(" + ")
    expect(page.locator("#mix-names")).to_contain_text(" with ")
    page.locator("#mix-share").fill("0.2")
    expect(page.locator("#mix-value")).to_have_text("20 %")
    page.locator("#transition").fill("2")
    expect(page.locator("#transition-value")).to_have_text("in 2 s")
    params = in_force(page, 0.9, lambda params: bool(params["blend"]) and params["blend"][1]["weight"] < 0.3)
    assert [round(part["weight"], 2) for part in params["blend"]] == [0.8, 0.2]
    assert params["transition_s"] == 2

    page.get_by_role("button", name="Mix two").click()
    expect(page.locator("#mix-row")).to_be_hidden()
    assert in_force(page, 1.0, lambda params: not params["blend"])["blend"] == []


def in_force(page: Page, strength: float, awaited: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    """The parameters that the server acknowledges; sliders tell of themselves after a pause, so asked for a while."""
    for _ in range(50):
        params: dict[str, Any] = page.evaluate(f"() => window.livebrush.set({{ strength: {strength} }})")["params"]
        if awaited(params):
            break
        page.wait_for_timeout(100)
    return params


def test_the_microphone_comes_back_only_when_it_was_chosen(context: BrowserContext, server: Server) -> None:
    page = open_page(context, server, "?autostart=1&source=camera")
    wait_for_figures(page, RESTYLED)
    assert page.locator("#audio").evaluate("audio => audio.muted")

    page.get_by_text("Microphone").click()

    assert page.evaluate(LOUDEST) >= 0.01
    assert not page.locator("#audio").evaluate("audio => audio.muted")
