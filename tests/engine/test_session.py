"""Nothing of one stream reaches another, and nothing of any stream stays in the model."""

import numpy as np
from numpy.typing import NDArray

from engine.api import StreamParams
from engine.pipeline import Pipeline
from engine.session import SessionState
from engine.wan.presets import LIVEBRUSH_TINY
from engine.wan.untrained import untrained_model

SMALL = LIVEBRUSH_TINY.model_copy(update={"dim": 48, "ffn_dim": 64, "heads": 2, "layers": 2, "refine_channels": 8})
LENGTHS = (1, 4, 4, 4, 4, 4)


def small_pipeline() -> Pipeline:
    return Pipeline(untrained_model(SMALL), 32, 48)


def camera(seed: int) -> list[NDArray[np.uint8]]:
    random = np.random.default_rng(seed)
    return [random.integers(0, 256, (length, 48, 32, 3), dtype=np.uint8) for length in LENGTHS]


def play(pipeline: Pipeline, params: StreamParams, chunks: list[NDArray[np.uint8]]) -> list[NDArray[np.uint8]]:
    state = pipeline.open(params)
    return [pipeline.render(state, chunk) for chunk in chunks]


def test_interleaved_sessions_give_bit_for_bit_what_each_gives_alone() -> None:
    params = [
        StreamParams(prompt="watercolor", steps=2, seed=1),
        StreamParams(prompt="neon", strength=0.5, seed=2),
        StreamParams(prompt=""),
    ]
    cameras = [camera(seed) for seed in range(len(params))]
    alone = [play(small_pipeline(), p, chunks) for p, chunks in zip(params, cameras, strict=True)]
    shared = small_pipeline()
    states = [shared.open(p) for p in params]
    for chunk in range(len(LENGTHS)):
        for which, state in enumerate(states):
            rendered = shared.render(state, cameras[which][chunk])
            assert np.array_equal(rendered, alone[which][chunk]), (which, chunk)


def test_a_second_session_equals_one_in_a_fresh_pipeline() -> None:
    used, params = small_pipeline(), StreamParams(prompt="ink", seed=3)
    play(used, StreamParams(prompt="neon", steps=4), camera(0))
    second, fresh = play(used, params, camera(1)), play(small_pipeline(), params, camera(1))
    assert all(np.array_equal(a, b) for a, b in zip(second, fresh, strict=True))


def test_rendering_changes_no_weight_and_no_buffer() -> None:
    pipeline = small_pipeline()
    modules = pipeline.model.transformer, pipeline.model.vae
    before = [{key: tensor.clone() for key, tensor in module.state_dict().items()} for module in modules]
    play(pipeline, StreamParams(prompt="neon", steps=3), camera(0))
    for module, kept in zip(modules, before, strict=True):
        assert all(tensor.equal(kept[key]) for key, tensor in module.state_dict().items())


def test_the_state_counts_what_it_rendered_and_keeps_its_memory() -> None:
    pipeline = small_pipeline()
    state: SessionState = pipeline.open(StreamParams(prompt="neon"))
    place = state.cache.keys.data_ptr()
    for chunk in camera(0):
        pipeline.render(state, chunk)
    assert (state.chunks, state.frames) == (len(LENGTHS), sum(LENGTHS))
    assert state.cache.keys.data_ptr() == place
    assert state.cache.frames_seen == len(LENGTHS)
