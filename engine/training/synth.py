"""Moving clips out of photographs and real clips, and what a webcam does to them.

A photograph is panned, zoomed and turned along a smooth random path; a portrait is laid with a soft
outline over another moving photograph (parallax, occlusion); a real clip is cropped and strided. Light
drifts a little. Camera faults (noise, JPEG, blur) are added to the source side only: the teacher sees the
clean clip, so the model learns to paint over the camera's noise instead of flickering with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

Picture = NDArray[np.uint8]
Path1D = NDArray[np.float64]


@dataclass(frozen=True)
class Material:
    """What clips are made of: portraits and backgrounds [H, W, 3], real clips [T, H, W, 3], all RGB uint8."""

    portraits: Sequence[Picture]
    backgrounds: Sequence[Picture]
    clips: Sequence[Picture]


class ClipSynth:
    """Draws random clips from the material; the same seed draws the same clips."""

    def __init__(self, material: Material, *, size_px: int, seed: int | Sequence[int]) -> None:
        self._material = material
        self._size = size_px
        self._rng = np.random.default_rng(seed)

    def clean(self, frames: int) -> Picture:
        """A clip without camera faults: [frames, size, size, 3]."""
        kind = self._rng.random()
        if kind < 0.34:
            clip = self._real(frames)
        elif kind < 0.58:
            clip = self._pan(self._pick(self._material.portraits), frames, 0.08)
        elif kind < 0.86:
            clip = self._portrait_over_background(frames)
        else:
            clip = self._pan(self._pick(self._material.backgrounds), frames, 0.12)
        return self._light(clip)

    def camera(self, clean_THWC: Picture) -> Picture:
        """The same clip as a cheap webcam would give it; four in ten come through clean."""
        rng = self._rng
        if rng.random() < 0.4:
            return clean_THWC
        clip = clean_THWC.astype(np.float32)
        if rng.random() < 0.25:
            clip = np.stack([cv2.GaussianBlur(frame, (0, 0), 0.8) for frame in clip])
        clip = clip + rng.normal(size=clip.shape).astype(np.float32) * rng.uniform(0, 6)
        noisy = np.clip(clip, 0, 255).astype(np.uint8)
        if rng.random() < 0.4:
            noisy = np.stack([_jpeg(frame, int(rng.integers(45, 90))) for frame in noisy])
        return noisy

    def _pick(self, pictures: Sequence[Picture]) -> Picture:
        return pictures[int(self._rng.integers(len(pictures)))]

    def _path(self, frames: int, reach: float) -> Path1D:
        """Smooth random motion in one dimension: drift, a slow wave and hand shake."""
        rng, u = self._rng, np.linspace(0, 1, frames)
        wave = 0.5 * rng.normal() * np.sin(2 * np.pi * (u * rng.uniform(0.3, 1.5) + rng.random()))
        shake = 0.03 * np.cumsum(rng.normal(size=frames))
        return np.asarray(reach * (rng.normal() * (u - 0.5) + wave + shake))

    def _pan(self, photo: Picture, frames: int, reach: float) -> Picture:
        rng, size = self._rng, self._size
        height, width = photo.shape[:2]
        scale = size / (min(height, width) * rng.uniform(0.55, 1.0))
        centre = (
            width / 2 + rng.uniform(-0.5, 0.5) * max(0.0, width - size / scale),
            height / 2 + rng.uniform(-0.5, 0.5) * max(0.0, height - size / scale),
        )
        right, down = self._path(frames, reach * size), self._path(frames, reach * size * 0.6)
        turn, zoom = rng.normal() * 4 + self._path(frames, 6), self._path(frames, 0.10)
        out = []
        for i in range(frames):
            move = cv2.getRotationMatrix2D(centre, turn[i], scale * np.exp(zoom[i]))
            move[:, 2] += (size / 2 - centre[0] + right[i], size / 2 - centre[1] + down[i])
            flags = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
            out.append(cv2.warpAffine(photo, move, (size, size), flags=flags, borderMode=cv2.BORDER_REFLECT))
        return np.asarray(np.stack(out), np.uint8)

    def _real(self, frames: int) -> Picture:
        rng, size = self._rng, self._size
        clip = self._pick(self._material.clips)
        stride = int(rng.choice([1, 2])) if len(clip) >= 2 * frames else 1
        first = int(rng.integers(0, len(clip) - stride * (frames - 1)))
        clip = clip[first : first + stride * (frames - 1) + 1 : stride]
        height, width = clip.shape[1:3]
        box = int(min(height, width) * rng.uniform(0.55, 1.0))
        top, left = int(rng.integers(0, height - box + 1)), int(rng.integers(0, width - box + 1))
        flags = cv2.INTER_AREA if box > size else cv2.INTER_CUBIC
        crop = clip[:, top : top + box, left : left + box]
        return np.asarray(np.stack([cv2.resize(f, (size, size), interpolation=flags) for f in crop]), np.uint8)

    def _portrait_over_background(self, frames: int) -> Picture:
        rng, size = self._rng, self._size
        behind = self._pan(self._pick(self._material.backgrounds), frames, 0.05).astype(np.float32)
        person = self._pan(self._pick(self._material.portraits), frames, 0.02).astype(np.float32)
        scale = rng.uniform(0.5, 0.95)
        right, down = self._path(frames, 0.12 * size), self._path(frames, 0.05 * size)
        y, x = np.mgrid[0:size, 0:size].astype(np.float32)
        for i in range(frames):
            move = np.array(
                [[scale, 0, size * (1 - scale) / 2 + right[i]], [0, scale, size * (1 - scale) + down[i]]], np.float32
            )
            moved = cv2.warpAffine(person[i], move, (size, size), borderMode=cv2.BORDER_REPLICATE)
            across = (x - size / 2 - right[i]) / (0.42 * scale * size)
            along = (y - size * (1 - 0.45 * scale) - down[i]) / (0.62 * scale * size)
            share = np.clip((1.05 - across**2 - along**2) * 6, 0, 1)[..., None]
            behind[i] = behind[i] * (1 - share) + moved * share
        return behind.astype(np.uint8)

    def _light(self, clip: Picture) -> Picture:
        """Mirror, gamma, colour cast and a slow drift of the light."""
        rng = self._rng
        if rng.random() < 0.5:
            clip = clip[:, :, ::-1]
        gamma = np.exp(rng.normal() * 0.25 + self._path(len(clip), 0.06)).astype(np.float32)
        cast = 1 + rng.normal(size=3).astype(np.float32) * 0.05
        lit = np.clip(clip.astype(np.float32) / 255, 1e-4, 1) ** gamma[:, None, None, None] * cast
        return np.asarray(np.clip(lit, 0, 1) * 255 + 0.5, np.uint8)


def _jpeg(frame: Picture, quality: int) -> Picture:
    ok, data = cv2.imencode(".jpg", frame, [cv2.IMWRITE_JPEG_QUALITY, quality])
    assert ok
    return np.asarray(cv2.imdecode(data, cv2.IMREAD_COLOR), np.uint8)
