"""One model spread over several ranks, in a ring: each holds a run of DiT blocks, and passes follow each other.

Rank 0 takes frames in, encodes and schedules; the last rank ends a pass and decodes. A pass carries one chunk at one of
its steps; the clean latent comes back to rank 0, which sends the chunk on its next step. So steps and blocks are both
spread: up to two passes a rank are under way, of many streams or of the successive chunks of one.

A pass holds one row. The public ring sends the rows of all steps of a stream together, every micro-step: a chunk then
takes n x W micro-steps of n rows. One row at a time costs n x W micro-steps of one row, an n-th of the latency at the
same throughput, where a row alone fills the device (a frame at 480p does). It also makes a result independent of what
else is under way: W ranks give bit for bit what one gives.

Rank 0 keeps the slots of the KV cache and sends with each pass those that matter; keys and values of a block lie on the
rank that holds the block. Everything reaches a rank in the order rank 0 sent it, on one wire: emptied and copied rows,
new prompts and a new plan (epoch) included. So streams come, change and go with no drain.

Axes in names: B rows, T latent frames, C channels, H and W rows and columns, N tokens, E model width.
"""

import itertools
import math
import statistics
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from enum import IntEnum
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from engine.api import EngineError, StreamParams
from engine.denoise import predict_clean
from engine.flow_match import add_noise, stacked
from engine.kv_cache import CacheRow, KVPool
from engine.partition import Balancer
from engine.pipeline import Mode, Pipeline, Rendered
from engine.session import Item, NoiseSource, PassInput, SessionState
from engine.transport import Inbox, Message, Outbox, PeerGone, WireShape
from engine.wan.presets import TransformerConfig
from engine.wan.transformer import PromptContext
from engine.wan.vae import FRAMES_PER_LATENT, PIXELS_PER_LATENT, VAEState
from engine.wan.weights import Model

PASSES_PER_RANK = 2
# Changes of the cache that go with one message; more go ahead in messages of their own.
CHANGES = 8
MOVE_TIMEOUT_S = 60.0
# Between two looks at the balance: a move takes three looks that agree, a few seconds of one stream.
WINDOW_PASSES = 10


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


class StagePool(KVPool):
    """The cache of one rank: keys and values of its own blocks alone. On rank 0, changes are noted for the others."""

    def __init__(self, config: TransformerConfig, grid: tuple[int, int], rows: int, **options: Any) -> None:
        """See `KVPool`; holds no block until `hold`."""
        super().__init__(config.model_copy(update={"layers": 0}), grid, rows, **options)
        self._shape = (rows, self.window, self.tokens, config.heads, config.head_dim)
        self._kind = options.get("dtype", torch.float32)
        self._layers = range(0)
        self.changes: list[tuple[int, int, int, int]] = []

    def hold(self, layers: range, arrived: Mapping[int, Tensor] | None = None) -> None:
        """Hold these blocks' keys and values from now on: those at hand stay, those that arrived or new ones join.

        Args:
            arrived: keys and values of a block, stacked, as `block` returned them on another rank.
        """
        given = arrived or {}
        device = self.held.device
        own = dict(zip(self._layers, zip(self.keys, self.values, strict=True), strict=True))
        for layer in layers:
            if layer in given:
                own[layer] = given[layer][0], given[layer][1]
            elif layer not in own:
                empty = torch.zeros((2, *self._shape), device=device, dtype=self._kind)
                own[layer] = empty[0], empty[1]
        self._layers = layers
        self.keys = tuple(own[layer][0] for layer in layers)
        self.values = tuple(own[layer][1] for layer in layers)
        self._views.clear()

    def block(self, layer: int) -> Tensor:
        """Keys and values of all rows of one block, stacked: a copy."""
        place = layer - self._layers.start
        return torch.stack((self.keys[place], self.values[place]))

    def empty_block(self) -> Tensor:
        """Memory for what `block` returns."""
        return torch.empty((2, *self._shape), device=self.held.device, dtype=self._kind)

    def clear(self, row: CacheRow) -> None:
        """See `KVPool.clear`."""
        super().clear(row)
        self.changes.append((Change.CLEAR, row.index, 0, 0))

    def copy_row(self, source: CacheRow, target: CacheRow) -> None:
        """See `KVPool.copy_row`."""
        super().copy_row(source, target)
        self.changes.append((Change.COPY, source.index, target.index, 0))

    def _fold_evicted(self, rows: Sequence[CacheRow], index: Tensor, slots: Tensor) -> None:
        for place, row in enumerate(rows):
            if row.seen >= self.window:
                for slot in slots[place].tolist():
                    self.changes.append((Change.FOLD, row.index, slot, int(self.held[row.index, slot]) % self.sinks))
        super()._fold_evicted(rows, index, slots)

    def rows_of_steps(self, rows: list[CacheRow]) -> list[CacheRow]:
        """The rows that a chunk's steps use; for comparisons with other caches."""
        return rows

    def follow(self, change: tuple[int, int, int, int]) -> None:
        """Do as rank 0 did; to keys and values alone, for rank 0 sends the rest with each pass."""
        kind, row, other, sink = change
        for tensor in (*self.keys, *self.values):
            if kind == Change.CLEAR:
                tensor[row].zero_()
            elif kind == Change.COPY:
                tensor[other].copy_(tensor[row])
            elif kind == Change.FOLD:
                assert self.cache.sink_ema is not None
                tensor[row, sink] = torch.lerp(tensor[row, other], tensor[row, sink], self.cache.sink_ema)


class Stage:
    """One rank's share of a pass, and what it remembers between passes."""

    def __init__(self, model: Model, pool: StagePool, rank: int, bounds: Sequence[int], streams: int) -> None:
        self.model, self.pool, self.rank, self.bounds = model, pool, rank, list(bounds)
        self.epoch = 0
        self.decode_s = 0.0
        self._texts: dict[int, tuple[Tensor, Tensor]] = {}
        self._prompts: dict[int, PromptContext] = {}
        self._decoders = [VAEState() for _ in range(streams)]
        pool.hold(self.layers)

    @property
    def layers(self) -> range:
        """The blocks that lie here."""
        return range(self.bounds[self.rank], self.bounds[self.rank + 1])

    @property
    def last(self) -> bool:
        """Whether passes end here."""
        return self.rank == len(self.bounds) - 2

    def learn(self, place: int, states_LK: Tensor, mean_K: Tensor) -> PromptContext:
        """Keep a prompt's text keys and values for these blocks."""
        self._texts[place] = states_LK.clone(), mean_K.clone()
        context = self.model.transformer.prompt_context(states_LK[None], mean_K[None], self.layers)
        self._prompts[place] = context
        return context

    def follow(self, changes: Iterable[tuple[int, int, int, int]]) -> None:
        """Change the memory as rank 0 did."""
        for change in changes:
            if change[0] == Change.FORGET:
                self.forget(change[1])
            else:
                self.pool.follow(change)

    def forget(self, stream: int) -> None:
        """Begin a stream's decoder anew."""
        self._decoders[stream] = VAEState()

    def through(self, order: Order, x_BNE: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens through the blocks here; returns them with the time embedding."""
        if order.epoch != self.epoch:
            raise RuntimeError(f"a pass of plan {order.epoch} came to a rank at plan {self.epoch}")
        began = time.perf_counter()
        device, pool, prompt = x_BNE.device, self.pool, self._prompts[order.prompt]
        pool.held[order.row] = torch.tensor(order.held).to(device)
        view = pool.view([CacheRow(order.row, order.seen)], torch.tensor([list(order.slots)]).to(device))
        timestep_B = torch.tensor([order.timestep], dtype=torch.float64).to(device)
        time_BE = self.model.transformer.time(timestep_B, prompt.pooled, x_BNE.dtype)
        out = self.model.transformer.through(x_BNE, time_BE, prompt, view, self.layers)
        order.rank_s[self.rank] = time.perf_counter() - began
        return out, time_BE

    def end(self, order: Order, x_BNE: Tensor, time_BE: Tensor, noisy: Tensor, source: Tensor) -> Tensor:
        """The clean latent that the last block's tokens stand for."""
        transformer = self.model.transformer
        config = transformer.config
        condition = source if config.condition_channels else None
        output = transformer.leave(x_BNE, time_BE, transformer.grid(noisy), condition)
        sigma = torch.tensor([order.sigma], dtype=torch.float64).to(noisy.device)
        strength = torch.tensor([order.strength]).to(noisy.device)
        return predict_clean(config.prediction, output, noisy, source, sigma, strength)

    def show(self, order: Order, latent: Tensor) -> Tensor:
        """The camera frames that a latent is shown as [T, 3, H, W]."""
        began = time.perf_counter()
        decoded, self._decoders[order.stream] = self.model.vae.decode(latent, self._decoders[order.stream])
        self.decode_s = time.perf_counter() - began
        return decoded[0, -order.show :]

    def move(self, bounds: Sequence[int], epoch: int, group: dist.ProcessGroup | None) -> None:
        """Go over to another plan: blocks that leave are sent, all rows of them, and those that come are received.

        A rank comes here when it has done all passes of the old plan. Weights are at hand on every rank.

        Raises: PeerGone.
        """
        old, new = _owners(self.bounds), _owners(bounds)
        works: list[dist.Work | None] = []
        arrived: dict[int, Tensor] = {}
        sent: list[Tensor] = []
        try:
            for layer, (donor, owner) in enumerate(zip(old, new, strict=True)):
                if donor == owner:
                    continue
                if donor == self.rank:
                    sent.append(self.pool.block(layer))
                    works.append(dist.isend(sent[-1], owner, group))
                elif owner == self.rank:
                    arrived[layer] = self.pool.empty_block()
                    works.append(dist.irecv(arrived[layer], donor, group))
            for work in works:
                if work is not None:
                    work.wait(timedelta(seconds=MOVE_TIMEOUT_S))
        except RuntimeError as error:
            raise PeerGone(str(error)) from error
        self.bounds, self.epoch = list(bounds), epoch
        self.pool.hold(self.layers, arrived)
        for place, (states, mean) in self._texts.items():
            self.learn(place, states, mean)


def _owners(bounds: Sequence[int]) -> list[int]:
    return [rank for rank, (begin, end) in enumerate(itertools.pairwise(bounds)) for _ in range(begin, end)]


@dataclass(frozen=True)
class Sizes:
    """Shapes of a ring's tensors for one frame size. span: latent frames of the usual chunk."""

    model: Model
    width: int
    height: int
    span: int

    @property
    def grid(self) -> tuple[int, int]:
        """Token rows and columns of a latent frame."""
        _, rows, columns = self.model.config.transformer.patch
        return self.height // PIXELS_PER_LATENT // rows, self.width // PIXELS_PER_LATENT // columns

    def tokens(self, frames: int) -> tuple[int, ...]:
        """Of a pass between two blocks."""
        return 1, frames * self.grid[0] * self.grid[1], self.model.config.transformer.dim

    def latent(self, frames: int) -> tuple[int, ...]:
        """Of a chunk."""
        channels = self.model.config.transformer.latent_channels
        return 1, frames, channels, self.height // PIXELS_PER_LATENT, self.width // PIXELS_PER_LATENT

    def pixels(self, frames: int) -> tuple[int, ...]:
        """Of camera frames."""
        return frames, 3, self.height, self.width

    def text(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Of a prompt's states and their mean."""
        config = self.model.config.transformer
        return (config.text_len, config.text_dim), (config.text_dim,)

    def wires(self, layout: Layout) -> tuple[WireShape, WireShape, WireShape]:
        """Of the wire from rank to rank, of that for latents back to rank 0, and of that for frames."""
        latent = torch.Size(self.latent(self.span)).numel()
        tokens = torch.Size(self.tokens(self.span)).numel()
        pixels = torch.Size(self.pixels(FRAMES_PER_LATENT * self.span)).numel()
        return (
            self._wire(layout, tokens + 2 * latent),
            self._wire(layout, latent),
            self._wire(layout, pixels),
        )

    def _wire(self, layout: Layout, values: int) -> WireShape:
        return WireShape(layout.words, values, self.model.dtype, self.model.device)


def serve(stage: Stage, sizes: Sizes, layout: Layout, inbox: Inbox, onward: Sequence[Outbox], group: Any) -> None:
    """A rank after the first: follow rank 0 until it says stop. Raises PeerGone.

    Args:
        onward: to the next rank; of the last rank: latents and frames to rank 0.
        group: for blocks that move.
    """
    while True:
        message = inbox.receive()
        order = Order.read(message.words, layout)
        stage.follow(order.changes)
        if order.kind in (Kind.PASS, Kind.SHOW):
            _work(stage, sizes, layout, order, message, onward)
            continue
        if not stage.last:
            onward[0].send(order.write(layout), [message.payload] if order.kind == Kind.TEXT else [])
        if order.kind == Kind.TEXT:
            stage.learn(order.prompt, *message.split(*sizes.text()))
        elif order.kind == Kind.PLAN:
            stage.move(order.bounds, order.epoch, group)
        elif order.kind == Kind.STOP:
            for outbox in onward:
                outbox.flush()
            return


def _work(stage: Stage, sizes: Sizes, layout: Layout, order: Order, message: Message, onward: Sequence[Outbox]) -> None:
    latent = sizes.latent(order.frames)
    if order.kind == Kind.SHOW:
        clean = message.split(latent)[0]
        if not stage.last:
            onward[0].send(order.write(layout), [clean])
            return
    else:
        x, noisy, source = message.split(sizes.tokens(order.frames), latent, latent)
        x, time_BE = stage.through(order, x)
        if not stage.last:
            onward[0].send(order.write(layout), [x, noisy, source])
            return
        if not order.reply:
            return
        clean = stage.end(order, x, time_BE, noisy, source)
        order.decode_s = stage.decode_s
        onward[0].send(order.write(layout), [clean])
    if order.show:
        onward[1].send(order.write(layout), [stage.show(order, clean)])


class _Pace:
    """Times of the parts of a ring, and the plan they speak for; a window is `WINDOW_PASSES` passes."""

    def __init__(self, ranks: int, layers: int) -> None:
        self._ranks, self._layers = ranks, layers
        self._kinds = ("encode", *["block"] * layers, "decode")
        self._seen: list[tuple[int, str, float]] = []
        self._balancer: Balancer | None = None
        self._passes = 0

    def note(self, rank: int, kind: str, time_s: float) -> None:
        """What one unit of a kind took on a rank, for one chunk."""
        if time_s > 0:
            self._seen.append((rank, kind, time_s))

    def close(self, bounds: Sequence[int]) -> tuple[int, ...] | None:
        """After every pass of the plan in force; returns the blocks' bounds to move to, when that pays."""
        self._passes += 1
        if self._passes % WINDOW_PASSES:
            return None
        if self._balancer is None:
            self._balancer = self._begin(bounds)
        for rank, kind, time_s in self._seen:
            self._balancer.observe(rank, kind, time_s)
        self._seen.clear()
        split = self._balancer.close_window()
        if split is None:
            return None
        inner = (min(max(bound - 1, 0), self._layers) for bound in split.bounds[1:-1])
        return (0, *inner, self._layers)

    def _begin(self, bounds: Sequence[int]) -> Balancer:
        """Ranks are taken for alike until they have run a block; the autoencoder's ends stay where they are."""
        usual = {
            kind: statistics.median([time_s for _, name, time_s in self._seen if name == kind] or [0.0])
            for kind in ("encode", "block", "decode")
        }
        times = [[usual[kind] for kind in self._kinds] for _ in range(self._ranks)]
        for rank, row in enumerate(times):
            row[0] = row[0] if rank == 0 else math.inf
            row[-1] = row[-1] if rank == self._ranks - 1 else math.inf
        units = (0, *(bound + 1 for bound in bounds[1:-1]), self._layers + 2)
        return Balancer(self._kinds, times, units)


@dataclass(eq=False)
class Flow:
    """A stream on rank 0. slot: its decoder. waiting: chunks, and parameters for those behind them. held: taken in,
    waits for the chunks in flight. alone: runs its steps by itself. generation: counts resets; passes of an older one
    are let go."""

    key: str
    state: SessionState
    slot: int
    waiting: deque[Tensor | StreamParams] = field(default_factory=deque)
    advanced: bool = False
    recache: bool = False
    held: Item | None = None
    alone: Item | None = None
    generation: int = 0


@dataclass(frozen=True, eq=False)
class _Pass:
    """A chunk at one step. spent_s: what each rank has spent on the chunk so far."""

    flow: Flow
    item: Item
    generation: int
    given: PassInput | None
    spent_s: list[float]

    @property
    def stale(self) -> bool:
        return self.generation != self.flow.generation


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


class RingHead(Pipeline):
    """Rank 0: takes chunks in, keeps up to `PASSES_PER_RANK` passes a rank under way, and takes results.

    With one rank it does the whole pass itself. Not for two threads: `take` what the wires brought, then `fill`.
    """

    def __init__(
        self,
        model: Model,
        width: int,
        height: int,
        bounds: Sequence[int],
        *,
        streams: int,
        mode: Mode = "batch",
        raw: bool = False,
        balance: bool = False,
        onward: Outbox | None = None,
        group: dist.ProcessGroup | None = None,
        pool_type: type[StagePool] = StagePool,
    ) -> None:
        """Prepare rank 0.

        Args:
            bounds: first block of every rank, and the end.
            raw: results are pixels and latents, see `Done`.
            balance: move blocks by measured times, see `engine.partition.Balancer`.
            onward: to rank 1, where there is one. group: for blocks that move.
        """
        super().__init__(model, width, height, streams=streams, mode=mode, pool_type=pool_type)
        assert isinstance(self.pool, StagePool)
        self.ring_pool = self.pool
        self.stage = Stage(model, self.pool, 0, bounds, streams)
        self.ranks = len(bounds) - 1
        self.layout = Layout(self.ranks, self.pool.window)
        self.flows: dict[str, Flow] = {}
        self.done: deque[Done] = deque()
        self.failed: deque[tuple[str, EngineError]] = deque()
        self.passes = 0
        self.times: deque[list[float]] = deque(maxlen=64)
        self.encode_s = self.decode_s = 0.0
        self._raw, self._onward, self._group = raw, onward, group
        self._limit = PASSES_PER_RANK * self.ranks
        self._pace = _Pace(self.ranks, model.config.transformer.layers) if balance and self.ranks > 1 else None
        self._under_way: deque[_Pass] = deque()
        self._ready: deque[_Pass] = deque()
        self._showing: deque[_Pass] = deque()
        self._arrived: deque[Tensor] = deque()
        self._pixels: Tensor | None = None
        self._slots = list(range(streams))[::-1]
        self._contexts: list[PromptContext | None] = [None] * (2 * streams + 2 * self._limit + 2)

    @property
    def busy(self) -> bool:
        """Whether an answer from another rank is due."""
        return bool(self._under_way or self._showing)

    @property
    def has_room(self) -> bool:
        """Whether a new chunk could go in now: those between their steps come first."""
        return len(self._under_way) + len(self._ready) < self._limit

    def takes(self, key: str) -> bool:
        """Whether the stream has no chunk here that waits for another of its own."""
        flow = self.flows[key]
        return flow.alone is None and flow.held is None and not flow.waiting

    # --- streams

    @torch.inference_mode()
    def join(self, key: str, params: StreamParams, noise: NoiseSource | None = None) -> None:
        """Open a stream under a name. Raises as `Pipeline.open`; ValueError for a name in use."""
        if key in self.flows:
            raise ValueError(f"stream {key!r} is open already: close it first, or take another name")
        state = self.open(params, noise)
        flow = self.flows[key] = Flow(key, state, self._slots.pop())
        self._forget(flow.slot)

    def leave(self, key: str) -> None:
        """Close a stream; what it has under way is let go."""
        flow = self.flows.pop(key)
        flow.generation += 1
        self._slots.append(flow.slot)
        self.close(flow.state)

    def submit(self, key: str, frames: Tensor) -> None:
        """Give a stream its next chunk: uint8 [T, H, W, 3], or pixels [T, 3, H, W] in [-1, 1]."""
        self.flows[key].waiting.append(frames)

    def update(self, key: str, params: StreamParams) -> None:
        """Change a stream from the next chunk it is given. Raises ValueError for what the model cannot follow."""
        self.plan(params)
        self.flows[key].waiting.append(params)

    @torch.inference_mode()
    def restart(self, key: str) -> list[int]:
        """`Pipeline.reset` for a stream of the ring: returns the chunks that are lost."""
        flow = self.flows[key]
        lost = [item.chunk for item in (flow.alone, flow.held) if item is not None]
        lost += self.reset(flow.state)
        flow.generation += 1
        flow.alone = flow.held = None
        self._forget(flow.slot)
        return lost

    # --- the ring

    @torch.inference_mode()
    def fill(self) -> None:
        """Send what can be sent: first chunks under way, oldest first; then new ones, stream by stream."""
        while len(self._under_way) < self._limit:
            if self._ready:
                job = self._ready.popleft()
                if not job.stale:
                    self._issue(job.flow, job.item, job.spent_s)
            elif not self._enter_one():
                return

    @torch.inference_mode()
    def take_clean(self, words: Sequence[float], clean: Tensor) -> None:
        """What came back on the wire for latents."""
        order = Order.read(words, self.layout)
        shape = (1, order.frames, *self._latent)
        self._returned(order, clean[: torch.Size(shape).numel()].view(shape))

    @torch.inference_mode()
    def take_frames(self, words: Sequence[float], pixels: Tensor) -> None:
        """What came back on the wire for frames."""
        order = Order.read(words, self.layout)
        shape = (order.show, 3, self.height, self.width)
        self._arrived.append(pixels[: torch.Size(shape).numel()].view(shape))
        self._show()

    @torch.inference_mode()
    def move(self, bounds: Sequence[int]) -> None:
        """Go over to another plan while passes are under way. Raises ValueError for bounds that are no plan."""
        layers = self.model.config.transformer.layers
        whole = len(bounds) == self.ranks + 1 and (bounds[0], bounds[-1]) == (0, layers)
        if not whole or list(bounds) != sorted(bounds):
            raise ValueError(f"bounds {tuple(bounds)} must rise from 0 to {layers} over {self.ranks} ranks")
        if list(bounds) == self.stage.bounds:
            return
        epoch = self.stage.epoch + 1
        self._send(Order(Kind.PLAN, epoch=epoch, bounds=bounds))
        self.stage.move(bounds, epoch, self._group)

    def stop(self) -> None:
        """Tell the other ranks to end."""
        self._send(Order(Kind.STOP))
        if self._onward is not None:
            self._onward.flush()

    # --- parts

    def decode(self, item: Item) -> Tensor:
        """The frames that the last rank made of it."""
        assert self._pixels is not None
        return self._pixels

    def _forget(self, slot: int) -> None:
        self.stage.forget(slot)
        self.ring_pool.changes.append((Change.FORGET, slot, 0, 0))

    def _send(self, order: Order, tensors: Sequence[Tensor] = ()) -> None:
        """To the next rank, behind every change of the cache so far."""
        pool = self.ring_pool
        changes, pool.changes = pool.changes, []
        if self._onward is None:
            return
        for start in range(0, len(changes), CHANGES):
            note = Order(Kind.NOTE, epoch=self.stage.epoch, changes=changes[start : start + CHANGES])
            if start + CHANGES < len(changes):
                self._onward.send(note.write(self.layout))
            else:
                order.changes = note.changes
        self._onward.send(order.write(self.layout), tensors)

    def _enter_one(self) -> bool:
        """Let one stream go on that can; the streams take turns."""
        for key in list(self.flows):
            flow = self.flows[key]
            try:
                entered = self._enter(flow)
            except EngineError as error:
                # Its text cannot be encoded: the other streams go on.
                self.leave(key)
                self.failed.append((key, error))
                continue
            if entered:
                # Behind the others now.
                self.flows[key] = self.flows.pop(key)
                return True
        return False

    def _enter(self, flow: Flow) -> bool:
        state = flow.state
        if flow.alone is not None:
            return False
        if flow.held is None:
            while flow.waiting and isinstance(params := flow.waiting[0], StreamParams):
                flow.waiting.popleft()
                self.set_params(state, params)
            if not flow.waiting or not self._prepared(flow):
                return False
            frames = flow.waiting.popleft()
            assert isinstance(frames, Tensor)  # parameters have been taken up
            flow.advanced = False
            if state.prompts.context is None:
                self.done.append(Done(flow.key, state.chunks, None, None, None))
                self._count(state, frames.shape[0])
                return True
            began = time.perf_counter()
            item = self.take_in(state, self._as_pixels(frames))
            self.encode_s = time.perf_counter() - began
            if self._pace is not None:
                self._pace.note(0, "encode", self.encode_s)
            item.rows = self.ring_pool.rows_of_steps(item.rows)
            if item.pipelined:
                state.in_flight.append(item)
                self.batch.begin(item)
                self._issue(flow, item, self._spent())
                return True
            flow.held = item
        # Chunks of one step use one row, and every rank does them in their order: they may follow each other.
        item = flow.held
        single = item.schedule.steps == 1
        if state.in_flight and not (single and all(other.schedule.steps == 1 for other in state.in_flight)):
            return False
        if not state.in_flight:
            self._settle(state)
        flow.held = None
        self.batch.begin(item)
        if item.done:
            self._issue_shown(flow, item)
            return True
        if single:
            state.in_flight.append(item)
        else:
            flow.alone = item
        self._issue(flow, item, self._spent())
        return True

    def _spent(self) -> list[float]:
        """Of a chunk that has just been encoded."""
        return [self.encode_s, *[0.0] * (self.ranks - 1)]

    def _as_pixels(self, frames: Tensor) -> Tensor:
        if frames.dtype != torch.uint8:
            return frames.to(self.model.device)
        kind = self.model.dtype if self._plain else torch.float32
        pixels = frames.to(self.model.device).permute(0, 3, 1, 2).to(kind)
        return pixels.contiguous().mul_(1 / 127.5).sub_(1)

    def _prepared(self, flow: Flow) -> bool:
        """Go on to the prompts of the next chunk; False while the cache has to wait for chunks in flight."""
        state, prompts = flow.state, flow.state.prompts
        if not flow.advanced:
            if prompts.moving:
                prompts.advance(self.model.text.request, self._contextualise)
                flow.recache = prompts.changed and state.params.recache and prompts.context is not None
            if state.pending_revision is not None and not prompts.pending:
                state.revision, state.pending_revision = state.pending_revision, None
            flow.advanced = True
        if flow.recache:
            if state.in_flight:
                return False
            self._settle(state)
            self._recache(state)
            flow.recache = False
        return True

    def _settle(self, state: SessionState) -> None:
        """What `Pipeline.drain` does when all is done."""
        if state.primed > 1:
            self.pool.copy_row(state.rows[state.primed - 1], state.rows[0])
        state.primed = 0

    def _recache(self, state: SessionState) -> None:
        """See `StreamBatch.recache`; nothing comes back, and what follows on the wire finds the cache written."""
        context = state.prompts.context
        assert context is not None
        row, *others = state.rows
        self.pool.clear(row)
        for given in state.history:
            look = None if self.pool.cache.sink_refresh is None else self.model.transformer.look(given.source)
            slots = self.pool.advance([row], given.noisy.shape[1], look_BE=look)
            order = self._order(row, slots, given.timestep, context)
            self._run(order, given.noisy, given.source)
        for other in others:
            self.pool.copy_row(row, other)

    def _issue(self, flow: Flow, item: Item, spent_s: list[float]) -> None:
        """Send a chunk on its next step."""
        self.batch.enter_rows([item])
        assert item.slots is not None
        step, schedule = item.step, item.schedule
        noise = item.noise.draw(item.chunk, step, item.source.shape[1])
        level_B = stacked([schedule.level(step)])
        noisy = add_noise(item.clean, noise, level_B[:, None].float())
        timestep_B = stacked([schedule.timesteps[step]])
        order = self._order(item.rows[step], item.slots, timestep_B, item.prompt)
        order.reply, order.stream = True, flow.slot
        order.sigma, order.strength = float(schedule.sigmas[step]), float(schedule.strength)
        job = _Pass(flow, item, flow.generation, PassInput(noisy, item.source, timestep_B), spent_s)
        self._under_way.append(job)
        if step + 1 == schedule.steps:
            order.show = item.frames
            self._showing.append(job)
        self._run(order, noisy, item.source)

    def _issue_shown(self, flow: Flow, item: Item) -> None:
        """Send a chunk that has no steps to be decoded."""
        latent = self.model.vae.normalise(item.clean) if self.sampling.latents == "raw" else item.clean
        order = Order(Kind.SHOW, self.stage.epoch, item.source.shape[1], stream=flow.slot, show=item.frames)
        self._showing.append(_Pass(flow, item, flow.generation, None, self._spent()))
        if self._onward is None:
            self._arrived.append(self.stage.show(order, latent))
            self._show()
        else:
            self._send(order, [latent])

    def _order(self, row: CacheRow, slots: Tensor, timestep_B: Tensor, context: PromptContext) -> Order:
        return Order(
            Kind.PASS,
            epoch=self.stage.epoch,
            frames=slots.shape[1],
            row=row.index,
            seen=row.seen,
            prompt=next(place for place, known in enumerate(self._contexts) if known is context),
            timestep=float(timestep_B),
            held=self.pool.held[row.index].tolist(),
            slots=slots[0].tolist(),
            rank_s=[0.0] * self.ranks,
        )

    def _run(self, order: Order, noisy: Tensor, source: Tensor) -> None:
        """Rank 0's share of a pass; the rest of it too where there is no other rank."""
        self.passes += 1
        transformer = self.model.transformer
        x_BNE = transformer.enter(noisy, source if transformer.config.condition_channels else None)
        x_BNE, time_BE = self.stage.through(order, x_BNE)
        if self._onward is not None:
            self._send(order, [x_BNE, noisy, source])
            return
        self.ring_pool.changes.clear()
        if not order.reply:
            return
        clean = self.stage.end(order, x_BNE, time_BE, noisy, source)
        if order.show:
            self._arrived.append(self.stage.show(order, clean))
        order.decode_s = self.stage.decode_s
        self._returned(order, clean)

    def _returned(self, order: Order, clean: Tensor) -> None:
        self.times.append(order.rank_s)
        self.decode_s = order.decode_s
        job = self._under_way.popleft()
        for rank, time_s in enumerate(order.rank_s):
            job.spent_s[rank] += time_s
        flow, item, state = job.flow, job.item, job.flow.state
        self._balance(order, item.schedule.steps)
        if not job.stale:
            item.clean = clean
            item.step += 1
            if not item.done:
                self._ready.append(job)
                return
            assert job.given is not None  # only a chunk without steps has none, and that is never under way
            state.history.append(job.given)
            if item is flow.alone:
                self._prime(item)
                flow.alone = None
            else:
                assert state.in_flight[0] is item  # the wires keep order
                state.in_flight.popleft()
        self._show()

    def _balance(self, order: Order, steps: int) -> None:
        """Note what a pass took, and move blocks when that pays. A chunk takes each block once a step."""
        if self._pace is None or order.epoch != self.stage.epoch:
            return
        for rank, (begin, end) in enumerate(itertools.pairwise(self.stage.bounds)):
            if end > begin:
                self._pace.note(rank, "block", order.rank_s[rank] * steps / (end - begin))
        self._pace.note(self.ranks - 1, "decode", order.decode_s)
        bounds = self._pace.close(self.stage.bounds)
        if bounds is not None:
            self.move(bounds)

    def _show(self) -> None:
        """Hand out chunks whose latent and frames have both come; they come on two wires."""
        while self._arrived and (self._showing[0].stale or self._showing[0].item.done):
            job, pixels = self._showing.popleft(), self._arrived.popleft()
            item, key = job.item, job.flow.key
            if job.stale:
                continue
            if self._raw:
                self.done.append(Done(key, item.chunk, None, item, pixels))
            else:
                self._pixels = pixels
                job.spent_s[-1] += self.decode_s
                self.done.append(Done(key, item.chunk, self._finish(item), item, None, max(job.spent_s)))

    def _contextualise(self, states_LK: Tensor, mean_K: Tensor) -> PromptContext:
        """See `Pipeline`; every rank learns the text."""
        used = [flow.state.prompts.context for flow in self.flows.values()]
        used += [job.item.prompt for job in (*self._under_way, *self._ready)]
        used += [item.prompt for flow in self.flows.values() for item in (flow.held, flow.alone) if item is not None]
        place = next(
            place
            for place, known in enumerate(self._contexts)
            if known is None or not any(known is context for context in used)
        )
        states, mean = (x.to(self.model.device, self.model.dtype) for x in (states_LK, mean_K))
        context = self.stage.learn(place, states, mean)
        self._contexts[place] = context
        self._send(Order(Kind.TEXT, epoch=self.stage.epoch, prompt=place), [states, mean])
        return context
