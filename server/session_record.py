"""What a session was given, kept so that it can be run again exactly: `livebrush replay` (docs/recording.md).

A record is two files: frames.mkv, every camera frame that went to the engine, without loss; and session.jsonl, a line
each for the header, every chunk submitted, every change of parameters, and every chunk that came back: which parameters
shaped it, and the digest of its pictures. A chunk that was dropped has no such last line and had no part in the
picture. Lines come in the order of events, the frames of a chunk are on the disk before its line.
"""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Literal, Protocol

import av
import numpy as np
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from engine.api import EngineStream, FrameChunk, Frames, RenderedChunk, StreamCounters, StreamParams
from engine.config import EngineSettings
from server.recording_process import FRAMES_FILE, LINES_FILE

FORMAT: Literal[1] = 1
DIGEST_BYTES = 16


class RecordError(Exception):
    """A folder that is no record, or not one that can be run here; the text says what is wrong and the cure."""


class _Line(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Header(_Line):
    """What ran. model_digest: see `model_digest`; versions: of Livebrush and torch."""

    kind: Literal["header"] = "header"
    format: Literal[1] = FORMAT
    versions: dict[str, str]
    engine_kind: Literal["local", "fake"]
    engine: EngineSettings
    model_digest: str
    params: StreamParams


class Submitted(_Line):
    """A chunk went to the engine; its frames are the next ones of frames.mkv. captured_at: monotonic seconds."""

    kind: Literal["submitted"] = "submitted"
    chunk: int
    frame_indices: tuple[int, ...]
    captured_at: tuple[float, ...]


class Updated(_Line):
    """The parameters that count from a chunk on that names this revision."""

    kind: Literal["updated"] = "updated"
    revision: int
    params: StreamParams


class Returned(_Line):
    """A chunk came back; see `RenderedChunk`. digest: of its pictures."""

    kind: Literal["returned"] = "returned"
    chunk: int
    revision: int
    fault: str
    digest: str


Line = Header | Submitted | Updated | Returned
_line: TypeAdapter[Line] = TypeAdapter(Annotated[Line, Field(discriminator="kind")])


class Tape(Protocol):
    """Where a record goes."""

    @property
    def is_on(self) -> bool:
        """Whether lines are taken."""
        ...

    def note(self, line: Line, frames: Frames | None = None) -> None:
        """Take a line, and the frames that it is about. Never waits, never raises."""
        ...


def digest_of(frames: Frames) -> str:
    """Tells whether two stacks of pictures are equal bit for bit."""
    return hashlib.blake2b(frames.tobytes(), digest_size=DIGEST_BYTES).hexdigest()


def model_digest(folder: Path) -> str:
    """Tells models apart: of the JSON files in a model folder, which hold the SHA-256 of its weights."""
    found = hashlib.sha256()
    for path in sorted(folder.glob("*.json")):
        found.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return found.hexdigest()


def header_of(engine_kind: str, settings: EngineSettings, params: StreamParams) -> Header:
    """The header of a record that begins now. Raises FileNotFoundError without the model."""
    return Header(
        versions=versions(),
        engine_kind="fake" if engine_kind == "fake" else "local",
        # As it is here: another machine's `auto` may be another one.
        engine=settings.model_copy(update={"dtype": settings.precision}),
        model_digest="" if engine_kind == "fake" else model_digest(settings.model_dir),
        params=params,
    )


def why_not_exact(settings: EngineSettings) -> str:
    """Why a session of such an engine cannot be run again exactly; empty where it can."""
    if settings.mode == "batch":
        return "in mode batch the steps of successive chunks share a pass or not, depending on time"
    if settings.chunk_latents > 1:
        return "with chunk_latents 2 two chunks are rendered as one or not, depending on time"
    if settings.micro_batch > 1:
        return "with micro_batch over 1 streams share a pass or not, depending on time"
    return ""


def versions() -> dict[str, str]:
    """Of what makes the pictures."""
    found = {}
    for name in ("livebrush", "torch"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


class TapedStream:
    """An engine's stream of which everything that goes in and comes out is told to a tape (`EngineStream`)."""

    def __init__(self, stream: EngineStream, tape: Tape) -> None:
        self._stream = stream
        self._tape = tape

    @property
    def counters(self) -> StreamCounters:
        """See `EngineStream.counters`."""
        return self._stream.counters

    def submit(self, chunk: FrameChunk) -> None:
        """See `EngineStream.submit`."""
        self._stream.submit(chunk)
        line = Submitted(chunk=chunk.index, frame_indices=chunk.frame_indices, captured_at=chunk.captured_at)
        self._tape.note(line, chunk.frames)

    def update(self, params: StreamParams) -> int:
        """See `EngineStream.update`."""
        revision = self._stream.update(params)
        self._tape.note(Updated(revision=revision, params=params))
        return revision

    async def __aiter__(self) -> AsyncIterator[RenderedChunk]:
        """See `EngineStream.__aiter__`."""
        async for chunk in self._stream:
            if self._tape.is_on:
                digest = digest_of(chunk.frames)
                self._tape.note(Returned(chunk=chunk.index, revision=chunk.revision, fault=chunk.fault, digest=digest))
            yield chunk


@dataclass(frozen=True, slots=True)
class RecordedChunk:
    """A chunk as the engine got it, and what it gave for it; returned is None where it was dropped."""

    submitted: Submitted
    frames: Frames
    returned: Returned | None


class SessionRecord:
    """A record, read. updates: parameters by revision."""

    def __init__(self, folder: Path) -> None:
        """Read session.jsonl; a last line that was cut off is left out. Raises RecordError."""
        path = folder / LINES_FILE
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            raise RecordError(
                f"{folder} holds no {LINES_FILE}: it is no record of a session; record with what: session"
            ) from None
        except (OSError, UnicodeDecodeError) as error:
            raise RecordError(f"{path} cannot be read: {error}") from error
        whole = text.splitlines()[: text.count("\n")]
        try:
            lines = [_line.validate_json(line) for line in whole]
        except ValidationError as error:
            raise RecordError(f"{path}: line {_first_bad(whole)} is not of format {FORMAT}: {error}") from error
        if not lines or not isinstance(lines[0], Header):
            raise RecordError(f"{path} has no header: the recording ended before the first chunk")
        self.header = lines[0]
        self.updates = {line.revision: line.params for line in lines if isinstance(line, Updated)}
        self._submitted = [line for line in lines if isinstance(line, Submitted)]
        self._returned = {line.chunk: line for line in lines if isinstance(line, Returned)}
        self._frames_path = folder / FRAMES_FILE

    def __len__(self) -> int:
        return len(self._submitted)

    @property
    def revisions(self) -> list[int]:
        """Of the updates that shaped a chunk, in order."""
        return [found for found in sorted({line.revision for line in self._returned.values()}) if found]

    def params_of(self, revision: int) -> StreamParams:
        """The parameters of a revision; 0 is those at opening. Raises RecordError."""
        if revision and revision not in self.updates:
            raise RecordError(f"the record names revision {revision}, and does not say what it was")
        return self.updates[revision] if revision else self.header.params

    def chunks(self) -> Iterator[RecordedChunk]:
        """Every chunk with its frames, in order; ends early where the frames do. Raises RecordError."""
        try:
            with av.open(str(self._frames_path)) as container:
                decoded = container.decode(video=0)
                for submitted in self._submitted:
                    pictures = [
                        picture.to_ndarray(format="rgb24")
                        for _, picture in zip(submitted.frame_indices, decoded, strict=False)
                    ]
                    if len(pictures) < len(submitted.frame_indices):
                        return
                    frames = np.stack(pictures).astype(np.uint8, copy=False)
                    yield RecordedChunk(submitted, frames, self._returned.get(submitted.chunk))
        except (av.FFmpegError, OSError) as error:
            raise RecordError(f"{self._frames_path} cannot be read: {error}") from error


def _first_bad(lines: list[str]) -> int:
    for number, line in enumerate(lines, 1):
        try:
            _line.validate_json(line)
        except ValidationError:
            return number
    return 0
