import cv2
import numpy as np
import pytest

from engine.training.data import STYLES
from engine.training.synth import ClipSynth, Material
from engine.training.teachers import TEACHERS, UNSCREENED, Picture, stylise, stylise_clip

rng = np.random.default_rng(0)


def psnr(a: Picture, b: Picture) -> float:
    return float(-10 * np.log10(np.square(a.astype(np.float32) - b).mean() / 255**2 + 1e-9))


def portrait() -> Picture:
    """A round pale face with dark eyes on a shaded wall."""
    y, x = np.mgrid[0:96, 0:128].astype(np.float32)
    wall = np.stack([90 + x / 2, 110 + y / 2, 160 - x / 2], -1)
    face = ((x - 64) ** 2 + (y - 48) ** 2 < 30**2)[..., None]
    eyes = ((np.abs(np.abs(x - 64) - 12) < 4) & (np.abs(y - 42) < 3))[..., None]
    picture = np.where(eyes, (40, 30, 30), np.where(face, (225, 180, 150), wall))
    return np.asarray(cv2.GaussianBlur(picture.astype(np.float32), (0, 0), 0.8), np.uint8)


@pytest.mark.parametrize("style", STYLES)
def test_a_teacher_keeps_shape_and_input_and_repeats_itself(style: str) -> None:
    picture = portrait()
    before = picture.copy()
    first = stylise(style, picture)
    assert first.shape == picture.shape
    assert first.dtype == np.uint8
    assert np.array_equal(picture, before)
    assert np.array_equal(first, stylise(style, picture))


@pytest.mark.parametrize("style", [style for style in STYLES if style != "photo"])
def test_a_style_is_obvious_and_steady_under_camera_noise(style: str) -> None:
    picture = portrait()
    noisy = np.clip(picture + rng.normal(size=picture.shape) * 2, 0, 255).astype(np.uint8)
    styled = stylise(style, picture)
    assert psnr(styled, picture) < 26
    assert psnr(stylise(style, noisy), styled) > psnr(styled, picture) + 6


def test_styles_differ_from_each_other() -> None:
    clip = stylise_clip(STYLES, portrait()[None])
    assert clip.shape == (len(TEACHERS), 1, 96, 128, 3)
    for i in range(len(STYLES)):
        for j in range(i):
            assert psnr(clip[i], clip[j]) < 30, (STYLES[i], STYLES[j])


def test_the_plain_photo_is_the_picture_itself() -> None:
    assert np.array_equal(stylise("photo", portrait()), portrait())


def test_a_seed_draws_the_same_clip_and_faults_stay_on_the_camera_side() -> None:
    picture = portrait()
    material = Material([picture], [picture[::-1]], [np.stack([np.roll(picture, i, 1) for i in range(20)])])
    for seed in range(24):
        size = (64, (96, 64), (64, 112))[seed % 3]
        height, width = (size, size) if isinstance(size, int) else size
        first, again = (ClipSynth(material, size_px=size, seed=seed) for _ in range(2))
        clean = first.clean(9)
        assert clean.shape == (9, height, width, 3)
        assert np.array_equal(clean, again.clean(9))
        before = clean.copy()
        seen = first.camera(clean)
        assert seen.shape == clean.shape
        assert seen.dtype == np.uint8
        assert np.array_equal(seen, again.camera(clean))
        assert np.array_equal(clean, before)


def test_some_clips_stand_still_and_some_are_dim() -> None:
    picture = portrait()
    material = Material([picture], [picture[::-1]], [np.stack([np.roll(picture, 3 * i, 1) for i in range(20)])])
    clips = [ClipSynth(material, size_px=64, seed=seed).clean(5).astype(np.float32) for seed in range(80)]
    moves = np.array([np.abs(np.diff(clip, axis=0)).mean() for clip in clips])
    light = np.array([clip.mean() for clip in clips])
    assert 0.05 < (moves < 1.5).mean() < 0.4
    assert 0.04 < (light < 0.6 * np.median(light)).mean() < 0.3


def test_clips_whose_sides_are_no_whole_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match="multiples of 16"):
        ClipSynth(Material([], [], []), size_px=(64, 72), seed=0)


@pytest.mark.parametrize("style", STYLES)
def test_a_teacher_moves_with_the_picture_by_whole_tokens_and_looks_no_further_than_48_px(style: str) -> None:
    wide = np.concatenate([portrait(), portrait()[:, ::-1]], 1)
    left, right = stylise(style, wide[:, :192]), stylise(style, wide[:, 16:208])
    assert np.abs(left[:, 64:144].astype(int) - right[:, 48:128]).max() <= 2


def still_and_noisy(frames: int = 7) -> Picture:
    noise = np.random.default_rng(4).normal(size=(frames, 96, 128, 3)) * 3
    return np.clip(portrait() + noise, 0, 255).astype(np.uint8)


def flicker(clip: Picture) -> float:
    return float(np.abs(np.diff(clip[2:].astype(np.float32), axis=0)).mean())


def test_a_still_noisy_clip_comes_out_far_quieter_than_frame_by_frame() -> None:
    clip = still_and_noisy()
    styles = STYLES[1:]
    for style, steadied in zip(styles, stylise_clip(styles, clip), strict=True):
        alone = np.stack([stylise(style, frame) for frame in clip])
        assert flicker(steadied) < 0.6 * flicker(alone), style
        assert flicker(steadied) < 0.2 * flicker(clip), style
        assert psnr(steadied[-1], stylise(style, portrait())) > 30, style


def test_steadying_follows_motion_and_smears_neither_picture_nor_screen() -> None:
    base = np.concatenate([portrait(), portrait()[:, ::-1]], 1)
    clip = np.stack([base[:, 4 * i : 4 * i + 128] for i in range(6)])
    for style, steadied in zip(STYLES, stylise_clip(STYLES, clip), strict=True):
        at_once = stylise(style, clip[-1])
        assert psnr(steadied[-1, 16:-16, 16:-16], at_once[16:-16, 16:-16]) > 24, style


def test_a_cut_starts_afresh() -> None:
    first, second = portrait(), np.ascontiguousarray(255 - portrait())
    for style, steadied in zip(STYLES, stylise_clip(STYLES, np.stack([first, second])), strict=True):
        assert psnr(steadied[1], stylise(style, second)) > psnr(steadied[1], stylise(style, first)) + 8, style


def test_the_photo_is_left_alone_in_a_clip_and_unscreened_styles_exist() -> None:
    clip = still_and_noisy(3)
    assert np.array_equal(stylise_clip(["photo"], clip)[0], clip)
    assert set(TEACHERS) >= UNSCREENED
