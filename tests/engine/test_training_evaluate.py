"""The evaluation's measures on made clips whose values are known, and the whole of it on one of them."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from engine.training.card import model_card, verdicts, with_figures
from engine.training.classifier import StyleJudge, StyleNet, train
from engine.training.evaluate import Bench, Plan, draw, read_prompts, run_size
from engine.training.heldout import HeldOut, Teachers, cut, still_noisy
from engine.training.measures import (
    Motion,
    edges_kept,
    flicker,
    frames_until,
    landmarks_kept,
    psnr,
    seam_ratio,
    ssim,
    token_steps,
    warp_error,
)
from engine.training.phrases import BY_ID
from engine.training.sheets import save_jpeg
from engine.wan.text_encoder import Style, StyleIndex
from engine.wan.untrained import untrained_model

Clip = NDArray[np.uint8]


def texture(seed: int = 0, size: int = 192) -> Clip:
    """A smooth random picture with structure at several scales."""
    import cv2

    rng = np.random.default_rng(seed)
    layers = [cv2.GaussianBlur(rng.normal(size=(size, size, 3)).astype(np.float32), (0, 0), s) * s for s in (2, 5, 12)]
    total = np.sum(layers, axis=0)
    return np.asarray(np.clip(128 + 70 * total / total.std(), 0, 255), np.uint8)


def panned(step_px: int, frames: int = 9, size: int = 128) -> Clip:
    """A window that moves over the texture."""
    picture = texture()
    return np.stack([picture[20 : 20 + size, step_px * i : step_px * i + size] for i in range(frames)])


def test_equal_clips_are_alike_by_every_measure_and_noise_is_not() -> None:
    frame = texture()
    noisy = np.clip(frame + np.random.default_rng(1).normal(size=frame.shape) * 20, 0, 255).astype(np.uint8)
    assert psnr(frame, frame) == pytest.approx(90)
    assert psnr(frame, noisy) == pytest.approx(22.1, abs=0.7)
    assert ssim(frame, frame) == pytest.approx(1)
    assert ssim(frame, noisy) < 0.8
    assert edges_kept(frame, frame) == pytest.approx(1)
    assert landmarks_kept(frame, frame) == 1


def test_recoloured_features_are_kept_and_moved_ones_are_not() -> None:
    frame = texture()
    assert edges_kept(255 - frame, frame) == pytest.approx(1, abs=0.01)
    assert landmarks_kept(np.asarray(255 - frame, np.uint8), frame) > 0.95
    assert landmarks_kept(np.roll(frame, 4, axis=1), frame) < 0.2
    assert landmarks_kept(texture(5), frame) < 0.2
    assert landmarks_kept(frame, frame, box=(40, 40, 60, 60)) == 1


def test_a_panned_picture_has_no_warp_error_and_a_screen_that_stands_still_has() -> None:
    clip = panned(2)
    motion = Motion.of(clip)
    screen = np.where((np.arange(128) % 8 < 4)[None, :, None], 30, -30)
    assert warp_error(clip, motion) < 1.5
    assert warp_error(np.clip(clip + screen, 0, 255).astype(np.uint8), motion) > 5
    flashing = clip.copy()
    flashing[::2] //= 2
    assert warp_error(flashing, motion) > 20


def test_flicker_of_a_still_scene_is_the_noise_on_it() -> None:
    still = np.repeat(texture(size=64)[None] // 2 + 60, 32, axis=0)
    noisy = still + np.random.default_rng(0).normal(size=still.shape) * 3
    assert flicker(still) == 0
    assert flicker(np.clip(noisy, 0, 255).astype(np.uint8)) == pytest.approx(3, abs=0.2)


def test_a_seam_shows_where_chunks_begin_and_only_there() -> None:
    even = np.stack([np.full((8, 8, 3), 10 * i, np.uint8) for i in range(17)])
    assert seam_ratio(even) == pytest.approx(1, abs=1e-3)
    jumps = np.stack([np.full((8, 8, 3), 5 * i + 5 * ((i + 3) // 4), np.uint8) for i in range(17)])
    assert seam_ratio(jumps) == pytest.approx(4, abs=1e-2)  # twice the difference, four times the energy
    assert seam_ratio(jumps, first=3) < 1
    faster = np.stack([np.full((8, 8, 3), i * i // 2, np.uint8) for i in range(21)])
    assert seam_ratio(faster) == pytest.approx(0.9, abs=0.1)


def test_a_switch_is_complete_once_the_new_style_stays_nearest() -> None:
    assert frames_until(["ink", "ink", "ink"], "ink") == 0
    assert frames_until(["neon", "ink", "neon", "ink", "ink"], "ink") == 3
    assert frames_until(["neon", "neon"], "ink") == 2


# --- the whole evaluation, on a made clip and an untrained model


class EverybodysJudge:
    """Takes the first style it was told of for every picture; distance is mean absolute difference."""

    def style_of(self, frame_HWC: Clip) -> str:
        return "thermal"

    def distance(self, a_HWC: Clip, b_HWC: Clip) -> float:
        return float(np.abs(a_HWC.astype(float) - b_HWC).mean())

    def cosine(self, a_HWC: Clip, b_HWC: Clip) -> float:
        return 1.0 if np.array_equal(a_HWC, b_HWC) else 0.9


def held_out() -> HeldOut:
    clip = np.ascontiguousarray(panned(1, frames=13, size=128))
    made = HeldOut("made", clip, clip)
    made.__dict__["faces"] = dict.fromkeys(made.sampled)  # the finder is in an extra that tests do without
    return made


@pytest.fixture(scope="module")
def figures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A quick evaluation of an untrained model in three styles."""
    torch.set_num_threads(1)
    work = tmp_path_factory.mktemp("work")
    model = untrained_model()
    listed = [Style(id=id_, name=id_, prompt=BY_ID[id_].prompt) for id_ in ("photo", "thermal", "comic")]
    model = replace(model, styles=StyleIndex(None, listed))
    plan = Plan(people=work, work=work, model=work, quick=True, phrases_per_clip=1, sheets=(0,))
    bench = Bench(
        plan, {"model": model}, Teachers(work, ["photo", "thermal", "comic"]), EverybodysJudge(), EverybodysJudge(),
        [held_out()],
    )  # fmt: skip
    found = run_size(bench, whole=True)
    draw(bench, plan)
    assert (work / "sheet_quick.png").exists() and (work / "motion_quick.png").exists()
    cost = {"fps": 40.0, "chunk_ms": 100.0, "cpu_fps": 41.0}
    return {
        "format": 3,
        "sha256": "0" * 64,
        "frames": 13,
        "steps": 1,
        "compare": None,
        "speed": {"float32": {"256x256": cost, "384x224": cost}},
        "files": {"size_mb": 1.0, "load_s": 2.0},
        "prompts": {"model": bench.run_prompts("model", [("thermal", "what a missile sees"), ("oil", "louvre")])},
        "sizes": {"128x128": found},
    }


def test_token_steps_tell_tokens_of_another_colour_from_noise_and_from_contours() -> None:
    rng = np.random.default_rng(0)
    teacher = np.full((128, 128, 3), 120, np.uint8)
    noisy = np.clip(teacher + rng.normal(size=teacher.shape) * 3, 0, 255).astype(np.uint8)
    tokens = np.kron(rng.integers(-12, 12, (8, 8)), np.ones((16, 16), np.int64))[..., None]
    assert token_steps(noisy, teacher) == pytest.approx(1, abs=0.1)
    assert token_steps(np.asarray(noisy + tokens, np.uint8), teacher) > 1.5
    assert token_steps(np.roll(noisy + tokens, 5, (0, 1)).astype(np.uint8), teacher) < 1.1
    drawn = teacher.copy()
    drawn[:, ::4] = 0  # nowhere flat
    assert token_steps(noisy, drawn) == 1


def test_every_candidate_is_measured_and_an_untrained_model_is_no_style(figures: dict[str, Any]) -> None:
    candidates = figures["sizes"]["128x128"]["candidates"]
    assert set(candidates) == {"model", "teacher", "round trip", "input"}
    assert set(candidates["model"]) == {"photo", "thermal", "comic"}
    thermal = candidates["model"]["thermal"]
    assert thermal["psnr_db"] < 15
    assert thermal["nearest_known"] == thermal["nearest_unseen"] == 0
    assert thermal["switch_frames"] == 4
    assert thermal["other_seed_db"] < 30
    assert candidates["teacher"]["thermal"]["classifier"] == 1
    assert candidates["input"]["photo"]["psnr_db"] == pytest.approx(90)
    assert candidates["input"]["comic"]["landmarks_kept"] == 1


def test_the_card_holds_every_threshold_beside_its_figure_and_keeps_the_rest(figures: dict[str, Any]) -> None:
    verdict = {v.goal: v for v in verdicts(figures)}
    assert not verdict["load to first frame under 1.0 s"].met
    assert verdict["file set at most 25 MB"].met
    assert any("(comic" in v.measured or "(thermal" in v.measured for v in verdict.values())
    (prompts,) = (v for goal, v in verdict.items() if "unseen prompts" in goal)
    assert prompts.measured.startswith("0 of 1")
    card = model_card({}, {"decoder": (21.0, 2220)})
    assert "Not yet evaluated" in card
    filled = with_figures(card, figures)
    assert "**not met**" in filled and "| thermal |" in filled and "| decoder | 21 min" in filled
    assert filled.split("## Limits")[1] == card.split("## Limits")[1]
    assert with_figures(filled, figures) == filled
    assert filled == model_card(figures, {"decoder": (21.0, 2220)}).replace(
        "`photo`, `thermal`, `comic`", "see styles.json"
    )


def test_prompts_are_read_with_the_style_expected() -> None:
    prompts = read_prompts()
    assert len(prompts) == 30
    assert all(style and prompt and "|" not in prompt for style, prompt in prompts)


def test_pictures_for_documents_stay_below_their_limit(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (900, 900, 3), dtype=np.uint8)
    assert save_jpeg(tmp_path / "noise.jpg", noise, 200_000) == (tmp_path / "noise.jpg").stat().st_size < 200_000
    with pytest.raises(ValueError, match="does not fit"):
        save_jpeg(tmp_path / "never.jpg", noise, 2_000)


# --- judges and material


def test_the_classifier_learns_two_textures_and_its_distance_orders_frames() -> None:
    plain = np.stack([texture(k, 128) for k in range(3)])
    dotted = np.clip(plain + np.where((np.arange(128) % 8 < 3)[:, None, None], 60, -20), 0, 255).astype(np.uint8)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = StyleNet(2)
        train(net, np.stack([plain, dotted]), steps=25)
    judge = StyleJudge(net, ("plain", "dotted"))
    assert [judge.style_of(frame) for frame in (plain[0], dotted[1])] == ["plain", "dotted"]
    assert judge.distance(plain[0], plain[0]) == pytest.approx(0)
    assert judge.distance(plain[0], plain[0] // 16 * 16) < judge.distance(plain[0], dotted[0])


def test_teachers_run_once_and_are_read_back(tmp_path: Path) -> None:
    clip = held_out()
    first = Teachers(tmp_path, ["photo", "thermal"]).steadied(clip)
    (kept,) = tmp_path.rglob("thermal_*.npy")
    written = kept.stat().st_mtime_ns
    again = Teachers(tmp_path, ["photo", "thermal"])
    assert np.array_equal(again.steadied(clip)["thermal"], first["thermal"])
    assert kept.stat().st_mtime_ns == written
    assert first["photo"] is clip.clean
    assert again.per_frame(clip)["thermal"].shape == clip.clean.shape
    assert again.key != Teachers(tmp_path, ["photo", "comic"]).key


def test_frames_are_cut_to_any_shape_from_the_middle() -> None:
    frame = texture(size=120)
    for size in ((64, 64), (96, 56), (56, 96), (240, 240)):
        assert cut(frame, size).shape == (size[1], size[0], 3)
    assert np.array_equal(cut(frame, (120, 120)), frame)
    noisy = still_noisy(held_out(), 12)
    assert flicker(noisy) == pytest.approx(3, abs=0.4)
