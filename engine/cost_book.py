"""What passes cost a rank: learned as it runs, told to the server when it moves, kept for the next run. No torch."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from engine.api import ChunkCostAt
from engine.config import EngineSettings
from engine.cost_file import CostFile, Learned, cost_file
from engine.cost_model import AGREEING_RATIO, CostModel, Work, chunk_costs
from engine.memory import MemoryPlan
from engine.messages import Costs

log = logging.getLogger(__name__)

# The server is told of costs that have moved by this share, at most this often.
COST_MOVE = 0.03
COST_PAUSE_S = 0.5
TRANSIT_MOVE_S = 0.005
# Fewer passes in service tell no more than the warm-up did, and are not kept for the next run.
KEPT_PASSES = 20
# Between two times that they are kept: a rank that is killed has not said goodbye.
KEEP_PERIOD_S = 30.0


@dataclass(frozen=True, slots=True)
class Kinds:
    """Of which chunks the server is told the costs. steps: usual ones of max_steps; window: latent frames in a stream's
    cache; small, light: whether there is a smaller size, and a light VAE."""

    steps: int
    max_steps: int
    window: int
    small: bool = False
    light: bool = False


class CostBook:
    """The cost model of a rank, and what the server and the next run know of it. transit_s: by which a chunk comes back
    later than its cost, of a ring."""

    def __init__(self, settings: EngineSettings, tell: Callable[[Costs], None]) -> None:
        """tell: sends a message to the server."""
        self.model = CostModel()
        self.transit_s = 0.0
        self._settings, self._tell = settings, tell
        self._kinds: Kinds
        self._file: CostFile | None = None
        self._learned: Learned | None = None
        self._told = Costs(chunk_cost_s=0.0, costs=(), state_bytes=0)
        self._told_at = self._kept_at = float("-inf")
        self._kept_passes = 0
        self._state_bytes = 0

    def recall(self, device_title: str, plan: MemoryPlan) -> None:
        """Look up what an earlier run of this kind has learned; told at once, for sessions come before the warm-up is
        over."""
        self._state_bytes = plan.stream_bytes
        self._file = cost_file(self._settings, device_title, plan.demand.vae)
        self._learned = None if self._file is None else self._file.load()
        if (learned := self._learned) is not None:
            self._tell(Costs(chunk_cost_s=learned.chunk_cost_s, costs=learned.chunks, state_bytes=self._state_bytes))

    def stands(self, work: Work, seconds: float) -> bool:
        """Whether what was learned holds for a pass that has just taken so long: the rest need not be measured again.

        A compiled pass has to be seen anyway, or it would be compiled in service.
        """
        if self._learned is None or self._settings.compile or seconds <= 0:
            return False
        return 1 / AGREEING_RATIO <= self._learned.costs.mean_s(work) / seconds <= AGREEING_RATIO

    def longest_s(self, work: Work) -> float:
        """What such a pass stays below nearly always, as far as it was learned; 0 where nothing was."""
        return 0.0 if self._learned is None else self._learned.costs.upper_s(work)

    def begin(self, passes: Sequence[tuple[Work, float]] | None, kinds: Kinds, now: float) -> None:
        """Start with what was measured now and what was learned where that agrees, and tell the server.

        passes: seconds of each kind; None where one look has shown that what was learned stands.
        """
        self._kinds, learned = kinds, self._learned
        if passes is None:
            assert learned is not None  # something stood
            self.model = CostModel.from_snapshot(learned.costs.snapshot())
        else:
            standing = self.model.profile(passes, None if learned is None else learned.costs)
            if learned is not None and standing < len(passes):
                anew = len(passes) - standing
                log.info("of %d kinds of pass %d are not what was learned: measured anew", len(passes), anew)
        self._kept_passes = self.model.passes
        self.tell(now)

    def observe(self, work: Work, seconds: float, now: float) -> None:
        """Learn from a pass in service, tell the server and keep it, each when there is something new."""
        if self.model.observe(work, seconds):
            self.tell(now)
            if now - self._kept_at >= KEEP_PERIOD_S and self.keep():
                self._kept_at = now

    def tell(self, now: float) -> None:
        """Tell the server what chunks cost, if that has moved and was not told just now."""
        if now - self._told_at < COST_PAUSE_S:
            return
        costs = self._chunk_costs()
        if all(
            abs(new.mean_s - old.mean_s) <= COST_MOVE * old.mean_s
            and abs(new.upper_s - old.upper_s) <= COST_MOVE * old.upper_s
            for new, old in zip(costs, self._told.costs, strict=False)
        ) and (len(costs), self._transit_moved()) == (len(self._told.costs), False):
            return
        self._told = Costs(
            chunk_cost_s=self._chunk_cost_s(), costs=costs, state_bytes=self._state_bytes, transit_s=self.transit_s
        )
        self._told_at = now
        self._tell(self._told)

    def keep(self) -> bool:
        """Write down what was learned since the last time, for the next run, if that is enough to tell anything."""
        if self._file is None or self.model.passes - self._kept_passes < KEPT_PASSES:
            return False
        self._kept_passes = self.model.passes
        return self._file.save(self.model, self._chunk_cost_s(), self._chunk_costs())

    def _chunk_costs(self) -> tuple[ChunkCostAt, ...]:
        """See `Capacity.costs`."""
        kinds = self._kinds
        steps = range(1, kinds.max_steps + 1)
        return chunk_costs(self.model, steps, window=kinds.window, has_small=kinds.small, has_light=kinds.light)

    def _chunk_cost_s(self) -> float:
        """See `Capacity.chunk_cost_s`."""
        return self.model.mean_s(Work.of_chunk(self._kinds.steps, window=self._kinds.window))

    def _transit_moved(self) -> bool:
        told_s = self._told.transit_s
        return abs(self.transit_s - told_s) > max(TRANSIT_MOVE_S, COST_MOVE * told_s)
