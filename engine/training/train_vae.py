"""The autoencoder: a principal component projection, solved, and a small decoder trained on top of it.

The projection is fixed from the first minute, so the transformer can train on its latents while the decoder is
still learning. The decoder sees noisy latents half of the time: it must forgive what the transformer predicts.

    python -m engine.training.train_vae --work .work/tiny --minutes 25
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from engine.training.budget import Budget, load_checkpoint, log, save_checkpoint
from engine.training.data import STYLES, Shard, shard_paths
from engine.wan.vae import StreamVAE, TinyVAE, TinyVAEConfig, VAEState

CROP_PX = 96
BATCH = 4
FRAMES = 9
RATE = 1.2e-3


def to_tensor(clips_NTHWC: NDArray[np.uint8]) -> Tensor:
    """RGB uint8 [N, T, H, W, 3] to float32 [N, T, 3, H, W] in [-1, 1]."""
    return torch.from_numpy(np.ascontiguousarray(clips_NTHWC)).permute(0, 1, 4, 2, 3).float() / 127.5 - 1.0


def to_uint8(frames_BTCHW: Tensor) -> NDArray[np.uint8]:
    """Frames in [-1, 1] to RGB uint8 [B, T, H, W, 3], clamped."""
    rounded = ((frames_BTCHW.clamp(-1, 1) + 1) * 127.5 + 0.5).byte()
    return np.asarray(rounded.permute(0, 1, 3, 4, 2).contiguous().numpy())


class CropPool:
    """Random crops from a changing handful of shards: reading one takes longer than a training step."""

    def __init__(self, paths: list[Path], rng: np.random.Generator, shards: int = 10) -> None:
        self._paths, self._rng, self._most = paths, rng, shards
        self._shards: list[Shard] = []
        self._drawn = 0

    def draw(self, count: int, size_px: int, frames: int = FRAMES) -> Tensor:
        """Crops [count, frames, 3, size, size]: two styled ones to one plain."""
        if self._drawn % 16 == 0:
            self._shards.append(Shard.load(self._paths[int(self._rng.integers(len(self._paths)))]))
            self._shards = self._shards[-self._most :]
        self._drawn += 1
        return torch.cat([to_tensor(self._crop(size_px, frames)[None]) for _ in range(count)])

    def _crop(self, size_px: int, frames: int) -> NDArray[np.uint8]:
        rng = self._rng
        shard = self._shards[int(rng.integers(len(self._shards)))]
        i, j = int(rng.integers(len(shard.clean))), int(rng.integers(-2, shard.styled.shape[1]))
        clip = shard.clean[i] if j < 0 else shard.styled[i, j]
        top, left = (8 * int(rng.integers(0, (side - size_px) // 8 + 1)) for side in clip.shape[1:3])
        first = 4 * int(rng.integers(0, (len(clip) - frames) // 4 + 1))
        clip = clip[first : first + frames, top : top + size_px, left : left + size_px]
        return np.asarray(clip[..., rng.permutation(3)] if rng.random() < 0.1 else clip)


def pyramid_l1(a_NCHW: Tensor, b_NCHW: Tensor) -> Tensor:
    """L1 over the bands of a three-level Laplacian pyramid: a cheap stand-in for a perceptual loss."""
    total = torch.zeros(())
    for level in range(3):
        small_a, small_b = functional.avg_pool2d(a_NCHW, 2), functional.avg_pool2d(b_NCHW, 2)
        band_a = a_NCHW - functional.interpolate(small_a, scale_factor=2.0)
        band_b = b_NCHW - functional.interpolate(small_b, scale_factor=2.0)
        total = total + 2.0**level * (band_a - band_b).abs().mean()
        a_NCHW, b_NCHW = small_a, small_b
    return total + (a_NCHW - b_NCHW).abs().mean()


def reconstruction_loss(out_BTCHW: Tensor, target_BTCHW: Tensor) -> Tensor:
    """L1, pyramid, temporal difference and squared error of decoded frames."""
    moved = (out_BTCHW[:, 1:] - out_BTCHW[:, :-1]) - (target_BTCHW[:, 1:] - target_BTCHW[:, :-1])
    return (
        (out_BTCHW - target_BTCHW).abs().mean()
        + pyramid_l1(out_BTCHW.flatten(0, 1), target_BTCHW.flatten(0, 1))
        + 0.5 * moved.abs().mean()
        + 4.0 * functional.mse_loss(out_BTCHW, target_BTCHW)
    )


def decode_clip(vae: StreamVAE, latent_BTCHW: Tensor) -> Tensor:
    """Decode a clip whose first latent stands for one frame: 1 + 4k frames."""
    return vae.decode(latent_BTCHW, VAEState())[0][:, 3:]


def psnr_by_style(vae: TinyVAE, work: Path, clips: int = 8) -> dict[str, float]:
    """Round-trip PSNR in dB on held-out clips, by style."""
    shard = Shard.load(shard_paths(work, "validation")[0])
    result: dict[str, float] = {}
    with torch.inference_mode():
        for number, style in enumerate(STYLES):
            drawn = [clip for i in range(min(clips, len(shard.clean))) for clip in shard.versions(i, number)]
            errors = []
            for clip in drawn:
                x = to_tensor(clip[None, :FRAMES])
                y = decode_clip(vae, vae.encode(x, VAEState())[0]).clamp(-1, 1)
                errors.append(float(functional.mse_loss(y, x)) / 4)
            if errors:
                result[style] = round(-10 * float(np.log10(np.mean(errors))), 1)
    return result


def solve(work: Path, seed: int = 0, crops: int = 500) -> None:
    """Solve the projection on the shards that are there, once: the latent space is final from here on."""
    path = work / "vae.pt"
    if path.exists():
        return
    torch.manual_seed(seed)
    pool = CropPool(shard_paths(work, "train"), np.random.default_rng(seed))
    vae = TinyVAE(TinyVAEConfig())
    vae.fit_pca(torch.cat([pool.draw(2, 128) for _ in range(crops // 2)]))
    save_checkpoint(path, {"vae": vae.state_dict(), "optimiser": None, "step": 0, "spent_s": 0.0})


def train(work: Path, minutes: float, seed: int = 0) -> TinyVAE:
    """Train the decoder until the budget is spent; goes on from a checkpoint, for which the projection is solved."""
    solve(work, seed)
    path, journal = work / "vae.pt", work / "vae.log"
    state = load_checkpoint(path)
    assert state is not None
    step = int(state["step"])
    torch.manual_seed(seed + step)
    pool = CropPool(shard_paths(work, "train"), np.random.default_rng((seed, step)))
    vae = TinyVAE(TinyVAEConfig())
    vae.load_state_dict(state["vae"])
    if not step:
        log(journal, f"projection alone, dB: {psnr_by_style(vae, work)}")
    vae.project.requires_grad_(False)
    vae.unproject.requires_grad_(False)
    trained = [p for p in vae.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trained, RATE, betas=(0.9, 0.95), weight_decay=1e-4)
    if state["optimiser"]:
        optimiser.load_state_dict(state["optimiser"])
    budget = Budget(minutes * 60, float(state["spent_s"]))

    def save() -> None:
        save_checkpoint(
            path,
            {"vae": vae.state_dict(), "optimiser": optimiser.state_dict(), "step": step, "spent_s": budget.spent_s},
        )

    mean_loss = 0.0
    while budget.share < 1:
        for group in optimiser.param_groups:
            group["lr"] = RATE * budget.rate(step, warmup_steps=100, hold=0.6)
        loss = training_step(vae, pool.draw(BATCH, CROP_PX), optimiser)
        mean_loss = loss if mean_loss == 0 else 0.98 * mean_loss + 0.02 * loss
        step += 1
        if budget.save_due():
            save()
            log(journal, f"step {step} spent {budget.spent_s:.0f} s loss {mean_loss:.4f}")
    save()
    log(journal, f"done at step {step}, dB: {psnr_by_style(vae, work)}")
    return vae


def training_step(vae: TinyVAE, clips_BTCHW: Tensor, optimiser: torch.optim.Optimizer) -> float:
    """One step on a batch; returns its loss before the step."""
    with torch.no_grad():
        latent = vae.encode(clips_BTCHW, VAEState())[0]
        noisy = torch.rand(len(latent), 1, 1, 1, 1) < 0.5
        latent = latent + 0.07 * torch.randn_like(latent) * noisy
    loss = reconstruction_loss(decode_clip(vae, latent), clips_BTCHW)
    optimiser.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    torch.nn.utils.clip_grad_norm_([p for p in vae.parameters() if p.requires_grad], 1.0)
    optimiser.step()
    return float(loss.detach())


def main() -> None:
    """Command line of this stage."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path(".work/tiny"))
    parser.add_argument("--minutes", type=float, default=25.0)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    train(args.work, args.minutes, args.seed)


if __name__ == "__main__":
    main()
