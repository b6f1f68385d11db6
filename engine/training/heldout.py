"""Clips that no training run sees, and what their teachers make of them; both kept in the working folder.

Real webcam clips come as they are, cut to the shape asked for; portraits are moved by `ClipSynth`. Camera faults are
on the source alone. Everything follows from fixed seeds. Teachers take long (the painted ones), so their clips are
files, named by a hash of the clip and of what the teacher makes of a made picture: a teacher that has changed is run
again.
"""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from engine.training.data import load_material
from engine.training.measures import Motion
from engine.training.synth import ClipSynth, Material
from engine.training.teachers import stylise_clip

Clip = NDArray[np.uint8]
Box = tuple[int, int, int, int]
PHOTO = "photo"
CAMERA_SEED = 77_000
# Seeds whose clip is a moving portrait, alone or before a room, and not a real clip or a room.
SYNTHETIC_SEEDS = tuple(seed for seed in range(91_000, 91_100) if 0.34 <= np.random.default_rng(seed).random() < 0.86)
NOISE_SIGMA = 3.0


@dataclass(frozen=True)
class HeldOut:
    """One held-out clip. source: as the camera gives it; clean: without its faults. Both [T, H, W, 3]."""

    name: str
    source: Clip
    clean: Clip

    @cached_property
    def motion(self) -> Motion:
        """Optical flow of the clean clip."""
        return Motion.of(self.clean)

    @cached_property
    def key(self) -> str:
        """Short hash of the pixels."""
        return _hash(self.clean, self.source)

    @property
    def sampled(self) -> list[int]:
        """Frames that the costlier measures look at: one in eight, two at least, the last among them."""
        count = max(2, len(self.clean) // 8)
        return sorted({int(k) for k in np.linspace(len(self.clean) // count // 2, len(self.clean) - 1, count)})

    @cached_property
    def faces(self) -> dict[int, Box | None]:
        """Top, left, height and width of the largest face in each sampled frame, where one is found."""
        return {frame: find_face(self.clean[frame]) for frame in self.sampled}


def held_out_clips(people: Path, work: Path, *, size: tuple[int, int], frames: int, count: int) -> list[HeldOut]:
    """The first `count` held-out clips at (width, height): real ones first and moving portraits in turns."""
    folder = work / "evaluation" / "clips"
    folder.mkdir(parents=True, exist_ok=True)
    width, height = size
    paths = [folder / f"{k:02d}_{width}x{height}_{frames}.npz" for k in range(count)]
    if not all(path.exists() for path in paths):
        material = load_material(people, validation=True)
        for k, path in enumerate(paths):
            if not path.exists():
                _save(path, _make(material, k, size, frames))
    return [_load(path) for path in paths]


def _make(material: Material, number: int, size: tuple[int, int], frames: int) -> HeldOut:
    """Even numbers are real clips while there are some left, the others moving portraits."""
    synth = ClipSynth(material, size_px=max(size), seed=SYNTHETIC_SEEDS[number])
    real = number // 2
    if number % 2 == 0 and real < len(material.clips):
        name, clip = f"clip {real}", np.asarray(material.clips[real], np.uint8)[:frames]
    else:
        name, clip = f"portrait {number}", synth.clean(frames)
    whole = 1 + (len(clip) - 1) // 4 * 4
    clean = np.stack([cut(frame, size) for frame in clip[:whole]])
    camera = ClipSynth(material, size_px=max(size), seed=CAMERA_SEED + number)
    return HeldOut(name, np.asarray(camera.camera(clean), np.uint8), clean)


def cut(frame_HWC: Clip, size: tuple[int, int]) -> Clip:
    """The largest centred part of a frame with the shape of (width, height), resized to that."""
    width, height = size
    rows, columns = frame_HWC.shape[:2]
    scale = min(rows / height, columns / width)
    tall, wide = round(height * scale), round(width * scale)
    top, left = (rows - tall) // 2, (columns - wide) // 2
    part = frame_HWC[top : top + tall, left : left + wide]
    flags = cv2.INTER_AREA if scale > 1 else cv2.INTER_CUBIC
    return np.asarray(cv2.resize(part, size, interpolation=flags), np.uint8)


def _save(path: Path, clip: HeldOut) -> None:
    partial = path.with_suffix(".part.npz")
    np.savez(partial, name=np.array(clip.name), source=clip.source, clean=clip.clean)
    partial.rename(path)


def _load(path: Path) -> HeldOut:
    with np.load(path) as file:
        return HeldOut(str(file["name"]), file["source"], file["clean"])


def still_noisy(clip: HeldOut, frames: int, sigma: float = NOISE_SIGMA) -> Clip:
    """A camera that stands still before a scene that does: one clean frame under fresh noise each time."""
    noise = np.random.default_rng(CAMERA_SEED).normal(size=(frames, *clip.clean.shape[1:])) * sigma
    return np.asarray(np.clip(clip.clean[0] + noise + 0.5, 0, 255), np.uint8)


# --- teachers


class Teachers:
    """Teachers' versions of held-out clips, made once and then read from the working folder."""

    def __init__(self, work: Path, styles: Sequence[str]) -> None:
        self.styles = tuple(styles)
        self._folder = work / "evaluation" / "teachers"
        self._prints = fingerprints(self.styles)

    @property
    def key(self) -> str:
        """Short hash of all teachers: what has been trained on them is stale when it changes."""
        return hashlib.sha256("".join(f"{s}{self._prints[s]}" for s in sorted(self.styles)).encode()).hexdigest()[:12]

    def steadied(self, clip: HeldOut) -> dict[str, Clip]:
        """What the model is to come near to, by style: the teachers on the clean clip, steadied over time."""
        return self._kept(clip, "clip", lambda styles: stylise_clip(styles, clip.clean))

    def per_frame(self, clip: HeldOut) -> dict[str, Clip]:
        """The teachers on each frame for itself, by style."""

        def make(styles: list[str]) -> Clip:
            return np.stack([stylise_clip(styles, frame[None])[:, 0] for frame in clip.clean], axis=1)

        return self._kept(clip, "frames", make)

    def _kept(self, clip: HeldOut, form: str, make: Callable[[list[str]], Clip]) -> dict[str, Clip]:
        """All styles of a clip, mapped from their files; those that lack one are made, together."""
        folder = self._folder / f"{clip.key}_{form}"
        folder.mkdir(parents=True, exist_ok=True)
        paths = {style: folder / f"{style}_{print_}.npy" for style, print_ in self._prints.items() if style != PHOTO}
        missing = [style for style, path in paths.items() if not path.exists()]
        for style, styled in zip(missing, make(missing) if missing else (), strict=True):
            partial = paths[style].with_suffix(".part")
            with partial.open("wb") as file:
                np.save(file, styled)
            partial.rename(paths[style])
        versions = {style: np.load(path, mmap_mode="c") for style, path in paths.items()}
        return {style: clip.clean if style == PHOTO else versions[style] for style in self.styles}


def fingerprints(styles: Sequence[str]) -> dict[str, str]:
    """Short hashes of what teachers make of two made frames."""
    y, x = np.mgrid[0:256, 0:256].astype(np.float32)
    waves = np.stack([127 + 100 * np.sin(x / (9 + 4 * c) + y / (17 - 3 * c)) for c in range(3)], -1).astype(np.uint8)
    made = stylise_clip(styles, np.stack([waves, np.roll(waves, 3, axis=1)]))
    return {style: _hash(clip)[:10] for style, clip in zip(styles, made, strict=True)}


def _hash(*arrays: Clip) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(str(array.shape).encode() + np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()[:12]


@cache
def _face_finder() -> Any:
    # Of the train extra, as the held-out material itself; untyped where it is installed, unknown where it is not.
    data, feature = (importlib.import_module(f"skimage.{name}") for name in ("data", "feature"))
    return feature.Cascade(data.lbp_frontal_face_cascade_filename())


def find_face(frame_HWC: Clip) -> Box | None:
    """The largest frontal face by the cascade of local binary patterns that comes with scikit-image."""
    found = _face_finder().detect_multi_scale(
        img=frame_HWC, scale_factor=1.2, step_ratio=1, min_size=(40, 40), max_size=(220, 220)
    )
    if not found:
        return None
    face = max(found, key=lambda box: int(box["width"]))
    return int(face["r"]), int(face["c"]), int(face["height"]), int(face["width"])
