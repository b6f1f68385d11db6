"""Models for the tests of rings, which every rank's process makes for itself."""

from dataclasses import replace
from functools import cache

from engine.config import DEFAULT_MODEL, MODELS_DIR, CacheConfig
from engine.wan.weights import Model, load_model
from tests.engine.streams import FLOW, RESIDUAL, pooled_model

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


def _with_cache(model: Model, cache: CacheConfig) -> Model:
    return replace(model, config=model.config.model_copy(update={"cache": cache}))


@cache
def embedded(rank: int) -> Model:
    return load_model(MODELS_DIR / DEFAULT_MODEL, "cpu")
