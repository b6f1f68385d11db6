"""A session of the embedded model, recorded and replayed: the same pictures, bit for bit."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from engine.api import EngineStream, FrameChunk, Frames, RenderedChunk, StreamParams, WeightedPrompt
from engine.client import LocalEngine
from engine.config import EngineSettings
from server.cli import main
from server.recording import Recordings
from server.session_record import RecordError, SessionRecord, header_of
from server.session_replay import run_again
from server.settings import RecordingSettings
from server.starting import start_engine

SIZE = 256
PATIENCE_S = 60.0
NO_DEADLINE_S = 1e9


def scene(index: int) -> Frames:
    """A chunk of a moving picture: one frame, then fours."""
    count = 4 if index else 1
    ramp = np.add.outer(np.arange(SIZE), np.arange(SIZE))
    frames = [np.roll(ramp, 5 * (4 * index + place), axis=1) % 200 for place in range(count)]
    return np.repeat(np.stack(frames)[..., None], 3, axis=3).astype(np.uint8)


class Live:
    """What a session does with a stream: chunks in order, results as they come."""

    def __init__(self, stream: EngineStream) -> None:
        self.rendered: list[RenderedChunk] = []
        self._stream = stream
        self._results: AsyncIterator[RenderedChunk] = aiter(stream)
        self._index = 0

    def submit(self, deadline: float = NO_DEADLINE_S) -> None:
        frames = scene(self._index)
        first = 4 * self._index - 3 if self._index else 0
        indices = tuple(range(first, first + len(frames)))
        times = tuple(100 + one / 24 for one in indices)
        self._stream.submit(FrameChunk(self._index, frames, indices, times, deadline))
        self._index += 1

    async def take(self) -> None:
        async with asyncio.timeout(PATIENCE_S):
            self.rendered.append(await anext(self._results))

    async def chunks(self, count: int) -> None:
        for _ in range(count):
            self.submit()
            await self.take()


# What a person and the ladder do to a session, one after the other.
CHANGES = (
    StreamParams(prompt="neon at night", transition_chunks=3),
    StreamParams(prompt="neon at night", strength=0.6, seed=5),
    StreamParams(
        blend=(WeightedPrompt(text="ink drawing", weight=2.0), WeightedPrompt(text="oil painting")), recache=True
    ),
    StreamParams(prompt="comic", small=True),
    StreamParams(prompt="comic"),
    StreamParams(prompt="comic", strength=0.0),
    StreamParams(prompt="comic"),
)


async def record(folder: Path, settings: EngineSettings, params: StreamParams) -> tuple[Path, Live]:
    """A recorded session; in the middle of it the engine falls behind and drops a chunk."""
    engine = LocalEngine(settings)
    try:
        await start_engine(engine, lambda status: None)
        async with Recordings(RecordingSettings(dir=folder, min_free_bytes=0)) as book:
            recording = book.start(["session"], lambda recording, message: None)
            await recording.begun
            async with engine.open_stream("s", params) as opened:
                stream = recording.taped(opened, header_of("local", settings, params))
                live = Live(stream)
                await live.chunks(3)
                for _ in range(4):
                    live.submit()
                while not (
                    stream.counters.dropped and len(live.rendered) + stream.counters.dropped["engine_behind"] == 7
                ):
                    await live.take()
                for change in CHANGES:
                    stream.update(StreamParams(prompt="never shown"))
                    stream.update(change)
                    await live.chunks(2)
            recording.stop()
            await asyncio.wait([recording.task], timeout=PATIENCE_S)
            assert (recording.end, recording.tape_ended) == ("stopped", "")
            return folder / recording.name, live
    finally:
        await engine.close()


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Live]]:
    settings = EngineSettings(model="livebrush-tiny", width=SIZE, height=SIZE, max_streams=1)
    yield asyncio.run(record(tmp_path_factory.mktemp("recordings"), settings, StreamParams(prompt="watercolor")))


def test_a_replay_gives_the_sessions_pictures_bit_for_bit(
    recorded: tuple[Path, Live], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, live = recorded
    out = tmp_path / "again.mkv"
    assert main(["replay", str(folder), "--out", str(out), "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["exact"] and summary["chunks"] == len(live.rendered) and summary["skipped"] >= 1
    with av.open(str(out)) as container:
        again = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    shown = np.concatenate([chunk.frames for chunk in live.rendered])
    assert np.array_equal(again, shown)
    # It was restyled, and not in one style alone.
    camera = np.concatenate([scene(chunk.index) for chunk in live.rendered])
    change = np.abs(shown.astype(int) - camera).mean(axis=(1, 2, 3))
    assert change[:9].min() > 3 and len({chunk.revision for chunk in live.rendered}) == 1 + len(CHANGES)


async def test_another_seed_or_style_would_have_been_told(recorded: tuple[Path, Live], tmp_path: Path) -> None:
    folder, _ = recorded
    lines = [json.loads(line) for line in (folder / "session.jsonl").read_text().splitlines()]
    lines[0]["params"]["prompt"] = "neon"
    (tmp_path / "session.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "frames.mkv").symlink_to(folder / "frames.mkv")
    summary = await run_again(tmp_path)
    assert not summary.exact and 0 in summary.differing
    assert f"{len(summary.differing)} chunks differ" in summary.as_text()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model_digest": "0" * 64}, "digest 000000000000…"),
        ({"format": 2}, "line 1 is not of format 1"),
        ({"engine": {"model": "no-such-model"}}, "the record needs the model it was made with"),
    ],
)
async def test_what_cannot_be_replayed_is_refused_in_words(
    recorded: tuple[Path, Live], tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    header = json.loads((recorded[0] / "session.jsonl").read_text().splitlines()[0])
    (tmp_path / "session.jsonl").write_text(json.dumps(header | change) + "\n")
    with pytest.raises(RecordError, match=said):
        await run_again(tmp_path)


def test_a_folder_that_is_no_record_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["replay", str(tmp_path)]) == 1
    assert "no record of a session" in capsys.readouterr().err
    (tmp_path / "session.jsonl").write_text('{"kind":"head')
    with pytest.raises(RecordError, match="no header"):
        SessionRecord(tmp_path)
