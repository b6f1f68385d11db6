"""What the evaluation measures, as pure functions of clips.

A clip is [T, H, W, 3] RGB uint8; a frame [H, W, 3]. Differences of pixels are on a scale of 0 to 255.

Faithful to the teacher: `psnr`, `ssim`, and in flat places `token_steps`. Faithful to the person: `edges_kept`,
`landmarks_kept`. Steady: `warp_error` along the `Motion` of the clean source, `flicker` on a still one, `seam_ratio` at
chunk borders. What takes a network to judge is in `engine.training.classifier`.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

Clip = NDArray[np.uint8]
Frame = NDArray[np.uint8]
Plane = NDArray[np.float32]

LANDMARKS = 48
# A landmark is a square of this many pixels each way around a corner, looked for this far around its old place.
LANDMARK_HALF_PX, LANDMARK_REACH_PX, LANDMARK_SLACK_PX = 10, 6, 1.5
LANDMARK_LEAST_MATCH = 0.35
# A teacher is flat where its colours differ by less than this from pixel to pixel, on average over so many around.
TOKEN_PX, FLAT_PX, FLAT_SLOPE, FLAT_LEAST = 16, 9, 2.0, 200


def psnr(a: Clip, b: Clip) -> float:
    """Peak signal to noise ratio in dB over all that is given; 90 where both are equal."""
    return float(-10 * np.log10(np.square(a.astype(np.float32) - b).mean() / 255**2 + 1e-9))


def luma(frame_HWC: Frame) -> Plane:
    """Brightness [H, W], 0 to 255."""
    return np.asarray(cv2.cvtColor(frame_HWC, cv2.COLOR_RGB2GRAY), np.float32)


def ssim(a_HWC: Frame, b_HWC: Frame) -> float:
    """Structural similarity of brightness, 1 where both are equal.

    Source: Wang et al. 2004, Gaussian window of sigma 1.5, K1 0.01, K2 0.03.
    """
    a, b = luma(a_HWC), luma(b_HWC)
    mean_a, mean_b = _window(a), _window(b)
    var_a, var_b = _window(a * a) - mean_a**2, _window(b * b) - mean_b**2
    covariance = _window(a * b) - mean_a * mean_b
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    score = (2 * mean_a * mean_b + c1) * (2 * covariance + c2) / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
    return float(score.mean())


def _window(plane: Plane) -> Plane:
    return np.asarray(cv2.GaussianBlur(plane, (11, 11), 1.5), np.float32)


# --- the person: what of the source is still there


def edges(frame_HWC: Frame) -> Plane:
    """Strength of brightness edges [H, W] after a blur that drops noise and fine screens."""
    soft = cv2.GaussianBlur(luma(frame_HWC), (0, 0), 1.5)
    return np.asarray(cv2.magnitude(cv2.Sobel(soft, cv2.CV_32F, 1, 0), cv2.Sobel(soft, cv2.CV_32F, 0, 1)), np.float32)


def edges_kept(out_HWC: Frame, source_HWC: Frame) -> float:
    """Correlation of edge strength, compressed by a square root so that a few strong edges do not decide; -1 to 1."""
    a, b = (np.sqrt(edges(frame)).ravel() for frame in (out_HWC, source_HWC))
    if a.std() < 1e-6 or b.std() < 1e-6:
        return 0.0
    return float(np.corrcoef(a, b)[0, 1])


def landmarks_kept(out_HWC: Frame, source_HWC: Frame, box: tuple[int, int, int, int] | None = None) -> float:
    """Share of the source's corners whose surroundings are found again at their place in the output.

    No face landmarks: corners (Shi-Tomasi) inside `box`, the face where one was found. Around each, the pattern of
    edges is looked for in the output's edges; it counts when it matches (normalised correlation) within
    LANDMARK_SLACK_PX of its old place. Colours do not matter, moved or melted features do.

    Args:
        box: top, left, height, width to look in; the whole frame without one.
    """
    height, width = source_HWC.shape[:2]
    margin = LANDMARK_HALF_PX + LANDMARK_REACH_PX + 1
    inside = np.zeros((height, width), np.uint8)
    top, left, tall, wide = box or (0, 0, height, width)
    inside[top : top + tall, left : left + wide] = 1
    inside[:margin], inside[-margin:], inside[:, :margin], inside[:, -margin:] = 0, 0, 0, 0
    corners = cv2.goodFeaturesToTrack(cv2.cvtColor(source_HWC, cv2.COLOR_RGB2GRAY), LANDMARKS, 0.02, 6, mask=inside)
    if corners is None:
        return 1.0
    before, after = edges(source_HWC), edges(out_HWC)
    return float(np.mean([_is_kept(before, after, *corner) for corner in corners.reshape(-1, 2).astype(int)]))


def _is_kept(before: Plane, after: Plane, x: int, y: int) -> bool:
    half, far = LANDMARK_HALF_PX, LANDMARK_HALF_PX + LANDMARK_REACH_PX
    patch = before[y - half : y + half + 1, x - half : x + half + 1]
    found = cv2.matchTemplate(after[y - far : y + far + 1, x - far : x + far + 1], patch, cv2.TM_CCOEFF_NORMED)
    _, best, _, (column, row) = cv2.minMaxLoc(found)
    moved = np.hypot(column - LANDMARK_REACH_PX, row - LANDMARK_REACH_PX)
    return bool(best >= LANDMARK_LEAST_MATCH and moved <= LANDMARK_SLACK_PX)


# --- time


@dataclass(frozen=True)
class Motion:
    """Where each pixel of a frame was in the frame before.

    maps: per step, pixel positions [H, W, 2] in the frame before. seen: per step, whether the pixel was visible there,
    bool [H, W].
    """

    maps: Sequence[Plane]
    seen: Sequence[NDArray[np.bool_]]

    @staticmethod
    def of(clip_THWC: Clip) -> Motion:
        """Dense optical flow (DIS) of a clean clip; a pixel counts as seen where there and back agree within 1 px."""
        flow = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
        grey = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in clip_THWC]
        rows, columns = np.mgrid[0 : grey[0].shape[0], 0 : grey[0].shape[1]].astype(np.float32)
        maps, seen = [], []
        for before, now in itertools.pairwise(grey):
            back = np.asarray(flow.calc(now, before, None), np.float32)  # type: ignore[call-overload]
            forth = np.asarray(flow.calc(before, now, None), np.float32)  # type: ignore[call-overload]
            place = np.asarray(np.stack([columns + back[..., 0], rows + back[..., 1]], -1), np.float32)
            returned = back + _moved(forth, place)
            inside = (place >= 0).all(-1) & (place[..., 0] < columns.shape[1]) & (place[..., 1] < rows.shape[0])
            maps.append(place)
            seen.append(np.asarray(inside & (np.hypot(returned[..., 0], returned[..., 1]) < 1.0)))
        return Motion(maps, seen)


def _moved(picture: NDArray[Any], place_HW2: Plane) -> NDArray[Any]:
    return cv2.remap(picture, place_HW2[..., 0], place_HW2[..., 1], cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)


def warp_error(clip_THWC: Clip, motion: Motion) -> float:
    """Mean absolute difference between a frame and its predecessor moved along the source's motion, 0 to 255."""
    errors = []
    for i, (place, seen) in enumerate(zip(motion.maps, motion.seen, strict=True)):
        moved = _moved(clip_THWC[i], place)
        errors.append(cv2.absdiff(moved, clip_THWC[i + 1]).mean(-1)[seen].mean() if seen.any() else 0.0)
    return float(np.mean(errors))


def flicker(clip_THWC: Clip) -> float:
    """Mean over pixels of the standard deviation over time; of a still scene, so all of it is unrest."""
    return float(clip_THWC.astype(np.float32).std(0).mean())


def change_energy(clip_THWC: Clip) -> NDArray[np.float64]:
    """Mean squared difference of each frame to the one before: T - 1 numbers."""
    difference = np.diff(clip_THWC.astype(np.float32), axis=0)
    return np.asarray(np.square(difference).mean((1, 2, 3)), np.float64)


def seam_ratio(clip_THWC: Clip, *, first: int = 1, chunk: int = 4, skip: int = 1) -> float:
    """Energy of frame differences at chunk borders over that inside chunks; 1 where no border can be told.

    Each border is held against the differences inside the two chunks it joins, so that a person who moves faster
    and faster does not count. The first `skip` borders, where a stream begins, are left out.
    """
    energy = change_energy(clip_THWC)
    borders = list(range(first + skip * chunk - 1, len(energy), chunk))
    at = [energy[b] for b in borders]
    near = [np.mean([energy[k] for k in range(b - chunk + 1, min(b + chunk, len(energy))) if k != b]) for b in borders]
    return float(np.sum(at) / (np.sum(near) + 1e-6)) if borders else 1.0


def token_steps(frame_HWC: Frame, teacher_HWC: Frame) -> float:
    """How much more a frame errs in steps at the borders of 16 px tokens than between any other two pixels.

    Mean absolute difference of neighbouring errors against the teacher, in CIELAB, counted where the teacher is flat
    all around; there, a step is a token of another colour than the next. 1 where nothing tells them apart.
    """
    at, elsewhere = [], []
    frame, teacher = (cv2.cvtColor(part, cv2.COLOR_RGB2LAB).astype(np.float32) for part in (frame_HWC, teacher_HWC))
    slope = sum(np.abs(np.gradient(teacher, axis=axis)).sum(-1) for axis in (0, 1))
    flat = cv2.blur(np.asarray(slope, np.float32), (FLAT_PX, FLAT_PX)) < FLAT_SLOPE
    for error, calm in ((frame - teacher, flat), ((frame - teacher).swapaxes(0, 1), flat.T)):
        steps, calm = np.abs(np.diff(error, axis=1)).sum(-1), calm[:, 1:]
        border = np.arange(1, error.shape[1]) % TOKEN_PX == 0
        at.append(steps[:, border][calm[:, border]])
        elsewhere.append(steps[:, ~border][calm[:, ~border]])
    seen, others = np.concatenate(at), np.concatenate(elsewhere)
    return float((seen.mean() + 1e-3) / (others.mean() + 1e-3)) if seen.size >= FLAT_LEAST else 1.0


def frames_until(nearest: Sequence[str], wanted: str) -> int:
    """Frames before `wanted` is the nearest style for good; as many as there are, if it never is."""
    stays = len(nearest)
    while stays and nearest[stays - 1] == wanted:
        stays -= 1
    return stays


def look(clip_THWC: Clip) -> dict[str, float]:
    """Statistics that would show drift: mean and spread of brightness, mean colour distance, strength of edges."""
    values = clip_THWC.astype(np.float32)
    return {
        "mean": float(values.mean()),
        "spread": float(values.std((1, 2)).mean()),
        "colour": float(values.std(-1).mean()),
        "edges": float(np.mean([edges(frame).mean() for frame in clip_THWC])),
    }
