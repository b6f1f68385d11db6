"""The pictures of one session, from its camera to its screen.

    camera frames -> rate gate -> chunk -> engine -> pacer -> presenter -> outgoing track

While there is no engine (the model loads, a rank was lost) the camera itself goes to the pacer, so that there is always
a moving picture.
"""

from __future__ import annotations

import asyncio
import logging

from engine.api import (
    EngineError,
    EngineState,
    EngineStatus,
    EngineStream,
    Frames,
    RankLost,
    RenderedChunk,
)
from server.chunk_book import ChunkBook
from server.ingest import ChunkAssembler, RateGate, to_rgb
from server.metrics import SessionMetrics
from server.pacer import Pacer
from server.peer import PeerGone
from server.presenter import RESTYLED, Picture, Presenter
from server.resume import Link
from server.session_context import Outlet, SessionContext
from server.session_page import Page
from server.session_recorder import Recorder
from server.session_terms import Terms

log = logging.getLogger(__name__)

PROGRESS_PERIOD_S = 1.0
FAULT_NOTICE_PERIOD_S = 10.0
ENGINE_RETRY_S = 1.0
RELEASE_POLL_S = 0.25
AUDIO_DELAY_SMOOTHING = 0.05
# Reason of frames that the camera rung shows as they came, or takes back from the engine.
CAMERA_RUNG = "camera_rung"

STAGES = {
    EngineState.STARTING: "is starting",
    EngineState.LOADING: "is loading",
    EngineState.WARMING: "is warming up",
}
# Of RenderedChunk.fault, in plain words.
MODEL_FAULTS = {
    "nan": "The model gave a broken picture",
    "black": "The model gave a black picture",
    "frozen": "The model's picture stood still while you moved",
    "text_pending": "The model is still reading the words of the style",
}
INPUT_FAULTS = {
    "input_too_large": "The camera picture has over {limit} pixels; choose a smaller camera resolution.",
    "input_undecodable": "The camera picture cannot be decoded; reload the page or choose another camera.",
}


class Media:
    """Three loops: `ingest`, one a connection; `render` and `play`, one a session."""

    def __init__(
        self,
        session_id: str,
        context: SessionContext,
        terms: Terms,
        page: Page,
        recorder: Recorder,
        metrics: SessionMetrics,
        *,
        bypass: bool,
        outlet: Outlet | None,
    ) -> None:
        self._id = session_id
        self._context = context
        self._clock = context.clock
        self._terms = terms
        self._page = page
        self._recorder = recorder
        self._metrics = metrics
        self._outlet = outlet
        self._first_index = self._next_index = 0
        self._gate = RateGate(terms.rung.fps)
        self._assembler = self._new_assembler()
        self._chunks = ChunkBook(metrics, self._clock)
        self._stream: EngineStream | None = None
        self._restyling = False
        self._fault_told_at: dict[str, float] = {}
        self._told = ""
        self._pacer: Pacer[Picture] = Pacer(terms.rung.fps, context.settings.latency_budget_s)
        self._queued = asyncio.Event()
        self.presenter = Presenter(bypass=bypass)
        self.last_input: Frames | None = None
        """The newest camera picture of the agreed rate, as the engine gets it."""
        self.last_output: Frames | None = None
        """The newest picture shown."""

    # --- told by the session

    def join(self) -> None:
        """Another connection: its frames are counted on from those of the one before; its page knows nothing yet."""
        self._first_index = self._next_index
        self._told = ""

    @property
    def has_stream(self) -> bool:
        """Whether a stream is open on the engine."""
        return self._stream is not None

    def update(self) -> int | None:
        """Have the terms as they are now in the next chunk; the revision that shows them, None without a stream."""
        return self._stream.update(self._terms.engine_params()) if self._stream is not None else None

    def set_rate(self, fps: float) -> None:
        """Another output rate from now on."""
        self._gate.set_rate(fps)
        self._pacer.set_rate(fps)

    def leave_engine(self) -> None:
        """Show the camera from the next frame on: what is on its way through the engine is given up."""
        self._chunks.give_up(CAMERA_RUNG)
        self._metrics.on_dropped(self._clock(), CAMERA_RUNG, self._assembler.clear())
        self._restyling = False

    # --- camera to engine

    async def ingest(self, peer: Link) -> None:
        """Feed the newest camera frame of the agreed rate to the engine, or to the pacer while there is none."""
        loop = asyncio.get_running_loop()
        width, height = self._context.engine.frame_size
        while (frame := await peer.next_frame()) is not None:
            index = self._first_index + frame.index
            self._next_index = index + 1
            admitted = self._gate.admit(frame.arrived_at)
            self._metrics.on_stage("connected", peer.connected_at or self._clock())
            self._metrics.on_arrival(self._clock(), index, frame.arrived_at, admitted=admitted)
            if not admitted:
                continue
            rgb = await loop.run_in_executor(self._context.executor, to_rgb, frame.picture, width, height)
            self.last_input = rgb
            self._recorder.picture("input", rgb, frame.arrived_at)
            self.take(rgb, index, frame.arrived_at)
        for reason, message in INPUT_FAULTS.items():
            if peer.counters.get(reason):
                self._page.notice(reason, message.format(limit=self._context.settings.media.max_input_pixels))
                raise PeerGone(reason)

    def take(self, rgb: Frames, index: int, arrived_at: float) -> None:
        """A camera frame of the agreed rate, in the engine's size."""
        if self._terms.rung.camera:
            self._metrics.on_withheld(CAMERA_RUNG, 1)
            self._queue([Picture(index, arrived_at, rgb, withheld=True)])
            return
        stream = self._stream
        # Once the user looks at the camera it keeps moving until the restyled picture comes; a warm server starts
        # with the restyled picture and never shows the camera.
        camera_shown = self._metrics.released > 0
        if not self._restyling and (stream is None or camera_shown):
            self._queue([Picture(index, arrived_at, rgb)])
        if stream is None:
            return
        chunk = self._assembler.push(rgb, index=index, arrived_at=arrived_at)
        if chunk is None:
            return
        self._chunks.add(stream, chunk)
        try:
            stream.submit(chunk)
            self._metrics.on_submitted(self._clock())
        except EngineError:
            # The render task sees the same error and takes the stream down, and with it this chunk.
            pass
        self._chunks.count(stream)

    def _new_assembler(self) -> ChunkAssembler:
        capacity, budget_s = self._context.engine.capacity, self._context.settings.latency_budget_s
        return ChunkAssembler(capacity.chunk_frames, budget_s, first_chunk_frames=capacity.first_chunk_frames)

    # --- engine to pacer

    async def render(self) -> None:
        """Keep a stream open on the engine whenever there is one, and queue what it renders."""
        engine = self._context.engine
        was_lost = False
        while True:
            try:
                await self._wait_ready(restarting=was_lost)
                params = self._terms.engine_params()
                async with engine.open_stream(self._id, params) as opened:
                    stream = self._recorder.taped(opened, params)
                    self.open(stream)
                    if was_lost:
                        self._page.notice("engine_back", "The engine is back.")
                    elif stream is opened:
                        self._page.notice("model_ready", "The model is ready.")
                    was_lost = False
                    async for chunk in stream:
                        self.on_rendered(stream, chunk)
                        if self._recorder.awaits_stream:
                            self.lose_all("begun_anew")
                            break
            except RankLost:
                was_lost = True
                self.lose_all()
                self._page.notice("engine_lost", "The engine stopped; you see your camera until it is back.")
            except EngineError as error:
                was_lost = True
                self.lose_all()
                self._tell_once(f"No restyling: {error}")
                await asyncio.sleep(ENGINE_RETRY_S)
            finally:
                self.close()

    async def _wait_ready(self, *, restarting: bool) -> None:
        """Wait until streams render, telling the page how far the model is.

        restarting: the page knows that the engine is gone; it is told of progress only once there is some.
        """
        engine = self._context.engine
        told = engine.status if restarting else None
        ready = asyncio.create_task(engine.wait_ready(), name=f"{self._id}/wait-ready")
        try:
            while not ready.done() and engine.status.state is not EngineState.READY:
                if engine.status != told and engine.status.state in STAGES:
                    told = engine.status
                    self._tell_progress(told)
                await asyncio.wait({ready}, timeout=PROGRESS_PERIOD_S)
            await ready
        finally:
            ready.cancel()

    def tell_progress(self) -> None:
        """Tell a page that came back how far the model is, unless it is there."""
        status = self._context.engine.status
        if status.state in STAGES:
            self._tell_progress(status)

    def _tell_progress(self, status: EngineStatus) -> None:
        self._page.notice(
            "model_loading",
            f"The model {STAGES[status.state]}; you see your camera until it is ready.",
            percent=status.percent,
            stage=str(status.state),
            detail=status.detail or None,
        )

    def _tell_once(self, message: str) -> None:
        """An engine that stays broken is told of once, not at every try."""
        if message != self._told:
            self._told = message
            log.error("session %s: %s", self._id, message)
            self._page.notice("engine_lost", message)

    def open(self, stream: EngineStream) -> None:
        """A stream is open."""
        self._assembler = self._new_assembler()
        self._chunks.open()
        self._told = ""
        self._stream = stream

    def lose_all(self, reason: str = "engine_lost") -> None:
        """The stream broke: what was on its way through the engine is lost. (At the session's end it stays inside.)"""
        if self._stream is None:
            return
        self._chunks.lose_all(self._stream, reason)
        self._metrics.on_dropped(self._clock(), reason, self._assembler.clear())

    def close(self) -> None:
        """The stream is closed."""
        self._stream = None
        self._recorder.end_tape()
        self._restyling = False
        self._chunks.clear()
        # Revisions count anew on the next stream, which is opened with these parameters.
        self._page.clear_acks()

    def on_rendered(self, stream: EngineStream, chunk: RenderedChunk) -> None:
        """A chunk came back."""
        now = self._clock()
        self._chunks.count(stream)
        self._metrics.on_chunk(
            now, chunk.engine_started_at - chunk.captured_at[-1], chunk.engine_finished_at - chunk.engine_started_at
        )
        if chunk.fault:
            self._on_fault(chunk)
        source = self._chunks.take(stream, chunk)
        if source is None:
            return  # its frames were given up before it came
        self._restyling = True
        self._queue(
            [
                Picture(
                    index,
                    arrived_at,
                    camera,
                    None if chunk.fault else restyled,
                    chunk.revision,
                    chunk.index,
                    withheld=bool(chunk.fault),
                    understood=chunk.understood,
                )
                for index, arrived_at, camera, restyled in zip(
                    chunk.frame_indices, chunk.captured_at, source.frames, chunk.frames, strict=True
                )
            ]
        )

    def _on_fault(self, chunk: RenderedChunk) -> None:
        """The model's picture was withheld: counted, and told once in a while."""
        self._metrics.on_withheld(chunk.fault, len(chunk.frames))
        now = self._clock()
        if now - self._fault_told_at.get(chunk.fault, float("-inf")) < FAULT_NOTICE_PERIOD_S:
            return
        self._fault_told_at[chunk.fault] = now
        words = MODEL_FAULTS.get(chunk.fault, f"The model's picture was not fit to be shown ({chunk.fault})")
        self._page.notice("model_fault", f"{words}; you see your camera meanwhile.", reason=chunk.fault)

    # --- pacer to screen

    def _queue(self, pictures: list[Picture]) -> None:
        now = self._clock()
        dropped = self._pacer.push(pictures, [picture.arrived_at for picture in pictures], now)
        self._metrics.on_dropped(now, "pacer_full", [picture.index for picture in dropped])
        self._queued.set()

    async def play(self) -> None:
        """Release every picture when it is due."""
        while True:
            due = self._pacer.due_at()
            if due is None:
                self._queued.clear()
                await self._queued.wait()
                continue
            if (wait := due - self._clock()) > 0:
                await asyncio.sleep(min(wait, RELEASE_POLL_S))
                continue
            now = self._clock()
            shed = self._pacer.shed(now)
            self._metrics.on_dropped(now, "too_old", [picture.index for picture in shed])
            self._metrics.on_engine_lost(len(shed))
            self.release(self._pacer.pop(now))

    def release(self, picture: Picture) -> None:
        """Show a picture: on the peer's track, or on the outlet."""
        peer = self._page.peer
        assert peer is not None
        now = self._clock()
        frame = self.presenter.present(picture)
        self.last_output = frame.rgb
        self._recorder.picture("output", frame.rgb, now)
        if self._outlet is None:
            peer.send_frame(frame)
        else:
            self._outlet.push(frame)
        self._metrics.on_release(now, picture.index, picture.arrived_at, restyled=frame.kind == RESTYLED)
        peer.video_delay_s += AUDIO_DELAY_SMOOTHING * (now - picture.arrived_at - peer.video_delay_s)
        if picture.restyled is not None:
            self._page.on_shown(picture.index, picture.revision, picture.chunk, picture.understood)
