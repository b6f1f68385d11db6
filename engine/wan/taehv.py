"""TAEHV, the tiny autoencoder for the latents of Wan 2.1, chunk by chunk, with its memory outside of it.

Axes in names: B batch, T frames or latent frames, C channels, H and W rows and columns.

Weights are named as in the published file (taew2_1.pth), which therefore loads strictly and without a map. The
stream is cut as that of the Wan autoencoder: one frame for its first latent, 4 for every other.

* The decoder gives 4 frames per latent; of a clip's first latent the published one leaves out 3, and so do we.
* The encoder takes 4 frames per latent. It was taught that latent i is the group that begins with frame 4i, while
  in the autoencoder that it imitates frame 4i is the last of latent i. So the last latent of 1 + 4k frames lacks
  three, in whose place the published encoder repeats the last one; a stream that is to be on time has to do so for
  every latent. Latent i is thus what the published encoder ends with on the clip up to frame 4i. Each group is
  encoded twice: filled up, for its latent, and when it is complete, for what the later ones remember of it.
  Repeating the first frame in front instead would save this, but then latents would be three frames late.

Published latents are normalised. `encode` brings them to the raw scale, so that this and the Wan autoencoder can
stand in for each other.

Source: github.com/madebyollin/taehv (MIT) and its training example in github.com/madebyollin/seraena.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from engine.wan.vae import FRAMES_PER_LATENT, Carried, Memory, Part, VAEState, run_parts
from engine.wan.vae_config import TAEHVConfig
from engine.wan.vae_stages import (
    LatentScale,
    Pointwise,
    Stage,
    between_pixels,
    channels_last,
    channels_third,
    check_frames,
    check_latents,
    conv_frames,
    conv_parameters,
    join,
    passes,
    run_stages,
    stage_parts,
)

_LIMIT = 3.0  # latents are bent towards plus and minus this before decoding


class Conv(Stage):
    """A 3x3 convolution over every frame on its own, and perhaps a ReLU."""

    def __init__(
        self, channels_in: int, channels_out: int, *, stride: int = 1, bias: bool = True, relu: bool = False
    ) -> None:
        super().__init__()
        self.weight, initial = conv_parameters(channels_out, channels_in, 3, 3)
        self.bias = initial if bias else None
        self._stride, self._relu = stride, relu

    def forward(self, x_BTHWC: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
        """See `Stage.forward`."""
        y = conv_frames(x_BTHWC, self.weight, self.bias, stride=self._stride, padding=1)
        return y.relu_() if self._relu else y, ()


class MemBlock(Stage):
    """Three convolutions of a frame and the one before it, added to the frame."""

    slots = 1

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.ModuleDict(
            {
                "0": Conv(2 * channels, channels, relu=True),
                "2": Conv(channels, channels, relu=True),
                "4": Conv(channels, channels),
            }
        )

    def forward(self, x_BTHWC: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
        """See `Stage.forward`; the memory is the last frame, zeros at the start."""
        before = memory[0] if memory else torch.zeros_like(x_BTHWC[:, :1])
        y = torch.cat((x_BTHWC, torch.cat((before, x_BTHWC[:, :-1]), dim=1)), dim=-1)
        for conv in self.conv.values():
            y, _ = conv(y, ())
        y += x_BTHWC
        return y.relu_(), (x_BTHWC[:, -1:].clone(),)


class Pool(Stage):
    """Mix several frames into one."""

    def __init__(self, channels: int, frames: int) -> None:
        super().__init__()
        self.conv = Pointwise(frames * channels, channels, 2, bias=False)
        self._frames = frames

    def forward(self, x_BTHWC: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
        """See `Stage.forward`; T must be a multiple of the frames that become one."""
        batch, _, *size, channels = x_BTHWC.shape
        x = x_BTHWC.view(batch, -1, self._frames, *size, channels).movedim(2, -2)
        return self.conv.apply_to(x.flatten(-2)), ()


class Grow(Stage):
    """Several frames from each, of twice the rows and columns.

    The published order is rows and columns first. The mixing works on single pixels, so this order gives the same.
    """

    def __init__(self, channels: int, frames: int) -> None:
        super().__init__()
        self.conv = Pointwise(channels, frames * channels, 2, bias=False)
        self.frames = frames

    def forward(self, x_BTHWC: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
        """See `Stage.forward`."""
        batch, _, height, width, channels = x_BTHWC.shape
        x = self.conv.apply_to(x_BTHWC).view(batch, -1, height, 1, width, 1, self.frames, channels)
        # The nearest pixel and the frames in their order, by one strided copy.
        x = x.movedim(-2, 2).expand(-1, -1, -1, -1, 2, -1, 2, -1)
        return x.reshape(batch, -1, 2 * height, 2 * width, channels), ()


class TAEHV(nn.Module):
    """A Wan latent for a twentieth of the work; see the module's docstring.

    `encode` returns raw latents, `decode` takes normalised ones, as `engine.wan.wan_vae.WanVAE` does.
    """

    def __init__(self, config: TAEHVConfig) -> None:
        """Make an autoencoder with random weights."""
        super().__init__()
        self.config = config
        self.latent_channels = config.z_dim
        self.encoder, self.decoder = _encoder(config), _decoder(config)
        self.scale = LatentScale(config)

    def encode(self, frames_BTCHW: Tensor, state: VAEState) -> tuple[Tensor, VAEState]:
        """One latent for the first frame of a stream and for every 4 after it.

        Args:
            frames_BTCHW: RGB in [-1, 1], rows and columns multiples of 8, in the dtype of the weights; 1 + 4k frames
                at the start of a stream, then 4k a call.
            state: a fresh one at the start, else what the call before returned for this stream, or batch of streams.

        Returns: raw latents [B, T, C, H / 8, W / 8], and the state for the next call: the frame that begins the next
            group, then the memory of the groups before it.
        Raises: ValueError for another length or size.
        """
        check_frames(frames_BTCHW, state)
        latent, memory = run_parts(self.encode_parts(), frames_BTCHW, state.memory)
        return latent, VAEState(memory)

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
        # A pass at a time: a clip's features would fill memory.
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
        """One: that a group is encoded twice would show in every cut, for a seventeenth of the Wan encoder's work."""
        return [Part(self._encode, slots=1 + sum(stage.slots for stage in _stages(self.encoder)))]

    def decode_parts(self) -> list[Part]:
        """From normalised latents to pixels: its stages."""
        paced, frames = [], 1
        for stage in _stages(self.decoder):
            paced.append((stage, frames))
            frames *= stage.frames if isinstance(stage, Grow) else 1
        return between_pixels(stage_parts(paced, first_alone=False), _bent, _shown)

    def _encode(self, carried: Carried, memory: Memory) -> tuple[Carried, Memory]:
        """See `encode`."""
        (frames_BTCHW,) = carried
        stages, start = _stages(self.encoder), len(memory) == 0
        first, memory = (None, ()) if start else (memory[0], memory[1:])
        latents = []
        for frames in passes(frames_BTCHW * 0.5 + 0.5, FRAMES_PER_LATENT, start=start):
            x_BTHWC = channels_last(frames)
            if first is not None:
                _, memory = run_stages(stages, torch.cat((first, x_BTHWC[:, :-1]), dim=1), memory)
            first = x_BTHWC[:, -1:].clone()
            filled = first.expand(-1, FRAMES_PER_LATENT, -1, -1, -1)
            latent_BTHWC, then = run_stages(stages, filled.contiguous(), memory)
            # Before the first group there are zeros; so a state always has the same shapes.
            memory = memory or tuple(torch.zeros_like(tensor) for tensor in then)
            latents.append(latent_BTHWC)
        assert first is not None  # there is at least one pass
        return (self.denormalise(channels_third(join(latents))).contiguous(),), (first, *memory)


def _bent(latent: Tensor) -> Tensor:
    return torch.tanh(latent / _LIMIT) * _LIMIT


def _shown(x_BTHWC: Tensor, *, start: bool) -> Tensor:
    frames = x_BTHWC[:, FRAMES_PER_LATENT - 1 :] if start else x_BTHWC
    return frames.clamp(0, 1) * 2 - 1


def _encoder(config: TAEHVConfig) -> nn.ModuleDict:
    width, blocks = config.encoder_dim, config.memory_blocks
    layers: list[Stage | None] = [Conv(3, width, relu=True), None]
    for frames in (2, 2, 1):
        layers += [Pool(width, frames), Conv(width, width, stride=2, bias=False)]
        layers += [MemBlock(width) for _ in range(blocks)]
    return _numbered([*layers, Conv(width, config.z_dim)])


def _decoder(config: TAEHVConfig) -> nn.ModuleDict:
    widths, blocks = config.decoder_dims, config.memory_blocks
    layers: list[Stage | None] = [None, Conv(config.z_dim, widths[0], relu=True), None]
    for level, frames in enumerate((1, 2, 2)):
        width, narrower = widths[level : level + 2]
        layers += [MemBlock(width) for _ in range(blocks)]
        layers += [None, Grow(width, frames), Conv(width, narrower, bias=False, relu=level == 2)]
    return _numbered([*layers, None, Conv(widths[-1], 3)])


def _numbered(layers: Sequence[Stage | None]) -> nn.ModuleDict:
    """Layers under their published number; None stands for one without weights, which is part of its neighbour."""
    return nn.ModuleDict({str(number): layer for number, layer in enumerate(layers) if layer is not None})


def _stages(layers: nn.ModuleDict) -> list[Stage]:
    stages = []
    for layer in layers.values():
        assert isinstance(layer, Stage)
        stages.append(layer)
    return stages
