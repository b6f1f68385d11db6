"""Engine settings, refused before any process is started, and what a model folder says of itself.

Nothing here loads torch: the server reads it too.
"""

from __future__ import annotations

import itertools
import json
import os
from functools import cache
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    model_validator,
)

MODELS_DIR = Path(__file__).parent / "models"
DEFAULT_MODEL = "livebrush-tiny"
CONFIG_FILE = "config.json"
# VAE stride 8 times DiT patch 2: a frame must be a whole number of tokens.
SIZE_MULTIPLE_PX = 16
MAX_PIXELS = 832 * 480
# Wan and the embedded model turn 4 frames into one latent frame: the chunk the engine takes.
CHUNK_FRAMES = 4
MAX_STEPS = 4
MAX_RANKS = 64
AUTO = "auto"


def user_models_dir() -> Path:
    """Where `livebrush models` keeps what it downloads and converts: LIVEBRUSH_MODELS_DIR, or below XDG_DATA_HOME."""
    if named := os.environ.get("LIVEBRUSH_MODELS_DIR"):
        return Path(named)
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share") / "livebrush" / "models"


def user_cache_dir() -> Path:
    """Where what can be found out again is kept: below XDG_CACHE_HOME."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "livebrush"


@cache
def multiplies_bfloat16() -> bool:
    """Whether this CPU has instructions that multiply bfloat16 (AVX512-BF16, AMX beside it), where Linux tells so.

    The embedded model takes half to three quarters of its time with them; without them bfloat16 is many times slower
    than float32 (docs/engine.md).
    """
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return False
    flags = next((line for line in lines if line.startswith("flags")), "")
    return "avx512_bf16" in flags.split()


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class ServingProfile(_Frozen):
    """How a model wants to be served; `serving` in its config.json."""

    fps: PositiveFloat = Field(default=24.0, description="rate it was made for; the output's when there is room")
    sizes: tuple[tuple[PositiveInt, PositiveInt], ...] = Field(
        default=((256, 256),), min_length=1, description="width, height it is good at; the first is the default"
    )
    chunk_frames: Literal[4] = Field(default=4, description="frames of a chunk: one latent frame")
    first_chunk_frames: Literal[1, 5] = Field(
        default=1, description="frames of a stream's first chunk: 1, or 1 + 4 where the VAE's first call takes 1 alone"
    )
    steps: int = Field(default=1, ge=1, le=MAX_STEPS, description="denoising steps unless asked otherwise")
    seed: bool = Field(default=True, description="whether another seed gives another picture; else it is not offered")

    def smaller(self, width: int, height: int) -> tuple[int, int] | None:
        """The next smaller size of the same shape that the model is good at; None where there is none."""
        fitting = [(w, h) for w, h in self.sizes if w < width and w * height == h * width]
        return max(fitting, default=None)


class CacheConfig(_Frozen):
    """What the rolling KV cache does with positions and sinks; its size is the transformer's."""

    positions: Literal["relative", "refresh", "absolute"] = Field(
        default="relative",
        description="relative: a frame's place in the window; refresh: its index, brought back to the window's "
        "length at refresh_at, kept frames with it (the paper); absolute: its index, growing (the public code)",
    )
    refresh_at: PositiveInt = Field(default=50, description="latent frames; with `refresh`")
    sink_refresh: float | None = Field(
        default=None, ge=-1, le=1, description="a frame less like its sinks than this cosine replaces the least like"
    )
    sink_ema: float | None = Field(
        default=None, ge=0, lt=1, description="share a sink keeps when an evicted frame is averaged into it"
    )

    @model_validator(mode="after")
    def _one_kind_of_sinks(self) -> Self:
        if self.sink_refresh is not None and self.sink_ema is not None:
            raise ValueError("sink_refresh and sink_ema are two ways to renew sinks: set one of them")
        return self


class MotionConfig(_Frozen):
    """Motion-aware noise controller: fast motion lowers the noise level, so that the picture follows the input."""

    source: Literal["pixels", "latents"] = Field(
        default="pixels", description="what moves: pixels in [-1, 1] (public code) or latents (paper)"
    )
    window: PositiveInt = Field(default=1, le=16, description="chunks whose largest motion counts (paper: k)")
    scale: PositiveFloat = Field(default=0.2, description="motion that counts as full (paper: sigma_d)")
    span: float = Field(
        default=0.1, ge=0, le=1, description="how far full motion lowers the level (paper: s_max - s_min)"
    )
    smoothing: float = Field(default=0.9, gt=0, le=1, description="weight of the new level (paper: lambda)")
    monotonic: bool = Field(
        default=True, description="keep the steps falling where motion lowers the first (the public code does not)"
    )


class SteadyConfig(_Frozen):
    """How far decoded pictures are steadied, see `engine.steady`. Levels are differences of pixels of 255."""

    trusted_levels: tuple[NonNegativeFloat, PositiveFloat] = Field(
        default=(6.0, 16.0), description="camera's difference to its moved last frame: trusted in full, not at all"
    )
    alike_levels: tuple[NonNegativeFloat, PositiveFloat] = Field(
        default=(30.0, 80.0), description="new picture's difference to the carried one: averaged in full, not at all"
    )
    damped_levels: NonNegativeFloat = Field(default=5.0, description="smaller changes than this are damped besides")
    seam_levels: NonNegativeFloat = Field(default=15.0, description="the same from chunk to chunk")
    seam_energy: PositiveFloat = Field(
        default=1.0, description="energy of a change from chunk to chunk, of that within one, that is not spread"
    )
    eased_most: float = Field(default=0.7, ge=0, lt=1, description="share of such a change that is spread at most")
    scene_levels: tuple[NonNegativeFloat, PositiveFloat] = Field(
        default=(40.0, 60.0),
        description="from chunk to chunk: change of the same scene, of another (not spread)",
    )
    damped_in_motion: float = Field(default=0.3, ge=0, le=1, description="part of both where the camera sees motion")


class SamplingConfig(_Frozen):
    """How a chunk is noised and denoised."""

    shift: PositiveFloat = Field(default=1.0, description="of the noise levels, see engine.flow_match.sigma_table")
    timesteps: tuple[int, ...] | None = Field(
        default=None,
        max_length=MAX_STEPS,
        description="noisiest first; n steps run the first n of them. None: evenly spaced from the start level",
    )
    noise_scale: float = Field(
        default=1.0, gt=0, le=1, description="share of noise in a chunk before its first step, at strength 1"
    )
    timestep_offset: int = Field(
        default=100, ge=0, lt=1000, description="the first timestep is this much below 1000 * noise scale"
    )
    motion: MotionConfig | None = Field(default=None, description="None: the same noise level for every chunk")
    latents: Literal["raw", "normalised"] = Field(
        default="normalised", description="scale of the encoder latents that the checkpoint was trained on"
    )
    noise: Literal["fixed", "fresh"] = Field(
        default="fixed", description="one sample for the whole stream, or a new one for every step"
    )

    @model_validator(mode="after")
    def _noisiest_first(self) -> Self:
        steps = self.timesteps
        if steps is None:
            if self.motion is not None:
                raise ValueError("motion moves the first of `timesteps`: give them")
            return self
        if not steps or any(not 0 < t <= 1000 for t in steps) or any(a <= b for a, b in itertools.pairwise(steps)):
            raise ValueError(f"timesteps {steps} must fall, from at most 1000, and stay above 0")
        return self


# The published V2V checkpoints (StreamDiffusionV2): constants of their public code, not of the paper's figures.
WAN_SAMPLING = SamplingConfig(
    shift=8.0,
    timesteps=(700, 500, 400, 200),
    noise_scale=0.8,
    motion=MotionConfig(),
    latents="raw",
    noise="fresh",
)
WAN_SERVING = ServingProfile(fps=16, sizes=((832, 480), (512, 512)), first_chunk_frames=5, steps=2)


def serving_profile(model_dir: Path) -> ServingProfile:
    """What config.json of a model folder says under `serving`, the rest of it unread.

    Raises: FileNotFoundError, or ValueError naming the file.
    """
    path = model_dir / CONFIG_FILE
    try:
        return ServingProfile.model_validate(json.loads(path.read_bytes()).get("serving", {}))
    except (ValidationError, ValueError, AttributeError) as error:
        raise ValueError(f"{path}: {error}") from error


class LoraFile(_Frozen):
    """A low-rank adaptation (safetensors) and how much of it."""

    path: Path
    scale: float = Field(default=1.0, ge=-4, le=4)


class EngineSettings(BaseModel):
    """What to load, at which size, and how many streams to hold memory for."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str = Field(default=DEFAULT_MODEL, description="a folder in engine/models, or a path to one")
    width: PositiveInt = Field(default=256, description="frame width in pixels, a multiple of 16")
    height: PositiveInt = Field(default=256, description="frame height in pixels, a multiple of 16")
    device: str = Field(
        default="cpu", pattern=r"^(cpu|cuda:\d+)$", description="torch device of the rank: cpu or cuda:N"
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto",
        description="of weights and activations; auto: bfloat16 on a GPU and on a CPU that multiplies it, else float32",
    )
    vae: Literal["auto", "full", "light"] = Field(
        default="auto",
        description="Wan: its own VAE, or the light one (TAEHV); auto: where the model folder has both, its own and, "
        "while that is too slow, the light one; the light one alone in a ring and where there is no memory for both",
    )
    mode: Literal["sequential", "batch"] = Field(
        default="sequential",
        description="sequential: a chunk takes its steps one after another; batch: the steps of successive chunks "
        "run as one pass (stream batch), more throughput for steps - 1 chunks of delay",
    )
    micro_batch: PositiveInt = Field(default=1, le=16, description="streams that one pass may take together")
    chunk_latents: Literal[1, 2] = Field(
        default=1, description="2: two waiting chunks of a stream are rendered as one where that is cheaper and in time"
    )
    attention: Literal["auto", "sdpa", "flex", "varlen"] = Field(
        default="auto", description="kernel of self attention; auto: varlen on a GPU, sdpa on a CPU"
    )
    compile: bool = Field(default=False, description="torch.compile the transformer: a minute at the start")
    fp8: bool = Field(default=False, description="float8 linear layers (torchao, GPUs from Ada on)")
    loras: tuple[LoraFile, ...] = Field(default=(), max_length=8, description="merged into the weights at loading")
    text_device: str = Field(
        default="cpu", pattern=r"^(cpu|cuda:\d+)$", description="where Wan's text encoder lives, in its own process"
    )
    sampling: dict[str, Any] = Field(default={}, description="fields of SamplingConfig to set over the model's own")
    cache: dict[str, Any] = Field(default={}, description="fields of CacheConfig to set over the model's own")
    ranks: PositiveInt | Literal["auto"] = Field(
        default="auto", description="processes that one model is spread over, a ring; auto: 1 (see docs/scale.md)"
    )
    replicas: PositiveInt | Literal["auto"] = Field(
        default="auto", description="whole models side by side, each with max_streams; auto: 1"
    )
    threads: PositiveInt = Field(default=1, description="torch threads on CPU; the other cores do WebRTC")
    max_streams: PositiveInt = Field(default=4, le=64, description="streams to preallocate frame memory for")
    costs_dir: Literal["auto", "off"] | Path = Field(
        default="auto",
        description="folder where what passes have cost is kept for the next start; auto: the user's cache "
        "(~/.cache/livebrush/costs); off: nothing is kept",
    )
    start_timeout_s: float = Field(default=120.0, gt=0, description="a rank silent this long while starting is dead")

    @model_validator(mode="after")
    def _size_is_whole_tokens(self) -> Self:
        for name, value in (("width", self.width), ("height", self.height)):
            if value % SIZE_MULTIPLE_PX:
                nearest = max(SIZE_MULTIPLE_PX, round(value / SIZE_MULTIPLE_PX) * SIZE_MULTIPLE_PX)
                raise ValueError(f"{name} {value} is not a multiple of {SIZE_MULTIPLE_PX}; use {nearest}")
        if self.width * self.height > MAX_PIXELS:
            raise ValueError(f"{self.width}x{self.height} is over {MAX_PIXELS} pixels (832x480); use a smaller size")
        return self

    @model_validator(mode="after")
    def _a_ring_can_do_it(self) -> Self:
        if max(self.rank_count, self.replica_count) > MAX_RANKS:
            raise ValueError(f"ranks {self.ranks} and replicas {self.replicas}: at most {MAX_RANKS} each")
        if self.rank_count > 1 and (
            self.compile or self.micro_batch > 1 or self.chunk_latents > 1 or self.attention != "auto"
        ):
            raise ValueError(
                f"ranks {self.ranks}: a ring takes one chunk a pass, as it is; leave compile, micro_batch, "
                "chunk_latents and attention as they are, or use ranks 1"
            )
        return self

    @model_validator(mode="after")
    def _overrides_are_fields(self) -> Self:
        SamplingConfig.model_validate(SamplingConfig(timesteps=(1000,)).model_dump() | self.sampling)
        CacheConfig.model_validate(self.cache)
        return self

    @property
    def precision(self) -> Literal["float32", "bfloat16"]:
        """The dtype that `auto` stands for on this machine."""
        if self.dtype != "auto":
            return self.dtype
        return "bfloat16" if self.device != "cpu" or multiplies_bfloat16() else "float32"

    @property
    def rank_count(self) -> int:
        """Ranks of one group."""
        return 1 if self.ranks == AUTO else int(self.ranks)

    @property
    def replica_count(self) -> int:
        """Groups."""
        return 1 if self.replicas == AUTO else int(self.replicas)

    @property
    def costs_folder(self) -> Path | None:
        """Where learned costs are kept; None: nowhere."""
        if self.costs_dir == "off":
            return None
        return user_cache_dir() / "costs" if self.costs_dir == AUTO else Path(self.costs_dir)

    @property
    def model_dir(self) -> Path:
        """The folder of the model: shipped with Livebrush, downloaded, or a path.

        Raises: FileNotFoundError, naming those that do exist and how to get another.
        """
        for candidate in (MODELS_DIR / self.model, user_models_dir() / self.model, Path(self.model)):
            if (candidate / CONFIG_FILE).is_file():
                return candidate
        folders = (MODELS_DIR, user_models_dir())
        known = sorted({path.parent.name for folder in folders for path in folder.glob(f"*/{CONFIG_FILE}")})
        raise FileNotFoundError(
            f"no model {self.model!r}; known: {', '.join(known) or 'none'}; `livebrush models` gets others, "
            "or give a folder"
        )

    @property
    def profile(self) -> ServingProfile:
        """How the model wants to be served. Raises FileNotFoundError or ValueError for a folder that is not one."""
        return serving_profile(self.model_dir)
