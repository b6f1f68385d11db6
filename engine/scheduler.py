"""Which chunks the rank renders next, how, and which are given up: pure policy, no torch, no clock of its own.

    scheduler = Scheduler(costs, micro_batch=4, window=3)
    scheduler.open(stream, steps=2); scheduler.push(item); picked = scheduler.pick(now)
    picked.items, picked.drops, picked.work; scheduler.close(stream)

The engine, its fake and the simulator run this same code; only `costs` (see `engine.cost_model.Costs`) and the clock
differ. `pick` is asked whenever the device is free, and what it returns is one pass. It returns something whenever
anything waits.

- **Freshness.** A stream holds at most MAX_WAITING chunks; the oldest is dropped whole. One that cannot meet its
  deadline any more at the mean cost is dropped when a newer one of its stream waits. Nothing is dropped after this: the
  model's cache wants every chunk it has begun.
- **Order.** As long as all that waits can be in time, the earliest deadline goes first. When not, a device that goes on
  so finishes every chunk at the edge of its deadline and half of them behind it. Then the chunk is taken that will be
  in time at the upper quantile, of the stream that has had least of the device; one that comes too late anyway is shown
  only when nothing better waits, or when its stream has fallen PATIENCE_S of device time behind. So a stream that asks
  for less than its share gets all it asks for, whatever the others ask for.
- **Micro-batch.** Other streams that can be in time join while every chunk in the pass stays so and a pass of one more
  costs at least MIN_GAIN less for what it does.
- **Chunk length.** Two chunks of a stream that wait may go as one of two latent frames, by the same two tests.
- **Mode.** A stream of several steps may have them run beside those of its chunks before (`pipelined`), which saves
  forwards and costs a chunk period of delay for each step but one. It is chosen where that is no slower and the slack
  allows; under load a stream stays in it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field

from engine.config import CHUNK_FRAMES
from engine.cost_model import Costs, Work

MAX_WAITING = 2
# A pass with one more chunk must cost at least this share less for each.
MIN_GAIN = 0.03
# Device time that a stream without a chance to be in time may fall behind before it is shown all the same.
PATIENCE_S = 0.5
# Share of the device's time from which on no stream is moved to a slower mode.
LOADED = 0.85
# Slack to enter pipelined mode, over what it needs to stay.
ENTER_MARGIN = 1.25


@dataclass(frozen=True, slots=True)
class Item:
    """One waiting chunk of one stream. deadline: monotonic seconds, of its oldest frame."""

    stream: int
    chunk: int
    slot: int
    frames: int
    deadline: float


@dataclass(frozen=True, slots=True)
class Drop:
    """A chunk given up, and why: `engine_behind`, `late` or `stream_closed`."""

    item: Item
    reason: str


@dataclass(frozen=True, slots=True)
class Picked:
    """One pass.

    items: its chunks, those of one stream (at most two, which are rendered as one) in order and side by side; empty
    when nothing waits. drops: given up on the way. work: what the pass consists of. pipelined: streams in it whose
    steps run beside those of their chunks before.
    """

    items: tuple[Item, ...] = ()
    drops: tuple[Drop, ...] = ()
    work: Work | None = None
    pipelined: frozenset[int] = frozenset()


@dataclass(slots=True)
class _Stream:
    """served_s: device time it has had, on the scale of those that wait. delay_s: by which a pipelined chunk comes out
    later than its pass."""

    number: int
    steps: int
    small: bool
    light: bool = False
    waiting: deque[Item] = field(default_factory=deque)
    served_s: float = 0.0
    period_s: float = 0.0
    newest_deadline: float | None = None
    pipelined: bool = False

    @property
    def delay_s(self) -> float:
        return (self.steps - 1) * self.period_s if self.pipelined else 0.0


@dataclass(slots=True)
class _Offer:
    """A chunk that a stream could render now: the instant by which its pass must end, and what it takes alone."""

    stream: _Stream
    item: Item
    due: float
    mean_s: float
    upper_s: float


@dataclass(slots=True)
class _Member:
    """A stream in a pass, with one chunk or two."""

    offer: _Offer
    latents: int = 1


class Scheduler:
    """The waiting chunks of every open stream."""

    def __init__(
        self,
        costs: Costs,
        *,
        micro_batch: int = 1,
        chunk_latents: int = 1,
        pipeline: bool = False,
        window: int = 0,
    ) -> None:
        """Begin without streams.

        Args:
            costs: asked at every pick, and may learn meanwhile.
            micro_batch: streams that one pass may take.
            chunk_latents: 2, if two chunks of a stream may be rendered as one.
            pipeline: whether streams have cache rows for their steps to run side by side.
            window: latent frames in a stream's cache, for the cost.
        """
        self._costs = costs
        self._micro_batch = micro_batch
        self._chunk_latents = chunk_latents
        self._pipeline = pipeline
        self._window = window
        self._streams: dict[int, _Stream] = {}
        self._virtual_s = 0.0

    @property
    def waiting(self) -> int:
        """Chunks of all streams that wait."""
        return sum(len(stream.waiting) for stream in self._streams.values())

    @property
    def load(self) -> float:
        """Share of the device's time that the open streams ask for, each chunk alone in its pass; 1 is all of it."""
        return sum(
            self._costs.mean_s(self._alone(stream)) / stream.period_s
            for stream in self._streams.values()
            if stream.period_s
        )

    def open(self, stream: int, *, steps: int = 1, small: bool = False, light: bool = False) -> None:
        """Take chunks of this stream from now on. steps: 0 where the model's transformer is not run at all."""
        self._streams[stream] = _Stream(stream, steps, small, light)

    def change(self, stream: int, *, steps: int, small: bool, light: bool = False) -> None:
        """What the stream's chunks are rendered with from the next one on. A closed stream is no matter."""
        if known := self._streams.get(stream):
            known.pipelined = known.pipelined and known.steps == steps
            known.steps, known.small, known.light = steps, small, light

    def close(self, stream: int) -> None:
        """Forget the stream and whatever waits in it."""
        self._streams.pop(stream, None)

    def push(self, item: Item) -> list[Drop]:
        """Add a chunk; returns the oldest ones pushed out. A chunk of a closed stream is dropped itself."""
        stream = self._streams.get(item.stream)
        if stream is None:
            return [Drop(item, "stream_closed")]
        if stream.newest_deadline is not None and item.deadline > stream.newest_deadline:
            stream.period_s = item.deadline - stream.newest_deadline
        stream.newest_deadline = item.deadline
        if not stream.waiting:
            # Time in which it wanted nothing is no claim on the others.
            stream.served_s = max(stream.served_s, self._virtual_s)
        stream.waiting.append(item)
        drops = []
        while len(stream.waiting) > MAX_WAITING:
            drops.append(Drop(stream.waiting.popleft(), "engine_behind"))
        return drops

    def pick(self, now: float, busy: Collection[int] = ()) -> Picked:
        """The pass to run at `now`, in monotonic seconds, and the chunks given up on the way.

        busy: streams that can take no other chunk now, see `engine.ring_worker`.
        """
        drops: list[Drop] = []
        ranked = self._rank(now, self._offers(now, busy, drops))
        if not ranked:
            return Picked((), tuple(drops))
        members, work = self._grow(now, ranked)
        items = self._take(members, drops)
        self._charge(members, work)
        pipelined = frozenset(m.offer.stream.number for m in members if m.offer.stream.pipelined)
        return Picked(tuple(items), tuple(drops), work, pipelined)

    # --- what could be rendered

    def _offers(self, now: float, busy: Collection[int], drops: list[Drop]) -> list[_Offer]:
        """The chunk that each stream would have rendered, by deadline; late ones before it are dropped."""
        known: dict[tuple[int, bool, bool, bool], tuple[float, float]] = {}
        offers = []
        loaded = self._pipeline and self.load > LOADED
        for stream in self._streams.values():
            waiting = stream.waiting
            if not waiting or stream.number in busy:
                continue
            if self._pipeline:
                self._choose_mode(stream, now, loaded)
            key = stream.steps, stream.small, stream.light, stream.pipelined
            if key not in known:
                work = self._alone(stream)
                known[key] = self._costs.mean_s(work), self._costs.upper_s(work)
            mean_s, upper_s = known[key]
            delay_s = stream.delay_s if stream.pipelined else 0.0
            while len(waiting) > 1 and waiting[0].deadline - delay_s < now + mean_s:
                drops.append(Drop(waiting.popleft(), "late"))
            offers.append(_Offer(stream, waiting[0], waiting[0].deadline - delay_s, mean_s, upper_s))
        # Deadlines may be equal (two pages, one camera): the stream number makes the choice deterministic.
        return sorted(offers, key=lambda offer: (offer.due, offer.stream.number))

    def _choose_mode(self, stream: _Stream, now: float, loaded: bool) -> None:
        steps = stream.steps
        if steps < 2:
            stream.pipelined = False
            return
        together, alone = self._chunk_work(stream, True), self._chunk_work(stream, False)
        if self._costs.mean_s(together) > self._costs.mean_s(alone):
            stream.pipelined = False
            return
        need_s = self._costs.upper_s(together) + (steps - 1) * stream.period_s
        slack_s = stream.waiting[0].deadline - now
        if stream.pipelined:
            stream.pipelined = loaded or slack_s >= need_s
        else:
            stream.pipelined = slack_s >= ENTER_MARGIN * need_s

    def _rank(self, now: float, offers: list[_Offer]) -> list[_Offer]:
        """The offers, best first."""
        possible = [offer for offer in offers if now + offer.mean_s <= offer.due]
        if possible and self._all_fit(now, possible):
            if len(possible) == len(offers):
                return possible
            lost = [offer for offer in offers if now + offer.mean_s > offer.due]
            ranked = possible + lost
        else:
            sure: list[_Offer] = []
            unsure: list[_Offer] = []
            lost = []
            for offer in offers:
                better = self._surest(now, offer)
                if now + better.upper_s <= better.due:
                    sure.append(better)
                else:
                    (unsure if now + better.mean_s <= better.due else lost).append(better)
            ranked = [*_fairest(sure), *_fairest(unsure), *_fairest(lost)]
        if 0 < len(lost) < len(ranked):
            neglected = min(lost, key=lambda offer: (offer.stream.served_s, offer.due, offer.stream.number))
            if neglected.stream.served_s + PATIENCE_S < ranked[0].stream.served_s:
                ranked.remove(neglected)
                return [neglected, *ranked]
        return ranked

    def _all_fit(self, now: float, offers: Sequence[_Offer]) -> bool:
        """Whether all can be in time one after the other, as much cheaper as passes of several make them."""
        count = min(self._micro_batch, len(offers))
        share = 1.0
        if count > 1:
            first = offers[0]
            share = min(1.0, self._costs.mean_s(_work([_Member(first)] * count, self._window)) / (count * first.mean_s))
        ends = now
        for offer in offers:
            ends += share * offer.mean_s
            if ends > offer.due:
                return False
        return True

    def _surest(self, now: float, offer: _Offer) -> _Offer:
        """The stream's oldest chunk that is in time at the upper quantile, or else its oldest."""
        stream, ends = offer.stream, now + offer.upper_s
        if ends <= offer.due or len(stream.waiting) == 1:
            return offer
        for item in stream.waiting:
            due = item.deadline - stream.delay_s
            if ends <= due:
                return _Offer(stream, item, due, offer.mean_s, offer.upper_s)
        return offer

    # --- what goes together

    def _grow(self, now: float, ranked: Sequence[_Offer]) -> tuple[list[_Member], Work]:
        """The best offer, and whatever joins it in its pass."""
        members = [_Member(ranked[0])]
        work = _work(members, self._window)
        mean_s = alone_s = ranked[0].mean_s
        for offer in ranked[1:]:
            if len(members) >= self._micro_batch:
                break
            # One that is late anyway waits: the sooner the pass ends, the more of those that come are in time.
            if not _alike(offer.stream, ranked[0].stream) or now + offer.mean_s > offer.due:
                continue
            grown = [*members, _Member(offer)]
            together = _work(grown, self._window)
            together_s = self._costs.mean_s(together)
            if not _gains(mean_s, alone_s, together_s, offer.mean_s) or not self._in_time(now, grown, together):
                break
            members, work, mean_s, alone_s = grown, together, together_s, alone_s + offer.mean_s
        if self._chunk_latents > 1:
            for place, member in enumerate(members):
                if not _extends(member):
                    continue
                grown = [*members[:place], _Member(member.offer, 2), *members[place + 1 :]]
                together = _work(grown, self._window)
                together_s = self._costs.mean_s(together)
                single_s = member.offer.mean_s
                if _gains(mean_s, alone_s, together_s, single_s) and self._in_time(now, grown, together):
                    members, work, mean_s, alone_s = grown, together, together_s, alone_s + single_s
        return members, work

    def _in_time(self, now: float, members: Iterable[_Member], work: Work) -> bool:
        """Whether every chunk that could be in time alone is so in this pass, at the same quantile."""
        mean, upper = now + self._costs.mean_s(work), now + self._costs.upper_s(work)
        for member in members:
            offer = member.offer
            if now + offer.upper_s <= offer.due:
                if upper > offer.due:
                    return False
            elif now + offer.mean_s <= offer.due < mean:
                return False
        return True

    def _take(self, members: Sequence[_Member], drops: list[Drop]) -> list[Item]:
        items = []
        for member in members:
            waiting = member.offer.stream.waiting
            while waiting[0] is not member.offer.item:
                drops.append(Drop(waiting.popleft(), "late"))
            items += [waiting.popleft() for _ in range(member.latents)]
        return items

    def _charge(self, members: Sequence[_Member], work: Work) -> None:
        """Each stream has had of the pass what its chunks weigh in it."""
        self._virtual_s = members[0].offer.stream.served_s
        weights = [member.latents * member.offer.mean_s for member in members]
        share = self._costs.mean_s(work) / (sum(weights) or 1.0)
        for member, weight in zip(members, weights, strict=True):
            member.offer.stream.served_s += share * weight

    def _alone(self, stream: _Stream) -> Work:
        return self._chunk_work(stream, stream.pipelined)

    def _chunk_work(self, stream: _Stream, pipelined: bool) -> Work:
        steps = stream.steps
        forwards = min(steps, 1) if pipelined else steps
        return Work(1, forwards, steps, steps * self._window, stream.small, stream.light)


def _alike(one: _Stream, other: _Stream) -> bool:
    """Whether chunks of the two can share a pass: of one size and by one VAE."""
    return (one.small, one.light) == (other.small, other.light)


def _fairest(offers: list[_Offer]) -> list[_Offer]:
    return sorted(offers, key=lambda offer: (offer.stream.served_s, offer.due, offer.stream.number))


def _gains(mean_s: float, alone_s: float, together_s: float, more_s: float) -> bool:
    """Whether a pass that does `more_s` more, in the time of chunks alone, is cheaper for what it does."""
    return together_s * alone_s <= (1 - MIN_GAIN) * mean_s * (alone_s + more_s)


def _extends(member: _Member) -> bool:
    """Whether the next chunk of the stream can be rendered as one with this one."""
    waiting, item = member.offer.stream.waiting, member.offer.item
    after = next((later for earlier, later in zip(waiting, list(waiting)[1:], strict=False) if earlier is item), None)
    whole = item.frames == CHUNK_FRAMES and after is not None and after.frames == CHUNK_FRAMES
    return whole and not member.offer.stream.pipelined


def _work(members: Sequence[_Member], window: int) -> Work:
    """What a pass over these consists of: chunks of one length take their steps together."""
    latents = rows = 0
    forwards: dict[tuple[int, bool], int] = {}
    for member in members:
        stream, length = member.offer.stream, member.latents
        key = length, stream.pipelined
        latents += length
        rows += stream.steps * length
        forwards[key] = max(forwards.get(key, 0), min(stream.steps, 1) if stream.pipelined else stream.steps)
    first = members[0].offer.stream
    return Work(latents, sum(forwards.values()), rows, rows * window, first.small, first.light)
