"""What a session wishes and what the server's rung leaves of it, and the difference of two rungs in words. Pure."""

from __future__ import annotations

from collections.abc import Mapping

from engine.api import StreamParams
from server.ladder import Rung


class Terms:
    """The wish of one session, and its rung.

    params: what the user wishes; the engine gets what `rung` leaves of it. transition_s: from one style to the next.
    """

    def __init__(self, params: StreamParams, rung: Rung, transition_s: float) -> None:
        self.params = params
        self.rung = rung
        self.transition_s = transition_s

    def engine_params(self) -> StreamParams:
        """What the rung leaves of the wish."""
        steps = min(self.params.steps, self.rung.steps)
        return self.params.model_copy(update={"steps": steps, "small": self.rung.small, "light": self.rung.light})

    def in_force(self) -> dict[str, object]:
        """What the user has now, beside what was wished."""
        params = self.engine_params()
        return {
            "steps": params.steps,
            "small": params.small,
            "light": params.light,
            "fps": self.rung.fps,
            "camera": self.rung.camera,
        }


def rung_name(rung: Rung) -> str:
    """A rung as a label, say "1 step, light VAE, small, 12 fps"."""
    size = ("light VAE, " if rung.light else "") + ("small" if rung.small else "full")
    steps = "1 step" if rung.steps == 1 else f"{rung.steps} steps"
    return "camera" if rung.camera else f"{steps}, {size}, {rung.fps:g} fps"


def is_higher(one: Rung, other: Rung) -> bool:
    """Whether a move from `other` to `one` goes up: what the ladder gives up last weighs most."""
    return _height(one) > _height(other)


def _height(rung: Rung) -> tuple[bool, float, bool, bool, int]:
    return (not rung.camera, rung.fps, not rung.small, not rung.light, rung.steps)


def rung_words(before: Mapping[str, object], after: Mapping[str, object], reason: str) -> str:
    """What changed between two `Terms.in_force`, and why, as one sentence."""
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
