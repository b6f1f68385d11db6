"""Shards of clips encoded once: the transformer trains on latents alone in its first stage.

python -m engine.training.latents --work .work/tiny
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine.training.budget import load_checkpoint
from engine.training.data import Shard, shard_paths
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


def encode_shards(work: Path, split: str = "train") -> list[Path]:
    """Encode every shard of a split that is not encoded yet; returns the latent files."""
    vae, folder = load_vae(work), work / "latents"
    folder.mkdir(parents=True, exist_ok=True)
    done = []
    for path in shard_paths(work, split):
        target = folder / f"{path.stem}.safetensors"
        if not target.exists():
            shard = Shard.load(path)
            styled = shard.styled
            flat = encode_clips(vae, styled.reshape(-1, *styled.shape[2:]))
            tensors = {
                "source": encode_clips(vae, shard.source),
                "clean": encode_clips(vae, shard.clean),
                "styled": flat.view(*styled.shape[:2], *flat.shape[1:]),
                "styles": torch.from_numpy(shard.styles),
            }
            save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, target.with_suffix(".part"))
            target.with_suffix(".part").rename(target)
        done.append(target)
    return done


def load_latents(paths: list[Path]) -> list[LatentShard]:
    """Latent files, mapped into memory and read when drawn from."""
    shards = []
    for path in paths:
        data = load_file(path)
        shards.append(LatentShard(data["source"], data["clean"], data["styled"], data["styles"]))
    return shards


def main() -> None:
    """Command line of this stage."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path(".work/tiny"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    for split in ("train", "validation"):
        print(f"{split}: {len(encode_shards(args.work, split))} shards encoded", flush=True)


if __name__ == "__main__":
    main()
