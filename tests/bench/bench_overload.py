"""Our policy beside two others under the same load, in virtual time: frames on time, and how old frames are.

    python tests/bench/bench_overload.py [--sessions 4] [--arrivals poisson] [--json]

The others: first in first out without drops, as the public demo of StreamDiffusionV2, and latest frame only, one chunk
a pass. The device is livebrush-tiny on a CPU, made as fast as the load asks for; load 1 is what it renders one by one.
"""

import argparse
import json
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from engine.cost_model import Costs, Work
from engine.devices import cpu_costs
from engine.scheduler import Drop, Item, Picked
from engine.simulator import simulate
from engine.simulator_devices import Policy, our_policy
from engine.simulator_load import Arrivals, Workload
from engine.simulator_outcome import Outcome
from engine.simulator_ranks import split

LOADS = (0.5, 0.8, 1.0, 1.2, 2.0)


@dataclass
class FirstInFirstOut:
    """One queue without end."""

    _queue: deque[Item] = field(default_factory=deque)

    def open(self, stream: int, *, steps: int = 1) -> None:
        """Nothing to do."""

    def change(self, stream: int, *, steps: int, small: bool, light: bool = False) -> None:
        """Nothing to do."""

    def push(self, item: Item) -> list[Drop]:
        """Behind the others."""
        self._queue.append(item)
        return []

    def pick(self, now: float) -> Picked:
        """The oldest."""
        return Picked((self._queue.popleft(),)) if self._queue else Picked()


@dataclass
class LatestOnly:
    """The newest chunk of each stream takes the place of the one that waits; streams in turn."""

    _waiting: dict[int, Item] = field(default_factory=dict)

    def open(self, stream: int, *, steps: int = 1) -> None:
        """Nothing to do."""

    def change(self, stream: int, *, steps: int, small: bool, light: bool = False) -> None:
        """Nothing to do."""

    def push(self, item: Item) -> list[Drop]:
        """In place of the stream's last one."""
        last, self._waiting[item.stream] = self._waiting.get(item.stream), item
        return [Drop(last, "engine_behind")] if last else []

    def pick(self, now: float) -> Picked:
        """Of the stream that has waited longest: the one whose place in the table is the oldest."""
        if not self._waiting:
            return Picked()
        return Picked((self._waiting.pop(next(iter(self._waiting))),))


POLICIES: dict[str, Callable[[Costs, int], Policy]] = {
    "livebrush": our_policy,
    "first in first out": lambda costs, micro_batch: FirstInFirstOut(),
    "latest only": lambda costs, micro_batch: LatestOnly(),
}


def compare(
    load: float,
    *,
    sessions: int = 4,
    arrivals: Arrivals = "even",
    fps: float = 16.0,
    budget_s: float = 0.5,
    seconds: float = 60.0,
    micro_batch: int = 4,
) -> dict[str, Outcome]:
    """The same cameras through each policy, on a device just so fast that they are this load."""
    workload = Workload(sessions, fps, budget_s, seconds, arrivals, first_frames=1)
    chunk_s = load * workload.period_s / sessions
    costs = cpu_costs(256, 256)
    costs = costs.times(chunk_s / costs.mean_s(Work.of_chunk(1)))
    return {
        name: simulate([split([costs], 1)], 1, workload, policy=policy, micro_batch=micro_batch)
        for name, policy in POLICIES.items()
    }


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sessions", type=int, default=4)
    parser.add_argument("--arrivals", choices=("even", "poisson"), default="even")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rows = [
        {
            "load": load,
            "policy": name,
            "on_time": round(1 - run.dmr, 4),
            "worst_on_time": round(1 - run.worst_dmr, 4),
            "age_p95_s": round(run.latency_quantile_s(0.95), 3),
        }
        for load in LOADS
        for name, run in compare(load, sessions=options.sessions, arrivals=options.arrivals).items()
    ]
    if options.json:
        print(json.dumps(rows, indent=2))
        return
    print(f"{'load':>4}  {'policy':<18}  {'on time':>8}  {'worst':>7}  {'age p95 s':>9}")
    for row in rows:
        print(
            f"{row['load']:>4}  {row['policy']:<18}  {row['on_time']:>8.1%}  {row['worst_on_time']:>7.1%}  "
            f"{row['age_p95_s']:>9.3f}"
        )


if __name__ == "__main__":
    main()
