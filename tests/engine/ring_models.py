"""Models for the tests of rings, which every rank's process makes for itself."""

from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from time import sleep

import torch
from torch import Tensor

from engine.config import DEFAULT_MODEL, MODELS_DIR, CacheConfig
from engine.kv_cache import CacheView
from engine.wan.taehv import TAEHV
from engine.wan.transformer import PromptContext
from engine.wan.untrained import untrained_wan_model
from engine.wan.vae_config import TAEHVConfig, WanVAEConfig
from engine.wan.weights import Model, load_model
from tests.engine.streams import FLOW, RESIDUAL, pooled_model

PACED_LAYERS, BLOCK_S = 8, 0.015
DEEP_FLOW = FLOW.model_copy(update={"layers": 5})
DEEP_RESIDUAL = RESIDUAL.model_copy(update={"layers": 5})


def flow(rank: int) -> Model:
    return pooled_model(DEEP_FLOW)


def averaged(rank: int) -> Model:
    """Sinks take in what the window loses."""
    return _with_cache(flow(rank), CacheConfig(sink_ema=0.8, positions="refresh", refresh_at=9))


def renewed(rank: int) -> Model:
    """The embedded model's habits, and sinks that give way to what is unlike them."""
    return _with_cache(pooled_model(DEEP_RESIDUAL), CacheConfig(sink_refresh=0.9))


@cache
def wan(rank: int) -> Model:
    """With the autoencoder of Wan, all of its parts, at a small width."""
    return untrained_wan_model(DEEP_FLOW, WanVAEConfig(dim=2, z_dim=4))


@cache
def light(rank: int) -> Model:
    """With TAEHV likewise."""
    model = wan(rank)
    torch.manual_seed(0)
    vae = TAEHV(TAEHVConfig(z_dim=4, encoder_dim=4, decoder_dims=(8, 6, 4, 4)))
    return replace(model, vae=vae.eval().requires_grad_(False))


@dataclass(frozen=True)
class Paced:
    """Loads a deep model whose blocks take `BLOCK_S` a rank, and on rank 1 twice that while `slow` exists: slept,
    so that what the machine is busy with matters little."""

    slow: Path

    def __call__(self, rank: int) -> Model:
        model = pooled_model(FLOW.model_copy(update={"layers": PACED_LAYERS}))
        through = model.transformer.through

        def paced(x: Tensor, time: Tensor, prompt: PromptContext, cache: CacheView, layers: range) -> Tensor:
            sleep(len(layers) * BLOCK_S * (2 if rank == 1 and self.slow.exists() else 1))
            return through(x, time, prompt, cache, layers)

        # On the instance alone, which nobody else has.
        object.__setattr__(model.transformer, "through", paced)
        return model


def _with_cache(model: Model, cache: CacheConfig) -> Model:
    return replace(model, config=model.config.model_copy(update={"cache": cache}))


def deep(rank: int) -> Model:
    """Twelve blocks as wide as the embedded model's, between parts that cost next to nothing: what a ring divides."""
    return pooled_model(FLOW.model_copy(update={"dim": 192, "ffn_dim": 384, "heads": 3, "layers": 12}))


@cache
def embedded(rank: int) -> Model:
    return load_model(MODELS_DIR / DEFAULT_MODEL, "cpu")
