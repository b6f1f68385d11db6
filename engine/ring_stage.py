"""One rank of a ring: its units of the chain, what it remembers of streams, and the loop of a rank after the first.

Axes in names: B rows, T latent frames, C channels, H and W rows and columns, N tokens, E model width.
"""

import itertools
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from engine.chain import Chain, latents_carried
from engine.denoise import predict_clean
from engine.kv_cache import CacheRow, KVPool
from engine.ring_orders import Change, Kind, Layout, Order
from engine.transport import Inbox, Outbox, PeerGone, Traffic
from engine.wan.presets import TransformerConfig
from engine.wan.transformer import PromptContext
from engine.wan.vae import Carried, Memory
from engine.wan.weights import Model

MOVE_TIMEOUT_S = 60.0
# Axes of what moves: those of `StagePool.block`.
MOVED_AXES = 6


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
    """One rank's share of the chain, and what it remembers of streams for the units that lie here."""

    def __init__(
        self, model: Model, pool: StagePool, rank: int, bounds: Sequence[int], streams: int, chain: Chain
    ) -> None:
        self.model, self.pool, self.rank, self.bounds, self.chain = model, pool, rank, list(bounds), chain
        self.epoch = 0
        self._streams = streams
        self._texts: dict[int, tuple[Tensor, Tensor]] = {}
        self._prompts: dict[int, PromptContext] = {}
        # Of every unit of the autoencoder, whether it lies here or not.
        self._parts = dict(zip(chain.encode, model.vae.encode_parts(), strict=True))
        self._parts |= dict(zip(chain.decode, model.vae.decode_parts(), strict=True))
        # Of those that do: the memory of every stream.
        self._memories: dict[int, list[Memory]] = {}
        self._hold({})

    @property
    def layers(self) -> range:
        """The blocks that lie here."""
        blocks = self._own(self.chain.blocks)
        return range(blocks.start - self.chain.blocks.start, blocks.stop - self.chain.blocks.start)

    def ends(self, kind: Kind) -> bool:
        """Whether messages of this kind, of those that reach this rank, end their section of the chain here."""
        sections = {Kind.ENCODE: self.chain.encode, Kind.PASS: self.chain.tail, Kind.SHOW: self.chain.decode}
        return self.bounds[self.rank + 1] >= sections[kind].stop

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
        """Begin a stream's autoencoder anew."""
        for memories in self._memories.values():
            memories[stream] = ()

    def work(self, order: Order, carried: Carried, onward: Callable[..., None], answer: Callable[..., None]) -> None:
        """This rank's share of what goes along a section of the chain; a pass that ends here may go on to be shown.

        Args:
            onward: sends an order with its tensors to the next rank, if there is one. answer: sends one with the tensor
                that came of it to rank 0: source, clean latent, or frames [T, 3, H, W].
        """
        if order.epoch != self.epoch:
            raise RuntimeError(f"a message of plan {order.epoch} came to a rank at plan {self.epoch}")
        began = time.perf_counter()
        carried = self._denoise(order, carried) if order.kind == Kind.PASS else self._code(order, carried)
        order.rank_s[self.rank] = time.perf_counter() - began
        if not self.ends(order.kind):
            onward(order, carried)
            return
        if order.kind != Kind.PASS or order.reply:
            answer(order, carried[0][0, -order.show :] if order.kind == Kind.SHOW else carried[0])
        if order.kind == Kind.PASS and order.show:
            self.work(order.to_show(), carried, onward, answer)
        elif order.changes:
            onward(Order(Kind.NOTE, epoch=order.epoch, changes=order.changes), ())

    def move(self, bounds: Sequence[int], epoch: int, group: dist.ProcessGroup | None) -> None:
        """Go over to another plan: what units that leave keep of streams is sent, and that of those that come received.

        A rank comes here when it has done all messages of the old plan. Weights are at hand on every rank. What is kept
        goes through the host, after a row of shapes for each unit.

        Raises: PeerGone.
        """
        ways = enumerate(zip(_owners(self.bounds), _owners(bounds), strict=True))
        moving = [(unit, donor, owner) for unit, (donor, owner) in ways if donor != owner and self._kept(unit)]
        works: list[tuple[dist.Work | None, Tensor]] = []
        arrived: dict[int, list[Tensor]] = {}
        try:
            for unit, donor, owner in moving:
                if donor == self.rank:
                    # Both are kept until they are sent.
                    works += [(dist.isend(row, owner, group), row) for row in self._pack(unit) if row.numel()]
            for unit, donor, owner in moving:
                if owner == self.rank:
                    arrived[unit] = self._unpack(unit, donor, group)
            for work, _ in works:
                _finish(work)
        except RuntimeError as error:
            raise PeerGone(str(error)) from error
        self.bounds, self.epoch = list(bounds), epoch
        self._hold(arrived)
        for place, (states, mean) in self._texts.items():
            self.learn(place, states, mean)

    # --- parts

    def _own(self, section: range) -> range:
        """The units of a section that lie here."""
        first = min(max(self.bounds[self.rank], section.start), section.stop)
        return range(first, min(max(self.bounds[self.rank + 1], first), section.stop))

    def _code(self, order: Order, carried: Carried) -> Carried:
        """Through the units here that encode, or decode."""
        for unit in self._own(self.chain.encode if order.kind == Kind.ENCODE else self.chain.decode):
            began = time.perf_counter()
            memories = self._memories[unit]
            carried, memories[order.stream] = self._parts[unit].run(carried, memories[order.stream])
            order.unit_s[unit] = time.perf_counter() - began
        return carried

    def _denoise(self, order: Order, carried: Carried) -> Carried:
        """Through the blocks here, head and refiner: from latents and tokens to the clean latent."""
        count = latents_carried(self.model.config.transformer)
        latents, rest = carried[:count], list(carried[count:])
        # Where there is one it is the one that is needed, and the other name is not used.
        noisy, source = latents[0], latents[-1]
        transformer, config = self.model.transformer, self.model.config.transformer
        blocks, tail = self._own(self.chain.blocks), self._own(self.chain.tail)
        if not blocks and not tail:
            return carried
        device, prompt = noisy.device, self._prompts[order.prompt]
        timestep_B = torch.tensor([order.timestep], dtype=torch.float64).to(device)
        time_BE = transformer.time(timestep_B, prompt.pooled, noisy.dtype)
        if blocks:
            began = time.perf_counter()
            self.pool.held[order.row] = torch.tensor(order.held).to(device)
            view = self.pool.view([CacheRow(order.row, order.seen)], torch.tensor([list(order.slots)]).to(device))
            rest = [transformer.through(rest[0], time_BE, prompt, view, self.layers)]
            each_s = (time.perf_counter() - began) / len(blocks)
            for unit in blocks:
                order.unit_s[unit] = each_s
        if tail:
            film, grid = transformer.film(time_BE, order.frames), transformer.grid(noisy)
            condition = source if config.condition_channels else None
            for unit in tail:
                began = time.perf_counter()
                part = unit - self.chain.tail.start
                rest = list(transformer.tail(part, tuple(rest), time_BE, film, grid, condition))
                order.unit_s[unit] = time.perf_counter() - began
        if not self.ends(Kind.PASS):
            return *latents, *rest
        sigma = torch.tensor([order.sigma], dtype=torch.float64).to(device)
        strength = torch.tensor([order.strength]).to(device)
        return (predict_clean(config.prediction, rest[0], noisy, source, sigma, strength),)

    def _hold(self, arrived: Mapping[int, Sequence[Tensor]]) -> None:
        """Hold what the units here keep of streams from now on."""
        first = self.chain.blocks.start
        self.pool.hold(
            self.layers, {unit - first: kept[0] for unit, kept in arrived.items() if unit in self.chain.blocks}
        )
        before, self._memories = self._memories, {}
        for unit in (*self._own(self.chain.encode), *self._own(self.chain.decode)):
            if unit in arrived:
                rows, slots = iter(arrived[unit]), self._parts[unit].slots
                memories = [tuple(itertools.islice(rows, slots)) for _ in range(self._streams)]
                # A stream that has not begun has none.
                self._memories[unit] = [memory if all(x.numel() for x in memory) else () for memory in memories]
            else:
                self._memories[unit] = before.get(unit, [()] * self._streams)

    def _kept(self, unit: int) -> int:
        """How many tensors a unit keeps, of all streams together."""
        if unit in self.chain.blocks:
            return 1
        return self._streams * self._parts[unit].slots if unit in self._parts else 0

    def _pack(self, unit: int) -> tuple[Tensor, Tensor]:
        """What a unit keeps, on the host: shapes of its tensors, and their values in one row."""
        if unit in self.chain.blocks:
            tensors = [self.pool.block(unit - self.chain.blocks.start)]
        else:
            nothing = torch.empty(0, dtype=self.model.dtype)
            slots = self._parts[unit].slots
            tensors = [x for memory in self._memories[unit] for x in memory or (nothing,) * slots]
        shapes = torch.zeros(len(tensors), MOVED_AXES, dtype=torch.int64)
        for place, tensor in enumerate(tensors):
            shapes[place, : tensor.dim()] = torch.tensor(tensor.shape)
        return shapes.flatten(), torch.cat([tensor.cpu().reshape(-1) for tensor in tensors])

    def _unpack(self, unit: int, donor: int, group: dist.ProcessGroup | None) -> list[Tensor]:
        """What another rank packed."""
        shapes = torch.empty(self._kept(unit) * MOVED_AXES, dtype=torch.int64)
        _finish(dist.irecv(shapes, donor, group))
        sizes = [[length for length in shape if length] or [0] for shape in shapes.view(-1, MOVED_AXES).tolist()]
        values = torch.empty(sum(map(math.prod, sizes)), dtype=self.model.dtype)
        if values.numel():
            _finish(dist.irecv(values, donor, group))
        parts = torch.split(values.to(self.model.device), [math.prod(size) for size in sizes])
        # Each in memory of its own: a view would keep all of them.
        return [part.view(size).clone() for part, size in zip(parts, sizes, strict=True)]


def _finish(work: dist.Work | None) -> None:
    if work is not None:
        work.wait(timedelta(seconds=MOVE_TIMEOUT_S))


def _owners(bounds: Sequence[int]) -> list[int]:
    return [rank for rank, (begin, end) in enumerate(itertools.pairwise(bounds)) for _ in range(begin, end)]


def serve(stage: Stage, layout: Layout, inbox: Inbox, onward: Outbox | None, back: Outbox, group: Any) -> None:
    """A rank after the first: follow rank 0 until it says stop. Raises PeerGone.

    Args:
        onward: to the next rank, where there is one. back: to rank 0. group: for what moves.
    """

    def send_on(order: Order, tensors: Sequence[Tensor] = ()) -> None:
        if onward is not None:
            onward.send(order.write(layout), tensors)

    def answer(order: Order, tensor: Tensor) -> None:
        back.send(order.write(layout), [tensor])

    ends = [end.traffic for end in (inbox, onward, back) if end is not None]
    told = Traffic()
    while True:
        message = inbox.receive()
        order = Order.read(message.words, layout)
        stage.follow(order.changes)
        if order.kind in (Kind.ENCODE, Kind.PASS, Kind.SHOW):
            spent = sum(ends, Traffic())
            order.wire_s[stage.rank], order.wire_bytes[stage.rank] = spent.since(told)
            told = spent
            stage.work(order, tuple(message.tensors), send_on, answer)
            continue
        send_on(order, message.tensors)
        if order.kind == Kind.TEXT:
            stage.learn(order.prompt, *message.tensors)
        elif order.kind == Kind.PLAN:
            stage.move(order.bounds, order.epoch, group)
        elif order.kind == Kind.STOP:
            for outbox in (onward, back):
                if outbox is not None:
                    outbox.flush()
            return
