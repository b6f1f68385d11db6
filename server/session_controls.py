"""What changes a session while it runs: messages of its page, REST and OSC, its scene list, the server's ladder."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
from collections.abc import Callable

from server import control
from server.errors import ServerError
from server.ladder import Rung
from server.metrics import SessionMetrics
from server.peer import PeerGone
from server.resume import Link
from server.scenes import Show
from server.session_media import Media
from server.session_page import Page
from server.session_recorder import Recorder
from server.session_terms import Terms, is_higher, rung_name, rung_words

log = logging.getLogger(__name__)

# A page that sends too much is told so this seldom.
TOO_FAST_S = 1.0


class Controls:
    """Changes the terms of one session, has its media follow and tells its page."""

    def __init__(
        self,
        session_id: str,
        terms: Terms,
        page: Page,
        recorder: Recorder,
        media: Media,
        metrics: SessionMetrics,
        clock: Callable[[], float],
        *,
        steps_max: int,
        chunk_frames: Callable[[], int],
    ) -> None:
        self._id = session_id
        self._terms = terms
        self._page = page
        self._recorder = recorder
        self._media = media
        self._metrics = metrics
        self._clock = clock
        self._steps_max = steps_max
        self._chunk_frames = chunk_frames
        self._bad_messages = 0
        self.passed_over = 0
        """Messages of the page that came too fast and were not the newest."""
        self._too_fast_from = -math.inf
        # Of the last move, for a page that has yet to connect.
        self._rung_notice: tuple[str, dict[str, object]] | None = None
        self.scenes = Show(clock, self._follow_scene, steps_max)
        """What is painted when, where a list of scenes was loaded."""

    def join(self) -> None:
        """Another connection, whose page has said nothing yet."""
        self._bad_messages = 0

    def tell_again(self) -> None:
        """Tell a page that came back of the scene list that it finds."""
        if self.scenes.list is not None:
            self._tell_params("The scene list goes on.", "scene")

    # --- the page

    async def follow(self, peer: Link) -> None:
        """Follow the messages of the page, as many as the rate allows; beyond, the newest. The parser is the wall."""
        bucket = control.TokenBucket(control.MESSAGES_PER_S, control.MESSAGES_BURST)
        while (text := await self._next_message(peer, bucket)) is not None:
            try:
                self._follow(peer, control.parse(text))
            except control.ControlError as error:
                self._on_bad_message(peer, error.reply)

    async def _next_message(self, peer: Link, bucket: control.TokenBucket) -> str | None:
        """The next message to follow: of those over the rate the newest, and that is told. None at the end."""
        text = await peer.next_message()
        while text is not None and not bucket.take(self._clock()):
            newer: str | None = text
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(1 / control.MESSAGES_PER_S):
                    newer = await peer.next_message()
                    self.passed_over += 1
                    self._tell_too_fast(peer)
            text = newer
        return text

    def _tell_too_fast(self, peer: Link) -> None:
        if (now := self._clock()) < self._too_fast_from:
            return
        self._too_fast_from = now + TOO_FAST_S
        text = f"over {control.MESSAGES_PER_S:.0f} messages a second: only the newest is followed; slow down"
        peer.send_control(control.encode("error", code="too_fast", message=text))

    def _on_bad_message(self, peer: Link, reply: str) -> None:
        self._bad_messages += 1
        peer.send_control(reply)
        if self._bad_messages > control.MAX_BAD_MESSAGES:
            raise PeerGone("too_many_bad_messages")

    def _follow(self, peer: Link, message: control.ControlMessage) -> None:
        match message:
            case control.Params():
                control.check_steps(message, self._steps_max, message.id)
                self._page.request_ack(message.id, self._make(message))
            case control.Bypass():
                self._media.presenter.bypass = message.on
                self._page.request_ack(message.id, 0 if self._media.has_stream else None)
            case control.Scenes():
                revision = self.scenes.load(message, message.id)
                self._page.request_ack(message.id, revision if self._media.has_stream else None)
            case control.SceneMoved():
                revision = self.scenes.move(message.go, message.id)
                self._page.request_ack(message.id, revision if self._media.has_stream else None)
            case control.Record():
                try:
                    if message.on:
                        self._recorder.start(message.what)
                    else:
                        self._recorder.stop()
                except ServerError as error:
                    raise control.ControlError(error.code, str(error), message.id) from error
                self._page.request_ack(message.id, None)
            case control.Ping():
                peer.send_control(control.encode("pong", id=message.id, t_ms=message.t_ms, server_s=self._clock()))
            case control.Bye():
                raise PeerGone("goodbye")

    # --- from outside the control channel

    def restyle(self, change: control.SessionChange, *, by: str) -> None:
        """Change what is given, from outside the control channel; the next chunk has it, and the page is told.

        by: who did it, for the page: rest or osc.
        Raises: ControlError for more steps than the model has timesteps for; nothing is changed then.
        """
        self.take_over(change, change.bypass)
        self._tell_params(f"Steered from outside ({by}).", by)

    def take_over(self, change: control.ParamsChange, bypass: bool | None) -> None:
        """Follow what a page that came back asks for.

        Raises: ControlError for more steps than the model has timesteps for; nothing is changed then.
        """
        control.check_steps(change, self._steps_max)
        self._make(change)
        if bypass is not None:
            self._media.presenter.bypass = bypass

    def _follow_scene(self, scene: control.Scene) -> int | None:
        revision = self._make(scene)
        self._tell_params(f"Scene {self.scenes.index + 1}{scene.name and f': {scene.name}'}.", "scene")
        return revision

    def _make(self, change: control.ParamsChange) -> int | None:
        """Change what is given; returns the revision that shows it, None while no stream is open."""
        terms = self._terms
        if change.transition_s is not None:
            terms.transition_s = change.transition_s
        chunks = control.transition_chunks(terms.transition_s, terms.rung.fps, self._chunk_frames())
        terms.params = change.applied_to(terms.params).model_copy(update={"transition_chunks": chunks})
        return self._media.update()

    def _tell_params(self, message: str, by: str) -> None:
        self._page.notice(
            "params_changed",
            message,
            by=by,
            params=control.shown_params(self._terms.params, self._terms.transition_s),
            bypass=self._media.presenter.bypass,
            scene=self.scenes.shown(),
        )

    # --- the ladder

    def set_rung(self, rung: Rung, reason: str) -> None:
        """Have no more than `rung` gives from the next chunk on; the wish itself is kept for the way back.

        A change of what is in force is told to the page and counted; a rung that changes nothing for this session
        (a wish of one step cannot be lowered) is not.

        Args:
            reason: why, in plain words: the end of the notice's sentence.
        """
        terms, old = self._terms, self._terms.rung
        before, params = terms.in_force(), terms.engine_params()
        terms.rung = rung
        if rung.fps != old.fps:
            self._media.set_rate(rung.fps)
        after = terms.in_force()
        if after == before:
            return
        if rung.camera and not old.camera:
            self._media.leave_engine()
        if terms.engine_params() != params:
            self._media.update()
        direction = "up" if is_higher(rung, old) else "down"
        self._metrics.on_rung(direction, rung_name(rung))
        self._rung_notice = (rung_words(before, after, reason), after | {"direction": direction, "reason": reason})
        log.info("session %s: %s to %s: %s", self._id, direction, rung_name(rung), reason)
        self.tell_rung()

    def tell_rung(self) -> None:
        """Tell of the last move, if there was one."""
        if self._rung_notice is not None:
            message, fields = self._rung_notice
            self._page.notice("rung_changed", message, **fields)
