"""A bundle: what a stream was given, weights and noise included, read and checked for `engine.replay`.

A bundle folder has

    spec.json              sizes and settings, see `Spec`
    dit.safetensors        the transformer under original Wan names
    vae.safetensors        the autoencoder likewise
    light_vae.safetensors  the light one (TAEHV, published names), where `Spec.moves` go to it
    inputs.safetensors     prompt_embeds [1, text_len, text_dim], video [1, 3, T, H, W] in [-1, 1]
                           with T = 1 + 4K(1 + chunks)
    noise.safetensors      noise_CCC_S [frames, z, h, w]: enters chunk CCC before step S, of the size of its latent

A chunk after a move to another size or VAE is of one latent frame more: that size or VAE begins with a frame alone, and
is shown the chunk's first one twice.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError, model_validator
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from engine.api import StreamParams
from engine.config import WAN_SAMPLING, CacheConfig, MotionConfig, SamplingConfig, ServingProfile
from engine.wan.checkpoints import check_shapes, transformer_from_original
from engine.wan.presets import TransformerConfig
from engine.wan.taehv import TAEHV
from engine.wan.text_encoder import EncodedPrompt, StyleIndex
from engine.wan.transformer import CausalTransformer
from engine.wan.vae import PIXELS_PER_LATENT
from engine.wan.vae_config import TAEHVConfig, WanVAEConfig
from engine.wan.wan_vae import WanVAE
from engine.wan.weights import Model, ModelConfig, WeightsError

log = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "fp32": torch.float32, "bfloat16": torch.bfloat16, "bf16": torch.bfloat16}
LIGHT_VAE_FILE = "light_vae.safetensors"


class BundleError(Exception):
    """A bundle that cannot be run; the text names the file and what is wrong with it."""


class Move(BaseModel):
    """From this chunk on a stream is rendered so: a rung of the ladder. steps: as before the moves, where left out."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    chunk: int
    steps: PositiveInt | None = None
    small: bool = False
    light: bool = False


class Spec(BaseModel):
    """spec.json. Sizes of pixels; steps: timesteps, noisiest first, or how many of the public ones.

    moves: the rungs that the stream came to, in order; small_width, small_height: the smaller size they know;
    light_vae: what light_vae.safetensors holds, the published sizes where left out.

    text_tokens, adapt_sink_threshold and seed are known and change nothing: all positions are attended, sinks are not
    refreshed, and the noise is recorded.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    dim: PositiveInt
    heads: PositiveInt
    layers: PositiveInt
    ffn_dim: PositiveInt
    text_dim: PositiveInt
    text_len: PositiveInt
    text_tokens: PositiveInt | None = None
    freq_dim: PositiveInt = 256
    vae_dim: PositiveInt
    z_dim: PositiveInt = 16
    height: PositiveInt
    width: PositiveInt
    chunks: int
    frames_per_block: PositiveInt = 1
    steps: tuple[int, ...] | PositiveInt
    shift: float = 8.0
    num_kv_cache: PositiveInt = 6
    num_sink: int = 3
    adapt_sink_threshold: float = -1.0
    noise_scale: float = 0.8
    adaptive_noise: bool = True
    dtype: str = "float32"
    seed: int = 0
    moves: tuple[Move, ...] = ()
    small_width: PositiveInt | None = None
    small_height: PositiveInt | None = None
    light_vae: TAEHVConfig = Field(default_factory=lambda given: TAEHVConfig(z_dim=given["z_dim"]))

    @model_validator(mode="after")
    def _can_follow_its_moves(self) -> Self:
        before = 0
        for move in self.moves:
            if not before < move.chunk <= self.chunks:
                raise ValueError(
                    f"moves: chunk {move.chunk} must be above {before} and at most the last one, {self.chunks}"
                )
            before = move.chunk
            if move.steps is not None and move.steps > len(self.timesteps):
                raise ValueError(
                    f"moves: {move.steps} steps at chunk {move.chunk} are more than the {len(self.timesteps)} there are"
                )
        if self.has_small and (self.small_width is None or self.small_height is None):
            raise ValueError("moves go to a smaller size: give small_width and small_height")
        if self.light_vae.z_dim != self.z_dim:
            raise ValueError(f"light_vae.z_dim {self.light_vae.z_dim} must be z_dim {self.z_dim}")
        return self

    @property
    def has_small(self) -> bool:
        """Whether the stream was at the smaller size for a while."""
        return any(move.small for move in self.moves)

    @property
    def has_light(self) -> bool:
        """Whether it went through the light VAE for a while."""
        return any(move.light for move in self.moves)

    def size(self, *, small: bool) -> tuple[int, int]:
        """Width and height that chunks are rendered at."""
        if small:
            assert self.small_width is not None and self.small_height is not None  # checked above
            return self.small_width, self.small_height
        return self.width, self.height

    def params_of(self, chunk: int) -> StreamParams:
        """What a chunk is rendered with."""
        move = next((move for move in reversed(self.moves) if move.chunk <= chunk), Move(chunk=0))
        return StreamParams(steps=move.steps or len(self.timesteps), small=move.small, light=move.light)

    @property
    def timesteps(self) -> tuple[int, ...]:
        """Noisiest first, one for each step; a closing 0 is no step."""
        public = WAN_SAMPLING.timesteps or ()
        steps = public[: self.steps] if isinstance(self.steps, int) else self.steps
        return tuple(step for step in steps if step > 0)


class RecordedNoise:
    """The noise of a bundle (`engine.session.NoiseSource`). first: the chunk that its user counts as its first."""

    def __init__(self, tensors: Mapping[str, Tensor], spec: Spec, first: int = 0) -> None:
        self._tensors, self._spec, self._first = tensors, spec, first
        self._dtype = DTYPES[spec.dtype.removeprefix("torch.")]

    def after(self, first: int) -> RecordedNoise:
        """The same for one who begins with a later chunk."""
        return RecordedNoise(self._tensors, self._spec, first)

    def draw(self, chunk: int, step: int, frames: int) -> Tensor:
        """See `NoiseSource.draw`. Raises BundleError for a sample that the bundle lacks or that is of another shape."""
        place = self._first + chunk
        name = f"noise_{place:03d}_{step}"
        if name not in self._tensors:
            raise BundleError(f"noise.safetensors has no {name}")
        noise = self._tensors[name]
        width, height = self._spec.size(small=self._spec.params_of(place).small)
        wanted = (frames, self._spec.z_dim, height // PIXELS_PER_LATENT, width // PIXELS_PER_LATENT)
        if tuple(noise.shape) != wanted:
            raise BundleError(f"noise.safetensors: {name} is {tuple(noise.shape)}, the latent of its chunk {wanted}")
        return noise[None].to(self._dtype)


class _GivenText:
    """A text encoder that knows one prompt, whatever it is asked."""

    def __init__(self, states: Tensor) -> None:
        self._prompt = EncodedPrompt(states, states.float().mean(0), states.shape[0])

    def request(self, prompt: str) -> EncodedPrompt:
        return self._prompt

    def encode(self, prompt: str) -> EncodedPrompt:
        return self._prompt

    def close(self) -> None:
        pass


@dataclass(frozen=True)
class Bundle:
    """A bundle, read and checked. video: [T, 3, H, W] in the bundle's dtype."""

    spec: Spec
    model: Model
    video: Tensor
    noise: RecordedNoise

    @classmethod
    def read(cls, folder: Path) -> Bundle:
        """Read a bundle folder. Raises BundleError, or WeightsError naming every key that does not fit."""
        spec = read_spec(folder / "spec.json")
        dtype = DTYPES[spec.dtype.removeprefix("torch.")]
        inputs = _tensors(folder / "inputs.safetensors", ("prompt_embeds", "video"))
        video = inputs["video"]
        frames = 1 + 4 * spec.frames_per_block * (1 + spec.chunks)
        if video.ndim != 5 or video.shape[2] < frames:
            raise BundleError(f"video {tuple(video.shape)} must be [1, 3, T, H, W] with T of {frames} at least")
        try:
            model = make_model(spec, folder, inputs["prompt_embeds"][0], dtype)
        except ValidationError as error:
            told = "; ".join(fault["msg"].removeprefix("Value error, ") for fault in error.errors())
            raise BundleError(f"{folder / 'spec.json'}: {told}") from error
        except WeightsError as error:
            raise BundleError(f"{folder}: {error}") from error
        noise = RecordedNoise(_tensors(folder / "noise.safetensors"), spec)
        return cls(spec, model, video[0, :, :frames].transpose(0, 1).to(dtype).contiguous(), noise)

    @property
    def scaled_dtype(self) -> torch.dtype:
        """Of pixels brought to another size: motion is measured on exact ones, see `Pipeline.shrunk`."""
        return self.model.dtype if self.model.config.sampling.motion is None else torch.float32

    def chunk(self, index: int) -> Tensor:
        """Pixels [T, 3, H, W] of a chunk."""
        span = 4 * self.spec.frames_per_block
        start = 0 if index == 0 else 1 + index * span
        return self.video[start : 1 + (index + 1) * span]


def read_spec(path: Path) -> Spec:
    """Read spec.json; keys it does not know are ignored with a warning. Raises BundleError."""
    try:
        given = json.loads(path.read_bytes())
        spec = Spec.model_validate(given)
    except OSError as error:
        raise BundleError(f"cannot read {path}: {error.strerror}") from error
    except ValidationError as error:
        raise BundleError(f"{path}: {error}") from error
    except ValueError as error:
        raise BundleError(f"{path} is not JSON: {error}") from error
    if unknown := sorted(given.keys() - Spec.model_fields.keys()):
        log.warning("%s: ignored what is not known: %s", path, ", ".join(unknown))
    if spec.dtype.removeprefix("torch.") not in DTYPES:
        raise BundleError(f"{path}: dtype {spec.dtype!r} must be one of {', '.join(DTYPES)}")
    if not 1 <= len(spec.timesteps) <= 4:
        raise BundleError(f"{path}: steps {spec.steps} must be 1 to 4 timesteps above 0")
    return spec


def make_model(spec: Spec, folder: Path, prompt_LK: Tensor, dtype: torch.dtype) -> Model:
    """The bundle's transformer and autoencoder on the CPU, under compatible settings."""
    transformer_config = TransformerConfig(
        latent_channels=spec.z_dim,
        dim=spec.dim,
        ffn_dim=spec.ffn_dim,
        heads=spec.heads,
        layers=spec.layers,
        text_dim=spec.text_dim,
        text_len=spec.text_len,
        freq_dim=spec.freq_dim,
        window_frames=spec.num_kv_cache,
        sink_frames=spec.num_sink,
    )
    vae_config = WanVAEConfig(dim=spec.vae_dim, z_dim=spec.z_dim)
    with torch.device("meta"):
        transformer, vae = CausalTransformer(transformer_config), WanVAE(vae_config)
    own = transformer_from_original(_tensors(folder / "dit.safetensors"), transformer_config)
    transformer.load_state_dict(own, assign=True)
    tensors = _tensors(folder / "vae.safetensors")
    expected = {key: tuple(tensor.shape) for key, tensor in vae.state_dict().items()}
    check_shapes(expected, {key: tuple(tensor.shape) for key, tensor in tensors.items()}, "vae.safetensors")
    vae.load_state_dict(tensors, assign=True)
    light = _light_vae(spec, folder) if spec.has_light else None
    for module in (transformer, vae, *(() if light is None else (light,))):
        module.to(dtype).eval().requires_grad_(False)
    config = ModelConfig(
        name=folder.name,
        transformer=transformer_config,
        vae=vae_config,
        text="umt5",
        sampling=SamplingConfig(
            shift=spec.shift,
            timesteps=spec.timesteps,
            noise_scale=spec.noise_scale,
            motion=MotionConfig(monotonic=False) if spec.adaptive_noise else None,
            latents="raw",
            noise="fresh",
        ),
        cache=CacheConfig(positions="absolute"),
        serving=ServingProfile(first_chunk_frames=5, steps=len(spec.timesteps)),
        # A bundle is no model folder: it has nothing to hold this against.
        sha256="0" * 64,
    )
    text = _GivenText(prompt_LK.to(dtype))
    return Model(config, transformer, vae, text, StyleIndex(None, ()), torch.device("cpu"), dtype, light)


def _light_vae(spec: Spec, folder: Path) -> TAEHV:
    path = folder / LIGHT_VAE_FILE
    if not path.is_file():
        raise BundleError(f"spec.json moves to the light VAE, and {path} is not there: put its weights there")
    with torch.device("meta"):
        light = TAEHV(spec.light_vae)
    tensors = _tensors(path)
    expected = {key: tuple(tensor.shape) for key, tensor in light.state_dict().items()}
    check_shapes(expected, {key: tuple(tensor.shape) for key, tensor in tensors.items()}, LIGHT_VAE_FILE)
    light.load_state_dict(tensors, assign=True)
    return light


def _tensors(path: Path, names: Sequence[str] = ()) -> dict[str, Tensor]:
    try:
        tensors = load_file(path)
    except OSError as error:
        raise BundleError(f"cannot read {path}: {error}") from error
    except SafetensorError as error:
        raise BundleError(f"{path} is no safetensors file: {error}") from error
    if missing := [name for name in names if name not in tensors]:
        raise BundleError(f"{path} has no {', '.join(missing)}")
    return tensors
