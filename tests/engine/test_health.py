"""What may be sent, and what has drifted: pure policy on the figures of a chunk."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.health import DRIFT_CHUNKS, LEARN_CHUNKS, RESET_FAULTS, ChunkFigures, HealthMonitor, Verdict

GOOD = ChunkFigures(
    output=(0.5, 0.4, 0.3, 0.2, 0.2, 0.2, 0.05, 1.0), change=0.02, source=0.5, source_change=0.02, finite=True
)
BLACK = replace(GOOD, output=(0.001, 0.0, 0.002, 0.0, 0.001, 0.0, 0.0, 1.0))
FROZEN = replace(GOOD, change=0.0)
STILL = replace(GOOD, change=0.0, source_change=0.0)
NAN = replace(GOOD, finite=False)


def judged(*figures: ChunkFigures, monitor: HealthMonitor | None = None) -> list[Verdict]:
    monitor = monitor or HealthMonitor()
    return [monitor.judge(each) for each in figures]


def faults(*figures: ChunkFigures) -> list[str]:
    return [verdict.fault for verdict in judged(*figures)]


def shifted(amount: float, figure: int = 0) -> ChunkFigures:
    output = list(GOOD.output)
    output[figure] += amount
    return replace(GOOD, output=tuple(output))


def drifts(figures: Sequence[ChunkFigures]) -> list[int]:
    return [chunk for chunk, verdict in enumerate(judged(*figures)) if verdict.drifted]


# --- faults


@settings(deadline=None)
@given(st.integers(0, 11), st.sampled_from((float("nan"), float("inf"), float("-inf"))))
def test_any_figure_that_is_no_number_withholds_the_chunk(place: int, value: float) -> None:
    values = [*GOOD.output, GOOD.change, GOOD.source, GOOD.source_change, 1.0]
    assert ChunkFigures.from_values(values) == GOOD
    values[place] = value
    assert judged(ChunkFigures.from_values(values)) == [Verdict("nan", reset=True)]


def test_a_chunk_that_is_not_finite_is_withheld_and_begins_the_stream_anew() -> None:
    values = [*GOOD.output, GOOD.change, GOOD.source, GOOD.source_change, 0.0]
    figures = ChunkFigures.from_values(values)
    assert judged(GOOD, figures, GOOD) == [Verdict(), Verdict("nan", reset=True), Verdict()]


def test_black_is_withheld_unless_the_camera_is_dark_too() -> None:
    assert faults(BLACK, replace(BLACK, source=0.01), GOOD) == ["black", "", ""]
    # A dark picture with something in it is a picture.
    assert faults(replace(BLACK, output=(0.001, 0.0, 0.0, 0.05, 0.0, 0.0, 0.0, 1.0))) == [""]


def test_frozen_is_withheld_only_while_the_camera_moves() -> None:
    assert faults(GOOD, FROZEN, FROZEN, GOOD, FROZEN) == ["", "frozen", "frozen", "", "frozen"]
    assert faults(*[STILL] * 20) == [""] * 20
    assert faults(FROZEN, STILL, FROZEN, STILL) == ["frozen", "", "frozen", ""]


@pytest.mark.parametrize("figures", [BLACK, FROZEN])
def test_a_fault_that_stays_begins_the_stream_anew_again_and_again(figures: ChunkFigures) -> None:
    verdicts = judged(*[figures] * (3 * RESET_FAULTS + 1))
    resets = [verdict.reset for verdict in verdicts if verdict.fault]
    assert resets.count(True) == 3
    assert [place for place, reset in enumerate(resets, 1) if reset] == [RESET_FAULTS * n for n in (1, 2, 3)]


def test_faults_apart_from_each_other_reset_nothing() -> None:
    assert not any(verdict.reset for verdict in judged(*[BLACK, GOOD] * 10))


@settings(deadline=None)
@given(st.lists(st.sampled_from((GOOD, BLACK, FROZEN, STILL, NAN, shifted(0.4))), max_size=60))
def test_what_is_broken_is_never_sent_and_what_is_withheld_has_not_drifted(figures: list[ChunkFigures]) -> None:
    for given_, verdict in zip(figures, judged(*figures), strict=True):
        if not given_.finite:
            assert verdict == Verdict("nan", reset=True)
        if given_ is BLACK:
            assert verdict.fault == "black"
        if given_ in (GOOD, STILL):
            assert not verdict.fault
        assert not (verdict.drifted and verdict.fault)
        assert verdict.fault or not verdict.reset


# --- drift


@pytest.mark.parametrize("figure", range(8))
def test_a_stream_that_leaves_its_band_for_long_has_drifted(figure: int) -> None:
    calm, gone = [GOOD] * LEARN_CHUNKS, [shifted(0.6, figure)] * (2 * DRIFT_CHUNKS)
    # Once: the new look is then learned.
    assert drifts([*calm, *gone]) == [LEARN_CHUNKS + DRIFT_CHUNKS - 1]


def test_it_is_noticed_again_after_it_was_begun_anew() -> None:
    figures = [GOOD] * LEARN_CHUNKS + [shifted(0.3)] * (DRIFT_CHUNKS + LEARN_CHUNKS) + [shifted(0.6)] * DRIFT_CHUNKS
    assert len(drifts(figures)) == 2


def test_a_short_absence_is_no_drift() -> None:
    assert drifts(([GOOD] * LEARN_CHUNKS + [shifted(0.4)] * (DRIFT_CHUNKS - 1) + [GOOD]) * 3) == []


def test_a_new_scene_is_no_drift() -> None:
    """The camera's brightness leaves its band with the picture's: the band is learned anew."""
    calm = [GOOD] * (LEARN_CHUNKS + 3)
    assert drifts([*calm, *[replace(shifted(0.4), source=0.8)] * 60]) == []


def test_a_still_camera_is_no_drift_and_a_slow_dusk_neither() -> None:
    assert drifts([STILL] * 200) == []
    dusk = [
        replace(GOOD, source=0.5 - n / 800, output=tuple(v * (1 - n / 400) for v in GOOD.output)) for n in range(300)
    ]
    assert drifts(dusk) == []


def test_a_changed_prompt_is_no_drift() -> None:
    monitor = HealthMonitor()
    judged(*[GOOD] * LEARN_CHUNKS, monitor=monitor)
    monitor.relearn()
    assert not any(v.drifted for v in judged(*[shifted(0.4)] * 60, monitor=monitor))
    # Without being told it would have been one.
    assert drifts([GOOD] * LEARN_CHUNKS + [shifted(0.4)] * 60) != []


@settings(deadline=None)
@given(st.lists(st.floats(-0.03, 0.03), min_size=LEARN_CHUNKS, max_size=80))
def test_small_moves_within_the_floor_are_no_drift(moves: list[float]) -> None:
    assert drifts([shifted(move) for move in moves]) == []


def test_a_lively_stream_has_a_wider_band() -> None:
    lively = [shifted(0.05 * (-1) ** n) for n in range(LEARN_CHUNKS)]
    assert drifts([*lively, *[shifted(0.25)] * 40]) == []
    assert drifts([*lively, *[shifted(0.4)] * 40]) != []
