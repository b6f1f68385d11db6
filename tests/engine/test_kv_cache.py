"""The pool's bookkeeping: which frame lies where, what stays, where each stands in time, and that memory stays put."""

import itertools
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine.config import CacheConfig
from engine.kv_cache import CacheRow, CacheView, KVPool
from engine.wan.presets import TransformerConfig

GRID, TOKENS, HEADS, HEAD_DIM = (1, 2), 2, 2, 12
LOOKS = 24


def pool_of(window: int, sinks: int, rows: int = 1, *, layers: int = 1, **cache: object) -> KVPool:
    config = TransformerConfig(dim=24, heads=HEADS, layers=layers, window_frames=window, sink_frames=sinks)
    return KVPool(config, GRID, rows, cache=CacheConfig.model_validate(cache))


def stamped(first: int, frames: int, rows: int = 1) -> Tensor:
    """Keys or values [B, N, G, D] that say which frame they belong to."""
    stamp = torch.arange(first, first + frames, dtype=torch.float32).repeat_interleave(TOKENS)
    return stamp[None, :, None, None].expand(rows, -1, HEADS, HEAD_DIM).clone()


def write(pool: KVPool, rows: Sequence[CacheRow], first: int, frames: int = 1, *, sink: Tensor | None = None,
          look: Tensor | None = None) -> CacheView:  # fmt: skip
    view = pool.view(rows, pool.advance(rows, frames, sink=sink, look_BE=look))
    x = stamped(first, frames, len(rows))
    for layer in range(len(pool.keys)):
        view.attend(layer, x, x, x)
    return view


def held(pool: KVPool, row: CacheRow) -> list[int]:
    """Frame indices by slot, as the bookkeeping has them."""
    return [int(index) for index in pool.held[row.index]]


def frames_in(pool: KVPool, row: CacheRow) -> list[int]:
    """Frames by slot, as they were written; those in the valid slots."""
    filled = pool.held[row.index] >= 0
    return [int(value) for value in pool.values[0][row.index, filled, 0, 0, 0]]


def places(pool: KVPool, row: CacheRow, slots: Tensor) -> list[int]:
    return [int(place) for place in pool._places(pool.held[[row.index]], slots)[0]]


def look(*values: float) -> Tensor:
    """What a frame looks like: the given numbers, then zeros."""
    return torch.tensor([[*values, *[0.0] * (LOOKS - len(values))]])


# --- slots


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_the_window_holds_the_sinks_and_the_newest_frames_each_once(data: st.DataObject) -> None:
    window = data.draw(st.integers(1, 7))
    sinks = data.draw(st.integers(0, window - 1))
    lengths = data.draw(st.lists(st.integers(1, window - sinks), min_size=1, max_size=12))
    positions = data.draw(st.sampled_from(("relative", "absolute", "refresh")))
    pool, seen = pool_of(window, sinks, positions=positions, refresh_at=window + 5), 0
    (row,) = pool.lease(1)
    for length in lengths:
        view = write(pool, [row], seen, length)
        seen += length
        newest = range(max(0, seen - (window - sinks)), seen)
        expected = sorted({*range(min(sinks, seen)), *newest}) if seen > window else list(range(seen))
        assert sorted(frames_in(pool, row)) == expected
        assert frames_in(pool, row)[:sinks] == list(range(min(sinks, seen)))
        assert (view.valid, row.seen) == (min(window, seen), seen)
        assert view.lengths.valid.tolist() == [view.valid * TOKENS]
        written = view.slots.tolist()
        assert len(set(written)) == length
        assert [int(pool.values[0].flatten(0, 1)[slot, 0, 0, 0]) for slot in written] == [*range(seen - length, seen)]


def test_sinks_outlast_a_long_stream() -> None:
    pool = pool_of(4, 2)
    (row,) = pool.lease(1)
    for index in range(200):
        write(pool, [row], index)
    assert frames_in(pool, row)[:2] == [0, 1]
    assert sorted(frames_in(pool, row)[2:]) == [198, 199]


def test_all_steps_of_a_chunk_write_one_slot_and_the_last_one_stays() -> None:
    pool = pool_of(3, 1)
    (row,) = pool.lease(1)
    for index in range(6):
        slots = pool.advance([row], 1)
        for step in range(4):
            x = stamped(10 * index + step, 1)
            pool.view([row], slots).attend(0, x, x, x)
    assert sorted(frames_in(pool, row)) == [3, 43, 53]


def test_rows_of_unequal_fill_advance_together_as_alone() -> None:
    pool, seen = pool_of(5, 2, rows=3), (0, 3, 9)
    rows = pool.lease(3)
    for row, count in zip(rows, seen, strict=True):
        for index in range(count):
            write(pool, [row], index)
    slots = pool.advance(rows, 2)
    view = pool.view(rows, slots)
    assert [held(pool, row) for row in rows] == [[0, 1, -1, -1, -1], [0, 1, 2, 3, 4], [0, 1, 8, 9, 10]]
    assert (slots[0].tolist(), slots[1].tolist()) == ([0, 1], [3, 4])
    assert view.valid == 5
    assert view.lengths.mask is not None
    assert view.lengths.mask[:, 0, 0].tolist() == [[True] * 4 + [False] * 6, [True] * 10, [True] * 10]
    assert view.lengths.valid.tolist() == [4, 10, 10]


def test_rows_that_lie_apart_write_and_read_their_own_slots() -> None:
    pool = pool_of(3, 1, rows=4)
    rows = pool.lease(4)
    apart = [rows[3], rows[0]]
    for index in range(5):
        view = pool.view(apart, pool.advance(apart, 1))
        x = torch.cat((stamped(index, 1), stamped(100 + index, 1)))
        view.attend(0, x, x, x)
    assert view.rows is not None
    assert frames_in(pool, rows[3])[0] == 0
    assert frames_in(pool, rows[0])[0] == 100
    assert sorted(frames_in(pool, rows[0])[1:]) == [103, 104]
    assert [frames_in(pool, row) for row in rows[1:3]] == [[], []]


def test_a_rolling_pool_keeps_its_memory() -> None:
    pool = pool_of(3, 1)
    (row,) = pool.lease(1)
    tensors = (*pool.keys, *pool.values, pool.held, pool.next, pool.sink_looks)
    addresses = [tensor.data_ptr() for tensor in tensors]
    for index in range(8):
        write(pool, [row], index)
    pool.clear(row)
    now = (*pool.keys, *pool.values, pool.held, pool.next, pool.sink_looks)
    assert all(a is b for a, b in zip(tensors, now, strict=True))
    assert [tensor.data_ptr() for tensor in now] == addresses


@pytest.mark.parametrize("positions", ["relative", "refresh", "absolute"])
def test_keys_are_stored_unrotated(positions: str) -> None:
    pool = pool_of(3, 1, positions=positions, refresh_at=4)
    (row,) = pool.lease(1)
    for index in range(9):
        write(pool, [row], index)
    assert torch.equal(pool.keys[0], pool.values[0])


@pytest.mark.parametrize("frames", [0, 3])
def test_a_chunk_that_does_not_fit_is_refused(frames: int) -> None:
    pool = pool_of(3, 1)
    with pytest.raises(ValueError, match="must hold 1 to 2"):
        pool.advance(pool.lease(1), frames)


# --- leases


def test_a_lease_is_empty_and_given_back_once() -> None:
    pool = pool_of(3, 1, rows=3)
    first, second = pool.lease(2), pool.lease(1)
    for index in range(4):
        write(pool, first, index)
    with pytest.raises(MemoryError, match="1 cache rows asked for, 0 free: close a stream"):
        pool.lease(1)
    pool.release(first)
    again = pool.lease(2)
    assert sorted(row.index for row in (*again, *second)) == [0, 1, 2]
    for row in again:
        assert (row.seen, int(pool.next[row.index]), held(pool, row)) == (0, 0, [-1, -1, -1])
        assert not any(x[row.index].any() for x in (*pool.keys, *pool.values, pool.sink_looks))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.one_of(st.integers(1, 3), st.just(0)), max_size=30))
def test_no_row_is_ever_leased_twice(steps: list[int]) -> None:
    pool = pool_of(2, 1, rows=6)
    leased: list[list[CacheRow]] = []
    for count in steps:
        if count == 0 and leased:
            pool.release(leased.pop(0))
        elif count and count + sum(map(len, leased)) <= 6:
            leased.append(pool.lease(count))
        indices = [row.index for rows in leased for row in rows]
        assert len(indices) == len(set(indices))
    assert len(pool.lease(6 - sum(map(len, leased)))) == 6 - sum(map(len, leased))


def test_rows_of_one_lease_lie_together_so_that_they_are_read_in_place() -> None:
    pool = pool_of(2, 1, rows=5)
    pool.release(pool.lease(5)[::-1])
    rows = pool.lease(4)
    assert pool.view(rows, pool.advance(rows, 1)).rows is None


def test_a_copied_row_holds_what_its_source_holds_and_goes_its_own_way() -> None:
    pool = pool_of(3, 1, rows=2, layers=2)
    source, target = pool.lease(2)
    for index in range(5):
        write(pool, [source], index, look=look(1.0, index))
    pool.copy_row(source, target)
    for tensor in (*pool.keys, *pool.values, pool.held, pool.next, pool.sink_looks):
        assert torch.equal(tensor[0], tensor[1])
    assert target.seen == source.seen
    write(pool, [target], 99)
    assert 99 not in frames_in(pool, source)
    assert 99 in frames_in(pool, target)


# --- positions


@pytest.mark.parametrize("sinks", [0, 1, 3])
def test_relative_positions_are_places_in_the_window(sinks: int) -> None:
    pool = pool_of(6, sinks)
    (row,) = pool.lease(1)
    for index in range(40):
        slots = pool.advance([row], 1)
        by_frame = dict(zip(held(pool, row), places(pool, row, slots), strict=True))
        filled = sorted(frame for frame in by_frame if frame >= 0)
        assert [by_frame[frame] for frame in filled] == list(range(len(filled)))
        assert by_frame[index] == min(index, 5)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 3), min_size=1, max_size=60), st.sampled_from((None, 0.5)))
def test_relative_positions_never_leave_the_window_however_long_the_stream(
    lengths: list[int], sink_ema: float | None
) -> None:
    pool = pool_of(6, 3, sink_ema=sink_ema)
    (row,) = pool.lease(1)
    pool.next.fill_(10**9)
    for length in lengths:
        slots = pool.advance([row], length)
        now = places(pool, row, slots)
        assert sorted(now) == list(range(6))
        assert max(place for place, frame in zip(now, held(pool, row), strict=True) if frame >= 0) == (
            min(row.seen, 6) - 1
        )


def test_absolute_positions_are_frame_indices_and_grow() -> None:
    pool = pool_of(4, 2, positions="absolute")
    (row,) = pool.lease(1)
    for _ in range(1500):
        slots = pool.advance([row], 1)
    assert sorted(places(pool, row, slots)) == [0, 1, 1498, 1499]


def streamed(pool: KVPool, chunks: int, *, first: int = 0) -> list[Tensor]:
    """What attention gives for random queries, keys and values, chunk after chunk, the first at index `first`."""
    random = torch.Generator().manual_seed(1)
    (row,) = pool.lease(1)
    pool.next[row.index] = first
    out = []
    for _ in range(chunks):
        q, k, v = torch.randn(3, 1, TOKENS, HEADS, HEAD_DIM, generator=random).unbind(0)
        out.append(pool.view([row], pool.advance([row], 1)).attend(0, q, k, v))
    return out


def test_a_shift_of_all_positions_leaves_the_result_as_it_is() -> None:
    near = streamed(pool_of(6, 3, positions="absolute"), 12)
    for shift in (5000, 100_000):
        far = streamed(pool_of(6, 3, positions="absolute"), 12, first=shift)
        for a, b in zip(near, far, strict=True):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=0)


def test_rotation_tables_stay_exact_far_out() -> None:
    """Scores depend on distance alone, to 1e-6, because angles are formed in float64."""
    pool = pool_of(6, 3, positions="absolute")
    q, k = torch.randn(2, TOKENS, HEAD_DIM, generator=torch.Generator().manual_seed(2)).unbind(0)

    def score(position: int) -> Tensor:
        # [1, M * N, 1, D] for two frames: cosines of each pair twice, its sine in the second half.
        tables = pool._rotation(torch.tensor([[position, position + 3]]))
        pairs = HEAD_DIM // 2
        turns = torch.complex(tables.cos[..., :pairs].double(), tables.sin[..., pairs:].double())[0, :, 0]
        first, second = (torch.complex(*x.double().chunk(2, -1)) for x in (q, k))
        return ((first * turns[TOKENS:]) * (second * turns[:TOKENS]).conj()).real.sum(-1)

    for position in (1024, 5000, 1_000_000):
        torch.testing.assert_close(score(position), score(0), atol=1e-6, rtol=0)


def test_until_the_limit_a_refreshed_stream_equals_an_absolute_one_and_never_passes_it() -> None:
    refreshed, absolute = (
        pool_of(6, 3, positions="refresh", refresh_at=20),
        pool_of(6, 3, positions="absolute"),
    )
    (row,), (other,) = refreshed.lease(1), absolute.lease(1)
    for index in range(200):
        slots = refreshed.advance([row], 1)
        if index < 20:
            assert torch.equal(slots, absolute.advance([other], 1))
            assert torch.equal(refreshed.held, absolute.held)
        now = dict(zip(held(refreshed, row), range(6), strict=True))
        assert max(now) < 20
        # Sinks where they began, the rolling frames next to each other, the current one last.
        rolling = sorted(held(refreshed, row)[3:])
        if index >= 6:
            assert held(refreshed, row)[:3] == [0, 1, 2]
            assert rolling == list(range(rolling[0], rolling[0] + 3))
            assert int(slots) == now[rolling[-1]]
    assert max(now) < 20


def test_at_the_limit_kept_frames_move_with_the_index() -> None:
    pool = pool_of(6, 3, positions="refresh", refresh_at=10)
    (row,) = pool.lease(1)
    for _ in range(10):
        pool.advance([row], 1)
    before = held(pool, row)
    assert sorted(before) == [0, 1, 2, 7, 8, 9]
    slots = pool.advance([row], 1)
    # 7 was overwritten; 8, 9 and the new one are a full window's last three.
    assert [held(pool, row)[before.index(frame)] for frame in (0, 1, 2, 8, 9)] == [0, 1, 2, 3, 4]
    assert (held(pool, row)[int(slots)], int(pool.next[row.index])) == (5, 6)


def test_a_refresh_leaves_the_result_of_a_stream_without_sinks_as_it_is() -> None:
    """All distances within the rolling window are kept, so only sinks come nearer."""
    refreshed = streamed(pool_of(4, 0, positions="refresh", refresh_at=6), 30)
    absolute = streamed(pool_of(4, 0, positions="absolute"), 30)
    for a, b in zip(refreshed, absolute, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0)


def test_a_limit_within_the_window_is_refused() -> None:
    with pytest.raises(ValueError, match="refresh_at 6 must be above window_frames 6"):
        pool_of(6, 3, positions="refresh", refresh_at=6)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.booleans(), min_size=1, max_size=60), st.integers(7, 12))
def test_refreshed_positions_stay_valid_when_frames_took_the_place_of_sinks(
    replaces: list[bool], refresh_at: int
) -> None:
    """Rolling frames may then lie far apart in time; none may fall out of the window by being moved."""
    pool = pool_of(6, 3, positions="refresh", refresh_at=refresh_at, sink_refresh=0.5)
    (row,) = pool.lease(1)
    for _ in range(6):
        pool.advance([row], 1)
    for turn, replace in enumerate(replaces):
        oldest = min(range(3, 6), key=lambda slot: pool.held[row.index, slot].item())
        slots = pool.advance([row], 1, sink=torch.tensor([turn % 3 if replace else -1]))
        assert slots.item() == (turn % 3 if replace else oldest)
        assert min(held(pool, row)) >= 0
        assert max(held(pool, row)) < refresh_at


# --- sinks


def filled(pool: KVPool, row: CacheRow, looks: Sequence[Tensor]) -> None:
    for index, each in enumerate(looks):
        write(pool, [row], index, look=each)


def test_the_sink_least_alike_is_replaced_below_the_threshold_alone() -> None:
    pool = pool_of(5, 3, sink_refresh=0.5)
    (row,) = pool.lease(1)
    filled(pool, row, [look(1.0), look(1.0, 1.0), look(0.2, 1.0), look(1.0), look(1.0)])
    alike = pool.choose_sinks([row], look(1.0, 1.0))
    assert alike is not None and alike.tolist() == [-1]  # cosines 0.71, 1, 0.83
    unlike = pool.choose_sinks([row], look(1.0, -0.2))
    assert unlike is not None and unlike.tolist() == [2]  # cosines 0.98, 0.55, 0
    write(pool, [row], 50, sink=unlike, look=look(1.0, -0.2))
    assert frames_in(pool, row) == [0, 1, 50, 3, 4]
    torch.testing.assert_close(pool.sink_looks[row.index, 2], look(1.0, -0.2)[0])
    # The rolling part goes on where it was, its oldest first.
    write(pool, [row], 51, sink=torch.tensor([-1]), look=look(1.0))
    assert frames_in(pool, row) == [0, 1, 50, 51, 4]
    assert pool.sink_looks[row.index, 2, 1] == pytest.approx(-0.2)


def test_no_sink_is_replaced_before_the_window_is_full_nor_without_the_setting() -> None:
    pool, off = pool_of(5, 3, sink_refresh=1.0), pool_of(5, 3)
    rows, others = pool.lease(1), off.lease(1)
    for index in range(5):
        assert pool.choose_sinks(rows, look(-1.0, index)) is None
        for each, these in ((pool, rows), (off, others)):
            write(each, these, index, look=look(1.0, index))
    assert pool.choose_sinks(rows, look(-1.0)) is not None
    assert off.choose_sinks(others, look(-1.0)) is None


def test_a_replaced_sink_keeps_its_place_among_the_sinks() -> None:
    pool = pool_of(5, 3, sink_refresh=0.5)
    (row,) = pool.lease(1)
    filled(pool, row, [look(1.0)] * 5)
    slots = pool.advance([row], 1, sink=torch.tensor([1]))
    # While it is the current chunk it is the newest of all.
    assert places(pool, row, slots) == [0, 4, 1, 2, 3]
    slots = pool.advance([row], 1)
    assert places(pool, row, slots) == [0, 1, 2, 4, 3]


def test_evicted_frames_are_averaged_into_the_sinks_in_turn() -> None:
    pool = pool_of(4, 2, layers=2, sink_ema=0.75)
    (row,) = pool.lease(1)
    for index in range(4):
        write(pool, [row], index)
    sinks = [0.0, 1.0]
    for index, evicted in ((4, 2), (5, 3), (6, 4), (7, 5)):
        write(pool, [row], index)
        sinks[evicted % 2] = 0.75 * sinks[evicted % 2] + 0.25 * evicted
        for store in (*pool.keys, *pool.values):
            torch.testing.assert_close(store[row.index, :2, 0, 0, 0], torch.tensor(sinks))
    assert held(pool, row)[:2] == [0, 1]


def test_each_row_loses_its_own_frames_into_its_own_sinks_whoever_is_beside_it() -> None:
    together, alone = pool_of(4, 2, rows=2, sink_ema=0.5), pool_of(4, 2, rows=2, sink_ema=0.5)
    pairs = together.lease(2), alone.lease(2)
    for pool, rows in zip((together, alone), pairs, strict=True):
        for index in range(5):
            write(pool, rows[:1], index)
        write(pool, rows[1:], 0)  # the second row is far from full
    for index in range(5, 9):
        write(together, pairs[0], index)
        for row in pairs[1]:
            write(alone, [row], index)
    assert torch.equal(together.keys[0], alone.keys[0])


def test_two_ways_to_renew_sinks_are_refused() -> None:
    with pytest.raises(ValueError, match="set one of them"):
        CacheConfig(sink_refresh=0.5, sink_ema=0.5)


def test_indices_stay_whole_numbers_of_64_bits() -> None:
    """At 16 fps a stream's index passes 2 ** 31 in 17 years; ranks of empty and current slots lie above it."""
    pool = pool_of(4, 1)
    (row,) = pool.lease(1)
    pool.next[row.index] = 2**31 - 3
    for _ in range(3):
        slots = pool.advance([row], 1)
    assert pool.held.dtype == torch.int64
    assert places(pool, row, slots) == list(range(4))
    assert all(a < b for a, b in itertools.pairwise(held(pool, row)[:3]))
