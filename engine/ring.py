"""One model spread over several ranks, in a ring: each holds a run of its units, and passes follow each other.

Rank 0 takes frames in and schedules. A chunk goes along the parts that encode, and its source comes back; then along
blocks and refiner once a step, and each time the clean latent comes back; then along the parts that decode, and its
frames come back (`engine.chain`). Each comes back from the rank where its way ends, whichever that is. So steps and
units are both spread: up to two passes a rank are under way, of many streams or of the successive chunks of one.

A pass holds one row. The public ring sends the rows of all steps of a stream together, every micro-step: a chunk then
takes n x W micro-steps of n rows. One row at a time costs n x W micro-steps of one row, an n-th of the latency at the
same throughput, where a row alone fills the device (a frame at 480p does). It also makes a result independent of what
else is under way: W ranks give bit for bit what one gives.

Rank 0 keeps the slots of the KV cache and sends with each pass those that matter; keys and values of a block, and what
the autoencoder remembers, lie on the rank that holds the unit. Everything reaches a rank in the order rank 0 sent it,
on one wire: emptied and copied rows, new prompts and a new plan (epoch) included. So streams come, change and go with
no drain.

Axes in names: B rows, T latent frames, C channels, H and W rows and columns, N tokens, E model width.
"""

import itertools
import time
from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from engine.api import EngineError, StreamParams
from engine.chain import Chain, latents_carried
from engine.flow_match import add_noise, stacked
from engine.kv_cache import CacheRow
from engine.pipeline import Mode, Pipeline
from engine.ring_flow import Chunk, Done, Due, Encoding, Flow, Pass
from engine.ring_orders import CHANGES, Change, Kind, Layout, Order
from engine.ring_pace import HOME, Pace
from engine.ring_stage import Stage, StagePool
from engine.session import Item, NoiseSource, PassInput, SessionState
from engine.transport import Outbox, Traffic
from engine.wan.transformer import PromptContext
from engine.wan.weights import Model

PASSES_PER_RANK = 2
# As many of the last measurements are kept.
TIMES = 64


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
        chain: Chain,
        *,
        streams: int,
        mode: Mode = "batch",
        raw: bool = False,
        balance: bool = False,
        capacity_bytes: Sequence[float] | None = None,
        onward: Outbox | None = None,
        group: dist.ProcessGroup | None = None,
        pool_type: type[StagePool] = StagePool,
    ) -> None:
        """Prepare rank 0.

        Args:
            bounds: first unit of every rank, and the end; chain: what they are bounds of.
            raw: results are pixels and latents, see `Done`.
            balance: move units by measured times, see `Pace`; capacity_bytes: of each rank for what they keep.
            onward: to rank 1, where there is one. group: for units that move.
        """
        super().__init__(model, width, height, streams=streams, mode=mode, pool_type=pool_type)
        assert isinstance(self.pool, StagePool)
        self.ring_pool = self.pool
        self.stage = Stage(model, self.pool, 0, bounds, streams, chain)
        self.ranks, self.chain = len(bounds) - 1, chain
        self.layout = Layout(self.ranks, self.pool.window, chain.units)
        self.flows: dict[str, Flow] = {}
        self.done: deque[Done] = deque()
        self.failed: deque[tuple[str, EngineError]] = deque()
        self.passes = 0
        # Of the last passes and chunks: what every rank took for a pass, every unit when it ran, and rank 0 beside them
        # to lay a chunk out and to finish it.
        self.times: deque[list[float]] = deque(maxlen=TIMES)
        self.unit_times: list[deque[float]] = [deque(maxlen=TIMES) for _ in range(chain.units)]
        self.home_times: deque[float] = deque(maxlen=TIMES)
        # What the others have spent on messages so far, and their bytes; rank 0's ends know their own.
        self.wire_s, self.wire_bytes = [0.0] * self.ranks, [0.0] * self.ranks
        self._raw, self._onward, self._group = raw, onward, group
        self._limit = PASSES_PER_RANK * self.ranks
        self._pace = Pace(self.ranks, chain, capacity_bytes) if balance and self.ranks > 1 else None
        self._encoding: Due[Encoding] = Due()
        self._under_way: Due[Pass] = Due()
        self._ready: deque[Pass] = deque()
        self._showing: Due[Pass] = Due()
        self._pixels: Tensor | None = None
        self._layout_s = 0.0
        self._slots = list(range(streams))[::-1]
        self._contexts: list[PromptContext | None] = [None] * (2 * streams + 2 * self._limit + 2)

    @property
    def busy(self) -> bool:
        """Whether an answer from another rank is due."""
        return bool(self._encoding or self._under_way or self._showing)

    @property
    def has_room(self) -> bool:
        """Whether a new chunk could go in now: those between their steps come first."""
        return len(self._encoding) + len(self._under_way) + len(self._ready) < self._limit

    @property
    def traffic(self) -> Traffic:
        """What rank 0 has spent on sending."""
        return Traffic() if self._onward is None else self._onward.traffic

    def takes(self, key: str) -> bool:
        """Whether the stream has no chunk here that waits for another of its own; where several ranks encode, as many
        may be there as keep them busy."""
        flow = self.flows[key]
        return flow.alone is None and flow.held is None and len(flow.waiting) < max(1, self._encoding_ranks)

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
        self.flows[key].waiting.append(Chunk(frames))

    def update(self, key: str, params: StreamParams) -> None:
        """Change a stream from the next chunk it is given. Raises ValueError for what the model cannot follow."""
        self.plan(params)
        self.flows[key].waiting.append(params)

    @torch.inference_mode()
    def restart(self, key: str) -> list[int]:
        """`Pipeline.reset` for a stream of the ring: returns the chunks that are lost."""
        flow = self.flows[key]
        lost = [] if flow.alone is None else [flow.alone.chunk]
        lost += [] if flow.held is None else [flow.held[0].chunk]
        lost += self.reset(flow.state)
        flow.generation += 1
        flow.alone = flow.held = None
        flow.fresh = True
        for chunk in flow.waiting:
            if isinstance(chunk, Chunk):
                # It is encoded again, as the first of a stream.
                chunk.pixels = chunk.source = None
        self._forget(flow.slot)
        return lost

    # --- the ring

    @torch.inference_mode()
    def fill(self) -> None:
        """Send what can be sent: first chunks under way, oldest first; then new ones, stream by stream."""
        while True:
            self._take_answers()
            if len(self._encoding) + len(self._under_way) >= self._limit:
                return
            if self._ready:
                job = self._ready.popleft()
                if not job.stale:
                    self._issue(job.flow, job.item, job.spent_s)
            elif not self._enter_one() and not self._encode_ahead():
                return

    def take(self, words: Sequence[float], tensors: Sequence[Tensor]) -> None:
        """What came back on a wire; it is seen to in the next `fill`."""
        self._answer(Order.read(words, self.layout), tensors[0])

    @torch.inference_mode()
    def move(self, bounds: Sequence[int]) -> None:
        """Go over to another plan while passes are under way. Raises ValueError for bounds that are no plan."""
        self.chain.check(bounds, self.ranks)
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
        """The frames that were made of it."""
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
            chunk = flow.waiting[0]
            assert isinstance(chunk, Chunk)  # parameters have been taken up
            if state.prompts.context is None:
                flow.waiting.popleft()
                flow.advanced = False
                self.done.append(Done(flow.key, state.chunks, None, None, None))
                self._count(state, chunk.frames.shape[0])
                return True
            if chunk.pixels is None:
                return self._encode(flow, chunk)
            if chunk.source is None:
                return False
            assert chunk.vae is not None  # it was encoded
            flow.waiting.popleft()
            flow.advanced = False
            began = time.perf_counter()
            item = self._lay_out(state, chunk.pixels, chunk.source, chunk.vae, changes=chunk.changes)
            self._layout_s = time.perf_counter() - began
            item.rows = self.ring_pool.rows_of_steps(item.rows)
            if item.pipelined:
                state.in_flight.append(item)
                self.batch.begin(item)
                self._issue(flow, item, chunk.spent_s)
                return True
            flow.held = item, chunk.spent_s
        # Chunks of one step use one row, and every rank does them in their order: they may follow each other.
        item, spent_s = flow.held
        single = item.schedule.steps == 1
        if state.in_flight and not (single and all(other.schedule.steps == 1 for other in state.in_flight)):
            return False
        if not state.in_flight:
            self._settle(state)
        flow.held = None
        self.batch.begin(item)
        if item.done:
            self._issue_shown(flow, item, spent_s)
            return True
        if single:
            state.in_flight.append(item)
        else:
            flow.alone = item
        self._issue(flow, item, spent_s)
        return True

    @property
    def _encoding_ranks(self) -> int:
        """How many ranks have a part in encoding."""
        return sum(begin < self.chain.encode.stop for begin in self.stage.bounds[:-1])

    def _encode(self, flow: Flow, chunk: Chunk) -> bool:
        """Send a chunk to be encoded; a light VAE beside the model's is not laid over the ranks, and does it here.

        Returns: False where it must wait: at a change memories begin anew, once nothing needs the old ones.
        """
        state, vae = flow.state, self._vae(flow.state.params)
        if state.encoding is not None and state.encoding is not vae and self._has_under_way(flow):
            return False
        began = time.perf_counter()
        chunk.vae, chunk.changes = vae, self._turn_to(state, vae)
        if chunk.changes:
            self._forget(flow.slot)
            flow.fresh, state.decoding = True, None
        chunk.pixels = self._as_pixels(chunk.frames)
        if vae is not self.model.vae:
            chunk.source = self._encode_by(vae, state, chunk.pixels)
            chunk.spent_s = [time.perf_counter() - began] + [0.0] * (self.ranks - 1)
            return True
        whole = self._whole(chunk.pixels, fresh=flow.fresh)
        flow.fresh = False
        order = self._coding(Kind.ENCODE, flow)
        order.number = self._encoding.ask(Encoding(flow, chunk, flow.generation))
        self._begin(order, (whole,))
        return True

    def _has_under_way(self, flow: Flow) -> bool:
        """Whether anything of a stream is encoded, denoised or shown now."""
        jobs = (*self._encoding, *self._under_way, *self._ready, *self._showing)
        return bool(flow.state.in_flight) or any(job.flow is flow for job in jobs)

    def _encode_ahead(self) -> bool:
        """Where several ranks encode, send a chunk before its turn; returns whether there was one."""
        for flow in self.flows.values():
            waiting = sum(job.flow is flow for job in self._encoding)
            # Before its first prompt nothing of a stream is encoded.
            known = flow.state.prompts.context is not None
            if known and 0 < waiting < self._encoding_ranks and (chunk := flow.unsent):
                return self._encode(flow, chunk)
        return False

    def _coding(self, kind: Kind, flow: Flow) -> Order:
        return Order(
            kind,
            self.stage.epoch,
            stream=flow.slot,
            rank_s=[0.0] * self.ranks,
            unit_s=[0.0] * self.chain.units,
            wire_s=[0.0] * self.ranks,
            wire_bytes=[0.0] * self.ranks,
        )

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
        job = Pass(flow, item, flow.generation, PassInput(noisy, item.source, timestep_B), spent_s)
        order.number = self._under_way.ask(job)
        if step + 1 == schedule.steps and item.vae is self.model.vae:
            order.show, order.show_number = item.frames, self._showing.ask(job)
        self._run(order, noisy, item.source)

    def _issue_shown(self, flow: Flow, item: Item, spent_s: list[float]) -> None:
        """Send a chunk that has no steps to be decoded."""
        if item.vae is not self.model.vae:
            self._show_here(Pass(flow, item, flow.generation, None, spent_s))
            return
        latent = self.model.vae.normalise(item.clean) if self.sampling.latents == "raw" else item.clean
        order = self._coding(Kind.SHOW, flow)
        order.show = item.frames
        order.number = self._showing.ask(Pass(flow, item, flow.generation, None, spent_s))
        self._begin(order, (latent,))

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
            unit_s=[0.0] * self.chain.units,
            wire_s=[0.0] * self.ranks,
            wire_bytes=[0.0] * self.ranks,
        )

    def _run(self, order: Order, noisy: Tensor, source: Tensor) -> None:
        """Begin a pass: rank 0 makes tokens of latents, then its share is as that of any rank."""
        self.passes += 1
        transformer = self.model.transformer
        x_BNE = transformer.enter(noisy, source if transformer.config.condition_channels else None)
        latents = (source,) if transformer.config.prediction == "source_residual" else (noisy, source)
        self._begin(order, (*latents[: latents_carried(transformer.config)], x_BNE))

    def _begin(self, order: Order, carried: tuple[Tensor, ...]) -> None:
        """Rank 0's share of what goes along a section of the chain."""
        self.stage.work(order, carried, self._send, self._answer)
        if len(self.ring_pool.changes) >= CHANGES:
            # What ended here took no changes along.
            self._send(Order(Kind.NOTE, epoch=self.stage.epoch))

    # --- answers

    def _answer(self, order: Order, tensor: Tensor) -> None:
        _add(self.wire_s, order.wire_s)
        _add(self.wire_bytes, order.wire_bytes)
        due: dict[Kind, Due[Any]] = {
            Kind.ENCODE: self._encoding,
            Kind.PASS: self._under_way,
            Kind.SHOW: self._showing,
        }
        due[order.kind].answer(order, tensor)

    def _take_answers(self) -> None:
        """See to what came back; to frames behind their clean latent, which may come later from another rank."""
        while encoded := self._encoding.take():
            self._encoded_one(*encoded)
        while passed := self._under_way.take():
            self._passed_one(*passed)
        while (job := self._showing.first) and (job.stale or job.item.done) and (shown := self._showing.take()):
            self._shown_one(*shown)

    def _encoded_one(self, job: Encoding, order: Order, source: Tensor) -> None:
        self._note(order, self.chain.encode)
        if job.generation == job.flow.generation:
            job.chunk.source, job.chunk.spent_s = source, list(order.rank_s)

    def _passed_one(self, job: Pass, order: Order, clean: Tensor) -> None:
        self.times.append(order.rank_s)
        flow, item, state = job.flow, job.item, job.flow.state
        _add(job.spent_s, order.rank_s)
        self._note(order, range(self.chain.blocks.start, self.chain.tail.stop), item.schedule.steps)
        self._balance(order)
        if job.stale:
            return
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
            assert state.in_flight[0] is item  # answers are taken in order
            state.in_flight.popleft()
        if item.vae is not self.model.vae:
            self._show_here(job)

    def _show_here(self, job: Pass) -> None:
        """Decode a chunk by a VAE that is not laid over the ranks."""
        began = time.perf_counter()
        pixels = super().decode(job.item)
        job.spent_s[0] += time.perf_counter() - began
        self._show(job, pixels)

    def _shown_one(self, job: Pass, order: Order, pixels: Tensor) -> None:
        self._note(order, self.chain.decode)
        if job.stale:
            return
        _add(job.spent_s, order.rank_s)
        self._show(job, pixels)

    def _show(self, job: Pass, pixels: Tensor) -> None:
        item, key = job.item, job.flow.key
        began, home_s, rendered = time.perf_counter(), self._layout_s, None
        if not self._raw:
            self._pixels = pixels
            rendered = self._finish(item)
            home_s += time.perf_counter() - began
        self.home_times.append(home_s)
        if self._pace is not None:
            self._pace.note(0, HOME, home_s)
        job.spent_s[0] += home_s
        if self._raw:
            self.done.append(Done(key, item.chunk, None, item, pixels))
        else:
            self.done.append(Done(key, item.chunk, rendered, item, None, max(job.spent_s)))

    def _note(self, order: Order, units: range, times: int = 1) -> None:
        """What the units of a section took; a chunk takes blocks and refiner once a step."""
        for rank, (begin, end) in enumerate(itertools.pairwise(self.stage.bounds)):
            for unit in range(max(begin, units.start), min(end, units.stop)):
                self.unit_times[unit].append(order.unit_s[unit])
                if self._pace is not None and order.epoch == self.stage.epoch:
                    self._pace.note(rank, self.chain.kinds[unit], order.unit_s[unit] * times)

    def _balance(self, order: Order) -> None:
        """Move units when that pays."""
        if self._pace is None or order.epoch != self.stage.epoch:
            return
        bounds = self._pace.close(self.stage.bounds)
        if bounds is not None:
            self.move(bounds)

    def _contextualise(self, states_LK: Tensor, mean_K: Tensor) -> PromptContext:
        """See `Pipeline`; every rank learns the text."""
        used = [flow.state.prompts.context for flow in self.flows.values()]
        used += [job.item.prompt for job in (*self._under_way, *self._ready)]
        used += [flow.held[0].prompt for flow in self.flows.values() if flow.held is not None]
        used += [flow.alone.prompt for flow in self.flows.values() if flow.alone is not None]
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


def _add(total: list[float], more: Sequence[float]) -> None:
    for place, value in enumerate(more):
        total[place] += value
