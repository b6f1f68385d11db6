import cv2
import numpy as np
import pytest

from engine.training.data import STYLES
from engine.training.evaluate import psnr
from engine.training.synth import ClipSynth, Material
from engine.training.teachers import TEACHERS, Picture, stylise, stylise_clip

rng = np.random.default_rng(0)


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
    for seed in range(8):
        first, again = (ClipSynth(material, size_px=64, seed=seed) for _ in range(2))
        clean = first.clean(9)
        assert clean.shape == (9, 64, 64, 3)
        assert np.array_equal(clean, again.clean(9))
        before = clean.copy()
        assert first.camera(clean).shape == clean.shape
        assert np.array_equal(clean, before)
