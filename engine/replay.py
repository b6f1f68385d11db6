"""Run a recorded stream exactly: `python -m engine.replay --bundle DIR --out FILE`.

A bundle holds what a stream was given, weights and noise included, so that two implementations can be compared number
by number. It runs in compatible settings: absolute positions that grow, raw latents, the public noise constants, no
sink refresh. A bundle folder has

    spec.json              sizes and settings, see `Spec`
    dit.safetensors        the transformer under original Wan names
    vae.safetensors        the autoencoder likewise
    inputs.safetensors     prompt_embeds [1, text_len, text_dim], video [1, 3, T, H, W] in [-1, 1]
                           with T = 1 + 4K(1 + chunks)
    noise.safetensors      noise_CCC_S [frames, z, h, w]: enters chunk CCC before step S

and the output one safetensors with latent_CCC [frames, z, h, w] (clean, before de-normalising) and frames_CCC
[n, 3, H, W] (clamped to [-1, 1]), float32, for every chunk; beside it FILE.json with the time of its parts.

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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, PositiveInt, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine.api import EngineError, StreamParams
from engine.config import WAN_SAMPLING, CacheConfig, MotionConfig, SamplingConfig, ServingProfile
from engine.kv_cache import CacheRow, KVPool
from engine.pipeline import Mode, Pipeline
from engine.ring_group import RingGroup, RingResult, RingStats
from engine.ring_rank import RingSpec
from engine.ring_stage import StagePool
from engine.session import Item, SessionState
from engine.wan.checkpoints import check_shapes, transformer_from_original
from engine.wan.presets import TransformerConfig
from engine.wan.text_encoder import EncodedPrompt, StyleIndex
from engine.wan.transformer import CausalTransformer
from engine.wan.vae_config import WanVAEConfig
from engine.wan.wan_vae import WanVAE
from engine.wan.weights import Model, ModelConfig, WeightsError

log = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "fp32": torch.float32, "bfloat16": torch.bfloat16, "bf16": torch.bfloat16}
T = TypeVar("T")
# Whether sequential mode keeps each chunk in one slot, or takes slots as the public code does.
Slots = Literal["published", "plain"]


class BundleError(Exception):
    """A bundle that cannot be run; the text names the file and what is wrong with it."""


class Spec(BaseModel):
    """spec.json. Sizes of pixels; steps: timesteps, noisiest first, or how many of the public ones.

    text_tokens, adapt_sink_threshold and seed are known and change nothing: all positions are attended, sinks are not
    refreshed, and the noise is recorded.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    dim: PositiveInt
    heads: PositiveInt
    layers: PositiveInt
    ffn_dim: PositiveInt
    text_dim: PositiveInt
    text_len: PositiveInt
    text_tokens: PositiveInt | None = None
    freq_dim: PositiveInt = 256
    vae_dim: PositiveInt
    z_dim: PositiveInt = 16
    height: PositiveInt
    width: PositiveInt
    chunks: int
    frames_per_block: PositiveInt = 1
    steps: tuple[int, ...] | PositiveInt
    shift: float = 8.0
    num_kv_cache: PositiveInt = 6
    num_sink: int = 3
    adapt_sink_threshold: float = -1.0
    noise_scale: float = 0.8
    adaptive_noise: bool = True
    dtype: str = "float32"
    seed: int = 0

    @property
    def timesteps(self) -> tuple[int, ...]:
        """Noisiest first, one for each step; a closing 0 is no step."""
        public = WAN_SAMPLING.timesteps or ()
        steps = public[: self.steps] if isinstance(self.steps, int) else self.steps
        return tuple(step for step in steps if step > 0)


class RecordedNoise:
    """The noise of a bundle (`engine.session.NoiseSource`)."""

    def __init__(self, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> None:
        self._tensors = tensors
        self._dtype = dtype

    def draw(self, chunk: int, step: int, frames: int) -> Tensor:
        """See `NoiseSource.draw`. Raises BundleError for a sample that the bundle lacks."""
        name = f"noise_{chunk:03d}_{step}"
        if name not in self._tensors:
            raise BundleError(f"noise.safetensors has no {name}")
        return self._tensors[name][None].to(self._dtype)


class _GivenText:
    """A text encoder that knows one prompt, whatever it is asked."""

    def __init__(self, states: Tensor) -> None:
        self._prompt = EncodedPrompt(states, states.float().mean(0), states.shape[0])

    def request(self, prompt: str) -> EncodedPrompt:
        return self._prompt

    def encode(self, prompt: str) -> EncodedPrompt:
        return self._prompt

    def close(self) -> None:
        pass


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


@dataclass(frozen=True)
class Bundle:
    """A bundle, read and checked. video: [T, 3, H, W] in the bundle's dtype."""

    spec: Spec
    model: Model
    video: Tensor
    noise: RecordedNoise

    @classmethod
    def read(cls, folder: Path) -> Bundle:
        """Read a bundle folder. Raises BundleError, or WeightsError naming every key that does not fit."""
        spec = read_spec(folder / "spec.json")
        dtype = DTYPES[spec.dtype.removeprefix("torch.")]
        inputs = _tensors(folder / "inputs.safetensors", ("prompt_embeds", "video"))
        video = inputs["video"]
        frames = 1 + 4 * spec.frames_per_block * (1 + spec.chunks)
        if video.ndim != 5 or video.shape[2] < frames:
            raise BundleError(f"video {tuple(video.shape)} must be [1, 3, T, H, W] with T of {frames} at least")
        try:
            model = make_model(spec, folder, inputs["prompt_embeds"][0], dtype)
        except ValidationError as error:
            told = "; ".join(fault["msg"].removeprefix("Value error, ") for fault in error.errors())
            raise BundleError(f"{folder / 'spec.json'}: {told}") from error
        except WeightsError as error:
            raise BundleError(f"{folder}: {error}") from error
        noise = RecordedNoise(_tensors(folder / "noise.safetensors"), dtype)
        return cls(spec, model, video[0, :, :frames].transpose(0, 1).to(dtype).contiguous(), noise)

    def chunk(self, index: int) -> Tensor:
        """Pixels [T, 3, H, W] of a chunk."""
        span = 4 * self.spec.frames_per_block
        start = 0 if index == 0 else 1 + index * span
        return self.video[start : 1 + (index + 1) * span]


def read_spec(path: Path) -> Spec:
    """Read spec.json; keys it does not know are ignored with a warning. Raises BundleError."""
    try:
        given = json.loads(path.read_bytes())
        spec = Spec.model_validate(given)
    except OSError as error:
        raise BundleError(f"cannot read {path}: {error.strerror}") from error
    except ValidationError as error:
        raise BundleError(f"{path}: {error}") from error
    except ValueError as error:
        raise BundleError(f"{path} is not JSON: {error}") from error
    if unknown := sorted(given.keys() - Spec.model_fields.keys()):
        log.warning("%s: ignored what is not known: %s", path, ", ".join(unknown))
    if spec.dtype.removeprefix("torch.") not in DTYPES:
        raise BundleError(f"{path}: dtype {spec.dtype!r} must be one of {', '.join(DTYPES)}")
    if not 1 <= len(spec.timesteps) <= 4:
        raise BundleError(f"{path}: steps {spec.steps} must be 1 to 4 timesteps above 0")
    return spec


def make_model(spec: Spec, folder: Path, prompt_LK: Tensor, dtype: torch.dtype) -> Model:
    """The bundle's transformer and autoencoder on the CPU, under compatible settings."""
    transformer_config = TransformerConfig(
        latent_channels=spec.z_dim,
        dim=spec.dim,
        ffn_dim=spec.ffn_dim,
        heads=spec.heads,
        layers=spec.layers,
        text_dim=spec.text_dim,
        text_len=spec.text_len,
        freq_dim=spec.freq_dim,
        window_frames=spec.num_kv_cache,
        sink_frames=spec.num_sink,
    )
    vae_config = WanVAEConfig(dim=spec.vae_dim, z_dim=spec.z_dim)
    with torch.device("meta"):
        transformer, vae = CausalTransformer(transformer_config), WanVAE(vae_config)
    own = transformer_from_original(_tensors(folder / "dit.safetensors"), transformer_config)
    transformer.load_state_dict(own, assign=True)
    tensors = _tensors(folder / "vae.safetensors")
    expected = {key: tuple(tensor.shape) for key, tensor in vae.state_dict().items()}
    check_shapes(expected, {key: tuple(tensor.shape) for key, tensor in tensors.items()}, "vae.safetensors")
    vae.load_state_dict(tensors, assign=True)
    for module in (transformer, vae):
        module.to(dtype).eval().requires_grad_(False)
    config = ModelConfig(
        name=folder.name,
        transformer=transformer_config,
        vae=vae_config,
        text="umt5",
        sampling=SamplingConfig(
            shift=spec.shift,
            timesteps=spec.timesteps,
            noise_scale=spec.noise_scale,
            motion=MotionConfig(monotonic=False) if spec.adaptive_noise else None,
            latents="raw",
            noise="fresh",
        ),
        cache=CacheConfig(positions="absolute"),
        serving=ServingProfile(first_chunk_frames=5, steps=len(spec.timesteps)),
        # A bundle is no model folder: it has nothing to hold this against.
        sha256="0" * 64,
    )
    text = _GivenText(prompt_LK.to(dtype))
    return Model(config, transformer, vae, text, StyleIndex(None, ()), torch.device("cpu"), dtype)


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
        self.bundle = bundle
        height, width = bundle.video.shape[2:]
        self.slips = slots == "published" and mode == "sequential"
        self.pipeline = Pipeline(
            bundle.model,
            width,
            height,
            streams=1,
            mode=mode,
            compile_pass=compile_pass,
            pool_type=PublishedSlots if self.slips else KVPool,
        )
        self._later: CacheRow | None = None
        self.watch = Stopwatch()
        self.schedule: list[list[float]] = []
        self.results: dict[str, Tensor] = {}

    @torch.inference_mode()
    def run(self) -> SessionState:
        """Render every chunk, those in flight at the end included; returns the stream as it ended."""
        pipeline = self.pipeline
        steps = len(self.bundle.spec.timesteps)
        state = pipeline.open(StreamParams(steps=steps), self.bundle.noise)
        pipeline.advance_prompts(state)
        self._later = LaterSteps(state.rows[0].index)
        for chunk in range(self.bundle.spec.chunks + 1):
            self._render(state, self.bundle.chunk(chunk))
        self.pipeline.batch.seal()
        for item in self.watch.time("drain", lambda: pipeline.drain(state)):
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
        self.results[f"frames_{item.chunk:03d}"] = frames.float().clamp(-1, 1).contiguous()

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


class RingReplay:
    """One run over a bundle on several ranks; see `Replay`."""

    def __init__(self, folder: Path, mode: Mode, ranks: int, *, slots: Slots = "published", threads: int = 1) -> None:
        self.bundle = Bundle.read(folder)
        height, width = self.bundle.video.shape[2:]
        self._load = partial(_bundle_model, folder)
        self._spec = RingSpec(
            ranks,
            width,
            height,
            streams=1,
            mode=mode,
            span=self.bundle.spec.frames_per_block,
            raw=True,
            threads=threads,
            pool_type=PublishedStage if slots == "published" and mode == "sequential" else StagePool,
        )
        self.schedule: list[list[float]] = []
        self.results: dict[str, Tensor] = {}
        self._stats: RingStats | None = None

    def run(self) -> None:
        """Render every chunk. Raises RankLost, BundleError."""
        spec = self.bundle.spec
        with RingGroup(self._load, self._spec) as group:
            group.open("replay", StreamParams(steps=len(spec.timesteps)), self.bundle.noise)
            for chunk in range(spec.chunks + 1):
                group.submit("replay", self.bundle.chunk(chunk))
            for result in group.finish(timeout_s=3600.0):
                self._keep(result)
            self._stats = group.stats()

    def _keep(self, result: RingResult) -> None:
        assert result.latent is not None  # a raw ring, and the prompt is given
        assert result.pixels is not None
        self.results[f"latent_{result.chunk:03d}"] = result.latent.float().contiguous()
        self.results[f"frames_{result.chunk:03d}"] = result.pixels.float().clamp(-1, 1).contiguous()
        if result.chunk and result.first_step is not None:
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


def _tensors(path: Path, names: Sequence[str] = ()) -> dict[str, Tensor]:
    try:
        tensors = load_file(path)
    except OSError as error:
        raise BundleError(f"cannot read {path}: {error}") from error
    except SafetensorError as error:
        raise BundleError(f"{path} is no safetensors file: {error}") from error
    if missing := [name for name in names if name not in tensors]:
        raise BundleError(f"{path} has no {', '.join(missing)}")
    return tensors


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
