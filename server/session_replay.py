"""A recorded session through the engine again: same frames, same parameters at the same chunks, one chunk at a time.

What the engine dropped then had no part in the picture and is left out. Every chunk's pictures are held against the
digest of those that the session showed.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from engine.api import Engine, EngineStream, FrameChunk, RenderedChunk, StreamParams, WeightedPrompt
from engine.client import LocalEngine
from engine.cluster import arrange
from engine.fake import FakeEngine
from server.recording_process import EXACT_FORM, TICKS_PER_S, Disk, DiskFile, VideoFile
from server.restyle import CHUNK_TIMEOUT_S, NO_DEADLINE_S, TEXT_PENDING, TEXT_TIMEOUT_S
from server.session_record import Header, RecordError, SessionRecord, digest_of, model_digest, versions
from server.starting import start_engine

TEXT_POLL_S = 0.5
SHOWN = 8


@dataclass(frozen=True, slots=True)
class ReplaySummary:
    """What came out. chunks: run; frames: in them. differing: those whose pictures are not what the session had.
    skipped: those that the engine dropped then."""

    chunks: int
    frames: int
    skipped: int
    differing: tuple[int, ...]

    @property
    def exact(self) -> bool:
        """Whether anything was run, and all of it gave the same pictures."""
        return self.chunks > 0 and not self.differing

    def as_text(self) -> str:
        """For people."""
        text = f"{self.chunks} chunks, {self.frames} frames"
        if self.skipped:
            text += f" ({self.skipped} more were dropped in the session, and are left out)"
        if not self.chunks:
            return "The record holds no chunk that came back."
        if self.exact:
            return f"{text}: every picture is equal bit for bit to what the session had."
        first = ", ".join(map(str, self.differing[:SHOWN]))
        more = ", …" if len(self.differing) > SHOWN else ""
        return f"{text}: {len(self.differing)} chunks differ from what the session had ({first}{more})."


async def run_again(
    folder: Path, out: Path | None = None, *, force: bool = False, tell: Callable[[str], None] = lambda _: None
) -> ReplaySummary:
    """Replay a record.

    Args:
        out: a Matroska file for the pictures, without loss.
        tell: told in words what may make a difference, and what is being done.

    Raises: RecordError for a folder that is no record, another model than then, or an out that cannot be had;
        EngineError, if the engine does not start.
    """
    record = SessionRecord(folder)
    _check_model(record.header, tell)
    if out is not None:
        _check_out(out, force)
    engine = _engine_of(record.header)
    try:
        tell(f"starting {record.header.engine.model}")
        await start_engine(engine)
        read: set[tuple[WeightedPrompt, ...]] = set()
        for params in map(record.params_of, [0, *record.revisions]):
            if params.prompts not in read:
                read.add(params.prompts)
                await _read_text(engine, params)
        with ExitStack() as cleanup:
            video = None
            if out is not None:
                video = _open(out, engine.frame_size)
                cleanup.callback(video.close)
            return await _run(engine, record, video)
    finally:
        await engine.close()


def _check_model(header: Header, tell: Callable[[str], None]) -> None:
    if header.engine_kind == "local":
        try:
            found = model_digest(header.engine.model_dir)
        except FileNotFoundError as error:
            raise RecordError(f"the record needs the model it was made with: {error}") from error
        if found != header.model_digest:
            raise RecordError(
                f"the session ran {header.engine.model!r} with digest {header.model_digest[:12]}…, the model of that"
                f" name here has {found[:12]}…: install the one it ran with"
            )
    here = versions()
    for name, then in header.versions.items():
        if here.get(name) != then:
            tell(f"recorded with {name} {then}, replayed with {here.get(name)}: pictures may differ")


def _check_out(out: Path, force: bool) -> None:
    if out.suffix.lower() != ".mkv":
        raise RecordError(f"{out}: name it .mkv; the pictures are kept without loss, which is Matroska here")
    if not out.parent.is_dir():
        raise RecordError(f"{out.parent}: no such folder; make it first")
    if out.exists() and not force:
        raise RecordError(f"{out}: exists already; --force overwrites it")


def _engine_of(header: Header) -> Engine:
    settings = header.engine
    if header.engine_kind == "fake":
        return FakeEngine(settings.width, settings.height, delay_s=0.0)
    # One of the groups that stood side by side: each is the whole model.
    groups, _ = arrange(settings)
    return LocalEngine(groups[0])


async def _read_text(engine: Engine, params: StreamParams) -> None:
    """Have the words of a style read beforehand: in the session they were, by the chunk that shows them.

    Raises: RecordError, if that takes too long.
    """
    width, height = engine.frame_size
    count = engine.capacity.first_chunk_frames
    black = np.zeros((count, height, width, 3), np.uint8)
    chunk = FrameChunk(0, black, tuple(range(count)), (0.0,) * count, time.monotonic() + NO_DEADLINE_S)
    began_at = time.monotonic()
    while True:
        async with engine.open_stream("text", params) as stream:
            rendered = await _render(stream, aiter(stream), chunk)
        if rendered.fault != TEXT_PENDING:
            return
        if time.monotonic() - began_at > TEXT_TIMEOUT_S:
            raise RecordError(f"the words of a style were not read within {TEXT_TIMEOUT_S:.0f} s")
        await asyncio.sleep(TEXT_POLL_S)


def _open(out: Path, size: tuple[int, int]) -> VideoFile:
    out.unlink(missing_ok=True)
    return VideoFile(DiskFile(out, Disk(out.parent, 0)), EXACT_FORM, *size)


async def _run(engine: Engine, record: SessionRecord, video: VideoFile | None) -> ReplaySummary:
    chunks = frames = skipped = 0
    differing: list[int] = []
    began_at: float | None = None
    revision = 0
    async with engine.open_stream("replay", record.header.params) as stream:
        results = aiter(stream)
        for recorded in record.chunks():
            submitted, returned = recorded.submitted, recorded.returned
            if returned is None:
                skipped += 1
                continue
            if returned.revision != revision:
                revision = returned.revision
                stream.update(record.params_of(revision))
            chunk = FrameChunk(
                submitted.chunk,
                recorded.frames,
                submitted.frame_indices,
                submitted.captured_at,
                time.monotonic() + NO_DEADLINE_S,
            )
            rendered = await _render(stream, results, chunk)
            if (rendered.fault, digest_of(rendered.frames)) != (returned.fault, returned.digest):
                differing.append(submitted.chunk)
            chunks += 1
            frames += len(rendered.frames)
            if video is not None:
                began_at = submitted.captured_at[0] if began_at is None else began_at
                for rgb, at in zip(rendered.frames, submitted.captured_at, strict=True):
                    video.write(rgb, round((at - began_at) * TICKS_PER_S))
    return ReplaySummary(chunks, frames, skipped, tuple(differing))


async def _render(stream: EngineStream, results: AsyncIterator[RenderedChunk], chunk: FrameChunk) -> RenderedChunk:
    stream.submit(chunk)
    try:
        async with asyncio.timeout(CHUNK_TIMEOUT_S):
            return await anext(results)
    except (TimeoutError, StopAsyncIteration):
        raise RecordError(f"chunk {chunk.index} did not come back within {CHUNK_TIMEOUT_S:.0f} s") from None
