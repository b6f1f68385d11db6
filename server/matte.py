"""The person of a published picture without what is behind: matte, packed picture, green screen.

    Broadcast.push -> Cutter (a slot of one) -> MatteProcess -> refine, clean -> pack or key -> the lanes that want it

The matte comes from the camera's picture, which the network knows, and is laid over its painting. A picture always
goes out with its own matte: where mattes come slower than pictures, pictures are left out (`matte_behind`), because
a matte of another instant is what makes edges swim. Viewers of the plain picture notice nothing of all this.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import replace
from enum import StrEnum

import cv2
import numpy as np
from numpy.typing import NDArray

from server.errors import BadRequest
from server.frames import OutgoingFrame
from server.matte_process import HEIGHT, MATTE_BYTES, WIDTH

log = logging.getLogger(__name__)

Image = NDArray[np.uint8]

# The first picture waits for Python and the network to load, on a busy machine.
START_TIMEOUT_S, MATTE_TIMEOUT_S, STOP_TIMEOUT_S = 30.0, 2.0, 2.0
# Between two starts of a process that fails.
RESTART_S = 5.0
# Pure green, as keyers expect it.
GREEN = (0, 255, 0)
# Of the guided filter, in pixels of a picture 256 high, and in squared shares of full scale: what counts as an edge.
RADIUS_PX, EDGE = 4, 1e-3
# How far the person's colours are drawn outwards, in pixels of a picture 256 high.
SPREAD_PX = 10


class Form(StrEnum):
    """How a viewer gets a stream."""

    PLAIN = "plain"
    PACKED = "packed"
    """The person's picture above, its matte as grey below: twice as high."""
    GREEN = "green"
    """The person before plain green."""


def asked_form(query: Mapping[str, str]) -> Form:
    """What a WHEP URL asks for: `alpha=packed`, `key=green` or neither. Raises BadRequest, naming what there is."""
    for name, value in query.items():
        if (name, value) not in (("alpha", "packed"), ("key", "green")):
            raise BadRequest(f"{name[:40]}={value[:40]} in the URL; there are alpha=packed and key=green")
    if len(query) > 1:
        raise BadRequest("alpha=packed and key=green: one of them only")
    return Form.PACKED if "alpha" in query else Form.GREEN if "key" in query else Form.PLAIN


# --- pixels; pure


def refined(matte: Image, guide: Image) -> Image:
    """A small matte at the size of its picture, its edge moved to the nearest edge of the picture.

    Args:
        matte: [h, w], 255 for the person.
        guide: [H, W, 3] RGB, the picture that the matte was made from.

    Source: the guided filter of He, Sun and Tang (ECCV 2010) with a grey guide.
    """
    height, width = guide.shape[:2]
    shade = _unit(cv2.cvtColor(guide, cv2.COLOR_RGB2GRAY))
    share = _unit(cv2.resize(matte, (width, height), interpolation=cv2.INTER_LINEAR))
    side = 2 * max(1, round(RADIUS_PX * height / 256)) + 1

    def mean(plane: NDArray[np.float32]) -> NDArray[np.float32]:
        return np.asarray(cv2.blur(plane, (side, side)), np.float32)

    mean_shade, mean_share = mean(shade), mean(share)
    slope = (mean(shade * share) - mean_shade * mean_share) / (mean(shade * shade) - mean_shade**2 + EDGE)
    fitted = mean(slope) * shade + mean(mean_share - slope * mean_shade)
    # What the network and the filter leave a little grey is background or person.
    return ((fitted - 0.2) / 0.6 * 255 + 0.5).clip(0, 255).astype(np.uint8)


def _unit(plane: object) -> NDArray[np.float32]:
    return np.asarray(plane, np.float32) / np.float32(255)


def cleaned(rgb: Image, matte: Image) -> Image:
    """The picture with the person's own colours drawn outwards over the edge: no rim of the old background is left."""
    side = 2 * max(1, round(SPREAD_PX * rgb.shape[0] / 256)) + 1
    square = _unit(matte) ** 2
    # Only pixels that are wholly the person's count: a half transparent one is half of what was behind.
    weight = square * square
    total = np.maximum(cv2.blur(weight, (side, side)), np.float32(1e-4))
    picture = rgb.astype(np.float32)
    around = cv2.divide(cv2.blur(cv2.multiply(picture, _thrice(weight)), (side, side)), _thrice(total))
    return _mixed(picture, around, weight * weight)


def _thrice(plane: object) -> NDArray[np.float32]:
    """[H, W] -> [H, W, 3]; OpenCV's arithmetic on that takes half the time of broadcasting."""
    return np.asarray(cv2.merge([np.asarray(plane, np.float32)] * 3), np.float32)


def _mixed(over: object, under: object, share: NDArray[np.float32]) -> Image:
    """`share` of the one [H, W, 3] picture and the rest of the other, rounded."""
    base = np.asarray(under, np.float32)
    mixed = base + cv2.multiply(cv2.subtract(np.asarray(over, np.float32), base), _thrice(share))
    return np.asarray(cv2.convertScaleAbs(mixed), np.uint8)


def packed(rgb: Image, matte: Image) -> Image:
    """[2H, W, 3]: the picture above, its matte as grey below."""
    return np.concatenate([rgb, np.repeat(matte[..., None], 3, axis=2)])


def before_green(rgb: Image, matte: Image) -> Image:
    """[H, W, 3]: the person before plain green."""
    green = np.empty(rgb.shape, np.float32)
    green[:] = GREEN
    return _mixed(rgb, green, _unit(matte))


def _small(camera: Image) -> Image:
    return np.ascontiguousarray(cv2.resize(camera, (WIDTH, HEIGHT), interpolation=cv2.INTER_AREA))


def _composed(frame: OutgoingFrame, small_matte: Image, forms: set[Form]) -> dict[Form, OutgoingFrame]:
    camera = frame.rgb if frame.camera is None else frame.camera
    matte = refined(small_matte, camera)
    rgb = cleaned(frame.rgb, matte)
    made = {Form.PACKED: packed, Form.GREEN: before_green}
    return {form: replace(frame, rgb=made[form](rgb, matte)) for form in forms}


# --- the process


class MatteProcess:
    """The matting process, for all streams in turn; started at the first picture, anew after faults. `close` always."""

    def __init__(self, command: Sequence[str] = (sys.executable, "-P", "-m", "server.matte_process")) -> None:
        self.counters: Counter[str] = Counter()
        self._command = command
        self._turn = asyncio.Lock()
        self._process: asyncio.subprocess.Process | None = None
        self._retry_at = 0.0

    async def matte(self, small: Image) -> Image | None:
        """The matte of a [HEIGHT, WIDTH, 3] picture, within bounded time; None after a fault, which is counted."""
        async with self._turn:
            try:
                timeout_s = MATTE_TIMEOUT_S
                if self._process is None:
                    if time.monotonic() < self._retry_at:
                        return None
                    timeout_s = START_TIMEOUT_S
                    self._retry_at = time.monotonic() + RESTART_S
                    self.counters["matte_starts"] += 1
                    pipe = asyncio.subprocess.PIPE
                    self._process = await asyncio.create_subprocess_exec(*self._command, stdin=pipe, stdout=pipe)
                async with asyncio.timeout(timeout_s):
                    return await self._ask(self._process, small)
            except (OSError, TimeoutError, asyncio.IncompleteReadError) as error:
                self.counters["matte_faults"] += 1
                log.error("the matting process failed (%r); it is started again in %.0f s", error, RESTART_S)
                self._retry_at = time.monotonic() + RESTART_S
                await self._end()
                return None
            except asyncio.CancelledError:
                # Who asked is gone in the middle of an exchange: what the pipe holds would be taken for the next one's.
                await self._end()
                self._retry_at = 0.0
                raise

    async def _ask(self, process: asyncio.subprocess.Process, small: Image) -> Image:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(small.tobytes())
        await process.stdin.drain()
        data = await process.stdout.readexactly(MATTE_BYTES)
        return np.frombuffer(data, np.uint8).reshape(HEIGHT, WIDTH)

    async def close(self) -> None:
        """End the process."""
        await self._end()

    async def _end(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(STOP_TIMEOUT_S):
                # Reads what is left as well, so that both pipes are closed.
                await process.communicate()


# --- one stream


class Cutter:
    """Makes the cut-out forms of one broadcast's pictures, each matte once. Lives while somebody watches one."""

    def __init__(
        self,
        process: MatteProcess,
        executor: Executor,
        counters: Counter[str],
        forms: Callable[[], set[Form]],
        deliver: Callable[[Form, OutgoingFrame], None],
    ) -> None:
        self._process = process
        self._executor = executor
        self._counters = counters
        self._forms = forms
        self._deliver = deliver
        self._slot: OutgoingFrame | None = None
        self._filled = asyncio.Event()
        self._task = asyncio.create_task(self._run(), name="broadcast/cutter")

    def push(self, frame: OutgoingFrame) -> None:
        """Take a picture; never waits. A slot of one: a newer picture takes its place, counted `matte_behind`."""
        if self._slot is not None:
            self._counters["matte_behind"] += 1
        self._slot = frame
        self._filled.set()

    def stop(self) -> None:
        """Make nothing more."""
        self._task.cancel()

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._filled.wait()
            self._filled.clear()
            frame, self._slot = self._slot, None
            if frame is None:
                continue
            try:
                camera = frame.rgb if frame.camera is None else frame.camera
                small = await loop.run_in_executor(self._executor, _small, camera)
                matte = await self._process.matte(small)
                if matte is None:
                    self._counters["matte_lost"] += 1
                    continue
                made = await loop.run_in_executor(self._executor, _composed, frame, matte, self._forms())
            except Exception:  # the wall: a picture that cannot be cut out is lost, the stream is not
                self._counters["matte_errors"] += 1
                log.exception("a picture of a broadcast could not be cut out")
                continue
            self._counters["mattes"] += 1
            for form, picture in made.items():
                self._deliver(form, picture)
