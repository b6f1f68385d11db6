"""Run a recorded stream exactly: `python -m engine.replay --bundle DIR --out FILE`.

A bundle (`engine.bundle`) holds what a stream was given, weights and noise included, so that two implementations can be
compared number by number. It runs in compatible settings: absolute positions that grow, raw latents, the public noise
constants, no sink refresh.

The output is one safetensors with latent_CCC [frames, z, h, w] (clean, before de-normalising) and frames_CCC
[n, 3, H, W] (clamped to [-1, 1]), float32, for every chunk; beside it FILE.json with the time of its parts. A stream
that moved on the ladder is walked as the engine did: frames rendered at the smaller size are brought to the full one.

With `--ranks N` the run goes over a ring of N processes (`engine.ring`): the same numbers for every N, bit for bit in
float32. Without it, it runs in this process, where the steps of successive chunks share a pass, which rounds otherwise.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from safetensors.torch import save_file
from torch import Tensor

from engine.api import EngineError, StreamParams
from engine.bundle import Bundle, BundleError, Spec
from engine.kv_cache import CacheRow, KVPool
from engine.pipeline import Mode, Pipeline
from engine.ring_group import RingGroup, RingResult, RingStats
from engine.ring_rank import RingSpec
from engine.ring_stage import StagePool
from engine.scaling import enlarge, shrink
from engine.session import Item, SessionState
from engine.wan.weights import Model

T = TypeVar("T")
# Whether sequential mode keeps each chunk in one slot, or takes slots as the public code does.
Slots = Literal["published", "plain"]


class Stopwatch:
    """CPU time of the parts of a run."""

    def __init__(self) -> None:
        self.times: dict[str, list[float]] = {}

    def time(self, part: str, work: Callable[[], T]) -> T:
        """Run `work` and note what it took."""
        began = time.process_time()
        result = work()
        self.times.setdefault(part, []).append(time.process_time() - began)
        return result

    def median_ms(self, part: str) -> float:
        """Median of a part's times, the first left out where there are others: it finds everything cold."""
        times = self.times.get(part, [])
        return 1e3 * statistics.median(times[1:] or times or [0.0])


class LaterSteps(CacheRow):
    """The same memory as the row of a stream's first step, for the steps after it."""


class PublishedSlots(KVPool):
    """Slots as the public sequential mode takes them, which no other part of the engine does.

    Its count of a chunk's passes begins with the ring's first eviction, and that is the second pass of the frame that
    fills the ring. From there on a chunk's first pass writes the slot whose turn it is and its later passes the one
    after, which the next chunk's first pass overwrites: a chunk sees itself twice, and the past as first passes left
    it. With one step there is no difference. Measured: latents 6e-2 from those of one slot a chunk, at two steps.
    """

    def advance(
        self, rows: Sequence[CacheRow], frames: int, *, sink: Tensor | None = None, look_BE: Tensor | None = None
    ) -> Tensor:
        """See `KVPool.advance`; one row, without sink refresh."""
        (row,) = rows
        slots = []
        for place in range(row.seen, row.seen + frames):
            turn = place + 1 if isinstance(row, LaterSteps) and place >= self.window - 1 else place
            ring = self.window - self.sinks
            slots.append(turn if turn < self.window else self.sinks + (turn - self.window) % ring)
            self.held[row.index, slots[-1]] = place
        row.seen += frames
        return torch.tensor([slots])


class Replay:
    """One run over a bundle."""

    def __init__(self, bundle: Bundle, mode: Mode, *, slots: Slots = "published", compile_pass: bool = False) -> None:
        """Raises BundleError for moves that this mode does not know."""
        _check_mode(bundle.spec, mode)
        self.bundle = bundle
        self.slips = slots == "published" and mode == "sequential"
        self._make = partial(
            Pipeline,
            bundle.model,
            streams=1,
            mode=mode,
            compile_pass=compile_pass,
            pool_type=PublishedSlots if self.slips else KVPool,
        )
        full = bundle.spec.size(small=False)
        self._pipelines = {False: self._make(*full)}
        if bundle.spec.has_small:
            small = bundle.spec.size(small=True)
            self._pipelines[True] = self._make(*small, frame_size=full, lanes=self._pipelines[False].lanes)
        self.pipeline = self._pipelines[False]
        self._later: CacheRow | None = None
        self.watch = Stopwatch()
        self.schedule: list[list[float]] = []
        self.results: dict[str, Tensor] = {}

    @torch.inference_mode()
    def run(self) -> SessionState:
        """Render every chunk, those in flight at the end included; returns the stream as it ended."""
        spec = self.bundle.spec
        state = self.pipeline.open(spec.params_of(0), self.bundle.noise)
        self.pipeline.advance_prompts(state)
        self._later = LaterSteps(state.rows[0].index)
        for chunk in range(spec.chunks + 1):
            state = self._move(state, spec.params_of(chunk))
            self._render(state, self.pipeline.shrunk(self.bundle.chunk(chunk)))
        for pipeline in self._pipelines.values():
            pipeline.batch.seal()
        for item in self.watch.time("drain", lambda: self.pipeline.drain(state)):
            self._keep(item)
        return state

    def _move(self, state: SessionState, params: StreamParams) -> SessionState:
        """Go over to another rung, as `engine.worker` does between two chunks; returns the stream as it goes on."""
        if params == state.params:
            return state
        pipeline = self._pipelines[params.small]
        if pipeline is self.pipeline:
            pipeline.set_params(state, params)
        else:
            adopted = pipeline.adopt(state, params, noise=self.bundle.noise)
            self.pipeline.close(state)
            self.pipeline, state = pipeline, adopted
            self._later = LaterSteps(state.rows[0].index)
        for item in pipeline.advance_prompts(state):
            self._keep(item)
        return state

    def _render(self, state: SessionState, pixels_TCHW: Tensor) -> None:
        item = self.watch.time("encode", lambda: self.pipeline.take_in(state, pixels_TCHW))
        if self.slips and self._later is not None:
            item.rows = [item.rows[0]] + [self._later] * (item.schedule.steps - 1)
        for done in self.watch.time("dit", lambda: self.pipeline.denoise([item])):
            self._keep(done)
        if item.chunk:
            schedule = item.schedule
            self.schedule.append([float(schedule.mix), float(schedule.timesteps[0])])

    def _keep(self, item: Item) -> None:
        frames = self.watch.time("decode", lambda: self.pipeline.decode(item))
        self.results[f"latent_{item.chunk:03d}"] = item.clean[0].float().contiguous()
        shown = frames.float().clamp(-1, 1)
        if self.pipeline.scaled:
            shown = enlarge(shown, self.pipeline.frame_size)
        self.results[f"frames_{item.chunk:03d}"] = shown.contiguous()

    def report(self) -> dict[str, Any]:
        """What goes into FILE.json."""
        parts = {part: {"cpu_ms": round(self.watch.median_ms(part), 3)} for part in ("encode", "dit", "decode")}
        return {"sessions": [{**parts, "schedule": self.schedule}]}


class PublishedStage(PublishedSlots, StagePool):
    """`PublishedSlots` on the ranks of a ring."""

    def rows_of_steps(self, rows: list[CacheRow]) -> list[CacheRow]:
        """See `StagePool.rows_of_steps`."""
        if not hasattr(self, "_later"):
            self._later = LaterSteps(rows[0].index)
        return [rows[0]] + [self._later] * (len(rows) - 1)


def _bundle_model(folder: Path, rank: int) -> Model:
    return Bundle.read(folder).model


def _check_mode(spec: Spec, mode: Mode) -> None:
    if mode == "batch" and spec.has_small:
        raise BundleError(
            "the stream moved to the smaller size, and the engine does that in sequential mode alone: "
            "give --mode sequential"
        )


class RingReplay:
    """One run over a bundle on several ranks; see `Replay`. Each size is a ring of its own, as a ring is of one."""

    def __init__(self, folder: Path, mode: Mode, ranks: int, *, slots: Slots = "published", threads: int = 1) -> None:
        """Raises as `Bundle.read` and `Replay`."""
        self.bundle = Bundle.read(folder)
        _check_mode(self.bundle.spec, mode)
        self._load = partial(_bundle_model, folder)
        self._make = partial(
            RingSpec,
            ranks,
            streams=1,
            mode=mode,
            span=self.bundle.spec.frames_per_block,
            raw=True,
            threads=threads,
            pool_type=PublishedStage if slots == "published" and mode == "sequential" else StagePool,
        )
        # Refused before anything is started.
        self._make(*self.bundle.spec.size(small=False))
        self.schedule: list[list[float]] = []
        self.results: dict[str, Tensor] = {}
        self._stats: RingStats | None = None

    def run(self) -> None:
        """Render every chunk. Raises RankLost, BundleError."""
        for chunks in self._of_one_size():
            self._run_some(chunks)

    def _of_one_size(self) -> Iterator[range]:
        spec, first = self.bundle.spec, 0
        for chunk in range(1, spec.chunks + 2):
            if chunk > spec.chunks or spec.params_of(chunk).small != spec.params_of(first).small:
                yield range(first, chunk)
                first = chunk

    def _run_some(self, chunks: range) -> None:
        spec, first = self.bundle.spec, chunks.start
        params = spec.params_of(first)
        size = spec.size(small=params.small)
        with RingGroup(self._load, self._make(*size)) as group:
            group.open("replay", params, self.bundle.noise.after(first))
            for chunk in chunks:
                if spec.params_of(chunk) != params:
                    params = spec.params_of(chunk)
                    group.update("replay", params)
                pixels = self.bundle.chunk(chunk)
                group.submit("replay", shrink(pixels, size, self.bundle.scaled_dtype) if params.small else pixels)
            for result in group.finish(timeout_s=3600.0):
                self._keep(result, first, params)
            self._stats = group.stats()

    def _keep(self, result: RingResult, first: int, params: StreamParams) -> None:
        assert result.latent is not None  # a raw ring, and the prompt is given
        assert result.pixels is not None
        chunk, shown = first + result.chunk, result.pixels.float().clamp(-1, 1)
        if params.small:
            shown = enlarge(shown, self.bundle.spec.size(small=False))
        self.results[f"latent_{chunk:03d}"] = result.latent.float().contiguous()
        self.results[f"frames_{chunk:03d}"] = shown.contiguous()
        if chunk and result.first_step is not None:
            self.schedule.append(list(result.first_step))

    def report(self) -> dict[str, Any]:
        """What goes into FILE.json; times by the clock, of a chunk, and of one pass on every rank."""
        stats = self._stats
        assert stats is not None  # run first
        steps = len(self.bundle.spec.timesteps)
        times = {"encode": stats.total_s("encode"), "dit": steps * sum(stats.rank_s), "decode": stats.total_s("decode")}
        parts = {part: {"wall_ms": round(1e3 * time_s, 3)} for part, time_s in times.items()}
        ranks = {"bounds": stats.bounds, "pass_ms": [round(1e3 * time_s, 3) for time_s in stats.rank_s]}
        return {"sessions": [{**parts, "schedule": self.schedule}], "ranks": ranks}


def _replay(options: argparse.Namespace) -> Replay | RingReplay:
    if options.ranks is None:
        return Replay(Bundle.read(options.bundle), options.mode, slots=options.slots, compile_pass=options.compile)
    if options.compile:
        raise ValueError("--compile is for a run without --ranks: leave one of them out")
    return RingReplay(options.bundle, options.mode, options.ranks, slots=options.slots, threads=options.threads)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a bundle; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m engine.replay", description="Run a recorded stream exactly.")
    parser.add_argument("--bundle", type=Path, required=True, metavar="DIR", help="folder of the recorded stream")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="latents and frames, safetensors")
    parser.add_argument("--mode", choices=("batch", "sequential"), default="batch", help="(default: batch)")
    parser.add_argument(
        "--slots",
        choices=("published", "plain"),
        default="published",
        help="sequential mode: cache slots as the public code takes them, or one slot a chunk (default: published)",
    )
    parser.add_argument("--threads", type=int, default=1, help="torch threads (default: 1)")
    parser.add_argument("--compile", action="store_true", help="torch.compile each pass")
    parser.add_argument("--ranks", type=int, metavar="N", help="a ring of N processes (default: none, this process)")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    torch.set_num_threads(options.threads)
    try:
        replay = _replay(options)
        replay.run()
    except (BundleError, EngineError, ValueError) as error:
        print(f"replay: {error}", file=sys.stderr)
        return 1
    options.out.parent.mkdir(parents=True, exist_ok=True)
    save_file(replay.results, options.out)
    options.out.with_name(options.out.name + ".json").write_text(json.dumps(replay.report(), indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
