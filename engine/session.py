"""All that belongs to one stream, in one object. Modules hold weights only; a reset is a new object."""

import weakref
from collections import deque
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from engine.api import StreamParams, Understood
from engine.flow_match import ChunkSchedule, SamplingPlan
from engine.health import HealthMonitor
from engine.kv_cache import CacheRow
from engine.noise_control import MotionState
from engine.prompts import PromptState
from engine.steady import Motion, Watcher
from engine.wan.transformer import PromptContext
from engine.wan.vae import StreamVAE, VAEState


class NoiseSource(Protocol):
    """Where the noise of a stream comes from."""

    def draw(self, chunk: int, step: int, frames: int) -> Tensor:
        """Standard normal [1, frames or 1, C, H, W], on the stream's device."""


class FixedNoise:
    """One sample for the whole stream: still input gives still output, and warp error is 2 to 10 % lower."""

    def __init__(self, seed: int, shape: tuple[int, int, int], device: torch.device, dtype: torch.dtype) -> None:
        # Drawn on the CPU, so that a seed means the same picture on every device.
        sample = torch.randn((1, 1, *shape), generator=torch.Generator().manual_seed(seed))
        self.sample = sample.to(device, dtype)

    def draw(self, chunk: int, step: int, frames: int) -> Tensor:
        """See `NoiseSource.draw`."""
        return self.sample


class FreshNoise:
    """A new sample for every chunk and step, the same in whatever order they are asked for."""

    def __init__(self, seed: int, shape: tuple[int, int, int], device: torch.device, dtype: torch.dtype) -> None:
        self._seed, self._random = seed, torch.Generator()
        self._shape, self._device, self._dtype = shape, device, dtype

    def draw(self, chunk: int, step: int, frames: int) -> Tensor:
        """See `NoiseSource.draw`."""
        # Mixed, because the generator starts from 32 bits.
        (mixed,) = np.random.SeedSequence((self._seed, chunk, step)).generate_state(1)
        sample = torch.randn((1, frames, *self._shape), generator=self._random.manual_seed(int(mixed)))
        return sample.to(self._device, self._dtype, non_blocking=True)


@dataclass
class Item:
    """One chunk on its way through its denoising steps; the unit of a micro-batch is an item at its next step.

    source, clean: [1, T, C, H, W], the encoded chunk and what the last step made of it. rows: the cache row of each
    step. pipelined: whether its steps run beside those of other chunks. frames: camera frames of the chunk, as many are
    shown. slots: where the current row keeps the chunk. grade: what its prompt adds to the decoded picture, on the
    device. understood: see `RenderedChunk`. motion, carried: what its pictures are steadied by. vae: that
    it was encoded with and will be decoded with; None for the model's.
    """

    state: "SessionState"
    chunk: int
    frames: int
    revision: int
    source: Tensor
    clean: Tensor
    schedule: ChunkSchedule
    prompt: PromptContext
    noise: NoiseSource
    rows: list[CacheRow]
    pipelined: bool
    camera: Tensor
    grade: Tensor | None = None
    understood: tuple[Understood, ...] = ()
    motion: Motion | None = None
    carried: float = 0.0
    vae: StreamVAE | None = None
    look: Tensor | None = None
    sink: Tensor | None = None
    slots: Tensor | None = None
    step: int = 0

    @property
    def done(self) -> bool:
        """Whether every step has been taken."""
        return self.step == self.schedule.steps


@dataclass(frozen=True)
class PassInput:
    """What a chunk's last step was given: enough to compute its keys and values again for another prompt."""

    noisy: Tensor
    source: Tensor
    timestep: Tensor


@dataclass
class SessionState:
    """What a stream carries from chunk to chunk, and the parameters in force.

    rows: its cache rows, one, or one a step. in_flight: chunks between their first and last step, oldest first.
    encoding, decoding: the VAE whose memory `encoder` and `decoder` are, None before the first chunk. revision: of the
    parameters that shape the next chunk. chunks, frames: taken in so far. shown: the last frame made, for telling a
    frozen picture. watcher, steadied: the camera's motion; the last frame in full, which the next is drawn towards, and
    its prompt. graded: the grade that the prompts ask for, the strength, and both together on the device. history: of
    the last chunks, as many as the window has frames. primed: as many rows hold the stream, ready for the steps of
    successive chunks together. pipelined: whether its steps shall run so, in mode `batch`.
    """

    params: StreamParams
    rows: list[CacheRow]
    prompts: PromptState
    plan: SamplingPlan
    noise: NoiseSource
    history: deque[PassInput]
    encoder: VAEState = field(default_factory=VAEState)
    decoder: VAEState = field(default_factory=VAEState)
    encoding: StreamVAE | None = None
    decoding: StreamVAE | None = None
    motion: MotionState = field(default_factory=MotionState)
    health: HealthMonitor = field(default_factory=HealthMonitor)
    in_flight: deque[Item] = field(default_factory=deque)
    camera: Tensor | None = None
    shown: Tensor | None = None
    watcher: Watcher = field(default_factory=Watcher)
    steadied: tuple[PromptContext, Tensor] | None = None
    graded: tuple[Tensor, float, Tensor] | None = None
    revision: int = 0
    pending_revision: int | None = None
    primed: int = 0
    pipelined: bool = True
    lease: "weakref.finalize[..., SessionState] | None" = None
    chunks: int = 0
    frames: int = 0
