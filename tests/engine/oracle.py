"""The oracle: what the public implementation computes, restated plainly on state dicts with the original Wan names.

Slow on purpose and independent of `engine`: explicit softmax, complex rotation, a ring of Python lists, a VAE of plain
convolutions with explicit memories. `engine.replay` must give what `run_bundle` gives. Dimensions: F latent frames,
T pixel frames, N tokens, Z, C channels, H, W height and width (latent, or pixels where T stands), D model width.

A bundle is a folder: spec.json, dit.safetensors and vae.safetensors (original names), inputs.safetensors
(`prompt_embeds` [1, text_len, text_dim], `video` [1, 3, T, H, W] in [-1, 1]) and noise.safetensors: `noise_CCC_S`
[F, Z, H, W] enters chunk CCC before step S. A result holds `latent_CCC` [F, Z, H, W], clean and before
de-normalising, and `frames_CCC` [T, 3, H, W].
"""

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional

Weights = dict[str, Tensor]
Memory = dict[str, Tensor]
Shapes = dict[str, tuple[int, ...]]
Slots = dict[int, tuple[Tensor, Tensor]]
Mode = Literal["batch", "sequential", "slipping"]

ALL_STEPS = (700, 500, 400, 200)
# Of the 16 latent channels, as the model's authors publish them.
LATENT_MEAN = [-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508]
LATENT_MEAN += [0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921]
LATENT_STD = [2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743]
LATENT_STD += [3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160]


@dataclass(frozen=True)
class Spec:
    """One bundle's shape and settings: spec.json."""

    dim: int = 256
    heads: int = 2
    layers: int = 4
    ffn_dim: int = 512
    text_dim: int = 64
    text_len: int = 16
    text_tokens: int = 10
    freq_dim: int = 256
    vae_dim: int = 16
    z_dim: int = 16
    height: int = 64
    width: int = 96
    chunks: int = 14
    frames_per_block: int = 1
    steps: tuple[int, ...] = (700, 500)
    shift: float = 8.0
    num_kv_cache: int = 6
    num_sink: int = 3
    adapt_sink_threshold: float = -1.0
    noise_scale: float = 0.8
    adaptive_noise: bool = True
    dtype: str = "float32"
    seed: int = 0

    def torch_dtype(self) -> torch.dtype:
        return {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}[self.dtype]

    def latent_frames(self, chunk: int) -> range:
        """Positions of a chunk's latent frames: the first chunk holds one more."""
        return range(chunk and 1 + chunk * self.frames_per_block, 1 + (chunk + 1) * self.frames_per_block)

    def pixel_frames(self, chunk: int) -> range:
        """Places of a chunk's frames in the clip: the first chunk holds one more."""
        block = 4 * self.frames_per_block
        return range(chunk and 1 + chunk * block, 1 + (chunk + 1) * block)


def read_spec(folder: Path) -> Spec:
    fields = json.loads((folder / "spec.json").read_text())
    steps = fields["steps"]
    fields["steps"] = ALL_STEPS[:steps] if isinstance(steps, int) else tuple(steps)
    return Spec(**fields)


# --- sigmas and the noise controller -----------------------------------------------------------------------------


def sigma_of(timestep: float, shift: float) -> float:
    """Sigma of the nearest of 1,000 table entries; an entry's timestep is 1,000 times its sigma."""
    table = [shift * s / (1 + (shift - 1) * s) for s in (1 - i / 1000 for i in range(1000))]
    return min(table, key=lambda sigma: abs(1000 * sigma - timestep))


@dataclass
class NoiseControl:
    """More motion, less noise: the noise scale and the first timestep of one chunk after another."""

    init: float
    first_timestep: int
    adaptive: bool
    previous: float

    def next(self, frames_T3HW: Tensor) -> tuple[float, int]:
        """Take a chunk's frames with the last one before it in front. Motion is in their dtype: bfloat16 rounds it."""
        if not self.adaptive:
            return self.init, self.first_timestep
        rms = (frames_T3HW[1:] - frames_T3HW[:-1]).pow(2).mean((1, 2, 3)).sqrt()
        motion = float((rms.max() / 0.2).clamp(0, 1))
        self.previous = (self.init - 0.1 * motion) * 0.9 + self.previous * 0.1
        return self.previous, int(1000 * self.previous) - 100


# --- transformer -------------------------------------------------------------------------------------------------


def linear(w: Weights, name: str, x: Tensor) -> Tensor:
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def layer_norm(x: Tensor, scale: Tensor | float = 1.0, shift: Tensor | float = 0.0) -> Tensor:
    wide = x.double() if x.dtype == torch.float64 else x.float()
    wide = wide - wide.mean(-1, keepdim=True)
    return (wide / (wide.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()).to(x.dtype) * scale + shift


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.double() if x.dtype == torch.float64 else x.float()
    return (wide / (wide.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()).to(x.dtype) * weight


def gelu(x: Tensor) -> Tensor:
    return functional.gelu(x, approximate="tanh")


def attention(q_NhC: Tensor, k_NhC: Tensor, v_NhC: Tensor) -> Tensor:
    scores = torch.einsum("qhc,khc->hqk", q_NhC, k_NhC) / math.sqrt(q_NhC.shape[-1])
    wide = scores if scores.dtype == torch.float64 else scores.float()
    wide = (wide - wide.amax(-1, keepdim=True)).exp()
    weights = (wide / wide.sum(-1, keepdim=True)).to(scores.dtype)
    return torch.einsum("hqk,khc->qhc", weights, v_NhC).flatten(1)


def turns(pairs: int, position: int, rows: int, columns: int) -> Tensor:
    """[N, 1, pairs] unit complex numbers of one frame: pairs for time first, then height, then width."""
    spatial = pairs // 3
    axes = []
    for index, size in ((0, pairs - 2 * spatial), (1, spatial), (2, spatial)):
        place = [(position, row, column)[index] for row in range(rows) for column in range(columns)]
        speed = 10000.0 ** (-torch.arange(size, dtype=torch.float64) / size)
        axes.append(torch.tensor(place, dtype=torch.float64)[:, None] * speed)
    angles = torch.cat(axes, 1)[:, None]
    return torch.polar(torch.ones_like(angles), angles)


def rotate(x_NhC: Tensor, turns_N1P: Tensor) -> Tensor:
    pairs = torch.view_as_complex(x_NhC.double().reshape(*x_NhC.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * turns_N1P).flatten(-2).to(x_NhC.dtype)


class Ring:
    """One row's keys and values: per layer, a dict from slot to a frame's (K, V). Sinks are never overwritten."""

    def __init__(self, layers: int, slots: int, sinks: int) -> None:
        self.slots, self.sinks, self.ahead = slots, sinks, False
        self.layers: list[Slots] = [{} for _ in range(layers)]

    def slot(self, position: int) -> int:
        if self.ahead and position >= self.slots - 1:
            position += 1
        if position < self.sinks:
            return position
        return self.sinks + (position - self.sinks) % (self.slots - self.sinks)

    def copy(self) -> "Ring":
        twin = Ring(len(self.layers), self.slots, self.sinks)
        twin.layers = [dict(layer) for layer in self.layers]
        return twin


def embed_text(w: Weights, prompt_ND: Tensor) -> Tensor:
    return linear(w, "text_embedding.2", gelu(linear(w, "text_embedding.0", prompt_ND)))


def embed_time(w: Weights, timestep: float, dtype: torch.dtype) -> Tensor:
    half = w["time_embedding.0.weight"].shape[1] // 2
    angles = timestep * 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    wave = torch.cat([angles.cos(), angles.sin()]).to(dtype)
    return linear(w, "time_embedding.2", functional.silu(linear(w, "time_embedding.0", wave)))


def predict_flow(
    w: Weights, heads: int, noisy_FZHW: Tensor, timestep: float, first: int, context_ND: Tensor, ring: Ring
) -> Tensor:
    """One forward of one row: its frames sit at positions first, first + 1, ...; its K and V go into the ring."""
    frames, channels, height, width = noisy_FZHW.shape
    rows, columns = height // 2, width // 2
    length = rows * columns
    # A patch is (channel, row, column), as the convolution's weight lies in memory.
    patches = noisy_FZHW.reshape(frames, channels, rows, 2, columns, 2).permute(0, 2, 4, 1, 3, 5)
    x = patches.reshape(frames * length, -1) @ w["patch_embedding.weight"].flatten(1).T + w["patch_embedding.bias"]

    time = embed_time(w, timestep, x.dtype)
    modulation = linear(w, "time_projection.1", functional.silu(time)).view(6, -1)
    head_size = x.shape[1] // heads
    turn = torch.cat([turns(head_size // 2, first + frame, rows, columns) for frame in range(frames)])

    for index, slots in enumerate(ring.layers):
        block = f"blocks.{index}"
        m = w[f"{block}.modulation"][0] + modulation

        h = layer_norm(x, 1 + m[1], m[0])
        q = rms_norm(linear(w, f"{block}.self_attn.q", h), w[f"{block}.self_attn.norm_q.weight"])
        k = rms_norm(linear(w, f"{block}.self_attn.k", h), w[f"{block}.self_attn.norm_k.weight"])
        q, k = (rotate(each.view(len(x), heads, -1), turn) for each in (q, k))
        v = linear(w, f"{block}.self_attn.v", h).view(len(x), heads, -1)
        for frame in range(frames):
            tokens = slice(frame * length, (frame + 1) * length)
            slots[ring.slot(first + frame)] = (k[tokens], v[tokens])
        keys, values = (torch.cat(each) for each in zip(*slots.values(), strict=True))
        x = x + m[2] * linear(w, f"{block}.self_attn.o", attention(q, keys, values))

        h = layer_norm(x, w[f"{block}.norm3.weight"], w[f"{block}.norm3.bias"])
        q = rms_norm(linear(w, f"{block}.cross_attn.q", h), w[f"{block}.cross_attn.norm_q.weight"])
        k = rms_norm(linear(w, f"{block}.cross_attn.k", context_ND), w[f"{block}.cross_attn.norm_k.weight"])
        v = linear(w, f"{block}.cross_attn.v", context_ND)
        q, k, v = (each.view(len(each), heads, -1) for each in (q, k, v))
        x = x + linear(w, f"{block}.cross_attn.o", attention(q, k, v))

        h = layer_norm(x, 1 + m[4], m[3])
        x = x + m[5] * linear(w, f"{block}.ffn.2", gelu(linear(w, f"{block}.ffn.0", h)))

    m = w["head.modulation"][0] + time
    out = linear(w, "head.head", layer_norm(x, 1 + m[1], m[0]))
    # Tokens are (frame, row, column), each (row in patch, column in patch, channel).
    out = out.reshape(frames, rows, columns, 2, 2, channels).permute(0, 5, 1, 3, 2, 4)
    return out.reshape(frames, channels, height, width)


# --- autoencoder -------------------------------------------------------------------------------------------------


def causal_conv(w: Weights, name: str, x_BCTHW: Tensor, memory: Memory) -> Tensor:
    """Three frames deep: the two frames before come from the memory, zeros at the start."""
    weight = w[f"{name}.weight"]
    before = memory.get(name, torch.zeros_like(x_BCTHW[:, :, :1]).repeat(1, 1, 2, 1, 1))
    x = torch.cat([before, x_BCTHW], 2)
    memory[name] = x[:, :, -2:]
    side = weight.shape[-1] // 2
    return functional.conv3d(x, weight, w[f"{name}.bias"], padding=(0, side, side))


def channel_norm(w: Weights, name: str, x_BCTHW: Tensor) -> Tensor:
    gamma = w[f"{name}.gamma"].flatten().view(1, -1, 1, 1, 1)
    wide = x_BCTHW if x_BCTHW.dtype == torch.float64 else x_BCTHW.float()
    length = wide.pow(2).sum(1, keepdim=True).sqrt().clamp(min=1e-12)
    return (wide / length).to(x_BCTHW.dtype) * math.sqrt(x_BCTHW.shape[1]) * gamma


def residual(w: Weights, name: str, x: Tensor, memory: Memory) -> Tensor:
    h = functional.silu(channel_norm(w, f"{name}.residual.0", x))
    h = causal_conv(w, f"{name}.residual.2", h, memory)
    h = functional.silu(channel_norm(w, f"{name}.residual.3", h))
    h = causal_conv(w, f"{name}.residual.6", h, memory)
    if f"{name}.shortcut.weight" in w:
        x = functional.conv3d(x, w[f"{name}.shortcut.weight"], w[f"{name}.shortcut.bias"])
    return x + h


def spatial_attention(w: Weights, name: str, x_BCTHW: Tensor) -> Tensor:
    """One head; a frame's places see each other."""
    batch, channels, frames, height, width = x_BCTHW.shape
    h = channel_norm(w, f"{name}.norm", x_BCTHW).permute(0, 2, 3, 4, 1).reshape(batch * frames, -1, 1, channels)
    q, k, v = (h @ w[f"{name}.to_qkv.weight"].flatten(1).T + w[f"{name}.to_qkv.bias"]).chunk(3, -1)
    h = torch.stack([attention(*each) for each in zip(q, k, v, strict=True)])
    h = h @ w[f"{name}.proj.weight"].flatten(1).T + w[f"{name}.proj.bias"]
    return x_BCTHW + h.reshape(batch, frames, height, width, channels).permute(0, 4, 1, 2, 3)


def downsample(w: Weights, name: str, x_BCTHW: Tensor, memory: Memory) -> Tensor:
    frames = [
        functional.conv2d(frame, w[f"{name}.resample.1.weight"], w[f"{name}.resample.1.bias"], stride=2)
        for frame in functional.pad(x_BCTHW, (0, 1, 0, 1)).unbind(2)
    ]
    x = torch.stack(frames, 2)
    time_conv = f"{name}.time_conv"
    if f"{time_conv}.weight" not in w:
        return x
    before, memory[time_conv] = memory.get(time_conv), x[:, :, -1:]
    if before is None:  # the stream's first frame is its own latent
        return x
    x = torch.cat([before, x], 2)
    return functional.conv3d(x, w[f"{time_conv}.weight"], w[f"{time_conv}.bias"], stride=(2, 1, 1))


def upsample(w: Weights, name: str, x_BCTHW: Tensor, memory: Memory) -> Tensor:
    time_conv, started = f"{name}.time_conv", f"{name}.started"
    if f"{time_conv}.weight" in w:
        if started in memory:
            # Twice the channels become twice the frames; the stream's first frame is no part of the history.
            both = causal_conv(w, time_conv, x_BCTHW, memory)
            x_BCTHW = torch.stack(both.chunk(2, 1), 3).flatten(2, 3)
        memory[started] = torch.ones(())
    frames = [
        functional.conv2d(
            frame.repeat_interleave(2, 2).repeat_interleave(2, 3),
            w[f"{name}.resample.1.weight"],
            w[f"{name}.resample.1.bias"],
            padding=1,
        )
        for frame in x_BCTHW.unbind(2)
    ]
    return torch.stack(frames, 2)


def levels(w: Weights, name: str, x: Tensor, memory: Memory) -> Tensor:
    """Run name.0, name.1, ...: what each one is shows in the names of its weights."""
    index = 0
    while any(key.startswith(f"{name}.{index}.") for key in w):
        part = f"{name}.{index}"
        if f"{part}.residual.0.gamma" in w:
            x = residual(w, part, x, memory)
        elif name.startswith("encoder"):
            x = downsample(w, part, x, memory)
        else:
            x = upsample(w, part, x, memory)
        index += 1
    return x


def middle(w: Weights, name: str, x: Tensor, memory: Memory) -> Tensor:
    x = residual(w, f"{name}.0", x, memory)
    x = spatial_attention(w, f"{name}.1", x)
    return residual(w, f"{name}.2", x, memory)


def head(w: Weights, name: str, x: Tensor, memory: Memory) -> Tensor:
    return causal_conv(w, f"{name}.2", functional.silu(channel_norm(w, f"{name}.0", x)), memory)


def encode(w: Weights, frames_BCTHW: Tensor, memory: Memory) -> Tensor:
    """The raw mean of the latent distribution: one latent for a stream's first frame, then one for every four."""
    cuts = sorted({0, *range(0 if memory else 1, frames_BCTHW.shape[2] + 1, 4)})
    parts = []
    for start, end in pairwise(cuts):
        x = causal_conv(w, "encoder.conv1", frames_BCTHW[:, :, start:end], memory)
        x = middle(w, "encoder.middle", levels(w, "encoder.downsamples", x, memory), memory)
        parts.append(head(w, "encoder.head", x, memory))
    both = functional.conv3d(torch.cat(parts, 2), w["conv1.weight"], w["conv1.bias"])
    return both.chunk(2, 1)[0]


def decode(w: Weights, latent_BCTHW: Tensor, memory: Memory) -> Tensor:
    """Frames in [-1, 1] from a de-normalised latent: one for a stream's first latent frame, then four for each."""
    parts = []
    for x in functional.conv3d(latent_BCTHW, w["conv2.weight"], w["conv2.bias"]).unbind(2):
        x = x[:, :, None]
        x = middle(w, "decoder.middle", causal_conv(w, "decoder.conv1", x, memory), memory)
        parts.append(head(w, "decoder.head", levels(w, "decoder.upsamples", x, memory), memory))
    return torch.cat(parts, 2).clamp(-1, 1)


# --- a whole session ---------------------------------------------------------------------------------------------


class Session:
    """One stream from its first chunk on. A row is a denoising step's ring; sequential mode has one for all steps.

    Slipping is sequential mode as published, a mistake not to be copied: its count of a chunk's passes starts with the
    ring's first eviction, which the second pass of the frame that fills the ring sets off. From there on a chunk's
    first pass writes to its own slot and the others to the next one, which the next chunk's first pass overwrites: a
    chunk sees itself twice, and the past as the first pass left it. With one step there is no difference.
    """

    def __init__(self, folder: Path, dtype: torch.dtype | None, *, slipping: bool = False) -> None:
        self.spec = read_spec(folder)
        if self.spec.adapt_sink_threshold >= 0:
            raise ValueError(f"adapt_sink_threshold {self.spec.adapt_sink_threshold} must be negative: no refresh here")
        self.dtype = dtype or self.spec.torch_dtype()
        self.wide = torch.float64 if self.dtype == torch.float64 else torch.float32
        self.dit, self.vae, self.noise = (
            {name: tensor.to(self.dtype) for name, tensor in load_file(folder / f"{part}.safetensors").items()}
            for part in ("dit", "vae", "noise")
        )
        inputs = load_file(folder / "inputs.safetensors")
        self.video = inputs["video"].to(self.spec.torch_dtype())
        self.context = embed_text(self.dit, inputs["prompt_embeds"][0].to(self.dtype))
        self.encoder: Memory = {}
        self.decoder: Memory = {}
        spec = self.spec
        self.ring = Ring(spec.layers, spec.num_kv_cache, spec.num_sink)
        self.control = NoiseControl(spec.noise_scale, spec.steps[0], spec.adaptive_noise, spec.noise_scale)
        self.slipping = slipping
        self.results: dict[str, Tensor] = {}

    def mixed(self, chunk: int) -> tuple[Tensor, int]:
        """A chunk's latent under its noise, and the timestep of its first step."""
        spec, frames = self.spec, self.spec.pixel_frames(chunk)
        video = self.video[:, :, frames.start : frames.stop].to(self.dtype)
        latent = encode(self.vae, video, self.encoder)[0].transpose(0, 1)
        scale, timestep = spec.noise_scale, spec.steps[0]
        if chunk:
            scale, timestep = self.control.next(self.video[0, :, frames.start - 1 : frames.stop].transpose(0, 1))
        return self.noise[f"noise_{chunk:03d}_0"] * scale + latent * (1 - scale), timestep

    def clean(self, chunk: int, noisy: Tensor, timestep: int, ring: Ring) -> Tensor:
        first = self.spec.latent_frames(chunk).start
        flow = predict_flow(self.dit, self.spec.heads, noisy, timestep, first, self.context, ring)
        return (noisy.double() - sigma_of(timestep, self.spec.shift) * flow.double()).to(self.dtype)

    def renoised(self, chunk: int, clean: Tensor, step: int) -> Tensor:
        sigma = torch.tensor(sigma_of(self.spec.steps[step], self.spec.shift), dtype=self.wide)
        noise = self.noise[f"noise_{chunk:03d}_{step}"]
        return ((1 - sigma) * clean.to(self.wide) + sigma * noise.to(self.wide)).to(self.dtype)

    def finish(self, chunk: int, clean: Tensor) -> None:
        mean, std = (torch.tensor(each).to(self.dtype).view(-1, 1, 1, 1) for each in (LATENT_MEAN, LATENT_STD))
        frames = decode(self.vae, (clean.transpose(0, 1) * std + mean)[None], self.decoder)[0].transpose(0, 1)
        self.results[f"latent_{chunk:03d}"] = clean.float().contiguous()
        self.results[f"frames_{chunk:03d}"] = frames.float().contiguous()

    def all_steps(self, chunk: int) -> None:
        """One step after another over the same ring: the last one's K and V stay."""
        noisy, timestep = self.mixed(chunk)
        self.ring.ahead = False
        clean = self.clean(chunk, noisy, timestep, self.ring)
        self.ring.ahead = self.slipping
        for step in range(1, len(self.spec.steps)):
            clean = self.clean(chunk, self.renoised(chunk, clean, step), self.spec.steps[step], self.ring)
        self.finish(chunk, clean)

    def stream_batch(self) -> None:
        """Chunks 1, 2, ... enter row 0 one a tick and move a row a tick, each row with its own ring."""
        steps, last = self.spec.steps, self.spec.chunks
        rings = [self.ring.copy() for _ in steps]
        rows: list[tuple[int, Tensor] | None] = [None] * len(steps)
        for tick in range(1, last + len(steps)):
            timesteps = list(steps)
            entering = None
            if tick <= last:
                noisy, timesteps[0] = self.mixed(tick)
                entering = (tick, noisy)
            rows = [entering, *rows[:-1]]
            for row, item in enumerate(rows):
                if item is None:
                    continue
                chunk, noisy = item
                clean = self.clean(chunk, noisy, timesteps[row], rings[row])
                if row == len(steps) - 1:
                    self.finish(chunk, clean)
                else:
                    rows[row] = (chunk, self.renoised(chunk, clean, row + 1))


def run_bundle(folder: Path, mode: Mode, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """All of a bundle's `latent_CCC` and `frames_CCC`, float32, computed in `dtype` (default: the bundle's)."""
    session = Session(folder, dtype, slipping=mode == "slipping")
    session.all_steps(0)
    if mode == "batch":
        session.stream_batch()
    else:
        for chunk in range(1, session.spec.chunks + 1):
            session.all_steps(chunk)
    return session.results


# --- making bundles ----------------------------------------------------------------------------------------------


def dit_shapes(spec: Spec) -> Shapes:
    dim, ffn = spec.dim, spec.ffn_dim
    shapes: Shapes = {"patch_embedding.weight": (dim, spec.z_dim, 1, 2, 2), "patch_embedding.bias": (dim,)}
    linears: Shapes = {
        "text_embedding.0": (dim, spec.text_dim),
        "text_embedding.2": (dim, dim),
        "time_embedding.0": (dim, spec.freq_dim),
        "time_embedding.2": (dim, dim),
        "time_projection.1": (6 * dim, dim),
        "head.head": (4 * spec.z_dim, dim),
    }
    for index in range(spec.layers):
        block = f"blocks.{index}"
        for part in ("self_attn", "cross_attn"):
            linears |= {f"{block}.{part}.{each}": (dim, dim) for each in "qkvo"}
            shapes |= {f"{block}.{part}.norm_{each}.weight": (dim,) for each in "qk"}
        linears |= {f"{block}.ffn.0": (ffn, dim), f"{block}.ffn.2": (dim, ffn)}
        shapes |= {f"{block}.norm3.{each}": (dim,) for each in ("weight", "bias")}
        shapes[f"{block}.modulation"] = (1, 6, dim)
    shapes["head.modulation"] = (1, 2, dim)
    for name, shape in linears.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return shapes


def vae_shapes(spec: Spec) -> Shapes:
    """Wan 2.1's autoencoder: widths 1, 2, 4, 4 times vae_dim, 2 residual blocks a level, 3 in the decoder."""
    shapes: Shapes = {}
    base, z = spec.vae_dim, spec.z_dim

    def conv(name: str, inside: int, outside: int, *kernel: int) -> None:
        shapes.update({f"{name}.weight": (outside, inside, *kernel), f"{name}.bias": (outside,)})

    def residual_block(name: str, inside: int, outside: int) -> None:
        shapes.update({f"{name}.residual.0.gamma": (inside, 1, 1, 1), f"{name}.residual.3.gamma": (outside, 1, 1, 1)})
        conv(f"{name}.residual.2", inside, outside, 3, 3, 3)
        conv(f"{name}.residual.6", outside, outside, 3, 3, 3)
        if inside != outside:
            conv(f"{name}.shortcut", inside, outside, 1, 1, 1)

    def middle_and_head(name: str, head_inside: int, outside: int) -> None:
        residual_block(f"{name}.middle.0", 4 * base, 4 * base)
        shapes[f"{name}.middle.1.norm.gamma"] = (4 * base, 1, 1)
        conv(f"{name}.middle.1.to_qkv", 4 * base, 12 * base, 1, 1)
        conv(f"{name}.middle.1.proj", 4 * base, 4 * base, 1, 1)
        residual_block(f"{name}.middle.2", 4 * base, 4 * base)
        shapes[f"{name}.head.0.gamma"] = (head_inside, 1, 1, 1)
        conv(f"{name}.head.2", head_inside, outside, 3, 3, 3)

    conv("encoder.conv1", 3, base, 3, 3, 3)
    index, inside = 0, base
    for level, times in enumerate((1, 2, 4, 4)):
        for _ in range(2):
            residual_block(f"encoder.downsamples.{index}", inside, times * base)
            index, inside = index + 1, times * base
        if level < 3:
            conv(f"encoder.downsamples.{index}.resample.1", inside, inside, 3, 3)
            if level > 0:
                conv(f"encoder.downsamples.{index}.time_conv", inside, inside, 3, 1, 1)
            index += 1
    middle_and_head("encoder", 4 * base, 2 * z)
    conv("conv1", 2 * z, 2 * z, 1, 1, 1)

    conv("conv2", z, z, 1, 1, 1)
    conv("decoder.conv1", z, 4 * base, 3, 3, 3)
    index, inside = 0, 4 * base
    for level, times in enumerate((4, 4, 2, 1)):
        for _ in range(3):
            residual_block(f"decoder.upsamples.{index}", inside, times * base)
            index, inside = index + 1, times * base
        if level < 3:
            conv(f"decoder.upsamples.{index}.resample.1", inside, inside // 2, 3, 3)
            if level < 2:
                conv(f"decoder.upsamples.{index}.time_conv", inside, 2 * inside, 3, 1, 1)
            index, inside = index + 1, inside // 2
    middle_and_head("decoder", base, 3)
    return shapes


def random_weights(shapes: Shapes, random: torch.Generator) -> Weights:
    """Scales at which activations neither explode nor vanish, and no parameter is one that would hide a mistake."""
    weights: Weights = {}
    for name, shape in sorted(shapes.items()):
        noise = torch.randn(shape, generator=random)
        if name.endswith("modulation"):
            weights[name] = noise / math.sqrt(shape[-1])
        elif name.endswith("gamma") or (name.endswith("weight") and len(shape) == 1):
            weights[name] = 1 + 0.1 * noise
        elif name.endswith("bias"):
            weights[name] = 0.1 * noise
        else:
            weights[name] = noise / math.sqrt(math.prod(shape[1:]))
    return weights


def random_video(spec: Spec, random: torch.Generator) -> Tensor:
    """[1, 3, T, H, W] in [-1, 1]: waves that stand still, drift and rush by turns, so that the noise scale moves."""
    frames = spec.pixel_frames(spec.chunks).stop
    speeds: Sequence[float] = (0.02, 0.0, 0.1, 0.4, 0.03)
    moved = torch.tensor([speeds[frame // 4 % len(speeds)] for frame in range(frames)]).cumsum(0)
    rows, columns = torch.meshgrid(torch.linspace(0, 1, spec.height), torch.linspace(0, 1, spec.width), indexing="ij")
    video = torch.zeros(3, frames, spec.height, spec.width)
    for _ in range(4):
        across, down, speed = (torch.randn(3, generator=random) * torch.tensor([9.0, 9.0, 2.0])).tolist()
        phase = torch.rand(3, generator=random) * math.tau
        wave = across * columns[None, None] + down * rows[None, None] + speed * moved[None, :, None, None]
        video += torch.sin(wave + phase[:, None, None, None]) / 4
    return video[None]


def make_bundle(folder: Path, spec: Spec, seed: int) -> Path:
    """Write a bundle of random weights, prompt, video and noise, all rounded to the spec's dtype."""
    spec = dataclasses.replace(spec, seed=seed)
    random, dtype = torch.Generator().manual_seed(seed), spec.torch_dtype()
    prompt = torch.randn(1, spec.text_len, spec.text_dim, generator=random)
    prompt[:, spec.text_tokens :] = 0
    parts = {
        "dit": random_weights(dit_shapes(spec), random),
        "vae": random_weights(vae_shapes(spec), random),
        "inputs": {"prompt_embeds": prompt, "video": random_video(spec, random)},
        "noise": {
            f"noise_{chunk:03d}_{step}": torch.randn(
                len(spec.latent_frames(chunk)), spec.z_dim, spec.height // 8, spec.width // 8, generator=random
            )
            for chunk in range(spec.chunks + 1)
            for step in range(len(spec.steps))
        },
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "spec.json").write_text(json.dumps(dataclasses.asdict(spec), indent=2) + "\n")
    for part, tensors in parts.items():
        save_file({name: tensor.to(dtype) for name, tensor in tensors.items()}, folder / f"{part}.safetensors")
    return folder
