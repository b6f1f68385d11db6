"""Colour transforms: their arithmetic, and that each does to a picture what its name says."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from engine.wan.grade import AMOUNTS, BY_ID, MODIFIERS, OWN, apply, compose, identity, mix, scaled

FRAMES = torch.rand((2, 3, 4, 5), generator=torch.Generator().manual_seed(0)) * 2 - 1
GRADES = [modifier.grade for modifier in MODIFIERS]


def graded(id_: str, amount: float = 1.0) -> Tensor:
    """Mean colour, in 0..1, of the test picture after one modifier."""
    return ((apply(BY_ID[id_].at(amount), FRAMES).clamp(-1, 1) + 1) / 2).mean((0, 2, 3))


def spread(id_: str) -> float:
    """How colourful the picture is then."""
    out = apply(BY_ID[id_].grade, FRAMES).clamp(-1, 1)
    return float((out.amax(1) - out.amin(1)).mean())


def test_a_grade_is_the_affine_map_of_colours_in_zero_to_one() -> None:
    grade = torch.tensor([[0.5, 0.1, 0.0, 0.2], [0.0, 1.0, 0.3, -0.1], [0.2, 0.0, 0.7, 0.0]])
    colours = (FRAMES + 1) / 2
    expected = (colours.movedim(1, -1) @ grade[:, :3].T + grade[:, 3]).movedim(-1, 1)
    torch.testing.assert_close((apply(grade, FRAMES) + 1) / 2, expected)
    torch.testing.assert_close(apply(identity(), FRAMES), FRAMES)


@given(st.sampled_from(range(len(GRADES))), st.sampled_from(range(len(GRADES))))
def test_composing_is_one_after_the_other(first: int, second: int) -> None:
    one, two = GRADES[first], GRADES[second]
    torch.testing.assert_close(apply(compose(one, two), FRAMES), apply(two, apply(one, FRAMES)), atol=1e-5, rtol=1e-5)


def test_mixing_takes_none_for_no_change() -> None:
    grade = GRADES[0]
    assert mix([(1.0, None), (2.0, None)]) is None
    mixed = mix([(1.0, None), (3.0, grade)])
    assert mixed is not None
    torch.testing.assert_close(mixed, scaled(grade, 0.75))
    torch.testing.assert_close(scaled(grade, 0.0), identity())


def test_temperatures_brightness_and_colours_do_what_they_say() -> None:
    plain = ((FRAMES + 1) / 2).mean((0, 2, 3))
    warmth = {id_: float(graded(id_)[0] - graded(id_)[2]) for id_ in ("warm", "cool", "golden")}
    assert warmth["cool"] < plain[0] - plain[2] < warmth["warm"]
    assert warmth["golden"] > plain[0] - plain[2] + 0.1
    light = {id_: float(graded(id_).mean()) for id_ in ("night", "dark", "moody", "bright", "pastel")}
    assert max(light["night"], light["dark"], light["moody"]) < plain.mean() - 0.08
    assert min(light["bright"], light["pastel"]) > plain.mean() + 0.08
    assert spread("monochrome") < 1e-5
    assert spread("muted") < 0.5 * spread("contrast")
    assert spread("vivid") > float((FRAMES.amax(1) - FRAMES.amin(1)).mean())


@pytest.mark.parametrize(
    ("id_", "channels"),
    [("red", {0}), ("green", {1}), ("blue", {2}), ("purple", {0, 2}), ("pink", {0}), ("orange", {0}), ("teal", {1, 2})],
)
def test_a_colour_raises_its_own_channels_over_the_others(id_: str, channels: set[int]) -> None:
    colour = graded(id_).tolist()
    others = [value for channel, value in enumerate(colour) if channel not in channels]
    assert min(colour[channel] for channel in channels) > max(others) + 0.05


@pytest.mark.parametrize("id_", BY_ID)
def test_amounts_lie_between_nothing_and_the_most(id_: str) -> None:
    modifier = BY_ID[id_]
    torch.testing.assert_close(modifier.at(0), identity())
    assert torch.equal(modifier.at(9), modifier.at(modifier.most))
    # Even the most leaves a picture that can be seen.
    out = apply(modifier.at(9), FRAMES).clamp(-1, 1)
    assert float(out.std()) > 0.08


def test_no_word_means_two_moods_and_styles_own_known_ones() -> None:
    words = [word for modifier in MODIFIERS for word in modifier.words]
    assert len(words) == len(set(words))
    assert not set(words) & set(AMOUNTS)
    assert all(mood in BY_ID for moods in OWN.values() for mood in moods)
