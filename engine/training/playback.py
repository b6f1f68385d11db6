"""Clips through the engine's own pipeline, chunk by chunk as a stream comes, and what that costs.

The pipeline is set up as the server sets it up: the model's own sampling and cache settings, KV cache, one noise
sample a stream. Nothing here uses the passes that training uses.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from engine.api import StreamParams
from engine.pipeline import Pipeline
from engine.training.measures import look, psnr
from engine.training.train_vae import decode_clip, to_tensor, to_uint8
from engine.wan.vae import FRAMES_PER_LATENT, VAEState
from engine.wan.weights import Model, load_model

Clip = NDArray[np.uint8]

SPEED_RUNS, SPEED_CHUNKS, WARM_UP_CHUNKS = 5, 8, 5


def pipeline_for(model: Model, clip_THWC: Clip) -> Pipeline:
    """The engine's pipeline at a clip's size, for one stream."""
    return Pipeline(model, clip_THWC.shape[2], clip_THWC.shape[1], streams=1)


def chunks(clip_THWC: Clip, first: int) -> Iterator[Clip]:
    """A clip cut as the server cuts a stream: a first chunk, then four frames each; what is over is left out."""
    yield clip_THWC[:first]
    for start in range(first, len(clip_THWC) - FRAMES_PER_LATENT + 1, FRAMES_PER_LATENT):
        yield clip_THWC[start : start + FRAMES_PER_LATENT]


def play(pipeline: Pipeline, clip_THWC: Clip, params: StreamParams) -> Clip:
    """A clip of 1 + 4k frames, restyled in a stream of its own."""
    return switch(pipeline, clip_THWC, [(0, params)])


def switch(pipeline: Pipeline, clip_THWC: Clip, settings: list[tuple[int, StreamParams]]) -> Clip:
    """A clip restyled in one stream whose parameters change.

    Args:
        settings: from which chunk on which parameters hold, in order; the first from chunk 0.
    """
    due = dict(settings)
    state = pipeline.open(settings[0][1])
    out = []
    try:
        for number, chunk in enumerate(chunks(clip_THWC, pipeline.model.config.serving.first_chunk_frames)):
            if number and number in due:
                pipeline.set_params(state, due[number])
            out.append(pipeline.render(state, chunk))
    finally:
        pipeline.close(state)
    return np.concatenate(out)


def restyle_clip(model: Model, clip_THWC: Clip, prompt: str, seed: int = 0) -> Clip:
    """Restyle 1 + 4k frames in one step a chunk at full strength."""
    return play(pipeline_for(model, clip_THWC), clip_THWC, StreamParams(prompt=prompt, seed=seed))


@torch.inference_mode()
def round_trip(model: Model, clip_THWC: Clip) -> Clip:
    """A clip of 1 + 4k frames through the autoencoder alone: what the transformer could reach at best."""
    latent = model.vae.encode(to_tensor(clip_THWC[None]).to(model.dtype), VAEState())[0]
    return np.asarray(to_uint8(decode_clip(model.vae, latent).float())[0])


# --- a long stream


def drift(pipeline: Pipeline, clip_THWC: Clip, params: StreamParams, minutes: float) -> dict[str, float]:
    """Play a clip to and fro for `minutes` of video and hold the last pass against one in the first minute.

    To and fro, so that the scene never jumps. The very first pass is left out: a stream's cache is filling then.

    Returns: minutes played, PSNR of the last pass to the second one, and each statistic of `look` in both.
    """
    loop = np.concatenate([clip_THWC, clip_THWC[-2:0:-1]])
    loop = loop[: len(loop) // FRAMES_PER_LATENT * FRAMES_PER_LATENT]
    passes = max(3, round(minutes * 60 * pipeline.model.config.serving.fps / len(loop)))
    state = pipeline.open(params)
    early, late = loop, loop
    try:
        pipeline.render(state, clip_THWC[: pipeline.model.config.serving.first_chunk_frames])
        for number in range(passes):
            late = np.concatenate([pipeline.render(state, chunk) for chunk in _fours(loop)])
            if number == 1:
                early = late
    finally:
        pipeline.close(state)
    figures = {"minutes": passes * len(loop) / pipeline.model.config.serving.fps / 60, "psnr_db": psnr(late, early)}
    for when, clip in (("early", early), ("late", late)):
        figures |= {f"{when}_{name}": value for name, value in look(clip).items()}
    return figures


def _fours(clip_THWC: Clip) -> Iterator[Clip]:
    for start in range(0, len(clip_THWC), FRAMES_PER_LATENT):
        yield clip_THWC[start : start + FRAMES_PER_LATENT]


# --- cost


def speed(model: Model, size: tuple[int, int]) -> dict[str, float]:
    """Encoder, one step and decoder on this thread: median of five runs, in wall time and in CPU time.

    The two differ where other programs want the core: the wall time is the honest one on an idle machine only.
    """
    width, height = size
    frames = np.random.default_rng(0).integers(0, 256, (FRAMES_PER_LATENT, height, width, 3), dtype=np.uint8)
    pipeline = pipeline_for(model, frames)
    state = pipeline.open(StreamParams(prompt="watercolor painting"))
    for _ in range(WARM_UP_CHUNKS):
        pipeline.render(state, frames)
    walls, cpus = [], []
    for _ in range(SPEED_RUNS):
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in range(SPEED_CHUNKS):
            pipeline.render(state, frames)
        walls.append(1000 * (time.perf_counter() - wall) / SPEED_CHUNKS)
        cpus.append(1000 * (time.process_time() - cpu) / SPEED_CHUNKS)
    pipeline.close(state)
    wall_ms, cpu_ms = statistics.median(walls), statistics.median(cpus)
    each = 1000.0 * FRAMES_PER_LATENT
    return {"chunk_ms": wall_ms, "fps": each / wall_ms, "chunk_cpu_ms": cpu_ms, "cpu_fps": each / cpu_ms}


def weight(folder: Path, dtype: torch.dtype) -> dict[str, float]:
    """Megabytes of a model folder, and seconds from opening it to the first restyled frame in this process."""
    size_mb = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6
    began = time.perf_counter()
    restyle_clip(load_model(folder, "cpu", dtype), np.zeros((1, 256, 256, 3), np.uint8), "watercolor painting")
    return {"size_mb": size_mb, "load_s": time.perf_counter() - began}
