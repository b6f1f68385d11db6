"""Flow matching: noise levels, the straight path between clean and noise, and where a stream starts on it.

Axes in names: B batch, T latent frames, C channels, H and W rows and columns, S denoising steps.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

TABLE_ENTRIES = 1000
MAX_STEPS = 4


def sigma_table(shift: float) -> Tensor:
    """The 1,000 noise levels of a checkpoint, noisiest first, float64.

    Args:
        shift: above 1 spends more of the table at high noise; 1 is the straight line.
    Source: Wan 2.1: sigma = shift * s / (1 + (shift - 1) * s) for s from 1 down to 0.001.
    """
    s = torch.arange(TABLE_ENTRIES, 0, -1, dtype=torch.float64) / TABLE_ENTRIES
    return shift * s / (1 + (shift - 1) * s)


def nearest_sigma(timestep: float, table: Tensor) -> float:
    """The table's noise level nearest to a timestep from 0 to 1000. Reads the table: for set-up, not for a tick."""
    return float(table[(table * 1000 - timestep).abs().argmin()])


def add_noise(clean_BTCHW: Tensor, noise_BTCHW: Tensor, sigma_BT: Tensor) -> Tensor:
    """Move a clean latent to noise level sigma on the straight flow-matching path.

    Args:
        clean_BTCHW: latent in the scale its checkpoint expects, any float dtype.
        noise_BTCHW: standard normal sample, same dtype and device; B and T may be 1 and are then broadcast.
        sigma_BT: noise level per latent frame, float32, from 0 (clean) to 1 (pure noise); likewise.

    Returns: (1 - sigma) * clean + sigma * noise, in the dtype of clean_BTCHW.
    Raises: ValueError, if clean and noise differ in channels or size. Sigma's range is checked in the settings,
        once: here it would read the GPU back on every chunk.
    Source: the linear path of Liu et al., arXiv:2209.03003; their t runs from noise to data: sigma = 1 - t.
    """
    if clean_BTCHW.shape[2:] != noise_BTCHW.shape[2:]:
        raise ValueError(f"noise {tuple(noise_BTCHW.shape)} does not fit latent {tuple(clean_BTCHW.shape)}")
    sigma = sigma_BT[:, :, None, None, None]
    return ((1 - sigma) * clean_BTCHW + sigma * noise_BTCHW).to(clean_BTCHW.dtype)


def clean_from_flow(noisy_BTCHW: Tensor, flow_BTCHW: Tensor, sigma_BT: Tensor) -> Tensor:
    """The clean latent that a flow (noise - clean) points back to: x_t - sigma * flow, formed in float64."""
    sigma = sigma_BT[:, :, None, None, None].double()
    return (noisy_BTCHW.double() - sigma * flow_BTCHW.double()).to(noisy_BTCHW.dtype)


def flow_from_clean(noisy_BTCHW: Tensor, clean_BTCHW: Tensor, sigma_BT: Tensor) -> Tensor:
    """The flow that leads from a clean latent through x_t: (x_t - clean) / sigma, formed in float64; sigma > 0."""
    sigma = sigma_BT[:, :, None, None, None].double()
    return ((noisy_BTCHW.double() - clean_BTCHW.double()) / sigma).to(noisy_BTCHW.dtype)


def sampling_sigmas(steps: int, strength: float, shift: float) -> tuple[float, ...]:
    """Noise levels of the denoising steps, noisiest first: evenly spaced from the start level down, then shifted.

    Args:
        steps: 1 to 4.
        strength: 1 starts from pure noise; below 1 from the source at the lower level (SDEdit, arXiv:2108.01073);
            0 has no steps: the source is the result.

    Raises: ValueError outside of these.
    """
    if not 1 <= steps <= MAX_STEPS:
        raise ValueError(f"steps {steps} must be from 1 to {MAX_STEPS}")
    if not 0 <= strength <= 1:
        raise ValueError(f"strength {strength} must be from 0 to 1")
    if strength == 0:
        return ()
    table = sigma_table(shift)
    levels = (strength * (steps - step) / steps for step in range(steps))
    return tuple(float(table[min(TABLE_ENTRIES - 1, round(TABLE_ENTRIES * (1 - s)))]) for s in levels)


@dataclass(frozen=True)
class SamplingPlan:
    """The steps of every chunk of a stream, with their levels on its device so that a step reads nothing back."""

    strength: float
    sigmas: Tensor
    timesteps: Tensor

    @property
    def steps(self) -> int:
        """Denoising steps per chunk; 0 at strength 0."""
        return self.sigmas.shape[0]


def sampling_plan(steps: int, strength: float, shift: float, device: torch.device | str) -> SamplingPlan:
    """Plan for `sampling_sigmas`, with sigmas and timesteps (1000 * sigma) float32 [S]."""
    sigmas = torch.tensor(sampling_sigmas(steps, strength, shift), dtype=torch.float64)
    return SamplingPlan(strength, sigmas.float().to(device), (1000 * sigmas).float().to(device))
