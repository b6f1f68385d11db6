"""One chunk in 1 to 4 steps, for both kinds of prediction."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from engine.api import StreamParams
from engine.denoise import denoise_chunk, predict_clean
from engine.flow_match import add_noise, flow_from_clean, sampling_plan
from engine.pipeline import Pipeline
from engine.session import SessionState
from engine.wan.presets import LIVEBRUSH_TINY, TransformerConfig
from engine.wan.untrained import untrained_model

SMALL = LIVEBRUSH_TINY.model_copy(
    update={"latent_channels": 4, "condition_channels": 4, "dim": 48, "ffn_dim": 64, "heads": 2, "layers": 2}
)
FLOW = SMALL.model_copy(update={"condition_channels": 0, "prediction": "flow", "refine_channels": 0})


def opened(config: TransformerConfig, **params: float) -> tuple[Pipeline, SessionState]:
    pipeline = Pipeline(untrained_model(config), 32, 32)
    return pipeline, pipeline.open(StreamParams.model_validate({"prompt": "neon", **params}))


def latent(seed: int = 0) -> Tensor:
    return torch.randn(1, 1, 4, 4, 4, generator=torch.Generator().manual_seed(seed))


def test_both_predictions_name_the_same_clean_latent() -> None:
    source, clean, noise = latent(0), latent(1), latent(2)
    sigma = torch.full((1, 1), 0.6)
    noisy = add_noise(clean, noise, sigma)
    flow = flow_from_clean(noisy, clean, sigma)
    torch.testing.assert_close(predict_clean(FLOW, flow, noisy, source, sigma), clean)
    torch.testing.assert_close(predict_clean(SMALL, clean - source, noisy, source, sigma), clean)
    half = predict_clean(SMALL, clean - source, noisy, source, sigma, strength=0.5)
    torch.testing.assert_close(half, (source + clean) / 2)


@pytest.mark.parametrize("config", [SMALL, FLOW], ids=["source_residual", "flow"])
@pytest.mark.parametrize("steps", [1, 2, 3, 4])
@torch.inference_mode()
def test_a_chunk_takes_its_steps_one_after_another(config: TransformerConfig, steps: int) -> None:
    pipeline, state = opened(config, steps=steps, strength=0.6)
    twin = pipeline.open(state.params)
    source = latent()
    result = denoise_chunk(pipeline.model.transformer, state, source)
    # Restated: start from the noised source, predict the clean latent, re-noise it to the next level.
    twin.cache.begin_chunk(1)
    clean = source
    for step in range(steps):
        sigma = 0.6 * (steps - step) / steps
        noisy = (1 - sigma) * clean + sigma * twin.noise
        condition = source if config.condition_channels else None
        output = pipeline.model.transformer(noisy, condition, torch.tensor([1000 * sigma]), twin.prompt, twin.cache)
        clean = source + 0.6 * output if config.condition_channels else noisy - sigma * output
    torch.testing.assert_close(result, clean, atol=1e-4, rtol=1e-3)
    assert state.cache.frames_seen == 1
    torch.testing.assert_close(state.cache.keys, twin.cache.keys, atol=1e-3, rtol=1e-3)


@torch.inference_mode()
def test_pure_noise_start_takes_nothing_from_the_source_of_a_flow_model() -> None:
    pipeline, state = opened(FLOW)
    other = pipeline.open(state.params)
    transformer = pipeline.model.transformer
    assert torch.equal(denoise_chunk(transformer, state, latent(0)), denoise_chunk(transformer, other, latent(1)))


@torch.inference_mode()
def test_strength_moves_from_the_source_to_the_full_style() -> None:
    pipeline, state = opened(SMALL)
    source, distances = latent(), []
    for strength in (0.0, 0.25, 0.5, 1.0):
        fresh = pipeline.open(state.params)
        fresh = replace(fresh, plan=sampling_plan(1, strength, 1.0, "cpu"))
        restyled = denoise_chunk(pipeline.model.transformer, fresh, source)
        distances.append(float((restyled - source).norm()))
    assert distances[0] == 0
    assert distances == sorted(set(distances))


@torch.inference_mode()
def test_strength_zero_leaves_the_cache_as_it_was() -> None:
    pipeline, state = opened(SMALL)
    transformer = pipeline.model.transformer
    denoise_chunk(transformer, state, latent())
    kept = state.cache.keys.clone()
    state.plan = sampling_plan(1, 0.0, 1.0, "cpu")
    assert denoise_chunk(transformer, state, latent(5)) is not None
    assert torch.equal(state.cache.keys, kept)
    assert state.cache.frames_seen == 1
