"""What rank 0 of a ring knows of its streams and of what is under way."""

import itertools
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from torch import Tensor

from engine.api import StreamParams
from engine.pipeline import Rendered
from engine.ring_orders import Order
from engine.session import Item, PassInput, SessionState
from engine.wan.weights import VAE

J = TypeVar("J")


@dataclass(eq=False)
class Chunk:
    """A chunk that waits. pixels, vae: None until it has been sent to be encoded; source: until it came back. changes:
    the chunk before was encoded by another VAE. spent_s: what each rank has spent on it so far."""

    frames: Tensor
    pixels: Tensor | None = None
    vae: VAE | None = None
    changes: bool = False
    source: Tensor | None = None
    spent_s: list[float] = field(default_factory=list)


@dataclass(eq=False)
class Flow:
    """A stream on rank 0. slot: its memories. waiting: chunks, and parameters for those behind them. held: laid out,
    waits for the chunks in flight. alone: runs its steps by itself. fresh: nothing of it was encoded yet. generation:
    counts resets; what is under way of an older one is let go."""

    key: str
    state: SessionState
    slot: int
    waiting: deque[Chunk | StreamParams] = field(default_factory=deque)
    advanced: bool = False
    recache: bool = False
    held: tuple[Item, list[float]] | None = None
    alone: Item | None = None
    fresh: bool = True
    generation: int = 0

    @property
    def unsent(self) -> Chunk | None:
        """The next chunk that was not sent to be encoded, of those before a change of parameters."""
        chunks = itertools.takewhile(lambda waiting: isinstance(waiting, Chunk), self.waiting)
        return next((chunk for chunk in chunks if isinstance(chunk, Chunk) and chunk.pixels is None), None)


@dataclass(frozen=True, eq=False)
class Encoding:
    """A chunk whose source is due."""

    flow: Flow
    chunk: Chunk
    generation: int


@dataclass(frozen=True, eq=False)
class Pass:
    """A chunk at one step. spent_s: what each rank has spent on the chunk so far."""

    flow: Flow
    item: Item
    generation: int
    given: PassInput | None
    spent_s: list[float]

    @property
    def stale(self) -> bool:
        """Whether its stream has begun anew since."""
        return self.generation != self.flow.generation


class Due(Generic[J]):
    """What was asked for, and is taken in the same order: where units have moved, a later answer may come first."""

    def __init__(self) -> None:
        self._jobs: deque[J] = deque()
        self._answers: dict[int, tuple[Order, Tensor]] = {}
        self._asked = self._taken = 0

    def __len__(self) -> int:
        return len(self._jobs)

    def __iter__(self) -> Iterator[J]:
        return iter(self._jobs)

    @property
    def first(self) -> J | None:
        """What is due next."""
        return self._jobs[0] if self._jobs else None

    def ask(self, job: J) -> int:
        """Returns the number that the answer must have."""
        self._jobs.append(job)
        self._asked += 1
        return self._asked - 1

    def answer(self, order: Order, tensor: Tensor) -> None:
        """Keep what came back until its turn."""
        self._answers[order.number] = order, tensor

    def take(self) -> tuple[J, Order, Tensor] | None:
        """The next in order, once its answer is there."""
        if self._taken not in self._answers:
            return None
        self._taken += 1
        return self._jobs.popleft(), *self._answers.pop(self._taken - 1)


@dataclass(frozen=True)
class Done:
    """A chunk that is done. rendered: None where pixels are wanted as the decoder made them [T, 3, H, W]; pixels and
    item are None where there was no prompt yet. cost_s: what the slowest rank spent on it, which is what a chunk takes
    of a ring that is full; 0 where nothing was measured."""

    key: str
    chunk: int
    rendered: Rendered | None
    item: Item | None
    pixels: Tensor | None
    cost_s: float = 0.0
