"""One rank of a ring: its share of the model, what it remembers of streams, and the loop of a rank after the first.

Axes in names: B rows, T latent frames, C channels, H and W rows and columns, N tokens, E model width.
"""

import itertools
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from engine.denoise import predict_clean
from engine.kv_cache import CacheRow, KVPool
from engine.ring_orders import Change, Kind, Layout, Order
from engine.transport import Inbox, Message, Outbox, PeerGone, WireShape
from engine.wan.presets import TransformerConfig
from engine.wan.transformer import PromptContext
from engine.wan.vae import FRAMES_PER_LATENT, PIXELS_PER_LATENT, VAEState
from engine.wan.weights import Model

MOVE_TIMEOUT_S = 60.0


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
