"""Video autoencoders that work chunk by chunk, with their memory outside of them.

Axes in names: B batch, T frames or latent frames, C channels, H and W rows and columns.

`TinyVAE` is a principal component projection of 4x8x8 blocks (solved, not trained: 35 dB before any step) with
a small convolutional residual in the decoder. A convolutional encoder was left out: it takes 45 ms a chunk on
one core where the projection takes 4.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from pydantic import BaseModel, ConfigDict, Field, PositiveInt
from torch import Tensor, nn
from torch.nn import functional

FRAMES_PER_LATENT = 4
PIXELS_PER_LATENT = 8
BLOCK_VALUES = 3 * FRAMES_PER_LATENT * PIXELS_PER_LATENT**2


Memory = tuple[Tensor, ...]
Carried = tuple[Tensor, ...]


@dataclass(frozen=True)
class VAEState:
    """Memory of one direction of one stream. Empty at the start; a call returns the next one."""

    memory: Memory = ()


@dataclass(frozen=True)
class Part:
    """A piece of an encoder or decoder, which may run on a device of its own.

    run: what the part before it returned, and its own memory, to what the next one takes, and the memory for the next
    call. The first part takes one tensor, as the last returns one: frames and latents. slots: as many tensors are its
    memory, none of them at the start of a stream.
    """

    run: Callable[[Carried, Memory], tuple[Carried, Memory]]
    slots: int = 0


def run_parts(parts: Sequence[Part], x: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
    """Run all parts one after another. Their memory lies in one tuple, in their order; empty at a stream's start."""
    carried: Carried = (x,)
    kept: list[Tensor] = []
    taken = 0
    for part in parts:
        own = memory[taken : taken + part.slots]
        taken += part.slots
        carried, new = part.run(carried, own)
        kept += new
    return carried[0], tuple(kept)


class StreamVAE(Protocol):
    """Encodes and decodes a stream in any split into chunks with one and the same result."""

    def encode_parts(self) -> list[Part]:
        """What `encode` consists of, in order."""

    def decode_parts(self) -> list[Part]:
        """What `decode` consists of, in order."""

    def encode(self, frames_BTCHW: Tensor, state: VAEState) -> tuple[Tensor, VAEState]:
        """Frames in [-1, 1] to latents in the encoder's own scale."""

    def normalise(self, latent_BTCHW: Tensor) -> Tensor:
        """Latents in the encoder's own scale to about unit variance."""

    def decode(self, latent_BTCHW: Tensor, state: VAEState) -> tuple[Tensor, VAEState]:
        """Normalised latents to frames, about [-1, 1]; the caller takes as many of the last as it sent."""


class TinyVAEConfig(BaseModel):
    """Widths of the embedded autoencoder."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    latent_channels: PositiveInt = Field(default=96)
    pixel_channels: PositiveInt = Field(default=16, description="decoder width at a quarter size")
    frame_channels: PositiveInt = Field(default=32, description="decoder width per frame at an eighth")
    chunk_channels: PositiveInt = Field(default=48, description="decoder width per chunk at an eighth")


def space_from_channels(x_BCHW: Tensor, factor: int) -> Tensor:
    """`pixel_shuffle` as one strided copy, which is two to three times as fast on a CPU (0.7 against 2.3 ms)."""
    batch, channels, height, width = x_BCHW.shape
    x = x_BCHW.reshape(batch, -1, factor, factor, height, width).permute(0, 1, 4, 2, 5, 3)
    return x.reshape(batch, channels // factor**2, height * factor, width * factor)


def channels_from_space(x_BCHW: Tensor, factor: int) -> Tensor:
    """`pixel_unshuffle` likewise: the inverse of `space_from_channels`."""
    batch, channels, height, width = x_BCHW.shape
    x = x_BCHW.reshape(batch, channels, height // factor, factor, width // factor, factor).permute(0, 1, 3, 5, 2, 4)
    return x.reshape(batch, channels * factor**2, height // factor, width // factor)


class Residual(nn.Module):
    """Two 3x3 convolutions added to their input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv_out = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Like x, [B, C, H, W]."""
        out: Tensor = x + self.conv_out(functional.relu(self.conv_in(x)))
        return out


class CausalMemory(nn.Module):
    """A residual block that also sees the features of the frame before: one frame of state, causal."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(2 * channels, channels, 3, padding=1)
        self.conv_out = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x_BTCHW: Tensor, before_BCHW: Tensor | None) -> tuple[Tensor, Tensor]:
        """Refined features, and the last frame's input features to hand to the next call.

        Args:
            before_BCHW: what the call before returned, None at the start of a stream (zeros).
        """
        first = x_BTCHW.new_zeros(x_BTCHW[:, 0].shape) if before_BCHW is None else before_BCHW
        past = torch.cat((first[:, None], x_BTCHW[:, :-1]), dim=1)
        y = functional.relu(self.conv_in(torch.cat((x_BTCHW, past), dim=2).flatten(0, 1)))
        return x_BTCHW + self.conv_out(y).view_as(x_BTCHW), x_BTCHW[:, -1].clone()


class TinyVAE(nn.Module):
    """96 numbers per 4x8x8 block of pixels; see the module's docstring."""

    latent_mean: Tensor
    latent_std: Tensor

    def __init__(self, config: TinyVAEConfig) -> None:
        super().__init__()
        self.config = config
        self.latent_channels = config.latent_channels
        pixel, frame, chunk = config.pixel_channels, config.frame_channels, config.chunk_channels
        self.project = nn.Conv2d(BLOCK_VALUES, config.latent_channels, 1)
        self.unproject = nn.Conv2d(config.latent_channels, BLOCK_VALUES, 1)
        self.decode_in = nn.Conv2d(config.latent_channels, chunk, 3, padding=1)
        self.decode_chunk = Residual(chunk)
        self.to_frames = nn.Conv2d(chunk, FRAMES_PER_LATENT * frame, 1)
        self.memory = CausalMemory(frame)
        self.to_pixels = nn.Conv2d(frame, 4 * pixel, 1)
        self.decode_frame = Residual(pixel)
        self.decode_out = nn.Conv2d(pixel, 3 * 16, 3, padding=1)
        for parameter in self.decode_out.parameters():
            nn.init.zeros_(parameter)
        self.register_buffer("latent_mean", torch.zeros(config.latent_channels))
        self.register_buffer("latent_std", torch.ones(config.latent_channels))

    def encode(self, frames_BTCHW: Tensor, state: VAEState) -> tuple[Tensor, VAEState]:
        """One latent per 4 frames; the projection needs no memory.

        Args:
            frames_BTCHW: RGB in [-1, 1], size a multiple of 8; 4k frames, or 4k + 1: the first becomes 4.

        Returns: normalised latents [B, T / 4, C, H / 8, W / 8], and the state for the next call.
        Raises: ValueError for another length or size.
        """
        x = self._whole_chunks(frames_BTCHW)
        batch, frames, channels, height, width = x.shape
        groups = frames // FRAMES_PER_LATENT
        blocks = channels_from_space(
            x.reshape(batch * groups, FRAMES_PER_LATENT * channels, height, width), PIXELS_PER_LATENT
        )
        latent = self.project(blocks)
        latent = latent.reshape(batch, groups, *latent.shape[1:])
        return (latent - self._per_channel(self.latent_mean)) / self._per_channel(self.latent_std), state

    def normalise(self, latent_BTCHW: Tensor) -> Tensor:
        """Nothing to do: `encode` returns normalised latents."""
        return latent_BTCHW

    def decode(self, latent_BTCHW: Tensor, state: VAEState) -> tuple[Tensor, VAEState]:
        """4 frames per latent. Where the latent came from one frame, the last of the 4 is that frame.

        Returns: frames [B, 4T, 3, 8H, 8W], not clamped, and the state for the next call.
        """
        frames, memory = run_parts(self.decode_parts(), latent_BTCHW, state.memory)
        return frames, VAEState(memory)

    def encode_parts(self) -> list[Part]:
        """One: the projection."""
        return [Part(lambda carried, memory: ((self.encode(carried[0], VAEState())[0],), ()))]

    def decode_parts(self) -> list[Part]:
        """Three of about the same work: the chunk and its frames at an eighth of the size, at a quarter, in full."""
        return [Part(self._decode_frames, slots=1), Part(self._decode_quarter), Part(self._decode_pixels)]

    def _decode_frames(self, carried: Carried, memory: Memory) -> tuple[Carried, Memory]:
        (latent_BTCHW,) = carried
        batch, groups, _, height, width = latent_BTCHW.shape
        raw = self._raw(latent_BTCHW)
        x = self.decode_chunk(functional.relu(self.decode_in(raw)))
        x = functional.relu(self.to_frames(x)).reshape(batch, groups * FRAMES_PER_LATENT, -1, height, width)
        x, last = self.memory(x, memory[0] if memory else None)
        return (x, raw), (last,)

    def _decode_quarter(self, carried: Carried, memory: Memory) -> tuple[Carried, Memory]:
        x_BTCHW, raw = carried
        x = functional.relu(space_from_channels(self.to_pixels(x_BTCHW.flatten(0, 1)), 2))
        x = self.decode_frame(x)
        return (x.reshape(*x_BTCHW.shape[:2], *x.shape[1:]), raw), ()

    def _decode_pixels(self, carried: Carried, memory: Memory) -> tuple[Carried, Memory]:
        x_BTCHW, raw = carried
        detail = space_from_channels(self.decode_out(x_BTCHW.flatten(0, 1)), 4)
        frames = detail + self._linear(raw).view_as(detail)
        return (frames.reshape(*x_BTCHW.shape[:2], *frames.shape[1:]),), ()

    def linear_picture(self, latent_BTCHW: Tensor) -> Tensor:
        """What the projection alone makes of latents: frames as from `decode`, without its detail, for a tenth."""
        frames = self._linear(self._raw(latent_BTCHW))
        return frames.reshape(len(latent_BTCHW), -1, 3, *frames.shape[2:])

    def _raw(self, latent_BTCHW: Tensor) -> Tensor:
        raw = latent_BTCHW * self._per_channel(self.latent_std) + self._per_channel(self.latent_mean)
        return raw.flatten(0, 1)

    def _linear(self, raw_NCHW: Tensor) -> Tensor:
        return space_from_channels(self.unproject(raw_NCHW), PIXELS_PER_LATENT)

    @torch.no_grad()
    def fit_pca(self, frames_BTCHW: Tensor, smallest_std: float = 0.03) -> None:
        """Solve the projection on example clips and make latents zero-mean with about unit variance.

        Args:
            frames_BTCHW: RGB in [-1, 1], as for `encode`; a few dozen varied clips are enough.
            smallest_std: floor of a component's scale, so that noise in a faint one is not blown up.
        """
        x = self._whole_chunks(frames_BTCHW)
        x = x.reshape(-1, FRAMES_PER_LATENT * x.shape[2], *x.shape[3:])
        blocks = channels_from_space(x, PIXELS_PER_LATENT).permute(0, 2, 3, 1).flatten(0, 2).double()
        mean = blocks.mean(0)
        covariance = torch.cov(blocks.T)
        variances, vectors = torch.linalg.eigh(covariance)
        axes = vectors.flip(1)[:, : self.latent_channels].T
        std = variances.flip(0)[: self.latent_channels].clamp_min(0).sqrt().clamp_min(smallest_std)
        for parameter, solved in (
            (self.project.weight, axes / std[:, None]),
            (self.project.bias, -(axes @ mean) / std),
            (self.unproject.weight, axes.T * std),
            (self.unproject.bias, mean),
        ):
            assert parameter is not None  # both layers are made with a bias
            parameter.copy_(solved.view(parameter.shape))
        self.latent_mean.zero_()
        self.latent_std.fill_(1)

    def _whole_chunks(self, frames_BTCHW: Tensor) -> Tensor:
        count, height, width = frames_BTCHW.shape[1], *frames_BTCHW.shape[3:]
        if height % PIXELS_PER_LATENT or width % PIXELS_PER_LATENT:
            raise ValueError(f"frame size {width}x{height} must be a multiple of {PIXELS_PER_LATENT}")
        if count % FRAMES_PER_LATENT == 0 and count:
            return frames_BTCHW
        if count % FRAMES_PER_LATENT == 1:
            start = frames_BTCHW[:, :1].expand(-1, FRAMES_PER_LATENT - 1, -1, -1, -1)
            return torch.cat((start, frames_BTCHW), dim=1)
        raise ValueError(f"{count} frames are neither whole groups of {FRAMES_PER_LATENT} nor one more")

    def _per_channel(self, values: Tensor) -> Tensor:
        return values.view(-1, 1, 1)
