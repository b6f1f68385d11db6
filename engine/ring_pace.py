"""When the units of a running ring move: measured times, window by window, into `engine.partition.Balancer`."""

import math
import statistics
from collections.abc import Sequence

from engine.partition import Balancer

# Between two looks at the balance: a move takes three looks that agree, a few seconds of one stream.
WINDOW_PASSES = 10


class Pace:
    """Times of the parts of a ring, and the plan they speak for; a window is `WINDOW_PASSES` passes."""

    def __init__(self, ranks: int, layers: int) -> None:
        self._ranks, self._layers = ranks, layers
        self._kinds = ("encode", *["block"] * layers, "decode")
        self._seen: list[tuple[int, str, float]] = []
        self._balancer: Balancer | None = None
        self._passes = 0

    def note(self, rank: int, kind: str, time_s: float) -> None:
        """What one unit of a kind took on a rank, for one chunk."""
        if time_s > 0:
            self._seen.append((rank, kind, time_s))

    def close(self, bounds: Sequence[int]) -> tuple[int, ...] | None:
        """After every pass of the plan in force; returns the blocks' bounds to move to, when that pays."""
        self._passes += 1
        if self._passes % WINDOW_PASSES:
            return None
        if self._balancer is None:
            self._balancer = self._begin(bounds)
        for rank, kind, time_s in self._seen:
            self._balancer.observe(rank, kind, time_s)
        self._seen.clear()
        split = self._balancer.close_window()
        if split is None:
            return None
        inner = (min(max(bound - 1, 0), self._layers) for bound in split.bounds[1:-1])
        return (0, *inner, self._layers)

    def _begin(self, bounds: Sequence[int]) -> Balancer:
        """Ranks are taken for alike until they have run a block; the autoencoder's ends stay where they are."""
        usual = {
            kind: statistics.median([time_s for _, name, time_s in self._seen if name == kind] or [0.0])
            for kind in ("encode", "block", "decode")
        }
        times = [[usual[kind] for kind in self._kinds] for _ in range(self._ranks)]
        for rank, row in enumerate(times):
            row[0] = row[0] if rank == 0 else math.inf
            row[-1] = row[-1] if rank == self._ranks - 1 else math.inf
        units = (0, *(bound + 1 for bound in bounds[1:-1]), self._layers + 2)
        return Balancer(self._kinds, times, units)
