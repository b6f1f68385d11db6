"""Which rank holds which part of the model: a chain of units cut into contiguous runs, one a rank.

A unit is a part that can lie on any rank: a part of VAE encode, one DiT block, a part of VAE decode. A ring moves at
the pace of its slowest rank, so the split that makes the slowest fastest is wanted. It is found exactly, by a dynamic
programme over (ranks, units): 8 ranks and 40 units take milliseconds. Times come per rank and unit, so unequal devices
need no special case, and a time of infinity keeps a unit off a rank. A rank may hold no unit at all.

`Balancer` measures while the ring runs and says when another split pays; `published_split` is the one-shot rule of
StreamDiffusionV2's public code, for comparison. Pure: no clock, no device.
"""

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

# Orders of unlike devices are all tried up to so many ranks: 720 of them.
MAX_PERMUTED = 6


class PartitionError(ValueError):
    """No split fits; the text says which bound was missed."""


@dataclass(frozen=True)
class Split:
    """Rank r holds units bounds[r] to bounds[r + 1]; slowest_s: what the slowest rank takes for its units."""

    bounds: tuple[int, ...]
    slowest_s: float

    def units(self, rank: int) -> range:
        """The units of a rank."""
        return range(self.bounds[rank], self.bounds[rank + 1])

    def moved(self, other: "Split") -> list[int]:
        """Units that lie on another rank in `other`."""
        owner = _owners(self.bounds)
        return [unit for unit, rank in enumerate(_owners(other.bounds)) if owner[unit] != rank]


def partition(
    times_s: Sequence[Sequence[float]],
    unit_bytes: Sequence[int] | None = None,
    capacity_bytes: Sequence[float] | None = None,
) -> Split:
    """The contiguous split over ranks in the given order whose slowest rank is fastest.

    Args:
        times_s: seconds of every unit on every rank, [ranks][units]; infinity where a unit may not lie.
        unit_bytes: memory of each unit; none is counted where it is left out.
        capacity_bytes: memory of each rank for units; unlimited where it is left out.

    Raises: PartitionError, if the units fit no split; ValueError for sizes that do not belong together.
    """
    ranks, units = len(times_s), len(times_s[0]) if times_s else 0
    sizes = list(unit_bytes) if unit_bytes is not None else [0] * units
    room = list(capacity_bytes) if capacity_bytes is not None else [math.inf] * ranks
    if not ranks or any(len(row) != units for row in times_s) or len(sizes) != units or len(room) != ranks:
        raise ValueError(f"{ranks} ranks and {units} units need a time for every pair, and one size or capacity each")
    if any(not time >= 0 for row in times_s for time in row):
        raise ValueError("a unit's time must be 0 s or more")
    # best[j]: the slowest of the ranks so far when they hold the first j units; cuts[r][j]: where rank r then begins.
    best = [0.0] + [math.inf] * units
    cuts: list[list[int]] = []
    for row, limit in zip(times_s, room, strict=True):
        reached, begins = [math.inf] * (units + 1), [0] * (units + 1)
        for end in range(units + 1):
            time, size = 0.0, 0
            # From the empty run outwards: once it is too large or slower than the best, longer ones are no better.
            for begin in range(end, -1, -1):
                if begin < end:
                    time, size = time + row[begin], size + sizes[begin]
                if size > limit or (time >= reached[end] and begin < end):
                    break
                slowest = max(best[begin], time)
                if slowest < reached[end]:
                    reached[end], begins[end] = slowest, begin
        best = reached
        cuts.append(begins)
    if best[units] == math.inf:
        raise PartitionError(
            f"{units} units of {sum(sizes)} bytes do not fit {ranks} ranks of {room} bytes: "
            "add ranks or memory, or allow units on more ranks"
        )
    bounds = [units]
    for begins in reversed(cuts):
        bounds.append(begins[bounds[-1]])
    return Split(tuple(reversed(bounds)), best[units])


def stage_times(times_s: Sequence[Sequence[float]], bounds: Sequence[int]) -> list[float]:
    """What every rank takes for the units it holds, seconds."""
    runs = zip(times_s, itertools.pairwise(bounds), strict=True)
    # A unit that may not lie on a rank has an infinite time there.
    return [sum(row[begin:end]) for row, (begin, end) in runs]


def best_order(
    times_s: Sequence[Sequence[float]],
    unit_bytes: Sequence[int] | None = None,
    capacity_bytes: Sequence[float] | None = None,
) -> tuple[tuple[int, ...], Split]:
    """The order of devices along the chain, and their split: the first of the fastest orders.

    All orders are tried up to `MAX_PERMUTED` devices, each set of equal devices once; with more, devices go in order
    of their memory. Arguments and errors as of `partition`, with a row for each device.

    Returns: device numbers in ring order, and the split over them.
    """
    count = len(times_s)
    room = list(capacity_bytes) if capacity_bytes is not None else [math.inf] * count
    if count > MAX_PERMUTED:
        orders = [tuple(sorted(range(count), key=lambda device: -room[device]))]
    else:
        orders = list(itertools.permutations(range(count)))
    tried: dict[tuple[object, ...], None] = {}
    best: tuple[tuple[int, ...], Split] | None = None
    refusal: PartitionError | None = None
    for order in orders:
        kinds = tuple((tuple(times_s[device]), room[device]) for device in order)
        if kinds in tried:
            continue
        tried[kinds] = None
        try:
            split = partition([times_s[device] for device in order], unit_bytes, [room[device] for device in order])
        except PartitionError as error:
            refusal = error
            continue
        if best is None or split.slowest_s < best[1].slowest_s:
            best = order, split
    if best is None:
        raise refusal or PartitionError("no devices to hold the units: name at least one")
    return best


def even_split(ranks: int, units: int) -> tuple[int, ...]:
    """Bounds of runs of equal length, the first ranks taking one more where it does not come out even."""
    each, more = divmod(units, ranks)
    return tuple(each * rank + min(rank, more) for rank in range(ranks + 1))


def published_split(total_s: Sequence[float], blocks_s: Sequence[float], blocks: Sequence[int]) -> tuple[int, ...]:
    """The one-shot rule of the public code: new bounds of DiT blocks by rank.

    One time per block for all ranks, a target for each from its distance to the mean, at least one block a rank.

    Args:
        total_s, blocks_s: what each rank takes, autoencoder included, and for its blocks alone.
        blocks: how many each rank holds now.

    Source: the description of `compute_balanced_split` of StreamDiffusionV2's public code; written anew.
    """
    count = sum(blocks)
    if count < len(blocks):
        raise ValueError(f"the public rule needs a block for every rank: {count} blocks, {len(blocks)} ranks")
    block_s, mean_s = sum(blocks_s) / count, statistics.fmean(total_s)
    targets = [max(1, round(held + (mean_s - took) / block_s)) for held, took in zip(blocks, total_s, strict=True)]
    while sum(targets) < count:
        targets[targets.index(min(targets))] += 1
    while sum(targets) > count:
        targets[targets.index(max(targets))] -= 1
    return tuple(itertools.accumulate(targets, initial=0))


@dataclass(frozen=True)
class BalancerConfig:
    """When a move pays. gain, sigmas: a split must be faster by more than both, as a share and in standard errors of
    the measurement. windows: as many in a row must say so. horizon_s: within which the move must have paid.
    """

    gain: float = 0.05
    sigmas: float = 3.0
    windows: int = 3
    horizon_s: float = 30.0
    smoothing: float = 0.3


@dataclass(eq=False)
class _Measured:
    """Time of one kind of unit on one rank: its level, and the standard error of a window's value as a share of it."""

    level_s: float | None = None
    error: float = 0.0
    samples: list[float] = field(default_factory=list)

    def close(self, smoothing: float) -> None:
        if not self.samples:
            return
        middle = statistics.median(self.samples)
        if middle > 0:
            # Within the window: a change of pace between two windows is no noise. From quartiles, for a pass that was
            # interrupted tells nothing; of a median, hence the 1.25.
            deviation = (_quantile(self.samples, 0.75) - _quantile(self.samples, 0.25)) / 1.35
            spread = 1.25 * deviation / middle / math.sqrt(len(self.samples))
            self.error = spread if self.level_s is None else self.error + smoothing * (spread - self.error)
        self.samples.clear()
        known = self.level_s
        # Another pace is taken up at once, what lies within the noise is averaged.
        if known is None or abs(middle - known) > known * max(0.02, 4 * self.error):
            self.level_s = middle
        else:
            self.level_s = known + smoothing * (middle - known)


class Balancer:
    """Decides from measured times when units move to another rank, and where to.

    Units of one kind are alike, so a rank that holds a few tells the time of all. What a rank has never run is taken
    from the expected time, scaled by how the rank fares with what it does run.
    """

    def __init__(
        self,
        kinds: Sequence[str],
        expected_s: Sequence[Sequence[float]],
        bounds: Sequence[int],
        *,
        unit_bytes: Sequence[int] | None = None,
        capacity_bytes: Sequence[float] | None = None,
        move_s: Sequence[float] | None = None,
        config: BalancerConfig | None = None,
    ) -> None:
        """Begin with a split.

        Args:
            kinds: of every unit, for example encode, block, decode.
            expected_s: as `partition` takes times; what holds until something is measured.
            move_s: what it costs to move each unit, seconds of the ring's time; nothing where it is left out.
        """
        self.bounds, self.epoch = tuple(bounds), 0
        self._kinds, self._expected = tuple(kinds), [list(row) for row in expected_s]
        self._sizes, self._room = unit_bytes, capacity_bytes
        self._move_s = list(move_s) if move_s is not None else [0.0] * len(kinds)
        self._config = config or BalancerConfig()
        self._measured = [{kind: _Measured() for kind in set(kinds)} for _ in expected_s]
        self._agreeing = 0

    def observe(self, rank: int, kind: str, time_s: float) -> None:
        """Note what one unit of a kind took on a rank, its own time without waiting for others."""
        self._measured[rank][kind].samples.append(time_s)

    def times_s(self) -> list[list[float]]:
        """Every unit on every rank, as measured where it was."""
        return [self._row(rank) for rank in range(len(self._expected))]

    def close_window(self) -> Split | None:
        """Take in what was observed since the last call; returns the split to move to, once it has proved better.

        The new split is then in force: `bounds` and `epoch` tell.
        """
        for rank in self._measured:
            before = {kind: measured.level_s for kind, measured in rank.items()}
            idle = [measured for measured in rank.values() if not measured.samples]
            for measured in rank.values():
                measured.close(self._config.smoothing)
            changes = [
                measured.level_s / known
                for kind, measured in rank.items()
                if measured not in idle and measured.level_s is not None and (known := before[kind])
            ]
            # What a rank no longer runs keeps pace with what it does: it would else stay slow for ever.
            for measured in idle:
                if measured.level_s is not None and changes:
                    measured.level_s *= statistics.median(changes)
        times = self.times_s()
        best = partition(times, self._sizes, self._room)
        stages = stage_times(times, self.bounds)
        now_s = max(stages)
        gain = 1 - best.slowest_s / now_s if now_s > 0 else 0.0
        error = self._error(stages.index(now_s), times)
        cost_s = sum(self._move_s[unit] for unit in Split(self.bounds, now_s).moved(best))
        config = self._config
        pays = gain > max(config.gain, config.sigmas * error) and gain * config.horizon_s > cost_s
        self._agreeing = self._agreeing + 1 if pays else 0
        if self._agreeing < config.windows:
            return None
        self._agreeing, self.bounds, self.epoch = 0, best.bounds, self.epoch + 1
        return best

    def _error(self, rank: int, times: Sequence[Sequence[float]]) -> float:
        """The standard error of what a rank takes, as a share: of a part that takes little, noise matters little."""
        spent: dict[str, float] = {}
        for unit in range(self.bounds[rank], self.bounds[rank + 1]):
            kind = self._kinds[unit]
            spent[kind] = spent.get(kind, 0.0) + times[rank][unit]
        whole = sum(spent.values())
        errors = (self._measured[rank][kind].error * time_s for kind, time_s in spent.items())
        return math.hypot(*errors) / whole if whole > 0 else 0.0

    def _row(self, rank: int) -> list[float]:
        expected, measured = self._expected[rank], self._measured[rank]
        ratios = []
        for unit, kind in enumerate(self._kinds):
            level = measured[kind].level_s
            if level is not None and 0 < expected[unit] < math.inf:
                ratios.append(level / expected[unit])
        pace = statistics.median(ratios) if ratios else 1.0
        row = []
        for unit, kind in enumerate(self._kinds):
            level = measured[kind].level_s
            known = level is not None and expected[unit] < math.inf
            row.append(level if known and level is not None else expected[unit] * pace)
        return row


def _quantile(samples: Sequence[float], share: float) -> float:
    ordered, place = sorted(samples), share * (len(samples) - 1)
    below = math.floor(place)
    return ordered[below] + (place - below) * (ordered[math.ceil(place)] - ordered[below])


def _owners(bounds: Sequence[int]) -> list[int]:
    return [rank for rank, (begin, end) in enumerate(itertools.pairwise(bounds)) for _ in range(begin, end)]
