"""The rank's loop in this process, over a script of messages: every chunk comes back once, whatever the model does."""

import json
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import TypeVar

import numpy as np
import pytest
import torch
from torch import Tensor

from engine.api import EngineError, EngineState, Frames, StreamParams, Understood
from engine.config import EngineSettings
from engine.cost_book import KEPT_PASSES
from engine.cost_model import Work
from engine.frame_memory import FrameLayout, FrameMemory
from engine.memory import plan_of
from engine.messages import (
    Close,
    Closed,
    Costs,
    Done,
    Dropped,
    FromRank,
    Open,
    Status,
    StreamFailed,
    Submit,
    ToRank,
    Update,
    decode_from_rank,
    encode,
)
from engine.pipeline import Mode, Pipeline, Rendered
from engine.session import Item, SessionState
from engine.wan.text_encoder import EncodedPrompt
from engine.wan.untrained import SMALL_TAEHV, write_untrained_wan
from engine.wan.weights import load_model
from engine.warm_up import WARM_UP_PROMPT
from engine.worker import Connection, Disconnected, Worker, check_fits, dtype_of, make_pipeline

SIZE, FAR = 32, 1e12
MODES: tuple[Mode, ...] = ("sequential", "batch")
M = TypeVar("M", bound=FromRank)


class Script(Connection):
    """Hands out batches of messages, one a look, and ends when there are no more; keeps what was sent."""

    def __init__(self) -> None:
        self.batches: list[list[ToRank]] = []
        self.sent: list[FromRank] = []

    def send(self, message: FromRank) -> None:
        self.sent.append(message)

    def receive(self, *, wait: bool) -> list[ToRank]:
        if not self.batches and wait:
            raise Disconnected
        return self.batches.pop(0) if self.batches else []


class Rank:
    """A loaded worker with its frame memory."""

    def __init__(self, settings: EngineSettings) -> None:
        self.script = Script()
        self.memory = FrameMemory.create(FrameLayout.of(settings))
        self.worker = Worker(self.script, self.memory, settings)
        self.worker.load()
        self.starting = list(self.script.sent)
        self.script.sent.clear()

    @property
    def pipeline(self) -> Pipeline:
        return self.worker._pipeline

    def say(self, *messages: ToRank) -> None:
        """Messages that arrive together, and all that the rank does about them."""
        self.script.batches.append(list(messages))
        with pytest.raises(Disconnected):
            self.worker.run()

    def submit(self, chunk: int, stream: int = 0, frames: int = 4, *, now: bool = True) -> Submit:
        """A chunk of noise in its slot."""
        slot = chunk % self.memory.layout.slots
        self.memory.slot(stream, slot, frames)[:] = given(chunk, stream, frames)
        message = Submit(stream=stream, chunk=chunk, slot=slot, frames=frames, deadline=FAR + chunk)
        if now:
            self.say(message)
        return message

    def shown(self, done: Done, frames: int = 4) -> Frames:
        return self.memory.slot(done.stream, done.slot, frames).copy()

    def answers(self, kind: type[M]) -> list[M]:
        return [message for message in self.script.sent if isinstance(message, kind)]


def given(chunk: int, stream: int = 0, frames: int = 4) -> Frames:
    return np.random.default_rng([stream, chunk]).integers(60, 200, (frames, SIZE, SIZE, 3)).astype(np.uint8)


@pytest.fixture
def rank_of(model_dir: Path) -> Iterator[Callable[..., Rank]]:
    ranks = []

    def make(mode: Mode = "sequential", *, folder: Path = model_dir, max_streams: int = 2, **more: object) -> Rank:
        settings = EngineSettings.model_validate(
            {
                "model": str(folder),
                "width": SIZE,
                "height": SIZE,
                "mode": mode,
                "max_streams": max_streams,
                **more,
            }
        )
        ranks.append(Rank(settings))
        return ranks[-1]

    yield make
    for rank in ranks:
        rank.worker.close()
        rank.memory.close()


class Broken:
    """Puts the model's pictures through `change` for the chunks named."""

    def __init__(self, pipeline: Pipeline, change: Callable[[Tensor], Tensor], chunks: range) -> None:
        self._decode, self._change, self._chunks = pipeline.decode, change, chunks
        pipeline.decode = self  # type: ignore[method-assign]

    def __call__(self, item: Item) -> Tensor:
        frames = self._decode(item)
        return self._change(frames) if item.chunk in self._chunks else frames


def test_the_start_is_told_by_percent_and_ends_ready_with_a_measured_cost(rank_of: Callable[..., Rank]) -> None:
    told = [message for message in rank_of().starting if isinstance(message, Status)]
    percents = [message.percent for message in told]
    assert percents == sorted(percents)
    states = [message.state for message in told]
    assert list(dict.fromkeys(states)) == [EngineState.LOADING, EngineState.WARMING, EngineState.READY]
    assert states.count(EngineState.WARMING) > 4
    assert (told[-1].percent, told[-1].chunk_frames) == (100, 4)


def test_costs_come_before_ready_and_follow_the_device(
    rank_of: Callable[..., Rank], monkeypatch: pytest.MonkeyPatch
) -> None:
    rank = rank_of()
    (costs,) = [message for message in rank.starting if isinstance(message, Costs)]
    assert rank.starting[-2] is costs
    assert [(cost.steps, cost.small) for cost in costs.costs] == [(steps, False) for steps in range(1, 5)]
    means = [cost.mean_s for cost in costs.costs]
    assert 0 < means[0] == costs.chunk_cost_s < 60
    assert means == sorted(means)
    assert all(cost.mean_s <= cost.upper_s for cost in costs.costs)
    # Keys and values of two layers over a window of three frames of four tokens, at the least.
    assert costs.state_bytes > 2 * 2 * 3 * 4 * 96 * 4
    # Slower by a second a chunk: told within some chunks, and not with each of them.
    monkeypatch.setattr("engine.worker.time", SlowClock(rank.pipeline))
    rank.say(Open(stream=0, params=StreamParams(prompt="neon")))
    for chunk in range(12):
        rank.submit(chunk)
    told = rank.answers(Costs)
    assert 0 < len(told) <= 12
    assert told[-1].chunk_cost_s == pytest.approx(1.0, rel=0.2)
    # Nothing new to tell.
    monkeypatch.setattr("engine.cost_book.COST_MOVE", 9.0)
    rank.submit(12)
    assert len(rank.answers(Costs)) == len(told)


def test_what_a_run_has_learned_the_next_begins_with(
    rank_of: Callable[..., Rank], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def serve(rank: Rank, chunks: int) -> None:
        rank.say(Open(stream=0, params=StreamParams(prompt="neon")))
        for chunk in range(chunks):
            rank.submit(chunk)
        rank.say(Close(stream=0))

    first = rank_of(costs_dir=tmp_path / "costs")
    slow = SlowClock(first.pipeline, pass_s=1.0)
    monkeypatch.setattr("engine.worker.time", slow)
    monkeypatch.setattr("engine.warm_up.time", slow)
    # Too few passes to tell anything, then enough; the first two are taken for outliers.
    serve(first, KEPT_PASSES - 1)
    assert not (tmp_path / "costs").exists()
    serve(first, 5)
    (kept,) = (tmp_path / "costs").iterdir()
    (before,) = [message for message in first.starting if isinstance(message, Costs)]
    slow.pass_s = 1.5
    serve(first, KEPT_PASSES)
    assert json.loads(kept.read_text())["chunk_cost_s"] == pytest.approx(1.5, rel=0.1)

    # A rank whose warm-up takes a second a pass: told before it is loaded, and still after it was measured.
    monkeypatch.setattr("engine.worker.make_pipeline", lambda *args, **more: slow.of(make_pipeline(*args, **more)))
    slow.pass_s = 1.0
    second = rank_of(costs_dir=tmp_path / "costs")
    early, ready = [message for message in second.starting if isinstance(message, Costs)]
    assert second.starting.index(early) == 1
    assert early.state_bytes == before.state_bytes
    assert early.chunk_cost_s == pytest.approx(1.5, rel=0.1) == ready.chunk_cost_s
    # One whose passes take ten times as long goes by what it measures.
    slow.pass_s = 10.0
    early, ready = [m for m in rank_of(costs_dir=tmp_path / "costs").starting if isinstance(m, Costs)]
    assert early.chunk_cost_s == pytest.approx(1.5, rel=0.1)
    assert ready.chunk_cost_s == pytest.approx(10.0, rel=0.1)
    # And off is off.
    (only,) = [message for message in rank_of(costs_dir="off").starting if isinstance(message, Costs)]
    assert only.chunk_cost_s == ready.chunk_cost_s


class SlowClock:
    """A clock that stands still but for `pass_s` seconds a pass of the pipelines it is given."""

    def __init__(self, *pipelines: Pipeline, pass_s: float = 1.0) -> None:
        self._now, self.pass_s = time.monotonic(), pass_s
        for pipeline in pipelines:
            self.of(pipeline)

    def of(self, pipeline: Pipeline) -> Pipeline:
        tick = pipeline.tick

        def slow(jobs: Sequence[tuple[SessionState, Tensor]]) -> list[Rendered]:
            self._now += self.pass_s
            return tick(jobs)

        pipeline.tick = slow  # type: ignore[method-assign]
        return pipeline

    def monotonic(self) -> float:
        return self._now


@pytest.mark.parametrize("mode", MODES)
def test_chunks_come_back_in_order_as_the_pipeline_renders_them(
    mode: Mode, rank_of: Callable[..., Rank], model_dir: Path
) -> None:
    rank = rank_of(mode)
    params = StreamParams(prompt="neon", steps=2, seed=3)
    rank.say(Open(stream=0, params=params))
    shown: list[Frames] = []
    for chunk in range(6):
        rank.submit(chunk, frames=4 if chunk else 1)
        shown += [rank.shown(done, 4 if done.chunk else 1) for done in rank.answers(Done)[len(shown) :]]
    dones = rank.answers(Done)
    assert [done.chunk for done in dones] == list(range(6 if mode == "sequential" else 5))
    assert not any(done.fault or done.reanchored for done in dones)
    assert all(done.started_at <= done.finished_at for done in dones)
    settings = rank.worker._settings
    twin = make_pipeline(load_model(model_dir, "cpu", dtype_of(settings)), settings)
    state, expected = twin.open(params), []
    for chunk in range(6):
        frames = twin.upload(given(chunk, frames=4 if chunk else 1))
        expected += [done.frames.numpy() for done in twin.tick([(state, frames)]) if done.frames is not None]
    assert all(np.array_equal(a, b) for a, b in zip(shown, expected, strict=True))


FAULTS = {
    "nan": lambda frames: torch.full_like(frames, float("nan")),
    "black": lambda frames: torch.full_like(frames, -1.0),
    "frozen": lambda frames: torch.full_like(frames, 0.25),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_broken_picture_is_withheld_with_the_camera_in_its_place_until_it_is_sound_again(
    mode: Mode, fault: str, rank_of: Callable[..., Rank]
) -> None:
    rank = rank_of(mode)
    Broken(rank.pipeline, FAULTS[fault], range(3, 7))
    rank.say(Open(stream=0, params=StreamParams(prompt="neon", steps=2)))
    seen: dict[int, str] = {}
    for chunk in range(14):
        rank.submit(chunk)
        for done in rank.answers(Done)[len(seen) :]:
            seen[done.chunk] = done.fault
            assert np.array_equal(rank.shown(done), given(done.chunk)) == bool(done.fault)
    assert list(seen) == list(range(14 if mode == "sequential" else 13))
    assert {chunk for chunk, what in seen.items() if not what} >= {0, 1, 2, 9, 10, 11, 12}
    # One picture is frozen from its second chunk on.
    ill = {chunk for chunk, what in seen.items() if what == fault}
    assert ill >= ({4, 5, 6} if fault == "frozen" else {3, 4, 5, 6} if fault == "black" else {3, 5})
    assert set(seen.values()) == {"", fault}
    if fault == "nan":
        resets = [done.chunk for done in rank.answers(Done) if done.reanchored]
        assert resets
        assert all(seen[chunk] == "nan" for chunk in resets)


@pytest.mark.parametrize("mode", MODES)
def test_a_nan_that_got_into_the_cache_is_gone_after_the_reset(mode: Mode, rank_of: Callable[..., Rank]) -> None:
    rank = rank_of(mode)
    rank.say(Open(stream=0, params=StreamParams(prompt="neon", steps=3)))
    for chunk in range(5):
        rank.submit(chunk)
    for store in (*rank.pipeline.pool.keys, *rank.pipeline.pool.values):
        store.fill_(float("nan"))
    for chunk in range(5, 16):
        rank.submit(chunk)
    dones = rank.answers(Done)
    assert [done.chunk for done in dones] == list(range(16 if mode == "sequential" else 14))
    withheld = [done.chunk for done in dones if done.fault]
    assert withheld
    assert max(withheld) < 9
    assert not any(done.fault for done in dones[9:])


def test_a_stream_that_drifts_is_begun_anew_without_losing_a_picture(rank_of: Callable[..., Rank]) -> None:
    rank = rank_of()
    Broken(rank.pipeline, lambda frames: frames * 0.3 + 0.7, range(13, 60))
    rank.say(Open(stream=0, params=StreamParams(prompt="neon", strength=0.2)))
    for chunk in range(30):
        rank.submit(chunk)
    dones = rank.answers(Done)
    assert [done.chunk for done in dones if done.reanchored] == [24]
    assert not any(done.fault for done in dones)
    assert rank.worker._streams[0].state.rows[0].seen == 29 - 24


@pytest.mark.parametrize("mode", MODES)
def test_streams_of_one_pass_get_their_own_pictures(mode: Mode, rank_of: Callable[..., Rank]) -> None:
    rank, alone = rank_of(mode, micro_batch=2), rank_of(mode)
    opened = [
        Open(stream=stream, params=StreamParams(prompt=("neon", "ink")[stream], seed=stream)) for stream in (0, 1)
    ]
    shown: list[dict[tuple[int, int], Frames]] = [{}, {}]
    for which, each in enumerate((rank, alone)):
        each.say(*opened)
        for chunk in range(4):
            before = len(each.answers(Done))
            each.say(*(each.submit(chunk, stream, now=False) for stream in (0, 1)))
            dones = each.answers(Done)[before:]
            assert {done.stream for done in dones} == {0, 1}
            # Taken up together, or one after the other.
            assert len({done.started_at for done in dones}) == 2 - (each is rank)
            shown[which] |= {(done.stream, done.chunk): each.shown(done) for done in dones}
    for key, frames in shown[0].items():
        assert abs(frames.astype(int) - shown[1][key]).max() <= 1


def test_a_change_is_taken_up_at_the_next_chunk_and_named(rank_of: Callable[..., Rank]) -> None:
    rank = rank_of()
    params = StreamParams(prompt="neon")
    rank.say(Open(stream=0, params=params))
    rank.submit(0)
    rank.say(
        Update(stream=0, revision=1, params=params.model_copy(update={"strength": 0.3})),
        Update(stream=0, revision=2, params=params.model_copy(update={"strength": 0.0})),
    )
    rank.submit(1)
    rank.say(Update(stream=7, revision=9, params=params))  # of no stream here
    rank.submit(2)
    assert [done.revision for done in rank.answers(Done)] == [0, 2, 2]


class Names:
    """A text encoder that takes a prompt for the style it names, and moods for what follows."""

    def request(self, prompt: str) -> EncodedPrompt:
        return self.encode(prompt)

    def encode(self, prompt: str) -> EncodedPrompt:
        style, *moods = prompt.split()
        states = torch.zeros(16, 64)
        return EncodedPrompt(states, states[0], 1, ((style, 1.0),), 0.75, None, tuple(moods))

    def close(self) -> None:
        pass


def test_what_a_prompt_was_taken_for_is_told_once_with_the_chunk_that_shows_it(rank_of: Callable[..., Rank]) -> None:
    rank = rank_of()
    object.__setattr__(rank.pipeline.model, "text", Names())
    rank.say(Open(stream=0, params=StreamParams(prompt="neon")))
    for chunk in range(2):
        rank.submit(chunk)
    rank.say(Update(stream=0, revision=1, params=StreamParams(prompt="ink warm")))
    for chunk in range(2, 4):
        rank.submit(chunk)
    neon = Understood(styles=(("neon", 1.0),), score=0.75)
    ink = Understood(styles=(("ink", 1.0),), score=0.75, modifiers=("warm",))
    assert [done.understood for done in rank.answers(Done)] == [(neon,), None, (ink,), None]


class NoText:
    """A text encoder that has not answered yet, or cannot."""

    def __init__(self, error: str = "") -> None:
        self._error = error

    def request(self, prompt: str) -> EncodedPrompt | None:
        if self._error:
            raise EngineError(self._error)
        return None

    def encode(self, prompt: str) -> EncodedPrompt:
        raise NotImplementedError

    def close(self) -> None:
        pass


def test_while_the_text_is_pending_the_camera_goes_through(rank_of: Callable[..., Rank]) -> None:
    rank = rank_of()
    text = rank.pipeline.model.text
    object.__setattr__(rank.pipeline.model, "text", NoText())
    rank.say(Open(stream=0, params=StreamParams(prompt="neon")))
    for chunk in range(2):
        rank.submit(chunk)
    object.__setattr__(rank.pipeline.model, "text", text)
    rank.submit(2)
    dones = rank.answers(Done)
    assert [done.fault for done in dones] == ["text_pending", "text_pending", ""]
    assert np.array_equal(rank.shown(dones[1]), given(1))
    assert not np.array_equal(rank.shown(dones[2]), given(2))


def test_a_failure_ends_the_streams_of_its_pass_and_no_other(rank_of: Callable[..., Rank]) -> None:
    rank = rank_of()

    def fail(frames: Tensor) -> Tensor:
        raise RuntimeError("out of memory")

    rank.say(*(Open(stream=stream, params=StreamParams(prompt="neon")) for stream in (0, 1)))
    for chunk, stream in ((0, 0), (0, 1), (1, 1)):
        rank.submit(chunk, stream)
    Broken(rank.pipeline, fail, range(1, 2))
    for chunk, stream in ((1, 0), (2, 1), (2, 0)):
        rank.submit(chunk, stream)
    (failed,) = rank.answers(StreamFailed)
    assert (failed.stream, failed.message) == (0, "rendering failed: out of memory")
    assert [(done.stream, done.chunk) for done in rank.answers(Done)] == [(0, 0), (1, 0), (1, 1), (1, 2)]
    assert [(drop.stream, drop.chunk, drop.reason) for drop in rank.answers(Dropped)] == [(0, 2, "stream_closed")]
    # Its rows are free again.
    rank.say(Open(stream=0, params=StreamParams(prompt="ink")))
    rank.submit(3, 0)
    assert rank.answers(Done)[-1].chunk == 3


def test_a_text_encoder_that_is_gone_fails_the_stream_with_its_words(rank_of: Callable[..., Rank]) -> None:
    rank = rank_of()
    object.__setattr__(rank.pipeline.model, "text", NoText("the text encoder is gone"))
    rank.say(Open(stream=0, params=StreamParams(prompt="neon")))
    rank.submit(0)
    assert [failed.message for failed in rank.answers(StreamFailed)] == ["rendering failed: the text encoder is gone"]


def test_a_stream_without_a_row_is_refused_and_a_closed_one_gives_its_row_back(rank_of: Callable[..., Rank]) -> None:
    rank = rank_of(max_streams=1)
    params = StreamParams(prompt="neon")
    # The warm-up has given its row back.
    rank.say(*(Open(stream=stream, params=params) for stream in range(2)))
    (refused,) = rank.answers(StreamFailed)
    assert refused.stream == 1
    assert "cannot open: 1 cache rows asked for, 0 free" in refused.message
    rank.say(Close(stream=0), Open(stream=1, params=params))
    assert rank.answers(Closed) == [Closed(stream=0)]
    assert len(rank.answers(StreamFailed)) == 1


@pytest.mark.parametrize("mode", MODES)
def test_a_stream_closed_with_chunks_inside_leaves_nothing(mode: Mode, rank_of: Callable[..., Rank]) -> None:
    rank = rank_of(mode)
    free = len(rank.pipeline.pool._free)
    rank.say(Open(stream=0, params=StreamParams(prompt="neon", steps=4)))
    for chunk in range(3):
        rank.submit(chunk)
    rank.say(rank.submit(3, now=False), Close(stream=0))
    assert not rank.worker._streams
    assert len(rank.pipeline.pool._free) == free
    before = len(rank.answers(Done))
    rank.submit(4)
    assert len(rank.answers(Done)) == before
    assert rank.answers(Dropped)[-1].reason == "stream_closed"


def test_messages_arrive_whole_over_a_real_socket_however_they_are_cut() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        connection = Connection(ours)
        assert connection.receive(wait=False) == []
        wanted: list[ToRank] = [Close(stream=number) for number in range(3)]
        data = b"".join(encode(message) for message in wanted)
        theirs.sendall(data[:7])
        assert connection.receive(wait=False) == []
        theirs.sendall(data[7:-5])
        assert connection.receive(wait=True) == wanted[:2]
        theirs.sendall(data[-5:])
        assert connection.receive(wait=True) == wanted[2:]
        connection.send(Closed(stream=5))
        assert decode_from_rank(theirs.recv(1000)) == Closed(stream=5)
        theirs.close()
        with pytest.raises(Disconnected):
            connection.receive(wait=True)
        with pytest.raises(Disconnected):
            for _ in range(3):
                connection.send(Closed(stream=5))


# --- the smaller size


@pytest.fixture
def two_sizes(model_dir: Path, tmp_path: Path) -> Path:
    """The model folder, good at half the size too."""
    folder = tmp_path / "two"
    shutil.copytree(model_dir, folder)
    config = json.loads((folder / "config.json").read_text())
    config["serving"] = {"sizes": [[SIZE, SIZE], [SIZE // 2, SIZE // 2]]}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_stream_goes_to_the_smaller_size_and_back_without_losing_a_chunk(
    rank_of: Callable[..., Rank], two_sizes: Path
) -> None:
    rank = rank_of(folder=two_sizes)
    (costs,) = [message for message in rank.starting if isinstance(message, Costs)]
    assert [cost.steps for cost in costs.costs if cost.small] == [1, 2, 3, 4]
    full, small = rank.pipeline, rank.worker._small
    assert small is not None
    free = len(full.pool._free), len(small.pool._free)
    params = StreamParams(prompt="neon", seed=3)
    rank.say(Open(stream=0, params=params))
    changes = {3: True, 6: False, 9: True}
    for chunk in range(12):
        if chunk in changes:
            rank.say(
                Update(stream=0, revision=chunk, params=params.model_copy(update={"small": changes[chunk]})),
            )
        rank.submit(chunk, frames=4 if chunk else 1)
        lent = free[0] - len(full.pool._free), free[1] - len(small.pool._free)
        assert lent == ((0, 1) if 3 <= chunk < 6 or chunk >= 9 else (1, 0))
    dones = rank.answers(Done)
    assert [done.chunk for done in dones] == list(range(12))
    assert [done.revision for done in dones] == [0] * 3 + [3] * 3 + [6] * 3 + [9] * 3
    assert not any(done.fault for done in dones)
    # The picture goes on, a little softer: of the chunk's own frames, at their size.
    assert not np.array_equal(rank.shown(dones[-1]), given(11))
    rank.say(Close(stream=0))
    assert (len(full.pool._free), len(small.pool._free)) == free


def test_the_smaller_picture_is_of_the_frames_given_and_of_their_size(
    two_sizes: Path, rank_of: Callable[..., Rank]
) -> None:
    rank = rank_of(folder=two_sizes)
    small = rank.worker._small
    assert small is not None and small.scaled
    # Two halves of one grey each, given back as they are at strength 0.
    frames = np.full((4, SIZE, SIZE, 3), 60, np.uint8)
    frames[:, :, SIZE // 2 :] = 200
    state = small.open(StreamParams(prompt="neon", strength=0.0))
    shown = small.render(state, frames)
    assert shown.shape == frames.shape
    alone = make_pipeline(rank.pipeline.model, rank.worker._settings.model_copy(update={"width": 16, "height": 16}))
    expected = alone.render(alone.open(StreamParams(prompt="neon", strength=0.0)), frames[:, ::2, ::2])
    planes = torch.from_numpy(expected).permute(0, 3, 1, 2).float()
    larger = torch.nn.functional.interpolate(planes, (SIZE, SIZE), mode="bilinear").permute(0, 2, 3, 1).numpy()
    # The one is rounded to levels before it is enlarged, the other after, and in bfloat16 a step is most of a level.
    assert abs(shown - larger).max() <= 2


def test_a_small_stream_that_cannot_move_stays_as_it_is(rank_of: Callable[..., Rank], two_sizes: Path) -> None:
    rank = rank_of(folder=two_sizes, max_streams=1)
    assert rank.worker._small is not None
    held = rank.worker._small.open(StreamParams(prompt="ink"))
    params = StreamParams(prompt="neon")
    rank.say(
        Open(stream=0, params=params), Update(stream=0, revision=1, params=params.model_copy(update={"small": True}))
    )
    rank.submit(0)
    assert [(done.chunk, done.revision, done.fault) for done in rank.answers(Done)] == [(0, 0, "")]
    assert rank.worker._streams[0].pipeline is rank.pipeline
    rank.worker._small.close(held)


def test_small_means_nothing_where_the_model_has_no_smaller_size(rank_of: Callable[..., Rank], two_sizes: Path) -> None:
    batch = rank_of("batch", folder=two_sizes)
    assert batch.worker._small is None
    batch.say(Open(stream=0, params=StreamParams(prompt="neon", small=True)))
    batch.submit(0)
    assert [done.chunk for done in batch.answers(Done)] == [0]
    assert not any(cost.small for message in batch.starting if isinstance(message, Costs) for cost in message.costs)


# --- two chunks as one


def test_two_waiting_chunks_are_rendered_as_one_and_come_back_as_two(rank_of: Callable[..., Rank]) -> None:
    rank = rank_of(chunk_latents=2)
    # A pass costs as much as a chunk, so that half of it is gained.
    rank.worker._book.model.profile([(Work(1, 1, 1, 3), 0.010), (Work(2, 1, 2, 6), 0.011)])
    rank.say(Open(stream=0, params=StreamParams(prompt="neon")))
    rank.submit(0, frames=1)
    rank.say(rank.submit(1, now=False), rank.submit(2, now=False))
    rank.submit(3)
    dones = rank.answers(Done)
    assert [done.chunk for done in dones] == [0, 1, 2, 3]
    assert (dones[1].started_at, dones[1].slot) == (dones[2].started_at, 1)
    twin = make_pipeline(rank.pipeline.model, rank.worker._settings)
    state = twin.open(StreamParams(prompt="neon"))
    twin.render(state, given(0, frames=1))
    expected = twin.render(state, np.concatenate((given(1), given(2))))
    shown = np.concatenate([rank.shown(done) for done in dones[1:3]])
    np.testing.assert_array_equal(shown, expected)


# --- the light VAE


def test_a_wan_model_with_both_vaes_goes_to_the_light_one_and_back(
    rank_of: Callable[..., Rank], tmp_path: Path
) -> None:
    write_untrained_wan(tmp_path / "wan", light_vae=SMALL_TAEHV)
    rank = rank_of(folder=tmp_path / "wan")
    (costs,) = [message for message in rank.starting if isinstance(message, Costs)]
    assert [cost.steps for cost in costs.costs if cost.light] == [cost.steps for cost in costs.costs if not cost.light]
    params = StreamParams(prompt=WARM_UP_PROMPT, steps=2)
    rank.say(Open(stream=0, params=params))
    changes = {3: True, 6: False}
    for chunk in range(9):
        if chunk in changes:
            rank.say(Update(stream=0, revision=chunk, params=params.model_copy(update={"light": changes[chunk]})))
        rank.submit(chunk, frames=4 if chunk else 5)
    dones = rank.answers(Done)
    assert [(done.chunk, done.fault) for done in dones] == [(chunk, "") for chunk in range(9)]
    assert [done.revision for done in dones] == [0] * 3 + [3] * 3 + [6] * 3
    # Chunk for chunk it is another picture than that of a stream which kept its VAE.
    assert not np.array_equal(rank.shown(dones[-1]), given(8))


@pytest.mark.parametrize(
    ("asked", "room_for", "loaded"),
    [
        ("auto", "both", "both"),
        ("auto", "light", "light"),
        ("full", "both", "full"),
        ("light", "both", "light"),
    ],
)
def test_both_vaes_are_loaded_where_auto_finds_room(
    asked: str, room_for: str, loaded: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_untrained_wan(tmp_path, light_vae=SMALL_TAEHV)
    settings = EngineSettings.model_validate({"model": str(tmp_path), "width": 64, "height": 64, "vae": asked})
    needs = {
        vae: plan_of(settings.model_copy(update={"vae": one}), None).total_bytes
        for vae, one in (("both", "auto"), ("light", "light"))
    }
    assert needs["light"] < needs["both"]
    available = SimpleNamespace(available=needs[room_for])
    monkeypatch.setattr("engine.worker.psutil.virtual_memory", lambda: available)
    assert check_fits(settings, torch.device("cpu")).demand.vae == loaded
    ring = settings.model_copy(update={"ranks": 2})
    assert check_fits(ring, torch.device("cpu")).demand.vae == ("full" if asked == "full" else "light")
