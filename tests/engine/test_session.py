"""Nothing of one stream reaches another, nothing of any stream stays in the model, and a seed means one noise."""

import gc

import numpy as np
import pytest
import torch

from engine.api import StreamParams
from engine.config import CacheConfig
from engine.pipeline import Mode, Pipeline
from engine.session import FixedNoise, FreshNoise
from engine.wan.untrained import untrained_model
from tests.engine.streams import TINY, Frames, camera, play, pooled_model

LENGTHS = (1, 4, 4, 4, 4, 4)
MODES = ("sequential", "batch")


def tiny_pipeline(mode: Mode = "sequential") -> Pipeline:
    return Pipeline(untrained_model(TINY), 32, 48, mode=mode, streams=4)


def wan_pipeline(mode: Mode = "sequential", *, streams: int = 4) -> Pipeline:
    return Pipeline(pooled_model(), 32, 48, mode=mode, streams=streams, cache=CacheConfig(sink_refresh=0.6))


def chunks(seed: int, lengths: tuple[int, ...] = LENGTHS) -> list[Frames]:
    return [camera(length, 100 * seed + place) for place, length in enumerate(lengths)]


def same(one: list[tuple[int, Frames]], two: list[tuple[int, Frames]]) -> bool:
    return [chunk for chunk, _ in one] == [chunk for chunk, _ in two] and all(
        np.array_equal(a, b) for (_, a), (_, b) in zip(one, two, strict=True)
    )


@pytest.mark.parametrize("mode", MODES)
def test_interleaved_sessions_give_bit_for_bit_what_each_gives_alone(mode: Mode) -> None:
    params = [
        StreamParams(prompt="watercolor", steps=2, seed=1),
        StreamParams(prompt="neon", strength=0.5, seed=2),
        StreamParams(prompt=""),
    ]
    alone = []
    for number, each in enumerate(params):
        pipeline = tiny_pipeline(mode)
        alone.append(play(pipeline, pipeline.open(each), chunks(number)))
    shared = tiny_pipeline(mode)
    states = [shared.open(each) for each in params]
    shown: list[list[tuple[int, Frames]]] = [[] for _ in params]
    for chunk in range(len(LENGTHS)):
        for number, state in enumerate(states):
            shown[number] += play(shared, state, [chunks(number)[chunk]])
    assert all(same(a, b) for a, b in zip(shown, alone, strict=True))
    assert len(alone[0]) == len(LENGTHS) - (mode == "batch")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["tiny", "wan"])
def test_a_second_session_equals_one_in_a_fresh_pipeline(mode: Mode, kind: str) -> None:
    make, lengths = (tiny_pipeline, LENGTHS) if kind == "tiny" else (wan_pipeline, (5, *(4,) * 9))
    used, fresh = make(mode), make(mode)
    params = StreamParams(prompt="ink", seed=3, steps=2)
    first = used.open(StreamParams(prompt="neon", steps=3, seed=9))
    play(used, first, chunks(0, lengths))
    used.close(first)
    second = used.open(params)
    assert [row.index for row in second.rows] == [row.index for row in first.rows]
    shown = play(used, second, chunks(1, lengths))
    assert same(shown, play(fresh, fresh.open(params), chunks(1, lengths)))
    assert len(shown) >= len(lengths) - 1


@pytest.mark.parametrize("mode", MODES)
def test_a_second_session_on_the_rows_of_a_nan_stream_equals_a_fresh_one(mode: Mode) -> None:
    used, fresh = wan_pipeline(mode, streams=1), wan_pipeline(mode, streams=1)
    params, lengths = StreamParams(prompt="ink", seed=3, steps=2), (5, *(4,) * 9)
    ill = used.open(StreamParams(prompt="neon", steps=3))
    with torch.inference_mode():
        for length in lengths:
            frames = torch.full((length, 3, 48, 32), float("nan"))
            used.advance_prompts(ill)
            used.denoise([used.take_in(ill, frames)])
    assert used.pool.keys[0][ill.rows[0].index].isnan().any()
    used.close(ill)
    shown = play(used, used.open(params), chunks(1, lengths))
    assert same(shown, play(fresh, fresh.open(params), chunks(1, lengths)))
    assert not any(store.isnan().any() for store in (*used.pool.keys, *used.pool.values))


@pytest.mark.parametrize("mode", MODES)
def test_rendering_changes_no_weight_and_no_buffer(mode: Mode) -> None:
    pipeline = tiny_pipeline(mode)
    modules = pipeline.model.transformer, pipeline.model.vae
    before = [{key: tensor.clone() for key, tensor in module.state_dict().items()} for module in modules]
    play(pipeline, pipeline.open(StreamParams(prompt="neon", steps=3)), chunks(0))
    for module, kept in zip(modules, before, strict=True):
        assert all(tensor.equal(kept[key]) for key, tensor in module.state_dict().items())


def test_the_state_counts_what_it_rendered_and_keeps_its_memory() -> None:
    pipeline = tiny_pipeline()
    state = pipeline.open(StreamParams(prompt="neon"))
    places = [store.data_ptr() for store in (*pipeline.pool.keys, *pipeline.pool.values)]
    play(pipeline, state, chunks(0))
    assert (state.chunks, state.frames) == (len(LENGTHS), sum(LENGTHS))
    assert [store.data_ptr() for store in (*pipeline.pool.keys, *pipeline.pool.values)] == places
    assert state.rows[0].seen == len(LENGTHS)


@pytest.mark.parametrize(("mode", "rows"), [("sequential", 1), ("batch", 4)])
def test_a_stream_takes_its_rows_and_gives_them_back_closed_twice_or_dropped(mode: Mode, rows: int) -> None:
    pipeline = Pipeline(pooled_model(), 32, 48, mode=mode, streams=1)
    state = pipeline.open(StreamParams())
    assert len(state.rows) == rows
    with pytest.raises(MemoryError, match="close a stream"):
        pipeline.open(StreamParams())
    pipeline.close(state)
    pipeline.close(state)
    dropped = pipeline.open(StreamParams())
    with pytest.raises(MemoryError):
        pipeline.open(StreamParams())
    del dropped
    gc.collect()
    assert len(pipeline.open(StreamParams()).rows) == rows


def test_refused_parameters_take_no_row() -> None:
    pipeline = Pipeline(
        pooled_model(),
        32,
        48,
        streams=1,
        sampling=pooled_model().config.sampling.model_copy(update={"timesteps": (700, 500)}),
    )
    with pytest.raises(ValueError, match="steps 3 must be from 1 to 2"):
        pipeline.open(StreamParams(steps=3))
    assert pipeline.open(StreamParams(steps=2)).plan.steps == 2


def test_fixed_noise_is_one_sample_and_fresh_noise_one_for_each_chunk_and_step_in_any_order() -> None:
    shape, cpu = (4, 6, 8), torch.device("cpu")
    fixed, again = (FixedNoise(7, shape, cpu, torch.float32) for _ in range(2))
    assert torch.equal(fixed.draw(0, 0, 1), again.draw(5, 3, 1))
    assert fixed.draw(0, 0, 2).shape == (1, 1, *shape)
    assert not torch.equal(fixed.draw(0, 0, 1), FixedNoise(8, shape, cpu, torch.float32).draw(0, 0, 1))
    fresh, same_seed = (FreshNoise(7, shape, cpu, torch.float32) for _ in range(2))
    drawn = [fresh.draw(chunk, step, 1) for chunk in range(3) for step in range(2)]
    places = [(chunk, step) for chunk in range(3) for step in range(2)]
    assert all(torch.equal(drawn[i], same_seed.draw(*places[i], 1)) for i in (5, 0, 3))
    others = (FreshNoise(seed, shape, cpu, torch.float32).draw(0, 0, 1) for seed in (8, 2**31 - 1))
    assert len({sample.sum().item() for sample in (*drawn, *others)}) == 8
    assert fresh.draw(9, 0, 2).shape == (1, 2, *shape)
    stack = torch.cat([FreshNoise(1, (4, 32, 32), cpu, torch.float32).draw(0, 0, 8)])
    assert abs(stack.mean()) < 0.02
    assert abs(stack.std() - 1) < 0.02


@pytest.mark.parametrize("kind", [FixedNoise, FreshNoise])
def test_noise_has_the_streams_dtype_and_the_same_values_in_each(kind: type[FixedNoise | FreshNoise]) -> None:
    single, half = (
        kind(3, (4, 6, 8), torch.device("cpu"), dtype).draw(0, 0, 1) for dtype in (torch.float32, torch.bfloat16)
    )
    assert half.dtype == torch.bfloat16
    assert torch.equal(single.bfloat16(), half)
