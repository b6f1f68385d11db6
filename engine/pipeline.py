"""Frames of chunks through VAE encode, denoise and VAE decode, as plain calls.

Axes in names: B batch, T frames, C channels, H and W rows and columns.
"""

import weakref
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.api import StreamParams, Understood
from engine.attention import attention_for
from engine.config import CacheConfig, SamplingConfig
from engine.cost_model import Work
from engine.denoise import StreamBatch
from engine.flow_match import ChunkSchedule, SamplingPlan, sampling_plan
from engine.kv_cache import KVPool
from engine.lanes import Lanes
from engine.noise_control import MotionState, next_level, remember
from engine.prompts import PromptState
from engine.scaling import enlarge, shrink
from engine.session import FixedNoise, FreshNoise, Item, NoiseSource, SessionState
from engine.steady import Watcher, steady
from engine.wan.grade import apply, scaled
from engine.wan.transformer import PromptContext
from engine.wan.vae import FRAMES_PER_LATENT, PIXELS_PER_LATENT, VAEState
from engine.wan.weights import VAE, Model

Mode = Literal["sequential", "batch"]
# The last are two chunks as one.
CHUNK_LENGTHS = (1, FRAMES_PER_LATENT, 1 + FRAMES_PER_LATENT, 2 * FRAMES_PER_LATENT)
# Figures are taken on every fourth pixel each way.
FIGURE_STRIDE = 4
DEFAULT_STREAMS = 16


@dataclass(frozen=True)
class Rendered:
    """One chunk that is done.

    frames: [T, H, W, 3] uint8 on the model's device, of the size that went in; None when there was no prompt to render
        it with yet.
    figures: what `engine.health` judges by, float32, on the model's device.
    understood: see `RenderedChunk`.
    """

    state: SessionState
    chunk: int
    revision: int
    frames: Tensor | None
    figures: Tensor | None
    understood: tuple[Understood, ...] = ()


class Pipeline:
    """A model at one frame size. Any number of sessions may take turns on it; none leaves a trace in it."""

    def __init__(
        self,
        model: Model,
        width: int,
        height: int,
        *,
        streams: int = DEFAULT_STREAMS,
        mode: Mode = "sequential",
        attention: Literal["auto", "sdpa", "flex", "varlen"] = "auto",
        compile_pass: bool = False,
        sampling: SamplingConfig | None = None,
        cache: CacheConfig | None = None,
        frame_size: tuple[int, int] | None = None,
        lanes: Lanes | None = None,
        pool_type: type[KVPool] = KVPool,
    ) -> None:
        """Prepare for frames of width x height pixels.

        Args:
            streams: sessions to allocate cache for.
            mode: whether a chunk takes its steps one after another, or together with those of the chunks before it.
            compile_pass: see `engine.denoise.StreamBatch`.
            sampling, cache: in place of what the model's configuration says.
            frame_size: width and height of the frames in and out, where they are scaled to be rendered.
            lanes: of another pipeline of the same model, whose passes and these then come in order.
            pool_type: for comparisons with other caches.

        Raises: ValueError, if the size is not a multiple of the VAE's stride times the transformer's patch.
        """
        transformer = model.config.transformer
        _, rows, columns = transformer.patch
        for name, value, patch in (("width", width, columns), ("height", height, rows)):
            if value < 1 or value % (PIXELS_PER_LATENT * patch):
                raise ValueError(f"{name} {value} must be a positive multiple of {PIXELS_PER_LATENT * patch}")
        self.model = model
        self.width, self.height, self.mode = width, height, mode
        self.frame_size = frame_size or (width, height)
        self.sampling = sampling or model.config.sampling
        self.max_steps = 4 if self.sampling.timesteps is None else len(self.sampling.timesteps)
        self._rows_per_stream = self.max_steps if mode == "batch" else 1
        self._latent = (transformer.latent_channels, height // PIXELS_PER_LATENT, width // PIXELS_PER_LATENT)
        self._steady = model.config.steady
        self._carried = {style.id: style.carried for style in model.styles.styles}
        self._starts_alone = model.config.serving.first_chunk_frames > 1
        pool = pool_type(
            transformer,
            (self._latent[1] // rows, self._latent[2] // columns),
            streams * self._rows_per_stream,
            cache=cache or model.config.cache,
            device=model.device,
            dtype=model.dtype,
            attend=attention_for(attention, model.device, model.dtype),
        )
        self.pool = pool
        self.batch = StreamBatch(model.transformer, pool, compile_pass=compile_pass)
        self.lanes = lanes or Lanes(model.device)
        self._encoded = self._decoded = self._light = self._forwards = self._rows = self._context = 0

    @property
    def scaled(self) -> bool:
        """Whether frames are rendered at another size than they have."""
        return self.frame_size != (self.width, self.height)

    @property
    def work(self) -> Work | None:
        """What the last `tick` consisted of; None where it went out of its usual way, so that its time tells nothing.

        That is when chunks went in or out without the other: as a batch of steps fills, is emptied or waits for text;
        and when chunks of both VAEs went together.
        """
        if not self._encoded or self._encoded != self._decoded or self._light not in (0, self._encoded + self._decoded):
            return None
        return Work(self._encoded, self._forwards, self._rows, self._context, self.scaled, self._light > 0)

    # --- streams

    @torch.inference_mode()
    def open(self, params: StreamParams, noise: NoiseSource | None = None) -> SessionState:
        """A fresh stream: leases its cache rows and draws its noise. Close it to give the rows back.

        Raises: MemoryError when every row is leased; ValueError for parameters that the model cannot follow.
        """
        with self.lanes.aside():
            state = SessionState(
                params=params,
                plan=self.plan(params),
                rows=self.pool.lease(self._rows_per_stream),
                prompts=PromptState(params.prompts),
                noise=noise or self._noise(params.seed),
                history=deque(maxlen=self.pool.window),
            )
        # A state that is dropped gives its rows back too.
        state.lease = weakref.finalize(state, self.pool.release, state.rows)
        return state

    def close(self, state: SessionState) -> None:
        """Give a stream's cache rows back. Idempotent."""
        if state.lease is not None:
            state.lease()

    @torch.inference_mode()
    def set_params(self, state: SessionState, params: StreamParams, revision: int = 0) -> None:
        """Change a stream between two chunks; cache and VAE memories stay, so the picture goes on.

        Raises: ValueError for parameters that the model cannot follow; the stream then stays as it was.
        """
        with self.lanes.aside():
            if (params.steps, params.strength) != (state.params.steps, state.params.strength):
                state.plan = self.plan(params)
            if params.seed != state.params.seed:
                state.noise = self._noise(params.seed)
        state.prompts.want(params.prompts, params.transition_chunks)
        state.health.relearn()
        state.params = params
        state.pending_revision = revision

    @torch.inference_mode()
    def adopt(
        self, state: SessionState, params: StreamParams, revision: int = 0, noise: NoiseSource | None = None
    ) -> SessionState:
        """A stream of another pipeline of the same model goes on here, with other parameters.

        Its prompts, its count of chunks and what has not been shown yet come along; its picture begins anew. Close the
        old state when this has returned.

        Raises: MemoryError when every row is leased; ValueError for parameters that the model cannot follow. The
            stream then stays as it was.
        """
        adopted = self.open(params, noise)
        adopted.prompts = state.prompts
        adopted.prompts.want(params.prompts, params.transition_chunks)
        adopted.chunks, adopted.frames = state.chunks, state.frames
        adopted.revision, adopted.pending_revision = state.revision, revision
        return adopted

    @torch.inference_mode()
    def reanchor(self, state: SessionState) -> None:
        """Begin the cache anew: the next frames become its sinks. The picture goes on in the VAE's memories."""
        with self.lanes.aside():
            for row in state.rows:
                self.pool.clear(row)
        state.history.clear()
        state.primed = 0

    def reset(self, state: SessionState) -> list[int]:
        """Begin the whole model state of a stream anew; its prompt stays.

        Returns: chunks that were between their steps, which are lost.
        """
        self.reanchor(state)
        lost = [item.chunk for item in state.in_flight]
        state.in_flight.clear()
        state.encoder, state.decoder, state.motion = VAEState(), VAEState(), MotionState()
        state.shown, state.watcher, state.steadied = None, Watcher(), None
        return lost

    # --- chunks

    def render(self, state: SessionState, frames: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Restyle one chunk of one stream in sequential mode.

        Args:
            frames: [T, H, W, 3] RGB of `frame_size`, T 4, 1, 5 or 8. A chunk that the VAE cannot take whole is shown to
                the model with its first frame repeated before it.

        Returns: an array of its own with the same shape.
        Raises: ValueError for any other shape or dtype.
        """
        (rendered,) = self.tick([(state, self.upload(frames))])
        assert rendered.frames is not None  # tests and tools have their text encoder at hand
        return rendered.frames.cpu().numpy()

    def upload(self, frames: NDArray[np.uint8]) -> Tensor:
        """Frames on the model's device; checks them. Raises ValueError, naming the shape that is taken."""
        width, height = self.frame_size
        size = (height, width, 3)
        if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[1:] != size or len(frames) not in CHUNK_LENGTHS:
            raise ValueError(
                f"frames {frames.dtype} {frames.shape} must be uint8 [T, {height}, {width}, 3], T 1, 4, 5 or 8"
            )
        return self.lanes.upload(frames)

    @torch.inference_mode()
    def tick(self, jobs: Sequence[tuple[SessionState, Tensor]]) -> list[Rendered]:
        """Take one chunk of each of some streams in and go on by one pass, without a read back to the host.

        Args:
            jobs: streams, each once, with uint8 frames [T, H, W, 3] on the model's device.

        Returns: chunks that are done, in each stream's order. Sequential: those given. In batch mode a chunk of n
            steps is returned n - 1 chunks later, or earlier when the number of steps changes.
        """
        results: list[Rendered] = []
        items = []
        self._encoded = self._decoded = self._light = self._forwards = self._rows = self._context = 0
        for state, frames_THWC in jobs:
            results += [self._finish(item) for item in self.advance_prompts(state)]
            if state.prompts.context is None:
                results.append(Rendered(state, state.chunks, state.revision, None, None))
                self._count(state, frames_THWC.shape[0])
                continue
            with self.lanes.encode():
                plain = self._plain and not self.scaled
                pixels = frames_THWC.permute(0, 3, 1, 2).to(self.model.dtype if plain else torch.float32)
                pixels_TCHW = pixels.contiguous().mul_(1 / 127.5).sub_(1)
                items.append(self.take_in(state, self.shrunk(pixels_TCHW)))
        results += [self._finish(item) for item in self.denoise(items)]
        return results

    def shrunk(self, pixels_TCHW: Tensor) -> Tensor:
        """A chunk's pixels at the size it is rendered at."""
        if not self.scaled:
            return pixels_TCHW
        return shrink(pixels_TCHW, (self.width, self.height), self.model.dtype if self._plain else torch.float32)

    @property
    def _plain(self) -> bool:
        """Whether pixels are wanted in the model's dtype alone."""
        return self.sampling.motion is None and self._steady is None

    def take_in(self, state: SessionState, pixels_TCHW: Tensor) -> Item:
        """Encode a chunk and lay out its steps.

        Args:
            pixels_TCHW: in [-1, 1]; float32 where motion is measured on them, so that it is exact.
        """
        vae = self._vae(state.params)
        changes = self._turn_to(state, vae)
        source = self._encode_by(vae, state, pixels_TCHW)
        return self._lay_out(state, pixels_TCHW, source, vae, changes=changes)

    def _turn_to(self, state: SessionState, vae: VAE) -> bool:
        """Have the stream's next chunk encoded by a VAE; returns whether the one before was by another."""
        before = state.encoding
        if before is not vae:
            # The cache goes on: both VAEs make the same latents. Only their memories are of their own kind.
            state.encoding, state.encoder = vae, VAEState()
        return before is not None and before is not vae

    def _encode_by(self, vae: VAE, state: SessionState, pixels_TCHW: Tensor) -> Tensor:
        whole = self._whole(pixels_TCHW, fresh=not state.encoder.memory)
        source, state.encoder = vae.encode(whole, state.encoder)
        return source

    def _whole(self, pixels_TCHW: Tensor, *, fresh: bool) -> Tensor:
        """What the VAE is given for a chunk [1, T, 3, H, W]: as many frames as it takes, at the start or later."""
        first = 1 if self._starts_alone and fresh else 0
        missing = (first - pixels_TCHW.shape[0]) % FRAMES_PER_LATENT
        start = pixels_TCHW[:1].expand(missing, -1, -1, -1)
        whole = pixels_TCHW if not missing else torch.cat((start, pixels_TCHW))
        return whole[None].to(self.model.dtype)

    def _lay_out(
        self, state: SessionState, pixels_TCHW: Tensor, source: Tensor, vae: VAE, *, changes: bool = False
    ) -> Item:
        """The steps of a chunk, given its raw latent. changes: whether the one before was encoded by another VAE."""
        context, count = state.prompts.context, pixels_TCHW.shape[0]
        assert context is not None  # `tick` has seen to it
        if self.sampling.latents == "normalised":
            source = vae.normalise(source)
        camera = self._camera_figures(state, pixels_TCHW)
        carried = self._share_carried(state)
        motion = None
        if self._steady is not None:
            motion = state.watcher.watch(pixels_TCHW, self._steady, wanted=carried > 0)
        schedule = self._schedule(state, pixels_TCHW, source)
        # The first chunk by another VAE is of two latent frames, as a stream's first is, and goes alone as that does.
        together = self._runs_together(state, schedule.steps) and not changes
        rows = state.rows[: schedule.steps] if together else state.rows[:1] * schedule.steps
        item = Item(
            state=state,
            chunk=state.chunks,
            frames=count,
            revision=state.revision,
            source=source,
            clean=source,
            schedule=schedule,
            prompt=context,
            noise=state.noise,
            rows=rows,
            pipelined=together,
            camera=camera,
            grade=self._grade(state),
            understood=state.prompts.understood,
            motion=motion,
            carried=carried,
            vae=vae,
        )
        self._count(state, count)
        self._encoded += source.shape[1]
        self._light += source.shape[1] * (vae is self.model.light_vae)
        return item

    def denoise(self, items: Sequence[Item]) -> list[Item]:
        """Go on by one pass with all that is in flight for the streams of these items; returns those done."""
        finished: list[Item] = []
        alone: list[Item] = []
        together: list[Item] = []
        with self.lanes.denoise(tensor for item in items for tensor in (item.source, *item.schedule.tensors())):
            for item in items:
                flight = item.state.in_flight
                if item.pipelined:
                    flight.append(item)
                    together += flight
                else:
                    finished += self.drain(item.state)
                    alone.append(item)
                self.batch.begin(item)
            for group in _by_length(together):
                self._step(group)
            while running := [item for item in alone if not item.done]:
                for group in _by_length(running):
                    self._step(group)
            for item in items:
                if not item.pipelined:
                    self._prime(item)
                    finished.append(item)
                flight = item.state.in_flight
                while flight and flight[0].done:
                    finished.append(flight.popleft())
        return finished

    def drain(self, state: SessionState) -> list[Item]:
        """Finish every chunk in flight of a stream without taking a new one in; returns them."""
        finished = []
        while state.in_flight:
            for group in _by_length(state.in_flight):
                self._step(group)
            while state.in_flight and state.in_flight[0].done:
                finished.append(state.in_flight.popleft())
        if state.primed > 1:
            self.pool.copy_row(state.rows[state.primed - 1], state.rows[0])
        state.primed = 0
        return finished

    def decode(self, item: Item) -> Tensor:
        """Frames [T, 3, H, W] of a chunk that is done, about [-1, 1], not clamped."""
        latent, state = item.clean, item.state
        vae = self.model.vae if item.vae is None else item.vae
        if not item.schedule.steps and self.sampling.latents == "raw":
            latent = vae.normalise(latent)
        if state.decoding is not vae:
            state.decoding, state.decoder = vae, VAEState()
        decoded_BTCHW, state.decoder = vae.decode(latent, state.decoder)
        return decoded_BTCHW[0, -item.frames :]

    # --- parts

    def _step(self, group: Sequence[Item]) -> None:
        rows = [item.rows[item.step] for item in group]
        self.batch.step(group)
        length = group[0].source.shape[1]
        self._forwards += 1
        self._rows += length * len(group)
        self._context += length * sum(min(row.seen, self.pool.window) for row in rows)

    def _finish(self, item: Item) -> Rendered:
        grade = item.grade
        self._decoded += item.clean.shape[1]
        self._light += item.clean.shape[1] * (item.vae is self.model.light_vae)
        with self.lanes.decode(item.clean, item.camera, *(() if grade is None else (grade,))):
            frames_TCHW = self._rest(item, self.decode(item))
            # Judged as the model made it: a night is no black picture.
            figures = self._figures(item, frames_TCHW)
            shown = frames_TCHW.clamp(-1, 1)
            if grade is not None:
                shown = apply(grade, shown.float()).clamp_(-1, 1)
            if self.scaled:
                shown = enlarge(shown, self.frame_size)
            frames_THWC = shown.add_(1).mul_(127.5).round_().to(torch.uint8).permute(0, 2, 3, 1).contiguous()
        return Rendered(item.state, item.chunk, item.revision, frames_THWC, figures, item.understood)

    def _rest(self, item: Item, frames_TCHW: Tensor) -> Tensor:
        """A chunk's frames, steadied where the model asks for it; another prompt's picture begins anew."""
        if self._steady is None:
            return frames_TCHW
        state, before = item.state, None
        if state.steadied is not None and state.steadied[0] is item.prompt:
            before = state.steadied[1]
        first = -item.frames % FRAMES_PER_LATENT
        frames_TCHW = steady(frames_TCHW, before, item.motion, item.carried, self._steady, first=first)
        state.steadied = item.prompt, frames_TCHW[-1]
        return frames_TCHW

    def _share_carried(self, state: SessionState) -> float:
        """How far a stream's pictures may be carried along: as far as every style in its prompts allows."""
        styles = [style for understood in state.prompts.understood for style, share in understood.styles if share > 0]
        return min((self._carried.get(style, 0.0) for style in styles), default=0.0) * state.params.strength

    def _grade(self, state: SessionState) -> Tensor | None:
        """What the prompts in force add to the picture, at the stream's strength, on the device; None: nothing."""
        wanted, strength = state.prompts.grade, state.params.strength
        if wanted is None or strength <= 0:
            return None
        if state.graded is None or state.graded[0] is not wanted or state.graded[1] != strength:
            with self.lanes.aside():
                state.graded = (wanted, strength, scaled(wanted, strength).to(self.model.device))
        return state.graded[2]

    def _count(self, state: SessionState, frames: int) -> None:
        state.chunks += 1
        state.frames += frames

    def _vae(self, params: StreamParams) -> VAE:
        """The VAE that the next chunk of a stream goes through."""
        light = self.model.light_vae
        return light if params.light and light is not None else self.model.vae

    def _runs_together(self, state: SessionState, steps: int) -> bool:
        """Whether a chunk joins those in flight: batch mode, and rows that are ready for as many steps."""
        return self.mode == "batch" and state.pipelined and steps > 1 and state.primed == steps

    def _prime(self, item: Item) -> None:
        """After a chunk on one row, give the row of every step what that one holds."""
        steps = item.schedule.steps
        if self.mode == "batch" and item.state.pipelined and steps > 1:
            # Its own steps ran on the first row alone.
            for row in item.state.rows[1:steps]:
                self.pool.copy_row(item.state.rows[0], row)
            item.state.primed = steps

    def advance_prompts(self, state: SessionState) -> list[Item]:
        """Go on to the prompts of a stream's next chunk.

        Returns: chunks that were in flight, done, where the cache is rewritten: none of them may be missing in it.
        Raises: EngineError when the text cannot be encoded.
        """
        finished: list[Item] = []
        prompts = state.prompts
        if prompts.moving:
            with self.lanes.aside():
                prompts.advance(self.model.text.request, self._contextualise)
                if prompts.changed and state.params.recache and prompts.context is not None:
                    finished = self.drain(state)
                    self.batch.recache(state, prompts.context)
        if state.pending_revision is not None and not prompts.pending:
            state.revision, state.pending_revision = state.pending_revision, None
        return finished

    def _schedule(self, state: SessionState, pixels_TCHW: Tensor, source_BTCHW: Tensor) -> ChunkSchedule:
        plan, motion = state.plan, self.sampling.motion
        if not plan.steps:
            # Nothing is measured meanwhile: the next motion must not be taken against an old frame.
            state.motion.before = None
        if motion is None or not plan.steps:
            return plan.base
        frames = pixels_TCHW if motion.source == "pixels" else source_BTCHW[0].float()
        if state.motion.before is None:
            remember(state.motion, frames)
            return plan.base
        return plan.at_level(next_level(state.motion, frames, plan.level, motion))

    def _contextualise(self, states_LK: Tensor, mean_K: Tensor) -> PromptContext:
        states, mean = (x[None].to(self.model.device, self.model.dtype) for x in (states_LK, mean_K))
        return self.model.transformer.prompt_context(states, mean)

    def plan(self, params: StreamParams) -> SamplingPlan:
        """The steps that some parameters ask for. Raises ValueError for those the model does not have."""
        return sampling_plan(params.steps, params.strength, self.sampling, self.model.device)

    def _noise(self, seed: int) -> NoiseSource:
        kind = FixedNoise if self.sampling.noise == "fixed" else FreshNoise
        return kind(seed, self._latent, self.model.device, self.model.dtype)

    def _camera_figures(self, state: SessionState, pixels_TCHW: Tensor) -> Tensor:
        """Mean and change of the camera, on a scale of 0 to 1."""
        small = pixels_TCHW[-1, :, ::FIGURE_STRIDE, ::FIGURE_STRIDE].float()
        before, state.camera = state.camera, small
        change = torch.zeros_like(small[0, 0, 0]) if before is None else (small - before).abs().mean() / 2
        return torch.stack(((small.mean() + 1) / 2, change))

    def _figures(self, item: Item, frames_TCHW: Tensor) -> Tensor:
        """What `engine.health.ChunkFigures` holds, in its order."""
        state = item.state
        last = frames_TCHW[-1].float()
        small = last[:, ::FIGURE_STRIDE, ::FIGURE_STRIDE].clamp(-1, 1)
        before, state.shown = state.shown, small
        change = torch.full_like(small[0, 0, 0], 1.0) if before is None else (small - before).abs().mean() / 2
        pixels = (small.flatten(1) + 1) / 2
        energy = (small[:, :, 1:] - small[:, :, :-1]).abs().mean() / 2
        scale = item.clean.float().square().mean().sqrt()
        finite = frames_TCHW.sum(dtype=torch.float32).isfinite().float()
        figures = (energy, scale, change, *item.camera.unbind(), finite)
        return torch.cat((pixels.mean(1), pixels.std(1), torch.stack(figures)))


def _by_length(items: Iterable[Item]) -> list[list[Item]]:
    """Items that fit one pass together: those with the same number of latent frames."""
    groups: dict[int, list[Item]] = {}
    for item in items:
        groups.setdefault(item.source.shape[1], []).append(item)
    return list(groups.values())
