"""What a stream's prompts amount to, chunk by chunk."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine.api import WeightedPrompt
from engine.prompts import Embedding, PromptState, embed
from engine.wan.text_encoder import EncodedPrompt
from engine.wan.transformer import PromptContext

LENGTH, WIDTH = 3, 2
VALUES = {"zero": 0.0, "one": 1.0, "ten": 10.0}


class Text:
    """Encodes a word as states full of its value; those in `pending` are not known yet."""

    def __init__(self, *pending: str) -> None:
        self.pending, self.asked = set(pending), list[str]()

    def __call__(self, prompt: str) -> EncodedPrompt | None:
        self.asked.append(prompt)
        if prompt in self.pending:
            return None
        value = VALUES[prompt]
        return EncodedPrompt(torch.full((LENGTH, WIDTH), value), torch.full((WIDTH,), value / 2), 1)


def prompts(**weights: float) -> tuple[WeightedPrompt, ...]:
    return tuple(WeightedPrompt(text=text, weight=weight) for text, weight in weights.items())


def context_of(states: Tensor, mean: Tensor) -> PromptContext:
    return PromptContext((states,), (states,), mean)


def value_of(state: PromptState) -> float:
    """The one number that a context of these tests is full of."""
    assert state.context is not None
    assert state.context.pooled is not None
    (value,) = set(state.context.keys[0].flatten().tolist())
    assert state.context.pooled.tolist() == pytest.approx([value / 2] * WIDTH)
    return float(value)


def advanced(state: PromptState, text: Text, chunks: int = 1) -> list[float]:
    out = []
    for _ in range(chunks):
        state.advance(text, context_of)
        out.append(value_of(state))
    return out


# --- blends


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from(sorted(VALUES)), st.floats(0.01, 100)), min_size=1, max_size=4))
def test_a_blend_is_the_mean_by_weight(parts: list[tuple[str, float]]) -> None:
    blend = embed(tuple(WeightedPrompt(text=text, weight=weight) for text, weight in parts), Text())
    assert blend is not None
    expected = sum(VALUES[text] * weight for text, weight in parts) / sum(weight for _, weight in parts)
    torch.testing.assert_close(blend.states, torch.full((LENGTH, WIDTH), expected), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(blend.mean, torch.full((WIDTH,), expected / 2), atol=1e-5, rtol=1e-5)


def test_one_prompt_is_itself_whatever_its_weight() -> None:
    blend = embed(prompts(one=37.0), Text())
    assert blend is not None
    assert (blend.states == 1).all()


def test_a_blend_waits_for_all_of_its_parts_and_asks_for_all_at_once() -> None:
    text = Text("one")
    assert embed(prompts(one=1, zero=1), text) is None
    # Both have been asked for, so that their encoding goes on side by side.
    assert text.asked == ["one", "zero"]


def test_a_blend_keeps_the_dtype_of_its_states() -> None:
    def half(prompt: str) -> EncodedPrompt:
        return EncodedPrompt(torch.full((LENGTH, WIDTH), VALUES[prompt]).bfloat16(), torch.ones(WIDTH).bfloat16(), 1)

    blend = embed(prompts(one=1, zero=2), half)
    assert blend is not None
    assert (blend.states.dtype, blend.mean.dtype) == (torch.bfloat16, torch.bfloat16)


# --- changes


def test_the_first_prompt_is_there_at_once_and_is_no_change() -> None:
    state = PromptState(prompts(one=1))
    assert (state.context, state.pending) == (None, True)
    assert advanced(state, Text()) == [1.0]
    assert (state.changed, state.pending) == (False, False)


def test_a_new_prompt_is_reached_at_the_next_chunk_and_changes_once() -> None:
    state, text = PromptState(prompts(zero=1)), Text()
    advanced(state, text)
    state.want(prompts(ten=1), 0)
    assert state.pending
    assert advanced(state, text) == [10.0]
    assert (state.changed, state.pending) == (True, False)
    context = state.context
    assert advanced(state, text, 3) == [10.0] * 3
    assert not state.changed
    assert state.context is context  # nothing is computed anew for an unchanged prompt
    assert text.asked == ["zero", "ten"]


def test_wanting_what_there_is_changes_nothing() -> None:
    state, text = PromptState(prompts(one=1)), Text()
    advanced(state, text)
    context = state.context
    state.want(prompts(one=1), 5)
    assert not state.pending
    advanced(state, text)
    assert state.context is context


@settings(deadline=None)
@given(st.integers(0, 12), st.floats(1, 9))
def test_a_transition_is_even_monotone_and_takes_its_time(chunks: int, weight: float) -> None:
    state, text = PromptState(prompts(zero=1)), Text()
    advanced(state, text)
    state.want(prompts(ten=weight), chunks)
    way, changes = [], []
    for _ in range(chunks + 3):
        way += advanced(state, text)
        changes.append(state.changed)
    assert way == pytest.approx([min(10.0, 10 * (done + 1) / (chunks + 1)) for done in range(chunks + 3)], abs=1e-4)
    assert changes == [done == chunks for done in range(chunks + 3)]


def test_a_change_of_mind_goes_on_from_where_the_transition_is() -> None:
    state, text = PromptState(prompts(zero=1)), Text()
    advanced(state, text)
    state.want(prompts(ten=1), 3)
    assert advanced(state, text, 2) == [2.5, 5.0]
    state.want(prompts(zero=1), 1)
    assert advanced(state, text, 3) == [2.5, 0.0, 0.0]


def test_while_a_text_is_pending_the_old_prompt_stays() -> None:
    state, text = PromptState(prompts(one=1)), Text()
    advanced(state, text)
    text.pending.add("ten")
    state.want(prompts(ten=1), 1)
    assert advanced(state, text, 3) == [1.0] * 3
    assert (state.pending, state.changed) == (True, False)
    text.pending.clear()
    # Time begins with the first chunk that shows it.
    assert advanced(state, text, 2) == [5.5, 10.0]
    assert not state.pending


def test_a_transition_goes_on_while_the_next_text_is_pending() -> None:
    state, text = PromptState(prompts(zero=1)), Text("one")
    advanced(state, text)
    state.want(prompts(ten=1), 4)
    assert advanced(state, text) == [2.0]
    state.want(prompts(one=1), 0)
    assert advanced(state, text, 2) == [4.0, 6.0]
    text.pending.clear()
    assert advanced(state, text) == [1.0]


def test_before_any_text_is_known_there_is_no_context() -> None:
    state, text = PromptState(prompts(one=1)), Text("one")
    state.advance(text, context_of)
    state.want(prompts(ten=1), 4)
    assert (state.context, state.pending) == (None, True)
    # The first picture does not fade in from nothing.
    assert advanced(state, text) == [10.0]


def test_the_straight_way_between_two_embeddings() -> None:
    here, there = (Embedding(torch.full((LENGTH, WIDTH), v), torch.full((WIDTH,), v)) for v in (2.0, 6.0))
    assert [here.towards(there, share).states[0, 0].item() for share in (0, 0.25, 1)] == [2, 3, 6]
