"""Noise levels and the straight path."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.flow_match import (
    add_noise,
    clean_from_flow,
    flow_from_clean,
    nearest_sigma,
    sampling_plan,
    sampling_sigmas,
    sigma_table,
)


def test_the_table_runs_from_pure_noise_down_and_shift_raises_it() -> None:
    straight, shifted = sigma_table(1.0), sigma_table(5.0)
    assert straight.dtype == torch.float64
    assert straight.shape == (1000,)
    torch.testing.assert_close(straight[[0, 250, 999]], torch.tensor([1.0, 0.75, 0.001], dtype=torch.float64))
    assert shifted[0] == 1.0
    assert shifted[500].item() == pytest.approx(5 * 0.5 / (1 + 4 * 0.5))
    assert (shifted[1:-1] > straight[1:-1]).all()
    assert (shifted.diff() < 0).all()


def test_a_timestep_takes_the_nearest_entry() -> None:
    table = sigma_table(5.0)
    assert nearest_sigma(1000, table) == 1.0
    assert nearest_sigma(0, table) == table[-1]
    sigma = nearest_sigma(700, table)
    assert abs(1000 * sigma - 700) == (1000 * table - 700).abs().min()


def test_noise_and_flow_lead_back_to_the_clean_latent() -> None:
    clean, noise = torch.randn(2, 2, 3, 4, 5, 6).unbind(0)
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


@pytest.mark.parametrize(("steps", "strength"), [(0, 1.0), (5, 1.0), (1, -0.1), (1, 1.1), (1, float("nan"))])
def test_values_out_of_bounds_are_refused(steps: int, strength: float) -> None:
    with pytest.raises(ValueError, match="must be from"):
        sampling_sigmas(steps, strength, 1.0)


def test_a_plan_holds_timesteps_beside_sigmas() -> None:
    plan = sampling_plan(2, 1.0, 1.0, "cpu")
    assert (plan.steps, plan.sigmas.tolist(), plan.timesteps.tolist()) == (2, [1.0, 0.5], [1000.0, 500.0])
