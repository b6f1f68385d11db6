"""What the ranks of a ring say to each other: orders, as rows of numbers of a fixed length.

Everything reaches a rank in the order rank 0 sent it, on one wire: passes, new prompts, emptied and copied cache rows,
and a new plan (epoch).
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum

# Changes of the cache that go with one message; more go ahead in messages of their own.
CHANGES = 8


class Kind(IntEnum):
    """What a message asks of a rank. The first three go along a section of the chain, to the rank where it ends."""

    ENCODE = 1
    PASS = 2
    SHOW = 3
    TEXT = 4
    NOTE = 5
    PLAN = 6
    STOP = 7


class Change(IntEnum):
    """What happens to a rank's memory before a message is followed."""

    CLEAR = 1
    COPY = 2
    FOLD = 3
    FORGET = 4


@dataclass(frozen=True)
class Layout:
    """What all ranks of a ring know of its messages: ranks, slots of a window, units of the chain."""

    ranks: int
    window: int
    units: int

    @property
    def words(self) -> int:
        """Length of `Order.write`."""
        return 14 + 2 * self.window + 4 * CHANGES + 4 * self.ranks + 1 + self.units


@dataclass
class Order:
    """The words of a message.

    number: of the passes, chunks to encode or chunks to show, each counted by rank 0; show_number: of the chunk that a
    pass is shown as. frames: latent frames. row, seen, held, slots: the cache row as it is for this pass, see `KVPool`.
    stream: whose memories. prompt: where its text lies. reply: whether the clean latent goes back. show: camera frames
    to decode then; 0 for none. bounds: first unit of every rank, and the end. rank_s, unit_s: what each rank and each
    unit took as the message went by, seconds. wire_s, wire_bytes: what each rank that it passes has spent on messages
    since it told last.
    """

    kind: Kind
    epoch: int = 0
    number: int = 0
    show_number: int = 0
    frames: int = 0
    row: int = 0
    seen: int = 0
    stream: int = 0
    prompt: int = 0
    reply: bool = False
    show: int = 0
    timestep: float = 0.0
    sigma: float = 0.0
    strength: float = 0.0
    held: Sequence[int] = ()
    slots: Sequence[int] = ()
    changes: Sequence[tuple[int, int, int, int]] = ()
    rank_s: list[float] = field(default_factory=list)
    unit_s: list[float] = field(default_factory=list)
    bounds: Sequence[int] = ()
    wire_s: list[float] = field(default_factory=list)
    wire_bytes: list[float] = field(default_factory=list)

    def write(self, layout: Layout) -> list[float]:
        """As words of a fixed number."""
        scalars = (
            self.kind, self.epoch, self.number, self.show_number, self.frames, self.row, self.seen, self.stream,
            self.prompt, self.reply, self.show, self.timestep, self.sigma, self.strength,
        )  # fmt: skip
        changes = list(itertools.chain.from_iterable(self.changes))
        return [
            *map(float, scalars),
            *_padded(self.held, layout.window),
            *_padded(self.slots, layout.window),
            *_padded(changes, 4 * CHANGES),
            *_padded(self.rank_s, layout.ranks),
            *_padded(self.unit_s, layout.units),
            *_padded(self.bounds, layout.ranks + 1),
            *_padded(self.wire_s, layout.ranks),
            *_padded(self.wire_bytes, layout.ranks),
        ]

    @classmethod
    def read(cls, words: Sequence[float], layout: Layout) -> "Order":
        """The inverse of `write`."""
        rest = iter(words)
        kind, epoch, number, show_number, frames, row, seen, stream, prompt, reply, show = (
            int(next(rest)) for _ in range(11)
        )
        timestep, sigma, strength = (next(rest) for _ in range(3))
        held, slots = ([int(next(rest)) for _ in range(layout.window)] for _ in range(2))
        changes = [tuple(int(next(rest)) for _ in range(4)) for _ in range(CHANGES)]
        return cls(
            kind=Kind(kind),
            epoch=epoch,
            number=number,
            show_number=show_number,
            frames=frames,
            row=row,
            seen=seen,
            stream=stream,
            prompt=prompt,
            reply=bool(reply),
            show=show,
            timestep=timestep,
            sigma=sigma,
            strength=strength,
            held=held,
            slots=slots[:frames],
            changes=[(a, b, c, d) for a, b, c, d in changes if a],
            rank_s=[next(rest) for _ in range(layout.ranks)],
            unit_s=[next(rest) for _ in range(layout.units)],
            bounds=[int(next(rest)) for _ in range(layout.ranks + 1)],
            wire_s=[next(rest) for _ in range(layout.ranks)],
            wire_bytes=[next(rest) for _ in range(layout.ranks)],
        )

    def to_show(self) -> "Order":
        """What becomes of a pass that has ended and is to be shown: the changes go with it, its times start anew."""
        return replace(
            self,
            kind=Kind.SHOW,
            number=self.show_number,
            rank_s=[0.0] * len(self.rank_s),
            unit_s=[0.0] * len(self.unit_s),
            wire_s=[0.0] * len(self.wire_s),
            wire_bytes=[0.0] * len(self.wire_bytes),
        )


def _padded(values: Sequence[float], length: int) -> list[float]:
    return [*map(float, values), *[0.0] * (length - len(values))]
