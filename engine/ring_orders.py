"""What the ranks of a ring say to each other: orders, as rows of numbers of a fixed length.

Everything reaches a rank in the order rank 0 sent it, on one wire: passes, new prompts, emptied and copied cache rows,
and a new plan (epoch).
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum

# Changes of the cache that go with one message; more go ahead in messages of their own.
CHANGES = 8


class Kind(IntEnum):
    """What a message asks of a rank."""

    PASS = 1
    SHOW = 2
    TEXT = 3
    NOTE = 4
    PLAN = 5
    STOP = 6


class Change(IntEnum):
    """What happens to a rank's memory before a message is followed."""

    CLEAR = 1
    COPY = 2
    FOLD = 3
    FORGET = 4


@dataclass(frozen=True)
class Layout:
    """What all ranks of a ring know of its messages: ranks, slots of a window."""

    ranks: int
    window: int

    @property
    def words(self) -> int:
        """Length of `Order.write`."""
        return 13 + 2 * self.window + 4 * CHANGES + 2 * self.ranks + 1


@dataclass
class Order:
    """The words of a message.

    frames: latent frames. row, seen, held, slots: the cache row as it is for this pass, see `KVPool`. stream: whose
    decoder. prompt: where its text lies. reply: whether the clean latent goes back. show: camera frames to decode then;
    0 for none. bounds: first block of every rank, and the end. rank_s: what each rank took for its blocks, seconds, as
    the message went by.
    """

    kind: Kind
    epoch: int = 0
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
    decode_s: float = 0.0
    held: Sequence[int] = ()
    slots: Sequence[int] = ()
    changes: Sequence[tuple[int, int, int, int]] = ()
    rank_s: list[float] = field(default_factory=list)
    bounds: Sequence[int] = ()

    def write(self, layout: Layout) -> list[float]:
        """As words of a fixed number."""
        scalars = (
            self.kind, self.epoch, self.frames, self.row, self.seen, self.stream, self.prompt, self.reply, self.show,
            self.timestep, self.sigma, self.strength, self.decode_s,
        )  # fmt: skip
        changes = list(itertools.chain.from_iterable(self.changes))
        return [
            *map(float, scalars),
            *_padded(self.held, layout.window),
            *_padded(self.slots, layout.window),
            *_padded(changes, 4 * CHANGES),
            *_padded(self.rank_s, layout.ranks),
            *_padded(self.bounds, layout.ranks + 1),
        ]

    @classmethod
    def read(cls, words: Sequence[float], layout: Layout) -> "Order":
        """The inverse of `write`."""
        rest = iter(words)
        kind, epoch, frames, row, seen, stream, prompt, reply, show = (int(next(rest)) for _ in range(9))
        timestep, sigma, strength, decode_s = (next(rest) for _ in range(4))
        held, slots = ([int(next(rest)) for _ in range(layout.window)] for _ in range(2))
        changes = [tuple(int(next(rest)) for _ in range(4)) for _ in range(CHANGES)]
        return cls(
            kind=Kind(kind),
            epoch=epoch,
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
            decode_s=decode_s,
            held=held,
            slots=slots[:frames],
            changes=[(a, b, c, d) for a, b, c, d in changes if a],
            rank_s=[next(rest) for _ in range(layout.ranks)],
            bounds=[int(next(rest)) for _ in range(layout.ranks + 1)],
        )


def _padded(values: Sequence[float], length: int) -> list[float]:
    return [*map(float, values), *[0.0] * (length - len(values))]
