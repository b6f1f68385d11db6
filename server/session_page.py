"""What a session tells its page, over whichever connection that has now: notices, and answers to requests."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from engine.api import Understood
from server import control
from server.acks import Ack, AckBook
from server.resume import Link
from server.session_terms import Terms


class Page:
    """The page of one session. peer: its connection, None before the first; what is told then is lost."""

    def __init__(self, terms: Terms, style_names: Mapping[str, str], clock: Callable[[], float]) -> None:
        self.peer: Link | None = None
        self._terms = terms
        self._style_names = style_names
        self._clock = clock
        self._acks = AckBook()

    def join(self, peer: Link) -> None:
        """Another connection from now on, which counts its requests anew."""
        self.peer = peer
        self._acks = AckBook()

    def notice(self, code: str, message: str, **fields: object) -> None:
        """Say something; message: whole sentences for the user."""
        if self.peer is not None:
            self.peer.send_control(control.encode("notice", code=code, message=message, **fields))

    # --- acknowledgements

    def request_ack(self, request_id: int, revision: int | None) -> None:
        """Acknowledge with the first frame shaped by `revision`; at once when no stream is open (None)."""
        if revision is None:
            self._send_acks([Ack(request_id, None)])
        else:
            self._acks.add(request_id, revision, self._clock())

    def on_shown(self, index: int, revision: int, chunk: int | None, understood: tuple[Understood, ...]) -> None:
        """A restyled frame of `chunk` went out: acknowledge what it shows. understood: the styles in it."""
        self._send_acks(self._acks.shown(index, revision, chunk), understood)

    def expire_acks(self, released_at: float) -> None:
        """Answer requests that have waited long enough. released_at: when a picture last went out."""
        self._send_acks(self._acks.expired(self._clock(), released_at=released_at))

    def clear_acks(self) -> None:
        """Answer every request: the stream that knew their revisions is closed."""
        self._send_acks(self._acks.clear())

    def _send_acks(self, acks: list[Ack], understood: tuple[Understood, ...] = ()) -> None:
        assert self.peer is not None
        terms = self._terms
        styles = [control.shown_style(one, self._style_names) for one in understood]
        weights = [prompt.weight for prompt in terms.params.prompts]
        first = weights.index(max(weights)) if len(weights) == len(styles) else 0
        for ack in acks:
            self.peer.send_control(
                control.encode(
                    "ack",
                    id=ack.request_id,
                    first_frame=ack.first_frame,
                    first_chunk=ack.first_chunk,
                    params=control.shown_params(terms.params, terms.transition_s),
                    in_force=terms.in_force(),
                    style=styles[first] if styles else None,
                    styles=styles if len(styles) > 1 else None,
                )
            )
