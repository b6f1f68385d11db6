"""Splits of a chain over ranks are exact, unlike devices included; a split changes when that pays, and only then."""

import itertools
import math
import random
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.partition import (
    Balancer,
    BalancerConfig,
    PartitionError,
    best_order,
    even_split,
    partition,
    published_split,
    stage_times,
)

Times = list[list[float]]


def fastest(times: Sequence[Sequence[float]], sizes: Sequence[int], room: Sequence[float]) -> float:
    """The slowest rank of the best of all splits, by trying them; infinity when none fits."""
    ranks, units = len(times), len(sizes)
    best = math.inf
    for inner in itertools.combinations_with_replacement(range(units + 1), ranks - 1):
        bounds = (0, *inner, units)
        if all(sum(sizes[a:b]) <= limit for (a, b), limit in zip(itertools.pairwise(bounds), room, strict=True)):
            best = min(best, max(stage_times(times, bounds)))
    return best


@st.composite
def problems(draw: st.DrawFn) -> tuple[Times, list[int], list[float]]:
    ranks, units = draw(st.integers(1, 4)), draw(st.integers(1, 7))
    # Whole numbers of ms, so that sums in any order are the same; 0 and "not here" are among them.
    time = st.one_of(st.integers(0, 20).map(float), st.just(math.inf))
    times = draw(st.lists(st.lists(time, min_size=units, max_size=units), min_size=ranks, max_size=ranks))
    sizes = draw(st.lists(st.integers(0, 5), min_size=units, max_size=units))
    room = draw(st.lists(st.integers(0, 20).map(float), min_size=ranks, max_size=ranks))
    return times, sizes, room


@given(problems())
@settings(max_examples=300, deadline=None)
def test_the_split_is_the_best_of_all(problem: tuple[Times, list[int], list[float]]) -> None:
    times, sizes, room = problem
    expected = fastest(times, sizes, room)
    if expected == math.inf:
        with pytest.raises(PartitionError, match="do not fit"):
            partition(times, sizes, room)
        return
    split = partition(times, sizes, room)
    assert split.slowest_s == expected == max(stage_times(times, split.bounds))
    assert (split.bounds[0], split.bounds[-1]) == (0, len(sizes))
    assert [unit for rank in range(len(times)) for unit in split.units(rank)] == list(range(len(sizes)))
    assert all(sum(sizes[unit] for unit in split.units(rank)) <= room[rank] for rank in range(len(times)))


@given(problems())
@settings(max_examples=100, deadline=None)
def test_the_order_is_the_best_of_all(problem: tuple[Times, list[int], list[float]]) -> None:
    times, sizes, room = problem
    orders = list(itertools.permutations(range(len(times))))
    expected = min(fastest([times[d] for d in order], sizes, [room[d] for d in order]) for order in orders)
    if expected == math.inf:
        with pytest.raises(PartitionError):
            best_order(times, sizes, room)
        return
    order, split = best_order(times, sizes, room)
    assert sorted(order) == list(range(len(times)))
    assert split.slowest_s == expected


def test_many_devices_are_ordered_by_memory() -> None:
    order, split = best_order([[1.0] * 9] * 8, [1] * 9, [1, 2, 1, 1, 1, 1, 1, 1])
    assert order[0] == 1
    assert split.slowest_s == 2


def test_a_rank_that_only_decodes_holds_no_block() -> None:
    # 30 blocks of 1 ms and a decoder of 20 ms, kept on the last rank: the public rule leaves it a block.
    here, no = 0.001, math.inf
    times = [[here] * 30 + [0.020 if rank == 3 else no] for rank in range(4)]
    split = partition(times)
    assert split.units(3) == range(30, 31)
    assert split.slowest_s == pytest.approx(0.020)
    blocks = [8, 8, 7, 7]
    public = published_split([0.008, 0.008, 0.007, 0.027], [0.008, 0.008, 0.007, 0.007], blocks)
    assert public[4] - public[3] == 1


def test_sizes_that_do_not_belong_together_are_refused() -> None:
    with pytest.raises(ValueError, match="2 ranks and 3 units need"):
        partition([[1.0] * 3, [1.0] * 2])
    with pytest.raises(ValueError, match="must be 0 s or more"):
        partition([[1.0, -1.0]])
    with pytest.raises(ValueError, match="3 blocks, 4 ranks"):
        published_split([1.0] * 4, [1.0] * 4, [1, 1, 1, 0])


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(0, 20)), min_size=1, max_size=6))
def test_the_public_rule_gives_every_rank_a_block_and_spreads_all(ranks: list[tuple[int, int]]) -> None:
    blocks = [held for held, _ in ranks]
    total = [float(held + other) for held, other in ranks]
    bounds = published_split(total, [float(held) for held in blocks], blocks)
    assert (bounds[0], bounds[-1]) == (0, sum(blocks))
    assert all(a < b for a, b in itertools.pairwise(bounds))


class Ring:
    """Ranks with true times per kind and noise, measured into a balancer window by window."""

    def __init__(self, kinds: Sequence[str], true: Times, *, noise: float = 0.02, **options: object) -> None:
        self.kinds, self.true, self.noise = kinds, true, noise
        bounds = partition(true).bounds
        self.balancer = Balancer(kinds, true, bounds, **options)  # type: ignore[arg-type]
        self.random = random.Random(1)

    def window(self, slow: dict[int, float], passes: int = 10) -> bool:
        """One window; returns whether units moved."""
        for rank, (begin, end) in enumerate(itertools.pairwise(self.balancer.bounds)):
            for kind in {self.kinds[unit] for unit in range(begin, end)}:
                unit = self.kinds.index(kind)
                for _ in range(passes):
                    time_s = self.true[rank][unit] * slow.get(rank, 1.0) * self.random.lognormvariate(0, self.noise)
                    self.balancer.observe(rank, kind, time_s)
        return self.balancer.close_window() is not None

    def pace(self, slow: dict[int, float]) -> float:
        """Throughput of the split in force, as a share of the best one's."""
        times = [[time * slow.get(rank, 1.0) for time in row] for rank, row in enumerate(self.true)]
        return partition(times).slowest_s / max(stage_times(times, self.balancer.bounds))


KINDS = ["encode", *["block"] * 30, "decode"]


def chain(ranks: int, encode: float = 4.0, decode: float = 8.0) -> Times:
    """Encode kept on the first rank, decode on the last."""
    return [
        [encode if rank == 0 else math.inf, *[1.0] * 30, decode if rank == ranks - 1 else math.inf]
        for rank in range(ranks)
    ]


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_a_rank_at_half_speed_is_relieved_within_five_windows_and_gets_its_blocks_back(ranks: int) -> None:
    for victim in range(ranks):
        ring = Ring(KINDS, chain(ranks))
        assert ring.pace({}) == 1
        slow = {victim: 2.0}
        slowed = ring.pace(slow)
        moved = [ring.window(slow) for _ in range(5)]
        assert slowed < 0.9
        assert ring.pace(slow) >= 0.95
        assert not any(moved[:2])
        for _ in range(5):
            ring.window({})
        assert ring.pace({}) >= 0.95
        assert ring.balancer.epoch <= 4


def test_the_public_rule_leaves_a_slow_rank_slower_than_the_exact_one() -> None:
    # Blocks take twice as long on rank 0; one time for all blocks cannot see it.
    bounds, slow = even_split(4, 30), [2.0, 1.0, 1.0, 1.0]
    other = [4.0 * 2, 0.0, 0.0, 8.0]
    blocks_s = [slow[r] * (bounds[r + 1] - bounds[r]) for r in range(4)]
    public = published_split([b + o for b, o in zip(blocks_s, other, strict=True)], blocks_s, [8, 8, 7, 7])
    times = [[math.inf if r else 8.0, *[slow[r]] * 30, 8.0 if r == 3 else math.inf] for r in range(4)]
    exact = partition(times).slowest_s
    publicly = max(stage_times(times, (0, *(bound + 1 for bound in public[1:-1]), 32)))
    assert exact < 0.9 * publicly


def test_noise_alone_moves_nothing() -> None:
    ring = Ring(KINDS, chain(4), noise=0.3)
    assert not any(ring.window({}, passes=4) for _ in range(200))


def test_a_move_that_is_not_paid_back_is_left_undone() -> None:
    config = BalancerConfig(horizon_s=10.0)
    costly = Ring(KINDS, chain(2), move_s=[5.0] * 32, config=config)
    cheap = Ring(KINDS, chain(2), move_s=[0.01] * 32, config=config)
    slow = {0: 2.0}
    assert not any(costly.window(slow) for _ in range(10))
    assert any(cheap.window(slow) for _ in range(10))


def test_what_a_rank_never_ran_is_judged_by_what_it_runs() -> None:
    # Rank 1 holds only the decoder and is slow at it: blocks would be slow there too.
    balancer = Balancer(["block", "block", "decode"], [[1.0, 1.0, math.inf], [1.0, 1.0, 2.0]], (0, 2, 3))
    balancer.observe(1, "decode", 6.0)
    balancer.observe(0, "block", 1.0)
    assert balancer.close_window() is None
    assert balancer.times_s() == [[1.0, 1.0, math.inf], [3.0, 3.0, 6.0]]
