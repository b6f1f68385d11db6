"""Who is let in, and when to come back: pure functions of the engine's capacity, the settings and who is there.

A seat is a promise: with all seats taken, there still is a rung of the ladder that every session can stand on at
`min_fps` or more, within PROMISE_LOAD of the engine's time and within the latency budget. What the rung gives up on
the way there (steps, size, frames) is what a full house costs.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from statistics import fmean
from typing import Literal

from engine.api import Capacity
from server.host import Host
from server.ladder import PROMISE_LOAD, Demand, rungs
from server.settings import ServerSettings

# Of the time to come back after, in seconds: less only makes a queue of knocking, more loses the visitor.
MIN_RETRY_S = 2.0
MAX_RETRY_S = 60.0
# What a session is expected to stay on until the first stays of this server tell: short, for knocking costs little.
FIRST_STAY_S = 15.0
KEPT_STAYS = 64
Limit = Literal["settings", "memory", "process", "engine"]
# What allows no more sessions, the end of a sentence to who is refused.
LIMITS: dict[Limit, str] = {
    "settings": "it is set to take no more",
    "memory": "there is no memory for more",
    "process": "its CPU has no room for the video of more",
    "engine": "the model has no time for more",
}


def seats(capacity: Capacity, settings: ServerSettings, host: Host | None = None) -> int:
    """How many sessions this server takes at the measured costs and with the memory there is. At least one.

    host: what frames cost the server process; None while unknown.
    """
    return bounds(capacity, settings, host)[0]


def bounds(capacity: Capacity, settings: ServerSettings, host: Host | None = None) -> tuple[int, Limit]:
    """`seats`, and what it is that allows no more; of several the first in the order of `LIMITS`."""
    least: dict[Limit, int] = {
        "settings": settings.max_sessions,
        "memory": capacity.max_streams,
        "process": (host or Host()).seats(settings),
    }
    limit = min(least, key=lambda name: least[name])
    most = least[limit]
    # The least that anyone may be given decides, and that has one step.
    ladder = rungs(settings, steps_max=1, has_small=capacity.has_small, has_light=capacity.has_light)

    def can_all_stand(sessions: int) -> bool:
        return Demand(capacity, (1,) * sessions, settings).first_good(ladder, PROMISE_LOAD) is not None

    if capacity.chunk_cost_s <= 0 and not capacity.costs:
        return max(1, most), limit
    count = next((sessions for sessions in range(most, 1, -1) if can_all_stand(sessions)), 1)
    return count, "engine" if count < most else limit


def free_seats(all_seats: int, taken: Mapping[str, int], reserved: Mapping[str, int], own_class: str = "") -> int:
    """Seats that one more of `own_class` may take; none below one.

    taken: open sessions by class, "" for none. reserved: seats that are kept free for a class until so many of it are
        in; a session of no class, or of one without reserve, finds only what is left beside them.
    """
    kept = sum(max(0, count - taken.get(name, 0)) for name, count in reserved.items() if name != own_class)
    return max(0, all_seats - sum(taken.values()) - kept)


class Stays:
    """How long sessions stay, and so when the next seat may be free. Pure: times are passed in."""

    def __init__(self) -> None:
        self._stays_s: deque[float] = deque(maxlen=KEPT_STAYS)

    def ended(self, stay_s: float) -> None:
        """A session gave its seat back after so long."""
        self._stays_s.append(stay_s)

    def retry_after_s(self, ages_s: Iterable[float]) -> float:
        """Expected seconds until the first of the sessions in place leaves; MIN_RETRY_S to MAX_RETRY_S.

        A session of some age stays on as long as those that grew older did from that age on; one older than any
        known stays as long again as it has stayed. Of several, the first leaves at the sum of their rates.
        """
        rate = sum(1.0 / max(0.1, self._remaining_s(age_s)) for age_s in ages_s)
        return min(MAX_RETRY_S, max(MIN_RETRY_S, 1.0 / rate)) if rate else MIN_RETRY_S

    def _remaining_s(self, age_s: float) -> float:
        if not self._stays_s:
            return FIRST_STAY_S
        longer = [stay_s - age_s for stay_s in self._stays_s if stay_s > age_s]
        return fmean(longer) if longer else age_s
