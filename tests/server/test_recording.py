"""Stills, recordings and their bounds: through a real server over WebRTC on loopback, and at the process's own edge."""

from __future__ import annotations

import asyncio
import gc
import io
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import Executor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

import aiohttp
import av
import cv2
import numpy as np
import psutil
import pytest
from aiohttp.test_utils import make_mocked_request
from aiortc.mediastreams import VideoStreamTrack

from engine.api import StreamParams
from engine.config import EngineSettings
from engine.fake import FakeEngine, FakeStream
from livebrush_client import Api, Live, Refused, connect
from server.access import Grant
from server.app import running_server
from server.errors import Forbidden
from server.guard import GRANT
from server.recording import MAX_CHUNKS, MAX_PICTURES, Recording, Recordings
from server.recording_process import Recorder, run
from server.roles import Role
from server.session import Session
from server.session_context import SessionContext
from server.session_record import SessionRecord, Submitted, TapedStream, header_of, why_not_exact
from server.session_replay import run_again
from server.settings import MediaSettings, RecordingSettings, ServerSettings
from server.stills import answer_still, wanted_format
from tests.server.test_resume import fall_silent
from tests.server.test_server import Visitor
from tests.server.waiting import until

PATIENCE_S = 90.0
SIZE = 64


@pytest.fixture(autouse=True)
def only_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aioice.ice.get_host_addresses", lambda use_ipv4, use_ipv6: ["127.0.0.1"])


class Grey(VideoStreamTrack):
    """Grey noise, which fills a disk, 160x120 at 30 fps."""

    _random = np.random.default_rng(0)

    async def recv(self) -> av.VideoFrame:
        pts, time_base = await self.next_timestamp()
        noise = self._random.integers(20, 200, (120, 160, 1), np.uint8)
        frame = av.VideoFrame.from_ndarray(np.repeat(noise, 3, axis=2), format="rgb24")
        frame.pts, frame.time_base = pts, time_base
        return frame


class House:
    """A server that may record, one session on it, and its REST."""

    def __init__(self, api: Api, live: Live, context: SessionContext, engine: FakeEngine, base: str) -> None:
        self.api = api
        self.live = live
        self.engine = engine
        self.notices: list[dict[str, Any]] = []
        self._context = context
        self._base = base

    @property
    def rendered(self) -> int:
        """Chunks of the stream that is open now."""
        return sum(stream.counters.rendered for stream in self.engine.streams.values())

    @property
    def session(self) -> Session:
        # By `type`: a look at the class of some of torch's objects is a warning.
        (found,) = (one for one in gc.get_objects() if type(one) is Session and one.id == self.live.answer.session)
        return found

    @property
    def told(self) -> str:
        """What the page was told last of its recording."""
        return str(next(one["message"] for one in reversed(self.notices) if one["code"] == "recording"))

    def metric(self, name: str, **labels: str) -> float:
        return self._context.metrics.registry.get_sample_value(name, labels) or 0.0

    async def still(self, query: str = "", accept: str = "*/*") -> tuple[np.ndarray, str]:
        async with aiohttp.ClientSession() as http:
            url = self._base + self.path + "/still" + query
            async with http.get(url, headers={"Accept": accept}) as response:
                data = await response.read()
                if response.status != 200:
                    assert response.content_type == "application/problem+json"
                    raise Refused(response.status, "", data.decode(), retryable=False, retry_after_s=None)
                picture = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
                assert picture is not None
                return cv2.cvtColor(picture, cv2.COLOR_BGR2RGB), response.content_type

    @property
    def path(self) -> str:
        return f"/api/v1/sessions/{self.live.answer.session}"

    async def recording(self, method: str = "GET", what: list[str] | None = None) -> dict[str, Any]:
        body = None if what is None else {"what": what}
        return dict(await self.api.call(method, self.path + "/recording", body))


@asynccontextmanager
async def house(folder: Path | None, **recordings: Any) -> AsyncIterator[House]:
    engine = FakeEngine(SIZE, SIZE, delay_s=0.01)
    settings = ServerSettings(
        port=0,
        engine_kind="fake",
        engine=EngineSettings(width=SIZE, height=SIZE),
        max_fps=12,
        recordings=RecordingSettings(**{"dir": folder, "min_free_bytes": 0, **recordings}),
    )
    async with running_server(settings, engine) as (context, port):
        base = f"http://127.0.0.1:{port}"
        async with Api(base) as api, connect(base, Grey(), timeout_s=PATIENCE_S, prompt="neon") as live:
            made = House(api, live, context, engine, base)
            live.on("notice", made.notices.append)
            await until(lambda: made.rendered > 1, "restyled chunks")
            yield made


def decoded(path: Path) -> list[np.ndarray]:
    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


async def test_camera_picture_and_a_record_that_replays_exactly(tmp_path: Path) -> None:
    folder = tmp_path / "recordings"
    async with house(folder) as made:
        begun = await made.recording("POST", ["input", "output", "session"])
        assert begun["recording"] and begun["end"] is None
        with pytest.raises(Refused) as runs:
            await made.recording("POST", ["output"])
        assert (runs.value.status, runs.value.code) == (409, "recording_runs")
        await until(lambda: made.engine.streams and made.rendered > 3, "chunks of the recorded stream")
        await made.live.set(prompt="ink", strength=0.5)
        await made.live.set(prompt="ink", strength=0.25)
        count = made.rendered
        await until(lambda: made.rendered > count + 3, "chunks after the change")
        ended = await made.recording("DELETE")
        assert (ended["recording"], ended["end"], ended["tape_ended"]) == (False, "stopped", None)
        assert await made.recording() == ended
        notices = [one for one in made.notices if one["code"] == "recording"]
        assert [one["recording"] for one in notices] == [True, False]
    assert {path.name for path in folder.iterdir()} == {ended["name"]}
    inside = folder / ended["name"]
    assert {path.name for path in inside.iterdir()} == {"input.mp4", "output.mp4", "frames.mkv", "session.jsonl"}
    assert sum(path.stat().st_size for path in inside.iterdir()) == ended["bytes"]
    assert stat.S_IMODE(inside.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in inside.iterdir()} == {0o600}
    camera, shown = decoded(inside / "input.mp4"), decoded(inside / "output.mp4")
    assert min(len(camera), len(shown)) > 15 and camera[0].shape == shown[0].shape == (SIZE, SIZE, 3)
    # The camera is grey, its painting is not.
    assert np.ptp(np.median(camera[-1], axis=(0, 1))) < 6 < np.ptp(np.median(shown[-1], axis=(0, 1)))

    record = SessionRecord(inside)
    assert len({record.params_of(revision).strength for revision in record.revisions}) >= 1
    summary = await run_again(inside, tmp_path / "again.mkv")
    assert summary.exact and summary.chunks > 6
    assert len(decoded(tmp_path / "again.mkv")) == summary.frames

    # One wrong bit in one chunk is found.
    lines = (inside / "session.jsonl").read_text().splitlines()
    place = next(i for i, line in enumerate(lines) if '"returned"' in line)
    changed = json.loads(lines[place]) | {"digest": "0" * 32}
    (inside / "session.jsonl").write_text("\n".join([*lines[:place], json.dumps(changed), *lines[place + 1 :]]) + "\n")
    spoilt = await run_again(inside)
    assert not spoilt.exact and spoilt.differing == (changed["chunk"],)


async def test_the_channel_records_too_and_the_file_ends_with_the_session(tmp_path: Path) -> None:
    async with house(tmp_path) as made:
        ack = await made.live._ask("record", on=True, what=["output"])
        assert ack["type"] == "ack"
        await until(
            lambda: made.session.recorder.current is not None and made.session.recorder.current.ready, "the recording"
        )
        recording = made.session.recorder.current
        assert recording is not None
        await until(lambda: recording.counters["pictures_written"] > 5, "pictures")
        await made.api.session(made.live.answer.session).end()
        await asyncio.wait([recording.task], timeout=PATIENCE_S)
        assert recording.end == "session_ended"
    (path,) = tmp_path.rglob("output.mp4")
    assert len(decoded(path)) == recording.counters["pictures_written"]


async def test_a_recording_goes_on_over_another_connection(tmp_path: Path) -> None:
    settings = ServerSettings(
        port=0,
        engine_kind="fake",
        engine=EngineSettings(width=SIZE, height=SIZE, max_streams=1),
        max_sessions=1,
        media=MediaSettings(vanish_timeout_s=1.0),
        recordings=RecordingSettings(dir=tmp_path, min_free_bytes=0),
    )
    async with running_server(settings, FakeEngine(SIZE, SIZE, delay_s=0.01, max_streams=1)) as (_, port):
        lost, back = (Visitor(f"http://127.0.0.1:{port}") for _ in range(2))
        try:
            answer = await (await lost.enter(params={"prompt": "neon"})).json()
            await lost.until(lambda: lost.pictures, "the first picture")
            await lost.ask(type="record", id=1, on=True, what=["output", "session"])
            await lost.until(lambda: told(lost), "the notice")
            fall_silent(lost)
            await back.enter(resume={"token": answer["resume"]}, params={"prompt": "neon"})
            await back.until(lambda: told(back), "the notice after the return")
            assert "goes on" in told(back)[0]["message"] and told(back)[0]["name"] == told(lost)[0]["name"]
            await back.until(lambda: len(back.pictures) > 12, "pictures after the return")
            await back.ask(type="record", id=1, on=False, what=["output"])
            await back.until(lambda: not told(back)[-1]["recording"], "the end")
            assert (told(back)[-1]["end"], told(back)[-1].get("tape_ended")) == ("stopped", None)
        finally:
            for visitor in (lost, back):
                await visitor.leave()
    (path,) = tmp_path.rglob("output.mp4")
    assert len(decoded(path)) > 12 and (await run_again(path.parent)).exact


def told(visitor: Visitor) -> list[dict[str, Any]]:
    return [one for one in visitor.messages if one.get("code") == "recording"]


async def test_nothing_is_recorded_unless_the_operator_says_where(tmp_path: Path) -> None:
    async with house(None) as made:
        assert (await made.api.call("GET", "/api/v1/version"))["recordings"] is False
        for method, what, status, code in (
            ("POST", ["output"], 422, "recordings_off"),
            ("POST", ["screen"], 400, "bad_request"),
            ("GET", None, 404, "no_recording"),
            ("DELETE", None, 404, "no_recording"),
        ):
            with pytest.raises(Refused) as refused:
                await made.recording(method, what)
            assert (refused.value.status, refused.value.code) == (status, code), method
        with pytest.raises(Exception, match="--recordings"):
            await made.live._ask("record", on=True, what=["output"])


async def lives_on(made: House) -> None:
    count = made.rendered
    await until(lambda: made.rendered > count + 3, "a live picture that goes on")
    assert not made.live.ended


async def test_a_quota_ends_the_recording_and_no_new_one_begins(tmp_path: Path) -> None:
    async with house(tmp_path, quota_bytes=60_000) as made:
        await made.recording("POST", ["session", "output"])
        await until(lambda: made.session.recorder.current and made.session.recorder.current.end, "the end")
        ended = await made.recording()
        assert ended["end"] == "quota" and ended["bytes"] >= 60_000
        await lives_on(made)
        assert "room" in made.told
        with pytest.raises(Refused) as full:
            await made.recording("POST", ["output"])
        assert (full.value.status, full.value.code) == (507, "recordings_full")
        assert made.metric("livebrush_recording_events_total", what="ended_quota") == 1


async def test_a_full_disk_ends_the_recording_and_not_the_picture(small_disk: Path) -> None:
    async with house(small_disk) as made:
        await made.recording("POST", ["session", "output"])
        await until(lambda: made.session.recorder.current and made.session.recorder.current.end, "the end")
        ended = await made.recording()
        assert ended["end"] == "disk_full"
        await lives_on(made)
        assert "disk is full" in made.told
        # What was written before can be read.
        inside = small_disk / str(ended["name"])
        assert decoded(inside / "output.mp4")
        assert len(SessionRecord(inside)) > 0


async def test_a_disk_with_less_than_the_minimum_free_is_left_alone(tmp_path: Path) -> None:
    async with house(tmp_path, min_free_bytes=10**15) as made:
        await made.recording("POST", ["output"])
        await until(lambda: made.session.recorder.current and made.session.recorder.current.end, "the end")
        assert (await made.recording())["end"] == "disk_full"
        await lives_on(made)


async def test_a_killed_process_leaves_files_that_play(tmp_path: Path) -> None:
    async with house(tmp_path) as made:
        await made.recording("POST", ["output", "session"])
        recording = made.session.recorder.current
        assert recording is not None
        await until(lambda: list(tmp_path.rglob("output.mp4")), "the file")
        (path,) = tmp_path.rglob("output.mp4")
        await until(lambda: path.stat().st_size > 4000 and recording.counters["pictures_written"] > 30, "fragments")
        children = psutil.Process().children()
        (process,) = [child for child in children if "server.recording_process" in child.cmdline()]
        process.send_signal(signal.SIGKILL)
        await until(lambda: recording.end, "the end")
        assert recording.end == "failed"
        await lives_on(made)
        assert len(decoded(path)) >= 12
        assert (await run_again(path.parent)).exact
        assert (await made.recording("POST", ["output"]))["recording"]


async def test_stills(tmp_path: Path) -> None:
    async with house(tmp_path) as made:
        shown, kind = await made.still()
        assert kind == "image/png" and shown.shape == (SIZE, SIZE, 3)
        camera, _ = await made.still("?of=input")
        assert np.ptp(np.median(camera, axis=(0, 1))) < 6 < np.ptp(np.median(shown, axis=(0, 1)))
        _, kind = await made.still(accept="image/webp, image/jpeg")
        assert kind == "image/jpeg"
        for query, accept, status in (("?of=cellar", "*/*", 400), ("", "text/html", 406)):
            with pytest.raises(Refused) as refused:
                await made.still(query, accept)
            assert refused.value.status == status


@pytest.mark.parametrize(
    ("accept", "expected"),
    [
        ("", "image/png"),
        ("*/*", "image/png"),
        ("image/*;q=0.5, image/jpeg", "image/jpeg"),
        ("image/jpeg;q=0.2, image/png;q=0.1", "image/jpeg"),
        ("IMAGE/JPEG", "image/jpeg"),
        ("image/png;q=0, */*;q=0.1", "image/jpeg"),
    ],
)
def test_a_still_comes_as_the_client_likes_it_best(accept: str, expected: str) -> None:
    assert wanted_format(accept) == expected


async def test_a_viewers_token_is_not_for_the_camera() -> None:
    request = make_mocked_request("GET", "/api/v1/streams/stage/still?of=input")
    request[GRANT] = Grant(Role.VIEW)
    with pytest.raises(Forbidden, match="publish"):
        await answer_still(request, cast(Session, None), cast(Executor, None))


# --- the parts


def picture(value: int) -> np.ndarray:
    return np.full((16, 16, 3), value, np.uint8)


@asynccontextmanager
async def stalled(folder: Path, monkeypatch: pytest.MonkeyPatch, what: list[str]) -> AsyncIterator[Recording]:
    """A recording whose process says that it is ready, and reads nothing."""

    async def start(folder: Path, min_free_bytes: int) -> asyncio.subprocess.Process:
        code = "import time; print('{}', flush=True); time.sleep(60)"
        pipe = asyncio.subprocess.PIPE
        return await asyncio.create_subprocess_exec(sys.executable, "-c", code, stdin=pipe, stdout=pipe)

    monkeypatch.setattr("server.recording._start_process", start)
    monkeypatch.setattr("server.recording.STOP_TIMEOUT_S", 0.5)
    async with Recordings(RecordingSettings(dir=folder, min_free_bytes=0)) as book:
        recording = book.start(what, lambda recording, message: None)
        await recording.begun
        yield recording
        recording.stop()
        await asyncio.wait([recording.task], timeout=PATIENCE_S)
        assert recording.task.done() and recording.end == "stopped"


async def test_who_is_behind_loses_the_oldest_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with stalled(tmp_path, monkeypatch, ["output"]) as recording:
        for value in range(250):
            recording.picture("output", np.full((128, 128, 3), value, np.uint8), float(value))
            await asyncio.sleep(0)
        recording.picture("input", picture(0), 0.0)  # not asked for
        waiting = [int(rgb[0, 0, 0]) for _, rgb, _ in recording._pictures]
        assert waiting == list(range(250 - MAX_PICTURES, 250))
        gone = recording.counters["pictures_dropped"]
        # Those that neither wait nor were dropped are in the pipe.
        assert 250 - MAX_PICTURES - 8 < gone < 250 - MAX_PICTURES


async def test_a_record_for_a_replay_has_no_holes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with stalled(tmp_path, monkeypatch, ["session"]) as recording:
        assert recording.awaits_stream
        engine = FakeEngine(16, 16)
        params = StreamParams()
        stream = recording.taped(FakeStream(engine, 0, params), header_of("fake", EngineSettings(), params))
        assert isinstance(stream, TapedStream) and not recording.awaits_stream
        for index in range(2 * MAX_CHUNKS):
            line = Submitted(chunk=index, frame_indices=(index,), captured_at=(0.0,))
            recording.note(line, np.zeros((1, 128, 128, 3), np.uint8))
        assert len(recording._tape) <= MAX_CHUNKS + 1 and not recording.is_on
        assert "too slow" in recording.tape_ended


async def test_old_recordings_are_deleted_and_nothing_else(tmp_path: Path) -> None:
    old, new, foreign = (tmp_path / name for name in ("20200101T000000Z-00000001", "20990101T000000Z-00000002", "mine"))
    for folder in (old, new, foreign):
        folder.mkdir()
        (folder / "output.mp4").write_bytes(b"x" * 10)
        for path in (folder / "output.mp4", folder):
            os.utime(path, (1000.0, 1000.0) if folder is not new else (9e5, 9e5))
    settings = RecordingSettings(dir=tmp_path, keep_days=1)
    async with Recordings(settings, unix_clock=lambda: 9e5 + 3600) as book:
        assert not old.exists() and new.exists() and foreign.exists()
        assert book.used_bytes == 10 and book.counters["deleted"] == 1


def test_a_server_that_dies_in_the_middle_of_a_message_leaves_whole_files(tmp_path: Path) -> None:
    rgb = np.arange(16 * 16 * 3, dtype=np.uint8).reshape(1, 16, 16, 3)
    message = json.dumps({"file": "frames", "shape": [1, 16, 16], "ticks": 0, "bytes": rgb.nbytes, "line": "{}"})
    whole = message.encode() + b"\n" + rgb.tobytes()
    said = io.StringIO()
    run(io.BytesIO(whole + whole[:-5]), said, Recorder(tmp_path, 0))
    reports = [json.loads(line) for line in said.getvalue().splitlines()]
    assert reports[0] == {"ready": True} and reports[-1]["end"] == "finished"
    assert np.array_equal(decoded(tmp_path / "frames.mkv")[0], rgb[0])
    assert (tmp_path / "session.jsonl").read_text() == "{}\n"


@pytest.mark.parametrize(
    ("change", "said"),
    [({"mode": "batch"}, "batch"), ({"chunk_latents": 2}, "chunk_latents"), ({"micro_batch": 2}, "micro_batch")],
)
def test_what_depends_on_time_is_not_recorded_for_a_replay(change: dict[str, Any], said: str) -> None:
    assert said in why_not_exact(EngineSettings.model_validate(change))
    assert why_not_exact(EngineSettings()) == ""


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 160 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=160k", "tmpfs", str(folder)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a tmpfs cannot be mounted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)
