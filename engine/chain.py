"""What a chunk passes on its way through a model, as a chain of units that can lie on any rank.

    encode parts -> DiT blocks -> head, refiner's blocks -> decode parts

A chunk passes the first and the last section once, the two in the middle once a step. Nothing here computes: sizes are
found by running a model's autoencoder once over the smallest of frames.

Axes in names: B rows, T latent frames, C channels, H and W rows and columns.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.wan.presets import TransformerConfig
from engine.wan.vae import FRAMES_PER_LATENT, PIXELS_PER_LATENT, Carried, Memory, Part
from engine.wan.weights import Model

# Latents across and down of the frame that sizes are found with.
SAMPLE_LATENTS = 2


@dataclass(frozen=True)
class Chain:
    """Units of a model at one frame size, by number: those to encode, the blocks, those behind them, those to decode.

    kinds: of every unit; units of one kind take the same time. unit_bytes: what it keeps of streams, of all that may be
    open. carried: the most values that go from one unit to the next, of the usual chunk.
    """

    encode: range
    blocks: range
    tail: range
    decode: range
    kinds: tuple[str, ...]
    unit_bytes: tuple[int, ...]
    carried: int

    @property
    def units(self) -> int:
        """How many there are."""
        return len(self.kinds)

    def check(self, bounds: Sequence[int], ranks: int) -> None:
        """Raises ValueError for what are no bounds of all units over so many ranks."""
        whole = len(bounds) == ranks + 1 and (bounds[0], bounds[-1]) == (0, self.units)
        if not whole or list(bounds) != sorted(bounds):
            raise ValueError(f"bounds {tuple(bounds)} must rise from 0 to {self.units} over {ranks} ranks")


def chain_of(model: Model, width: int, height: int, *, span: int, streams: int, rows: int) -> Chain:
    """The chain of a model for frames of width x height pixels.

    Args:
        span: latent frames of the usual chunk. streams, rows: that may be open, and their cache rows in all.
    """
    transformer, vae = model.config.transformer, model.vae
    channels, size = transformer.latent_channels, (height // PIXELS_PER_LATENT, width // PIXELS_PER_LATENT)
    latent = span * channels * size[0] * size[1]
    side = SAMPLE_LATENTS * PIXELS_PER_LATENT
    frames = torch.zeros(1, FRAMES_PER_LATENT * span, 3, side, side, device=model.device, dtype=model.dtype)
    latents = torch.zeros(1, span, channels, SAMPLE_LATENTS, SAMPLE_LATENTS, device=model.device, dtype=model.dtype)
    encode, decode = (
        _measured(parts, x, size[0] * size[1])
        for parts, x in ((vae.encode_parts(), frames), (vae.decode_parts(), latents))
    )
    area = transformer.patch[1] * transformer.patch[2]
    tokens = span * size[0] * size[1] // area
    tails = model.transformer.tail_parts
    features = 0 if tails == 1 else latent + latent * model.transformer.refiner_values // channels
    block_bytes = 2 * rows * transformer.window_frames * tokens // span * transformer.dim * model.dtype.itemsize
    kinds = [
        *(f"encode {number}" for number in range(len(encode))),
        *["block"] * transformer.layers,
        "head",
        *["refine"] * (tails - 1),
        *(f"decode {number}" for number in range(len(decode))),
    ]
    ends = itertools.accumulate((len(encode), transformer.layers, tails, len(decode)), initial=0)
    coding, blocks, tail, decoding = (range(begin, end) for begin, end in itertools.pairwise(ends))
    memories = (
        *(streams * kept for _, kept in encode),
        *[block_bytes] * transformer.layers,
        *[0] * tails,
        *(streams * kept for _, kept in decode),
    )
    carried = max(
        latents_carried(transformer) * latent + max(tokens * transformer.dim, features),
        *(values for values, _ in (*encode, *decode)),
    )
    return Chain(coding, blocks, tail, decoding, tuple(kinds), memories, carried)


def latents_carried(transformer: TransformerConfig) -> int:
    """Latents that go along with the tokens of a pass: what the clean one is made of in the end, noisy or source; both
    where one is needed for that and the other by the refiner."""
    return 2 if transformer.prediction == "flow" and transformer.condition_channels else 1


@torch.inference_mode()
def _measured(parts: Sequence[Part], x: Tensor, area: int) -> list[tuple[int, int]]:
    """For every part: values it returns for a later chunk of a stream, and bytes it keeps of the stream.

    area: latents of a frame; all that a part makes of a frame grows with it.
    """
    found = []
    start: Carried = (x[:, :1],)
    carried: Carried = (x,)
    memory: Memory
    for part in parts:
        start, memory = part.run(start, ())
        carried, memory = part.run(carried, memory)
        values = sum(tensor.numel() for tensor in carried)
        kept = sum(tensor.numel() * tensor.element_size() for tensor in memory)
        found.append((values * area // SAMPLE_LATENTS**2, kept * area // SAMPLE_LATENTS**2))
    return found
