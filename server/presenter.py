"""Which picture stands for a frame at its release: the camera, the restyled one, or a blend of both. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from engine.api import Frames, Understood
from server.frames import OutgoingFrame

CAMERA, RESTYLED = 0, 1
FADE_FRAMES = 12


@dataclass(frozen=True, slots=True)
class Picture:
    """A frame waiting for its release: what the camera saw and, once there is a model, what it became.

    chunk, revision: what it came back in and the parameters that shaped it (see RenderedChunk).
    withheld: the engine had a picture that was not fit to be shown: the camera stands in.
    understood: what the prompts were taken for (see RenderedChunk).
    """

    index: int
    arrived_at: float
    camera: Frames
    restyled: Frames | None = None
    revision: int = 0
    chunk: int | None = None
    withheld: bool = False
    understood: tuple[Understood, ...] = ()


class View(StrEnum):
    """What the user sees now, for the page's state line."""

    PASSTHROUGH = "passthrough"
    WITHHELD = "withheld"
    FADING = "fading"
    RESTYLED = "restyled"
    BYPASS = "bypass"


class Presenter:
    """Chooses at the instant of release, so that bypass acts at once and nothing is rendered twice.

    After the camera had to stand in (the model was loading, the engine was lost or its picture not fit) the restyled
    picture fades in over FADE_FRAMES; on a warm server the first picture is the restyled one.
    """

    def __init__(self, *, bypass: bool = False) -> None:
        self.bypass = bypass
        self.view = View.PASSTHROUGH
        self._fade = 1.0

    def present(self, picture: Picture) -> OutgoingFrame:
        """The frame to send for a picture."""
        if picture.restyled is None:
            self._fade = 0.0
            self.view = View.WITHHELD if picture.withheld else View.PASSTHROUGH
            return OutgoingFrame(picture.index, picture.arrived_at, picture.camera, CAMERA)
        if self.bypass:
            self.view = View.BYPASS
            return OutgoingFrame(picture.index, picture.arrived_at, picture.camera, CAMERA)
        self._fade = min(1.0, self._fade + 1.0 / FADE_FRAMES)
        if self._fade >= 1.0:
            self.view = View.RESTYLED
            rgb = picture.restyled
        else:
            self.view = View.FADING
            rgb = _blend(picture.camera, picture.restyled, self._fade)
        return OutgoingFrame(picture.index, picture.arrived_at, rgb, RESTYLED, picture.camera)


def _blend(camera: Frames, restyled: Frames, share: float) -> Frames:
    mixed = camera + share * (restyled.astype(np.float32) - camera)
    return (mixed + 0.5).astype(np.uint8)
