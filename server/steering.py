"""One way to steer a session from outside its data channel, for REST and OSC alike."""

from __future__ import annotations

from server.control import shown_params
from server.errors import NotFound
from server.registry import SessionRegistry
from server.session import Session
from server.whip import Whip

EVERYBODY = "*"


class Steering:
    """Finds sessions by their id or by the stream that they publish, and shows them."""

    def __init__(self, registry: SessionRegistry, whip: Whip) -> None:
        self._registry = registry
        self._whip = whip

    def session(self, session_id: str) -> Session:
        """Raises NotFound."""
        return self._registry.get(session_id)

    def stream(self, name: str) -> Session:
        """Raises NotFound for a stream that nobody publishes now."""
        return self._whip.live_session(name)

    def find(self, target: str) -> tuple[Session, ...]:
        """The sessions that `target` names: a stream, a session's id, or * for all. Raises NotFound for none."""
        if target == EVERYBODY:
            return self._registry.sessions
        if target in self._whip.streams():
            return (self.stream(target),)
        try:
            return (self.session(target),)
        except NotFound:
            raise NotFound(f"{target[:64]!r} is neither a published stream nor an open session's id") from None

    async def close(self, session: Session) -> None:
        """End a session. Raises NotFound."""
        await self._registry.close(session.id)

    def sessions(self) -> list[dict[str, object]]:
        """Every open session as REST shows it."""
        return [self.shown(session) for session in self._registry.sessions]

    def streams(self) -> list[dict[str, object]]:
        """Every published stream as REST shows it."""
        return [self._whip.shown(name) | _wishes(session) for name, session in self._whip.streams().items()]

    def shown(self, session: Session) -> dict[str, object]:
        """One session as REST shows it."""
        published = (name for name, publisher in self._whip.streams().items() if publisher is session)
        return {"session": session.id, "stream": next(published, None)} | _wishes(session)

    def shown_stream(self, name: str) -> dict[str, object]:
        """One stream as REST shows it. Raises NotFound for one that nobody publishes now."""
        session = self.stream(name)
        return self._whip.shown(name) | _wishes(session)


def _wishes(session: Session) -> dict[str, object]:
    return {
        "params": shown_params(session.terms.params, session.terms.transition_s),
        "bypass": session.bypass,
        "scene": session.controls.scenes.shown(),
        "stats": session.stats(),
    }
