"""Steadying: what only moved keeps its picture, what is new shows at once."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from engine.api import StreamParams
from engine.config import MODELS_DIR, SteadyConfig
from engine.pipeline import Pipeline
from engine.steady import Watcher, optical_flow, steady
from engine.wan.weights import Model, load_model

CONFIG = SteadyConfig()
SHARE = 0.8


def scene(seed: int = 0, height: int = 128, width: int = 160) -> Tensor:
    """A smooth picture [3, H, W] in [-1, 1] with something to see everywhere."""
    noise = torch.rand(1, 3, height // 8 + 2, width // 8 + 2, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return functional.interpolate(noise, (height + 16, width + 16), mode="bicubic")[0].clamp(-1, 1)


def moving(frames: int, by: tuple[int, int], seed: int = 0) -> Tensor:
    """The scene under a window that goes `by` (x, y) pixels a frame [T, 3, 128, 160]."""
    x, y = by
    whole = scene(seed, 128 + abs(y) * frames, 160 + abs(x) * frames)
    left, top = (0 if step >= 0 else -step * (frames - 1) for step in by)
    shifts = ((top + y * t, left + x * t) for t in range(frames))
    return torch.stack([whole[:, row : row + 128, column : column + 160] for row, column in shifts])


def watched(clip: Tensor, wanted: bool = True) -> Watcher:
    watcher = Watcher()
    assert watcher.watch(clip, CONFIG, wanted=wanted) is None
    return watcher


@pytest.mark.parametrize("by", [(0, 0), (2, 0), (-3, 1), (5, -4), (0, 8)])
def test_flow_finds_how_a_scene_moved(by: tuple[int, int]) -> None:
    grey = functional.avg_pool2d(moving(2, by)[:, 1:2], 2)[:, 0] * 127.5
    flow, error = optical_flow(grey[:1], grey[1:])
    inner = flow[0, :, 3:-3, 3:-3].flatten(1).median(dim=1).values * 2
    assert inner.tolist() == pytest.approx(by, abs=0.25)
    still, _ = optical_flow(grey[:1], grey[:1])
    assert not still.any()
    unexplained = (grey[1] - grey[0]).abs().mean()
    assert error[0, 4:-4, 4:-4].mean() <= 0.2 * unexplained + 1e-3


def test_noise_of_the_camera_is_no_motion() -> None:
    noise = torch.randn(2, 64, 80, generator=torch.Generator().manual_seed(1)) * 2
    flow, _ = optical_flow(100 + noise[:1], 100 + noise[1:])
    assert flow.norm(dim=1).mean() < 0.1
    assert (flow == 0).float().mean() > 0.5


def test_a_redrawn_picture_rests_where_the_scene_moved() -> None:
    camera = moving(9, (3, 1))
    redrawn = 6 / 127.5 * torch.randn(camera.shape, generator=torch.Generator().manual_seed(2))
    pictures = (camera + redrawn).clamp(-1, 1)
    watcher, shown, before = watched(camera[:1]), [pictures[0]], pictures[0]
    for start in (1, 5):
        motion = watcher.watch(camera[start : start + 4], CONFIG)
        out = steady(pictures[start : start + 4], before, motion, SHARE, CONFIG)
        before = out[-1]
        shown += list(out)

    def unrest(frames: list[Tensor]) -> float:
        """Difference of frames to their predecessors moved along, beside the scene's own."""
        pairs = itertools.pairwise(frames[3:])
        return float(torch.stack([(b[:, 8:-16, 8:-16] - a[:, 9:-15, 11:-13]).abs().mean() for a, b in pairs]).mean())

    assert unrest(shown) < 0.5 * unrest(list(pictures))
    # It is the same scene still, at the same place.
    inner = (slice(None), slice(8, -8), slice(8, -8))
    assert (shown[-1] - camera[-1])[inner].abs().mean() < (pictures[-1] - camera[-1])[inner].abs().mean()


def test_a_new_scene_and_a_new_style_show_at_once() -> None:
    first, second = scene(1)[:, :128, :160], scene(2)[:, :128, :160]
    watcher = watched(first[None])
    cut = watcher.watch(second[None], CONFIG)
    assert cut is not None
    out = steady(second[None], first, cut, SHARE, CONFIG, first=1)
    assert (out - second).abs().mean() < 0.1 * (first - second).abs().mean()
    resting = watcher.watch(second[None], CONFIG)
    inverted = -second
    out = steady(inverted[None], second, resting, SHARE, CONFIG, first=1)
    large = (2 * second).abs() > 0.6
    assert (out[0] - inverted)[large].abs().mean() < 0.15 * (2 * second)[large].abs().mean()


def test_without_a_share_nothing_moves_and_no_flow_is_looked_for() -> None:
    camera = moving(5, (4, 0))
    watcher = watched(camera[:1])
    assert watcher.watch(camera[1:], CONFIG, wanted=False) is None
    motion = watched(camera[:1]).watch(camera[1:], CONFIG)
    assert motion is not None
    pictures = scene(3)[None, :, :128, :160].expand(4, -1, -1, -1)
    assert torch.equal(
        steady(pictures, pictures[0], motion, 0.0, CONFIG), steady(pictures, pictures[0], None, SHARE, CONFIG)
    )
    torch.testing.assert_close(steady(pictures, pictures[0], motion, 0.0, CONFIG), pictures)


def test_small_changes_are_damped_large_ones_pass_and_lasting_ones_arrive() -> None:
    levels, before, ones = CONFIG.damped_levels / 127.5, torch.zeros(3, 8, 8), torch.ones(1, 3, 8, 8)

    def alone(frames: Tensor, first: int = 1) -> Tensor:
        return steady(frames, before, None, 0.0, CONFIG, first=first)

    assert float(alone(0.2 * levels * ones).max()) < 0.01 * levels
    assert float(alone(10 * levels * ones).min()) > 9.8 * levels
    # At the seam of two chunks the threshold is the larger one.
    assert float(alone(2 * levels * ones, first=0).max()) < 0.7 * levels < float(alone(2 * levels * ones).min())
    lasting = alone((levels * ones).expand(80, -1, -1, -1))
    assert torch.all(lasting[1:] >= lasting[:-1])
    assert float(lasting[-1].min()) > 0.6 * levels
    assert torch.equal(steady(ones, None, None, 0.0, CONFIG), ones)


def test_a_jump_between_chunks_is_spread_over_two_frames_and_another_scene_is_not() -> None:
    def energies(shown: Tensor, before: Tensor) -> list[float]:
        return [float((b - a).square().mean()) for a, b in itertools.pairwise((before, *shown))]

    before, drift = scene()[:, :128, :160], 0.02 * scene(4)[None, :, :128, :160]
    steps = torch.arange(8)[:, None, None, None]
    moved = before + 0.25 * scene(5)[:, :128, :160]  # what is drawn anew at the first seam
    chunk = moved + drift * steps
    shown = steady(chunk, before, None, 0.0, CONFIG)
    drawn, seen = energies(chunk, before), energies(shown, before)
    assert drawn[0] > 20 * drawn[1]
    assert max(seen) < 0.25 * drawn[0]
    # From the third frame on, and at a seam without a jump, nothing is changed: the same as without it.
    plain = steady(chunk, before, None, 0.0, CONFIG.model_copy(update={"eased_most": 0.0}))
    assert torch.equal(shown[2:], plain[2:])
    assert not torch.equal(shown[:2], plain[:2])
    other = scene(6)[None, :, :128, :160] + drift * steps
    assert (other[0] - before).square().mean().sqrt() * 127.5 > CONFIG.scene_levels[1]
    cut = steady(other, before, None, 0.0, CONFIG)
    assert torch.equal(cut, steady(other, before, None, 0.0, CONFIG.model_copy(update={"eased_most": 0.0})))


def test_a_noisy_still_picture_comes_out_quieter() -> None:
    noise = torch.randn(33, 3, 128, 160, generator=torch.Generator().manual_seed(0))
    noisy = scene()[:, :128, :160] * 0.9 + 3 / 127.5 * noise
    watcher = watched(noisy[:1])
    motion = watcher.watch(noisy[1:], CONFIG)
    for given in (None, motion):
        quiet = steady(noisy[1:], noisy[0], given, SHARE, CONFIG)
        assert float(quiet[8:].std(dim=0).mean()) < 0.6 * float(noisy[9:].std(dim=0).mean())


def test_frames_of_another_size_begin_anew() -> None:
    watcher = watched(scene()[None, :, :128, :160])
    assert watcher.watch(scene()[None, :, :64, :96], CONFIG) is None
    assert watcher.watch(scene()[None, :, :64, :96], CONFIG) is not None


def test_a_stream_is_steadied_and_another_prompt_begins_anew() -> None:
    """Through the pipeline: a style that is carried rests more than without, and a switch is a clean cut."""
    resting = load_model(MODELS_DIR / "livebrush-tiny", "cpu")
    restless = replace(resting, config=resting.config.model_copy(update={"steady": None}))
    camera = ((moving(13, (2, 0)) + 1) * 127.5).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()
    noise = np.random.default_rng(0).normal(size=camera.shape) * 8
    camera = (camera + noise).clip(0, 255).astype(np.uint8)

    def run(with_model: Model, switched: bool) -> NDArray[np.float32]:
        pipeline = Pipeline(with_model, 160, 128, streams=1)
        state = pipeline.open(StreamParams(prompt="thermal camera"))
        out = [pipeline.render(state, camera[:1])]
        for number, start in enumerate((1, 5, 9)):
            if switched and number == 2:
                pipeline.set_params(state, StreamParams(prompt="a comic"))
            out.append(pipeline.render(state, camera[start : start + 4]))
        return np.concatenate(out).astype(np.float32)

    plain, steadied = run(restless, False), run(resting, False)
    assert np.array_equal(plain[0], steadied[0])
    inner = (slice(None), slice(8, -8), slice(8, -8))

    def unrest(clip: NDArray[np.float32]) -> float:
        return float(np.abs(clip[5:][inner] - clip[4:-1][:, 8:-8, 10:-6]).mean())

    assert unrest(steadied) < 0.6 * unrest(plain)
    # The switched chunk's first frame is what the model made, untouched by what came before.
    assert np.array_equal(run(restless, True)[9], run(resting, True)[9])
