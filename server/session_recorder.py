"""Recordings of one session, one at a time (server/recording.py writes them)."""

from __future__ import annotations

from collections.abc import Sequence

import av

from engine.api import EngineStream, Frames, StreamParams
from server.control import Recorded
from server.errors import Conflict, NotFound
from server.recording import End, Recording, RecordingError, Recordings
from server.resume import Link
from server.session_page import Page
from server.session_record import header_of, why_not_exact
from server.settings import ServerSettings


class Recorder:
    """Begins and ends them, and passes on what is to be in them. current: the one that runs, or ran last."""

    def __init__(self, page: Page, settings: ServerSettings, recordings: Recordings | None) -> None:
        self.current: Recording | None = None
        self._link: Link | None = None
        self._page = page
        self._settings = settings
        self._recordings = recordings

    def start(self, what: Sequence[Recorded]) -> Recording:
        """Begin a recording; how it goes is told to the page.

        Raises: Conflict while one runs; RecordingError where the server does not record, or not for a replay.
        """
        if self.current is not None and self.current.end is None:
            raise Conflict("this session is being recorded; end that recording first", code="recording_runs")
        reason = why_not_exact(self._settings.engine) if "session" in what else ""
        if reason:
            raise RecordingError(f"no record for a replay: {reason}", status=422, code="not_replayable")
        if self._recordings is None:
            raise RecordingError("this server does not record", status=422, code="recordings_off")
        has_sound = self._link is not None and self._link.has_sound
        self.current = self._recordings.start(what, self._tell, has_sound=has_sound)
        return self.current

    def stop(self) -> Recording:
        """End the recording; what waits is still written. Raises NotFound where none runs."""
        if self.current is None or self.current.end is not None:
            raise NotFound("this session is not being recorded", code="no_recording")
        self.current.stop()
        return self.current

    def close(self) -> None:
        """The session has ended."""
        if self.current is not None:
            self.current.stop(End.SESSION_ENDED)

    def tell_again(self) -> None:
        """Tell a page that came back of the recording that it finds."""
        if self.current is not None and self.current.ready:
            self._tell(self.current, "Recording goes on.")

    def join(self, link: Link) -> None:
        """Another connection, whose sound belongs to the films that run."""
        if self._link is not None:
            self._link.on_sound = None
        self._link = link
        link.on_sound = self._sound

    # --- from the session's media

    def picture(self, what: str, rgb: Frames, at: float) -> None:
        """Take an [H, W, 3] picture at its monotonic time: "input" or "output"."""
        if self.current is not None:
            self.current.picture(what, rgb, at)

    def _sound(self, sound: av.AudioFrame, arrived_at: float) -> None:
        """Take decoded sound: to the camera as it came, to what is shown as late as that is."""
        if self.current is None or self._link is None:
            return
        for what, at in (("input", arrived_at), ("output", arrived_at + self._link.video_delay_s)):
            if self.current.wants_sound_of(what):
                self.current.sound(what, sound.to_ndarray().tobytes(), at)

    @property
    def awaits_stream(self) -> bool:
        """Whether a record for a replay is wanted, which begins with a stream opened anew."""
        return self.current is not None and self.current.awaits_stream

    def taped(self, stream: EngineStream, params: StreamParams) -> EngineStream:
        """The stream just opened, recorded where that is wished: a record for a replay begins with a stream."""
        if self.current is None or not self.current.awaits_stream:
            return stream
        return self.current.taped(stream, header_of(self._settings.engine_kind, self._settings.engine, params))

    def end_tape(self) -> None:
        """The engine's stream ended, and with it a record for a replay."""
        if self.current is not None:
            self.current.end_tape("the engine's stream ended")

    def _tell(self, recording: Recording, message: str) -> None:
        self._page.notice("recording", message, **recording.shown())
