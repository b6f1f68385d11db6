"""What a model needs of a device's memory, part by part, before anything is loaded. Arithmetic only, free of torch.

Weights, caches and states are exact: they follow from the configuration. Activations are an allowance, the largest
set of tensors that live together in one block of the transformer and at the full size of the VAE, and a quarter more
for what an allocator leaves unused.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from math import prod
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from engine.api import EngineError
from engine.config import CONFIG_FILE, MAX_STEPS, WAN_SERVING, EngineSettings, ServingProfile
from engine.wan.presets import PRESETS, REFINE_FACTOR, TransformerConfig
from engine.wan.vae_config import TAEHVConfig, WanVAEConfig

GIB = 1 << 30
ITEM_BYTES = {"float32": 4, "bfloat16": 2}
PIXELS_PER_LATENT = 8
FRAMES_PER_PASS = 4
# The present prompt of a stream and the one it changes to.
PROMPTS_HELD = 2
ALLOCATOR_SHARE = 0.25
MAX_CURES = 4
# Of what is kept of streams, what does not lie with the units of a chain (`engine.chain`).
BESIDE_UNITS = ("prompts", "frames")
WhichVAEs = Literal["full", "light", "both"]
UMT5_XXL_BYTES = 11_361_845_248  # of the published bfloat16 file's tensors


@dataclass(frozen=True)
class ModelShape:
    """What the need depends on.

    vae: None for the embedded model, whose one file has `other_bytes`. text_bytes: of the text encoder's weights.
    """

    name: str
    transformer: TransformerConfig
    vae: WanVAEConfig | None
    light_vae: TAEHVConfig | None
    serving: ServingProfile
    text_bytes: int = 0
    other_bytes: int = 0


@dataclass(frozen=True)
class Demand:
    """What is asked of a model.

    rows: KV rows of one stream: 1 in sequential mode, as many as steps in batch mode. text_here: the text encoder
    lives on the same device. vae: which are loaded; both: the full one, to whose size its state is held, and the light.
    """

    width: int
    height: int
    streams: int = 1
    rows: int = 1
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    vae: WhichVAEs = "full"
    micro_batch: int = 1
    fp8: bool = False
    text_here: bool = False

    def __str__(self) -> str:
        return (
            f"{self.width}x{self.height}, {self.streams} stream{'s' * (self.streams != 1)}, {self.rows} KV "
            f"row{'s' * (self.rows != 1)} each, {self.vae} VAE{'s' * (self.vae == 'both')}, {self.dtype}"
        )


@dataclass(frozen=True)
class MemoryPart:
    """One line of a plan; `kind` says of what it is a multiple."""

    name: str
    size_bytes: int
    kind: Literal["model", "stream", "pass"]


@dataclass(frozen=True)
class MemoryPlan:
    """Everything that must fit at once."""

    shape: ModelShape
    demand: Demand
    parts: tuple[MemoryPart, ...]

    @property
    def total_bytes(self) -> int:
        """Sum of the parts."""
        return sum(part.size_bytes for part in self.parts)

    @property
    def stream_bytes(self) -> int:
        """Of one stream."""
        return sum(part.size_bytes for part in self.parts if part.kind == "stream") // self.demand.streams

    @property
    def beside_bytes(self) -> int:
        """Of what is neither weights nor kept by the model's parts: passes, frames and prompts."""
        return sum(part.size_bytes for part in self.parts if part.kind == "pass" or part.name in BESIDE_UNITS)

    def table(self) -> str:
        """The parts and their sum, one a line."""
        rows = [(part.name, part.size_bytes) for part in self.parts] + [("in all", self.total_bytes)]
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}}  {size / GIB:8.2f} GiB" for name, size in rows)


def shape_of(folder: Path) -> ModelShape:
    """The shape of a model folder, from its config.json and the sizes of its files.

    Raises: ValueError naming the file.
    """
    path = folder / CONFIG_FILE
    try:
        config = json.loads(path.read_bytes())
        vae, light, files = config["vae"], config.get("light_vae"), config.get("files", {})
        wan = "z_dim" in vae
        return ModelShape(
            config["name"],
            TransformerConfig.model_validate(config["transformer"]),
            WanVAEConfig.model_validate(vae) if wan else None,
            TAEHVConfig.model_validate(light) if light else None,
            ServingProfile.model_validate(config.get("serving", {})),
            sum(record["size_bytes"] for name, record in files.items() if name.startswith("text_encoder/")),
            0 if wan else sum(file.stat().st_size for file in folder.glob("*.safetensors")),
        )
    except (OSError, ValueError, ValidationError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from error


def known_shape(name: str) -> ModelShape:
    """The shape of a Wan model that need not be there yet. Raises: KeyError."""
    return ModelShape(name, PRESETS[name], WanVAEConfig(), TAEHVConfig(), WAN_SERVING, UMT5_XXL_BYTES)


def plan_of(settings: EngineSettings, available_bytes: int | None) -> MemoryPlan:
    """What an engine of these settings takes of its device; its `Demand.vae` says which VAEs it holds.

    With vae `auto` and a model that has two, that is both where they fit, and else the light one; a ring, where streams
    change neither VAE nor size, holds the light one.

    Args:
        available_bytes: free on the device; None, where that is unknown, is room for all.

    Raises: FileNotFoundError for no such model, ValueError for a folder that is not one. Not for want of room, which is
        `check`.
    """
    shape = shape_of(settings.model_dir)
    light = settings.vae == "light" or (settings.vae == "auto" and shape.light_vae is not None)
    if light and settings.vae == "auto" and settings.rank_count == 1:
        both = _plan(settings, shape, "both")
        if available_bytes is None or both.total_bytes <= available_bytes:
            return both
    return _plan(settings, shape, "light" if light else "full")


def _plan(settings: EngineSettings, shape: ModelShape, vae: WhichVAEs) -> MemoryPlan:
    demand = Demand(
        settings.width,
        settings.height,
        streams=pool_streams(settings),
        rows=MAX_STEPS if settings.mode == "batch" else 1,
        dtype=settings.precision,
        vae=vae,
        micro_batch=settings.micro_batch * settings.chunk_latents,
        fp8=settings.fp8,
        text_here=settings.text_device == settings.device,
    )
    plan = needed(shape, demand)
    if (size := small_size(settings, shape.serving)) is not None:
        small = needed(shape, replace(demand, width=size[0], height=size[1]))
        parts = tuple(replace(part, name=f"{part.name}, small") for part in small.parts if part.kind == "stream")
        plan = replace(plan, parts=(*plan.parts, *parts))
    return plan


def small_size(settings: EngineSettings, profile: ServingProfile) -> tuple[int, int] | None:
    """The size at which streams can be rendered when the engine is too slow; None where there is none.

    Compiled passes, steps in flight together and rings are of one size.
    """
    if settings.compile or settings.mode == "batch" or settings.rank_count > 1:
        return None
    return profile.smaller(settings.width, settings.height)


def pool_streams(settings: EngineSettings) -> int:
    """Streams to hold cache for. The warm-up is over before the first stream is opened, and takes the same rows."""
    return max(settings.max_streams, settings.micro_batch)


def needed(shape: ModelShape, demand: Demand) -> MemoryPlan:
    """What a model needs for a demand, by part."""
    return MemoryPlan(shape, demand, tuple(part for part in _parts(shape, demand) if part.size_bytes))


def _parts(shape: ModelShape, demand: Demand) -> Iterator[MemoryPart]:
    item, model = ITEM_BYTES[demand.dtype], shape.transformer
    pixels = demand.width * demand.height
    tokens = pixels // PIXELS_PER_LATENT**2 // (model.patch[1] * model.patch[2])
    blocks = block_parameters(model) * model.layers
    saved = blocks * (item - 1) if demand.fp8 else 0
    yield MemoryPart("transformer", transformer_parameters(model) * item - saved, "model")
    light = shape.light_vae if demand.vae == "light" else None
    if light is not None:
        yield MemoryPart("light VAE", taehv_parameters(light) * item, "model")
    elif shape.vae is not None:
        yield MemoryPart("VAE", wan_vae_parameters(shape.vae) * item, "model")
        if demand.vae == "both" and shape.light_vae is not None:
            yield MemoryPart("light VAE", taehv_parameters(shape.light_vae) * item, "model")
    else:
        yield MemoryPart("other weights", shape.other_bytes, "model")
    if demand.text_here:
        yield MemoryPart("text encoder", shape.text_bytes, "model")
    streams = demand.streams
    yield MemoryPart("KV cache", streams * demand.rows * kv_row_bytes(model, tokens, item), "stream")
    yield MemoryPart("prompts", streams * PROMPTS_HELD * prompt_bytes(model, item), "stream")
    if light is not None:
        yield MemoryPart("VAE state", streams * sum(taehv_state(light, demand.width, demand.height)) * item, "stream")
    elif shape.vae is not None:
        state = sum(wan_vae_state(shape.vae, demand.width, demand.height))
        yield MemoryPart("VAE state", streams * state * item, "stream")
    frames = shape.serving.first_chunk_frames + shape.serving.chunk_frames
    yield MemoryPart("frames", streams * frames * 3 * pixels * item, "stream")
    batch = demand.micro_batch * demand.rows
    attention = batch * tokens * (8 * model.dim + 2 * model.ffn_dim) * item
    # The window's keys, turned to their positions.
    attention += batch * model.window_frames * tokens * model.dim * item
    # At full size: a stage's input, what it joins with its memory, its output and a convolution's workspace.
    top = light.decoder_dims[-1] if light is not None else shape.vae.dim if shape.vae is not None else 32
    decoding = demand.micro_batch * pixels * top * 5 * FRAMES_PER_PASS * item
    yield MemoryPart("activations", round((1 + ALLOCATOR_SHARE) * max(attention, decoding)), "pass")


def check(plan: MemoryPlan, available_bytes: int) -> None:
    """Refuse a plan that does not fit.

    Raises: EngineError with the parts, what is there, and which smaller demands would fit.
    """
    if plan.total_bytes <= available_bytes:
        return
    cures = [
        f"{what}: {smaller.total_bytes / GIB:.1f} GiB"
        for what, demand in _smaller(plan)
        if (smaller := needed(plan.shape, demand)).total_bytes <= available_bytes
    ]
    raise EngineError(
        f"{plan.shape.name} at {plan.demand} needs {plan.total_bytes / GIB:.1f} GiB, "
        f"{available_bytes / GIB:.1f} GiB are there:\n{plan.table()}\n"
        + (
            f"What would fit: {'; '.join(cures[:MAX_CURES])}"
            if cures
            else "No smaller setting fits: take a smaller model"
        )
    )


def _smaller(plan: MemoryPlan) -> Iterator[tuple[str, Demand]]:
    """Demands that need less, each change alone, then joined until it fits; the least painful first."""
    demand, shape = plan.demand, plan.shape
    changes: list[tuple[str, Demand]] = []
    if demand.text_here:
        changes.append(("text_device cpu", replace(demand, text_here=False)))
    if demand.vae == "full" and shape.light_vae is not None:
        changes.append(("vae light", replace(demand, vae="light")))
    if demand.rows > 1:
        changes.append(("mode sequential", replace(demand, rows=1)))
    smaller = [size for size in shape.serving.sizes if prod(size) < demand.width * demand.height]
    if smaller:
        width, height = max(smaller, key=prod)
        changes.append((f"{width}x{height}", replace(demand, width=width, height=height)))
    if demand.streams > 1:
        changes.append(("1 stream", replace(demand, streams=1)))
    yield from changes
    for count in range(2, len(changes) + 1):
        joined = _joined(demand, [change for _, change in changes[:count]])
        yield " and ".join(what for what, _ in changes[:count]), joined


def _joined(demand: Demand, changes: Sequence[Demand]) -> Demand:
    """The demand with everything that any of the changed ones has otherwise."""
    changed = {
        field.name: getattr(change, field.name)
        for change in changes
        for field in fields(Demand)
        if getattr(change, field.name) != getattr(demand, field.name)
    }
    return replace(demand, **changed)


def transformer_parameters(config: TransformerConfig) -> int:
    """Numbers in `CausalTransformer(config)`."""
    dim, area = config.dim, config.patch[1] * config.patch[2]
    channels = config.latent_channels + config.condition_channels
    linears = [
        (channels * area, dim),
        (config.text_dim, dim),
        (dim, dim),
        (config.freq_dim, dim),
        (dim, dim),
        (dim, 6 * dim),
        (dim, config.latent_channels * area),
    ]
    if config.pooled_text:
        linears.append((config.text_dim, dim))
    total = _linear(linears) + 2 * dim + config.layers * block_parameters(config)
    if width := config.refine_channels:
        area, blocks = REFINE_FACTOR**2, config.refine_blocks
        total += _linear([(channels, area * width), (area * width, config.latent_channels)])
        total += width * area * config.patch[1] * config.patch[2]
        total += _linear([(dim, 2 * width * (blocks + 1))]) + 2 * blocks * _linear([(9 * width, width)])
        if coarse := config.refine_coarse_channels:
            blocks = config.refine_coarse_blocks
            total += _linear([(dim, coarse * config.patch[1] * config.patch[2]), (channels, coarse)])
            total += _linear([(dim, 2 * coarse * (blocks + 1)), (coarse, area * width)])
            total += 2 * blocks * _linear([(9 * coarse, coarse)])
    return total


def block_parameters(config: TransformerConfig) -> int:
    """Numbers in one block of it: q, k, v and output of two attentions, the feed-forward network, norms, modulation."""
    dim = config.dim
    return _linear([(dim, dim)] * 8 + [(dim, config.ffn_dim), (config.ffn_dim, dim)]) + 12 * dim


def _linear(sizes: Sequence[tuple[int, int]]) -> int:
    return sum(inputs * outputs + outputs for inputs, outputs in sizes)


def kv_row_bytes(config: TransformerConfig, tokens: int, item_bytes: int) -> int:
    """Keys and values of all layers over the window, for one stream and one step."""
    return 2 * config.layers * config.window_frames * tokens * config.dim * item_bytes


def prompt_bytes(config: TransformerConfig, item_bytes: int) -> int:
    """Text keys and values of all layers."""
    return 2 * config.layers * config.text_len * config.dim * item_bytes


def _levels(config: WanVAEConfig, width: int, height: int) -> Iterator[tuple[int, int, bool | None]]:
    """From full size down: channels, pixels, and whether the step to the next level also halves time; None: last."""
    steps: list[bool | None] = [*config.temporal_down, None]
    for level, (multiplier, step) in enumerate(zip(config.multipliers, steps, strict=True)):
        yield config.dim * multiplier, (width >> level) * (height >> level), step


def wan_vae_state(config: WanVAEConfig, width: int, height: int) -> tuple[int, int]:
    """Numbers that encoder and decoder hold for one stream: two input frames of each 3-frame convolution."""
    levels = list(_levels(config, width, height))
    full, (top, small, _) = width * height, levels[-1]
    middle = 2 * 4 * top * small
    encoder, channels = 2 * 3 * full, config.dim
    for wide, pixels, halves in levels:
        for _ in range(config.residual_blocks):
            encoder += 2 * (channels + wide) * pixels
            channels = wide
        # One frame, of after the step.
        encoder += channels * pixels // 4 if halves else 0
    encoder += middle + 2 * top * small
    decoder, channels = 2 * config.z_dim * small + middle, top
    for level in reversed(range(len(levels))):
        wide, pixels, _ = levels[level]
        for _ in range(config.residual_blocks + 1):
            decoder += 2 * (channels + wide) * pixels
            channels = wide
        if level:
            decoder += 2 * channels * pixels if levels[level - 1][2] else 0
            channels //= 2
    return encoder, decoder + 2 * channels * full


def wan_vae_parameters(config: WanVAEConfig) -> int:
    """Numbers in `WanVAE(config)`."""
    widths = [config.dim * multiplier for multiplier in config.multipliers]
    top, z = widths[-1], config.z_dim
    middle = 2 * _residual(top, top) + top + _linear([(top, 3 * top), (top, top)])
    total = _conv(3, config.dim, 27) + middle + top + _conv(top, 2 * z, 27)
    channels = config.dim
    for wide, halves in zip(widths, [*config.temporal_down, None], strict=True):
        for _ in range(config.residual_blocks):
            total += _residual(channels, wide)
            channels = wide
        if halves is not None:
            total += _conv(channels, channels, 9) + (_conv(channels, channels, 3) if halves else 0)
    total += _conv(2 * z, 2 * z, 1) + _conv(z, z, 1) + _conv(z, top, 27) + middle
    channels = top
    for wide, halves in zip(reversed(widths), [*reversed(config.temporal_down), None], strict=True):
        for _ in range(config.residual_blocks + 1):
            total += _residual(channels, wide)
            channels = wide
        if halves is not None:
            total += _conv(channels, channels // 2, 9) + (_conv(channels, 2 * channels, 3) if halves else 0)
            channels //= 2
    return total + channels + _conv(channels, 3, 27)


def _conv(inputs: int, outputs: int, taps: int) -> int:
    return inputs * outputs * taps + outputs


def _residual(inputs: int, outputs: int) -> int:
    shortcut = _conv(inputs, outputs, 1) if inputs != outputs else 0
    return inputs + _conv(inputs, outputs, 27) + outputs + _conv(outputs, outputs, 27) + shortcut


def taehv_state(config: TAEHVConfig, width: int, height: int) -> tuple[int, int]:
    """Numbers that the light VAE holds for one stream, encoder and decoder: one frame of each memory block."""
    areas = [(width >> level) * (height >> level) for level in (1, 2, 3)]
    encoder = 3 * width * height + config.memory_blocks * config.encoder_dim * sum(areas)
    decoder = config.memory_blocks * sum(map(prod, zip(config.decoder_dims[:3], reversed(areas), strict=True)))
    return encoder, decoder


def taehv_parameters(config: TAEHVConfig) -> int:
    """Numbers in `TAEHV(config)`."""
    wide, z, dims = config.encoder_dim, config.z_dim, config.decoder_dims
    total = _conv(3, wide, 9) + _conv(wide, z, 9)
    for frames in (2, 2, 1):
        total += frames * wide * wide + wide * wide * 9 + config.memory_blocks * _memory_block(wide)
    total += _conv(z, dims[0], 9) + _conv(dims[3], 3, 9)
    for level, frames in enumerate((1, 2, 2)):
        width, narrower = dims[level], dims[level + 1]
        total += config.memory_blocks * _memory_block(width) + width * frames * width
        total += width * narrower * 9
    return total


def _memory_block(channels: int) -> int:
    return _conv(2 * channels, channels, 9) + 2 * _conv(channels, channels, 9)
