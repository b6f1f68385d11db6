"""The noise controller against its recurrence, written out plainly."""

import itertools
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine.config import WAN_SAMPLING, MotionConfig
from engine.flow_match import sampling_plan
from engine.noise_control import MotionState, largest_motion, next_level, remember
from engine.pipeline import Pipeline
from tests.engine.streams import camera, opened, pooled_model, still

PUBLIC = MotionConfig()
INITIAL = torch.tensor(0.8, dtype=torch.float64)


def frame(value: float) -> Tensor:
    return torch.full((3, 4, 4), value)


def clip(*values: float) -> Tensor:
    return torch.stack([frame(value) for value in values])


def public(
    chunks: Sequence[Sequence[float]], *, initial: float = 0.8, span: float = 0.1, keep: float = 0.1,
    scale: float = 0.2, window: int = 1,
) -> list[tuple[float, int]]:  # fmt: skip
    """Noise scale and first timestep of every chunk after the first, in Python's own float64."""
    previous, before, motions, out = initial, chunks[0][-1], [], []
    for values in chunks[1:]:
        motions.append(max(abs(b - a) for a, b in itertools.pairwise([before, *values])))
        before = values[-1]
        motion = min(1.0, max(motions[-window:]) / scale)
        previous = (initial - span * motion) * (1 - keep) + previous * keep
        out.append((previous, int(1000 * previous) - 100))
    return out


def controlled(chunks: Sequence[Sequence[float]], config: MotionConfig = PUBLIC) -> list[tuple[float, int]]:
    plan = sampling_plan(1, 1.0, WAN_SAMPLING.model_copy(update={"motion": config}), "cpu")
    state, out = MotionState(), []
    remember(state, clip(*chunks[0]))
    for values in chunks[1:]:
        level = next_level(state, clip(*values), plan.level, config)
        assert level.dtype == torch.float64
        out.append((level.item(), int(plan.at_level(level).timesteps[0])))
    return out


# Pixel values with few binary digits, so that float32 motion is exact.
values = st.integers(-64, 64).map(lambda n: n / 64)
chunks = st.lists(st.lists(values, min_size=4, max_size=4), min_size=2, max_size=12)


@settings(max_examples=60, deadline=None)
@given(chunks)
def test_levels_and_timesteps_are_the_public_recurrence(moving: list[list[float]]) -> None:
    for (level, first), (expected, timestep) in zip(controlled(moving), public(moving), strict=True):
        # Motion itself is float32, as published.
        assert level == pytest.approx(expected, abs=1e-8)
        if abs(1000 * expected - round(1000 * expected)) > 1e-4:
            assert first == timestep


def test_a_still_scene_stays_at_700_and_never_falls_to_699() -> None:
    still_scene = [[0.5] * 4] * 200
    assert controlled(still_scene) == public(still_scene)
    assert {first for _, first in controlled(still_scene)} == {700}


def test_full_motion_gives_the_published_figures() -> None:
    rushing = [[0.0] * 4, *[[1.0, -1.0, 1.0, -1.0]] * 30]
    levels = controlled(rushing)
    assert [levels[0][0], levels[1][0], levels[-1][0]] == pytest.approx([0.71, 0.701, 0.7])
    assert [levels[0][1], levels[1][1], levels[-1][1]] == [610, 601, 600]
    assert [level for level, _ in levels] == sorted((level for level, _ in levels), reverse=True)


@settings(max_examples=40, deadline=None)
@given(chunks, st.integers(1, 5))
def test_the_papers_setting_takes_the_largest_motion_of_its_window(moving: list[list[float]], window: int) -> None:
    config = MotionConfig(source="latents", window=window, scale=0.4, span=0.2, smoothing=0.75)
    ours = controlled(moving, config)
    plain = public(moving, scale=0.4, span=0.2, keep=0.25, window=window)
    assert [level for level, _ in ours] == pytest.approx([level for level, _ in plain], abs=1e-8)


def test_motion_in_an_earlier_chunk_counts_for_its_window_alone() -> None:
    moving = [[0.0] * 4, [0.0, 0.5, 0.0, 0.0], *[[0.0] * 4] * 5]
    config = MotionConfig(window=3, smoothing=1.0)
    assert [level for level, _ in controlled(moving, config)] == pytest.approx([0.7, 0.7, 0.7, 0.8, 0.8, 0.8])


def test_motion_is_the_largest_root_mean_square_between_neighbours() -> None:
    random = torch.Generator().manual_seed(0)
    frames, before = torch.randn(4, 3, 5, 6, generator=random), torch.randn(3, 5, 6, generator=random)
    whole = torch.cat((before[None], frames)).double()
    steps = [((b - a) ** 2).mean().sqrt().item() for a, b in itertools.pairwise(whole)]
    assert largest_motion(frames, before).item() == pytest.approx(max(steps), rel=1e-6)
    assert largest_motion(frames, None).item() == pytest.approx(max(steps[1:]), rel=1e-6)
    assert largest_motion(frames[:1], None) == 0
    assert largest_motion(frames[:1], before).item() == pytest.approx(steps[0], rel=1e-6)


def test_the_step_from_the_chunk_before_counts() -> None:
    jump = [[0.0] * 4, [1.0] * 4, [1.0] * 4]
    assert [first for _, first in controlled(jump)] == [610, 691]


@pytest.mark.parametrize("source", ["pixels", "latents"])
def test_a_stream_follows_its_camera_and_the_first_chunk_is_as_planned(source: str) -> None:
    motion = MotionConfig.model_validate({"source": source})
    sampling = pooled_model().config.sampling.model_copy(update={"motion": motion})
    pipeline = Pipeline(pooled_model(), 32, 48, sampling=sampling)
    state = opened(pipeline, steps=2)
    # Noise of every frame's own: the last one of a chunk goes on to the next.
    cameras = [camera(5, 1), still(4, 2), still(4, 2), still(4, 2), camera(4, 3)]
    schedules = []
    with torch.inference_mode():
        for frames in cameras:
            pixels = pipeline.upload(frames).permute(0, 3, 1, 2).float() / 127.5 - 1
            schedules.append(pipeline.take_in(state, pixels).schedule)
    firsts = [int(schedule.timesteps[0]) for schedule in schedules]
    assert firsts[0] == 700
    assert schedules[0].mix == 0.8
    if source == "pixels":
        assert firsts[1:] == [610, 691, 699, 609]
    assert firsts[1] < firsts[2] < firsts[3] <= 700
    assert firsts[4] < firsts[3]
    assert all(schedule.timesteps[1] == 500 for schedule in schedules)
    assert [float(schedule.mix) * 1000 // 1 - 100 for schedule in schedules] == firsts


def test_without_motion_every_chunk_is_as_planned() -> None:
    sampling = pooled_model().config.sampling.model_copy(update={"motion": None})
    pipeline = Pipeline(pooled_model(), 32, 48, sampling=sampling)
    state = opened(pipeline, steps=2)
    with torch.inference_mode():
        for length in (5, 4, 4):
            pixels = pipeline.upload(camera(length, length)).permute(0, 3, 1, 2).float() / 127.5 - 1
            assert pipeline.take_in(state, pixels).schedule is state.plan.base
