"""What a person sees: a real Chromium with a camera of moving people, through the server and the engine as shipped.

Prints the rate shown, glass to glass, deadline misses, TTFF, click to picture and memory. Starts the server itself:

    .venv/bin/python tests/bench/bench_browser.py [--seconds 60] [--sessions 1] [--engine local|fake] [--json]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import psutil

# A script of its own: its folder, not the repository, is on the path.
sys.path.insert(0, str(Path(__file__).parents[2]))

from playwright.sync_api import Browser, Page, sync_playwright

from tests.e2e.chromium import chromium, figures, wait_for_figures, write_fake_camera
from tests.e2e.serving import Server, has_model

WARM_UP_S = 5.0
# The page keeps the way of each frame for this long.
MAX_SECONDS = 115
STARTS = 3
READY_TIMEOUT_S = 120
LEAVE_TIMEOUT_S = 20
CHANGES = ("comic book", "pencil sketch", "watercolour")


def main() -> int:
    """Run the benchmark; returns the exit status."""
    options = _parser().parse_args()
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        camera = write_fake_camera(Path(folder) / "people.y4m")
        server = stack.enter_context(Server(Path(folder) / "server.log", engine=options.engine))
        driver = stack.enter_context(sync_playwright())
        browser = stack.enter_context(chromium(driver, camera=camera))
        wait_until_ready(server)
        starts = [measure_start(browser, server) for _ in range(STARTS)]
        result = measure_run(browser, server, options.seconds, options.sessions, options.prompt, options.picture)
    result |= {
        "engine": options.engine,
        "sessions": options.sessions,
        "seconds": options.seconds,
        "ttff_ms": [start["ttff_ms"] for start in starts],
        "click_to_picture_ms": [start["click_to_picture_ms"] for start in starts],
        "machine": f"{psutil.cpu_count()} CPUs",
    }
    print(json.dumps(result, indent=1) if options.json else table(result))
    return 0


def wait_until_ready(server: Server) -> None:
    """Until the model is warm: starts are measured on a warm server."""
    deadline = time.monotonic() + READY_TIMEOUT_S
    while not server.is_ready():
        if time.monotonic() > deadline:
            raise TimeoutError(f"the model was not ready after {READY_TIMEOUT_S} s")
        time.sleep(0.2)


def open_page(browser: Browser, server: Server, query: str = "") -> Page:
    """The page in a window of its own, with the camera allowed, as a person has it from the second visit on."""
    context = browser.new_context(viewport={"width": 1280, "height": 800}, permissions=["camera"])
    page = context.new_page()
    page.goto(f"{server.url}/{query}")
    return page


def close_page(page: Page) -> None:
    """Leave with a goodbye."""
    page.goto("about:blank")
    page.context.close()


def measure_start(browser: Browser, server: Server) -> dict[str, Any]:
    """One click on "Start camera": the figures of the first picture, in ms."""
    page = open_page(browser, server)
    page.get_by_role("button", name="Start camera").click()
    shown = wait_for_figures(page, "s.click_to_picture_ms !== null && s.ttff_ms !== null")
    close_page(page)
    return shown


def measure_run(
    browser: Browser, server: Server, seconds: float, sessions: int, prompt: str | None, picture: Path | None
) -> dict[str, Any]:
    """Let `sessions` pages run side by side for `seconds` after a warm-up; the figures of the worst of them."""
    query = f"?{urlencode({'prompt': prompt})}" if prompt else ""
    pages = [open_page(browser, server, query) for _ in range(sessions)]
    for page in pages:
        page.get_by_role("button", name="Start camera").click()
    for page in pages:
        wait_for_figures(page, "s.restyled_shown > 0")
    pages[0].wait_for_timeout(WARM_UP_S * 1000)
    before = [figures(page) for page in pages]
    memory_start = server.memory_mb()
    psutil.cpu_percent()
    pages[0].wait_for_timeout(seconds * 1000)
    foreign = psutil.cpu_percent()
    if picture is not None:
        pages[0].screenshot(path=picture)
    after = [figures(page, window_s=seconds, fps_window_s=seconds) for page in pages]
    memory_end = server.memory_mb()
    changes = [measure_change(pages[0], words) for words in CHANGES]
    for page in pages[1:]:
        close_page(page)
    return {
        "fps": min(found["fps"] for found in after),
        "agreed_fps": min(found["agreed_fps"] for found in after),
        "latency_p50_ms": max(found["latency_p50_ms"] for found in after),
        "latency_p95_ms": max(found["latency_p95_ms"] for found in after),
        "dmr": max(miss_rate(first["server"], last["server"]) for first, last in zip(before, after, strict=True)),
        "largest_gap_ms": max(found["largest_gap_ms"] for found in after),
        "dropped": after[0]["server"]["dropped"],
        "age_ms_p50": after[0]["server"]["age_ms_p50"],
        "engine_ms_p50": after[0]["server"]["engine_ms_p50"],
        "limited_by": after[0]["limited_by"],
        "released_fps": min(
            (last["server"]["released"] - first["server"]["released"]) / seconds
            for first, last in zip(before, after, strict=True)
        ),
        "change_ms": [change["ack_ms"] for change in changes],
        "change_gap_ms": [change["gap_ms"] for change in changes],
        "leave_ms": measure_leaving(pages[0], server),
        "memory_start_mb": memory_start,
        "memory_end_mb": memory_end,
        "cpu_share": foreign / 100,
    }


def measure_change(page: Page, words: str) -> dict[str, float]:
    """A prompt change: ms until the first frame that shows it is named, and the longest gap around it."""
    ack_ms = page.evaluate(
        """async (prompt) => {
          const asked = performance.now();
          const ack = await window.livebrush.set({ prompt });
          return ack && ack.first_frame !== null ? performance.now() - asked : null;
        }""",
        words,
    )
    page.wait_for_timeout(1500)
    return {"ack_ms": ack_ms, "gap_ms": figures(page, window_s=2.5)["largest_gap_ms"]}


def measure_leaving(page: Page, server: Server) -> float:
    """Close the last page with a goodbye: ms until no seat is taken. Raises TimeoutError after 20 s."""
    left = time.monotonic()
    close_page(page)
    while server.capacity()["open"]:
        if time.monotonic() - left > LEAVE_TIMEOUT_S:
            raise TimeoutError(f"a seat is still taken {LEAVE_TIMEOUT_S} s after the page closed")
        time.sleep(0.01)
    return (time.monotonic() - left) * 1000


def miss_rate(first: dict[str, Any], last: dict[str, Any]) -> float:
    """Share of the frames due between two stats messages that were dropped or late."""

    def missed(stats: dict[str, Any]) -> float:
        return float(stats["late"] + sum(stats["dropped"].values()))

    due = last["due"] - first["due"]
    # Frames that were due before the run may be late in it.
    return min(1.0, (missed(last) - missed(first)) / float(due)) if due else 0.0


def table(result: dict[str, Any]) -> str:
    """The figures for people."""

    def middle(name: str) -> str:
        values = [value for value in result[name] if value is not None]
        return f"{statistics.median(values):.0f} ms (of {', '.join(f'{value:.0f}' for value in values)})"

    lines = [
        ("Sessions, engine, time", f"{result['sessions']}, {result['engine']}, {result['seconds']:g} s"),
        ("Rate shown", f"{result['fps']:.1f} fps of {result['agreed_fps']:g} agreed"),
        ("Rate sent by the server", f"{result['released_fps']:.1f} fps"),
        ("Glass to glass p50 / p95", f"{result['latency_p50_ms']:.0f} / {result['latency_p95_ms']:.0f} ms"),
        ("Deadline misses", f"{result['dmr'] * 100:.2f} %"),
        ("Longest gap in the picture", f"{result['largest_gap_ms']:.0f} ms"),
        ("Age at release p50", f"{result['age_ms_p50']:.0f} ms, engine {result['engine_ms_p50']:.0f} ms a chunk"),
        ("TTFF (offer to frame sent)", middle("ttff_ms")),
        ("Click to painted picture", middle("click_to_picture_ms")),
        ("Prompt change to its frame", middle("change_ms")),
        ("Longest gap at a change", middle("change_gap_ms")),
        ("Goodbye to a free seat", f"{result['leave_ms']:.0f} ms, the page's own unloading included"),
        ("Server and engine memory", f"{result['memory_start_mb']:.0f} -> {result['memory_end_mb']:.0f} MiB"),
        ("Dropped, limited by", f"{result['dropped'] or 'none'}, {result['limited_by']}"),
        ("Whole machine", f"{result['machine']}, {result['cpu_share'] * 100:.0f} % busy (browser and all others)"),
    ]
    return "\n".join(f"{name:<28}{value}" for name, value in lines)


def _seconds(text: str) -> float:
    value = float(text)
    if not 1 <= value <= MAX_SECONDS:
        raise argparse.ArgumentTypeError(f"{text} is not between 1 and {MAX_SECONDS}")
    return value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Measure what a person sees in a real Chromium.")
    parser.add_argument("--seconds", type=_seconds, default=60.0, help="length of the run (default: 60)")
    parser.add_argument("--sessions", type=int, default=1, help="pages at once (default: 1)")
    parser.add_argument(
        "--engine", choices=("local", "fake"), default="local" if has_model() else "fake", help="model or stand-in"
    )
    parser.add_argument("--prompt", help="style to paint (default: the page's own)")
    parser.add_argument(
        "--picture", type=Path, metavar="FILE.png", help="save what the first page looks like at the end"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


if __name__ == "__main__":
    sys.exit(main())
