"""Noise levels, the straight path, and the steps that parameters ask for."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine.config import WAN_SAMPLING, MotionConfig, SamplingConfig
from engine.flow_match import (
    add_noise,
    clean_from_flow,
    flow_from_clean,
    nearest_sigma,
    sampling_plan,
    sampling_sigmas,
    sigma_table,
    stacked,
)

PLAIN = SamplingConfig()


def f64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_the_table_runs_from_pure_noise_down_and_shift_raises_it() -> None:
    straight, shifted = sigma_table(1.0), sigma_table(5.0)
    assert straight.dtype == torch.float64
    assert straight.shape == (1000,)
    torch.testing.assert_close(straight[[0, 250, 999]], f64(1.0, 0.75, 0.001))
    assert shifted[0] == 1.0
    assert shifted[500].item() == pytest.approx(5 * 0.5 / (1 + 4 * 0.5))
    assert (shifted[1:-1] > straight[1:-1]).all()
    assert (shifted.diff() < 0).all()


def test_the_published_shift_gives_the_published_levels() -> None:
    # streamdiffusionv2: t and the sigma used at shift 8.
    timesteps = f64(1000, 750, 700, 600, 500, 400, 250, 200, 0)
    expected = f64(1.0, 0.750, 0.70023, 0.60019, 0.49972, 0.40026, 0.250, 0.19835, 0.00794)
    torch.testing.assert_close(nearest_sigma(timesteps, sigma_table(8.0)), expected, atol=5e-4, rtol=0)
    # Those a step is taken at, to all published digits.
    listed = nearest_sigma(f64(700, 500, 400, 200), sigma_table(8.0))
    torch.testing.assert_close(listed, expected[[2, 4, 5, 7]], atol=5e-6, rtol=0)


@settings(deadline=None)
@given(st.floats(0, 1000), st.floats(0.5, 12))
def test_a_timestep_takes_the_nearest_entry(timestep: float, shift: float) -> None:
    table = sigma_table(shift)
    sigma = nearest_sigma(f64(timestep), table)
    assert sigma.item() in table.tolist()
    assert abs(1000 * sigma.item() - timestep) == pytest.approx(min(abs(1000 * s - timestep) for s in table.tolist()))


def test_timesteps_of_any_shape_are_looked_up_at_once() -> None:
    table = sigma_table(5.0)
    assert nearest_sigma(torch.tensor(1000.0), table) == 1.0
    assert nearest_sigma(torch.tensor([[0.0, 1000.0]]), table).tolist() == [[table[-1].item(), 1.0]]


def test_noise_and_flow_lead_back_to_the_clean_latent() -> None:
    clean, noise = torch.randn(2, 2, 3, 4, 5, 6, generator=torch.Generator().manual_seed(0)).unbind(0)
    sigma = torch.tensor([[0.2, 1.0, 0.7], [0.5, 0.9, 0.001]])
    noisy = add_noise(clean, noise, sigma)
    torch.testing.assert_close(noisy[0, 1], noise[0, 1])
    torch.testing.assert_close(clean_from_flow(noisy, noise - clean, sigma), clean, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(
        flow_from_clean(noisy, clean, sigma)[:, :2], (noise - clean)[:, :2], atol=1e-5, rtol=1e-5
    )
    with pytest.raises(ValueError, match="does not fit"):
        add_noise(clean, noise[..., :5], sigma)


def test_one_noise_frame_serves_a_whole_chunk() -> None:
    clean = torch.zeros(1, 3, 4, 5, 6, dtype=torch.bfloat16)
    noisy = add_noise(clean, torch.ones(1, 1, 4, 5, 6, dtype=torch.bfloat16), torch.full((1, 1), 0.5))
    assert (noisy.shape, noisy.dtype) == (clean.shape, torch.bfloat16)
    assert (noisy == 0.5).all()


@settings(deadline=None)
@given(st.integers(1, 4), st.floats(0, 1, exclude_min=True), st.floats(0.5, 8))
def test_levels_start_at_the_strength_and_fall(steps: int, strength: float, shift: float) -> None:
    sigmas = sampling_sigmas(steps, strength, shift)
    assert len(sigmas) == steps
    assert all(0 < sigma <= 1 for sigma in sigmas)
    assert list(sigmas) == sorted(sigmas, reverse=True)
    expected = shift * strength / (1 + (shift - 1) * strength)
    assert sigmas[0] == pytest.approx(expected, abs=0.01)


def test_known_levels() -> None:
    assert sampling_sigmas(1, 1.0, 1.0) == (1.0,)
    assert sampling_sigmas(4, 1.0, 1.0) == pytest.approx((1.0, 0.75, 0.5, 0.25))
    assert sampling_sigmas(2, 0.6, 1.0) == pytest.approx((0.6, 0.3))
    assert sampling_sigmas(3, 0.0, 1.0) == ()


BOUNDS = [(0, 1.0), (5, 1.0), (1, -0.1), (1, 1.1), (1, float("nan"))]


@pytest.mark.parametrize(("steps", "strength"), BOUNDS)
def test_values_out_of_bounds_are_refused(steps: int, strength: float) -> None:
    with pytest.raises(ValueError, match="must be from"):
        sampling_sigmas(steps, strength, 1.0)
    for config in (PLAIN, WAN_SAMPLING):
        with pytest.raises(ValueError, match="must be from"):
            sampling_plan(steps, strength, config, "cpu")


def test_a_plan_holds_timesteps_beside_sigmas() -> None:
    plan = sampling_plan(2, 1.0, PLAIN, "cpu")
    assert (plan.steps, plan.base.sigmas.tolist(), plan.base.timesteps.tolist()) == (2, [1.0, 0.5], [1000.0, 500.0])
    assert plan.base.mix == 1.0
    assert {x.dtype for x in (plan.base.mix, plan.base.sigmas, plan.base.timesteps)} == {torch.float64}


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_n_steps_run_the_first_n_of_the_listed_timesteps(steps: int) -> None:
    plan = sampling_plan(steps, 1.0, WAN_SAMPLING, "cpu")
    assert plan.base.timesteps.tolist() == [700, 500, 400, 200][:steps]
    expected = f64(0.70023, 0.49972, 0.40026, 0.19835)[:steps]
    torch.testing.assert_close(plan.base.sigmas, expected, atol=5e-6, rtol=0)
    assert plan.base.mix == 0.8


def test_more_steps_than_listed_timesteps_are_refused() -> None:
    with pytest.raises(ValueError, match="steps 3 must be from 1 to 2, the timesteps of this model"):
        sampling_plan(3, 1.0, WAN_SAMPLING.model_copy(update={"timesteps": (700, 500)}), "cpu")


def test_strength_scales_listed_timesteps_and_noise_together() -> None:
    plan = sampling_plan(2, 0.5, WAN_SAMPLING, "cpu")
    assert plan.base.timesteps.tolist() == [350, 250]
    assert plan.base.mix == pytest.approx(0.4)
    assert plan.offset == 50
    for config in (PLAIN, WAN_SAMPLING):
        assert sampling_plan(2, 0.0, config, "cpu").steps == 0


def test_a_level_moves_the_first_timestep_alone_and_is_truncated() -> None:
    plan = sampling_plan(3, 1.0, WAN_SAMPLING, "cpu")
    # One below what an exact 800 gives: truncated, not rounded.
    for level, first in ((0.8, 700), (0.71, 610), (0.7999, 699), (0.70099, 600)):
        schedule = plan.at_level(torch.tensor(level, dtype=torch.float64))
        assert schedule.timesteps.tolist() == [first, 500, 400]
        assert schedule.mix == level
        assert schedule.sigmas.tolist() == nearest_sigma(schedule.timesteps, plan.table).tolist()


def test_a_level_in_float32_would_miss_the_published_timestep() -> None:
    # Why the controller is in float64: the same recurrence, one step of a still scene.
    single = torch.tensor(0.8) * 0.9 + torch.tensor(0.8) * 0.1
    assert int(1000 * single) - 100 == 699
    plan = sampling_plan(1, 1.0, WAN_SAMPLING, "cpu")
    assert plan.at_level(plan.level * 0.9 + plan.level * 0.1).timesteps.item() == 700


@settings(deadline=None)
@given(st.integers(1, 4), st.floats(0.001, 1), st.floats(0, 1))
def test_the_guard_keeps_the_steps_falling_and_above_zero(steps: int, strength: float, level: float) -> None:
    plan = sampling_plan(steps, strength, WAN_SAMPLING, "cpu")
    timesteps = plan.at_level(torch.tensor(level * strength, dtype=torch.float64)).timesteps.tolist()
    assert len(timesteps) == steps
    assert all(a > b for a, b in itertools.pairwise(timesteps))
    assert timesteps[-1] > 0


def test_without_the_guard_the_public_steps_may_rise() -> None:
    config = WAN_SAMPLING.model_copy(update={"motion": MotionConfig(monotonic=False)})
    level = torch.tensor(0.55, dtype=torch.float64)
    assert sampling_plan(2, 1.0, config, "cpu").at_level(level).timesteps.tolist() == [450, 500]
    guarded = sampling_plan(2, 1.0, WAN_SAMPLING, "cpu").at_level(level).timesteps.tolist()
    assert guarded == [450, pytest.approx(500 * 450 / 700)]


def test_one_value_a_row_becomes_a_batch() -> None:
    assert stacked([torch.tensor(2.0)]).tolist() == [2.0]
    assert stacked([torch.tensor(2.0), torch.tensor(3.0)]).tolist() == [2.0, 3.0]
