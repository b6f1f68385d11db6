"""Passes over any mix of streams, steps and cache fills, for both kinds of prediction."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine.config import CacheConfig
from engine.denoise import predict_clean
from engine.flow_match import add_noise, flow_from_clean
from engine.pipeline import Mode, Pipeline
from engine.session import Item, SessionState
from engine.wan.presets import TransformerConfig
from tests.engine.streams import FLOW, PLAIN, RESIDUAL, all_steps, item_of, latent, opened, pooled_model, relative_rms

CONFIGS = {"source_residual": RESIDUAL, "flow": FLOW}


def pipeline_of(
    config: TransformerConfig = FLOW,
    *,
    mode: Mode = "sequential",
    plain: bool = True,
    streams: int = 4,
    **cache: object,
) -> Pipeline:
    """For latents of 4 x 4; `plain` in place of Wan's sampling."""
    return Pipeline(
        pooled_model(config),
        32,
        32,
        streams=streams,
        mode=mode,
        sampling=PLAIN if plain else None,
        cache=CacheConfig.model_validate(cache),
    )


def test_both_predictions_name_the_same_clean_latent() -> None:
    source, clean, noise = latent(0), latent(1), latent(2)
    sigma, one = torch.tensor([0.6]), torch.ones(1)
    noisy = add_noise(clean, noise, sigma[:, None])
    flow = flow_from_clean(noisy, clean, sigma[:, None])
    torch.testing.assert_close(predict_clean("flow", flow, noisy, source, sigma, one), clean)
    residual = predict_clean("source_residual", clean - source, noisy, source, sigma, one)
    torch.testing.assert_close(residual, clean)
    half = predict_clean("source_residual", clean - source, noisy, source, sigma, one / 2)
    torch.testing.assert_close(half, (source + clean) / 2)


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("steps", [1, 2, 3, 4])
@torch.inference_mode()
def test_a_chunk_takes_its_steps_one_after_another(kind: str, steps: int) -> None:
    config = CONFIGS[kind]
    pipeline = pipeline_of(config)
    state, twin = (opened(pipeline, steps=steps, strength=0.6) for _ in range(2))
    source = latent(0)
    result = all_steps(pipeline, item_of(pipeline, state, source))
    # Restated: start from the noised source, predict the clean latent, re-noise it to the next level.
    (row,) = twin.rows
    view = pipeline.pool.view([row], pipeline.pool.advance([row], 1))
    clean, prompt = source, twin.prompts.context
    assert prompt is not None
    for step in range(steps):
        sigma = 0.6 * (steps - step) / steps
        noisy = (1 - sigma) * clean + sigma * twin.noise.draw(0, step, 1)
        condition = source if config.condition_channels else None
        output = pipeline.model.transformer(noisy, condition, torch.tensor([1000 * sigma]), prompt, view)
        clean = source + 0.6 * output if config.condition_channels else noisy - sigma * output
    torch.testing.assert_close(result, clean, atol=1e-4, rtol=1e-3)
    assert state.rows[0].seen == 1
    for keys in pipeline.pool.keys:
        torch.testing.assert_close(keys[state.rows[0].index], keys[row.index], atol=1e-3, rtol=1e-3)


@torch.inference_mode()
def test_pure_noise_start_takes_nothing_from_the_source_of_a_flow_model() -> None:
    pipeline = pipeline_of(FLOW)
    one, two = (all_steps(pipeline, item_of(pipeline, opened(pipeline), latent(seed))) for seed in (0, 1))
    assert torch.equal(one, two)


@torch.inference_mode()
def test_strength_moves_from_the_source_to_the_full_style() -> None:
    pipeline = pipeline_of(RESIDUAL, streams=8)
    source, distances = latent(0), []
    for strength in (0.0, 0.25, 0.5, 1.0):
        state = opened(pipeline, strength=strength)
        distances.append(float((all_steps(pipeline, item_of(pipeline, state, source)) - source).norm()))
        pipeline.close(state)
    assert distances[0] == 0
    assert distances == sorted(set(distances))


@torch.inference_mode()
def test_strength_zero_leaves_the_cache_as_it_was() -> None:
    pipeline = pipeline_of(RESIDUAL)
    state = opened(pipeline)
    all_steps(pipeline, item_of(pipeline, state, latent(0)))
    kept = [keys.clone() for keys in pipeline.pool.keys]
    state.plan = pipeline.plan(state.params.model_copy(update={"strength": 0.0}))
    source = latent(5)
    assert all_steps(pipeline, item_of(pipeline, state, source)) is source
    assert all(torch.equal(a, b) for a, b in zip(pipeline.pool.keys, kept, strict=True))
    assert state.rows[0].seen == 1


# --- several streams in a pass


class Stream:
    """One stream past the autoencoder, in either mode; notes the clean latent of every chunk."""

    def __init__(self, pipeline: Pipeline, number: int, steps: int) -> None:
        self.pipeline, self.number = pipeline, number
        self.state: SessionState = opened(
            pipeline,
            prompt=("neon", "ink", "a painting")[number % 3],
            steps=steps,
            seed=number,
            strength=1 - number / 8,
        )
        self.clean: dict[int, Tensor] = {}

    def enter(self, frames: int = 1) -> Item:
        """The next chunk, its source the same whoever it goes with."""
        chunk = self.state.chunks
        item = item_of(self.pipeline, self.state, latent(100 * self.number + chunk, frames), chunk)
        if self.pipeline._runs_together(self.state, item.schedule.steps):
            item.rows, item.pipelined = self.state.rows[: item.schedule.steps], True
        self.state.chunks += 1
        self.pipeline.batch.begin(item)
        return item

    def keep(self, items: Sequence[Item]) -> None:
        self.clean |= {item.chunk: item.clean for item in items if item.state is self.state}


def run(pipeline: Pipeline, steps: Sequence[int], ticks: Sequence[Sequence[int]]) -> list[dict[int, Tensor]]:
    """Clean latents by chunk of each stream, where every tick takes the streams it names, and the rest at the end."""
    streams = [Stream(pipeline, number, count) for number, count in enumerate(steps)]
    for tick in ticks:
        done = pipeline.denoise([streams[number].enter() for number in tick])
        for stream in streams:
            stream.keep(done)
    for stream in streams:
        stream.keep(pipeline.drain(stream.state))
    return [stream.clean for stream in streams]


@settings(max_examples=8, deadline=None)
@given(
    st.lists(st.integers(1, 4), min_size=2, max_size=3),
    st.lists(st.sets(st.integers(0, 2), min_size=1), min_size=4, max_size=9),
    st.sampled_from(("sequential", "batch")),
    st.sampled_from(("relative", "refresh", "absolute")),
    st.sampled_from(({}, {"sink_refresh": 0.9}, {"sink_ema": 0.8})),
    st.sampled_from(("source_residual", "flow")),
)
@torch.inference_mode()
def test_streams_in_one_pass_give_what_each_gives_alone(
    steps: list[int],
    ticks: list[set[int]],
    mode: Mode,
    positions: str,
    sinks: dict[str, Any],
    kind: str,
) -> None:
    def fresh() -> Pipeline:
        return pipeline_of(CONFIGS[kind], mode=mode, plain=False, positions=positions, refresh_at=9, **sinks)

    order = [sorted(number for number in tick if number < len(steps)) for tick in ticks]
    together = run(fresh(), steps, order)
    for number, clean in enumerate(together):
        alone = run(fresh(), steps, [[number] for tick in order if number in tick])[number]
        assert list(clean) == list(alone) == list(range(sum(number in tick for tick in order)))
        for chunk, value in alone.items():
            assert relative_rms(clean[chunk], value) < 1e-5, (number, chunk)


@pytest.mark.parametrize("mode", ["sequential", "batch"])
@torch.inference_mode()
def test_at_one_shape_a_stream_is_bit_equal_whoever_is_beside_it(mode: Mode) -> None:
    def beside(seed: int) -> dict[int, Tensor]:
        pipeline = pipeline_of(mode=mode, plain=False)
        first, other = Stream(pipeline, 0, 2), Stream(pipeline, seed, 2)
        for _ in range(9):
            done = pipeline.denoise([first.enter(), other.enter()])
            first.keep(done)
        return first.clean

    one, two = beside(1), beside(2)
    assert len(one) == len(two) == (9 if mode == "sequential" else 8)
    assert all(torch.equal(one[chunk], two[chunk]) for chunk in one)


@torch.inference_mode()
def test_a_nan_in_one_stream_reaches_no_other() -> None:
    pipeline = pipeline_of(plain=False)
    calm = run(pipeline_of(plain=False), [2, 2], [[0]] * 8)[0]
    first, ill = Stream(pipeline, 0, 2), Stream(pipeline, 1, 2)
    for chunk in range(8):
        entered = [first.enter(), ill.enter()]
        if chunk >= 2:
            entered[1].clean = entered[1].source = torch.full_like(entered[1].source, float("nan"))
        first.keep(pipeline.denoise(entered))
        assert entered[1].clean.isnan().all() == (chunk >= 2)
    for chunk, value in calm.items():
        assert relative_rms(first.clean[chunk], value) < 1e-5


@torch.inference_mode()
def test_chunks_of_unequal_length_share_a_tick() -> None:
    pipeline, twin = pipeline_of(), pipeline_of()
    long, short = Stream(pipeline, 0, 2), Stream(pipeline, 1, 1)
    done = pipeline.denoise([long.enter(frames=2), short.enter()])
    for stream, frames in ((long, 2), (short, 1)):
        stream.keep(done)
        alone = Stream(twin, stream.number, len(stream.state.plan.base.timesteps))
        alone.keep(twin.denoise([alone.enter(frames=frames)]))
        torch.testing.assert_close(stream.clean[0], alone.clean[0], atol=1e-5, rtol=1e-5)
    assert (long.state.rows[0].seen, short.state.rows[0].seen) == (2, 1)


# --- sinks


@pytest.mark.parametrize("mode", ["sequential", "batch"])
@torch.inference_mode()
def test_a_cut_is_decided_once_for_all_layers_steps_and_rows(mode: Mode) -> None:
    pipeline = pipeline_of(mode=mode, plain=False, sink_refresh=0.5, positions="absolute")
    stream = Stream(pipeline, 0, 3)
    decided: list[int] = []

    def go(source: Tensor) -> None:
        item = stream.enter()
        item.source = item.clean = source
        pipeline.batch.begin(item)
        decided.append(-1 if item.sink is None else int(item.sink.item()))
        stream.keep(pipeline.denoise([item]))

    for chunk in range(9):
        go(latent(1) + 0.1 * latent(50 + chunk))
    assert decided == [-1] * 9
    for chunk in range(5):
        go(-latent(1) + 0.1 * latent(70 + chunk))
    # The first frames after the cut take the sinks' places, one after the other; then they are at home.
    assert sorted(decided[9:12]) == [0, 1, 2]
    assert decided[12:] == [-1, -1]
    stream.keep(pipeline.drain(stream.state))
    assert list(stream.clean) == list(range(14))
    rows = [stream.state.rows[row].index for row in range(3 if mode == "batch" else 1)]
    held = [pipeline.pool.held[row].tolist() for row in rows]
    assert sorted(held[-1][:3]) == [9, 10, 11]
    assert all(sorted(each[:3]) == [9, 10, 11] for each in held)
    assert all(torch.equal(pipeline.pool.sink_looks[row], pipeline.pool.sink_looks[rows[0]]) for row in rows)


@torch.inference_mode()
def test_noise_and_motion_are_no_cut() -> None:
    pipeline = pipeline_of(plain=False, sink_refresh=0.5)
    stream = Stream(pipeline, 0, 1)
    for chunk in range(20):
        item = stream.enter()
        scene = torch.tensor([1.0, -1.0, 0.5, 0.8]).view(1, 1, 4, 1, 1) + 0.5 * latent(3)
        item.source = item.clean = scene.roll(chunk, dims=-1) + 0.2 * latent(chunk)
        pipeline.batch.begin(item)
        assert item.sink is None or item.sink.item() == -1
        pipeline.denoise([item])
    assert pipeline.pool.held[0, :3].tolist() == [0, 1, 2]


# --- recache


def window_of(pipeline: Pipeline, state: SessionState) -> list[Tensor]:
    row = state.rows[0].index
    return [store[row].clone() for store in (*pipeline.pool.keys, *pipeline.pool.values)]


@pytest.mark.parametrize("mode", ["sequential", "batch"])
@torch.inference_mode()
def test_recache_rewrites_the_window_as_if_its_frames_had_been_made_for_the_new_prompt(mode: Mode) -> None:
    pipeline = pipeline_of(mode=mode, plain=False)
    stream, other = Stream(pipeline, 0, 1), opened(pipeline, prompt="ink")
    for _ in range(9):
        stream.keep(pipeline.denoise([stream.enter()]))
    prompt = other.prompts.context
    assert prompt is not None
    before = window_of(pipeline, stream.state)
    history = list(stream.state.history)
    assert len(history) == pipeline.pool.window
    pipeline.batch.recache(stream.state, prompt)
    # The same frames, oldest first, through a fresh row.
    twin = pipeline_of(plain=False)
    (fresh,) = twin.pool.lease(1)
    for given_ in history:
        view = twin.pool.view([fresh], twin.pool.advance([fresh], given_.noisy.shape[1]))
        twin.model.transformer(given_.noisy, None, given_.timestep, prompt, view)
    after = window_of(pipeline, stream.state)
    expected = [store[fresh.index] for store in (*twin.pool.keys, *twin.pool.values)]
    assert all(torch.equal(value, wanted) for value, wanted in zip(after, expected, strict=True))
    # The keys of the second layer know of the prompt.
    assert relative_rms(after[1], before[1]) > 1e-3
    assert stream.state.rows[0].seen == pipeline.pool.window
    for row in stream.state.rows:
        assert row.seen == pipeline.pool.window
        assert torch.equal(pipeline.pool.values[-1][row.index], after[-1])


@torch.inference_mode()
def test_recache_of_an_unchanged_prompt_changes_nothing_while_the_window_still_fills() -> None:
    pipeline = pipeline_of(plain=False)
    stream = Stream(pipeline, 0, 2)
    for _ in range(5):
        stream.keep(pipeline.denoise([stream.enter()]))
    before, context = window_of(pipeline, stream.state), stream.state.prompts.context
    assert context is not None
    pipeline.batch.recache(stream.state, context)
    for value, kept in zip(window_of(pipeline, stream.state), before, strict=True):
        torch.testing.assert_close(value, kept, atol=1e-6, rtol=1e-6)


def test_a_prompt_batch_is_joined_once_for_as_long_as_the_streams_come_together() -> None:
    pipeline = pipeline_of()
    one, two = (opened(pipeline, prompt=prompt).prompts.context for prompt in ("neon", "ink"))
    assert one is not None
    assert two is not None
    joined = pipeline.batch._join([one, two])
    assert pipeline.batch._join([one, two]) is joined
    assert pipeline.batch._join([two, one]) is not joined
    assert torch.equal(pipeline.batch._join([two, one]).keys[0][1], one.keys[0][0])
    changed = replace(one)
    assert pipeline.batch._join([two, changed]) is not pipeline.batch._join([two, one])
