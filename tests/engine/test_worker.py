"""The rank's loop in this process, over a script of messages: every chunk comes back once, whatever the model does."""

import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import numpy as np
import pytest
import torch
from torch import Tensor

from engine.api import EngineError, EngineState, Frames, StreamParams, Understood
from engine.config import EngineSettings
from engine.frame_memory import FrameLayout, FrameMemory
from engine.messages import (
    Close,
    Closed,
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
from engine.pipeline import Mode, Pipeline
from engine.session import Item
from engine.wan.text_encoder import EncodedPrompt
from engine.wan.weights import load_model
from engine.worker import Connection, Disconnected, Worker, make_pipeline

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

    def make(mode: Mode = "sequential", *, micro_batch: int = 1, max_streams: int = 2) -> Rank:
        settings = EngineSettings(
            model=str(model_dir), width=SIZE, height=SIZE, mode=mode, micro_batch=micro_batch, max_streams=max_streams
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
    assert 0 < told[-1].chunk_cost_s < 60


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
    twin = make_pipeline(load_model(model_dir, "cpu"), rank.worker._settings)
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
