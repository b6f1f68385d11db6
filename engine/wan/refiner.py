"""Convolutions on what the transformer predicts: contours, dots and strokes are matters of a few pixels.

Axes in names: B batch, T latent frames, N both in one, C channels, H and W latent rows and columns, E model width.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from engine.wan.presets import REFINE_FACTOR, TransformerConfig
from engine.wan.vae import channels_from_space, space_from_channels


class RefinerBlock(nn.Module):
    """Two 3x3 convolutions added to their input; what is asked for scales and shifts the features between them."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv_out = nn.Conv2d(channels, channels, 3, padding=1)
        for parameter in self.conv_out.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x_NCHW: Tensor, scale_NC11: Tensor, shift_NC11: Tensor) -> Tensor:
        """Like x_NCHW. scale_NC11: about 0."""
        features = functional.silu(torch.addcmul(shift_NC11, self.conv_in(x_NCHW), 1 + scale_NC11))
        out: Tensor = x_NCHW + self.conv_out(features)
        return out


class Refiner(nn.Module):
    """Convolutions on the predicted latent beside its source, at twice their resolution.

    A contour, a dot or a brush stroke is alike everywhere. Convolutions learn that from far fewer examples than tokens
    of 16 px do: in 100 s of training they alone drew contours better than the transformer alone after an hour
    (docs/engine.md). Time and prompt scale and shift the features of every block. Each place within a token adds
    features of its own: a step between two tokens is told from a contour by where it lies.

    Where `refine_coarse_channels` asks for them, blocks at the latent's own resolution come first: they see four
    times as far for a quarter of the work, and besides the latents they are told what the tokens know (`hint`), so
    that neighbouring tokens need not agree on a plain wall by chance. Starts as the identity.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        width, blocks, area = config.refine_channels, config.refine_blocks, REFINE_FACTOR**2
        latents = config.latent_channels + config.condition_channels
        self.spread = nn.Conv2d(latents, area * width, 1)
        rows, columns = (REFINE_FACTOR * side for side in config.patch[1:])
        self.place = nn.Parameter(torch.zeros(width, rows, columns))
        self.blocks = nn.ModuleList(RefinerBlock(width) for _ in range(blocks))
        self.film = nn.Linear(config.dim, 2 * width * (blocks + 1))
        self.gather = nn.Conv2d(area * width, config.latent_channels, 1)
        zeros = [*self.film.parameters(), *self.gather.parameters()]
        self.hint: nn.Linear | None = None
        if coarse := config.refine_coarse_channels:
            self.hint = nn.Linear(config.dim, coarse * config.patch[1] * config.patch[2])
            self.survey = nn.Conv2d(latents, coarse, 1)
            self.coarse_blocks = nn.ModuleList(RefinerBlock(coarse) for _ in range(config.refine_coarse_blocks))
            self.coarse_film = nn.Linear(config.dim, 2 * coarse * (config.refine_coarse_blocks + 1))
            self.descend = nn.Conv2d(coarse, area * width, 1)
            zeros += [*self.coarse_film.parameters(), *self.descend.parameters()]
        for parameter in zeros:
            nn.init.zeros_(parameter)

    def forward(
        self,
        output_BTCHW: Tensor,
        source_BTCHW: Tensor | None,
        time_BE: Tensor,
        hints_BTCHW: Tensor | None = None,
    ) -> Tensor:
        """The network's output with its correction added, same shape.

        Args:
            hints_BTCHW: what `hint` made of the tokens, spread to the latent's places; with coarse blocks alone.
        """
        film = self.modulation(time_BE, output_BTCHW.shape[1])
        x = self.begin(output_BTCHW, source_BTCHW, film, hints_BTCHW)
        for number in range(len(self.blocks)):
            x = self.through(x, film, number)
        return self.end(x, output_BTCHW)

    # --- the parts of it, each of which may run on a device of its own

    def modulation(self, time_BE: Tensor, frames: int) -> tuple[Tensor, ...]:
        """Scale and shift of the first features and of every block's, [N, C, 1, 1] each; the coarse ones' last."""
        made = self._pairs(self.film, len(self.blocks), time_BE, frames)
        if self.hint is not None:
            made += self._pairs(self.coarse_film, len(self.coarse_blocks), time_BE, frames)
        return made

    def begin(
        self,
        output_BTCHW: Tensor,
        source_BTCHW: Tensor | None,
        film: Sequence[Tensor],
        hints_BTCHW: Tensor | None = None,
    ) -> Tensor:
        """The features [N, C, 2H, 2W] that the first block takes."""
        latents = output_BTCHW if source_BTCHW is None else torch.cat((output_BTCHW, source_BTCHW), dim=2)
        x = self.spread(latents.flatten(0, 1))
        if hints_BTCHW is not None:
            x = x + self._coarse(latents.flatten(0, 1), hints_BTCHW.flatten(0, 1), film[2 * (len(self.blocks) + 1) :])
        x = self._placed(space_from_channels(x, REFINE_FACTOR))
        return functional.relu(torch.addcmul(film[1], x, 1 + film[0]))

    def through(self, x_NCHW: Tensor, film: Sequence[Tensor], number: int) -> Tensor:
        """Features through one block."""
        if x_NCHW.dtype != torch.float32:
            # In bfloat16 a CPU needs a fifth less for all of the refiner with channels last; in float32 it is the same.
            x_NCHW = x_NCHW.contiguous(memory_format=torch.channels_last)
        out: Tensor = self.blocks[number](x_NCHW, film[2 + 2 * number], film[3 + 2 * number])
        return out

    def end(self, x_NCHW: Tensor, output_BTCHW: Tensor) -> Tensor:
        """Features of the last block to what `forward` returns."""
        x: Tensor = self.gather(channels_from_space(functional.relu(x_NCHW), REFINE_FACTOR))
        return output_BTCHW + x.view_as(output_BTCHW)

    def _coarse(self, latents_NCHW: Tensor, hints_NCHW: Tensor, film: Sequence[Tensor]) -> Tensor:
        """What the blocks at the latent's resolution add to the features of all finer places, [N, 4C, H, W]."""
        x = functional.relu(torch.addcmul(film[1], self.survey(latents_NCHW) + hints_NCHW, 1 + film[0]))
        for number, block in enumerate(self.coarse_blocks):
            x = block(x, film[2 + 2 * number], film[3 + 2 * number])
        out: Tensor = self.descend(functional.relu(x))
        return out

    def _placed(self, x_NCHW: Tensor) -> Tensor:
        count, channels, height, width = x_NCHW.shape
        _, rows, columns = self.place.shape
        x = x_NCHW.view(count, channels, height // rows, rows, width // columns, columns)
        return (x + self.place[:, None, :, None]).view(x_NCHW.shape)

    @staticmethod
    def _pairs(film: nn.Linear, blocks: int, time_BE: Tensor, frames: int) -> tuple[Tensor, ...]:
        made: Tensor = film(functional.silu(time_BE)).repeat_interleave(frames, 0)[:, :, None, None]
        return made.chunk(2 * (blocks + 1), dim=1)
