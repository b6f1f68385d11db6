"""What one decision of the scheduler costs: CPU time of a pick with every stream waiting.

    .venv/bin/python tests/bench/bench_policy.py [--streams 64] [--picks 2000] [--json]

For each kind of load: time enough for all, twice what the device can do, and micro-batches of 8 with the cost model's
learning after every pass beside it.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time

from engine.cost_model import CostModel, Work
from engine.scheduler import Item, Scheduler

PERIOD_S = 1 / 6
BUDGET_S = 0.35


def decide(streams: int, load: float, micro_batch: int, picks: int) -> dict[str, float]:
    """Medians and 95th percentiles of CPU milliseconds for pick and for observe, over a simulated device."""
    noise = random.Random(0)
    cost_s = load * PERIOD_S / streams
    costs = CostModel()
    costs.profile(
        [(Work(n, 1, n, 3 * n), cost_s * (0.4 + 0.6 * n)) for n in range(1, micro_batch + 1) for _ in range(3)]
    )
    scheduler = Scheduler(costs, micro_batch=micro_batch, window=3)
    for stream in range(streams):
        scheduler.open(stream)
    idle = set(range(streams))
    now, chunk = 0.0, 0
    pick_ms, observe_ms = [], []
    for _ in range(picks):
        # Every stream has something to choose from; as many have a second chunk as the load leaves behind.
        for stream in range(streams):
            if stream in idle or noise.random() < load / streams:
                scheduler.push(Item(stream, chunk, 0, 4, now + noise.uniform(0.5, 1) * BUDGET_S))
                chunk += 1
        idle.clear()
        started = time.process_time()
        picked = scheduler.pick(now)
        pick_ms.append(1000 * (time.process_time() - started))
        assert picked.work is not None
        idle.update(item.stream for item in picked.items)
        seconds = costs.mean_s(picked.work) * noise.lognormvariate(0, 0.1)
        started = time.process_time()
        costs.observe(picked.work, seconds)
        observe_ms.append(1000 * (time.process_time() - started))
        now += seconds
    return {
        "pick_p50_ms": statistics.median(pick_ms),
        "pick_p95_ms": statistics.quantiles(pick_ms, n=20)[-1],
        "observe_p50_ms": statistics.median(observe_ms),
    }


def main() -> int:
    """Print one line for each kind of load."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--picks", type=int, default=2000)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    cases = {"all in time": (0.5, 1), "overloaded": (2.0, 1), "micro-batches of 8": (0.8, 8)}
    results = {
        name: decide(arguments.streams, load, micro_batch, arguments.picks)
        for name, (load, micro_batch) in cases.items()
    }
    if arguments.json:
        print(json.dumps(results))
        return 0
    for name, figures in results.items():
        print(
            f"{name:<20} pick {figures['pick_p50_ms']:.3f} ms (P95 {figures['pick_p95_ms']:.3f}), "
            f"observe {figures['observe_p50_ms']:.3f} ms"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
