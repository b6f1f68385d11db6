"""Shards of clips encoded once: the transformer trains on latents alone in its first stage."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine.training.budget import load_checkpoint
from engine.training.data import LATENTS, Shard, shard_paths
from engine.training.train_vae import to_tensor
from engine.wan.vae import TinyVAE, TinyVAEConfig, VAEState


@dataclass(frozen=True)
class LatentShard:
    """The latents of one shard, float16: N clips of T latent frames, S styles each."""

    source: Tensor
    clean: Tensor
    styled: Tensor
    styles: Tensor

    @property
    def frames(self) -> int:
        """Latent frames per clip."""
        return self.source.shape[1]


def load_vae(work: Path) -> TinyVAE:
    """The autoencoder as trained so far. Raises: FileNotFoundError, if its training has not begun."""
    state = load_checkpoint(work / "vae.pt")
    if state is None:
        raise FileNotFoundError(f"{work / 'vae.pt'}: train the autoencoder first (engine.training.train_vae)")
    vae = TinyVAE(TinyVAEConfig())
    vae.load_state_dict(state["vae"])
    return vae.eval().requires_grad_(False)


def encode_clips(vae: TinyVAE, clips_NTHWC: NDArray[np.uint8]) -> Tensor:
    """Latents of clips, one by one to spare memory: [N, T, C, H, W] float16."""
    with torch.inference_mode():
        return torch.cat([vae.encode(to_tensor(clip[None]), VAEState())[0].half() for clip in clips_NTHWC])


class ShardEncoder:
    """Writes the latents of shards into the working folder."""

    def __init__(self, work: Path) -> None:
        self._vae, self._folder = load_vae(work), work / LATENTS
        self._folder.mkdir(parents=True, exist_ok=True)

    def __call__(self, name: str, shard: Shard) -> None:
        """Encode one shard; the file is there as a whole or not at all."""
        vae, styled, target = self._vae, shard.styled, self._folder / f"{name}.safetensors"
        flat = encode_clips(vae, styled.reshape(-1, *styled.shape[2:]))
        tensors = {
            "source": encode_clips(vae, shard.source),
            "clean": encode_clips(vae, shard.clean),
            "styled": flat.view(*styled.shape[:2], *flat.shape[1:]),
            "styles": torch.from_numpy(shard.styles),
        }
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, target.with_suffix(".part"))
        target.with_suffix(".part").rename(target)


def encode_shards(work: Path, split: str = "train") -> None:
    """Encode every shard of a split that kept its pictures and is not encoded yet."""
    encode = ShardEncoder(work)
    for path in shard_paths(work, split):
        if not (work / LATENTS / f"{path.stem}.safetensors").exists():
            encode(path.stem, Shard.load(path))


def latent_paths(work: Path, split: str) -> list[Path]:
    """The finished latent files of a split, in name order."""
    return sorted((work / LATENTS).glob(f"{split}_*.safetensors"))


def load_latents(paths: list[Path]) -> list[LatentShard]:
    """Latent files, mapped into memory and read when drawn from."""
    shards = []
    for path in paths:
        data = load_file(path)
        shards.append(LatentShard(data["source"], data["clean"], data["styled"], data["styles"]))
    return shards
