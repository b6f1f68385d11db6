"""The Wan 2.1 autoencoder, chunk by chunk, with its memory outside of it.

Axes in names: B batch, T frames or latent frames, C channels, H and W rows and columns.

Weights are named as in the original checkpoint (Wan2.1_VAE.pth), which therefore loads strictly and without a map.
Encoder and decoder are flat lists of stages. A stage takes features and its own slice of the memory, and returns
both; a stream that starts has no memory yet. So a list can be cut anywhere, for example over ranks.

* A stream starts with one frame, or one latent; every later pass takes 4 frames, or 1 latent. What a call is given
  is cut into such passes, so that any split of a stream into calls gives the same bits.
* Features are [B, T, H, W, C], contiguous: norms, attention and pointwise layers work on the last axis, joining
  frames is one copy, and convolutions see it as channels-last. On one core the norm alone takes 0.7 ms so and
  15.9 ms with channels first (4 frames of 64x64, 96 channels, float32).
* A convolution over frames keeps its last two input frames. It is one 3-D convolution on a GPU and the exact sum
  of one 2-D convolution per tap on a CPU, where the 3-D one takes 2.9 times as long for small frames (64x64 at dim
  16, whole autoencoder) and 1.1 times for larger ones (128x128 at dim 32).

Source: the Wan 2.1 report, arXiv:2503.20314, and the layout of its published weights.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from engine.wan.vae import FRAMES_PER_LATENT, Memory, Part, VAEState, run_parts
from engine.wan.vae_config import WanVAEConfig
from engine.wan.vae_stages import (
    LatentScale,
    Pointwise,
    Stage,
    between_pixels,
    check_frames,
    check_latents,
    conv_frames,
    conv_parameters,
    join,
    passes,
    stage_parts,
)

ConvPath = Literal["auto", "conv3d", "taps"]


class RMSNorm(nn.Module):
    """Feature vectors brought to length sqrt(C), then scaled by gamma."""

    def __init__(self, channels: int, axes: int, eps: float) -> None:
        """Make a norm whose gamma is [C, 1, ...] with so many more axes, as published."""
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels, *(1,) * axes))
        # Published: divided by max(length, eps). The sum under the root differs only for lengths near eps.
        self._eps = eps**2 / channels

    def forward(self, x: Tensor) -> Tensor:
        """Like x, [..., C]."""
        return functional.rms_norm(x, self.gamma.shape[:1], self.gamma.flatten(), self._eps)


class FrameConv(nn.Module):
    """A 3x3 convolution over every frame on its own."""

    def __init__(self, channels_in: int, channels_out: int, stride: int = 1) -> None:
        super().__init__()
        self.weight, self.bias = conv_parameters(channels_out, channels_in, 3, 3)
        self._stride = stride

    def forward(self, x_BTHWC: Tensor) -> Tensor:
        """Stride 1: zeros around all sides; stride 2: on the right and below only."""
        if self._stride == 1:
            return conv_frames(x_BTHWC, self.weight, self.bias, padding=1)
        x = functional.pad(x_BTHWC, (0, 0, 0, 1, 0, 1))
        return conv_frames(x, self.weight, self.bias, stride=self._stride)


class CausalConv(Stage):
    """A convolution over three frames, its own and the two before, with zeros before the start of a stream."""

    slots = 1

    def __init__(self, channels_in: int, channels_out: int, size: Literal[1, 3] = 3, stride: int = 1) -> None:
        """Make a convolution over 3 frames and size x size pixels; the stride is that over frames."""
        super().__init__()
        self.weight, self.bias = conv_parameters(channels_out, channels_in, 3, size, size)
        self._stride, self._pad = stride, size // 2
        self.path: ConvPath = "auto"

    def forward(self, x_BTHWC: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
        """See `Stage.forward`; the memory is the last two input frames."""
        if not memory:
            # Two frames of zeros: only the last tap has something to work on.
            memory = (torch.cat((x_BTHWC.new_zeros(x_BTHWC.shape), x_BTHWC), dim=1),)
            return self._taps(x_BTHWC, first=2), memory
        whole = torch.cat((memory[0], x_BTHWC), dim=1)
        # A copy, since a view would keep all of `whole` alive between calls.
        return self.convolve(whole), (whole[:, -2:].clone(),)

    def convolve(self, x_BTHWC: Tensor) -> Tensor:
        """Convolve frames as they are, without padding in time: T to (T - 3) // stride + 1 frames."""
        path = self.path
        if path == "auto":
            # In half precision the sum of taps would be rounded thrice.
            exact = x_BTHWC.device.type == "cpu" and x_BTHWC.dtype is torch.float32
            path = "taps" if exact else "conv3d"
        if path == "taps":
            return self._taps(x_BTHWC, first=0)
        y = functional.conv3d(
            x_BTHWC.permute(0, 4, 1, 2, 3),
            self.weight,
            self.bias,
            stride=(self._stride, 1, 1),
            padding=(0, self._pad, self._pad),
        )
        return y.permute(0, 2, 3, 4, 1)

    def _taps(self, x_BTHWC: Tensor, first: int) -> Tensor:
        """The sum over taps from the first one on of a 2-D convolution of the frames it meets."""
        span = x_BTHWC.shape[1] - (2 - first)
        out = None
        for tap in range(first, 3):
            frames = x_BTHWC[:, tap - first : tap - first + span : self._stride]
            bias = self.bias if out is None else None
            y = conv_frames(frames, self.weight[:, :, tap], bias, padding=self._pad)
            out = y if out is None else out.add_(y)
        assert out is not None  # there is at least one tap
        return out


class Residual(Stage):
    """Twice norm, SiLU and convolution, added to the input."""

    slots = 2

    def __init__(self, channels_in: int, channels_out: int, eps: float) -> None:
        super().__init__()
        self.residual = nn.ModuleDict(
            {
                "0": RMSNorm(channels_in, 3, eps),
                "2": CausalConv(channels_in, channels_out),
                "3": RMSNorm(channels_out, 3, eps),
                "6": CausalConv(channels_out, channels_out),
            }
        )
        self.shortcut = Pointwise(channels_in, channels_out, 3) if channels_in != channels_out else None

    def forward(self, x_BTHWC: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
        """See `Stage.forward`."""
        block = self.residual
        y = functional.silu(block["0"](x_BTHWC), inplace=True)
        y, first = block["2"](y, memory[:1])
        y = functional.silu(block["3"](y), inplace=True)
        y, second = block["6"](y, memory[1:])
        y += x_BTHWC if self.shortcut is None else self.shortcut.apply_to(x_BTHWC)
        return y, first + second


class FrameAttention(Stage):
    """Self attention of one head among the pixels of each frame, added to the input."""

    def __init__(self, channels: int, eps: float) -> None:
        super().__init__()
        self.norm = RMSNorm(channels, 2, eps)
        self.to_qkv = Pointwise(channels, 3 * channels, 2)
        self.proj = Pointwise(channels, channels, 2)

    def forward(self, x_BTHWC: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
        """See `Stage.forward`."""
        pixels = self.norm(x_BTHWC).flatten(0, 1).flatten(1, 2)
        q, k, v = self.to_qkv.apply_to(pixels)[:, None].chunk(3, dim=-1)
        seen = functional.scaled_dot_product_attention(q, k, v)
        return x_BTHWC + self.proj.apply_to(seen).reshape(x_BTHWC.shape), ()


class SpaceDown(Stage):
    """Half the rows and columns."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.resample = nn.ModuleDict({"1": FrameConv(channels, channels, stride=2)})

    def forward(self, x_BTHWC: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
        """See `Stage.forward`."""
        return self.resample["1"](x_BTHWC), ()


class SpaceTimeDown(SpaceDown):
    """Half the rows, columns and frames; the first frame of a stream stays one."""

    slots = 1

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.time_conv = CausalConv(channels, channels, size=1, stride=2)

    def forward(self, x_BTHWC: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
        """See `Stage.forward`; the memory is the last frame."""
        x, _ = super().forward(x_BTHWC, ())
        last = (x[:, -1:].clone(),)
        return self.time_conv.convolve(torch.cat((memory[0], x), dim=1)) if memory else x, last


class SpaceUp(Stage):
    """Twice the rows and columns, half the channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.resample = nn.ModuleDict({"1": FrameConv(channels, channels // 2)})

    def forward(self, x_BTHWC: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
        """See `Stage.forward`."""
        return self.enlarge(x_BTHWC[:, :, None]), ()

    def enlarge(self, x_BTKHWC: Tensor) -> Tensor:
        """Enlarge K frames for each T, given in any layout; [B, TK, 2H, 2W, C / 2]."""
        batch, times, each, height, width, channels = x_BTKHWC.shape
        # The nearest pixel, by one strided copy.
        x = x_BTKHWC[:, :, :, :, None, :, None].expand(-1, -1, -1, -1, 2, -1, 2, -1)
        enlarged: Tensor = self.resample["1"](x.reshape(batch, times * each, 2 * height, 2 * width, channels))
        return enlarged


class SpaceTimeUp(SpaceUp):
    """Twice the rows, columns and frames, half the channels; the first frame of a stream stays one."""

    slots = 1

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.time_conv = CausalConv(channels, 2 * channels, size=1)

    def forward(self, x_BTHWC: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
        """See `Stage.forward`; the memory is the last two frames, without the first of the stream (zeros)."""
        if not memory:
            batch, _, *shape = x_BTHWC.shape
            return self.enlarge(x_BTHWC[:, :, None]), (x_BTHWC.new_zeros(batch, 2, *shape),)
        pairs, memory = self.time_conv(x_BTHWC, memory)
        pairs = pairs.view(*pairs.shape[:-1], 2, x_BTHWC.shape[-1])
        return self.enlarge(pairs.movedim(-2, 2)), memory


class Head(Stage):
    """Norm, SiLU and the last convolution of an encoder or decoder."""

    slots = 1

    def __init__(self, channels_in: int, channels_out: int, eps: float) -> None:
        super().__init__()
        # Not in a container, whose name would join the published ones.
        self.add_module("0", RMSNorm(channels_in, 3, eps))
        self.add_module("2", CausalConv(channels_in, channels_out))

    def forward(self, x_BTHWC: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
        """See `Stage.forward`."""
        norm, conv = self.children()
        out: tuple[Tensor, Memory] = conv(functional.silu(norm(x_BTHWC), inplace=True), memory)
        return out


def _middle(channels: int, eps: float) -> nn.ModuleList:
    return nn.ModuleList(
        (Residual(channels, channels, eps), FrameAttention(channels, eps), Residual(channels, channels, eps))
    )


class Encoder(nn.Module):
    """Pixels to mean and log-variance."""

    def __init__(self, config: WanVAEConfig) -> None:
        super().__init__()
        eps, width = config.eps, config.dim
        self.conv1 = CausalConv(3, width)
        self.downsamples = nn.ModuleList()
        for level, multiplier in enumerate(config.multipliers):
            for _ in range(config.residual_blocks):
                self.downsamples.append(Residual(width, config.dim * multiplier, eps))
                width = config.dim * multiplier
            if level < len(config.temporal_down):
                self.downsamples.append((SpaceTimeDown if config.temporal_down[level] else SpaceDown)(width))
        self.middle = _middle(width, eps)
        self.head = Head(width, 2 * config.z_dim, eps)


class Decoder(nn.Module):
    """Latents to pixels."""

    def __init__(self, config: WanVAEConfig) -> None:
        super().__init__()
        eps, width = config.eps, config.dim * config.multipliers[-1]
        self.conv1 = CausalConv(config.z_dim, width)
        self.middle = _middle(width, eps)
        self.upsamples = nn.ModuleList()
        for level, multiplier in enumerate(reversed(config.multipliers)):
            for _ in range(config.residual_blocks + 1):
                self.upsamples.append(Residual(width, config.dim * multiplier, eps))
                width = config.dim * multiplier
            if level < len(config.temporal_down):
                self.upsamples.append((SpaceTimeUp if config.temporal_down[-1 - level] else SpaceUp)(width))
                width //= 2
        self.head = Head(width, 3, eps)


class WanVAE(nn.Module):
    """16 numbers per 4 frames of 8x8 pixels; see the module's docstring.

    `encode` returns raw latents, the scale of the encoder's mean, `decode` takes normalised ones, the scale of what
    a transformer returns. Whether a transformer wants its source raw or through `normalise` is up to its checkpoint.
    """

    def __init__(self, config: WanVAEConfig, conv: ConvPath = "auto") -> None:
        """Make an autoencoder with random weights.

        Args:
            conv: how a convolution over frames runs; auto: "taps" on a CPU, else "conv3d".
        """
        super().__init__()
        self.config = config
        self.latent_channels = config.z_dim
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        # The second half of the encoder's output, its log-variance, is of no use without sampling.
        self.conv1 = Pointwise(2 * config.z_dim, 2 * config.z_dim, 3, used=config.z_dim)
        self.conv2 = Pointwise(config.z_dim, config.z_dim, 3)
        self.scale = LatentScale(config)
        for module in self.modules():
            if isinstance(module, CausalConv):
                module.path = conv

    def encode(self, frames_BTCHW: Tensor, state: VAEState) -> tuple[Tensor, VAEState]:
        """One latent for the first frame of a stream and for every 4 after it.

        Args:
            frames_BTCHW: RGB in [-1, 1], rows and columns multiples of 8, in the dtype of the weights; 1 + 4k frames
                at the start of a stream, then 4k a call.
            state: a fresh one at the start, else what the call before returned for this stream, or batch of streams.

        Returns: the mean, raw, [B, T, C, H / 8, W / 8], and the state for the next call.
        Raises: ValueError for another length or size.
        """
        check_frames(frames_BTCHW, state)
        parts, memory = self.encode_parts(), state.memory
        latents = []
        # Not `not memory`: torch.compile has no graph for it. A pass at a time: a clip's features would fill memory.
        for frames in passes(frames_BTCHW, FRAMES_PER_LATENT, start=len(memory) == 0):
            latent_BTCHW, memory = run_parts(parts, frames, memory)
            latents.append(latent_BTCHW)
        return join(latents), VAEState(memory)

    def decode(self, latent_BTCHW: Tensor, state: VAEState) -> tuple[Tensor, VAEState]:
        """One frame for the first latent of a stream and 4 for every other.

        Args:
            latent_BTCHW: normalised latents, at least one, in the dtype of the weights.
            state: as for `encode`.

        Returns: frames [B, T, 3, 8H, 8W] in [-1, 1], and the state for the next call.
        Raises: ValueError for no latents.
        """
        check_latents(latent_BTCHW)
        parts, memory = self.decode_parts(), state.memory
        frames = []
        for latent in passes(latent_BTCHW, 1, start=len(memory) == 0):
            frames_BTCHW, memory = run_parts(parts, latent, memory)
            frames.append(frames_BTCHW)
        return join(frames), VAEState(memory)

    def normalise(self, raw_BTCHW: Tensor) -> Tensor:
        """From the scale of `encode` to that of `decode`; like raw_BTCHW."""
        return self.scale.normalise(raw_BTCHW)

    def denormalise(self, latent_BTCHW: Tensor) -> Tensor:
        """The inverse of `normalise`; like latent_BTCHW."""
        return self.scale.denormalise(latent_BTCHW)

    def encode_parts(self) -> list[Part]:
        """From pixels to raw means: its stages."""
        return between_pixels(stage_parts(_paced(self.encode_stages(), FRAMES_PER_LATENT)), _as_it_is, _as_it_is)

    def decode_parts(self) -> list[Part]:
        """From normalised latents to pixels: its stages."""
        return between_pixels(stage_parts(_paced(self.decode_stages(), 1)), self.denormalise, _clamped)

    def encode_stages(self) -> list[Stage]:
        """From pixels, 1 frame or 4, to the raw mean of one latent."""
        encoder = self.encoder
        return [encoder.conv1, *_stages(encoder.downsamples), *_stages(encoder.middle), encoder.head, self.conv1]

    def decode_stages(self) -> list[Stage]:
        """From one raw latent to pixels, not clamped, of 1 frame or 4."""
        decoder = self.decoder
        return [self.conv2, decoder.conv1, *_stages(decoder.middle), *_stages(decoder.upsamples), decoder.head]


def _paced(stages: Sequence[Stage], frames: int) -> list[tuple[Stage, int]]:
    """Stages with the frames that a pass, but for a stream's first, brings to each; frames: to the first of them."""
    paced = []
    for stage in stages:
        paced.append((stage, frames))
        if isinstance(stage, SpaceTimeDown):
            frames //= 2
        elif isinstance(stage, SpaceTimeUp):
            frames *= 2
    return paced


def _as_it_is(x: Tensor, *, start: bool = False) -> Tensor:
    return x


def _clamped(x_BTHWC: Tensor, *, start: bool) -> Tensor:
    return x_BTHWC.clamp_(-1, 1)


def _stages(modules: nn.ModuleList) -> list[Stage]:
    stages = []
    for module in modules:
        assert isinstance(module, Stage)
        stages.append(module)
    return stages
