"""Three-axis rotary positions, split over a head's channels as Wan 2.1 splits them.

Axes in names: N tokens (row by row, frame after frame), D channels of one head, R = D / 2 rotation pairs. B rows.

Channel i of a head is rotated with channel i + D / 2 (half split). Wan's own checkpoints pair neighbours, 2i and
2i + 1: a loader permutes the rows of the q and k projections and of their norms once, by `half_split_order`.
Both forms give the same attention scores, and the half split needs no strided access.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

THETA = 10000.0


@dataclass(frozen=True)
class Rotation:
    """Cosines and signed sines, float32: [N, D] for N tokens, or with the axes of what they turn, [B, N, 1, D].

    A pair's cosine stands in both halves; its sine is negated in the first. So turning is two products and a swap of
    the halves (`rotate`).
    """

    cos: Tensor
    sin: Tensor

    @classmethod
    def of_angles(cls, cos: Tensor, sin: Tensor) -> "Rotation":
        """From the cosine and sine of each pair, [..., R]."""
        return cls(torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1))

    def narrow(self, start: int, length: int) -> "Rotation":
        """The same tables for tokens start to start + length, as views."""
        return Rotation(self.cos.narrow(0, start, length), self.sin.narrow(0, start, length))

    def over_heads(self) -> "Rotation":
        """The same tables [N, 1, D], for tokens with a head axis behind them."""
        return Rotation(self.cos.unsqueeze(1), self.sin.unsqueeze(1))


def axis_pairs(head_dim: int) -> tuple[int, int, int]:
    """How many rotation pairs of a head turn with time, row and column.

    Source: Wan 2.1 (22, 21 and 21 of 64 pairs at head size 128).
    """
    spatial = head_dim // 6
    return head_dim // 2 - 2 * spatial, spatial, spatial


def turn_frequencies(pairs: int, *, device: torch.device | str = "cpu") -> Tensor:
    """How far each pair of an axis turns from one position to the next, radians, float64 [pairs]: Wan's exponents."""
    exponent: Tensor = torch.arange(pairs, dtype=torch.float64, device=device) / pairs
    frequencies: Tensor = THETA**-exponent
    return frequencies


def rope_angles(head_dim: int, frames: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Angles [F * H * W, R] in float64 for the grid of the given positions, each a 1-D tensor.

    Pair i of an axis with p pairs turns by position * 10000 ** (-i / p), which is Wan's exponent 2i / (2p).
    """
    positions = (frames, rows, columns)
    grid = tuple(len(axis) for axis in positions)
    parts = []
    for axis, (position, pairs) in enumerate(zip(positions, axis_pairs(head_dim), strict=True)):
        angle = position.double()[:, None] * turn_frequencies(pairs, device=position.device)
        shape = [1, 1, 1, pairs]
        shape[axis] = grid[axis]
        parts.append(angle.view(shape).expand(*grid, pairs))
    return torch.cat(parts, dim=-1).flatten(0, 2)


def rope_rotation(
    head_dim: int,
    frames: int,
    rows: int,
    columns: int,
    *,
    origin: tuple[int, int] = (0, 0),
    device: torch.device | str = "cpu",
) -> Rotation:
    """Tables for `frames` frames of rows x columns tokens, float32, made in float64.

    Args:
        origin: row and column of the top left token, for a crop that is to keep its place in the picture.
    """
    top, left = origin
    angles = rope_angles(
        head_dim,
        torch.arange(frames, device=device),
        torch.arange(top, top + rows, device=device),
        torch.arange(left, left + columns, device=device),
    )
    return Rotation.of_angles(angles.cos().float(), angles.sin().float())


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Turn [..., D] by angles whose tables broadcast over it; formed in float32, returned in x's dtype."""
    wide = x.float()
    return torch.addcmul(wide * rotation.cos, wide.roll(x.shape[-1] // 2, dims=-1), rotation.sin).to(x.dtype)


def half_split_order(heads: int, head_dim: int) -> Tensor:
    """Row order [heads * D] that turns a projection made for neighbouring pairs into one for split halves."""
    order = torch.cat((torch.arange(0, head_dim, 2), torch.arange(1, head_dim, 2)))
    return (torch.arange(heads)[:, None] * head_dim + order).flatten()
