"""W ranks give bit for bit what one gives, streams coming, changing and going, blocks moving; and end as a unit."""

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from random import Random

import pytest
import torch
from torch import Tensor
from torch._C._distributed_c10d import TCPStore

from engine.api import EngineError, RankLost, StreamParams
from engine.chain import chain_of
from engine.partition import PartitionError, even_split, partition, stage_times
from engine.pipeline import Mode, Pipeline
from engine.ring_group import RingGroup, RingResult
from engine.ring_orders import Change, Kind, Layout, Order
from engine.ring_pace import WINDOW_PASSES
from engine.ring_rank import RingSpec, first_bounds, make_head, rooms_of
from engine.transport import meet
from engine.wan.weights import Model
from tests.engine.ring_models import BLOCK_S, PACED_LAYERS, Paced, averaged, embedded, flow, light, renewed, wan
from tests.engine.streams import camera

WIDTH, HEIGHT = 32, 48
Results = dict[tuple[str, int], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Step:
    """One thing that happens: a stream opens, is given a chunk or other parameters, or closes; or blocks move."""

    what: str
    stream: str = ""
    params: StreamParams | None = None
    chunk: int = 0
    first: bool = False
    bounds: tuple[int, ...] = ()


def params(prompt: str = "neon", **values: object) -> StreamParams:
    return StreamParams.model_validate({"prompt": prompt, **values})


def chunk(step: Step, width: int, height: int) -> Tensor:
    return torch.from_numpy(camera(5 if step.first else 4, step.chunk, width=width, height=height))


def camera_tensor(index: int) -> Tensor:
    return torch.from_numpy(camera(5 if index == 0 else 4, index, width=WIDTH, height=HEIGHT))


def feed(stream: str, chunks: range, *, fresh: bool = False) -> list[Step]:
    return [Step("submit", stream, chunk=n, first=fresh and n == chunks.start) for n in chunks]


def mixed(streams: Sequence[list[Step]]) -> list[Step]:
    """The steps of several streams in turns."""
    longest = max(len(steps) for steps in streams)
    return [steps[n] for n in range(longest) for steps in streams if n < len(steps)]


def story() -> list[Step]:
    """Streams of 1 to 4 steps that open, change their prompt with and without a new cache, their steps and strength,
    and close; every chunk of every stream is answered before it closes."""
    a = [Step("open", "a", params(steps=4, seed=1)), *feed("a", range(7), fresh=True)]
    a += [Step("update", "a", params("oil painting", steps=4, seed=1, recache=True)), *feed("a", range(7, 10))]
    a += [Step("update", "a", params("oil painting", steps=4, seed=1, strength=0)), *feed("a", range(10, 12))]
    a += [Step("update", "a", params("neon", steps=2, seed=1, transition_chunks=2)), *feed("a", range(12, 16))]
    b = [Step("open", "b", params("pencil sketch", steps=1)), *feed("b", range(20, 25), fresh=True)]
    b += [Step("update", "b", params("watercolour", steps=1, strength=0.6)), *feed("b", range(25, 28))]
    c = [Step("open", "c", params(steps=2, seed=3)), *feed("c", range(30, 37), fresh=True)]
    d = [Step("open", "d", params(steps=3, seed=4)), *feed("d", range(40, 47), fresh=True)]
    return [*mixed([a[:9], b, c]), Step("settle"), Step("close", "b"), *mixed([a[9:], d]), Step("settle")]


STORY = story()


class Alone:
    """A ring of one rank, in this process."""

    def __init__(self, model: Model, mode: Mode, width: int, height: int) -> None:
        self.head, _ = make_head(model, RingSpec(1, width, height, mode=mode, raw=True), 0)
        self.size = (width, height)

    def play(self, steps: Sequence[Step]) -> Results:
        head = self.head
        for step in steps:
            if step.what == "open" and step.params is not None:
                head.join(step.stream, step.params)
            elif step.what == "update" and step.params is not None:
                head.update(step.stream, step.params)
            elif step.what == "submit":
                head.submit(step.stream, chunk(step, *self.size))
            elif step.what == "close":
                head.leave(step.stream)
            head.fill()
        results: Results = {}
        for done in head.done:
            assert done.item is not None
            assert done.pixels is not None
            assert (done.key, done.chunk) not in results
            results[done.key, done.chunk] = done.item.clean[0], done.pixels
        return results


def play(group: RingGroup, steps: Sequence[Step], width: int = WIDTH, height: int = HEIGHT) -> Results:
    results: Results = {}

    def keep(done: Sequence[RingResult]) -> None:
        for result in done:
            assert result.latent is not None
            assert result.pixels is not None
            # Each once, and in order.
            assert result.chunk == sum(stream == result.stream for stream, _ in results)
            results[result.stream, result.chunk] = result.latent, result.pixels

    for step in steps:
        if step.what == "open" and step.params is not None:
            group.open(step.stream, step.params)
        elif step.what == "update" and step.params is not None:
            group.update(step.stream, step.params)
        elif step.what == "submit":
            group.submit(step.stream, chunk(step, width, height))
        elif step.what == "move":
            group.move(step.bounds)
        elif step.what == "settle":
            keep(group.finish())
        elif step.what == "close":
            group.close_stream(step.stream)
    keep(group.finish())
    return results


def assert_same(results: Results, expected: Results) -> None:
    assert results.keys() == expected.keys()
    for key, (latent, pixels) in expected.items():
        assert torch.equal(results[key][0], latent), key
        assert torch.equal(results[key][1], pixels), key


def close_all(group: RingGroup, *streams: str) -> None:
    for stream in streams:
        group.close_stream(stream)


MODELS: dict[str, Callable[[int], Model]] = {
    "averaged sinks": averaged,
    "new sinks": renewed,
    "flow": flow,
    "wan": wan,
    "light": light,
}


@pytest.fixture(
    scope="module", params=[(2, "averaged sinks"), (3, "new sinks"), (4, "flow"), (3, "wan"), (2, "light")], ids=str
)
def pair(request: pytest.FixtureRequest) -> Iterator[tuple[RingGroup, Model]]:
    """A ring, and its model here."""
    ranks, name = request.param
    with RingGroup(MODELS[name], RingSpec(ranks, WIDTH, HEIGHT, raw=True)) as group:
        yield group, MODELS[name](0)


@pytest.fixture
def ring(pair: tuple[RingGroup, Model]) -> RingGroup:
    return pair[0]


@pytest.fixture
def expected(pair: tuple[RingGroup, Model]) -> Results:
    return Alone(pair[1], "batch", WIDTH, HEIGHT).play(STORY)


def test_many_ranks_are_one_bit_for_bit(ring: RingGroup, expected: Results) -> None:
    results = play(ring, STORY)
    assert_same(results, expected)
    counts = {stream: sum(key[0] == stream for key in results) for stream in "abcd"}
    assert counts == {"a": 16, "b": 8, "c": 7, "d": 7}
    close_all(ring, "a", "c", "d")


def test_blocks_move_at_any_time_without_a_trace(ring: RingGroup, expected: Results) -> None:
    before = ring.stats()
    units, random = len(before.kinds), Random(ring.spec.ranks)
    plans = [
        (0, *[units] * ring.spec.ranks),
        (0, *[0] * (ring.spec.ranks - 1), units),
        even_split(ring.spec.ranks, units),
    ]
    # And any others: cuts in the autoencoder and the refiner, ranks with nothing.
    plans += [(0, *sorted(random.choices(range(units + 1), k=ring.spec.ranks - 1)), units) for _ in range(8)]
    moving = [step for n, one in enumerate(STORY) for step in (one, Step("move", bounds=plans[n % len(plans)]))]
    results = play(ring, moving)
    assert_same(results, expected)
    assert ring.stats().epoch > before.epoch + 20
    close_all(ring, "a", "c", "d")


def test_the_ring_of_one_rank_is_the_plain_pipeline() -> None:
    for steps in range(1, 5):
        for mode in ("sequential", "batch"):
            model = flow(0)
            given = [Step("open", "a", params(steps=steps)), *feed("a", range(9), fresh=True)]
            results = Alone(model, mode, WIDTH, HEIGHT).play(given)
            pipeline = Pipeline(model, WIDTH, HEIGHT, streams=1, mode=mode)
            state = pipeline.open(params(steps=steps))
            finished = {}
            with torch.inference_mode():
                pipeline.advance_prompts(state)
                for step in given[1:]:
                    pixels = chunk(step, WIDTH, HEIGHT).permute(0, 3, 1, 2).float().contiguous().mul_(1 / 127.5).sub_(1)
                    for item in pipeline.denoise([pipeline.take_in(state, pixels)]):
                        finished[item.chunk] = item.clean[0], pipeline.decode(item)
                for item in pipeline.drain(state):
                    finished[item.chunk] = item.clean[0], pipeline.decode(item)
            assert len(finished) == len(results) == 9
            for number, (latent, pixels) in finished.items():
                same = results["a", number]
                if mode == "sequential" or steps == 1:
                    assert torch.equal(same[0], latent)
                    assert torch.equal(same[1], pixels)
                # Rows that share a pass round otherwise.
                assert (same[0] - latent).abs().max() <= 1e-5 * latent.abs().max()


def test_the_embedded_model_over_two_ranks_is_itself() -> None:
    steps = [Step("open", "a", params(steps=2)), Step("open", "b", params("oil painting", steps=1))]
    steps += mixed([feed("a", range(6)), feed("b", range(10, 16))])
    with RingGroup(embedded, RingSpec(2, 64, 64, raw=True, bounds=(0, 8, 16))) as group:
        results = play(group, steps, 64, 64)
        stats = group.stats()
    assert stats.bounds == (0, 8, 16)
    # Frames come back over the wire; both of its ends count what passed, rank 1 up to its last message but one.
    frames = sum(pixels.nbytes for _, pixels in results.values())
    assert frames < min(stats.wire_bytes) and min(stats.wire_s) > 0
    assert max(stats.wire_bytes) < 1.2 * min(stats.wire_bytes)
    assert_same(results, Alone(embedded(0), "batch", 64, 64).play(steps))


def test_units_lie_where_their_memory_fits_from_the_start_and_as_they_move() -> None:
    model = flow(0)
    chain = chain_of(model, WIDTH, HEIGHT, span=1, streams=4, rows=16)
    whole = sum(chain.unit_bytes)
    # Room for nothing that is kept, then for a third, then for all.
    room = (0.0, whole / 3, float(whole))
    steps = [Step("open", "a", params(steps=2)), *feed("a", range(2 * WINDOW_PASSES))]
    with RingGroup(flow, RingSpec(3, WIDTH, HEIGHT, raw=True, balance=True, capacity_bytes=room)) as group:
        begun = group.stats().bounds
        results = play(group, steps)
        bounds = group.stats().bounds
    assert begun != even_split(3, chain.units)
    for split in (begun, bounds):
        held = [sum(chain.unit_bytes[begin:end]) for begin, end in pairwise(split)]
        assert all(size <= most for size, most in zip(held, room, strict=True)) and sum(held) == whole
    assert_same(results, Alone(model, "batch", WIDTH, HEIGHT).play(steps))
    with pytest.raises(PartitionError, match="do not fit"):
        first_bounds(chain, (whole / 3, whole / 3))


def test_every_rank_tells_the_others_what_it_has_room_for() -> None:
    store = TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
    context = multiprocessing.get_context("spawn")
    with context.Pool(3) as pool:
        told = pool.starmap(rooms_told, [(rank, store.port) for rank in range(3)], chunksize=1)
    assert told == [(1e9, 2e9, 3e9)] * 3


def rooms_told(rank: int, port: int) -> tuple[float, ...]:
    meet(rank, 3, port)
    return rooms_of(RingSpec(3, WIDTH, HEIGHT), rank, lambda: 1e9 * (rank + 1))


def test_blocks_leave_a_slow_rank_and_come_back(tmp_path: Path) -> None:
    """At least 95 % of the best split's throughput, by what the slowest rank has to do in a pass."""
    slow = tmp_path / "slow"
    spec = RingSpec(2, WIDTH, HEIGHT, balance=True, waiting=4)
    steps = iter(range(10**6))

    def settle(group: RingGroup, factor: int) -> float:
        """Chunks until the blocks stay where they are; returns the share of the best split's throughput."""
        epoch, calm = -1, 0
        for _ in range(40):
            for _ in range(10):
                group.submit("a", camera_tensor(next(steps)))
            group.finish()
            stats = group.stats()
            calm = calm + 1 if stats.epoch == epoch else 0
            epoch = stats.epoch
            # What is slept, and nothing else: by it the machine's other work does not decide.
            blocks = [BLOCK_S if kind == "block" else 0.0 for kind in stats.kinds]
            assert sum(blocks) == pytest.approx(PACED_LAYERS * BLOCK_S)
            times = [blocks, [factor * block_s for block_s in blocks]]
            share = partition(times).slowest_s / max(stage_times(times, stats.bounds))
            if share >= 0.95 and calm >= 3:
                break
        return share

    with RingGroup(Paced(slow), spec) as group:
        group.open("a", params())
        assert settle(group, 1) >= 0.95
        slow.touch()
        before = group.stats()
        assert settle(group, 2) >= 0.95
        there = group.stats()
        assert there.epoch > before.epoch and there.bounds[1] > before.bounds[1]
        slow.unlink()
        assert settle(group, 1) >= 0.95
        assert group.stats().bounds[1] < there.bounds[1]


def test_what_cannot_be_done_is_refused_and_the_rest_goes_on(ring: RingGroup) -> None:
    ring.open("a", params())
    with pytest.raises(EngineError, match="'a' is open already"):
        ring.open("a", params())
    with pytest.raises(EngineError, match="'x' is not open"):
        ring.submit("x", torch.zeros(4, HEIGHT, WIDTH, 3, dtype=torch.uint8))
    with pytest.raises(EngineError, match="'x' is not open"):
        ring.close_stream("x")
    with pytest.raises(EngineError, match="must rise from 0 to"):
        ring.move((0, 9))
    for stream in "bcd":
        ring.open(stream, params())
    with pytest.raises(EngineError, match="cache rows asked for"):
        ring.open("e", params())
    ring.submit("a", chunk(Step("submit", first=True), WIDTH, HEIGHT))
    assert [result.chunk for result in ring.finish()] == [0]
    close_all(ring, *"abcd")


@pytest.mark.parametrize("victim", [0, 1, 2])
def test_a_rank_that_dies_ends_the_group_as_a_unit(victim: int) -> None:
    with RingGroup(flow, RingSpec(3, WIDTH, HEIGHT)) as group:
        group.open("a", params(steps=4))
        for step in feed("a", range(3), fresh=True):
            group.submit("a", chunk(step, WIDTH, HEIGHT))
        assert group.finish()[0].frames is not None
        os.kill(group.pids[victim], signal.SIGKILL)
        with pytest.raises(RankLost, match=f"rank {victim} ended with -9"):
            for step in feed("a", range(3, 60)):
                group.submit("a", chunk(step, WIDTH, HEIGHT))
        with pytest.raises(RankLost):
            group.collect()
        pids = group.pids
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_a_rank_that_hangs_is_lost_after_the_time_allowed() -> None:
    with RingGroup(flow, RingSpec(2, WIDTH, HEIGHT, reply_timeout_s=2.0)) as group:
        group.open("a", params())
        os.kill(group.pids[1], signal.SIGSTOP)
        group.submit("a", chunk(Step("submit", first=True), WIDTH, HEIGHT))
        with pytest.raises(RankLost, match="one of them hangs"):
            group.finish()


def broken(rank: int) -> Model:
    raise RuntimeError(f"no model for rank {rank}")


def test_a_rank_that_cannot_start_is_named() -> None:
    with pytest.raises(RankLost, match="rank 0 ended with 1"):
        RingGroup(broken, RingSpec(1, WIDTH, HEIGHT))
    with pytest.raises(ValueError, match="ranks 0"):
        RingSpec(0, WIDTH, HEIGHT)


def test_an_order_survives_the_wire() -> None:
    layout = Layout(ranks=3, window=6, units=4)
    order = Order(
        Kind.PASS, 3, number=5, show_number=4, frames=2, row=7, seen=11, stream=1, prompt=2, reply=True, show=5,
        timestep=699.0000000001, sigma=1 / 3, strength=float(torch.tensor(0.7)), held=[0, 1, -1, 4, 5, 6],
        slots=[2, 3], changes=[(Change.COPY, 1, 2, 0)], rank_s=[0.1, 0.2, 0.3],
        unit_s=[0.1, 0.0, 0.2, 0.3],
        bounds=[0, 1, 2, 5], wire_s=[0.0, 0.5, 0.25], wire_bytes=[0.0, 4096.0, 8192.0],
    )  # fmt: skip
    words = order.write(layout)
    assert len(words) == layout.words
    assert Order.read(words, layout) == order
