"""The embedded model as it ships: what a person must see, held against the camera it was given."""

from collections.abc import Iterator
from pathlib import Path

import av
import cv2
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from engine.api import StreamParams
from engine.config import EngineSettings
from engine.pipeline import Pipeline
from engine.wan.weights import load_model

DEMO = Path(__file__).parents[2] / "web" / "demo" / "people.mp4"
MODEL_DIR = EngineSettings().model_dir
SIZE = 256
Clip = NDArray[np.uint8]


@pytest.fixture(scope="module")
def pipeline() -> Iterator[Pipeline]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield Pipeline(load_model(MODEL_DIR, "cpu"), SIZE, SIZE)
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def people() -> Clip:
    """The first 24 frames of the demo clip, cropped as the server does."""
    with av.open(str(DEMO)) as file:
        frames = [frame.to_ndarray(format="rgb24") for frame, _ in zip(file.decode(video=0), range(24), strict=False)]
    left = (frames[0].shape[1] - frames[0].shape[0]) // 2
    square = [frame[:, left : left + frame.shape[0]] for frame in frames]
    return np.stack([np.asarray(cv2.resize(f, (SIZE, SIZE), interpolation=cv2.INTER_AREA), np.uint8) for f in square])


def stream(pipeline: Pipeline, clip: Clip, **params: object) -> Clip:
    """Restyle a clip as the engine does: the first frame alone, then chunks of four."""
    state = pipeline.open(StreamParams.model_validate(params))
    starts = [0, *range(1, len(clip) - 3, 4)]
    return np.concatenate([pipeline.render(state, clip[s : s + (4 if s else 1)]) for s in starts])


def psnr(a: Clip, b: Clip) -> float:
    error = ((a.astype(np.float64) - b) ** 2).mean()
    return float(10 * np.log10(255**2 / max(error, 1e-9)))


def prompts(pipeline: Pipeline) -> dict[str, str]:
    return {style.id: style.prompt for style in pipeline.model.styles.styles}


def test_it_is_small_and_knows_at_least_ten_styles(pipeline: Pipeline) -> None:
    assert sum(file.stat().st_size for file in MODEL_DIR.iterdir()) < 25e6
    assert len(prompts(pipeline)) >= 10


def test_every_style_is_obvious_and_no_two_are_alike(pipeline: Pipeline, people: Clip) -> None:
    looks = {name: stream(pipeline, people[:5], prompt=prompt)[-1] for name, prompt in prompts(pipeline).items()}
    for name, look in looks.items():
        if name != "photo":
            assert psnr(look, people[4]) < 24, f"{name} looks like the camera"
    names = sorted(looks)
    for i, one in enumerate(names):
        for two in names[i + 1 :]:
            assert psnr(looks[one], looks[two]) < 26, f"{one} and {two} look alike"


def test_strength_is_a_dial_from_the_camera_to_the_style(pipeline: Pipeline, people: Clip) -> None:
    distances = [
        psnr(stream(pipeline, people[:9], prompt="watercolor", strength=strength), people[:9])
        for strength in (0.0, 0.5, 1.0)
    ]
    assert distances[0] > 28
    assert distances == sorted(distances, reverse=True)


@pytest.mark.parametrize("style", ["watercolor", "comic", "pencil"])
def test_a_moving_edge_is_where_the_camera_has_it(pipeline: Pipeline, style: str) -> None:
    """A dark field's edge moves right by 4 px a frame; in each output frame it is where it was in that input frame."""
    frames = 25
    clip = np.full((frames, SIZE, SIZE, 3), 210, np.uint8)
    for i in range(frames):
        clip[i, :, : 60 + 4 * i] = 60
    out = stream(pipeline, clip, prompt=prompts(pipeline)[style])
    for i in range(5, frames):
        profile = cv2.GaussianBlur(out[i].mean(axis=(0, 2))[None].astype(np.float32), (0, 0), 2)[0]
        found = int(np.abs(np.diff(profile)).argmax())
        assert abs(found - (60 + 4 * i)) <= 8, f"frame {i}: edge at {found}, camera has it at {60 + 4 * i}"


def test_a_prompt_change_shows_in_the_very_next_chunk_without_a_reset(pipeline: Pipeline, people: Clip) -> None:
    known = prompts(pipeline)
    before, after = StreamParams(prompt=known["pencil"]), StreamParams(prompt=known["thermal"])
    state = pipeline.open(before)
    for start in range(0, 12, 4):
        pipeline.render(state, people[start : start + 4])
    pipeline.set_params(state, after)
    switched = pipeline.render(state, people[12:16])
    old = stream(pipeline, people[3:16], prompt=before.prompt)[-4:]
    new = stream(pipeline, people[3:16], prompt=after.prompt)[-4:]
    assert psnr(switched, new) > psnr(switched, old) + 3
    assert state.chunks == 4


def test_a_still_camera_gives_a_still_picture(pipeline: Pipeline, people: Clip) -> None:
    still = np.repeat(people[:1], 21, axis=0)
    out = stream(pipeline, still, prompt="watercolor").astype(np.float32)
    assert np.abs(out[13:] - out[9:-4]).mean() < 0.1  # from chunk to chunk nothing moves
    assert np.abs(np.diff(out[9:], axis=0)).mean() < 2.0  # nor, to the eye, within one


def test_a_long_stream_does_not_drift(pipeline: Pipeline, people: Clip) -> None:
    """Eighty chunks of the same moving people: the last pass looks like an early one."""
    state = pipeline.open(StreamParams(prompt="watercolor"))
    passes = [np.concatenate([pipeline.render(state, people[s : s + 4]) for s in range(0, 20, 4)]) for _ in range(16)]
    assert psnr(passes[-1][4:], passes[1][4:]) > 35
