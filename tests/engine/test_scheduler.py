from hypothesis import given, settings
from hypothesis import strategies as st

from engine.scheduler import MAX_WAITING, Item, Scheduler


def item(stream: int, chunk: int, deadline: float) -> Item:
    return Item(stream, chunk, slot=chunk % 4, frames=4, deadline=deadline)


def test_earliest_deadline_goes_first_across_streams() -> None:
    scheduler = Scheduler()
    for stream, deadline in ((0, 3.0), (1, 1.0), (2, 2.0)):
        scheduler.open(stream)
        assert scheduler.push(item(stream, 0, deadline)) == []
    order = [scheduler.pick(0.0, 0.1)[0] for _ in range(3)]
    assert [picked.stream for picked in order if picked] == [1, 2, 0]
    assert scheduler.pick(0.0, 0.1) == (None, [])


def test_a_full_stream_drops_its_oldest_chunk_whole() -> None:
    scheduler = Scheduler()
    scheduler.open(0)
    drops = [drop for chunk in range(MAX_WAITING + 2) for drop in scheduler.push(item(0, chunk, 9.0))]
    assert [(drop.item.chunk, drop.reason) for drop in drops] == [(0, "engine_behind"), (1, "engine_behind")]


def test_a_late_chunk_is_given_up_only_for_a_newer_one_of_its_stream() -> None:
    scheduler = Scheduler()
    scheduler.open(0)
    scheduler.push(item(0, 0, deadline=1.0))
    picked, drops = scheduler.pick(now=5.0, cost_s=0.1)
    assert picked is not None and picked.chunk == 0 and not drops
    scheduler.push(item(0, 1, deadline=1.0))
    scheduler.push(item(0, 2, deadline=1.5))
    picked, drops = scheduler.pick(now=5.0, cost_s=0.1)
    assert picked is not None and picked.chunk == 2
    assert [(drop.item.chunk, drop.reason) for drop in drops] == [(1, "late")]


def test_a_chunk_of_a_closed_stream_is_dropped() -> None:
    scheduler = Scheduler()
    scheduler.open(0)
    scheduler.push(item(0, 0, 1.0))
    scheduler.close(0)
    assert scheduler.pick(0.0, 0.1) == (None, [])
    assert [drop.reason for drop in scheduler.push(item(0, 1, 1.0))] == ["stream_closed"]


@settings(deadline=None)
@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("push"), st.integers(0, 3), st.floats(0, 10)),
            st.tuples(st.just("pick"), st.just(0), st.floats(0, 10)),
        ),
        max_size=80,
    )
)
def test_every_chunk_is_rendered_or_dropped_exactly_once_and_in_order(steps: list[tuple[str, int, float]]) -> None:
    scheduler = Scheduler()
    for stream in range(4):
        scheduler.open(stream)
    pushed: list[Item] = []
    ended: list[Item] = []
    rendered: list[Item] = []

    def pick(now: float) -> bool:
        picked, drops = scheduler.pick(now, 0.1)
        ended.extend(drop.item for drop in drops)
        if picked:
            ended.append(picked)
            rendered.append(picked)
        return picked is not None

    for action, stream, instant in steps:
        if action == "push":
            pushed.append(item(stream, len(pushed), instant))
            ended.extend(drop.item for drop in scheduler.push(pushed[-1]))
        else:
            pick(instant)
    while pick(0.0):
        pass
    assert sorted(i.chunk for i in ended) == [i.chunk for i in pushed]
    for stream in range(4):
        chunks = [i.chunk for i in rendered if i.stream == stream]
        assert chunks == sorted(chunks)


# --- several streams in one pass


def waiting(*deadlines: float) -> Scheduler:
    """Stream n with one chunk due at the n-th deadline."""
    scheduler = Scheduler()
    for stream, deadline in enumerate(deadlines):
        scheduler.open(stream)
        scheduler.push(item(stream, stream, deadline))
    return scheduler


def test_a_pass_takes_the_earliest_of_each_stream_up_to_its_limit() -> None:
    scheduler = waiting(9.0, 7.0, 8.0)
    scheduler.push(item(1, 3, 7.5))  # the second of a stream waits for the next pass
    first, _ = scheduler.pick_batch(0.0, 0.1, 2)
    assert [(each.stream, each.deadline) for each in first] == [(1, 7.0), (2, 8.0)]
    second, _ = scheduler.pick_batch(0.0, 0.1, 4)
    assert [(each.stream, each.deadline) for each in second] == [(1, 7.5), (0, 9.0)]
    assert scheduler.pick_batch(0.0, 0.1, 4) == ([], [])


def test_chunks_join_only_while_the_first_would_still_be_in_time() -> None:
    # Three at 0.3 s each end at 0.9; the fourth would make the first one late.
    batch, drops = waiting(1.0, 1.1, 1.2, 1.3).pick_batch(0.0, 0.3, 4)
    assert [each.stream for each in batch] == [0, 1, 2]
    assert not drops
    assert [each.stream for each in waiting(0.1, 5.0).pick_batch(0.0, 0.3, 4)[0]] == [0]


def test_equal_deadlines_go_by_stream_so_that_a_pass_is_the_same_every_time() -> None:
    assert [each.stream for each in waiting(5.0, 5.0, 5.0).pick_batch(0.0, 0.1, 2)[0]] == [0, 1]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.floats(0, 10), max_size=3), min_size=1, max_size=5),
    st.floats(0, 10),
    st.floats(0.01, 3),
    st.integers(1, 5),
)
def test_passes_take_every_chunk_once_in_order_and_never_make_the_first_late(
    deadlines: list[list[float]], now: float, cost_s: float, limit: int
) -> None:
    scheduler = Scheduler()
    pushed: list[Item] = []
    ended: list[Item] = []
    for stream, each in enumerate(deadlines):
        scheduler.open(stream)
        for deadline in sorted(each):
            pushed.append(item(stream, len(pushed), deadline))
            ended += [drop.item for drop in scheduler.push(pushed[-1])]
    taken: list[Item] = []
    while True:
        batch, drops = scheduler.pick_batch(now, cost_s, limit)
        ended += [drop.item for drop in drops]
        assert all(drop.reason == "late" and drop.item.deadline < now + cost_s for drop in drops)
        if not batch:
            break
        assert len(batch) <= limit
        assert len({each.stream for each in batch}) == len(batch)
        assert [each.deadline for each in batch] == sorted(each.deadline for each in batch)
        assert len(batch) == 1 or now + len(batch) * cost_s <= batch[0].deadline
        taken += batch
    ended += taken
    assert sorted(each.chunk for each in ended) == [each.chunk for each in pushed]
    for stream in range(len(deadlines)):
        chunks = [each.chunk for each in taken if each.stream == stream]
        assert chunks == sorted(chunks)
        # Work conserving: a stream that had something showed something.
        assert bool(chunks) == bool(deadlines[stream])
