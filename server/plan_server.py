"""The server around simulated devices: its own ladder, admission and pacer, told what they would be told.

For `livebrush plan`. Not simulated: what the video of the sessions takes of the server process (`server.host`), and the
network.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

from engine.api import Capacity, ChunkCostAt
from engine.config import CHUNK_FRAMES
from engine.cost_model import Work, chunk_costs
from engine.simulator_load import Workload
from engine.simulator_ranks import RankShare, RingCosts, slowest_s
from server.admission import LIMITS, Limit, bounds
from server.ladder import MOVE_PERIOD_S, WINDOW_S, Ladder, Move, Rung, Signals
from server.pacer import Pacer
from server.session_terms import rung_name
from server.settings import ServerSettings

# The rates that are agreed end there.
MAX_FPS = 60.0
# All sessions come at once: the ladder may need its second move before they stand where they stay.
SETTLED_S = MOVE_PERIOD_S + WINDOW_S


# A plan lists no more moves than these; a ladder at the edge of a device goes up and down for ever.
MAX_MOVES = 32


@dataclass(frozen=True, slots=True)
class MovedAt:
    """A move of the ladder, seconds after the beginning."""

    at_s: float
    move: Move


class PlannedServer:
    """See `engine.simulator_server.Server`. One run uses it up.

    seats, limit: how many sessions it would let in, and what allows no more. moves: so far.
    """

    def __init__(
        self, groups: Sequence[Sequence[RankShare]], steps: int, workload: Workload, *, most: int | None = None
    ) -> None:
        """Stand before these groups.

        Args:
            steps: that every session wishes.
            workload: its rate is the best there is, its budget the deadline.
            most: sessions that fit into memory.
        """
        self._steps = steps
        full = min(workload.fps, MAX_FPS)
        least = min(ServerSettings().min_fps, full)
        self._settings = ServerSettings(max_fps=full, min_fps=least, latency_budget_s=workload.budget_s, steps=steps)
        self._capacity = _capacity(groups, steps, workload.first_frames)
        self.seats, self.limit = self._bounds(most)
        self._ladder = Ladder(self._settings, self._capacity, steps_max=steps, wish=steps, now=0.0)
        self.moves: list[MovedAt] = []

    @property
    def rung(self) -> Rung:
        """Where all sessions stand."""
        return self._ladder.rung

    def decide(self, now: float, sessions: int, due: int, missed: int, lost: int) -> None:
        """See `engine.simulator_server.Server.decide`."""
        signals = Signals(self._capacity, (self._steps,) * sessions, due, missed, lost)
        if (move := self._ladder.decide(now, signals)) is not None:
            self.moves.append(MovedAt(now, move))

    def as_json(self, sessions: int) -> dict[str, object]:
        """What became of so many sessions that asked to come in, and where those that did stand at the end."""
        return {
            "seats": self.seats,
            "admitted": min(sessions, self.seats),
            "refused": max(0, sessions - self.seats),
            "limit": LIMITS[self.limit],
            "rung": asdict(self.rung) | {"name": rung_name(self.rung)},
            "rungs_down": self._ladder.depth,
            "moves": [
                {
                    "at_s": round(moved.at_s, 2),
                    "from": rung_name(moved.move.origin),
                    "to": rung_name(moved.move.target),
                    "reason": moved.move.reason,
                }
                for moved in self.moves[:MAX_MOVES]
            ],
        }

    def playout(self, fps: float) -> Pacer[float]:
        """See `engine.simulator_server.Server.playout`."""
        return Pacer(fps, self._settings.latency_budget_s)

    def _bounds(self, most: int | None) -> tuple[int, Limit]:
        """Seats by the engine's time and by memory: `max_sessions` is for whoever runs the server to set."""
        least_s = min(cost.mean_s for cost in self._capacity.costs)
        # So many need more than all the time there is, on any rung.
        over = 2 + int(self._capacity.groups * CHUNK_FRAMES / (self._settings.min_fps * least_s))
        fitting = over if most is None else min(most, over)
        settings = self._settings.model_copy(update={"max_sessions": over + 1})
        return bounds(replace(self._capacity, max_streams=fitting), settings)


def _capacity(groups: Sequence[Sequence[RankShare]], steps: int, first_frames: int) -> Capacity:
    """What such an engine would tell: the costs of its slowest group (`engine.cluster`), and of a ring those of its
    slowest rank, and how much longer a chunk is on its way round (`engine.ring_worker`)."""
    ring = max((tuple(group) for group in groups), key=lambda ring: slowest_s(ring, steps))
    counts, transit_s = range(1, steps + 1), 0.0
    if len(ring) == 1:
        # What one group cannot change, none is asked to.
        others = set(ring[0].costs.others).intersection(*(group[0].costs.others for group in groups))
        has_small, has_light = (any(setting[place] for setting in others) for place in (0, 1))
        costs = chunk_costs(RingCosts(ring), counts, has_small=has_small, has_light=has_light)
    else:
        costs = tuple(_ring_cost(ring, each) for each in counts)
        transit_s = RingCosts(ring).mean_s(Work.of_chunk(steps)) - costs[-1].mean_s
    return Capacity(
        chunk_cost_s=costs[-1].mean_s,
        max_streams=0,
        open_streams=0,
        chunk_frames=CHUNK_FRAMES,
        first_chunk_frames=first_frames,
        costs=costs,
        groups=len(groups),
        transit_s=transit_s,
    )


def _ring_cost(ring: Sequence[RankShare], steps: int) -> ChunkCostAt:
    share = max(ring, key=lambda share: share.chunk_s(steps))
    spread = share.costs.upper_s(Work.of_chunk(steps)) / share.costs.mean_s(Work.of_chunk(steps))
    mean_s = share.chunk_s(steps)
    return ChunkCostAt(steps=steps, small=False, mean_s=mean_s, upper_s=spread * mean_s)
