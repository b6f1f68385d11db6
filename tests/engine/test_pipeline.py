"""Frames in, restyled frames out."""

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch.utils._python_dispatch import TorchDispatchMode

from engine.api import StreamParams
from engine.pipeline import Pipeline
from engine.wan.presets import LIVEBRUSH_TINY
from engine.wan.untrained import untrained_model
from engine.wan.vae import VAEState

SMALL = LIVEBRUSH_TINY.model_copy(update={"dim": 48, "ffn_dim": 64, "heads": 2, "layers": 2, "refine_channels": 8})


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    return Pipeline(untrained_model(SMALL), 32, 48)


def camera(frames: int, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (frames, 48, 32, 3), dtype=np.uint8)


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_chunks_of_four_and_of_one_keep_their_shape(pipeline: Pipeline, steps: int) -> None:
    state = pipeline.open(StreamParams(prompt="neon", steps=steps))
    for length in (1, 4, 4, 1, 4):
        frames = camera(length)
        kept = frames.copy()
        rendered = pipeline.render(state, frames)
        assert rendered.shape == frames.shape
        assert rendered.dtype == np.uint8
        assert np.array_equal(frames, kept)
        assert not np.shares_memory(rendered, frames)


def test_strength_zero_is_the_autoencoder_alone(pipeline: Pipeline) -> None:
    state = pipeline.open(StreamParams(prompt="neon", strength=0, steps=4))
    vae, decoder = pipeline.model.vae, VAEState()
    for seed in range(3):
        frames = camera(4, seed)
        pixels = torch.from_numpy(frames).permute(0, 3, 1, 2)[None] / 127.5 - 1
        latent, _ = vae.encode(pixels, VAEState())
        decoded, decoder = vae.decode(latent, decoder)
        expected = ((decoded[0].clamp(-1, 1) + 1) * 127.5).round().permute(0, 2, 3, 1).numpy()
        assert np.abs(pipeline.render(state, frames).astype(float) - expected).max() <= 1


def test_a_read_only_chunk_and_a_view_are_taken(pipeline: Pipeline) -> None:
    frames = camera(4)
    expected = pipeline.render(pipeline.open(StreamParams()), frames)
    mirrored = frames[:, :, ::-1].copy()[:, :, ::-1]
    frames.flags.writeable = False
    for given in (frames, mirrored):
        assert np.array_equal(pipeline.render(pipeline.open(StreamParams()), given), expected)


def test_a_prompt_change_shows_at_once_and_keeps_the_stream(pipeline: Pipeline) -> None:
    params = StreamParams(prompt="watercolor", seed=4)
    kept, switched = pipeline.open(params), pipeline.open(params)
    for seed in range(4):
        assert np.array_equal(pipeline.render(kept, camera(4, seed)), pipeline.render(switched, camera(4, seed)))
    cache, keys, noise = switched.cache, switched.cache.keys.clone(), switched.noise
    pipeline.set_params(switched, params.model_copy(update={"prompt": "neon"}))
    assert switched.cache is cache
    assert torch.equal(cache.keys, keys)
    assert switched.noise is noise
    after = camera(4, 9)
    assert not np.array_equal(pipeline.render(kept, after), pipeline.render(switched, after))
    # What the cache holds still matters: a stream that starts now looks different.
    fresh = pipeline.open(params.model_copy(update={"prompt": "neon"}))
    assert not np.array_equal(pipeline.render(switched, after), pipeline.render(fresh, after))


def test_both_spellings_render_the_same(pipeline: Pipeline) -> None:
    british, american = (pipeline.open(StreamParams(prompt=p)) for p in ("Watercolour, grey", "watercolor, gray"))
    assert np.array_equal(pipeline.render(british, camera(4)), pipeline.render(american, camera(4)))


def test_the_seed_decides_the_noise_and_strength_zero_ends_the_effect(pipeline: Pipeline) -> None:
    def first(**params: float) -> NDArray[np.uint8]:
        state = pipeline.open(StreamParams.model_validate({"prompt": "neon", **params}))
        return pipeline.render(state, camera(4))

    assert np.array_equal(first(seed=1), first(seed=1))
    assert not np.array_equal(first(seed=1), first(seed=2))
    assert np.array_equal(first(seed=1, strength=0), first(seed=2, strength=0))


def test_still_input_settles_to_a_still_picture(pipeline: Pipeline) -> None:
    state = pipeline.open(StreamParams(prompt="neon"))
    frames = camera(1).repeat(4, axis=0)
    for _ in range(SMALL.layers * SMALL.window_frames + 1):
        settled = pipeline.render(state, frames)
    again = pipeline.render(state, frames)
    assert np.abs(again.astype(int) - settled).max() <= 1


def test_the_whole_tick_runs_on_another_device_and_dtype() -> None:
    # On the meta device a table left on the CPU or a value read back to the host raises.
    pipeline = Pipeline(untrained_model(SMALL, device="meta", dtype=torch.bfloat16), 32, 48)
    state = pipeline.open(StreamParams(prompt="neon", steps=2, strength=0.7))
    for length in (1, 4, 4, 4, 4):
        frames = torch.empty(length, 48, 32, 3, dtype=torch.uint8, device="meta")
        rendered = pipeline.tick(state, frames)
        assert (rendered.shape, rendered.device.type) == (frames.shape, "meta")
        assert state.cache.keys.dtype == torch.bfloat16
    pipeline.set_params(state, StreamParams(prompt="ink", seed=8))
    assert pipeline.tick(state, frames).dtype == torch.uint8


class HostReads(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the operations that read a tensor's value back to the host."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        return func(*args, **(kwargs or {}))


def test_a_tick_reads_nothing_back_to_the_host(pipeline: Pipeline) -> None:
    state = pipeline.open(StreamParams(prompt="neon", steps=3))
    frames = torch.from_numpy(camera(4))
    with HostReads() as reads:
        for _ in range(5):
            pipeline.tick(state, frames)
        assert reads.count == 0
        assert frames.float().mean().item() > 0
    assert reads.count == 1


@pytest.mark.parametrize(
    "frames",
    [
        np.zeros((2, 48, 32, 3), np.uint8),
        np.zeros((4, 32, 48, 3), np.uint8),
        np.zeros((4, 48, 32, 4), np.uint8),
        np.zeros((4, 48, 32, 3), np.float32),
        np.zeros((48, 32, 3), np.uint8),
    ],
)
def test_frames_of_another_shape_are_refused(pipeline: Pipeline, frames: NDArray[Any]) -> None:
    with pytest.raises(ValueError, match=r"must be uint8 \[T, 48, 32, 3\], T 1 or 4"):
        pipeline.render(pipeline.open(StreamParams()), frames)


@pytest.mark.parametrize(("width", "height", "said"), [(40, 48, "width 40"), (32, 0, "height 0")])
def test_a_size_that_is_not_whole_tokens_is_refused(width: int, height: int, said: str) -> None:
    with pytest.raises(ValueError, match=f"{said} must be a positive multiple of 16"):
        Pipeline(untrained_model(SMALL), width, height)


def test_a_free_prompt_names_its_nearest_style(pipeline: Pipeline) -> None:
    found = pipeline.nearest_style("a watercolour painting")
    assert found is not None
    assert found[0] == "watercolor"
    assert pipeline.nearest_style("") is None
