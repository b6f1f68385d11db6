"""What a transformer checkpoint may look like, and the models known by name."""

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, model_validator

REFINE_FACTOR = 2  # the refiner's resolution over the latent's


class TransformerConfig(BaseModel):
    """Shape and habits of one checkpoint."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    latent_channels: PositiveInt = Field(default=16, description="of the latent to denoise")
    condition_channels: NonNegativeInt = Field(default=0, description="of the source latent beside it")
    dim: PositiveInt = Field(default=1536, description="model width")
    ffn_dim: PositiveInt = Field(default=8960, description="width inside the feed-forward network")
    heads: PositiveInt = Field(default=12)
    layers: PositiveInt = Field(default=30)
    patch: tuple[Literal[1], PositiveInt, PositiveInt] = Field(default=(1, 2, 2), description="T, H, W")
    text_dim: PositiveInt = Field(default=4096, description="width of a text encoder state")
    text_len: PositiveInt = Field(default=512, description="text positions, padding included")
    freq_dim: PositiveInt = Field(default=256, description="sines and cosines of the timestep")
    eps: float = Field(default=1e-6, gt=0, description="of every norm")
    window_frames: PositiveInt = Field(default=6, description="latent frames a query sees, sinks included")
    sink_frames: NonNegativeInt = Field(default=3, description="latent frames that outlast the window")
    pooled_text: bool = Field(default=False, description="the mean prompt embedding joins the time embedding")
    prediction: Literal["flow", "source_residual"] = Field(
        default="flow", description="what the network returns: noise - clean, or clean - source"
    )
    refine_channels: NonNegativeInt = Field(
        default=0, description="width of the refiner at twice the latent's resolution; 0: none"
    )
    refine_blocks: PositiveInt = Field(default=2, description="residual blocks of the refiner, where there is one")
    refine_coarse_channels: NonNegativeInt = Field(
        default=0, description="width of the refiner's blocks at the latent's own resolution; 0: none"
    )
    refine_coarse_blocks: PositiveInt = Field(default=3, description="of these blocks, where there are any")

    @property
    def head_dim(self) -> int:
        """Channels of one head."""
        return self.dim // self.heads

    @model_validator(mode="after")
    def _shapes_fit(self) -> Self:
        if self.dim % self.heads or self.head_dim % 2 or self.head_dim < 6:
            raise ValueError(f"dim {self.dim} over {self.heads} heads must give an even head size above 5")
        if self.sink_frames >= self.window_frames:
            raise ValueError(f"sink_frames {self.sink_frames} must be below window_frames {self.window_frames}")
        if self.freq_dim % 2:
            raise ValueError(f"freq_dim {self.freq_dim} must be even")
        if self.prediction == "source_residual" and self.condition_channels != self.latent_channels:
            raise ValueError(
                f"prediction source_residual needs condition_channels {self.condition_channels} "
                f"equal to latent_channels {self.latent_channels}"
            )
        return self


WAN_1_3B = TransformerConfig()
WAN_14B = TransformerConfig(dim=5120, ffn_dim=13824, heads=40, layers=40)
LIVEBRUSH_TINY = TransformerConfig(
    latent_channels=96,
    condition_channels=96,
    dim=192,
    ffn_dim=576,
    heads=3,
    layers=4,
    text_dim=64,
    text_len=16,
    freq_dim=128,
    window_frames=3,
    sink_frames=1,
    pooled_text=True,
    prediction="source_residual",
    refine_channels=64,
    refine_blocks=7,
    refine_coarse_channels=128,
    refine_coarse_blocks=3,
)
PRESETS = {"wan2.1-1.3b": WAN_1_3B, "wan2.1-14b": WAN_14B, "livebrush-tiny": LIVEBRUSH_TINY}
