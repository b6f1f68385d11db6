from hypothesis import given
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
