"""Frames of one chunk through VAE encode, denoise and VAE decode, as plain calls.

Axes in names: B batch, T frames, C channels, H and W rows and columns.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.api import StreamParams
from engine.denoise import denoise_chunk
from engine.flow_match import SamplingPlan, sampling_plan
from engine.kv_cache import KVCache
from engine.session import SessionState
from engine.wan.transformer import PromptContext
from engine.wan.vae import FRAMES_PER_LATENT, PIXELS_PER_LATENT
from engine.wan.weights import Model

CHUNK_LENGTHS = (1, FRAMES_PER_LATENT)


class Pipeline:
    """A model at one frame size. Any number of sessions may take turns on it; none leaves a trace in it."""

    def __init__(self, model: Model, width: int, height: int) -> None:
        """Prepare for frames of width x height pixels.

        Raises: ValueError, if the size is not a multiple of the VAE's stride times the transformer's patch.
        """
        _, rows, columns = model.config.transformer.patch
        for name, value, patch in (("width", width, columns), ("height", height, rows)):
            if value < 1 or value % (PIXELS_PER_LATENT * patch):
                raise ValueError(f"{name} {value} must be a positive multiple of {PIXELS_PER_LATENT * patch}")
        self.model = model
        self.width, self.height = width, height

    @torch.inference_mode()
    def open(self, params: StreamParams) -> SessionState:
        """A fresh stream: allocates its cache, encodes its prompt and draws its noise."""
        config = self.model.config.transformer
        latent_height, latent_width = self.height // PIXELS_PER_LATENT, self.width // PIXELS_PER_LATENT
        _, rows, columns = config.patch
        cache = KVCache(
            config,
            latent_height // rows,
            latent_width // columns,
            device=self.model.device,
            dtype=self.model.dtype,
        )
        prompt = self._prompt(params.prompt)
        return SessionState(params, cache, prompt, self._plan(params), self._noise(params.seed))

    @torch.inference_mode()
    def set_params(self, state: SessionState, params: StreamParams) -> None:
        """Change a stream between two chunks; cache and VAE memories stay, so the picture goes on."""
        if params.prompt != state.params.prompt:
            state.prompt = self._prompt(params.prompt)
        if params.seed != state.params.seed:
            state.noise = self._noise(params.seed)
        state.plan = self._plan(params)
        state.params = params

    def render(self, state: SessionState, frames: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Restyle one chunk.

        Args:
            frames: [T, H, W, 3] RGB of the pipeline's size, T 4 or 1. A single frame is shown to the model as 4.

        Returns: an array of its own with the same shape.
        Raises: ValueError for any other shape or dtype.
        """
        size = (self.height, self.width, 3)
        if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[1:] != size or len(frames) not in CHUNK_LENGTHS:
            raise ValueError(
                f"frames {frames.dtype} {frames.shape} must be uint8 [T, {self.height}, {self.width}, 3], T 1 or 4"
            )
        # A tensor must not share memory with a read-only array.
        owned = frames if frames.flags.writeable and frames.flags.c_contiguous else frames.copy()
        rendered = self.tick(state, torch.from_numpy(owned).to(self.model.device))
        return rendered.cpu().numpy()

    @torch.inference_mode()
    def tick(self, state: SessionState, frames_THWC: Tensor) -> Tensor:
        """`render` on the model's device, from uint8 tensor to uint8 tensor, without a read back to the host."""
        pixels_BTCHW = frames_THWC.permute(0, 3, 1, 2).contiguous()[None].to(self.model.dtype).mul(1 / 127.5).sub_(1)
        source_BTCHW, state.encoder = self.model.vae.encode(pixels_BTCHW, state.encoder)
        latent_BTCHW = denoise_chunk(self.model.transformer, state, source_BTCHW)
        decoded_BTCHW, state.decoder = self.model.vae.decode(latent_BTCHW, state.decoder)
        state.chunks += 1
        state.frames += frames_THWC.shape[0]
        shown = decoded_BTCHW[0, -frames_THWC.shape[0] :].clamp(-1, 1).add_(1).mul_(127.5).round_()
        return shown.to(torch.uint8).permute(0, 2, 3, 1).contiguous()

    def nearest_style(self, prompt: str) -> tuple[str, float] | None:
        """Id of the known style that a prompt is nearest to and the cosine of the two; None for an empty prompt."""
        return self.model.styles.nearest(prompt)

    def _prompt(self, prompt: str) -> PromptContext:
        encoded = self.model.text.encode(prompt)
        states, mean = (x[None].to(self.model.device, self.model.dtype) for x in (encoded.states, encoded.mean))
        return self.model.transformer.prompt_context(states, mean)

    def _plan(self, params: StreamParams) -> SamplingPlan:
        return sampling_plan(params.steps, params.strength, self.model.config.shift, self.model.device)

    def _noise(self, seed: int) -> Tensor:
        # Drawn on the CPU, so that a seed means the same picture on every device.
        channels = self.model.config.transformer.latent_channels
        size = (1, 1, channels, self.height // PIXELS_PER_LATENT, self.width // PIXELS_PER_LATENT)
        noise = torch.randn(size, generator=torch.Generator().manual_seed(seed))
        return noise.to(self.model.device, self.model.dtype)
