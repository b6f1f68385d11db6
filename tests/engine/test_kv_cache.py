"""The cache's bookkeeping: which frame lies where, what stays, and that nothing is allocated or copied as it rolls."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine.kv_cache import KVCache
from engine.wan.presets import TransformerConfig

TOKENS = 2


def cache_of(window: int, sink: int) -> KVCache:
    config = TransformerConfig(dim=24, heads=2, layers=1, window_frames=window, sink_frames=sink)
    return KVCache(config, 1, TOKENS)


def stamped(first: int, frames: int) -> Tensor:
    """Values [1, heads, N, D] that say which frame they belong to."""
    stamp = torch.arange(first, first + frames, dtype=torch.float32).repeat_interleave(TOKENS)
    return stamp[None, None, :, None].expand(1, 2, -1, 12).clone()


def frames_in(cache: KVCache) -> list[int]:
    return [int(value) for value in cache.values[0, 0, 0, : cache.valid_frames, 0, 0]]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_the_window_holds_the_sinks_and_the_newest_frames_each_once(data: st.DataObject) -> None:
    window = data.draw(st.integers(1, 7))
    sink = data.draw(st.integers(0, window - 1))
    lengths = data.draw(st.lists(st.integers(1, window - sink), min_size=1, max_size=20))
    cache, seen = cache_of(window, sink), 0
    for length in lengths:
        cache.begin_chunk(length)
        x = stamped(seen, length)
        cache.attend(0, x, x, x)
        seen += length
        newest = list(range(max(0, seen - (window - sink)), seen))
        expected = sorted({*range(min(sink, seen)), *newest}) if seen > window else list(range(seen))
        assert sorted(frames_in(cache)) == expected
        assert frames_in(cache)[:sink] == list(range(min(sink, seen)))


def test_sinks_outlast_a_long_stream() -> None:
    cache = cache_of(4, 2)
    for index in range(500):
        cache.begin_chunk(1)
        x = stamped(index, 1)
        cache.attend(0, x, x, x)
    assert frames_in(cache)[:2] == [0, 1]
    assert sorted(frames_in(cache)[2:]) == [498, 499]


def test_all_steps_of_a_chunk_write_one_slot_and_the_last_one_stays() -> None:
    cache = cache_of(3, 1)
    for index in range(6):
        cache.begin_chunk(1)
        for step in range(4):
            x = stamped(10 * index + step, 1)
            cache.attend(0, x, x, x)
    assert sorted(frames_in(cache)) == [3, 43, 53]


def test_a_rolling_cache_keeps_its_memory() -> None:
    cache = cache_of(3, 1)
    places = cache.keys.data_ptr(), cache.values.data_ptr()
    for index in range(8):
        cache.begin_chunk(1)
        x = stamped(index, 1)
        cache.attend(0, x, x, x)
        assert (cache.keys.data_ptr(), cache.values.data_ptr()) == places


def test_keys_are_stored_unrotated() -> None:
    cache = cache_of(3, 1)
    for index in range(5):
        cache.begin_chunk(1)
        x = stamped(index, 1)
        cache.attend(0, x, x, x)
    assert torch.equal(cache.keys, cache.values)


@pytest.mark.parametrize("frames", [0, 3])
def test_a_chunk_that_does_not_fit_is_refused(frames: int) -> None:
    with pytest.raises(ValueError, match="must hold 1 to 2"):
        cache_of(3, 1).begin_chunk(frames)
