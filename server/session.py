"""One peer's session: its tasks, from the remote track through the engine to the outgoing track.

    camera frames -> rate gate -> chunk -> engine -> pacer -> presenter -> outgoing track

While there is no engine (the model loads, a rank was lost) the camera itself goes to the pacer, so that there is always
a moving picture. The session opens everything it uses and closes it when its `run` ends, however it ends.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field, replace
from typing import Protocol

from engine.api import (
    Engine,
    EngineError,
    EngineState,
    EngineStatus,
    EngineStream,
    FrameChunk,
    Frames,
    RankLost,
    RenderedChunk,
    StreamParams,
    Understood,
)
from engine.config import MAX_STEPS
from server import control
from server.acks import Ack, AckBook
from server.errors import Conflict, NotFound, ServerError
from server.frames import OutgoingFrame
from server.ingest import ChunkAssembler, RateGate, to_rgb
from server.ladder import Rung
from server.metrics import ServerMetrics, SessionMetrics
from server.node_name import new_node_name
from server.pacer import Pacer
from server.peer import Peer, PeerGone
from server.presenter import RESTYLED, Picture, Presenter
from server.recording import End, Recording, RecordingError, Recordings
from server.resume import SEAT_S, Arrival, Connect, Door, Link
from server.scenes import Show
from server.session_record import header_of, why_not_exact
from server.settings import ServerSettings

log = logging.getLogger(__name__)

TELEMETRY_PERIOD_S = 0.5
# Chunks whose camera frames are kept until the restyled ones return: the engine's four slots and one, and those that
# a stream batch holds until their last step.
MAX_SOURCES = 5 + MAX_STEPS - 1
PROGRESS_PERIOD_S = 1.0
FAULT_NOTICE_PERIOD_S = 10.0
ENGINE_RETRY_S = 1.0
RELEASE_POLL_S = 0.25
AUDIO_DELAY_SMOOTHING = 0.05
BUSY_SHARE = 0.95
# Reason of frames that the camera rung shows as they came, or takes back from the engine.
CAMERA_RUNG = "camera_rung"
# Ends of a connection, not of a session: its page may come back.
REPLACED, LOST = "replaced", {"vanished", "failed"}
# Ends in which there is nobody left to tell.
PEER_LEFT = {"goodbye", "closed_by_peer", "vanished", "failed", "never_connected"}
# For the summary to leave before its channel is closed.
GOODBYE_S = 0.05

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


@dataclass(frozen=True, slots=True)
class SessionContext:
    """What every session of a server shares."""

    engine: Engine
    settings: ServerSettings
    metrics: ServerMetrics
    executor: Executor
    clock: Callable[[], float] = time.monotonic
    steps_max: int = MAX_STEPS
    seed: bool = True
    style_names: Mapping[str, str] = field(default_factory=dict)
    recordings: Recordings | None = None
    node: str = field(default_factory=new_node_name)
    """This run's name, for who stands before several servers."""


class Outlet(Protocol):
    """Where the pictures of a session go that are not for its own peer."""

    def push(self, frame: OutgoingFrame) -> None:
        """Release a picture; never waits, never raises."""
        ...

    async def serve(self, peer: Peer) -> None:
        """Runs beside the session's tasks, for what else there is to carry; cancelled at the session's end."""
        ...


class Session:
    """One peer's tasks. `run` serves until the peer leaves; `answered` resolves to the SDP answer."""

    def __init__(
        self,
        session_id: str,
        context: SessionContext,
        params: StreamParams,
        *,
        fps: float,
        transition_s: float = 0.0,
        bypass: bool = False,
        outlet: Outlet | None = None,
    ) -> None:
        self.id = session_id
        self.params = params
        """What the user wishes; the engine gets what `rung` leaves of it."""
        self.transition_s = transition_s
        self.rung = Rung(context.steps_max, small=False, fps=fps)
        self.answered: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._context = context
        self._outlet = outlet
        self._clock = context.clock
        self.metrics = SessionMetrics(context.metrics, self._clock(), context.settings.latency_budget_s)
        self.peer: Link | None = None
        self.leg = -1
        """How many connections this session had before the one it has."""
        self._arrival: Arrival | None = None
        self._arrived = asyncio.Event()
        self._first_index = self._next_index = 0
        self._stream: EngineStream | None = None
        self._stream_drops = self._stream_reanchored = 0
        # Chunks that this stream lost, by reason, as far as they are in the books.
        self._reasons_given: Counter[str] = Counter()
        # Of the last move, for a page that has yet to connect.
        self._rung_notice: tuple[str, dict[str, object]] | None = None
        self._fault_told_at: dict[str, float] = {}
        self._told = ""
        self._gate = RateGate(fps)
        self._pacer: Pacer[Picture] = Pacer(fps, context.settings.latency_budget_s)
        self._presenter = Presenter(bypass=bypass)
        self._sources: dict[int, FrameChunk] = {}
        self._assembler = self._new_assembler()
        self._restyling = False
        self._released = asyncio.Event()
        self._acks = AckBook()
        self._bad_messages = 0
        self.scenes = Show(self._clock, self._follow_scene, context.steps_max)
        """What is painted when, where a list of scenes was loaded."""
        self.recording: Recording | None = None
        """The one that runs, or ran last."""
        self.last_input: Frames | None = None
        """The newest camera picture of the agreed rate, as the engine gets it."""
        self.last_output: Frames | None = None
        """The newest picture shown."""

    @property
    def fps(self) -> float:
        """The agreed output rate, frames a second."""
        return self.rung.fps

    # --- lifetime

    async def run(self, connect: Connect) -> str:
        """Open a connection and serve; returns why its peer left. What it opens is closed when this ends.

        Raises: ServerError when the connection cannot be made.
        """
        async with Door() as door:
            peer = await door.open(connect)
            self._join(peer)
            self.answered.set_result(peer.answer_sdp)
            reason = "fault"
            try:
                reason = await self._serve(door, peer)
            except asyncio.CancelledError:
                reason = "closed"
                raise
            finally:
                if self._arrival is not None:
                    self._arrival.refuse(NotFound("the session has ended", code="session_gone"))
                if self.recording is not None:
                    self.recording.stop(End.SESSION_ENDED)
                await self._sum_up(peer if self.peer is None else self.peer, reason)
        return reason

    async def rejoin(self, connect: Connect) -> None:
        """Go on over another connection; returns once it is open and the one before is to be closed.

        Raises: NotFound, if the session ends meanwhile; Conflict, if yet another connection comes first; or what
            `connect` raises, and the session stays as it is then.
        """
        if self._arrival is not None:
            self._arrival.refuse(Conflict("another page took this session up at the same time", code="resumed_twice"))
        self._arrival = arrival = Arrival(connect)
        self._arrived.set()
        await arrival.answered

    async def _serve(self, door: Door, peer: Link) -> str:
        """Run the session's tasks until the peer leaves for good; returns why it did."""
        try:
            async with asyncio.TaskGroup() as tasks:
                for work in (self._render, self._play, self.scenes.run):
                    tasks.create_task(work(), name=f"{self.id}/{work.__name__.strip('_')}")
                if self._outlet is not None:
                    assert isinstance(peer, Peer)
                    tasks.create_task(self._outlet.serve(peer), name=f"{self.id}/outlet")
                tasks.create_task(self._follow_peers(door, peer), name=f"{self.id}/peers")
        except* PeerGone as gone:
            reason = _first_reason(gone)
        return reason

    async def _follow_peers(self, door: Door, peer: Link) -> None:
        """One connection after the other. Raises PeerGone when nobody comes back."""
        while True:
            reason = await self._serve_peer(peer)
            if reason != REPLACED:
                if reason not in LOST or self._outlet is not None:
                    raise PeerGone(reason)
                await door.close()
                log.info("session %s: its peer is lost (%s); it may come back", self.id, reason)
                left_s = peer.last_packet_at + SEAT_S - time.monotonic()
                try:
                    async with asyncio.timeout(max(0.0, left_s)):
                        await self._arrived.wait()
                except TimeoutError:
                    raise PeerGone(reason) from None
            peer = await self._take_up(door, peer)

    async def _take_up(self, door: Door, peer: Link) -> Link:
        """Open the connection that arrived, in the place of `peer`; returns `peer` when that cannot be done."""
        arrival, self._arrival = self._arrival, None
        self._arrived.clear()
        assert arrival is not None
        try:
            fresh = await door.open(arrival.connect)
        except ServerError as error:
            arrival.refuse(error)
            return peer
        fresh.video_delay_s = peer.video_delay_s
        self._join(fresh)
        arrival.accept()
        await door.close_before()
        return fresh

    async def _serve_peer(self, peer: Link) -> str:
        """Serve one connection; returns why it ended, REPLACED if another has arrived."""
        try:
            async with asyncio.TaskGroup() as tasks:
                for work in (self._ingest, self._control, self._telemetry, self._watch):
                    tasks.create_task(work(peer), name=f"{self.id}/{work.__name__.strip('_')}")
        except* PeerGone as gone:
            reason = _first_reason(gone)
        return reason

    def _join(self, peer: Link) -> None:
        """Have a connection as the session's own from now on; a page that came back knows nothing of before."""
        self.peer = peer
        self.leg += 1
        self.metrics.on_stage("answer", self._clock())
        # Frames are counted on over connections, requests anew with each.
        self._first_index = self._next_index
        self._acks = AckBook()
        self._bad_messages = 0
        self._told = ""
        status = self._context.engine.status
        if self.leg > 0 and status.state in STAGES:
            self._tell_progress(status)
        if self.leg > 0 and self.scenes.list is not None:
            self._tell_params("The scene list goes on.", "scene")
        self._tell_rung()
        if self.recording is not None and self.recording.ready:
            self._on_recording(self.recording, "Recording goes on.")

    async def _sum_up(self, peer: Link, reason: str) -> None:
        """One line of figures in the log, and the same to a page that is still there."""
        self._take_unsent(peer)
        summary = self.metrics.summary(self._clock()) | {
            "reason": reason,
            "rung": self._in_force(),
            "camera_overwritten": peer.counters.get("camera_overwritten", 0),
            "peer": {name: count for name, count in sorted(peer.counters.items()) if count},
        }
        log.info("session %s: summary %s", self.id, json.dumps(summary))
        if reason not in PEER_LEFT:
            peer.send_control(control.encode("summary", **summary))
            await asyncio.sleep(GOODBYE_S)

    async def _watch(self, peer: Link) -> None:
        gone = asyncio.create_task(peer.wait_until_gone(), name=f"{self.id}/gone")
        arrived = asyncio.create_task(self._arrived.wait(), name=f"{self.id}/arrived")
        try:
            await asyncio.wait({gone, arrived}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            gone.cancel()
            arrived.cancel()
        raise PeerGone(REPLACED if self._arrived.is_set() else gone.result())

    # --- camera to engine

    async def _ingest(self, peer: Link) -> None:
        """Feed the newest camera frame of the agreed rate to the engine, or to the pacer while there is none."""
        loop = asyncio.get_running_loop()
        width, height = self._context.engine.frame_size
        while (frame := await peer.next_frame()) is not None:
            index = self._first_index + frame.index
            self._next_index = index + 1
            admitted = self._gate.admit(frame.arrived_at)
            self.metrics.on_stage("connected", peer.connected_at or self._clock())
            self.metrics.on_arrival(self._clock(), index, frame.arrived_at, admitted=admitted)
            if not admitted:
                continue
            rgb = await loop.run_in_executor(self._context.executor, to_rgb, frame.picture, width, height)
            self.last_input = rgb
            if self.recording is not None:
                self.recording.picture("input", rgb, frame.arrived_at)
            self._take(rgb, index, frame.arrived_at)
        for reason, message in INPUT_FAULTS.items():
            if peer.counters.get(reason):
                self._notice(reason, message.format(limit=self._context.settings.media.max_input_pixels))
                raise PeerGone(reason)

    def _take(self, rgb: Frames, index: int, arrived_at: float) -> None:
        if self.rung.camera:
            self.metrics.on_withheld(CAMERA_RUNG, 1)
            self._queue([Picture(index, arrived_at, rgb, withheld=True)])
            return
        stream = self._stream
        # Once the user looks at the camera it keeps moving until the restyled picture comes; a warm server starts
        # with the restyled picture and never shows the camera.
        camera_shown = self.metrics.released > 0
        if not self._restyling and (stream is None or camera_shown):
            self._queue([Picture(index, arrived_at, rgb)])
        if stream is None:
            return
        chunk = self._assembler.push(rgb, index=index, arrived_at=arrived_at)
        if chunk is None:
            return
        self._sources[chunk.index] = chunk
        while len(self._sources) > MAX_SOURCES:
            self._lose_chunk(stream, next(iter(self._sources)), "source_forgotten")
        try:
            stream.submit(chunk)
            self.metrics.on_submitted(self._clock())
        except EngineError:
            # The render task sees the same error and takes the stream down, and with it this chunk.
            pass
        self._count_engine_drops(stream)

    def _count_engine_drops(self, stream: EngineStream) -> None:
        dropped = stream.counters.frames_dropped
        self.metrics.on_engine_missed(dropped - self._stream_drops)
        self._stream_drops = dropped

    def _lose_chunk(self, stream: EngineStream, index: int, otherwise: str) -> None:
        """A chunk will not come back, or not in time to have its camera frames beside it.

        The engine counts its losses by reason and not by chunk, and results come in order: a chunk that was
        overtaken has one of the reasons not given out yet. otherwise: the reason when there is none.
        """
        chunk = self._sources.pop(index)
        lost = stream.counters.dropped
        reason = next((name for name in lost if lost[name] > self._reasons_given[name]), None)
        if reason is not None:
            self._reasons_given[reason] += 1
            otherwise = reason if reason.startswith("engine_") else f"engine_{reason}"
        self.metrics.on_dropped(self._clock(), otherwise, chunk.frame_indices)

    # --- engine to pacer

    async def _render(self) -> None:
        """Keep a stream open on the engine whenever there is one, and queue what it renders."""
        engine = self._context.engine
        was_lost = False
        while True:
            try:
                await self._wait_ready(restarting=was_lost)
                params = self._engine_params()
                async with engine.open_stream(self.id, params) as opened:
                    stream = self._taped(opened, params)
                    self._open(stream)
                    if was_lost:
                        self._notice("engine_back", "The engine is back.")
                    elif stream is opened:
                        self._notice("model_ready", "The model is ready.")
                    was_lost = False
                    async for chunk in stream:
                        self._on_rendered(stream, chunk)
                        if self.recording is not None and self.recording.awaits_stream:
                            self._lose_all("begun_anew")
                            break
            except RankLost:
                was_lost = True
                self._lose_all()
                self._notice("engine_lost", "The engine stopped; you see your camera until it is back.")
            except EngineError as error:
                was_lost = True
                self._lose_all()
                self._tell_once(f"No restyling: {error}")
                await asyncio.sleep(ENGINE_RETRY_S)
            finally:
                self._close_stream()

    async def _wait_ready(self, *, restarting: bool) -> None:
        """Wait until streams render, telling the page how far the model is.

        restarting: the page knows that the engine is gone; it is told of progress only once there is some.
        """
        engine = self._context.engine
        told = engine.status if restarting else None
        ready = asyncio.create_task(engine.wait_ready(), name=f"{self.id}/wait-ready")
        try:
            while not ready.done() and engine.status.state is not EngineState.READY:
                if engine.status != told and engine.status.state in STAGES:
                    told = engine.status
                    self._tell_progress(told)
                await asyncio.wait({ready}, timeout=PROGRESS_PERIOD_S)
            await ready
        finally:
            ready.cancel()

    def _tell_progress(self, status: EngineStatus) -> None:
        self._notice(
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
            log.error("session %s: %s", self.id, message)
            self._notice("engine_lost", message)

    def _open(self, stream: EngineStream) -> None:
        self._assembler = self._new_assembler()
        self._sources.clear()
        self._stream_drops = self._stream_reanchored = 0
        self._reasons_given.clear()
        self._told = ""
        self._stream = stream

    def _taped(self, stream: EngineStream, params: StreamParams) -> EngineStream:
        """The stream just opened, recorded where that is wished: a record for a replay begins with a stream."""
        if self.recording is None or not self.recording.awaits_stream:
            return stream
        settings = self._context.settings
        return self.recording.taped(stream, header_of(settings.engine_kind, settings.engine, params))

    def _lose_all(self, reason: str = "engine_lost") -> None:
        """The stream broke: what was on its way through the engine is lost. (At the session's end it stays inside.)"""
        if self._stream is None:
            return
        self._count_engine_drops(self._stream)
        for index in list(self._sources):
            self._lose_chunk(self._stream, index, reason)
        self.metrics.on_dropped(self._clock(), reason, self._assembler.clear())

    def _close_stream(self) -> None:
        self._stream = None
        if self.recording is not None:
            self.recording.end_tape("the engine's stream ended")
        self._restyling = False
        self._sources.clear()
        # Revisions count anew on the next stream, which is opened with these parameters.
        self._send_acks(self._acks.clear())

    def _on_rendered(self, stream: EngineStream, chunk: RenderedChunk) -> None:
        now = self._clock()
        self._count_engine_drops(stream)
        self.metrics.on_reanchored(stream.counters.reanchored - self._stream_reanchored)
        self._stream_reanchored = stream.counters.reanchored
        self.metrics.on_chunk(
            now, chunk.engine_started_at - chunk.captured_at[-1], chunk.engine_finished_at - chunk.engine_started_at
        )
        if chunk.fault:
            self._on_fault(chunk)
        for index in [index for index in self._sources if index < chunk.index]:
            self._lose_chunk(stream, index, "engine_unexplained")
        source = self._sources.pop(chunk.index, None)
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
        self.metrics.on_withheld(chunk.fault, len(chunk.frames))
        now = self._clock()
        if now - self._fault_told_at.get(chunk.fault, float("-inf")) < FAULT_NOTICE_PERIOD_S:
            return
        self._fault_told_at[chunk.fault] = now
        words = MODEL_FAULTS.get(chunk.fault, f"The model's picture was not fit to be shown ({chunk.fault})")
        self._notice("model_fault", f"{words}; you see your camera meanwhile.", reason=chunk.fault)

    # --- pacer to peer

    def _queue(self, pictures: list[Picture]) -> None:
        now = self._clock()
        dropped = self._pacer.push(pictures, [picture.arrived_at for picture in pictures], now)
        self.metrics.on_dropped(now, "pacer_full", [picture.index for picture in dropped])
        self._released.set()

    async def _play(self) -> None:
        """Release every picture when it is due."""
        while True:
            due = self._pacer.due_at()
            if due is None:
                self._released.clear()
                await self._released.wait()
                continue
            if (wait := due - self._clock()) > 0:
                await asyncio.sleep(min(wait, RELEASE_POLL_S))
                continue
            now = self._clock()
            self.metrics.on_dropped(now, "too_old", [picture.index for picture in self._pacer.shed(now)])
            assert self.peer is not None
            self._release(self.peer, self._pacer.pop(now))

    def _release(self, peer: Link, picture: Picture) -> None:
        now = self._clock()
        frame = self._presenter.present(picture)
        self.last_output = frame.rgb
        if self.recording is not None:
            self.recording.picture("output", frame.rgb, now)
        if self._outlet is None:
            peer.send_frame(frame)
        else:
            self._outlet.push(frame)
        self.metrics.on_release(now, picture.index, picture.arrived_at, restyled=frame.kind == RESTYLED)
        peer.video_delay_s += AUDIO_DELAY_SMOOTHING * (now - picture.arrived_at - peer.video_delay_s)
        if picture.restyled is not None:
            self._send_acks(self._acks.shown(picture.index, picture.revision, picture.chunk), picture.understood)

    # --- control and telemetry

    async def _control(self, peer: Link) -> None:
        """Follow the messages of the page; the rate limit and the parser are the walls."""
        bucket = control.TokenBucket(control.MESSAGES_PER_S, control.MESSAGES_BURST)
        while (text := await peer.next_message()) is not None:
            if not bucket.take(self._clock()):
                self._on_bad_message(
                    control.encode(
                        "error",
                        code="too_fast",
                        message=f"over {control.MESSAGES_PER_S:.0f} messages a second: message ignored, slow down",
                    )
                )
                continue
            try:
                self._follow(control.parse(text))
            except control.ControlError as error:
                self._on_bad_message(error.reply)

    def _on_bad_message(self, reply: str) -> None:
        assert self.peer is not None
        self._bad_messages += 1
        self.peer.send_control(reply)
        if self._bad_messages > control.MAX_BAD_MESSAGES:
            raise PeerGone("too_many_bad_messages")

    def _follow(self, message: control.ControlMessage) -> None:
        assert self.peer is not None
        match message:
            case control.Params():
                control.check_steps(message, self._context.steps_max, message.id)
                self._request_ack(message.id, self._make(message))
            case control.Bypass():
                self._presenter.bypass = message.on
                self._request_ack(message.id, 0 if self._stream else None)
            case control.Scenes():
                revision = self.scenes.load(message, message.id)
                self._request_ack(message.id, revision if self._stream else None)
            case control.SceneMoved():
                revision = self.scenes.move(message.go, message.id)
                self._request_ack(message.id, revision if self._stream else None)
            case control.Record():
                try:
                    if message.on:
                        self.record(message.what)
                    else:
                        self.stop_recording()
                except ServerError as error:
                    raise control.ControlError(error.code, str(error), message.id) from error
                self._request_ack(message.id, None)
            case control.Ping():
                self.peer.send_control(control.encode("pong", id=message.id, t_ms=message.t_ms, server_s=self._clock()))
            case control.Bye():
                raise PeerGone("goodbye")

    def restyle(self, change: control.SessionChange, *, by: str) -> None:
        """Change what is given, from outside the control channel; the next chunk has it, and the page is told.

        by: who did it, for the page: rest or osc.
        Raises: ControlError for more steps than the model has timesteps for; nothing is changed then.
        """
        control.check_steps(change, self._context.steps_max)
        self._make(change)
        if change.bypass is not None:
            self._presenter.bypass = change.bypass
        self._tell_params(f"Steered from outside ({by}).", by)

    def take_over(self, change: control.ParamsChange, bypass: bool | None) -> None:
        """Follow what a page that came back asks for.

        Raises: ControlError for more steps than the model has timesteps for; nothing is changed then.
        """
        control.check_steps(change, self._context.steps_max)
        self._make(change)
        if bypass is not None:
            self._presenter.bypass = bypass

    def _follow_scene(self, scene: control.Scene) -> int | None:
        revision = self._make(scene)
        self._tell_params(f"Scene {self.scenes.index + 1}{scene.name and f': {scene.name}'}.", "scene")
        return revision

    def _make(self, change: control.ParamsChange) -> int | None:
        """Change what is given; returns the revision that shows it, None while no stream is open."""
        self._change(change)
        return self._stream.update(self._engine_params()) if self._stream is not None else None

    def _tell_params(self, message: str, by: str) -> None:
        params = control.shown_params(self.params, self.transition_s)
        scene = self.scenes.shown()
        self._notice("params_changed", message, by=by, params=params, bypass=self.bypass, scene=scene)

    @property
    def bypass(self) -> bool:
        """Whether the camera is shown in the place of the restyled picture."""
        return self._presenter.bypass

    def _change(self, change: control.ParamsChange) -> None:
        if change.transition_s is not None:
            self.transition_s = change.transition_s
        chunk_frames = self._context.engine.capacity.chunk_frames
        chunks = control.transition_chunks(self.transition_s, self.fps, chunk_frames)
        self.params = change.applied_to(self.params).model_copy(update={"transition_chunks": chunks})

    def _request_ack(self, request_id: int, revision: int | None) -> None:
        """Acknowledge with the first frame shaped by `revision`; at once when no stream is open (None)."""
        if revision is None:
            self._send_acks([Ack(request_id, None)])
        else:
            self._acks.add(request_id, revision, self._clock())

    def _send_acks(self, acks: list[Ack], understood: tuple[Understood, ...] = ()) -> None:
        assert self.peer is not None
        styles = [control.shown_style(one, self._context.style_names) for one in understood]
        weights = [prompt.weight for prompt in self.params.prompts]
        first = weights.index(max(weights)) if len(weights) == len(styles) else 0
        for ack in acks:
            self.peer.send_control(
                control.encode(
                    "ack",
                    id=ack.request_id,
                    first_frame=ack.first_frame,
                    first_chunk=ack.first_chunk,
                    params=control.shown_params(self.params, self.transition_s),
                    in_force=self._in_force(),
                    style=styles[first] if styles else None,
                    styles=styles if len(styles) > 1 else None,
                )
            )

    def record(self, what: Sequence[control.Recorded]) -> Recording:
        """Begin a recording; how it goes is told to the page.

        Raises: Conflict while one runs; RecordingError where the server does not record, or not for a replay.
        """
        if self.recording is not None and self.recording.end is None:
            raise Conflict("this session is being recorded; end that recording first", code="recording_runs")
        reason = why_not_exact(self._context.settings.engine) if "session" in what else ""
        if reason:
            raise RecordingError(f"no record for a replay: {reason}", status=422, code="not_replayable")
        if self._context.recordings is None:
            raise RecordingError("this server does not record", status=422, code="recordings_off")
        self.recording = self._context.recordings.start(what, self._on_recording)
        return self.recording

    def stop_recording(self) -> Recording:
        """End the recording; what waits is still written. Raises NotFound where none runs."""
        if self.recording is None or self.recording.end is not None:
            raise NotFound("this session is not being recorded", code="no_recording")
        self.recording.stop()
        return self.recording

    def _on_recording(self, recording: Recording, message: str) -> None:
        self._notice("recording", message, **recording.shown())

    def announce_draining(self, moves_in_s: float) -> None:
        """Tell the page that the server takes no new sessions, and when it ends this one."""
        message = "This server is being emptied; the page then goes on elsewhere."
        self._notice("draining", message, moves_in_s=moves_in_s)

    def announce_closing(self, *, reconnect_after_s: float = 2.0) -> None:
        """Tell the page that the server goes and when to come back."""
        message = "The server is stopping; the page comes back by itself."
        self._notice("closing", message, reconnect_after_s=reconnect_after_s)

    def _notice(self, code: str, message: str, **fields: object) -> None:
        if self.peer is not None:
            self.peer.send_control(control.encode("notice", code=code, message=message, **fields))

    async def _telemetry(self, peer: Link) -> None:
        """Frame marks and figures, twice a second."""
        while True:
            await asyncio.sleep(TELEMETRY_PERIOD_S)
            self._send_acks(self._acks.expired(self._clock(), released_at=self.metrics.released_at))
            self._take_unsent(peer)
            marks = [
                [mark.rtp_timestamp, mark.index, round(mark.arrived_at, 4), round(mark.released_at, 4), mark.kind]
                for mark in peer.take_marks()
            ]
            if marks:
                peer.send_telemetry(control.encode("marks", frames=marks))
            peer.send_telemetry(control.encode("stats", **self.stats()))

    def _take_unsent(self, peer: Link) -> None:
        for index, reason in peer.take_unsent():
            self.metrics.on_unsent(self._clock(), reason, index)

    def stats(self) -> dict[str, object]:
        """The session's figures, as telemetry and REST show them."""
        engine = self._context.engine
        return self.metrics.stats(self._clock()) | {
            "agreed_fps": self.fps,
            "rung": self._in_force(),
            "limited_by": self._limited_by(),
            "sessions": engine.capacity.open_streams,
            "state": str(self._presenter.view),
        }

    def _limited_by(self) -> str:
        """What keeps the picture below the best this server gives, and below the wish."""
        if self.metrics.input_fps() < 0.9 * self.fps:
            # A starved machine delivers fewer camera frames too.
            return "cpu" if self._context.metrics.cpu_share > BUSY_SHARE else "camera"
        given = self._in_force()
        is_lowered = self.rung.camera or self.rung.small or self.rung.light or given["steps"] != self.params.steps
        is_slowed = self.fps < self._context.settings.max_fps or self.metrics.engine_missed > 0.01 * self.metrics.due
        if is_lowered or is_slowed:
            return "gpu" if self._context.settings.engine.device.startswith("cuda") else "cpu"
        return "none"

    def set_rate(self, fps: float) -> None:
        """Agree another output rate from now on, with a notice to the page; the rest of the rung stays."""
        if fps == self.fps:
            return
        self._stand_on(replace(self.rung, fps=fps))
        self._notice("rate_changed", f"The picture now runs at {fps:g} frames a second.", fps=fps)

    def set_rung(self, rung: Rung, reason: str) -> None:
        """Have no more than `rung` gives from the next chunk on; the wish itself is kept for the way back.

        A change of what is in force is told to the page and counted; a rung that changes nothing for this session
        (a wish of one step cannot be lowered) is not.

        Args:
            reason: why, in plain words: the end of the notice's sentence.
        """
        before = self._in_force()
        direction = "up" if _height(rung) > _height(self.rung) else "down"
        entered_camera = rung.camera and not self.rung.camera
        old_params = self._engine_params()
        self._stand_on(rung)
        after = self._in_force()
        if after == before:
            return
        if entered_camera:
            self._leave_engine()
        if self._stream is not None and self._engine_params() != old_params:
            self._stream.update(self._engine_params())
        self.metrics.on_rung(direction, rung_name(rung))
        self._rung_notice = (_rung_words(before, after, reason), after | {"direction": direction, "reason": reason})
        log.info("session %s: %s to %s: %s", self.id, direction, rung_name(rung), reason)
        self._tell_rung()

    def _tell_rung(self) -> None:
        if self.peer is not None and self._rung_notice is not None:
            message, fields = self._rung_notice
            self._notice("rung_changed", message, **fields)

    def _stand_on(self, rung: Rung) -> None:
        if rung.fps != self.fps:
            self._gate.set_rate(rung.fps)
            self._pacer.set_rate(rung.fps)
        self.rung = rung

    def _engine_params(self) -> StreamParams:
        """What the rung leaves of the wish."""
        steps = min(self.params.steps, self.rung.steps)
        return self.params.model_copy(update={"steps": steps, "small": self.rung.small, "light": self.rung.light})

    def _in_force(self) -> dict[str, object]:
        """What the user has now, beside what was wished."""
        params = self._engine_params()
        return {
            "steps": params.steps,
            "small": params.small,
            "light": params.light,
            "fps": self.fps,
            "camera": self.rung.camera,
        }

    def _leave_engine(self) -> None:
        """Show the camera from the next frame on: what is on its way through the engine is given up."""
        now = self._clock()
        for chunk in self._sources.values():
            self.metrics.on_dropped(now, CAMERA_RUNG, chunk.frame_indices)
        self.metrics.on_dropped(now, CAMERA_RUNG, self._assembler.clear())
        self._sources.clear()
        self._restyling = False

    def _new_assembler(self) -> ChunkAssembler:
        capacity, budget_s = self._context.engine.capacity, self._context.settings.latency_budget_s
        return ChunkAssembler(capacity.chunk_frames, budget_s, first_chunk_frames=capacity.first_chunk_frames)


def rung_name(rung: Rung) -> str:
    """A rung as a label, say "1 step, light VAE, small, 12 fps"."""
    size = ("light VAE, " if rung.light else "") + ("small" if rung.small else "full")
    steps = "1 step" if rung.steps == 1 else f"{rung.steps} steps"
    return "camera" if rung.camera else f"{steps}, {size}, {rung.fps:g} fps"


def _height(rung: Rung) -> tuple[bool, float, bool, bool, int]:
    """Orders rungs: what the ladder gives up last weighs most."""
    return (not rung.camera, rung.fps, not rung.small, not rung.light, rung.steps)


def _rung_words(before: Mapping[str, object], after: Mapping[str, object], reason: str) -> str:
    """What changed, and why, as one sentence."""
    changed = {name for name in after if after[name] != before[name]}
    words = []
    if "camera" in changed:
        words.append("you see your camera" if after["camera"] else "the painting comes back")
    if not after["camera"]:
        if "steps" in changed:
            words.append(f"painted in {after['steps']} instead of {before['steps']} steps")
        if "light" in changed:
            words.append("details drawn more coarsely" if after["light"] else "details drawn in full")
        if "small" in changed:
            words.append("painted smaller" if after["small"] else "painted at full size")
        if "fps" in changed:
            words.append(f"{after['fps']:g} instead of {before['fps']:g} frames a second")
    text = ", ".join(words)
    return f"{text[:1].upper()}{text[1:]}: {reason}."


def _first_reason(group: BaseExceptionGroup[PeerGone]) -> str:
    gone = group.exceptions[0]
    return _first_reason(gone) if isinstance(gone, BaseExceptionGroup) else gone.reason
