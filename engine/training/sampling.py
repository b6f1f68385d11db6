"""Batches for the transformer: crops of latents with their prompts."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from engine.training.latents import LatentShard
from engine.training.phrases import STYLES, random_prompt
from engine.wan.text_encoder import StaticTextEncoder

PHOTO_SHARE = 0.12
# Contours take longest to learn; colour maps and screens are learnt at once.
_OFTEN = {"neon": 2.0, "blueprint": 2.0, "ink": 1.5, "pencil": 1.5, "watercolor": 3.0, "comic": 1.3, "thermal": 1.3}
_SELDOM = {"vintage": 0.6, "nightvision": 0.6, "popart": 0.7, "riso": 0.7, "oil": 0.8, "starry": 0.8}
_WEIGHT = torch.tensor([{**_OFTEN, **_SELDOM}.get(style.id, 1.0) for style in STYLES])


@dataclass(frozen=True)
class Batch:
    """Crops with the same place in the picture: latents [B, T, C, H, W], prompts [B, L, K] and their means [B, K]."""

    source: Tensor
    target: Tensor
    text: Tensor
    mean: Tensor
    origin: tuple[int, int]


class LatentSampler:
    """Draws batches; the same seed draws the same ones."""

    def __init__(self, shards: list[LatentShard], text: StaticTextEncoder, seed: int | tuple[int, ...]) -> None:
        self._shards = shards
        self._text = text
        self._rng = np.random.default_rng(seed)

    def draw(self, count: int, side: int, *, single: bool = False) -> Batch:
        """`count` crops of side x side latents (even numbers).

        Args:
            single: one latent frame from anywhere in the clip; else whole clips, all as long as the first one drawn.
        """
        rng = self._rng
        frames = self._shards[int(rng.integers(len(self._shards)))].frames
        shards = [shard for shard in self._shards if shard.frames == frames]
        height, width = shards[0].source.shape[3:]
        top, left = (2 * int(rng.integers(0, (size - side) // 2 + 1)) for size in (height, width))
        sources, targets, texts, means = [], [], [], []
        for _ in range(count):
            shard = shards[int(rng.integers(len(shards)))]
            source, target, style = self._pair(shard)
            first = int(rng.integers(frames)) if single else 0
            time = slice(first, first + 1) if single else slice(frames)
            crop = (time, slice(None), slice(top, top + side), slice(left, left + side))
            encoded = self._text.encode(random_prompt(STYLES[style], rng))
            sources.append(source[crop].float())
            targets.append(target[crop].float())
            texts.append(encoded.states)
            means.append(encoded.mean)
        return Batch(
            torch.stack(sources), torch.stack(targets), torch.stack(texts), torch.stack(means), (top // 2, left // 2)
        )

    def _pair(self, shard: LatentShard) -> tuple[Tensor, Tensor, int]:
        rng = self._rng
        i = int(rng.integers(len(shard.source)))
        if rng.random() < PHOTO_SHARE:
            return shard.source[i], shard.clean[i], 0
        weights = _WEIGHT[shard.styles[i]].double().numpy()
        j = int(rng.choice(len(weights), p=weights / weights.sum()))
        return shard.source[i], shard.styled[i, j], int(shard.styles[i, j])


def noised(batch: Batch) -> tuple[Tensor, Tensor]:
    """x_t and sigma [B]: three in four are pure noise, as one step starts; else a noised target or source."""
    target = batch.target
    count = len(target)
    sigma = torch.where(torch.rand(count) < 0.75, torch.ones(count), 0.15 + 0.85 * torch.rand(count))
    from_target = (torch.rand(count) < 0.5).view(-1, 1, 1, 1, 1)
    base = torch.where(from_target, target, batch.source)
    share = sigma.view(-1, 1, 1, 1, 1)
    return (1 - share) * base + share * torch.randn_like(target), sigma
