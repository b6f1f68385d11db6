"""Moving clips out of photographs and real clips, and what a webcam does to them.

A photograph is panned, zoomed and turned along a smooth random path; one to three portraits are laid with soft
outlines over another moving photograph (parallax, occlusion); a real clip is cropped and strided; a room may be
empty. In one clip of six the camera stands on a tripod: nothing moves, or next to nothing. Light drifts a little, and
one clip in seven is dim. Camera faults (noise, blur, JPEG, the blocks and held detail of a low bitrate) are added to
the source side only: the teacher sees the clean clip, so the model learns to paint over the camera's noise instead of
flickering with it.
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

    def __init__(self, material: Material, *, size_px: int | tuple[int, int], seed: int | Sequence[int]) -> None:
        """Make clips of one size, a square's side or (height, width).

        Raises: ValueError, if a side is no multiple of 16, the model's token.
        """
        self._height, self._width = (size_px, size_px) if isinstance(size_px, int) else size_px
        if self._height % 16 or self._width % 16 or min(self._height, self._width) < 16:
            raise ValueError(f"clips of {self._height}x{self._width} px: both sides must be multiples of 16")
        self._material = material
        self._motion = 1.0  # of the clip being drawn: 0 on a tripod
        self._rng = np.random.default_rng(seed)

    def clean(self, frames: int) -> Picture:
        """A clip without camera faults: [frames, height, width, 3]."""
        rng = self._rng
        self._motion = float(rng.choice([0.0, 0.06])) if rng.random() < 0.17 else 1.0
        kind = rng.random()
        if kind < 0.32:
            clip = self._real(frames)
        elif kind < 0.54:
            clip = self._pan(self._pick(self._material.portraits), frames, 0.08)
        elif kind < 0.76:
            clip = self._people_over_background(frames, 1)
        elif kind < 0.88:
            clip = self._people_over_background(frames, int(rng.integers(2, 4)))
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
        # a sensor's gain follows the dark: dim pictures are the noisy ones
        dim = max(0.0, 1.0 - float(clip.mean()) / 90.0)
        clip = clip + rng.normal(size=clip.shape).astype(np.float32) * rng.uniform(0, 6 + 5 * dim)
        noisy = np.clip(clip, 0, 255).astype(np.uint8)
        fault = rng.random()
        if fault < 0.35:
            noisy = np.stack([_jpeg(frame, int(rng.integers(45, 90))) for frame in noisy])
        elif fault < 0.55:
            noisy = _low_bitrate(noisy, quality=int(rng.integers(12, 35)), hold=float(rng.uniform(2.0, 7.0)))
        return noisy

    def _pick(self, pictures: Sequence[Picture]) -> Picture:
        return pictures[int(self._rng.integers(len(pictures)))]

    def _path(self, frames: int, reach: float) -> Path1D:
        """Smooth random motion in one dimension: drift, a slow wave and hand shake; none on a tripod."""
        rng, u = self._rng, np.linspace(0, 1, frames)
        wave = 0.5 * rng.normal() * np.sin(2 * np.pi * (u * rng.uniform(0.3, 1.5) + rng.random()))
        shake = 0.03 * np.cumsum(rng.normal(size=frames))
        return np.asarray(self._motion * reach * (rng.normal() * (u - 0.5) + wave + shake))

    def _pan(self, photo: Picture, frames: int, reach: float) -> Picture:
        rng, wide, tall = self._rng, self._width, self._height
        height, width = photo.shape[:2]
        scale = max(wide / width, tall / height) / rng.uniform(0.55, 1.0)
        centre = (
            width / 2 + rng.uniform(-0.5, 0.5) * max(0.0, width - wide / scale),
            height / 2 + rng.uniform(-0.5, 0.5) * max(0.0, height - tall / scale),
        )
        side = min(wide, tall)
        right, down = self._path(frames, reach * side), self._path(frames, reach * side * 0.6)
        turn, zoom = rng.normal() * 4 + self._path(frames, 6), self._path(frames, 0.10)
        out = []
        for i in range(frames):
            move = cv2.getRotationMatrix2D(centre, turn[i], scale * np.exp(zoom[i]))
            move[:, 2] += (wide / 2 - centre[0] + right[i], tall / 2 - centre[1] + down[i])
            flags = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
            out.append(cv2.warpAffine(photo, move, (wide, tall), flags=flags, borderMode=cv2.BORDER_REFLECT))
        return np.asarray(np.stack(out), np.uint8)

    def _real(self, frames: int) -> Picture:
        rng, wide, tall = self._rng, self._width, self._height
        clip = self._pick(self._material.clips)
        stride = int(rng.choice([1, 2])) if len(clip) >= 2 * frames else 1
        first = int(rng.integers(0, len(clip) - stride * (frames - 1)))
        clip = clip[first : first + stride * (frames - 1) + 1 : stride]
        if not self._motion:
            clip = np.broadcast_to(clip[:1], clip.shape)
        height, width = clip.shape[1:3]
        zoom = min(height / tall, width / wide) * rng.uniform(0.55, 1.0)
        box_tall, box_wide = int(tall * zoom), int(wide * zoom)
        top, left = int(rng.integers(0, height - box_tall + 1)), int(rng.integers(0, width - box_wide + 1))
        flags = cv2.INTER_AREA if zoom > 1 else cv2.INTER_CUBIC
        crop = clip[:, top : top + box_tall, left : left + box_wide]
        return np.asarray(np.stack([cv2.resize(f, (wide, tall), interpolation=flags) for f in crop]), np.uint8)

    def _people_over_background(self, frames: int, people: int) -> Picture:
        """Portraits in soft ellipses before a room, side by side, the last one in front."""
        rng = self._rng
        scene = self._pan(self._pick(self._material.backgrounds), frames, 0.05).astype(np.float32)
        side = min(self._width, self._height)
        places = rng.permutation(people) - (people - 1) / 2
        for place in places:
            scale = rng.uniform(0.5, 0.95) if people == 1 else rng.uniform(0.42, 0.95 - 0.12 * people)
            middle = self._width / 2 + place * self._width / people * rng.uniform(0.75, 1.0)
            self._lay_person(scene, scale * side, middle)
        return scene.astype(np.uint8)

    def _lay_person(self, scene_THWC: NDArray[np.float32], side_px: float, middle_px: float) -> None:
        """Lay one portrait of a given size into a scene, in place, its foot at the lower edge."""
        frames, tall, wide = scene_THWC.shape[:3]
        photo = self._pick(self._material.portraits)
        height, width = photo.shape[:2]
        side = min(self._width, self._height)
        scale = side_px / min(height, width) * float(self._rng.uniform(1.0, 1.5))
        right, down = self._path(frames, 0.12 * side), self._path(frames, 0.05 * side)
        turn, zoom = self._path(frames, 5), self._path(frames, 0.06)
        flags = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
        y, x = np.mgrid[0:tall, 0:wide].astype(np.float32)
        for i in range(frames):
            across_px, along_px = middle_px + right[i], tall - 0.45 * side_px + down[i]
            move = cv2.getRotationMatrix2D((width / 2, height / 2), turn[i], scale * np.exp(zoom[i]))
            move[:, 2] += (across_px - width / 2, along_px - height / 2)
            moved = cv2.warpAffine(photo, move, (wide, tall), flags=flags, borderMode=cv2.BORDER_REPLICATE)
            across, along = (x - across_px) / (0.42 * side_px), (y - along_px) / (0.62 * side_px)
            share = np.clip((1.05 - across**2 - along**2) * 6, 0, 1)[..., None]
            scene_THWC[i] += (moved - scene_THWC[i]) * share

    def _light(self, clip: Picture) -> Picture:
        """Mirror, gamma, colour cast and a slow drift of the light; now and then a dim room."""
        rng = self._rng
        if rng.random() < 0.5:
            clip = clip[:, :, ::-1]
        gamma = np.exp(rng.normal() * 0.25 + self._path(len(clip), 0.06)).astype(np.float32)
        cast = 1 + rng.normal(size=3).astype(np.float32) * 0.05
        if rng.random() < 0.14:
            cast = cast * rng.uniform(0.28, 0.65)
        lit = np.clip(clip.astype(np.float32) / 255, 1e-4, 1) ** gamma[:, None, None, None] * cast.astype(np.float32)
        return np.asarray(np.clip(lit, 0, 1) * 255 + 0.5, np.uint8)


def _jpeg(frame: Picture, quality: int) -> Picture:
    ok, data = cv2.imencode(".jpg", frame, [cv2.IMWRITE_JPEG_QUALITY, quality])
    assert ok
    return np.asarray(cv2.imdecode(data, cv2.IMREAD_COLOR), np.uint8)


def _low_bitrate(clip_THWC: Picture, *, quality: int, hold: float) -> Picture:
    """A starved encoder: coarse blocks, and blocks that keep the last frame's content until they differ by `hold`."""
    out = [_jpeg(clip_THWC[0], quality)]
    height, width = clip_THWC.shape[1:3]
    for frame in clip_THWC[1:]:
        difference = np.abs(frame.astype(np.float32) - out[-1]).mean(-1)
        blocks = cv2.resize(difference, (width // 16, height // 16), interpolation=cv2.INTER_AREA)
        changed = cv2.resize((blocks > hold).astype(np.uint8), (width, height), interpolation=cv2.INTER_NEAREST)
        out.append(np.where(changed[..., None] > 0, _jpeg(frame, quality), out[-1]))
    return np.stack(out)
