"""Who is let in and at which rate: pure functions of the engine's capacity and the settings.

One rank renders every session in turn, so n sessions at f frames a second cost n * f / T * chunk_cost_s of each second.
"""

from __future__ import annotations

from engine.api import Capacity
from server.settings import ServerSettings

# Rates a session can be agreed, and nothing between: a rate that creeps is a picture that stutters.
RATES_FPS = (60.0, 30.0, 24.0, 20.0, 15.0, 12.0, 10.0, 8.0, 6.0, 5.0)
# Share of the engine's time that may be promised: to stay at a rate, and to step up to one.
STAY_LOAD = 0.95
RISE_LOAD = 0.80


def seats(capacity: Capacity, settings: ServerSettings) -> int:
    """How many sessions this server takes: each must get `min_fps` at the measured cost. At least one."""
    if capacity.chunk_cost_s <= 0:
        return settings.max_sessions
    affordable = int(RISE_LOAD * capacity.chunk_frames / (capacity.chunk_cost_s * settings.min_fps))
    return max(1, min(settings.max_sessions, capacity.max_streams, affordable))


def agreed_fps(capacity: Capacity, sessions: int, settings: ServerSettings, current: float | None = None) -> float:
    """The highest rate every one of `sessions` can be given, evenly.

    current: the rate in force; it is kept while it stays affordable, and left upwards only with room to spare, so
        that noise in the measured cost moves nobody.
    """
    rates = [rate for rate in RATES_FPS if settings.min_fps <= rate < settings.max_fps]
    rates = [settings.max_fps, *rates]
    if capacity.chunk_cost_s <= 0 or sessions == 0:
        return current or rates[0]
    total_fps = capacity.chunk_frames / capacity.chunk_cost_s / sessions

    def affordable(rate: float) -> bool:
        load = STAY_LOAD if current is not None and rate <= current else RISE_LOAD
        return rate <= load * total_fps

    return next((rate for rate in rates if affordable(rate)), rates[-1])
