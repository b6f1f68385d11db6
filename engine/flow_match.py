"""Flow matching: noise levels, the straight path between clean and noise, and where a stream starts on it.

Axes in names: B batch, T latent frames, C channels, H and W rows and columns, S denoising steps.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.config import MAX_STEPS, SamplingConfig

TABLE_ENTRIES = 1000


def sigma_table(shift: float) -> Tensor:
    """The 1,000 noise levels of a checkpoint, noisiest first, float64.

    Args:
        shift: above 1 spends more of the table at high noise; 1 is the straight line.
    Source: Wan 2.1: sigma = shift * s / (1 + (shift - 1) * s) for s from 1 down to 0.001.
    """
    s = torch.arange(TABLE_ENTRIES, 0, -1, dtype=torch.float64) / TABLE_ENTRIES
    return shift * s / (1 + (shift - 1) * s)


def nearest_sigma(timestep: Tensor, table: Tensor) -> Tensor:
    """The table's noise level nearest to each timestep (0 to 1000), without a read to the host; shape of timestep."""
    index = (table * 1000 - timestep.double().unsqueeze(-1)).abs().argmin(dim=-1)
    return table[index]


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
class ChunkSchedule:
    """The noise levels of one chunk, on its device, so that a step reads nothing back.

    mix: share of noise in the chunk before its first step, []. sigmas, timesteps: of each step, float64 [S]: what the
    network is told, and what its answer is taken at. strength: []; scales the residual of a `source_residual` model.
    """

    mix: Tensor
    sigmas: Tensor
    timesteps: Tensor
    strength: Tensor

    @property
    def steps(self) -> int:
        """Denoising steps of the chunk; 0: the source is the result."""
        return self.timesteps.shape[0]

    def tensors(self) -> tuple[Tensor, ...]:
        """All of it that lies on the device."""
        return self.mix, self.sigmas, self.timesteps, self.strength

    def level(self, step: int) -> Tensor:
        """Share of noise that is mixed into the chunk before a step, []."""
        return self.sigmas[step] if step else self.mix


@dataclass(frozen=True)
class SamplingPlan:
    """How every chunk of a stream is noised, until its parameters change.

    base: the schedule of a chunk whose noise level nothing moves. level: noise scale at the stream's strength, float64.
    """

    config: SamplingConfig
    base: ChunkSchedule
    level: Tensor
    offset: int
    table: Tensor

    @property
    def steps(self) -> int:
        """Denoising steps per chunk; 0 at strength 0."""
        return self.base.steps

    def at_level(self, level: Tensor) -> ChunkSchedule:
        """The schedule of a chunk at a noise level of its own, float64 []: it moves the first timestep.

        The first timestep is truncated, as the public code does. Where it comes down to the second, the later ones are
        scaled with it, so that the steps still fall (`MotionConfig.monotonic`).
        """
        first = torch.trunc(1000 * level) - self.offset
        later = self.base.timesteps[1:]
        motion = self.config.motion
        if motion is not None and motion.monotonic:
            first = first.clamp_min(1)
            if later.shape[0]:
                later = torch.where(first > later[0], later, later * (first / self.base.timesteps[0]))
        timesteps = torch.cat((first[None], later))
        return ChunkSchedule(level, nearest_sigma(timesteps, self.table), timesteps, self.base.strength)


def sampling_plan(steps: int, strength: float, config: SamplingConfig, device: torch.device | str) -> SamplingPlan:
    """Lay out the steps of a stream.

    Args:
        steps: 1 to 4. strength: 0 to 1; with listed timesteps it scales them and the noise together.

    Raises: ValueError outside of these, or for more steps than the model has timesteps.
    """
    table = sigma_table(config.shift)
    listed = config.timesteps
    if listed is None:
        sigmas = torch.tensor(sampling_sigmas(steps, strength, config.shift), dtype=torch.float64)
        timesteps, level = 1000 * sigmas, config.noise_scale * (float(sigmas[0]) if len(sigmas) else 0.0)
    else:
        if not 1 <= steps <= len(listed):
            raise ValueError(f"steps {steps} must be from 1 to {len(listed)}, the timesteps of this model")
        if not 0 <= strength <= 1:
            raise ValueError(f"strength {strength} must be from 0 to 1")
        timesteps = strength * torch.tensor(listed[: steps if strength else 0], dtype=torch.float64)
        sigmas, level = nearest_sigma(timesteps, table), config.noise_scale * strength
    base = ChunkSchedule(
        torch.tensor(level, dtype=torch.float64).to(device),
        sigmas.to(device),
        timesteps.to(device),
        torch.tensor(strength, dtype=torch.float32).to(device),
    )
    return SamplingPlan(config, base, base.mix, round(config.timestep_offset * strength), table.to(device))


def stacked(values: Sequence[Tensor]) -> Tensor:
    """One value per row as a batch [B]; no copy for one."""
    return values[0].view(1) if len(values) == 1 else torch.stack(tuple(values))
