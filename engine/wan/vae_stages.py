"""Stages of an autoencoder over frames, and how a row of them becomes parts: what Wan's and TAEHV have in common.

Axes in names: B batch, T frames or latent frames, C channels, H and W rows and columns.

A stage takes features [B, T, H, W, C], contiguous, and its own slice of the memory, and returns both; a stream that
starts has no memory yet. So a row of stages can be cut anywhere, for example over ranks.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from engine.wan.vae import FRAMES_PER_LATENT, PIXELS_PER_LATENT, Carried, Memory, Part, VAEState
from engine.wan.vae_config import LatentConfig


def state_bytes(state: VAEState) -> int:
    """Bytes that one direction of a stream, or of a batch of streams, holds between calls."""
    return sum(tensor.numel() * tensor.element_size() for tensor in state.memory)


class LatentScale(nn.Module):
    """Between the raw scale of an encoder's mean and the normalised scale that a transformer is trained on.

    The statistics are no part of a checkpoint: they lie on the CPU until the module is moved (`vae.to(device)`),
    also when it was made on the meta device.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, config: LatentConfig) -> None:
        super().__init__()
        for name, values in (("mean", config.latent_mean), ("std", config.latent_std)):
            self.register_buffer(name, torch.tensor(values, device="cpu").view(-1, 1, 1), persistent=False)

    def normalise(self, raw_BTCHW: Tensor) -> Tensor:
        """(raw - mean) / std per channel; like raw_BTCHW."""
        return (raw_BTCHW - self.mean.to(raw_BTCHW)) / self.std.to(raw_BTCHW)

    def denormalise(self, latent_BTCHW: Tensor) -> Tensor:
        """The inverse of `normalise`: latent * std + mean per channel; like latent_BTCHW."""
        return latent_BTCHW * self.std.to(latent_BTCHW) + self.mean.to(latent_BTCHW)


class Stage(nn.Module):
    """One link of an encoder or decoder."""

    slots = 0  # tensors of memory that it keeps between calls

    def forward(self, x_BTHWC: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
        """Features for the next stage, and the memory for the next call, which is `slots` tensors [B, T, H, W, C].

        Args:
            memory: what the call before returned; empty at the start of a stream, where T is 1.
        """
        raise NotImplementedError


def run_stages(stages: Sequence[Stage], x_BTHWC: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
    """Run stages one after another. Their memory lies in one tuple in their order, empty at the start of a stream."""
    kept: list[Tensor] = []
    taken = 0
    for stage in stages:
        own = memory[taken : taken + stage.slots]
        taken += stage.slots
        x_BTHWC, new = stage(x_BTHWC, own)
        kept += new
    return x_BTHWC, tuple(kept)


def conv_parameters(channels_out: int, channels_in: int, *kernel: int) -> tuple[nn.Parameter, nn.Parameter]:
    """Weight and bias of a convolution, uniform within 1 / sqrt(inputs) as in torch's own."""
    weight = torch.empty(channels_out, channels_in, *kernel)
    bound = weight[0].numel() ** -0.5
    return (
        nn.Parameter(weight.uniform_(-bound, bound)),
        nn.Parameter(torch.empty(channels_out).uniform_(-bound, bound)),
    )


def conv_frames(
    x_BTHWC: Tensor, weight: Tensor, bias: Tensor | None = None, *, stride: int = 1, padding: int = 0
) -> Tensor:
    """A 2-D convolution over every frame on its own, [B, T, H, W, C], with weights [out, in, rows, columns]."""
    batch, x_NCHW = x_BTHWC.shape[0], x_BTHWC.flatten(0, 1).permute(0, 3, 1, 2)
    y = functional.conv2d(x_NCHW, weight, bias, stride, padding).permute(0, 2, 3, 1)
    return y.view(batch, -1, *y.shape[1:])


class Pointwise(Stage):
    """A convolution of one pixel and frame, as a product with the last axis."""

    def __init__(
        self, channels_in: int, channels_out: int, axes: int, *, bias: bool = True, used: int | None = None
    ) -> None:
        """Make a layer whose weight is [out, in, 1, ...] with so many more axes, as published.

        Args:
            used: compute only the first channels.
        """
        super().__init__()
        self.weight, initial = conv_parameters(channels_out, channels_in, *(1,) * axes)
        self.bias = initial if bias else None
        self._used = used

    def apply_to(self, x: Tensor) -> Tensor:
        """[..., C] to [..., C used]."""
        bias = None if self.bias is None else self.bias[: self._used]
        return functional.linear(x, self.weight.flatten(1)[: self._used], bias)

    def forward(self, x_BTHWC: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
        """See `Stage.forward`."""
        return self.apply_to(x_BTHWC), ()


def stage_parts(stages: Iterable[tuple[Stage, int]], *, first_alone: bool = True) -> list[Part]:
    """Stages as parts: one for each that has memory, the others with the one before them.

    They take and return [B, T, H, W, C]. A part tells the start of a stream by having no memory yet.

    Args:
        stages: with the frames that a pass brings to each.
        first_alone: whether the first pass of a stream has one frame everywhere.
    """
    groups: list[tuple[list[Stage], int]] = []
    for stage, frames in stages:
        if groups and not (stage.slots and _slots(groups[-1][0])):
            groups[-1][0].append(stage)
        else:
            groups.append(([stage], frames))
    return [Part(partial(_run_part, group, frames, first_alone), _slots(group)) for group, frames in groups]


def between_pixels(
    parts: Sequence[Part], enter: Callable[[Tensor], Tensor], leave: Callable[..., Tensor]
) -> list[Part]:
    """Parts of which the first takes and the last returns [B, T, C, H, W].

    Args:
        enter: what is done to the input first. leave: what is done to the output [B, T, H, W, C] at the end, given it
            and whether a stream began.
    """
    first, *middle, last = parts
    return [Part(partial(_enter, first, enter), first.slots), *middle, Part(partial(_leave, last, leave), last.slots)]


def _enter(part: Part, enter: Callable[[Tensor], Tensor], carried: Carried, memory: Memory) -> tuple[Carried, Memory]:
    return part.run((channels_last(enter(carried[0])),), memory)


def _leave(part: Part, leave: Callable[..., Tensor], carried: Carried, memory: Memory) -> tuple[Carried, Memory]:
    (x_BTHWC,), new = part.run(carried, memory)
    # In plain order, so that whoever sums over them sums in one order, on whatever rank.
    return (channels_third(leave(x_BTHWC, start=len(memory) == 0)).contiguous(),), new


def _slots(stages: Sequence[Stage]) -> int:
    return sum(stage.slots for stage in stages)


def _run_part(
    stages: Sequence[Stage], frames: int, first_alone: bool, carried: Carried, memory: Memory
) -> tuple[Carried, Memory]:
    done = []
    for one in passes(carried[0], frames, start=first_alone and len(memory) == 0):
        x_BTHWC, memory = run_stages(stages, one.contiguous(), memory)
        done.append(x_BTHWC)
    return (join(done),), memory


def check_frames(frames_BTCHW: Tensor, state: VAEState) -> None:
    """Refuse a number or size of frames that does not fill latents.

    Raises: ValueError.
    """
    count, height, width = frames_BTCHW.shape[1], *frames_BTCHW.shape[3:]
    if height % PIXELS_PER_LATENT or width % PIXELS_PER_LATENT:
        raise ValueError(f"frame size {width}x{height} must be a multiple of {PIXELS_PER_LATENT}: crop or resize")
    if not state.memory and count % FRAMES_PER_LATENT != 1:
        raise ValueError(f"{count} frames cannot start a stream: give a fresh state 1 + {FRAMES_PER_LATENT}k frames")
    if state.memory and (count % FRAMES_PER_LATENT or not count):
        raise ValueError(
            f"{count} frames cannot go on with a stream: give it {FRAMES_PER_LATENT}k, or a fresh state to start anew"
        )


def check_latents(latent_BTCHW: Tensor) -> None:
    """Refuse to decode nothing.

    Raises: ValueError.
    """
    if not latent_BTCHW.shape[1]:
        raise ValueError("0 latent frames cannot be decoded: give at least 1")


def channels_last(x_BTCHW: Tensor) -> Tensor:
    """[B, T, C, H, W] to contiguous [B, T, H, W, C]."""
    return x_BTCHW.movedim(2, -1).contiguous()


def channels_third(x_BTHWC: Tensor) -> Tensor:
    """[B, T, H, W, C] to [B, T, C, H, W], a view."""
    return x_BTHWC.movedim(-1, 2)


def passes(x_BT: Tensor, length: int, *, start: bool) -> list[Tensor]:
    """Cut along T: one at the start of a stream, then `length` at a time."""
    alone, rest = ([x_BT[:, :1]], x_BT[:, 1:]) if start else ([], x_BT)
    return [*alone, *torch.split(rest, length, dim=1)] if rest.shape[1] else alone


def join(parts: list[Tensor]) -> Tensor:
    """Parts in a row along T."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
