"""What the autoencoders of Wan 2.1 may look like. Free of torch, so that a list of models can name them."""

from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, model_validator

# Statistics of the published encoder's 16 channels (Wan 2.1).
WAN_LATENT_MEAN = (
    *(-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508),
    *(0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921),
)
WAN_LATENT_STD = (
    *(2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743),
    *(3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160),
)


def _mean(data: dict[str, Any]) -> tuple[float, ...]:
    return WAN_LATENT_MEAN if data["z_dim"] == len(WAN_LATENT_MEAN) else (0.0,) * data["z_dim"]


def _std(data: dict[str, Any]) -> tuple[float, ...]:
    return WAN_LATENT_STD if data["z_dim"] == len(WAN_LATENT_STD) else (1.0,) * data["z_dim"]


class LatentConfig(BaseModel):
    """Channels of a latent, and the affine map between its raw and its normalised scale."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    z_dim: PositiveInt = Field(default=16, description="channels of a latent")
    latent_mean: tuple[float, ...] = Field(
        default_factory=_mean, description="of raw latents, per channel; Wan's for 16 channels, else 0"
    )
    latent_std: tuple[float, ...] = Field(
        default_factory=_std, description="of raw latents, per channel; Wan's for 16 channels, else 1"
    )

    @model_validator(mode="after")
    def _statistics_fit(self) -> Self:
        for name, values in (("latent_mean", self.latent_mean), ("latent_std", self.latent_std)):
            if len(values) != self.z_dim:
                raise ValueError(f"{name} has {len(values)} values, must have one for each of z_dim {self.z_dim}")
        if min(self.latent_std) <= 0:
            raise ValueError(f"latent_std {min(self.latent_std)} must be above 0")
        return self


class WanVAEConfig(LatentConfig):
    """Shape of the Wan 2.1 autoencoder: 8 x 8 pixels and 4 frames per latent."""

    dim: PositiveInt = Field(default=96, description="width at full size")
    multipliers: tuple[PositiveInt, PositiveInt, PositiveInt, PositiveInt] = Field(
        default=(1, 2, 4, 4), description="width over dim at 1, 1/2, 1/4 and 1/8 of the size"
    )
    residual_blocks: PositiveInt = Field(default=2, description="per level of the encoder; one more in the decoder")
    temporal_down: tuple[bool, bool, bool] = Field(
        default=(False, True, True), description="which step down in size also halves the frames; two of them"
    )
    eps: float = Field(default=1e-12, gt=0, description="smallest length of a feature vector, in every norm")

    @model_validator(mode="after")
    def _halves_exactly(self) -> Self:
        if sum(self.temporal_down) != 2:
            raise ValueError(f"temporal_down {self.temporal_down} must hold two True: a latent is 4 frames")
        for multiplier in self.multipliers[1:]:
            if self.dim * multiplier % 2:
                raise ValueError(f"width {self.dim * multiplier} is halved in the decoder: make dim {self.dim} even")
        return self


class TAEHVConfig(LatentConfig):
    """Shape of the tiny autoencoder for the latents of Wan 2.1."""

    encoder_dim: PositiveInt = Field(default=64, description="width of the encoder")
    decoder_dims: tuple[PositiveInt, PositiveInt, PositiveInt, PositiveInt] = Field(
        default=(256, 128, 64, 64), description="width of the decoder at 1/8, 1/4, 1/2 and all of the size"
    )
    memory_blocks: PositiveInt = Field(default=3, description="per level")
