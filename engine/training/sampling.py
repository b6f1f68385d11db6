"""Batches for the transformer: crops of latents with their prompts."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.training.data import STYLES, WEIGHTS, Shard
from engine.training.latents import LatentShard
from engine.training.train_vae import to_tensor
from engine.wan.text_encoder import EncodedPrompt
from engine.wan.vae import TinyVAE, VAEState

PHOTO_SHARE, BLEND_SHARE = 0.08, 0.12
_WEIGHT = np.array([WEIGHTS[style] for style in STYLES])


@dataclass(frozen=True)
class Batch:
    """Crops with the same place in the picture: latents [B, T, C, H, W], prompts [B, L, K] and their means [B, K].

    frames: the wanted picture itself where there is one, [B, 1 + 4 (T - 1), 3, 8 H, 8 W] in [-1, 1].
    """

    source: Tensor
    target: Tensor
    text: Tensor
    mean: Tensor
    origin: tuple[int, int]
    frames: Tensor | None = None


class LatentSampler:
    """Draws batches; the same seed draws the same ones."""

    def __init__(
        self, shards: Sequence[LatentShard], prompts: Sequence[EncodedPrompt], seed: int | tuple[int, ...]
    ) -> None:
        """Draw from these shards.

        Args:
            prompts: of every style, in the order of their numbers.
        """
        self._prompts = prompts
        self._rng = np.random.default_rng(seed)
        alike: dict[tuple[int, ...], list[LatentShard]] = defaultdict(list)
        for shard in shards:
            alike[tuple(shard.source.shape[1:])].append(shard)
        self._groups = list(alike.values())
        sizes = np.array([len(group) for group in self._groups], np.float64)
        self._shares = sizes / sizes.sum()

    def draw(self, count: int, side: int | None, *, single: bool = False) -> Batch:
        """`count` crops of side x side latents (an even number), of clips of the same length and size.

        Args:
            side: None takes whole pictures.
            single: one latent frame from anywhere in the clip; else whole clips.
        """
        rng = self._rng
        shards = self._groups[int(rng.choice(len(self._groups), p=self._shares))]
        frames, _, height, width = shards[0].source.shape[1:]
        rows, columns = (height, width) if side is None else (side, side)
        top, left = (2 * int(rng.integers(0, (a - b) // 2 + 1)) for a, b in ((height, rows), (width, columns)))
        place = (slice(None), slice(top, top + rows), slice(left, left + columns))
        sources, targets, texts, means = [], [], [], []
        for _ in range(count):
            shard = shards[int(rng.integers(len(shards)))]
            clip = int(rng.integers(len(shard.source)))
            first = int(rng.integers(frames)) if single else 0
            crop = (slice(first, first + 1) if single else slice(frames), *place)
            target, text, mean = self._target(shard, clip, crop)
            sources.append(shard.source[clip][crop].float())
            targets.append(target)
            texts.append(text)
            means.append(mean)
        return Batch(
            torch.stack(sources), torch.stack(targets), torch.stack(texts), torch.stack(means), (top // 2, left // 2)
        )

    def _target(self, shard: LatentShard, clip: int, crop: tuple[slice, ...]) -> tuple[Tensor, Tensor, Tensor]:
        """The clip in some style, the plain picture or a blend of two of its styles; with the prompt for that."""
        rng = self._rng
        if rng.random() < PHOTO_SHARE:
            prompt = self._prompts[0]
            return shard.clean[clip][crop].float(), prompt.states, prompt.mean
        numbers = shard.styles[clip].numpy()
        first, second = _two_styles(numbers, rng)
        target, prompt = shard.styled[clip, first][crop].float(), self._prompts[numbers[first]]
        if rng.random() >= BLEND_SHARE:
            return target, prompt.states, prompt.mean
        share, other = float(rng.uniform(0.15, 0.85)), self._prompts[numbers[second]]
        return (
            torch.lerp(target, shard.styled[clip, second][crop].float(), share),
            torch.lerp(prompt.states, other.states, share),
            torch.lerp(prompt.mean, other.mean, share),
        )


class PictureSampler:
    """Draws batches of clips from shards that kept their pictures, a changing handful of them at a time."""

    SHARDS, DRAWS_PER_SHARD = 6, 12  # reading a shard takes about as long as a training step

    def __init__(
        self, paths: Sequence[Path], prompts: Sequence[EncodedPrompt], vae: TinyVAE, seed: int | tuple[int, ...]
    ) -> None:
        """Draw from these shards; `vae` encodes what is drawn. See `LatentSampler` for the rest."""
        self._paths, self._prompts, self._vae = paths, prompts, vae
        self._rng = np.random.default_rng(seed)
        self._shards: list[Shard] = []
        self._drawn = 0

    def draw(self, count: int, side: int | None, *, single: bool = False) -> Batch:
        """`count` crops of side x side latents; None takes whole pictures. single: not here, clips are whole."""
        assert not single
        rng = self._rng
        if self._drawn % self.DRAWS_PER_SHARD == 0:
            self._shards.append(Shard.load(self._paths[int(rng.integers(len(self._paths)))]))
            self._shards = self._shards[-self.SHARDS :]
        self._drawn += 1
        shard = self._shards[int(rng.integers(len(self._shards)))]
        height, width = shard.clean.shape[2:4]
        rows, columns = (height, width) if side is None else (8 * side, 8 * side)
        top, left = (16 * int(rng.integers(0, (a - b) // 16 + 1)) for a, b in ((height, rows), (width, columns)))
        crop = (slice(None), slice(top, top + rows), slice(left, left + columns))
        drawn = [self._pair(shard, int(rng.integers(len(shard.clean))), crop) for _ in range(count)]
        sources, targets, texts, means = (torch.stack(parts) for parts in zip(*drawn, strict=True))
        with torch.no_grad():
            source, target = (self._vae.encode(frames, VAEState())[0] for frames in (sources, targets))
        return Batch(source, target, texts, means, (top // 16, left // 16), targets)

    def _pair(self, shard: Shard, clip: int, crop: tuple[slice, ...]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Camera clip, wanted clip, prompt and its mean."""
        rng = self._rng
        source = to_tensor(shard.source[clip][crop][None])[0]
        if rng.random() < PHOTO_SHARE:
            prompt = self._prompts[0]
            return source, to_tensor(shard.clean[clip][crop][None])[0], prompt.states, prompt.mean
        first, _ = _two_styles(shard.styles[clip], rng)
        prompt = self._prompts[shard.styles[clip, first]]
        return source, to_tensor(shard.styled[clip, first][crop][None])[0], prompt.states, prompt.mean


def _two_styles(numbers: NDArray[np.int64], rng: np.random.Generator) -> tuple[int, int]:
    """Places of two different styles of a clip, what is hard more often."""
    weights = _WEIGHT[numbers]
    first, second = rng.choice(len(numbers), 2, replace=False, p=weights / weights.sum())
    return int(first), int(second)


def noised(batch: Batch) -> tuple[Tensor, Tensor]:
    """x_t and sigma [B]: three in four are pure noise, as one step starts; else a noised target or source."""
    target = batch.target
    count = len(target)
    sigma = torch.where(torch.rand(count) < 0.75, torch.ones(count), 0.15 + 0.85 * torch.rand(count))
    from_target = (torch.rand(count) < 0.5).view(-1, 1, 1, 1, 1)
    base = torch.where(from_target, target, batch.source)
    share = sigma.view(-1, 1, 1, 1, 1)
    return (1 - share) * base + share * torch.randn_like(target), sigma
