"""What the engine's mechanisms cost: medians and their ratios from one run, on one thread.

    .venv/bin/python tests/bench/bench_engine.py [--rounds 40] [--no-compile] [--json]
    .venv/bin/python tests/bench/bench_engine.py --table
    .venv/bin/python tests/bench/bench_engine.py --steps docs/pictures/steps.jpg

Without a flag: one pass of a random Wan-like transformer plain and compiled, and the passes of four streams together
and one after another. Both sides of a ratio take turns, and CPU time is what is compared: on a shared machine wall
time is not. `--table` counts memory and operations of the real models, whose weights it does not need: every tensor
lies on the meta device. `--steps` renders the demo clip with the embedded model at 1, 2 and 4 steps.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import TypeVar

import av
import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from engine.api import StreamParams
from engine.config import DEFAULT_MODEL, MODELS_DIR
from engine.kv_cache import KVPool
from engine.memory import GIB, Demand, known_shape, needed
from engine.pipeline import Mode, Pipeline
from engine.session import Item, SessionState
from engine.wan.presets import PRESETS, TransformerConfig
from engine.wan.taehv import TAEHV
from engine.wan.transformer import CausalTransformer, PromptContext
from engine.wan.untrained import SMALL_WAN_VAE, untrained_wan_model
from engine.wan.vae import FRAMES_PER_LATENT, PIXELS_PER_LATENT, VAEState
from engine.wan.vae_config import TAEHVConfig, WanVAEConfig
from engine.wan.wan_vae import WanVAE
from engine.wan.weights import Model, load_model

Frames = NDArray[np.uint8]
Row = dict[str, float | str]
M = TypeVar("M", bound=nn.Module)
PROMPT = "watercolour painting"
# Layers, and frame sizes of 24 and 64 tokens.
MODES: tuple[Mode, ...] = ("batch", "sequential")
WAN_LIKE_LAYERS = (4, 8)
WAN_LIKE_SIZES = ((96, 64), (128, 128))
STREAMS = 4
# --table
TABLE_MODELS = ("wan2.1-1.3b", "wan2.1-14b")
TABLE_SIZES = ((512, 512), (832, 480))
TERA = 1e12
# --steps
CLIP = Path(__file__).parents[2] / "web" / "demo" / "people.mp4"
STEP_COUNTS = (1, 2, 4)
SIDE_PX = 256
# Half a second and more of the stream comes before the frame that is shown, so that it is one of the steady state.
FIRST_FRAME, STEP_CHUNKS = 164, 12
LABEL_PX, GAP_PX = 24, 6
# The last column is what the most steps change, so many times as strong.
GAIN = 20
PICTURE_STYLES = (
    ("watercolour", "watercolour painting"),
    ("comic", "comic book"),
    ("pencil", "pencil sketch"),
    ("woodblock", "ukiyo-e woodblock print"),
    ("starry night", "starry night by van gogh"),
)


def main() -> int:
    """Run what the flags ask for; returns the exit status."""
    options = _parser().parse_args()
    torch.set_num_threads(1)
    if options.table:
        print(table())
        return 0
    if options.steps:
        print(step_picture(options.steps, options.model))
        return 0
    rows = [] if options.no_compile else [compiled_passes(options.rounds)]
    found = []
    for row in chain(*rows, streams_together(options.rounds, options.model)):
        found.append(row)
        if not options.json:
            print(row.pop("what"), ", ".join(f"{key} {value}" for key, value in row.items()), sep=": ", flush=True)
    if options.json:
        print(json.dumps(found, indent=1))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40, help="of each side of a ratio")
    parser.add_argument("--no-compile", action="store_true", help="leave the compiled passes out: minutes of compiling")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--table", action="store_true", help="memory and operations of Wan 2.1, as Markdown")
    parser.add_argument("--steps", type=Path, metavar="FILE", help="picture of 1, 2 and 4 steps, JPEG or PNG")
    parser.add_argument("--model", type=Path, default=MODELS_DIR / DEFAULT_MODEL, help="folder of the embedded model")
    return parser


# --- passes


@dataclass
class Passes:
    """Streams with a full window, and passes of the transformer over their next chunks."""

    pipeline: Pipeline
    states: list[SessionState]
    frames: Frames

    @classmethod
    def of(cls, model: Model, size: tuple[int, int], *, mode: Mode, steps: int, count: int, compiled: bool) -> Passes:
        """Open `count` streams and fill their windows, which also compiles what is to be compiled."""
        width, height = size
        pipeline = Pipeline(model, width, height, streams=count, mode=mode, compile_pass=compiled)
        states = [pipeline.open(StreamParams(prompt=PROMPT, steps=steps, seed=seed)) for seed in range(count)]
        random = np.random.default_rng(0)
        first = model.config.serving.first_chunk_frames
        start = random.integers(0, 256, (first, height, width, 3), np.uint8)
        passes = cls(pipeline, states, random.integers(0, 256, (FRAMES_PER_LATENT, height, width, 3), np.uint8))
        pipeline.tick([(state, pipeline.upload(start)) for state in states])
        for _ in range(pipeline.pool.window + steps):
            pipeline.tick([(state, pipeline.upload(passes.frames)) for state in states])
        return passes

    @torch.inference_mode()
    def together_s(self) -> float:
        """CPU seconds of one chunk of every stream, in common passes."""
        return self._denoise([self._items()])

    @torch.inference_mode()
    def alone_s(self) -> float:
        """CPU seconds of one chunk of every stream, one after another."""
        return self._denoise([[item] for item in self._items()])

    def _items(self) -> list[Item]:
        pixels = torch.from_numpy(self.frames).permute(0, 3, 1, 2).float().div(127.5).sub(1)
        for state in self.states:
            self.pipeline.advance_prompts(state)
        return [self.pipeline.take_in(state, pixels) for state in self.states]

    def _denoise(self, groups: Sequence[list[Item]]) -> float:
        began = time.process_time()
        for items in groups:
            self.pipeline.denoise(items)
        return time.process_time() - began


def compiled_passes(rounds: int) -> Iterator[Row]:
    """Wan-like transformers at two steps, plain and compiled."""
    for layers in WAN_LIKE_LAYERS:
        config = TransformerConfig(dim=256, ffn_dim=1024, heads=2, layers=layers, text_dim=64, text_len=32)
        model = untrained_wan_model(config, SMALL_WAN_VAE)
        for width, height in WAN_LIKE_SIZES:
            for mode in MODES:
                torch.compiler.reset()
                plain, compiled = (
                    Passes.of(model, (width, height), mode=mode, steps=2, count=1, compiled=compiled)
                    for compiled in (False, True)
                )
                slow_ms, fast_ms = alternate(rounds, plain.together_s, compiled.together_s)
                what = f"a chunk at 2 steps, {mode}, {layers} blocks, {plain.pipeline.pool.tokens} tokens"
                yield _row(what, "plain_ms", slow_ms, "compiled_ms", fast_ms)


def streams_together(rounds: int, embedded: Path) -> Iterator[Row]:
    """Four streams in common passes against one after another, one step a chunk."""
    small = TransformerConfig(dim=256, ffn_dim=1024, heads=2, layers=8, text_dim=64, text_len=32)
    cases = [("Wan-like", untrained_wan_model(small), size) for size in WAN_LIKE_SIZES]
    cases.append((DEFAULT_MODEL, load_model(embedded, "cpu"), (SIDE_PX, SIDE_PX)))
    for name, model, size in cases:
        passes = Passes.of(model, size, mode="sequential", steps=1, count=STREAMS, compiled=False)
        alone_ms, together_ms = alternate(rounds, passes.alone_s, passes.together_s)
        what = f"{STREAMS} streams at 1 step, {name}, {passes.pipeline.pool.tokens} tokens"
        yield _row(what, "one_by_one_ms", alone_ms, "together_ms", together_ms)


def _row(what: str, slow: str, slow_ms: float, fast: str, fast_ms: float) -> Row:
    return {"what": what, slow: round(slow_ms, 2), fast: round(fast_ms, 2), "ratio": round(slow_ms / fast_ms, 2)}


def alternate(rounds: int, first: Callable[[], float], second: Callable[[], float]) -> tuple[float, float]:
    """Medians of two measurements that take turns, in milliseconds."""
    pairs = [(first(), second()) for _ in range(rounds)]
    slow, fast = (1000 * statistics.median(side) for side in zip(*pairs, strict=True))
    return slow, fast


# --- table


def table() -> str:
    """Memory by `engine.memory` and operations by torch's counter, bfloat16, as a Markdown table."""
    columns = [(name, *size) for name in TABLE_MODELS for size in TABLE_SIZES]
    rows: dict[str, list[str]] = {}
    for name, width, height in columns:
        for row, value in (memory_rows(name, width, height) | operation_rows(name, width, height)).items():
            rows.setdefault(row, []).append(value)
    head = " | ".join(f"{name.removeprefix('wan2.1-').upper()}, {width}x{height}" for name, width, height in columns)
    lines = [f"| | {head} |", "| --- |" + " --- |" * len(columns)]
    return "\n".join(lines + [f"| {row} | {' | '.join(values)} |" for row, values in rows.items()])


def memory_rows(name: str, width: int, height: int) -> dict[str, str]:
    """GiB of a model's weights, of a stream and of a pass."""
    shape, demand = known_shape(name), Demand(width, height)
    light = replace(demand, vae="light")
    batch = replace(demand, rows=4)

    def gib(of: Demand, kind: str) -> float:
        return sum(part.size_bytes for part in needed(shape, of).parts if part.kind == kind) / GIB

    return {
        "GiB: weights": f"{gib(demand, 'model'):.2f}",
        "GiB: a stream": f"{gib(demand, 'stream'):.2f}",
        "GiB: a stream, TAEHV": f"{gib(light, 'stream'):.2f}",
        "GiB: a stream, TAEHV, batch mode": f"{gib(replace(light, rows=4), 'stream'):.2f}",
        "GiB: a pass (allowance), sequential, batch": f"{gib(demand, 'pass'):.2f}, {gib(batch, 'pass'):.2f}",
    }


def operation_rows(name: str, width: int, height: int) -> dict[str, str]:
    """TFLOP of the parts of a chunk of 4 frames, and of chunks."""
    step, prompt = transformer_flop(PRESETS[name], width, height)
    full, light = (autoencoder_flop(vae, width, height) for vae in _autoencoders())
    rows = {
        "TFLOP: a step of one latent frame": step,
        "TFLOP: Wan VAE, encode": full[0],
        "TFLOP: Wan VAE, decode": full[1],
        "TFLOP: TAEHV, encode": light[0],
        "TFLOP: TAEHV, decode": light[1],
        "TFLOP: a prompt, once": prompt,
        "TFLOP: a chunk, 1 step, Wan VAE": step + sum(full),
        "TFLOP: a chunk, 2 steps, Wan VAE": 2 * step + sum(full),
        "TFLOP: a chunk, 2 steps, TAEHV": 2 * step + sum(light),
        "TFLOP: a chunk, 4 steps, TAEHV": 4 * step + sum(light),
    }
    return {row: f"{flop / TERA:.2f}" for row, flop in rows.items()}


def _autoencoders() -> tuple[WanVAE | TAEHV, WanVAE | TAEHV]:
    with torch.device("meta"):
        return _ready(WanVAE(WanVAEConfig())), _ready(TAEHV(TAEHVConfig()))


def _ready(module: M) -> M:
    return module.bfloat16().eval().requires_grad_(False)


@torch.inference_mode()
def transformer_flop(config: TransformerConfig, width: int, height: int) -> tuple[int, int]:
    """Operations of one pass over one latent frame with a full window, and of a prompt's keys and values."""
    rows, columns = (side // PIXELS_PER_LATENT for side in (height, width))
    with torch.device("meta"):
        transformer = _ready(CausalTransformer(config))
    grid = (rows // config.patch[1], columns // config.patch[2])
    pool = KVPool(config, grid, 1, device="meta", dtype=torch.bfloat16)
    leased = pool.lease(1)
    for _ in range(config.window_frames):
        slots = pool.advance(leased, 1)
    view = pool.view(leased, slots)
    noisy = _meta(1, 1, config.latent_channels, rows, columns)
    with FlopCounterMode(display=False) as text:
        prompt: PromptContext = transformer.prompt_context(_meta(1, config.text_len, config.text_dim))
    with FlopCounterMode(display=False) as step:
        transformer(noisy, None, torch.empty(1, device="meta"), prompt, view)
    return step.get_total_flops(), text.get_total_flops()


@torch.inference_mode()
def autoencoder_flop(vae: WanVAE | TAEHV, width: int, height: int) -> tuple[int, int]:
    """Operations to encode 4 frames and to decode their latent, in a stream that has begun."""
    frames = _meta(1, 1 + FRAMES_PER_LATENT, 3, height, width)
    latent, encoder = vae.encode(frames[:, :1], VAEState())
    _, decoder = vae.decode(latent, VAEState())
    with FlopCounterMode(display=False) as encode:
        latent, _ = vae.encode(frames[:, 1:], encoder)
    with FlopCounterMode(display=False) as decode:
        vae.decode(latent, decoder)
    return encode.get_total_flops(), decode.get_total_flops()


def _meta(*shape: int) -> torch.Tensor:
    return torch.empty(shape, device="meta", dtype=torch.bfloat16)


# --- steps


def step_picture(path: Path, folder: Path) -> str:
    """Write the picture; returns what each number of steps cost and by how much its pictures differ, as Markdown."""
    chunks = clip_chunks(CLIP, FIRST_FRAME, STEP_CHUNKS)
    model = load_model(folder, "cpu")
    times: dict[int, list[float]] = {steps: [] for steps in STEP_COUNTS}
    shown: dict[int, list[Frames]] = {steps: [] for steps in STEP_COUNTS}
    flicker: dict[int, list[float]] = {steps: [] for steps in STEP_COUNTS}
    for _, prompt in PICTURE_STYLES:
        pipeline = Pipeline(model, SIDE_PX, SIDE_PX)
        states = {steps: pipeline.open(StreamParams(prompt=prompt, steps=steps)) for steps in STEP_COUNTS}
        rendered: dict[int, list[Frames]] = {steps: [] for steps in STEP_COUNTS}
        # The streams take turns, so that what else the machine does meets all of them.
        for number, frames in enumerate(chunks):
            for steps, state in states.items():
                began = time.process_time()
                rendered[steps].append(pipeline.render(state, frames))
                if number > pipeline.pool.window:
                    times[steps].append(time.process_time() - began)
        for steps, parts in rendered.items():
            film = np.concatenate(parts).astype(np.float32)
            shown[steps].append(parts[-1][-1])
            flicker[steps].append(float(np.abs(film[1:] - film[:-1]).mean()))
    camera = chunks[-1][-1]
    rows = [[camera, *row, _difference(row[0], row[-1])] for row in zip(*shown.values(), strict=True)]
    _grid(rows).save(path, quality=85, optimize=True)
    lines = ["| steps | CPU ms a chunk | times one step | from one step, grey levels | from frame to frame |"]
    lines += ["| --- | --- | --- | --- | --- |"]
    once = statistics.median(times[1])
    for steps in STEP_COUNTS:
        pairs = zip(shown[1], shown[steps], strict=True)
        apart = statistics.mean(float(np.abs(a.astype(np.float32) - b).mean()) for a, b in pairs)
        cost = statistics.median(times[steps])
        lines.append(
            f"| {steps} | {1000 * cost:.0f} | {cost / once:.2f} | {apart:.1f} | {statistics.mean(flicker[steps]):.1f} |"
        )
    return "\n".join(lines)


def clip_chunks(path: Path, first: int, count: int) -> list[Frames]:
    """Chunks of 4 successive frames, the middle of the picture, [4, SIDE_PX, SIDE_PX, 3]."""
    frames: list[Frames] = []
    with av.open(str(path)) as container:
        for number, picture in enumerate(container.decode(video=0)):
            if first <= number < first + count * FRAMES_PER_LATENT:
                frames.append(_square(np.asarray(picture.to_ndarray(format="rgb24"), np.uint8)))
    return [np.stack(frames[start : start + FRAMES_PER_LATENT]) for start in range(0, len(frames), FRAMES_PER_LATENT)]


def _square(rgb: Frames) -> Frames:
    height, width = rgb.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    middle = rgb[top : top + side, left : left + side]
    return np.asarray(cv2.resize(middle, (SIDE_PX, SIDE_PX), interpolation=cv2.INTER_AREA), np.uint8)


def _difference(first: Frames, second: Frames) -> Frames:
    apart = np.abs(first.astype(np.int16) - second)
    return np.asarray(np.minimum(GAIN * apart, 255), np.uint8)


def _grid(rows: Sequence[Sequence[Frames]]) -> Image.Image:
    """A labelled sheet: a style in each row, the camera and the numbers of steps in its columns."""
    heads = ["camera", *(f"{steps} step{'s' * (steps > 1)}" for steps in STEP_COUNTS)]
    heads.append(f"|{STEP_COUNTS[-1]} - {STEP_COUNTS[0]}| x {GAIN}")
    place = SIDE_PX + GAP_PX
    margin = 4 * LABEL_PX
    sheet = Image.new("RGB", (margin + len(heads) * place, LABEL_PX + GAP_PX + len(rows) * place), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(15)
    for column, head in enumerate(heads):
        draw.text((margin + column * place + SIDE_PX // 2, LABEL_PX // 2 + 2), head, "black", font, anchor="mm")
    for row, (pictures, (style, _)) in enumerate(zip(rows, PICTURE_STYLES, strict=True)):
        top = LABEL_PX + GAP_PX + row * place
        words = style.replace(" ", "\n")
        draw.multiline_text((margin // 2, top + SIDE_PX // 2), words, "black", font, anchor="mm", align="center")
        for column, picture in enumerate(pictures):
            sheet.paste(Image.fromarray(picture), (margin + column * place, top))
    return sheet


if __name__ == "__main__":
    sys.exit(main())
