"""The causal diffusion transformer of Wan 2.1: one class from livebrush-tiny to 14B.

Axes in names: B batch, T latent frames, C latent channels, H and W latent rows and columns, N tokens, E model
width (dim), G heads, D channels of one head, L text positions, K text width.

What differs from Wan is switched on by the configuration alone: source latents as further input channels, the
mean prompt embedding added to the time embedding, prediction of the residual on the source, and a few
convolutions on the predicted latent. Tokens of one chunk see each other, the sink frames and the rolling window.
How they get at the keys of earlier frames is the business of an `Attention`: `ClipAttention` here has the whole
clip at hand (training, tests), `engine.kv_cache` holds what streams keep. By default both place the visible frames
at positions 0, 1, and so on (sinks first, the newest last), so a stream never runs out of positions.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from engine.wan.presets import REFINE_FACTOR, TransformerConfig
from engine.wan.refiner import Refiner
from engine.wan.rope import Rotation, rope_rotation, rotate


@dataclass(frozen=True)
class PromptContext:
    """What the transformer keeps of a prompt: text keys and values [B, G, L, D] per layer, and the pooled
    embedding [B, E] where the model takes one. B is 1 where all rows of a pass share the prompt.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    pooled: Tensor | None

    @staticmethod
    def joined(contexts: Sequence["PromptContext"]) -> "PromptContext":
        """The contexts of several rows as one batch; of one row, which all share, where they are the same."""
        first = contexts[0]
        if all(context is first for context in contexts):
            return first
        layers = range(len(first.keys))
        pooled = [context.pooled for context in contexts if context.pooled is not None]
        return PromptContext(
            tuple(torch.cat([context.keys[layer] for context in contexts]) for layer in layers),
            tuple(torch.cat([context.values[layer] for context in contexts]) for layer in layers),
            torch.cat(pooled) if pooled else None,
        )


class Attention(Protocol):
    """Self attention over everything a chunk may see."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend from q [B, N, G, D] to k and v of the same tokens and of what came before; like q.

        q and k come after their norm and before rotation.
        """


class ClipAttention:
    """Whole-clip attention: each chunk sees itself, the sinks and its own window, exactly as when streaming.

    A loop over chunks without a mask: it skips what a masked product would throw away, and it lets keys take the
    positions they have in the window of each query, which change as the window rolls.
    """

    def __init__(
        self, config: TransformerConfig, grid: tuple[int, int, int], chunks: Sequence[int], rotation: Rotation
    ) -> None:
        """Prepare for a clip.

        Args:
            grid: frames, token rows, token columns of the clip.
            chunks: latent frames per chunk, in order; their sum is the clip's length.
            rotation: tables for min(frames, window) frames of this grid.
        """
        frames, rows, columns = grid
        if sum(chunks) != frames or min(chunks) < 1:
            raise ValueError(f"chunks {tuple(chunks)} must be positive and add up to {frames} latent frames")
        if max(chunks) > config.window_frames - config.sink_frames:
            raise ValueError(
                f"a chunk of {max(chunks)} latent frames does not fit the rolling part of the window, "
                f"{config.window_frames - config.sink_frames}"
            )
        self._window, self._sink = config.window_frames, config.sink_frames
        self._tokens = rows * columns
        self._chunks = tuple(chunks)
        self._rotation = rotation.over_heads()

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See `Attention.attend`; the same for every layer."""
        n, window = self._tokens, self._window
        prefix = min(k.shape[1] // n, window)
        rotated = rotate(k[:, : prefix * n], self._rotation.narrow(0, prefix * n))
        out, end = [], 0
        for length in self._chunks:
            start, end = end, end + length
            seen = min(end, window)
            if end <= window:
                keys, values = rotated[:, : end * n], v[:, : end * n]
            else:
                oldest = end - window + self._sink
                spans = (slice(0, self._sink * n), slice(oldest * n, end * n))
                keys = torch.cat([k[:, span] for span in spans], dim=1)
                keys = rotate(keys, self._rotation.narrow(0, window * n))
                values = torch.cat([v[:, span] for span in spans], dim=1)
            place = self._rotation.narrow((seen - length) * n, length * n)
            query = rotate(q[:, start * n : end * n], place)
            q_BGND, k_BGND, v_BGND = (x.transpose(1, 2) for x in (query, keys, values))
            out.append(functional.scaled_dot_product_attention(q_BGND, k_BGND, v_BGND).transpose(1, 2))
        return torch.cat(out, dim=1)


def timestep_embedding(timestep_B: Tensor, width: int) -> Tensor:
    """Cosines, then sines, of timestep * 10000 ** (-i / half), float32 [B, width].

    Args:
        timestep_B: 0 (clean) to 1000 (pure noise).
    Source: Wan 2.1; the angles are formed in float64 as there.
    """
    half = width // 2
    index = torch.arange(half, dtype=torch.float64, device=timestep_B.device)
    angle = timestep_B.double()[:, None] * 10000.0 ** (-index / half)
    return torch.cat((angle.cos(), angle.sin()), dim=-1).float()


def _split_heads(x_BNE: Tensor, heads: int) -> Tensor:
    return x_BNE.view(*x_BNE.shape[:-1], heads, -1)


class SelfAttention(nn.Module):
    """Fused q, k, v projection with RMS norm over all heads together on q and k."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.heads, self.eps = config.heads, config.eps
        self.qkv = nn.Linear(config.dim, 3 * config.dim)
        self.norm_q = nn.RMSNorm(config.dim, eps=config.eps)
        self.norm_k = nn.RMSNorm(config.dim, eps=config.eps)
        self.out = nn.Linear(config.dim, config.dim)

    def forward(self, x_BNE: Tensor, layer: int, attention: Attention) -> Tensor:
        """Attend by `attention`; [B, N, E]."""
        qkv_BN3E = self.qkv(x_BNE).view(*x_BNE.shape[:-1], 3, -1)
        # One norm for both; the weights of each after it.
        q, k = functional.rms_norm(qkv_BN3E[..., :2, :], x_BNE.shape[-1:], eps=self.eps).unbind(2)
        q, k, v = q * self.norm_q.weight, k * self.norm_k.weight, qkv_BN3E[..., 2, :]
        q, k, v = (_split_heads(y, self.heads) for y in (q, k, v))
        out: Tensor = self.out(attention.attend(layer, q, k, v).flatten(2))
        return out


class CrossAttention(nn.Module):
    """Attention to the prompt, without positions; padding rows are attended too, as Wan does."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.q = nn.Linear(config.dim, config.dim)
        self.kv = nn.Linear(config.dim, 2 * config.dim)
        self.norm_q = nn.RMSNorm(config.dim, eps=config.eps)
        self.norm_k = nn.RMSNorm(config.dim, eps=config.eps)
        self.out = nn.Linear(config.dim, config.dim)

    def keys_values(self, text_BLE: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of the embedded prompt, each [B, G, L, D]."""
        k, v = self.kv(text_BLE).chunk(2, dim=-1)
        k, v = (_split_heads(x, self.heads).transpose(1, 2).contiguous() for x in (self.norm_k(k), v))
        return k, v

    def forward(self, x_BNE: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attend to what `keys_values` returned; [B, N, E]."""
        # Rows that share a prompt are one long row: its keys and values are then read once.
        rows = x_BNE.flatten(0, 1)[None] if key.shape[0] == 1 else x_BNE
        q = _split_heads(self.norm_q(self.q(rows)), self.heads).transpose(1, 2)
        attended = functional.scaled_dot_product_attention(q, key, value).transpose(1, 2).flatten(2)
        out: Tensor = self.out(attended).view_as(x_BNE)
        return out


def _modulation(rows: int, dim: int) -> nn.Parameter:
    values = torch.empty(rows, dim)
    # Without values, before the weights are loaded, either would import torch's compiler: a second of a start.
    return nn.Parameter(values if values.is_meta else values.normal_() / dim**0.5)


class Block(nn.Module):
    """One transformer block; its six modulation vectors are its table plus the shared time projection, and are made by
    the whole (`CausalTransformer._modulations`)."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.eps = config.eps
        self.modulation = _modulation(6, config.dim)
        self.self_attn = SelfAttention(config)
        self.cross_norm = nn.LayerNorm(config.dim, eps=config.eps)
        self.cross_attn = CrossAttention(config)
        self.ffn = nn.Sequential(
            nn.Linear(config.dim, config.ffn_dim),
            nn.GELU(approximate="tanh"),
            nn.Linear(config.ffn_dim, config.dim),
        )

    def forward(
        self, x_BNE: Tensor, modulation_B61E: Tensor, layer: int, prompt: PromptContext, attention: Attention
    ) -> Tensor:
        """Self attention, cross attention, feed-forward, each added to its input."""
        m = modulation_B61E.unbind(1)
        attended = self.self_attn(_modulate(x_BNE, m[0], m[1], self.eps), layer, attention)
        x_BNE = torch.addcmul(x_BNE, attended, m[2])
        x_BNE = x_BNE + self.cross_attn(self.cross_norm(x_BNE), prompt.keys[layer], prompt.values[layer])
        return torch.addcmul(x_BNE, self.ffn(_modulate(x_BNE, m[3], m[4], self.eps)), m[5])


def _modulate(x_BNE: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """Norm, scale (about 1) and shift (about 0)."""
    return torch.addcmul(shift, functional.layer_norm(x_BNE, x_BNE.shape[-1:], eps=eps), scale)


class CausalTransformer(nn.Module):
    """Denoises latents chunk by chunk. Holds weights only: what belongs to a stream comes as an argument."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        dim, area = config.dim, config.patch[1] * config.patch[2]
        self.patch_embed = nn.Linear((config.latent_channels + config.condition_channels) * area, dim)
        self.text_embed = nn.Sequential(
            nn.Linear(config.text_dim, dim), nn.GELU(approximate="tanh"), nn.Linear(dim, dim)
        )
        self.time_embed = nn.Sequential(nn.Linear(config.freq_dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.time_project = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.pooled_embed = nn.Linear(config.text_dim, dim) if config.pooled_text else None
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.head_modulation = _modulation(2, dim)
        self.head = nn.Linear(dim, config.latent_channels * area)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self.refine = Refiner(config) if config.refine_channels else None

    def grid(self, latent_BTCHW: Tensor) -> tuple[int, int, int]:
        """Latent frames, token rows and token columns; ValueError if the patch does not divide it."""
        _, frames, _, height, width = latent_BTCHW.shape
        _, rows, columns = self.config.patch
        if height % rows or width % columns:
            raise ValueError(f"latent size {width}x{height} must be a multiple of the patch {columns}x{rows}")
        return frames, height // rows, width // columns

    def look(self, latent_BTCHW: Tensor) -> Tensor:
        """What a chunk looks like on the whole: its patch embedding averaged over all tokens, without bias [B, E].

        Noise averages out and so does motion; a cut or another place does not.
        """
        pooled = self._patchify(latent_BTCHW).mean(dim=1)
        weight = self.patch_embed.weight[:, : pooled.shape[-1]]
        return functional.linear(pooled, weight)

    def prompt_context(
        self, text_BLK: Tensor, mean_BK: Tensor | None = None, layers: range | None = None
    ) -> PromptContext:
        """Text keys and values of all layers; run once per prompt, not per chunk.

        Args:
            text_BLK: text encoder states, padded with zero rows to text_len.
            mean_BK: mean state over the true pieces; needed where the configuration has pooled_text.
            layers: these alone, for `through`.
        """
        text_BLE = self.text_embed(text_BLK)
        blocks = self._blocks() if layers is None else self._blocks()[layers.start : layers.stop]
        pairs = [block.cross_attn.keys_values(text_BLE) for block in blocks]
        pooled = None
        if self.pooled_embed is not None:
            if mean_BK is None:
                raise ValueError("this model adds the mean prompt embedding to the time: pass mean_BK")
            pooled = self.pooled_embed(mean_BK)
        return PromptContext(tuple(k for k, _ in pairs), tuple(v for _, v in pairs), pooled)

    def forward(
        self,
        noisy_BTCHW: Tensor,
        source_BTCHW: Tensor | None,
        timestep_B: Tensor,
        prompt: PromptContext,
        attention: Attention,
    ) -> Tensor:
        """One pass over the frames given; what came before is in `attention`.

        Args:
            noisy_BTCHW: x_t, in the model's dtype.
            source_BTCHW: source latent with condition_channels channels, None where the model takes none.
            timestep_B: 1000 * sigma, float32.

        Returns: flow or source residual, as the configuration's `prediction` says; shape of noisy_BTCHW.
        """
        grid = self.grid(noisy_BTCHW)
        time_BE = self.time(timestep_B, prompt.pooled, noisy_BTCHW.dtype)
        x_BNE = self.enter(noisy_BTCHW, source_BTCHW)
        x_BNE = self.through(x_BNE, time_BE, prompt, attention, range(self.config.layers))
        return self.leave(x_BNE, time_BE, grid, source_BTCHW)

    # --- the parts of a pass, each of which may run on a device of its own

    def time(self, timestep_B: Tensor, pooled_BE: Tensor | None, dtype: torch.dtype) -> Tensor:
        """What all blocks and the head know of the noise level, and of the prompt as a whole [B, E]."""
        time_BE: Tensor = self.time_embed(timestep_embedding(timestep_B, self.config.freq_dim).to(dtype))
        return time_BE if pooled_BE is None else time_BE + pooled_BE

    def enter(self, noisy_BTCHW: Tensor, source_BTCHW: Tensor | None) -> Tensor:
        """Latents to the tokens that the first block takes [B, N, E]."""
        x_BTCHW = noisy_BTCHW if source_BTCHW is None else torch.cat((noisy_BTCHW, source_BTCHW), dim=2)
        x_BNE: Tensor = self.patch_embed(self._patchify(x_BTCHW))
        return x_BNE

    def through(
        self, x_BNE: Tensor, time_BE: Tensor, prompt: PromptContext, attention: Attention, layers: range
    ) -> Tensor:
        """Tokens through neighbouring blocks; prompt and attention hold these layers alone, the first of them at 0."""
        if not layers:
            return x_BNE
        time_B6E = self.time_project(time_BE).view(-1, 6, self.config.dim)
        for place, modulation_B61E in enumerate(self._modulations(time_B6E, layers)):
            x_BNE = self.blocks[layers.start + place](x_BNE, modulation_B61E, place, prompt, attention)
        return x_BNE

    def leave(self, x_BNE: Tensor, time_BE: Tensor, grid: tuple[int, int, int], source_BTCHW: Tensor | None) -> Tensor:
        """Tokens of the last block to what `forward` returns."""
        carried: tuple[Tensor, ...] = (x_BNE,)
        film = self.film(time_BE, grid[0])
        for part in range(self.tail_parts):
            carried = self.tail(part, carried, time_BE, film, grid, source_BTCHW)
        return carried[0]

    @property
    def tail_parts(self) -> int:
        """Of how many parts `leave` consists: the head, then the refiner's blocks one by one."""
        return 1 if self.refine is None else 1 + len(self.refine.blocks)

    @property
    def refiner_values(self) -> int:
        """Values of the refiner's features for each place of a latent; 0 without one."""
        return REFINE_FACTOR**2 * self.config.refine_channels

    def film(self, time_BE: Tensor, frames: int) -> tuple[Tensor, ...]:
        """What the refiner knows of time and prompt, for `tail`; nothing without one."""
        return () if self.refine is None else self.refine.modulation(time_BE, frames)

    def tail(
        self,
        part: int,
        carried: tuple[Tensor, ...],
        time_BE: Tensor,
        film: Sequence[Tensor],
        grid: tuple[int, int, int],
        source_BTCHW: Tensor | None,
    ) -> tuple[Tensor, ...]:
        """One part of `leave`: takes what the part before it returned, the first one the tokens; the last returns what
        `forward` does."""
        refine = self.refine
        if part == 0:
            (x_BNE,) = carried
            shift, scale = (self.head_modulation + time_BE[:, None]).unsqueeze(2).unbind(1)
            x_BNE = _modulate(x_BNE, shift, 1 + scale, self.config.eps)
            out = self._unpatchify(self.head(x_BNE), *grid)
            if refine is None:
                return (out,)
            hints = None if refine.hint is None else self._unpatchify(refine.hint(x_BNE), *grid)
            return out, refine.begin(out, source_BTCHW, film, hints)
        assert refine is not None  # there are no other parts
        out, x_NCHW = carried
        x_NCHW = refine.through(x_NCHW, film, part - 1)
        return (refine.end(x_NCHW, out),) if part == len(refine.blocks) else (out, x_NCHW)

    def forward_clip(
        self,
        noisy_BTCHW: Tensor,
        source_BTCHW: Tensor | None,
        timestep_B: Tensor,
        prompt: PromptContext,
        *,
        chunks: Sequence[int] | None = None,
        origin: tuple[int, int] = (0, 0),
    ) -> Tensor:
        """The whole clip at once, equal to streaming it in one step a chunk; for training and tests.

        Args:
            chunks: latent frames per chunk; one each by default. The clip may be longer than the window.
            origin: token row and column of the top left corner, where the clip is a crop of a larger picture.
        """
        grid = self.grid(noisy_BTCHW)
        frames, rows, columns = grid
        rotation = rope_rotation(
            self.config.head_dim,
            min(frames, self.config.window_frames),
            rows,
            columns,
            origin=origin,
            device=noisy_BTCHW.device,
        )
        attention = ClipAttention(self.config, grid, chunks or (1,) * frames, rotation)
        out: Tensor = self(noisy_BTCHW, source_BTCHW, timestep_B, prompt, attention)
        return out

    def _blocks(self) -> list[Block]:
        return [block for block in self.blocks if isinstance(block, Block)]

    def _modulations(self, time_B6E: Tensor, layers: range) -> tuple[Tensor, ...]:
        """Shift, scale and gate of both halves of every block, [B, 6, 1, E] each, with 1 added to the scales.

        For all these blocks at once: four launches fewer in each.
        """
        tables_L6E = torch.stack([block.modulation for block in self._blocks()[layers.start : layers.stop]])
        modulation_LB61E = (tables_L6E[:, None] + time_B6E).unsqueeze(3)
        modulation_LB61E[:, :, 1::3] += 1
        return modulation_LB61E.unbind(0)

    def _patchify(self, x_BTCHW: Tensor) -> Tensor:
        batch, frames, channels, height, width = x_BTCHW.shape
        _, p, q = self.config.patch
        x = x_BTCHW.reshape(batch, frames, channels, height // p, p, width // q, q)
        x = x.permute(0, 1, 3, 5, 2, 4, 6)
        return x.reshape(batch, frames * (height // p) * (width // q), channels * p * q)

    def _unpatchify(self, x_BNE: Tensor, frames: int, rows: int, columns: int) -> Tensor:
        _, p, q = self.config.patch
        x = x_BNE.view(x_BNE.shape[0], frames, rows, columns, p, q, -1)
        return x.permute(0, 1, 6, 2, 4, 3, 5).reshape(x_BNE.shape[0], frames, -1, rows * p, columns * q)
