import numpy as np
import pytest

from engine.training.phrases import STYLES, Style, random_prompt
from engine.training.teachers import TEACHERS


def test_styles_and_teachers_agree_in_order() -> None:
    assert tuple(style.id for style in STYLES) == tuple(TEACHERS)


@pytest.mark.parametrize("style", STYLES, ids=lambda style: style.id)
def test_a_style_has_phrases_enough_and_some_held_out(style: Style) -> None:
    assert len(set(style.phrases)) >= 40
    assert style.phrases[0] == style.prompt
    assert len(set(style.held_out)) >= 4
    assert not set(style.phrases) & set(style.held_out)
    assert all(phrase == " ".join(phrase.split()) and phrase for phrase in style.phrases + style.held_out)


def test_no_phrase_belongs_to_two_styles() -> None:
    phrases = [phrase for style in STYLES for phrase in style.phrases + style.held_out]
    assert len(phrases) == len(set(phrases))


def test_training_prompts_never_show_a_held_out_phrase_alone() -> None:
    rng = np.random.default_rng(0)
    held_out = {phrase for style in STYLES for phrase in style.held_out}
    assert not held_out & {random_prompt(style, rng) for style in STYLES for _ in range(200)}


def test_only_the_photo_is_asked_for_without_words() -> None:
    rng = np.random.default_rng(0)
    empty = {style.id for style in STYLES for _ in range(100) if not random_prompt(style, rng)}
    assert empty == {"photo"}
