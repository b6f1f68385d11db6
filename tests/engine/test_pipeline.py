"""Frames in, restyled frames out, and every live change at its chunk."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from engine.api import EngineError, StreamParams, Understood, WeightedPrompt
from engine.config import CacheConfig, SamplingConfig
from engine.health import ChunkFigures
from engine.pipeline import Mode, Pipeline, Rendered
from engine.session import Item, SessionState
from engine.wan.taehv import TAEHV
from engine.wan.text_encoder import EncodedPrompt
from engine.wan.untrained import SMALL_TAEHV, randomise, untrained_model, untrained_wan_model
from engine.wan.vae import VAEState
from engine.wan.weights import Model
from tests.engine.streams import (
    FLOW,
    PLAIN,
    RESIDUAL,
    TINY,
    Frames,
    camera,
    opened,
    play,
    pooled_model,
    relative_rms,
    still,
)

MODES: tuple[Mode, ...] = ("sequential", "batch")


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    return Pipeline(untrained_model(TINY), 32, 48)


def wan(mode: Mode = "sequential", *, streams: int = 4, model: Model | None = None, **cache: object) -> Pipeline:
    """Wan's sampling without its autoencoder's cost."""
    return Pipeline(
        model or pooled_model(), 32, 48, mode=mode, streams=streams, cache=CacheConfig.model_validate(cache)
    )


def tick(pipeline: Pipeline, state: SessionState, frames: Frames) -> list[Rendered]:
    return pipeline.tick([(state, pipeline.upload(frames))])


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_chunks_of_four_and_of_one_keep_their_shape(pipeline: Pipeline, steps: int) -> None:
    state = pipeline.open(StreamParams(prompt="neon", steps=steps))
    for length in (1, 4, 4, 1, 5, 4):
        frames = camera(length)
        kept = frames.copy()
        rendered = pipeline.render(state, frames)
        assert rendered.shape == frames.shape
        assert rendered.dtype == np.uint8
        assert np.array_equal(frames, kept)
        assert not np.shares_memory(rendered, frames)


@pytest.mark.parametrize("first", [5, 1, 4])
def test_a_model_whose_first_frame_stands_alone_takes_any_first_chunk(first: int) -> None:
    pipeline = wan()
    state = pipeline.open(StreamParams(prompt="neon", steps=2))
    latents = []
    for length in (first, 4, 4):
        frames = camera(length)
        pixels = pipeline.upload(frames)
        with torch.inference_mode():
            (done,) = pipeline.tick([(state, pixels)])
        assert done.frames is not None
        assert done.frames.shape == frames.shape
        latents.append(state.rows[0].seen)
    assert latents == ([1, 2, 3] if first == 1 else [2, 3, 4])


def test_the_real_wan_autoencoder_streams_through_a_tick() -> None:
    pipeline = Pipeline(untrained_wan_model(), 32, 32)
    state = pipeline.open(StreamParams(prompt="neon", steps=2))
    frames = [camera(length, length, height=32) for length in (5, 4, 4)]
    shown = play(pipeline, state, frames)
    assert [chunk for chunk, _ in shown] == [0, 1, 2]
    assert [each.shape for _, each in shown] == [chunk.shape for chunk in frames]
    assert all(each.std() > 5 for _, each in shown)


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


@pytest.mark.parametrize("latents", ["raw", "normalised"])
def test_strength_zero_gives_the_camera_back_in_either_scale_of_latents(latents: str) -> None:
    sampling = pooled_model().config.sampling.model_copy(update={"latents": latents})
    pipeline = Pipeline(pooled_model(), 32, 48, sampling=sampling)
    state = pipeline.open(StreamParams(strength=0))
    for length in (5, 4):
        # Blocks of one colour, which pooling keeps.
        frames = np.kron(still(length, width=4, height=6), np.ones((1, 8, 8, 1), np.uint8))
        assert np.abs(pipeline.render(state, frames).astype(int) - frames).max() <= 1


def test_the_scale_of_latents_is_the_checkpoints() -> None:
    frames = camera(5)
    items = []
    for latents in ("raw", "normalised"):
        sampling = pooled_model().config.sampling.model_copy(update={"latents": latents})
        pipeline = Pipeline(pooled_model(), 32, 48, sampling=sampling)
        with torch.inference_mode():
            pixels = pipeline.upload(frames).permute(0, 3, 1, 2).float() / 127.5 - 1
            items.append(pipeline.take_in(opened(pipeline), pixels))
    raw, normalised = (item.source for item in items)
    assert torch.equal(pooled_model().vae.normalise(raw), normalised)
    assert relative_rms(raw, normalised) > 0.1


def test_a_read_only_chunk_and_a_view_are_taken(pipeline: Pipeline) -> None:
    frames = camera(4)
    expected = pipeline.render(pipeline.open(StreamParams()), frames)
    mirrored = frames[:, :, ::-1].copy()[:, :, ::-1]
    frames.flags.writeable = False
    for given_ in (frames, mirrored):
        assert np.array_equal(pipeline.render(pipeline.open(StreamParams()), given_), expected)


def test_a_prompt_change_shows_at_once_and_keeps_the_stream(pipeline: Pipeline) -> None:
    params = StreamParams(prompt="watercolor", seed=4)
    kept, switched = pipeline.open(params), pipeline.open(params)
    for seed in range(4):
        assert np.array_equal(pipeline.render(kept, camera(4, seed)), pipeline.render(switched, camera(4, seed)))
    row = switched.rows[0].index
    keys, noise = pipeline.pool.keys[0][row].clone(), switched.noise
    pipeline.set_params(switched, params.model_copy(update={"prompt": "neon"}))
    assert torch.equal(pipeline.pool.keys[0][row], keys)
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
    def first(**params: float) -> Frames:
        state = pipeline.open(StreamParams.model_validate({"prompt": "neon", **params}))
        return pipeline.render(state, camera(4))

    assert np.array_equal(first(seed=1), first(seed=1))
    assert not np.array_equal(first(seed=1), first(seed=2))
    assert np.array_equal(first(seed=1, strength=0), first(seed=2, strength=0))


def test_still_input_settles_to_a_still_picture(pipeline: Pipeline) -> None:
    state = pipeline.open(StreamParams(prompt="neon"))
    frames = camera(1).repeat(4, axis=0)
    for _ in range(TINY.layers * TINY.window_frames + 1):
        settled = pipeline.render(state, frames)
    again = pipeline.render(state, frames)
    assert np.abs(again.astype(int) - settled).max() <= 1


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
    with pytest.raises(ValueError, match=r"must be uint8 \[T, 48, 32, 3\], T 1, 4, 5 or 8"):
        pipeline.render(pipeline.open(StreamParams()), frames)


@pytest.mark.parametrize(("width", "height", "said"), [(40, 48, "width 40"), (32, 0, "height 0")])
def test_a_size_that_is_not_whole_tokens_is_refused(width: int, height: int, said: str) -> None:
    with pytest.raises(ValueError, match=f"{said} must be a positive multiple of 16"):
        Pipeline(untrained_model(TINY), width, height)


# --- colours over the picture


class ColouredText:
    """One style for every prompt; a prompt that is a key adds its grade. Encodes at once."""

    def __init__(self, **grades: Tensor) -> None:
        self.grades = grades

    def request(self, prompt: str) -> EncodedPrompt:
        return self.encode(prompt)

    def encode(self, prompt: str) -> EncodedPrompt:
        states = torch.zeros(FLOW.text_len, FLOW.text_dim)
        moods = (prompt,) if prompt in self.grades else ()
        return EncodedPrompt(states, states[0], 1, (("ink", 1.0),), 0.5, self.grades.get(prompt), moods)

    def close(self) -> None: ...


SWAP = torch.tensor([[0.0, 0.0, 1.0, 0.0], [0.0, 1.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0]])
DIM = torch.tensor([[0.5, 0.0, 0.0, 0.1], [0.0, 0.5, 0.0, 0.1], [0.0, 0.0, 0.5, 0.1]])


def coloured(mode: Mode = "sequential") -> Pipeline:
    return wan(mode, model=replace(pooled_model(), text=ColouredText(swapped=SWAP, dim=DIM)))


def played(pipeline: Pipeline, *turns: StreamParams) -> list[Frames]:
    """One chunk a turn of a still camera; a turn with other parameters than the last changes them."""
    state, out = pipeline.open(turns[0]), []
    for turn in turns:
        if turn != state.params:
            pipeline.set_params(state, turn)
        out.append(pipeline.render(state, still(4)))
    return out


def test_the_chunk_that_shows_a_prompt_shows_its_colours_and_the_next_prompt_drops_them() -> None:
    plain, swapped, dim = (StreamParams(prompt=prompt) for prompt in ("plain", "swapped", "dim"))
    without = played(coloured(), *[plain] * 4)
    graded = played(coloured(), plain, swapped, dim, plain)
    assert np.array_equal(graded[0], without[0])
    assert np.array_equal(graded[1], without[1][..., ::-1])
    assert np.abs(graded[2].astype(int) - np.round(without[2] / 2 + 25.5)).max() <= 1
    assert np.array_equal(graded[3], without[3])


def test_colours_follow_strength_and_leave_the_camera_alone_at_none() -> None:
    half, none = (StreamParams(prompt="swapped", strength=strength) for strength in (0.5, 0.0))
    plain_half, plain_none = (params.model_copy(update={"prompt": "plain"}) for params in (half, none))
    (graded, camera_graded), (plain, camera_plain) = (
        played(coloured(), half, none),
        played(coloured(), plain_half, plain_none),
    )
    assert np.abs(graded.astype(int) - np.round((plain + plain[..., ::-1].astype(float)) / 2)).max() <= 1
    assert np.array_equal(camera_graded, camera_plain)


def test_colours_mix_in_a_blend_and_fade_in_a_transition() -> None:
    swapped = StreamParams(prompt="swapped", transition_chunks=1)
    plain = StreamParams(prompt="plain", transition_chunks=1)
    blend = StreamParams(blend=(WeightedPrompt(text="plain"), WeightedPrompt(text="swapped")))
    without = played(coloured(), *[plain] * 3)
    (mixed,) = played(coloured(), blend)
    halfway, whole = played(coloured(), plain, swapped, swapped)[1:]
    for picture, of in ((mixed, without[0]), (halfway, without[1])):
        assert np.abs(picture.astype(int) - np.round((of + of[..., ::-1].astype(float)) / 2)).max() <= 1
    assert np.array_equal(whole, without[2][..., ::-1])


@pytest.mark.parametrize("mode", MODES)
def test_a_chunk_tells_what_its_own_prompts_were_taken_for(mode: Mode) -> None:
    pipeline = coloured(mode)
    state = pipeline.open(StreamParams(prompt="plain", steps=2))
    told = []
    for chunk in range(6):
        if chunk == 3:
            pipeline.set_params(state, StreamParams(prompt="dim", steps=2), revision=9)
        told += [(done.revision, done.understood) for done in tick(pipeline, state, still(4))]
    assert {revision for revision, _ in told} == {0, 9}
    for revision, understood in told:
        moods = ("dim",) if revision else ()
        assert understood == (Understood(styles=(("ink", 1.0),), score=0.5, modifiers=moods),)


# --- steps of successive chunks together


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_in_batch_mode_a_chunk_of_n_steps_comes_n_minus_1_chunks_later(steps: int) -> None:
    pipeline = wan("batch")
    state = pipeline.open(StreamParams(prompt="neon", steps=steps))
    for chunk in range(9):
        done = tick(pipeline, state, camera(4 if chunk else 5, chunk))
        # The first chunk fills the rows and is not held up.
        late = chunk - (steps - 1)
        assert [each.chunk for each in done] == ([0] if chunk == 0 else [late] if late > 0 else [])
    with torch.inference_mode():
        rest = pipeline.drain(state)
    assert [item.chunk for item in rest] == list(range(9 - (steps - 1), 9))
    assert tick(pipeline, state, camera(4))[-1].chunk == 9


def test_with_one_step_both_modes_are_the_same() -> None:
    shown = []
    for mode in MODES:
        pipeline = wan(mode)
        shown.append(play(pipeline, opened(pipeline, steps=1), [camera(4 if c else 5, c) for c in range(8)]))
    assert all(np.array_equal(a, b) for (_, a), (_, b) in zip(*shown, strict=True))


def test_each_step_of_batch_mode_has_a_row_of_its_own() -> None:
    """Row r holds what passes at step r wrote, so that modes differ, and nothing of the other steps."""
    pipeline = wan("batch")
    state = opened(pipeline, steps=2)
    play(pipeline, state, [camera(4 if c else 5, c) for c in range(9)])
    first, second = (pipeline.pool.keys[-1][row.index] for row in state.rows[:2])
    held = [pipeline.pool.held[row.index].tolist() for row in state.rows[:2]]
    # The second row is one chunk behind.
    assert max(held[0]) == max(held[1]) + 1
    common = [(held[0].index(frame), held[1].index(frame)) for frame in held[0][3:] if frame in held[1]]
    assert common
    assert all(relative_rms(first[a], second[b]) > 1e-3 for a, b in common)


@settings(max_examples=12, deadline=None)
@given(
    st.sampled_from(MODES),
    st.lists(st.tuples(st.integers(1, 4), st.sampled_from((0.0, 0.5, 1.0))), min_size=1, max_size=14),
)
def test_steps_and_strength_changed_live_lose_and_reorder_no_chunk(mode: Mode, wanted: list[tuple[int, float]]) -> None:
    pipeline = wan(mode)
    state = opened(pipeline)
    done: list[int] = []
    for chunk, (steps, strength) in enumerate(wanted):
        pipeline.set_params(state, state.params.model_copy(update={"steps": steps, "strength": strength}), chunk + 1)
        now = tick(pipeline, state, camera(4 if chunk else 5, chunk))
        assert all(each.frames is not None and len(each.frames) == (4 if each.chunk else 5) for each in now)
        # A chunk bears the revision that was in force when it was taken in.
        assert [each.revision for each in now] == [each.chunk + 1 for each in now]
        done += [each.chunk for each in now]
        assert len(state.in_flight) <= (max(0, steps - 1) if mode == "batch" else 0)
    with torch.inference_mode():
        done += [item.chunk for item in pipeline.drain(state)]
    assert done == list(range(len(wanted)))
    assert {row.index for row in state.rows} | set(pipeline.pool._free) == set(range(len(pipeline.pool.held)))


def test_a_drained_stream_goes_on_from_what_its_last_step_left() -> None:
    pipeline = wan("batch")
    state = opened(pipeline, steps=3)
    play(pipeline, state, [camera(4 if c else 5, c) for c in range(9)])
    first, last = (state.rows[place].index for place in (0, 2))
    assert not torch.equal(pipeline.pool.keys[-1][first], pipeline.pool.keys[-1][last])
    with torch.inference_mode():
        assert [item.chunk for item in pipeline.drain(state)] == [7, 8]
    for store in (*pipeline.pool.keys, *pipeline.pool.values, pipeline.pool.held):
        assert torch.equal(store[first], store[last])
    assert state.rows[0].seen == 10


@pytest.mark.parametrize("mode", MODES)
def test_after_fewer_steps_the_stream_goes_on_from_its_last_steps_cache(mode: Mode) -> None:
    pipeline = wan(mode)
    state = opened(pipeline, steps=3)
    play(pipeline, state, [camera(4 if c else 5, c) for c in range(9)])
    pipeline.set_params(state, state.params.model_copy(update={"steps": 1}))
    play(pipeline, state, [camera(4, 9)])
    held = sorted(pipeline.pool.held[state.rows[0].index].tolist())
    assert held == [0, 1, 2, 8, 9, 10]
    assert (state.primed, len(state.in_flight)) == (0, 0)


# --- live changes


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("change", [{"strength": 0.4}, {"seed": 5}, {"prompt": "ink"}, {"steps": 3}])
def test_a_change_shows_in_the_first_chunk_that_names_its_revision(mode: Mode, change: dict[str, Any]) -> None:
    pipeline = wan(mode)
    kept, changed = (opened(pipeline, steps=2) for _ in range(2))
    rendered: list[dict[int, Rendered]] = [{}, {}]
    for chunk in range(8):
        if chunk == 4:
            pipeline.set_params(changed, changed.params.model_copy(update=change), 7)
        for which, state in enumerate((kept, changed)):
            for each in tick(pipeline, state, camera(4 if chunk else 5, chunk)):
                rendered[which][each.chunk] = each
    for chunk in sorted(rendered[0].keys() & rendered[1].keys()):
        one, two = rendered[0][chunk], rendered[1][chunk]
        assert two.revision == (7 if chunk >= 4 else 0)
        assert one.frames is not None
        assert two.frames is not None
        assert torch.equal(one.frames, two.frames) == (chunk < 4), chunk
    assert max(rendered[1]) > 4


def test_a_change_that_the_model_cannot_follow_leaves_the_stream_as_it_was() -> None:
    sampling = pooled_model().config.sampling.model_copy(update={"timesteps": (700, 500)})
    pipeline = Pipeline(pooled_model(), 32, 48, sampling=sampling)
    state = opened(pipeline, steps=2)
    before = replace(state)
    with pytest.raises(ValueError, match="steps 4 must be from 1 to 2"):
        pipeline.set_params(state, state.params.model_copy(update={"steps": 4, "seed": 9, "prompt": "ink"}), 3)
    assert (state.params, state.noise, state.plan, state.pending_revision) == (
        before.params,
        before.noise,
        before.plan,
        None,
    )
    assert not state.prompts.pending


class SlowText:
    """A text encoder elsewhere: prompts are known once `answer` was called for them."""

    def __init__(self, model: Model) -> None:
        self._text, self._known = model.text, set[str]()
        self.asked: list[str] = []
        self.broken = False

    def answer(self, prompt: str) -> None:
        self._known.add(prompt)

    def request(self, prompt: str) -> EncodedPrompt | None:
        if self.broken:
            raise EngineError("the text encoder is gone")
        self.asked.append(prompt)
        return self._text.encode(prompt) if prompt in self._known else None

    def encode(self, prompt: str) -> EncodedPrompt:
        return self._text.encode(prompt)

    def close(self) -> None:
        pass


def slow(mode: Mode = "sequential") -> tuple[Pipeline, SlowText]:
    text = SlowText(pooled_model())
    return wan(mode, model=replace(pooled_model(), text=text)), text


@pytest.mark.parametrize("mode", MODES)
def test_until_the_first_prompt_is_known_chunks_come_back_unrendered_and_counted(mode: Mode) -> None:
    pipeline, text = slow(mode)
    state = pipeline.open(StreamParams(prompt="neon", steps=2))
    for chunk in range(3):
        (given_,) = tick(pipeline, state, camera(4, chunk))
        assert (given_.chunk, given_.frames, given_.figures) == (chunk, None, None)
    text.answer("neon")
    done = [each for chunk in range(3, 7) for each in tick(pipeline, state, camera(4, chunk))]
    assert [each.chunk for each in done] == ([3, 4, 5, 6] if mode == "sequential" else [3, 4, 5])
    assert all(each.frames is not None for each in done)


def test_a_prompt_whose_text_is_pending_keeps_the_old_one_and_its_revision() -> None:
    pipeline, text = slow()
    text.answer("neon")
    kept, waiting = opened(pipeline), opened(pipeline)
    for chunk in range(6):
        if chunk == 2:
            pipeline.set_params(waiting, StreamParams(prompt="ink"), 4)
        if chunk == 4:
            text.answer("ink")
        (one,), (two,) = (tick(pipeline, state, camera(4 if chunk else 5, chunk)) for state in (kept, waiting))
        assert one.frames is not None
        assert two.frames is not None
        assert torch.equal(one.frames, two.frames) == (chunk < 4)
        assert two.revision == (4 if chunk >= 4 else 0)
        assert waiting.prompts.pending == (2 <= chunk < 4)


def test_a_broken_text_encoder_is_named() -> None:
    pipeline, text = slow()
    text.broken = True
    with pytest.raises(EngineError, match="the text encoder is gone"):
        tick(pipeline, pipeline.open(StreamParams()), camera(4))


def test_a_blend_of_one_prompt_with_itself_is_that_prompt() -> None:
    pipeline = wan()
    alone = opened(pipeline, prompt="ink")
    blend = opened(pipeline, blend=(WeightedPrompt(text="ink", weight=3), WeightedPrompt(text="ink", weight=1)))
    frames = camera(5)
    assert np.array_equal(pipeline.render(alone, frames), pipeline.render(blend, frames))


def test_a_blend_goes_from_one_prompt_to_the_other_by_weight() -> None:
    pipeline = wan(streams=16)
    frames = camera(5)

    def latent_of(**params: object) -> Tensor:
        state = opened(pipeline, steps=1, **params)
        with torch.inference_mode():
            pixels = pipeline.upload(frames).permute(0, 3, 1, 2).float() / 127.5 - 1
            (item,) = pipeline.denoise([pipeline.take_in(state, pixels)])
        pipeline.close(state)
        return item.clean

    ink, neon = latent_of(prompt="ink"), latent_of(prompt="neon")
    away = []
    for share in (0.01, 0.25, 0.5, 0.75, 0.99):
        pair = (WeightedPrompt(text="ink", weight=1 - share), WeightedPrompt(text="neon", weight=share))
        blend = latent_of(blend=pair)
        away.append(relative_rms(blend, ink) - relative_rms(blend, neon))
    assert away == sorted(away)
    assert away[0] < 0 < away[-1]


@pytest.mark.parametrize("mode", MODES)
def test_recache_lets_the_new_prompt_speak_for_earlier_frames(mode: Mode) -> None:
    pipeline = wan(mode)
    plain, recached = opened(pipeline, prompt="ink", steps=1), opened(pipeline, prompt="ink", steps=1, recache=True)
    frames = [camera(4 if c else 5, c) for c in range(8)]
    for state in (plain, recached):
        play(pipeline, state, frames)
        pipeline.set_params(state, state.params.model_copy(update={"prompt": "neon"}))
    (one,), (two,) = (tick(pipeline, state, camera(4, 9)) for state in (plain, recached))
    assert one.frames is not None
    assert two.frames is not None
    assert not torch.equal(one.frames, two.frames)
    # Once: the next change of something else leaves the window as it is.
    kept = pipeline.pool.values[-1][recached.rows[0].index].clone()
    pipeline.set_params(recached, recached.params.model_copy(update={"strength": 0.5}))
    pipeline.advance_prompts(recached)
    assert torch.equal(pipeline.pool.values[-1][recached.rows[0].index], kept)


# --- beginning anew


@pytest.mark.parametrize("mode", MODES)
def test_a_reset_stream_renders_as_a_fresh_one_and_says_what_it_lost(mode: Mode) -> None:
    pipeline = wan(mode)
    state = pipeline.open(StreamParams(prompt="ink", steps=3, seed=1))
    play(pipeline, state, [camera(4 if c else 5, c) for c in range(7)])
    lost = pipeline.reset(state)
    assert lost == ([5, 6] if mode == "batch" else [])
    assert not state.in_flight
    assert not (state.encoder.memory or state.decoder.memory or state.history)
    # Fresh noise goes on with the chunks.
    fresh = pipeline.open(state.params)
    fresh.chunks = 7
    again = [camera(4, 50 + c) for c in range(6)]
    shown, expected = play(pipeline, state, again), play(pipeline, fresh, again)
    assert [chunk for chunk, _ in shown] == [chunk for chunk, _ in expected]
    assert all(np.array_equal(a, b) for (_, a), (_, b) in zip(shown, expected, strict=True))


@pytest.mark.parametrize("mode", MODES)
def test_a_reanchored_stream_loses_no_chunk_and_makes_the_next_frames_its_sinks(mode: Mode) -> None:
    pipeline = wan(mode, positions="absolute")
    state = opened(pipeline, steps=3)
    done = []
    for chunk in range(14):
        if chunk == 7:
            pipeline.reanchor(state)
            assert not pipeline.pool.keys[0][state.rows[0].index].any()
            assert not state.history
        done += [each.chunk for each in tick(pipeline, state, camera(4 if chunk else 5, chunk))]
    with torch.inference_mode():
        done += [item.chunk for item in pipeline.drain(state)]
    assert done == list(range(14))
    # Chunks 7, 8 and 9 are frames 0, 1 and 2 now.
    assert sorted(pipeline.pool.held[state.rows[0].index].tolist()) == [0, 1, 2, 4, 5, 6]


# --- figures


def figures_of(rendered: Rendered) -> ChunkFigures:
    assert rendered.figures is not None
    return ChunkFigures.from_values(rendered.figures.tolist())


def test_figures_are_those_of_the_frames_shown() -> None:
    pipeline = wan()
    state = opened(pipeline, strength=0)
    frames = np.kron(still(5, 3, width=4, height=6), np.ones((1, 8, 8, 1), np.uint8))
    moved = np.kron(still(4, 4, width=4, height=6), np.ones((1, 8, 8, 1), np.uint8))
    first, second, third = (figures_of(tick(pipeline, state, each)[0]) for each in (frames, frames[:4], moved))
    pixels = frames[-1] / 255
    assert first.output[:3] == pytest.approx(pixels.mean((0, 1)), abs=0.01)
    assert first.output[3:6] == pytest.approx(pixels[::8, ::8].std((0, 1)), abs=0.02)
    assert first.source == pytest.approx(pixels.mean(), abs=0.01)
    assert (first.source_change, first.change) == (0, 1)  # nothing to compare with yet
    assert (second.source_change, second.change) == pytest.approx((0, 0), abs=1e-6)
    change = np.abs(moved[-1] / 255 - pixels).mean()
    assert (third.source_change, third.change) == pytest.approx((change, change), abs=0.01)
    assert all(each.finite for each in (first, second, third))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_one_pixel_that_is_no_number_shows_in_the_figures(value: float) -> None:
    pipeline = wan()
    state = opened(pipeline)
    with torch.inference_mode():
        pixels = pipeline.upload(camera(5)).permute(0, 3, 1, 2).float() / 127.5 - 1
        item: Item = pipeline.take_in(state, pixels)
        (item,) = pipeline.denoise([item])
        # A place that the sampled figures pass over.
        item.clean[0, 0, 1, 1, 1] = value
        frames = pipeline.decode(item)
        rendered = Rendered(state, 0, 0, None, pipeline._figures(item, frames))
    assert not figures_of(rendered).finite


def test_the_embedded_models_own_sampling_needs_no_timesteps() -> None:
    pipeline = Pipeline(pooled_model(RESIDUAL), 32, 48, sampling=PLAIN)
    assert pipeline.max_steps == 4
    state = opened(pipeline, steps=4)
    assert [chunk for chunk, _ in play(pipeline, state, [camera(5), camera(4)])] == [0, 1]
    listed = SamplingConfig(timesteps=(900, 600, 300))
    assert Pipeline(pooled_model(RESIDUAL), 32, 48, sampling=listed).max_steps == 3


# --- two VAEs


def two_vaes(mode: Mode) -> Pipeline:
    light = TAEHV(SMALL_TAEHV)
    randomise(light, torch.Generator().manual_seed(5))
    model = replace(untrained_wan_model(), light_vae=light.eval().requires_grad_(False))
    return wan(mode, model=model)


@pytest.mark.parametrize("mode", ["sequential", "batch"])
def test_a_stream_changes_its_vae_and_back_without_losing_a_chunk_or_its_cache(mode: Mode) -> None:
    pipeline = two_vaes(mode)
    full = StreamParams(prompt="neon", steps=2)
    light = full.model_copy(update={"light": True})
    state = pipeline.open(full)
    done: list[Rendered] = []
    works = []
    for chunk in range(24):
        if chunk in (8, 16):
            pipeline.set_params(state, light if chunk == 8 else full, chunk)
        done += tick(pipeline, state, camera(4 if chunk else 5, chunk))
        works.append(pipeline.work)
        assert state.rows[0].seen > 0  # never begun anew
    assert [one.chunk for one in done] == list(range(len(done))) and len(done) >= 23
    assert [one.revision for one in done] == [0] * 8 + [8] * 8 + [16] * (len(done) - 16)
    assert all(one.frames is not None and one.frames.shape[0] == (4 if one.chunk else 5) for one in done)
    assert [work is not None and work.light for work in (works[7], works[15], works[23])] == [False, True, False]


def test_by_the_light_vae_alone_the_picture_is_that_of_a_stream_that_never_had_another() -> None:
    light = StreamParams(prompt="neon", light=True, strength=0.0)
    pipeline = two_vaes("sequential")
    moved, fresh = pipeline.open(light.model_copy(update={"light": False})), pipeline.open(light)
    tick(pipeline, moved, camera(5, 1))
    pipeline.set_params(moved, light)
    frames = camera(4, 2)
    (after,), (alone,) = tick(pipeline, moved, frames), tick(pipeline, fresh, frames)
    assert after.frames is not None and alone.frames is not None
    assert torch.equal(after.frames, alone.frames)  # nothing of the other VAE's memory is left in it


def test_light_means_nothing_where_there_is_one_vae() -> None:
    pipeline = wan()
    full, light = (pipeline.open(StreamParams(prompt="neon", light=light)) for light in (False, True))
    frames = camera(5, 1)
    (one,), (other,) = tick(pipeline, full, frames), tick(pipeline, light, frames)
    assert one.frames is not None and other.frames is not None and torch.equal(one.frames, other.frames)
    assert pipeline.work is not None and not pipeline.work.light
