"""When the units of a running ring move: measured times, window by window, into `engine.partition.Balancer`."""

import math
import statistics
from collections.abc import Sequence

from engine.chain import Chain
from engine.partition import Balancer, BalancerConfig, Split, partition, stage_times

# Between two looks at the balance: a move takes three looks that agree, a few seconds of one stream.
WINDOW_PASSES = 10
# What rank 0 does beside its units: the first unit of the chain as it is balanced, which stays there.
HOME = "home"


class Pace:
    """Times of the units of a ring, and the plan they speak for; a window is `WINDOW_PASSES` passes.

    The first plan was made without knowing any time: as soon as all units have been measured, the best one is asked for
    at once, if it is better by what a move has to gain. Later ones must prove themselves, see `Balancer`.
    """

    def __init__(self, ranks: int, chain: Chain, capacity_bytes: Sequence[float] | None = None) -> None:
        """capacity_bytes: of each rank for what units keep of streams."""
        self._ranks, self._kinds = ranks, (HOME, *chain.kinds)
        self._bytes, self._room = (0, *chain.unit_bytes), capacity_bytes
        self._seen: list[tuple[int, str, float]] = []
        self._balancer: Balancer | None = None
        self._passes = 0

    def note(self, rank: int, kind: str, time_s: float) -> None:
        """What one unit of a kind took on a rank, for one chunk."""
        if time_s > 0:
            self._seen.append((rank, kind, time_s))

    def close(self, bounds: Sequence[int]) -> tuple[int, ...] | None:
        """After every pass of the plan in force; returns the units' bounds to move to, when that pays."""
        self._passes += 1
        if self._passes % WINDOW_PASSES or (self._balancer is None and not self._all_seen()):
            return None
        split = self._begin(bounds) if self._balancer is None else None
        assert self._balancer is not None
        for rank, kind, time_s in self._seen:
            self._balancer.observe(rank, kind, time_s)
        self._seen.clear()
        # The first window is closed too: its times are what later ones are compared with.
        later = self._balancer.close_window()
        split = split or later
        return None if split is None else (0, *(bound - 1 for bound in split.bounds[1:]))

    def _all_seen(self) -> bool:
        return {kind for _, kind, _ in self._seen} >= set(self._kinds)

    def _begin(self, bounds: Sequence[int]) -> Split | None:
        """Ranks are taken for alike until they have run a unit; returns the best split, if it is much better."""
        usual = {
            kind: statistics.median(time_s for _, name, time_s in self._seen if name == kind)
            for kind in set(self._kinds)
        }
        times = [[usual[kind] for kind in self._kinds] for _ in range(self._ranks)]
        for row in times[1:]:
            row[0] = math.inf
        now = (0, *(bound + 1 for bound in bounds[1:]))
        best = partition(times, self._bytes, self._room)
        better = best.slowest_s < (1 - BalancerConfig().gain) * max(stage_times(times, now))
        self._balancer = Balancer(
            self._kinds,
            times,
            best.bounds if better else now,
            unit_bytes=self._bytes,
            capacity_bytes=self._room,
        )
        return best if better else None
