"""Whether a stream's pictures may be sent, and whether it has drifted: pure policy on a few figures a chunk.

The figures are measured on the device and travel with the frames, so that watching costs no read of its own. A chunk
that is not finite, black, or frozen while the camera moves is never sent: its camera frames go instead. A stream
whose colours or energy leave the band they had, while the camera's stay in theirs, has drifted: its cache begins
anew, from the camera. Pure: no torch, no clock.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

# Pixel values of a chunk are on a scale of 0 to 1 here.
BLACK_MEAN, BLACK_SPREAD = 2 / 255, 2 / 255
LIT_MEAN = 12 / 255
STILL_CHANGE, MOVING_CHANGE = 0.02 / 255, 3 / 255
# A picture withheld so often in a row will not come right by itself.
RESET_FAULTS = 3
LEARN_CHUNKS = 12
BAND_SIGMAS = 6.0
# Floors of the band, for a scene that was still while it was learned; the camera's is the narrower one, so that a new
# scene is taken for what it is.
BAND_FLOORS = (0.10, 0.10, 0.10, 0.08, 0.08, 0.08, 0.06, 0.5)
INPUT_FLOOR = 0.03
DRIFT_CHUNKS = 12


@dataclass(frozen=True, slots=True)
class ChunkFigures:
    """What one chunk amounts to.

    output: mean of R, G, B; standard deviation of each; energy (mean step between neighbouring pixels); root mean
        square of its latent. Each pixel from 0 to 1. change: mean step from the last frame of the chunk before to this
        one's. source, source_change: mean brightness and change of the camera. finite: no NaN and no infinity.
    """

    output: tuple[float, ...]
    change: float
    source: float
    source_change: float
    finite: bool

    @classmethod
    def from_values(cls, values: Sequence[float]) -> ChunkFigures:
        """From the order in which `engine.pipeline.chunk_figures` packs them."""
        *output, change, source, source_change, finite = values
        return cls(tuple(output), change, source, source_change, bool(finite) and all(map(math.isfinite, values)))


@dataclass(frozen=True, slots=True)
class Verdict:
    """fault: why the picture is withheld, or empty. reset: begin the stream's model state anew. drifted: only the
    cache of it, for the picture is sound but not what it was."""

    fault: str = ""
    reset: bool = False
    drifted: bool = False


@dataclass
class _Band:
    """Mean and spread of a figure over the first LEARN_CHUNKS chunks."""

    floor: float
    values: list[float] = field(default_factory=list)

    def outside(self, value: float) -> bool:
        """Whether a value is outside; while learning none is."""
        if len(self.values) < LEARN_CHUNKS:
            self.values.append(value)
            return False
        mean = sum(self.values) / len(self.values)
        spread = (sum((v - mean) ** 2 for v in self.values) / len(self.values)) ** 0.5
        return bool(abs(value - mean) > max(self.floor, BAND_SIGMAS * spread))


class HealthMonitor:
    """Watches one stream."""

    def __init__(self) -> None:
        self.relearn()
        self._faults = 0

    def relearn(self) -> None:
        """Forget the band: the prompt, the strength or the scene is another."""
        self._bands = [_Band(floor) for floor in BAND_FLOORS]
        self._input = _Band(INPUT_FLOOR)
        self._outside = 0

    def judge(self, figures: ChunkFigures) -> Verdict:
        """Say what to do with the chunk that was just rendered."""
        fault = self._fault(figures)
        if fault:
            self._faults += 1
            reset = fault == "nan" or self._faults % RESET_FAULTS == 0
            if reset:
                self.relearn()
            return Verdict(fault, reset=reset)
        self._faults = 0
        if self._drifted(figures):
            self.relearn()
            return Verdict(drifted=True)
        return Verdict()

    def _fault(self, figures: ChunkFigures) -> str:
        if not figures.finite:
            return "nan"
        mean, spread = max(figures.output[:3]), max(figures.output[3:6])
        if mean < BLACK_MEAN and spread < BLACK_SPREAD and figures.source > LIT_MEAN:
            return "black"
        frozen = figures.change < STILL_CHANGE and figures.source_change > MOVING_CHANGE
        return "frozen" if frozen else ""

    def _drifted(self, figures: ChunkFigures) -> bool:
        if self._input.outside(figures.source):
            self.relearn()
            return False
        # All of them, so that every band learns.
        outside = [band.outside(value) for band, value in zip(self._bands, figures.output, strict=True)]
        self._outside = self._outside + 1 if any(outside) else 0
        return self._outside >= DRIFT_CHUNKS
