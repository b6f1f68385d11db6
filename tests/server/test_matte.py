"""The person cut out of a stream: pixels, the matting process and its faults, and who gets which picture."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import av
import cv2
import numpy as np
import pytest
from aiortc.codecs import CODECS
from numpy.typing import NDArray

from server.broadcast import Broadcast
from server.errors import BadRequest
from server.frames import OutgoingFrame
from server.matte import Cutter, Form, MatteProcess, asked_form, before_green, cleaned, packed, refined
from server.matte_process import HEIGHT, MATTE_BYTES, MODEL, PICTURE_BYTES, WIDTH, rest_s
from server.settings import MediaSettings
from server.viewers import Pictures

PATIENCE_S = 60.0
CLIP = Path(__file__).parents[2] / "web" / "demo" / "people.mp4"
GREY = np.full((64, 64, 3), 90, np.uint8)
LEFT_HALF = f"""import sys
row = bytes([255] * {WIDTH // 2} + [0] * {WIDTH // 2})
while len(sys.stdin.buffer.read({PICTURE_BYTES})) == {PICTURE_BYTES}:
    sys.stdout.buffer.write(row * {HEIGHT})
    sys.stdout.buffer.flush()
"""
"""A matting process that takes everything on the left for a person."""


def child(code: str) -> tuple[str, ...]:
    return (sys.executable, "-c", code)


@pytest.fixture
def executor() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1) as made:
        yield made


@pytest.fixture
async def matte() -> AsyncIterator[MatteProcess]:
    process = MatteProcess(child(LEFT_HALF))
    yield process
    await process.close()


def people() -> NDArray[np.uint8]:
    with av.open(str(CLIP)) as clip:
        return np.asarray(next(clip.decode(video=0)).to_ndarray(format="rgb24"), np.uint8)


# --- pixels


def test_a_packed_picture_has_its_matte_below() -> None:
    matte = np.arange(64 * 64, dtype=np.uint32).reshape(64, 64).astype(np.uint8)
    both = packed(GREY, matte)
    assert both.shape == (128, 64, 3)
    assert (both[:64] == GREY).all() and (both[64:] == matte[..., None]).all()


def test_before_green_only_the_person_is_left() -> None:
    matte = np.zeros((64, 64), np.uint8)
    matte[:, :32] = 255
    picture = before_green(GREY, matte)
    assert (picture[:, :32] == 90).all() and (picture[:, 32:] == (0, 255, 0)).all()


def test_an_edge_of_the_matte_moves_to_the_edge_of_the_picture() -> None:
    guide = np.zeros((256, 256, 3), np.uint8)
    guide[:, :126] = 200
    coarse = np.zeros((64, 64), np.uint8)
    coarse[:, :32] = 255  # two pixels of the picture too far
    fine = refined(coarse, guide)[128].astype(int)
    true = np.where(np.arange(256) < 126, 255, 0)
    assert np.abs(fine - true).sum() < 0.6 * np.abs(np.repeat(coarse[32], 4) - true).sum()
    assert fine[125] - fine[126] > 100
    assert (fine[:112] == 255).all() and (fine[144:] == 0).all()


def test_the_old_background_does_not_shine_through_a_soft_edge() -> None:
    picture = np.full((256, 256, 3), 250, np.uint8)
    picture[:, :128] = (120, 40, 40)
    matte = np.zeros((256, 256), np.uint8)
    matte[:, :126] = 255
    matte[:, 126:130] = 128  # over the border
    clean = cleaned(picture, matte)
    assert np.abs(clean[128, 126:130].astype(int) - (120, 40, 40)).max() < 40
    assert (clean[:, :126] == (120, 40, 40)).all()


@pytest.mark.parametrize(
    ("query", "form"), [({}, Form.PLAIN), ({"alpha": "packed"}, Form.PACKED), ({"key": "green"}, Form.GREEN)]
)
def test_a_viewer_asks_for_a_form_in_its_url(query: dict[str, str], form: Form) -> None:
    assert asked_form(query) is form


@pytest.mark.parametrize("query", [{"alpha": "yes"}, {"key": "blue"}, {"x": "1"}, {"alpha": "packed", "key": "green"}])
def test_what_is_not_there_is_refused_with_what_is(query: dict[str, str]) -> None:
    with pytest.raises(BadRequest, match="alpha=packed and key=green"):
        asked_form(query)


# --- the process


def test_the_process_rests_for_its_share() -> None:
    assert rest_s(0.02, 0.5) == pytest.approx(0.02)
    assert rest_s(0.02, 0.25) == pytest.approx(0.06)


async def test_the_network_finds_the_person() -> None:
    assert MODEL.is_file()
    process = MatteProcess()
    picture = cv2.resize(people(), (WIDTH, HEIGHT), interpolation=cv2.INTER_AREA)
    try:
        found = await process.matte(np.asarray(picture, np.uint8))
    finally:
        await process.close()
    assert found is not None and found.shape == (HEIGHT, WIDTH)
    # She stands in the middle; the upper corners are wall.
    assert found[HEIGHT // 2, int(0.45 * WIDTH)] > 200
    assert max(found[:30, :60].max(), found[:30, -60:].max()) < 50


def test_the_process_ends_with_its_input() -> None:
    command = [sys.executable, "-P", "-m", "server.matte_process"]
    ended = subprocess.run(command, input=bytes(PICTURE_BYTES), capture_output=True, timeout=PATIENCE_S)
    assert (ended.returncode, len(ended.stdout)) == (0, MATTE_BYTES)


@pytest.mark.parametrize("code", ["", "import time; time.sleep(60)", "raise SystemExit(3)"])
async def test_a_process_that_dies_or_hangs_is_a_counted_fault(code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.matte.START_TIMEOUT_S", 1.0)
    process = MatteProcess(child(code))
    small = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    try:
        assert await process.matte(small) is None
        assert process.counters == {"matte_starts": 1, "matte_faults": 1}
        # Not at once again: a process that cannot start is no load.
        assert await process.matte(small) is None
        assert process.counters["matte_starts"] == 1
        monkeypatch.setattr("server.matte.RESTART_S", 0.0)
        process._retry_at = 0.0
        process._command = child(LEFT_HALF)
        monkeypatch.setattr("server.matte.START_TIMEOUT_S", PATIENCE_S)
        assert await process.matte(small) is not None
    finally:
        await process.close()


async def test_who_leaves_in_the_middle_of_an_exchange_does_not_shift_the_answers() -> None:
    echo = (
        f"import sys, time\nwhile len(data := sys.stdin.buffer.read({PICTURE_BYTES})) == {PICTURE_BYTES}:\n"
        f"    time.sleep(0.3)\n    sys.stdout.buffer.write(data[:1] * {MATTE_BYTES})\n    sys.stdout.buffer.flush()\n"
    )
    process = MatteProcess(child(echo))
    first = asyncio.create_task(process.matte(np.full((HEIGHT, WIDTH, 3), 1, np.uint8)))
    await asyncio.sleep(0.1)
    first.cancel()
    try:
        found = await process.matte(np.full((HEIGHT, WIDTH, 3), 2, np.uint8))
    finally:
        await process.close()
    assert found is not None and (found == 2).all()


# --- who gets what


async def test_a_picture_goes_out_with_its_own_matte_in_every_form_asked(
    matte: MatteProcess, executor: ThreadPoolExecutor
) -> None:
    delivered: asyncio.Queue[tuple[Form, OutgoingFrame]] = asyncio.Queue()
    counters: Counter[str] = Counter()
    cutter = Cutter(
        matte,
        executor,
        counters,
        lambda: {Form.PACKED, Form.GREEN},
        lambda form, frame: delivered.put_nowait((form, frame)),
    )
    painted = OutgoingFrame(7, 1.5, np.full((64, 64, 3), 40, np.uint8), 1, GREY)
    cutter.push(painted)
    async with asyncio.timeout(PATIENCE_S):
        made = dict([await delivered.get(), await delivered.get()])
    cutter.stop()
    assert counters == {"mattes": 1}
    assert {(frame.index, frame.arrived_at) for frame in made.values()} == {(7, 1.5)}
    assert made[Form.PACKED].rgb.shape == (128, 64, 3)
    # Of the painting, not of the camera.
    assert (made[Form.GREEN].rgb[:, :24] == 40).all() and (made[Form.GREEN].rgb[:, 40:] == (0, 255, 0)).all()


async def test_pictures_wait_in_a_slot_of_one(executor: ThreadPoolExecutor) -> None:
    process = MatteProcess(child("import time; time.sleep(60)"))
    counters: Counter[str] = Counter()
    cutter = Cutter(process, executor, counters, set, lambda form, frame: None)
    for index in range(5):
        cutter.push(OutgoingFrame(index, 0.0, GREY, 0))
    assert counters["matte_behind"] == 4
    cutter.stop()
    await asyncio.sleep(0)
    await process.close()


async def test_only_who_asks_is_cut_out_and_the_last_one_ends_it(
    matte: MatteProcess, executor: ThreadPoolExecutor
) -> None:
    codec = next(one for one in CODECS["video"] if one.name == "VP8")
    broadcast = Broadcast(MediaSettings(), executor, matte)

    def viewer(form: Form) -> Pictures:
        pictures = Pictures(MediaSettings(), broadcast.counters, broadcast.unsubscribe)
        broadcast.watch(pictures, codec, form)
        return pictures

    plain = viewer(Form.PLAIN)
    broadcast.push(OutgoingFrame(0, 0.0, GREY, 0))
    async with asyncio.timeout(PATIENCE_S):
        await plain.next()
        assert broadcast.counters["mattes"] == 0 and not matte.counters
        # Who comes now begins with the last picture.
        cut = [viewer(Form.PACKED), viewer(Form.PACKED), viewer(Form.GREEN)]
        frames = [await one.next() for one in cut]
        assert frames[0] is frames[1] is not frames[2]
        assert broadcast.counters["mattes"] == matte.counters["matte_starts"] == 1
        for one in cut:
            one.stop()
        broadcast.push(OutgoingFrame(1, 0.1, GREY, 0))
        await plain.next()
    assert broadcast.counters["mattes"] == 1
    broadcast.close()
