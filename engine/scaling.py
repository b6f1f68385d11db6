"""Frames of one size rendered at another, and back. Every pipeline and replay does it here, so that all do it alike.

Axes in names: T frames, C channels, H and W rows and columns.
"""

import torch
from torch import Tensor
from torch.nn import functional


def shrink(pixels_TCHW: Tensor, size: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Pixels in [-1, 1] at a smaller size: each the mean of those it covers, in float32.

    Args:
        size: width and height.
        dtype: of the result.
    """
    width, height = size
    return functional.interpolate(pixels_TCHW.float(), (height, width), mode="area").to(dtype)


def enlarge(pixels_TCHW: Tensor, size: tuple[int, int]) -> Tensor:
    """Pixels at a larger size, between the nearest four, in float32."""
    width, height = size
    return functional.interpolate(pixels_TCHW.float(), (height, width), mode="bilinear")
