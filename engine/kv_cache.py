"""The keys and values that streams keep: for each a rolling window of latent frames with sinks that stay.

Axes in names: B rows of one pass, W slots of the window (one latent frame each), S sink slots, F frames of the chunk,
N tokens of a frame, G heads, D channels of one head, R = D / 2 rotation pairs.

A pool holds the memory of every stream of a rank, allocated once, in rows: a row is one window through all layers. A
stream leases one row, or one for each denoising step when the steps of successive chunks run together.

Which slot a chunk overwrites and where each slot stands in time is kept and worked out on the device, from one small
tensor of frame indices: no pass reads anything back to the host, no slot is ever rolled, joined or copied. All
denoising steps of a chunk write the same slots, so what the last step wrote stays and no clean pass is needed.

Keys lie unrotated and are turned when read, in all three position modes, so nothing drifts however often positions
change: rotating stored keys in place costs 29 % after 1,000 chunks in bf16.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from engine.attention import Attend, Lengths, flex_attend, flex_block_mask, sdpa_attention
from engine.config import CacheConfig
from engine.wan.presets import TransformerConfig
from engine.wan.rope import Rotation, axis_pairs, rope_rotation, rotate, turn_frequencies

EMPTY = -1
# Above any frame index: three more than int32 of them, at 16 fps and 4 frames each, are 17 years.
_FAR = 1 << 31


@dataclass
class CacheRow:
    """One leased row: its place in the pool, and how many latent frames it has been given, which the host knows."""

    index: int
    seen: int = 0


class KVPool:
    """Cache memory of a rank and the bookkeeping of its slots."""

    def __init__(
        self,
        config: TransformerConfig,
        grid: tuple[int, int],
        rows: int,
        *,
        cache: CacheConfig | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        attend: Attend = sdpa_attention,
    ) -> None:
        """Allocate all memory that `rows` rows will need.

        Args:
            grid: token rows and columns of a latent frame.

        Raises: ValueError, if positions would be refreshed before the window is full.
        """
        self.window, self.sinks, self.tokens = config.window_frames, config.sink_frames, grid[0] * grid[1]
        self.cache = cache or CacheConfig()
        self.attend = attend
        if self.cache.positions == "refresh" and self.cache.refresh_at <= self.window:
            raise ValueError(f"refresh_at {self.cache.refresh_at} must be above window_frames {self.window}")
        shape = (rows, self.window, self.tokens, config.heads, config.head_dim)
        self.keys = tuple(torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.layers))
        self.values = tuple(torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.layers))
        # Frame index in every slot, and the index of the next frame, by row.
        self.held = torch.full((rows, self.window), EMPTY, device=device)
        self.next = torch.zeros(rows, dtype=torch.int64, device=device)
        # What sinks looked like when they were written, for the similarity of new frames.
        self.sink_looks = torch.zeros(rows, self.sinks, config.dim, device=device)
        self._free = list(range(rows))[::-1]
        self._slot = torch.arange(self.window, device=device)
        self._is_sink = self._slot < self.sinks
        time_pairs = axis_pairs(config.head_dim)[0]
        self._frequencies = turn_frequencies(time_pairs, device=device)
        # Of one frame, without the part that turns with time: each pair once.
        space, pairs = rope_rotation(config.head_dim, 1, *grid, device=device), config.head_dim // 2
        self._space = Rotation(space.cos[:, time_pairs:pairs], space.sin[:, pairs + time_pairs :])
        self._row_tensors: dict[tuple[int, ...], Tensor] = {}
        self._views: dict[tuple[int, int], tuple[tuple[Tensor, ...], tuple[Tensor, ...], Tensor]] = {}

    # --- leases

    def lease(self, count: int) -> list[CacheRow]:
        """Take empty rows, neighbours where possible. Raises MemoryError when fewer are free."""
        if count > len(self._free):
            raise MemoryError(f"{count} cache rows asked for, {len(self._free)} free: close a stream or allow more")
        self._free.sort(reverse=True)
        rows = [CacheRow(self._free.pop()) for _ in range(count)]
        for row in rows:
            self.clear(row)
        return rows

    def release(self, rows: Sequence[CacheRow]) -> None:
        """Give rows back."""
        self._free += [row.index for row in rows]

    def clear(self, row: CacheRow) -> None:
        """Empty a row. Its memory is zeroed: what a mask hides must still be a number."""
        row.seen = 0
        self.held[row.index].fill_(EMPTY)
        self.next[row.index].zero_()
        self.sink_looks[row.index].zero_()
        for tensor in (*self.keys, *self.values):
            tensor[row.index].zero_()

    def copy_row(self, source: CacheRow, target: CacheRow) -> None:
        """Let `target` hold what `source` holds."""
        target.seen = source.seen
        for tensor in (self.held, self.next, self.sink_looks, *self.keys, *self.values):
            tensor[target.index].copy_(tensor[source.index])

    # --- slots

    def row_tensor(self, rows: Sequence[CacheRow]) -> Tensor:
        """Indices of the rows on the device; made once for each set of rows."""
        indices = tuple(row.index for row in rows)
        if indices not in self._row_tensors:
            if len(self._row_tensors) > 256:
                self._row_tensors.clear()
            self._row_tensors[indices] = torch.tensor(indices).to(self.held.device)
        return self._row_tensors[indices]

    def choose_sinks(self, rows: Sequence[CacheRow], look_BE: Tensor) -> Tensor | None:
        """Decide for each row whether its next frame takes the place of a sink: the slot, or EMPTY for none.

        One decision a frame, for all layers and steps: hand it to `advance` for every row the frame enters. None
        before the window is full, and where `CacheConfig.sink_refresh` is off.

        Args:
            look_BE: what the frame looks like, see `CausalTransformer.look`.

        Source: StreamDiffusionV2, section 4.2: keep a sink whose cosine with the new chunk is at least a threshold.
            There are as many decisions as layers in its public code, and some before the sinks are filled.
        """
        threshold = self.cache.sink_refresh
        if threshold is None or not self.sinks or any(row.seen < self.window for row in rows):
            return None
        index = self.row_tensor(rows)
        likeness = functional.cosine_similarity(self.sink_looks[index], look_BE[:, None].float(), dim=-1)
        least, slot = likeness.min(dim=1)
        return torch.where(least < threshold, slot, EMPTY)

    def advance(
        self, rows: Sequence[CacheRow], frames: int, *, sink: Tensor | None = None, look_BE: Tensor | None = None
    ) -> Tensor:
        """Take the slots for the next chunk of every row; its denoising steps then all write to them.

        Args:
            frames: latent frames of the chunk, the same in every row.
            sink: what `choose_sinks` said.
            look_BE: kept for those frames that become sinks.

        Returns: slots [B, F] on the device, for `view`.
        Raises: ValueError, if the chunk does not fit the rolling part of the window.
        """
        if not 1 <= frames <= self.window - self.sinks:
            raise ValueError(f"a chunk of {frames} latent frames must hold 1 to {self.window - self.sinks}")
        index = self.row_tensor(rows)
        held, start = self.held[index], self.next[index]
        if self.cache.positions == "refresh":
            held, start = self._brought_back(held, start, frames)
        # Empty slots first, in order; then the oldest of the rolling ones; never a filled sink.
        order = torch.where(self._is_sink & (held >= 0), _FAR, held).argsort(dim=1, stable=True)
        slots = order[:, :frames]
        if sink is not None:
            slots = torch.where(sink[:, None] >= 0, sink[:, None], slots)
        if self.cache.sink_ema is not None and self.sinks:
            self._fold_evicted(rows, index, slots)
        self.held[index] = held.scatter(1, slots, start[:, None] + torch.arange(frames, device=held.device))
        self.next[index] = start + frames
        if look_BE is not None and self.sinks:
            looks = self.sink_looks[index]
            taken = (slots[:, :, None] == self._slot[: self.sinks]).any(1)[:, :, None]
            self.sink_looks[index] = torch.where(taken, look_BE[:, None].float(), looks)
        for row in rows:
            row.seen += frames
        return slots

    def _brought_back(self, held: Tensor, start: Tensor, frames: int) -> tuple[Tensor, Tensor]:
        """Where a row's next index reaches the limit, move it and all kept frames back to a full window's indices.

        Source: StreamDiffusionV2, section 4.2 (RoPE refresh). Its public code resets the index alone and leaves kept
            keys turned by their old one; here they are turned when read, by the index they have then.
        """
        due = (start + frames > self.cache.refresh_at)[:, None]
        # By rank: where frames went to sinks, the rolling ones lie apart, and a plain shift would take them below 0.
        # What still comes out below 0 is what this chunk overwrites.
        age = torch.where(self._is_sink, self._slot, held + self.window).argsort(dim=1, stable=True).argsort(dim=1)
        moved = torch.where(self._is_sink, self._slot, age - frames)
        back = torch.full_like(start, self.window - frames)
        return torch.where(due & (held >= 0), moved, held), torch.where(due[:, 0], back, start)

    def _fold_evicted(self, rows: Sequence[CacheRow], index: Tensor, slots: Tensor) -> None:
        """Average what full rows are about to lose into their sinks, one sink after another.

        Source: Reward Forcing, arXiv:2512.04678 (EMA-Sink), frame by frame.
        """
        keep = self.cache.sink_ema
        assert keep is not None
        full = [place for place, row in enumerate(rows) if row.seen >= self.window]
        if not full:
            return
        if len(full) < len(rows):
            index, slots = self.row_tensor([rows[place] for place in full]), torch.stack([slots[p] for p in full])
        for frame in range(slots.shape[1]):
            slot = slots[:, frame]
            sink = self.held[index, slot] % self.sinks
            for tensor in (*self.keys, *self.values):
                tensor[index, sink] = torch.lerp(tensor[index, slot], tensor[index, sink], keep)

    # --- reading and writing

    def view(self, rows: Sequence[CacheRow], slots: Tensor) -> "CacheView":
        """What one pass over these rows needs: where to write the current chunk, and how to read all valid frames.

        Args:
            slots: of the current chunk [B, F], from `advance`; rows of several calls are joined with torch.cat.
        """
        index = self.row_tensor(rows)
        held = self.held[index]
        frames = slots.shape[1]
        place = self._places(held, slots)
        valid = min(self.window, max(row.seen for row in rows))
        mask = None
        if any(min(row.seen, self.window) != valid for row in rows):
            mask = (held[:, :valid] >= 0).repeat_interleave(self.tokens, dim=1)[:, None, None]
        key = self._rotation(place[:, :valid])
        first = rows[0].index
        together = [row.index for row in rows] == list(range(first, first + len(rows)))
        keys, values, base = self._neighbours(first, len(rows)) if together else (self.keys, self.values, index)
        return CacheView(
            attention=self.attend,
            keys=keys,
            values=values,
            rows=None if together else index,
            slots=torch.add(slots, base[:, None], alpha=self.window).flatten(),
            query=self._chunk_rotation(key, slots),
            key=key,
            valid=valid,
            lengths=self._lengths(held, mask, frames * self.tokens, valid * self.tokens),
        )

    def _neighbours(self, first: int, count: int) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], Tensor]:
        """Rows that lie side by side: keys and values of each layer, as views, and the rows' places in them."""
        if (first, count) not in self._views:
            keys, values = (tuple(x.narrow(0, first, count) for x in xs) for xs in (self.keys, self.values))
            self._views[first, count] = keys, values, torch.arange(count, device=self.held.device)
        return self._views[first, count]

    def _chunk_rotation(self, key: Rotation, slots: Tensor) -> Rotation:
        """The current chunk's part of the tables of all slots."""
        tables = []
        for table in (key.cos, key.sin):
            by_slot = table.view(slots.shape[0], -1, self.tokens, table.shape[-1])
            index = slots[:, :, None, None].expand(-1, -1, *by_slot.shape[2:])
            tables.append(by_slot.gather(1, index).flatten(1, 2).unsqueeze(2))
        return Rotation(*tables)

    def _lengths(self, held: Tensor, mask: Tensor | None, queries: int, keys: int) -> Lengths:
        count = (held >= 0).sum(dim=1).to(torch.int32) * self.tokens
        masked_flex = mask is not None and self.attend is flex_attend
        return Lengths(count, mask, flex_block_mask(count, queries, keys) if masked_flex else None)

    def _places(self, held: Tensor, slots: Tensor) -> Tensor:
        """Position in time of every slot [B, W]."""
        if self.cache.positions != "relative":
            return held
        # Sinks in slot order, then rolling frames by age, then the current chunk, which may sit in a sink's slot.
        current = (slots[:, :, None] == self._slot).any(1)
        rank = torch.where(self._is_sink, self._slot, held + self.window)
        rank = torch.where(current, held + _FAR, rank)
        rank = torch.where(held < 0, 2 * _FAR, rank)
        return rank.argsort(dim=1, stable=True).argsort(dim=1)

    def _rotation(self, place: Tensor) -> Rotation:
        """Tables [B, M * N, 1, D] for frames at the given positions [B, M], formed in float64."""
        time = place.double()[:, :, None, None] * self._frequencies
        cos, sin = (x.float().expand(-1, -1, self.tokens, -1) for x in (time.cos(), time.sin()))
        space_cos, space_sin = (x.expand(*place.shape, -1, -1) for x in (self._space.cos, self._space.sin))
        tables = torch.cat((cos, space_cos, cos, space_cos), -1), torch.cat((-sin, -space_sin, sin, space_sin), -1)
        return Rotation(*(table.flatten(1, 2).unsqueeze(2) for table in tables))


@dataclass(frozen=True)
class CacheView:
    """The cache as one pass of the transformer sees it; the `Attention` of streaming. Tensors and fixed numbers only,
    so that a compiled pass takes any of one shape.

    keys, values: per layer [rows, W, N, G, D]: the rows of this pass, or all of the pool where those are scattered and
        `rows` names them. slots: where the chunk is written, as an index into the flattened first two axes.
    """

    attention: Attend
    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    rows: Tensor | None
    slots: Tensor
    query: Rotation
    key: Rotation
    valid: int
    lengths: Lengths

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Store k and v [B, F * N, G, D] in the chunk's slots and attend from q to all valid slots; like q."""
        keys = self._store_and_read(self.keys[layer], k)
        values = self._store_and_read(self.values[layer], v)
        return self.attention(rotate(q, self.query), rotate(keys, self.key), values, self.lengths)

    def _store_and_read(self, store: Tensor, new: Tensor) -> Tensor:
        frame = store.shape[2:]
        store.view(-1, *frame).index_copy_(0, self.slots, new.reshape(-1, *frame))
        read = store if self.rows is None else store.index_select(0, self.rows)
        return read.narrow(1, 0, self.valid).flatten(1, 2)
