"""The keys and values a stream keeps: a rolling window of latent frames with sinks that stay.

Axes in names: B batch, N tokens, D channels of one head.

Keys lie unrotated and are turned when read, to their place in the window (sinks at 0, 1, ..., the newest last), so
that positions never run out and nothing drifts: rotating stored keys in place costs 29 % after 1,000 chunks in bf16.
Nothing is rolled, joined or copied in the store; a chunk overwrites the oldest slot. All denoising steps of a
chunk write the same slots, so what the last step wrote stays and no clean pass is needed.
"""

import torch
from torch import Tensor
from torch.nn import functional

from engine.wan.presets import TransformerConfig
from engine.wan.rope import Rotation, rope_rotation, rotate


class KVCache:
    """One stream's cache for every layer; the `Attention` of streaming."""

    def __init__(
        self,
        config: TransformerConfig,
        rows: int,
        columns: int,
        *,
        batch: int = 1,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Allocate all memory the stream will need.

        Args:
            rows: token rows of a latent frame; columns likewise.
        """
        self.window, self.sink, self.tokens = config.window_frames, config.sink_frames, rows * columns
        self._ring = self.window - self.sink
        shape = (config.layers, batch, config.heads, self.window, self.tokens, config.head_dim)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self._table = rope_rotation(config.head_dim, self.window, rows, columns, device=device)
        # Slots in writing order: first all of them, then the rolling ones again; long enough for a chunk that wraps.
        rolling = torch.arange(self.sink, self.window)
        self._order = torch.cat((torch.arange(self.window), rolling, rolling)).to(device)
        self._places = self._slot_places().to(device)
        self.frames_seen = 0
        # What `begin_chunk` sets: the slots to write, and where the chunk and all valid slots stand in the window.
        self._slots = self._order[:0]
        self._query = self._key = self._table

    def _slot_places(self) -> Tensor:
        """Window position of every slot [ring, window], by how far the ring has turned."""
        sinks = torch.arange(self.sink)
        rolling = torch.arange(self._ring)
        turned = [torch.cat((sinks, self.sink + (rolling - turn) % self._ring)) for turn in range(self._ring)]
        return torch.stack(turned)

    @property
    def valid_frames(self) -> int:
        """Latent frames that a query of the current chunk sees, itself included."""
        return min(self.frames_seen, self.window)

    def begin_chunk(self, frames: int) -> None:
        """Take the slots for the next chunk; its denoising steps then all write to them.

        Raises: ValueError, if the chunk does not fit the rolling part of the window.
        """
        if not 1 <= frames <= self._ring:
            raise ValueError(f"a chunk of {frames} latent frames must hold 1 to {self._ring}")
        seen = self.frames_seen
        start = seen if seen < self.window else self.window + (seen - self.window) % self._ring
        self.frames_seen = seen + frames
        self._slots = self._order.narrow(0, start, frames)
        tokens, valid = frames * self.tokens, self.valid_frames * self.tokens
        self._query = self._table.narrow(valid - tokens, tokens)
        self._key = self._table.narrow(0, valid)
        if self.frames_seen > self.window:
            places = self._places[(self.frames_seen - self.window) % self._ring]
            self._key = Rotation(self._by_slot(self._table.cos, places), self._by_slot(self._table.sin, places))

    def _by_slot(self, table: Tensor, places: Tensor) -> Tensor:
        return table.view(self.window, self.tokens, -1).index_select(0, places).flatten(0, 1)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Store k and v [B, heads, N, D] in the chunk's slots and attend from q to all valid slots; like q."""
        keys, values = self.keys[layer], self.values[layer]
        frames = self._slots.shape[0]
        keys.index_copy_(2, self._slots, k.view(*k.shape[:2], frames, self.tokens, -1))
        values.index_copy_(2, self._slots, v.view(*v.shape[:2], frames, self.tokens, -1))
        valid = self.valid_frames
        seen_keys = rotate(keys[:, :, :valid].flatten(2, 3), self._key)
        query = rotate(q, self._query)
        return functional.scaled_dot_product_attention(query, seen_keys, values[:, :, :valid].flatten(2, 3))
