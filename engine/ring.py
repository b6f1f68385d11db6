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
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from engine.api import EngineError, StreamParams
from engine.flow_match import add_noise, stacked
from engine.kv_cache import CacheRow
from engine.pipeline import Mode, Pipeline, Rendered
from engine.ring_orders import CHANGES, Change, Kind, Layout, Order
from engine.ring_pace import Pace
from engine.ring_stage import Stage, StagePool
from engine.session import Item, NoiseSource, PassInput, SessionState
from engine.transport import Outbox
from engine.wan.transformer import PromptContext
from engine.wan.weights import Model

PASSES_PER_RANK = 2


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
        self._pace = Pace(self.ranks, model.config.transformer.layers) if balance and self.ranks > 1 else None
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
