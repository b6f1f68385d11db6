"""Recording sessions on the server's disk: camera, painted picture, or all that a replay needs (docs/recording.md).

    session -> Recording (bounded queues) -> recording_process -> DIR/NAME/{input,output}.mp4, frames.mkv, session.jsonl

The live picture comes first: nothing here waits, pictures that the process is too slow for are left out of the file and
counted, and a full disk ends the recording and nothing else. `Recordings` keeps the folder within its bounds.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import re
import secrets
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from engine.api import EngineStream, Frames
from server.errors import ServerError
from server.recording_process import FILES, LINES_FILE, TICKS_PER_S
from server.session_record import Header, Line, TapedStream
from server.settings import RecordingSettings

log = logging.getLogger(__name__)

# Pictures that wait for the process: a second or two. Chunks of a replay's record: nearly three.
MAX_PICTURES = 24
MAX_CHUNKS = 16
MAX_LINES = 256
# Packets of sound that wait: as long as the pictures.
MAX_SOUND = 150
START_TIMEOUT_S = 30.0
# For what waits to be written, and for the encoders to finish.
STOP_TIMEOUT_S = 10.0
SWEEP_S = 3600.0
NAME = re.compile(r"\d{8}T\d{6}Z-[0-9a-f]{8}")


class End(StrEnum):
    """Why a recording ended."""

    STOPPED = "stopped"
    SESSION_ENDED = "session_ended"
    SERVER_CLOSED = "server_closed"
    DISK_FULL = "disk_full"
    QUOTA = "quota"
    FAILED = "failed"


WORDS = {
    End.STOPPED: "The recording is finished.",
    End.SESSION_ENDED: "The recording ended with its session.",
    End.SERVER_CLOSED: "The recording ended, because the server stops.",
    End.DISK_FULL: "The recording was ended: the server's disk is full. The live picture goes on.",
    End.QUOTA: "The recording was ended: all the room for recordings is used. The live picture goes on.",
    End.FAILED: "The recording was ended by a fault; the server's log says which. The live picture goes on.",
}


class RecordingError(ServerError):
    """Nothing can be recorded now."""

    status, code = 507, "recording_failed"


class Recording:
    """One recording while it runs. Nothing here waits or raises but `begun`.

    ready: files can be written. end: why it ended, None while it runs. tape_ended: why the record for a replay ended
    before the recording did, "" while it did not.
    """

    def __init__(
        self, book: Recordings, what: Sequence[str], tell: Callable[[Recording, str], None], *, has_sound: bool = False
    ) -> None:
        """has_sound: whether films have a track for sound, which cannot be added later."""
        self.name = ""
        self.what = tuple(dict.fromkeys(what))
        self.ready = False
        self.end: End | None = None
        self.tape_ended = ""
        self.written_bytes = 0
        self.counters: Counter[str] = Counter()
        self.begun: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Resolves once files can be written. Raises RecordingError."""
        self._book = book
        self._tell = tell
        self._began_at: float | None = None
        self._has_sound = has_sound
        self._pictures: deque[tuple[str, Frames, float]] = deque()
        self._sound: deque[tuple[str, bytes, float]] = deque()
        self._tape: deque[tuple[Line, Frames | None]] = deque()
        self._taped = False
        self._frames_taped = 0
        self._stopping: End | None = None
        self._changed = asyncio.Event()
        self.task = asyncio.create_task(self._run(), name="recording")

    # --- from the session

    def picture(self, what: str, rgb: Frames, at: float) -> None:
        """Take an [H, W, 3] picture, not written to again, at its monotonic time; the oldest waiting one makes way."""
        if not self.ready or self._stopping is not None or what not in self.what:
            return
        if len(self._pictures) >= MAX_PICTURES:
            self._pictures.popleft()
            self.counters["pictures_dropped"] += 1
        self._pictures.append((what, rgb, at))
        self._changed.set()

    def wants_sound_of(self, what: str) -> bool:
        """Whether sound of this film is taken now."""
        return self._has_sound and self.ready and self._stopping is None and what in self.what

    def sound(self, what: str, samples: bytes, at: float) -> None:
        """Take sound (16 bit, stereo, 48 kHz) at its monotonic time; the oldest that waits makes way."""
        if not self.wants_sound_of(what):
            return
        if len(self._sound) >= MAX_SOUND:
            self._sound.popleft()
            self.counters["sound_dropped"] += 1
        self._sound.append((what, samples, at))
        self._changed.set()

    @property
    def awaits_stream(self) -> bool:
        """Whether a record for a replay is wanted and can begin: with a stream from its first chunk on."""
        return "session" in self.what and self.ready and not self._taped and self._stopping is None

    def taped(self, stream: EngineStream, header: Header) -> EngineStream:
        """The stream, with all that goes through it recorded."""
        self._taped = True
        self.note(header)
        return TapedStream(stream, self)

    def end_tape(self, reason: str) -> None:
        """The stream ended, or the record has a hole: what is there can be replayed, and nothing is added."""
        if self.is_on:
            self.tape_ended = reason
            self._tell(self, f"The record for a replay ended: {reason}.")

    @property
    def is_on(self) -> bool:
        """Whether lines are still taken (`Tape`)."""
        return self._taped and not self.tape_ended and self._stopping is None

    def note(self, line: Line, frames: Frames | None = None) -> None:
        """Take a line, and the frames that it is about (`Tape`)."""
        if not self.is_on:
            return
        waiting = sum(frames is not None for _, frames in self._tape)
        if waiting >= MAX_CHUNKS or len(self._tape) >= MAX_LINES:
            self.counters["tape_behind"] += 1
            self.end_tape("the disk was too slow for it")
            return
        self._tape.append((line, frames))
        self._changed.set()

    def stop(self, reason: End = End.STOPPED) -> None:
        """End it; what waits is still written."""
        if self._stopping is None:
            self._stopping = reason
            self._changed.set()
            asyncio.get_running_loop().call_later(STOP_TIMEOUT_S, self.task.cancel)

    def shown(self) -> dict[str, object]:
        """What REST and the page see of it."""
        return {
            "recording": self.end is None and self._stopping is None,
            "name": self.name or None,
            "what": list(self.what),
            "bytes": self.written_bytes,
            "pictures_dropped": self.counters["pictures_dropped"],
            "end": self.end,
            "tape_ended": self.tape_ended or None,
        }

    # --- to the process

    async def _run(self) -> None:
        process: asyncio.subprocess.Process | None = None
        try:
            folder = await asyncio.get_running_loop().run_in_executor(None, self._book.make_folder)
            self.name = folder.name
            process = await _start_process(folder, self._book.settings.min_free_bytes)
            await self._serve(process)
        except asyncio.CancelledError:
            # Too slow to end, or the server ends: files are valid as far as they go.
            self._finish(self._stopping or End.SERVER_CLOSED, "cut off")
        except RecordingError as error:
            self._finish(End.FAILED, str(error), error)
        except (OSError, TimeoutError, ValueError) as error:
            log.error("recording %s: %r", self.name, error)
            self._finish(End.FAILED, str(error))
        except Exception:  # the wall: a fault here ends the recording and nothing else
            log.exception("recording %s failed", self.name)
            self._finish(End.FAILED, "a fault")
        finally:
            self._book.forget(self)
            if process is not None and process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
                # Reads what is left as well, so that both pipes are closed.
                await asyncio.shield(process.communicate())

    async def _serve(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdin is not None and process.stdout is not None
        async with asyncio.timeout(START_TIMEOUT_S):
            if not await process.stdout.readline():
                raise OSError("its process did not start")
        self.ready = True
        self.begun.set_result(None)
        log.info("recording %s: %s", self.name, ", ".join(self.what))
        hears = self.wants_sound_of("output") or self.wants_sound_of("input")
        self._tell(self, "Recording. Sound is recorded too, while there is some." if hears else "Recording.")
        feed = asyncio.create_task(self._feed(process.stdin), name="recording/feed")
        end, message = "failed", "its process ended"
        try:
            while line := await process.stdout.readline():
                report = json.loads(line)
                self.written_bytes = report["written"]
                end, message = report.get("end", end), report.get("message", message)
                if "end" not in report and self._book.is_over:
                    self.stop(End.QUOTA)
        finally:
            feed.cancel()
            await asyncio.wait([feed])
        async with asyncio.timeout(STOP_TIMEOUT_S):
            await process.wait()
        self._finish(self._stopping or End.STOPPED if end == "finished" else End(end), message)

    async def _feed(self, stdin: asyncio.StreamWriter) -> None:
        """Write what waits, the record for a replay first, and after `stop` the end of it."""
        with contextlib.suppress(ConnectionError):
            while True:
                if self._tape:
                    await self._send_line(stdin, *self._tape.popleft())
                elif self._sound:
                    await self._send_sound(stdin, *self._sound.popleft())
                elif self._pictures:
                    await self._send_picture(stdin, *self._pictures.popleft())
                elif self._stopping is not None:
                    break
                else:
                    self._changed.clear()
                    await self._changed.wait()
            stdin.close()

    async def _send_line(self, stdin: asyncio.StreamWriter, line: Line, frames: Frames | None) -> None:
        header: dict[str, object] = {"line": line.model_dump_json()}
        if frames is not None:
            header |= {"file": "frames", "ticks": self._frames_taped}
            self._frames_taped += len(frames)
        await _send(stdin, header, frames)

    async def _send_sound(self, stdin: asyncio.StreamWriter, what: str, samples: bytes, at: float) -> None:
        # A film begins with its first picture.
        if self._began_at is not None and at >= self._began_at:
            header = {"sound": what, "ticks": round((at - self._began_at) * TICKS_PER_S), "bytes": len(samples)}
            stdin.write(json.dumps(header).encode() + b"\n")
            stdin.write(samples)
            await stdin.drain()

    async def _send_picture(self, stdin: asyncio.StreamWriter, what: str, rgb: Frames, at: float) -> None:
        if self._began_at is None:
            self._began_at = at
        ticks = max(0, round((at - self._began_at) * TICKS_PER_S))
        await _send(stdin, {"file": what, "ticks": ticks, "has_sound": self._has_sound}, rgb[None])
        self.counters["pictures_written"] += 1

    def _finish(self, end: End, message: str, error: RecordingError | None = None) -> None:
        self.end = self._stopping = end
        self.ready = False
        words = WORDS[end]
        if not self.begun.done():
            words = f"Nothing is recorded: {message}."
            self.begun.set_exception(error or RecordingError(words))
            self.begun.exception()  # told by notice as well: nobody has to ask
        self._book.ended(self)
        log.info("recording %s: %s, %d bytes%s", self.name, end, self.written_bytes, f" ({message})" if message else "")
        self._tell(self, words)


class Recordings(Collector):
    """The folder of recordings, and those that run. Use as an async context manager; on exit all are closed."""

    def __init__(self, settings: RecordingSettings, *, unix_clock: Callable[[], float] = time.time) -> None:
        self.settings = settings
        self.counters: Counter[str] = Counter()
        self._unix_clock = unix_clock
        self._running: set[Recording] = set()
        # Of recordings that have ended.
        self._used_bytes = 0
        self._sweep_task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Recordings:
        """Make the folder. Raises OSError where it cannot be written to."""
        if self.settings.dir is not None:
            self.settings.dir.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._sweep()
            self._sweep_task = asyncio.create_task(self._keep_sweeping(), name="recordings")
        return self

    async def __aexit__(self, *exc: object) -> None:
        if self._sweep_task is not None:
            self._sweep_task.cancel()
        tasks = [recording.task for recording in self._running]
        for recording in list(self._running):
            recording.stop(End.SERVER_CLOSED)
        if tasks:
            await asyncio.wait(tasks, timeout=STOP_TIMEOUT_S + 1.0)

    @property
    def offered(self) -> bool:
        """Whether the operator lets sessions be recorded."""
        return self.settings.dir is not None

    def start(
        self, what: Sequence[str], tell: Callable[[Recording, str], None], *, has_sound: bool = False
    ) -> Recording:
        """Begin a recording. tell: called with a sentence for people when it begins and when it ends.

        Raises: RecordingError where the server does not record.
        """
        if not self.offered:
            raise RecordingError(
                "this server does not record; start it with --recordings DIR", status=422, code="recordings_off"
            )
        recording = Recording(self, what, tell, has_sound=has_sound)
        self._running.add(recording)
        self.counters["started"] += 1
        return recording

    @property
    def used_bytes(self) -> int:
        """Of all recordings, those that run included."""
        return self._used_bytes + sum(recording.written_bytes for recording in self._running)

    @property
    def is_over(self) -> bool:
        """Whether the quota is used up."""
        return self.used_bytes >= self.settings.quota_bytes

    def make_folder(self) -> Path:
        """A folder for a new recording, with a name that nobody gives. Raises RecordingError."""
        assert self.settings.dir is not None
        if self.is_over:
            raise RecordingError(
                f"the recordings take {self.used_bytes / 1e9:.2f} GB of {self.settings.quota_bytes / 1e9:.2f} GB"
                " (recordings.quota_bytes); delete some, or raise it",
                code="recordings_full",
            )
        now = datetime.fromtimestamp(self._unix_clock(), UTC)
        folder = self.settings.dir / f"{now:%Y%m%dT%H%M%SZ}-{secrets.token_hex(4)}"
        try:
            folder.mkdir(mode=0o700)
        except OSError as error:
            raise RecordingError(f"the folder for recordings cannot be written to ({error.strerror})") from error
        return folder

    def ended(self, recording: Recording) -> None:
        """A recording has ended: it counts."""
        self.counters[f"ended_{recording.end}"] += 1
        self.counters += recording.counters
        self.counters["bytes"] += recording.written_bytes

    def forget(self, recording: Recording) -> None:
        """A recording's task is over."""
        self._running.discard(recording)
        self._used_bytes += recording.written_bytes

    async def _keep_sweeping(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_S)
            await asyncio.get_running_loop().run_in_executor(None, self._sweep)

    def _sweep(self) -> None:
        """Delete what is older than `keep_days`, and measure the rest. Touches nothing that is not a recording."""
        assert self.settings.dir is not None
        running = {recording.name for recording in self._running}
        used = 0
        for folder in self.settings.dir.iterdir():
            if not NAME.fullmatch(folder.name) or folder.name in running or folder.is_symlink():
                continue
            files = [path for path in map(folder.joinpath, (*FILES.values(), LINES_FILE)) if path.is_file()]
            try:
                newest = max((path.stat().st_mtime for path in [folder, *files]), default=0.0)
                keep_days = self.settings.keep_days
                if keep_days is not None and newest < self._unix_clock() - keep_days * 86_400:
                    for path in files:
                        path.unlink()
                    folder.rmdir()
                    self.counters["deleted"] += 1
                    continue
                used += sum(path.stat().st_size for path in files)
            except OSError as error:
                log.warning("recording %s cannot be tidied away: %s", folder.name, error)
        self._used_bytes = used

    def collect(self) -> Iterator[Metric]:
        """What Prometheus is told."""
        yield GaugeMetricFamily("livebrush_recordings", "Recordings that run", value=len(self._running))
        yield GaugeMetricFamily("livebrush_recordings_bytes", "Room that recordings take", value=self.used_bytes)
        events = CounterMetricFamily("livebrush_recording_events", "What recordings did and lost", labels=["what"])
        for what, count in sorted(self.counters.items()):
            events.add_metric([what], count)
        yield events


async def _start_process(folder: Path, min_free_bytes: int) -> asyncio.subprocess.Process:
    pipe = asyncio.subprocess.PIPE
    command = [sys.executable, "-P", "-m", "server.recording_process", str(folder), str(min_free_bytes)]
    return await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe)


async def _send(stdin: asyncio.StreamWriter, header: dict[str, object], frames: Frames | None) -> None:
    if frames is not None:
        header |= {"shape": frames.shape[:3], "bytes": frames.nbytes}
    stdin.write(json.dumps(header).encode() + b"\n")
    if frames is not None:
        stdin.write(frames.tobytes())
    await stdin.drain()
