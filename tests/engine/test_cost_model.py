"""The cost model on made-up devices whose true cost is known."""

import json
import random
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.cost_model import CostModel, Work, chunk_costs

# A pass, a forward, and a latent frame, a row and a cached frame at full and small size, in seconds.
TRUE_S = (0.002, 0.004, 0.020, 0.012, 0.001, 0.012, 0.007, 0.0004)
WINDOW = 3
Device = Callable[[Work], float]

works = st.builds(
    Work,
    latents=st.integers(1, 8),
    forwards=st.integers(0, 4),
    rows=st.integers(0, 32),
    context=st.integers(0, 128),
    small=st.booleans(),
)


def true_s(work: Work) -> float:
    constant, forward, *sizes = TRUE_S
    latent, row, cached = sizes[3:] if work.small else sizes[:3]
    return constant + forward * work.forwards + latent * work.latents + row * work.rows + cached * work.context


def batch(streams: int, steps: int, small: bool = False) -> Work:
    rows = streams * steps
    return Work(streams, steps, rows, rows * WINDOW, small)


def profile(device: Device = true_s) -> CostModel:
    """A model that was shown each shape three times, as a warm-up does."""
    model = CostModel()
    shapes = [batch(streams, steps, small) for streams in (1, 2, 4) for steps in (1, 2, 4) for small in (False, True)]
    model.profile([(work, device(work)) for work in 3 * shapes])
    return model


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(works, st.floats(1e-5, 10)), max_size=30), works, works)
def test_costs_are_never_negative_and_more_work_never_costs_less(
    passes: list[tuple[Work, float]], work: Work, more: Work
) -> None:
    model = CostModel()
    for each, seconds in passes:
        model.observe(each, seconds)
    assert min(model.coefficients_s) >= 0
    larger = Work(
        work.latents + more.latents,
        work.forwards + more.forwards,
        work.rows + more.rows,
        work.context + more.context,
        work.small,
    )
    assert 0 <= model.mean_s(work) <= model.mean_s(larger)
    assert model.mean_s(work) <= model.upper_s(work)


@settings(max_examples=60, deadline=None)
@given(works, st.floats(1e-4, 10))
def test_one_pass_sets_the_scale_of_all(work: Work, seconds: float) -> None:
    model = CostModel()
    before = model.coefficients_s
    model.observe(work, seconds)
    assert model.mean_s(work) == pytest.approx(seconds, rel=1e-6)
    scales = [after / prior for after, prior in zip(model.coefficients_s, before, strict=True)]
    assert scales == pytest.approx([scales[0]] * len(scales), rel=1e-6)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_a_profile_tells_the_truth_about_shapes_it_has_not_seen(seed: int) -> None:
    noise = random.Random(seed)
    model = profile(lambda work: true_s(work) * noise.lognormvariate(0, 0.02))
    for streams, steps in ((1, 1), (2, 2), (4, 4), (3, 3), (3, 1), (1, 3)):
        for small in (False, True):
            work = batch(streams, steps, small)
            assert model.mean_s(work) == pytest.approx(true_s(work), rel=0.06)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([0.5, 2.0, 4.0]))
def test_a_change_of_speed_is_followed_within_some_passes_for_all_work(seed: int, change: float) -> None:
    noise = random.Random(seed)
    model = profile()
    seen, unseen = batch(1, 1), (batch(1, 4), batch(4, 2), batch(1, 1, small=True))
    for _ in range(40):
        model.observe(seen, true_s(seen) * noise.lognormvariate(0, 0.05))
    for _ in range(20):
        model.observe(seen, change * true_s(seen) * noise.lognormvariate(0, 0.05))
    assert model.mean_s(seen) == pytest.approx(change * true_s(seen), rel=0.1)
    for work in unseen:
        assert model.mean_s(work) == pytest.approx(change * true_s(work), rel=0.25)
    # It was no spread: the factor stays that of the noise.
    assert model.factor < 1.3


@pytest.mark.parametrize(("change", "passes"), [(4.0, 2), (1.5, 3), (0.25, 2)])
def test_a_device_that_has_changed_by_far_is_known_at_once(change: float, passes: int) -> None:
    model = profile()
    seen, unseen = batch(1, 1), (batch(1, 3), batch(2, 1), batch(1, 1, small=True))
    for _ in range(60):
        model.observe(seen, true_s(seen))
    for _ in range(passes):
        model.observe(seen, change * true_s(seen))
    for work in (seen, *unseen):
        assert model.mean_s(work) == pytest.approx(change * true_s(work), rel=0.05)


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([0.05, 0.1, 0.2]))
def test_the_upper_quantile_covers_nineteen_passes_of_twenty(seed: int, spread: float) -> None:
    noise = random.Random(seed)
    model = profile()
    covered, passes = 0, 1000
    for _ in range(passes):
        work = batch(noise.choice((1, 2, 4)), noise.choice((1, 2)))
        seconds = true_s(work) * noise.lognormvariate(0, spread)
        covered += seconds <= model.upper_s(work)
        model.observe(work, seconds)
    assert 0.92 <= covered / passes <= 0.98


def test_passes_that_waited_and_single_outliers_teach_nothing() -> None:
    model = profile()
    before = model.snapshot()
    work = batch(1, 1)
    assert not model.observe(work, 1.0, waited=True)
    assert not model.observe(work, 0.0)
    assert not model.observe(work, float("nan"))
    assert model.snapshot() == before
    assert not model.observe(work, 20 * true_s(work))
    assert model.coefficients_s == tuple(before["coefficients_s"])
    model.observe(work, true_s(work))
    # Three in a row are believed: the device has become that slow.
    assert [model.observe(work, 20 * true_s(work)) for _ in range(3)] == [False, False, True]


def test_a_profiled_model_is_not_thrown_by_one_pass() -> None:
    model = profile()
    work = batch(1, 1)
    model.observe(work, 1.25 * true_s(work))
    assert model.mean_s(work) == pytest.approx(true_s(work), rel=0.05)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(works, st.floats(1e-4, 1)), max_size=40), st.lists(st.tuples(works, st.floats(1e-4, 1))))
def test_a_snapshot_goes_on_as_the_model_would(
    before: list[tuple[Work, float]], after: list[tuple[Work, float]]
) -> None:
    model = CostModel()
    for work, seconds in before:
        model.observe(work, seconds)
    twin = CostModel.from_snapshot(json.loads(json.dumps(model.snapshot())))
    for work, seconds in after:
        assert model.observe(work, seconds) == twin.observe(work, seconds)
    assert twin.snapshot() == model.snapshot()
    assert twin.factor == model.factor


@pytest.mark.parametrize(
    "change",
    [
        {"prior_s": [1.0]},
        {"coefficients_s": [-1.0] * 10},
        {"ratios": [-1.0]},
        {"ratios": "x"},
        {"moments": None},
        {"targets": [float("nan")] * 10},
        {"run": [1]},
    ],
)
def test_a_damaged_snapshot_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="no snapshot of a cost model"):
        CostModel.from_snapshot(CostModel().snapshot() | change)
    with pytest.raises(ValueError, match="prior_s"):
        CostModel.from_snapshot({})


def test_a_bad_prior_is_refused() -> None:
    with pytest.raises(ValueError, match="5 positive numbers"):
        CostModel((1.0, 2.0))
    with pytest.raises(ValueError, match="small_share 0"):
        CostModel(small_share=0.0)
    with pytest.raises(ValueError, match="more than 0 s"):
        CostModel().profile([(batch(1, 1), 0.0)])


def test_costs_of_a_chunk_by_steps_and_size() -> None:
    model = profile()
    costs = chunk_costs(model, (1, 2), window=WINDOW, has_small=True)
    assert [(cost.steps, cost.small) for cost in costs] == [(1, False), (2, False), (1, True), (2, True)]
    for cost in costs:
        assert cost.mean_s == pytest.approx(true_s(batch(1, cost.steps, cost.small)), rel=0.05)
        assert cost.upper_s == pytest.approx(model.factor * cost.mean_s)
    assert not any(cost.small for cost in chunk_costs(model, (1,)))


def works_of_a_warm_up() -> list[Work]:
    return [batch(1, steps, small) for steps in (1, 2, 4) for small in (False, True)]


def test_where_a_warm_up_agrees_with_what_was_learned_the_latter_stands_with_its_spread() -> None:
    noise = random.Random(3)
    learned = profile(lambda work: 1.5 * true_s(work))
    for _ in range(40):
        for work in works_of_a_warm_up():
            learned.observe(work, 1.5 * true_s(work) * noise.choice((0.9, 0.95, 1.0, 1.2)))
    model = CostModel()
    passes = [(work, true_s(work)) for work in works_of_a_warm_up()]
    assert model.profile(passes, learned) == len(passes)
    for work in works_of_a_warm_up():
        assert model.mean_s(work) == pytest.approx(learned.mean_s(work), rel=0.1)
    assert model.factor == learned.factor != profile().factor


@pytest.mark.parametrize("factor", [0.3, 2.5, 20.0])
def test_where_the_device_has_changed_by_far_the_warm_up_stands(factor: float) -> None:
    learned, model, alone = profile(lambda work: factor * true_s(work)), CostModel(), CostModel()
    passes = [(work, true_s(work)) for work in works_of_a_warm_up()]
    assert model.profile(passes, learned) == 0 == alone.profile(passes)
    assert model.snapshot() == alone.snapshot()


def test_only_the_kinds_of_pass_that_changed_are_measured_anew() -> None:
    learned = profile(lambda work: (4.0 if work.small else 1.4) * true_s(work))
    model = CostModel()
    passes = [(work, true_s(work)) for work in works_of_a_warm_up()]
    assert model.profile(passes, learned) == len(passes) // 2
    for work in works_of_a_warm_up():
        expected = true_s(work) * (1.0 if work.small else 1.4)
        assert model.mean_s(work) == pytest.approx(expected, rel=0.1)


@settings(max_examples=60, deadline=None)
@given(works, st.floats(1e-4, 10), st.floats(1e-4, 10))
def test_whatever_was_learned_a_start_is_never_far_from_what_it_measures(
    work: Work, learned_s: float, measured_s: float
) -> None:
    learned, model = CostModel(), CostModel()
    learned.observe(work, learned_s)
    agrees = model.profile([(work, measured_s)], learned)
    assert model.mean_s(work) == pytest.approx(learned_s if agrees else measured_s, rel=1e-3)
    assert 0.499 <= model.mean_s(work) / measured_s <= 2.001
