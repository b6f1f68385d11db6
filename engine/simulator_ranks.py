"""Devices in a simulation: what each rank of a group does of a chunk, its way past them, who forms a group. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from math import floor

from engine.cost_model import Work
from engine.devices import ChunkCosts
from engine.partition import partition
from engine.simulator_load import CHUNK_FRAMES, Workload


@dataclass(frozen=True)
class RankShare:
    """What one rank does of a chunk: shares of encode and decode from 0 to 1, a number of blocks."""

    costs: ChunkCosts
    encode: float
    blocks: int
    decode: float

    def parts_s(self, steps: int, *, batched: bool = False) -> dict[str, float]:
        """Seconds of one chunk by what they go to. batched: all steps in one forward."""
        forwards = 1 if batched else steps
        return {
            "VAE encode": self.encode * self.costs.encode_s,
            "the transformer": self.blocks * (forwards * self.costs.pass_s + steps * self.costs.row_s),
            "VAE decode": self.decode * self.costs.decode_s,
        }

    def chunk_s(self, steps: int, *, batched: bool = False) -> float:
        """All of it."""
        return sum(self.parts_s(steps, batched=batched).values())

    def at(self, *, small: bool, light: bool) -> RankShare:
        """The same share at a smaller size or by a light VAE, where there are these."""
        costs = self.costs.at(small=small, light=light)
        return self if costs is self.costs else replace(self, costs=costs)

    def pass_s(self, work: Work) -> float:
        """The rank's part of a pass that it has for itself."""
        costs = self.costs.at(small=work.small, light=work.light)
        coded = self.encode * costs.encode_s + self.decode * costs.decode_s
        through = self.blocks * (work.forwards * costs.pass_s + work.rows * costs.row_s)
        return costs.fixed_s + work.latents * coded + through


@dataclass(frozen=True)
class Visit:
    """One stay of a chunk at a rank: steps it takes there, and whether the rank's parts of the VAE run too."""

    rank: int
    steps: int
    encode: bool
    decode: bool

    def time_s(self, share: RankShare, latents: int) -> float:
        """For chunks of so many latent frames in all."""
        costs = share.costs
        coded = self.encode * share.encode * costs.encode_s + self.decode * share.decode * costs.decode_s
        return latents * coded + share.blocks * self.steps * (costs.pass_s + latents * costs.row_s)


def route(ring: Sequence[RankShare], steps: int) -> tuple[Visit, ...]:
    """The way of a chunk: past every rank with a part in encode, once a step past those with blocks, then decode."""
    visits: list[Visit] = []

    def go(rank: int, steps: int = 0, *, encode: bool = False, decode: bool = False) -> None:
        if visits and visits[-1].rank == rank:
            last = visits.pop()
            visits.append(Visit(rank, last.steps + steps, last.encode or encode, last.decode or decode))
        else:
            visits.append(Visit(rank, steps, encode, decode))

    for rank, share in enumerate(ring):
        if share.encode:
            go(rank, encode=True)
    for _ in range(steps):
        for rank, share in enumerate(ring):
            if share.blocks:
                go(rank, 1)
    for rank, share in enumerate(ring):
        if share.decode:
            go(rank, decode=True)
    return tuple(visits)


def split(
    costs: Sequence[ChunkCosts], steps: int, *, batched: bool = False, whole_vae: bool = False
) -> tuple[RankShare, ...]:
    """Lay encoder, blocks and decoder over ranks in this order, contiguously, so that the slowest is fastest.

    Args:
        batched: all steps of a chunk share one forward.
        whole_vae: encode stays whole on the first rank and decode on the last, every rank has a block and loses
            its hop: the public code. Otherwise their parts are units as blocks are, and hops are only latency.
    """
    first = costs[0]
    blocks, forwards = first.blocks, 1 if batched else steps
    if len(costs) == 1:
        return (RankShare(first, 1.0, blocks, 1.0),)
    block_s = [forwards * each.pass_s + steps * each.row_s for each in costs]
    if whole_vae:
        return _published_split(costs, block_s)
    times = [
        [
            *(share * each.encode_s for share in each.encode_parts),
            *[seconds] * blocks,
            *(share * each.decode_s for share in each.decode_parts),
        ]
        for each, seconds in zip(costs, block_s, strict=True)
    ]
    begin, end = len(first.encode_parts), len(first.encode_parts) + blocks
    shares = []
    for each, (low, high) in zip(costs, pairwise(partition(times).bounds), strict=True):
        encode = sum(first.encode_parts[low:high])
        decode = sum(first.decode_parts[max(0, low - end) : max(0, high - end)])
        held = max(0, min(high, end) - max(low, begin))
        # A ring changes neither size nor VAE.
        shares.append(RankShare(replace(each, others={}), encode, held, decode))
    return tuple(shares)


def _published_split(costs: Sequence[ChunkCosts], block_s: Sequence[float]) -> tuple[RankShare, ...]:
    """Encode on the first rank, decode on the last, blocks so that the slowest is fastest, hops included.

    Raises: ValueError for more ranks than blocks.
    """
    if costs[0].blocks < len(costs):
        raise ValueError(f"the public code needs a block for every rank: {costs[0].blocks} blocks, {len(costs)} ranks")
    spent = [each.hop_s for each in costs]
    spent[0] += costs[0].encode_s
    spent[-1] += costs[-1].decode_s
    held = [1] * len(costs)
    for _ in range(costs[0].blocks - len(costs)):
        # One more where that leaves the slowest fastest.
        least = min(range(len(costs)), key=lambda rank: spent[rank] + (held[rank] + 1) * block_s[rank])
        held[least] += 1
    last = len(costs) - 1
    return tuple(
        RankShare(replace(each, others={}), float(rank == 0), held[rank], float(rank == last))
        for rank, each in enumerate(costs)
    )


@dataclass(frozen=True)
class RingCosts:
    """What a pass takes on its way through a group alone: what the policy of a group of ranks goes by."""

    ring: tuple[RankShare, ...]

    def mean_s(self, work: Work) -> float:
        """See `engine.cost_model.Costs`."""
        hops = work.forwards if len(self.ring) > 1 else 0
        return sum(share.pass_s(work) + hops * share.costs.hop_s for share in self.ring)

    def upper_s(self, work: Work) -> float:
        """See `engine.cost_model.Costs`."""
        return self.mean_s(work) * max(share.costs.upper_s(work) / share.costs.mean_s(work) for share in self.ring)


def arrange(
    costs: Sequence[ChunkCosts], steps: int, workload: Workload, max_streams: Callable[[int], int] | None = None
) -> tuple[tuple[RankShare, ...], ...]:
    """Devices into groups that hold a copy of the model each, so that they carry the most sessions; saturated, the one
    group that renders one stream fastest.

    Args:
        max_streams: sessions that fit into the memory of a group of so many devices.
    Raises: ValueError, if not one session fits.
    """
    sizes = [n for n in range(1, len(costs) + 1) if max_streams is None or max_streams(n) > 0]
    if not sizes:
        raise ValueError(f"the model and one session do not fit into the memory of {len(costs)} devices: take more")
    if workload.saturated:
        runs = [costs[i : i + n] for n in sizes for i in range(len(costs) - n + 1)]
        return (min((split(run, steps) for run in runs), key=lambda ring: slowest_s(ring, steps)),)
    plans = []
    for size in sizes:
        rings = [split(costs[i : i + size], steps) for i in range(0, len(costs), size)]
        carried = 0
        for ring in rings:
            filled_s = (CHUNK_FRAMES - 1) / workload.fps
            alone_s = sum(share.chunk_s(steps) + steps * share.costs.hop_s * (len(ring) > 1) for share in ring)
            if filled_s + alone_s <= workload.budget_s:
                held = floor(workload.period_s / slowest_s(ring, steps))
                carried += min(held, max_streams(len(ring))) if max_streams else held
        fastest = 0.0 if carried else max(1 / slowest_s(ring, steps) for ring in rings)
        plans.append((carried, fastest, -size, rings))
    return tuple(max(plans, key=lambda plan: plan[:3])[3])


def slowest_s(ring: Sequence[RankShare], steps: int) -> float:
    """What a chunk takes at the rank that takes longest."""
    return max(share.chunk_s(steps) for share in ring)
