"""Small models and streams for the tests of the engine's core."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from engine.api import StreamParams
from engine.config import SamplingConfig
from engine.pipeline import Pipeline
from engine.session import Item, SessionState
from engine.wan.presets import LIVEBRUSH_TINY, TransformerConfig
from engine.wan.untrained import untrained_wan_model
from engine.wan.vae import Carried, Memory, Part, VAEState, run_parts
from engine.wan.vae_config import WanVAEConfig
from engine.wan.vae_stages import check_frames
from engine.wan.wan_vae import WanVAE
from engine.wan.weights import Model

Frames = NDArray[np.uint8]

TINY = LIVEBRUSH_TINY.model_copy(update={"dim": 48, "ffn_dim": 64, "heads": 2, "layers": 2, "refine_channels": 8})
# Wan's habits at a size where a pass takes two milliseconds.
FLOW = TransformerConfig(latent_channels=4, dim=24, ffn_dim=32, heads=2, layers=2, text_dim=12, text_len=4, freq_dim=16)
# The embedded model's habits likewise.
RESIDUAL = FLOW.model_copy(
    update={"condition_channels": 4, "prediction": "source_residual", "pooled_text": True, "refine_channels": 8}
)
PLAIN = SamplingConfig()
POOLED_MEAN, POOLED_STD = (0.1, -0.2, 0.3, 0.0), (0.5, 2.0, 1.0, 1.5)


class PoolingVAE(WanVAE):
    """Wan's contract, its first frame alone included, without its work: mean colours and a channel of ones."""

    def __init__(self) -> None:
        super().__init__(WanVAEConfig(dim=2, z_dim=4, latent_mean=POOLED_MEAN, latent_std=POOLED_STD))

    def encode(self, frames_BTCHW: Tensor, state: VAEState) -> tuple[Tensor, VAEState]:
        check_frames(frames_BTCHW, state)
        missing = 0 if state.memory else 3
        whole = torch.cat((frames_BTCHW[:, :1].expand(-1, missing, -1, -1, -1), frames_BTCHW), dim=1)
        batch, frames, channels, height, width = whole.shape
        blocks = whole.reshape(batch, frames // 4, 4, channels, height // 8, 8, width // 8, 8)
        mean = blocks.mean(dim=(2, 5, 7))
        return torch.cat((mean, torch.ones_like(mean[:, :, :1])), dim=2), VAEState((frames_BTCHW[:, -1:].clone(),))

    def decode(self, latent_BTCHW: Tensor, state: VAEState) -> tuple[Tensor, VAEState]:
        frames, memory = run_parts(self.decode_parts(), latent_BTCHW, state.memory)
        return frames, VAEState(memory)

    def encode_parts(self) -> list[Part]:
        """The averages whole."""
        return [Part(self._encode, slots=1)]

    def decode_parts(self) -> list[Part]:
        """The colours, then their pixels."""
        return [Part(self._colours), Part(_pixels, slots=1)]

    def _encode(self, carried: Carried, memory: Memory) -> tuple[Carried, Memory]:
        latent, state = PoolingVAE.encode(self, carried[0], VAEState(memory))
        return (latent,), state.memory

    def _colours(self, carried: Carried, memory: Memory) -> tuple[Carried, Memory]:
        return (self.denormalise(carried[0])[:, :, :3],), ()


def _pixels(carried: Carried, memory: Memory) -> tuple[Carried, Memory]:
    (colours,) = carried
    frames = colours.repeat_interleave(8, dim=3).repeat_interleave(8, dim=4).repeat_interleave(4, dim=1)
    return (frames if memory else frames[:, 3:],), (colours[:, -1:].clone(),)


@cache
def pooled_model(
    transformer: TransformerConfig = FLOW, *, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> Model:
    """A random transformer with Wan's sampling, behind the cheapest of autoencoders."""
    vae = PoolingVAE()
    model = untrained_wan_model(transformer, vae.config, device=device, dtype=dtype)
    return replace(model, vae=vae.to(device, dtype).eval().requires_grad_(False))


def camera(frames: int, seed: int = 0, *, width: int = 32, height: int = 48) -> Frames:
    """Noise, which moves as much as anything can."""
    return np.random.default_rng(seed).integers(0, 256, (frames, height, width, 3), dtype=np.uint8)


def still(frames: int, seed: int = 0, *, width: int = 32, height: int = 48) -> Frames:
    """One frame of noise again and again."""
    return camera(1, seed, width=width, height=height).repeat(frames, axis=0)


def play(pipeline: Pipeline, state: SessionState, chunks: Sequence[Frames]) -> list[tuple[int, Frames]]:
    """What every tick of a stream gives back: chunk numbers and frames, in order; those in flight stay there."""
    shown = []
    for chunk in chunks:
        for done in pipeline.tick([(state, pipeline.upload(chunk))]):
            assert done.frames is not None
            shown.append((done.chunk, done.frames.numpy()))
    return shown


def opened(pipeline: Pipeline, **params: object) -> SessionState:
    """A stream whose prompt is at hand."""
    state = pipeline.open(StreamParams.model_validate({"prompt": "neon", **params}))
    pipeline.advance_prompts(state)
    return state


def latent(seed: int, frames: int = 1, size: tuple[int, int] = (4, 4)) -> Tensor:
    """A source latent [1, T, 4, H, W]."""
    return torch.randn(1, frames, 4, *size, generator=torch.Generator().manual_seed(seed))


def item_of(pipeline: Pipeline, state: SessionState, source: Tensor, chunk: int = 0) -> Item:
    """A chunk that takes its steps one after another on a stream's first row, past the autoencoder."""
    assert state.prompts.context is not None
    schedule = state.plan.base
    rows = state.rows[:1] * schedule.steps
    prompt = state.prompts.context
    figures = torch.zeros(2)
    return Item(state, chunk, 4, 0, source, source, schedule, prompt, state.noise, rows, False, figures)


def all_steps(pipeline: Pipeline, item: Item) -> Tensor:
    """The clean latent of an item after all of its steps."""
    pipeline.batch.begin(item)
    while not item.done:
        pipeline.batch.step([item])
    return item.clean


def relative_rms(value: Tensor, expected: Tensor) -> float:
    """Root mean square of the difference over that of what is expected."""
    return float((value - expected).norm() / expected.norm())


def upsampled(frames_TCHW: Tensor) -> Tensor:
    """8 times as large, the nearest pixel."""
    return functional.interpolate(frames_TCHW, scale_factor=8)
