"""Engine settings, refused before any process is started."""

from __future__ import annotations

from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, model_validator

MODELS_DIR = Path(__file__).parent / "models"
DEFAULT_MODEL = "livebrush-tiny"
# VAE stride 8 times DiT patch 2: a frame must be a whole number of tokens.
SIZE_MULTIPLE_PX = 16
MAX_PIXELS = 832 * 480
# Wan and the embedded model turn 4 frames into one latent frame: the chunk the engine takes.
CHUNK_FRAMES = 4


class EngineSettings(BaseModel):
    """What to load, at which size, and how many streams to hold memory for."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str = Field(default=DEFAULT_MODEL, description="a folder in engine/models, or a path to one")
    width: PositiveInt = Field(default=256, description="frame width in pixels, a multiple of 16")
    height: PositiveInt = Field(default=256, description="frame height in pixels, a multiple of 16")
    device: str = Field(default="cpu", description="torch device of the rank: cpu or cuda:N")
    threads: PositiveInt = Field(default=1, description="torch threads on CPU; the other cores do WebRTC")
    max_streams: PositiveInt = Field(default=4, le=64, description="streams to preallocate frame memory for")
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

    @property
    def model_dir(self) -> Path:
        """The folder with config.json, model.safetensors and styles.json.

        Raises: FileNotFoundError, naming the folders that do exist.
        """
        for candidate in (MODELS_DIR / self.model, Path(self.model)):
            if (candidate / "config.json").is_file():
                return candidate
        known = sorted(p.parent.name for p in MODELS_DIR.glob("*/config.json"))
        raise FileNotFoundError(f"no model {self.model!r}; known: {', '.join(known) or 'none'}, or give a folder")
