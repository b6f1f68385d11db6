"""Pictures that rest: each frame is drawn towards the one shown before it, moved along the camera's own motion.

A model that makes a video chunk by chunk redraws every contour a little differently each time. Where the camera shows
that a place only moved, or stood still, its picture should do the same. So the camera's dense optical flow is found
(`Watcher`), the last picture is carried along it, and the new one is averaged with that: the motion-compensated
recursive noise reduction of video cameras. Nothing is averaged where the flow does not explain the camera's picture
(something was uncovered, the scene changed) or where the new picture differs by much (another prompt).

What still changes more from chunk to chunk than within them is spread over two frames: a pulse six times a second is
seen, a twelfth of a second of delay at a contour is not.

A pattern that is fixed to the frame, as a screen of dots is, must not be carried along with a person: a style tells by
its `carried` share. Where that is 0, small changes at a place are damped and that is all.

Axes in names: T frames, C channels, H and W rows and columns, N pairs of frames, h and w rows and columns at half the
size, Y and X at a quarter of it, I and J cells of the flow. Flow is (x, y) in pixels of the size it is given at.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional

from engine.config import SteadyConfig
from engine.wan.vae import FRAMES_PER_LATENT

# Pixels of half the size per cell of the flow; a window is two cells wide.
CELL = 4
# Steps of least squares at each level, from coarse to fine: the finest costs the most and has the least to find.
ROUNDS = (2, 2, 1)
# Squared differences of brightness from pixel to pixel, 0 to 255 each: flatter windows keep the coarser level's flow.
FLATNESS = 6.0
# Slower motion than the first is the camera's noise, faster than the second is all believed; pixels of half the size.
STILL_PX = (0.08, 0.25)
# A quarter of the size is fine enough to say where something holds.
COARSE = 4


@dataclass(frozen=True)
class Motion:
    """Of each frame of a chunk to the one before it.

    place: where each pixel was [T, H, W, 2], as `grid_sample` takes it. trust: how far that explains the camera, 0 to 1
    [T, Y, X]. still: 1 where nothing moves [T, Y, X].
    """

    place: Tensor
    trust: Tensor
    still: Tensor


@dataclass
class Watcher:
    """The camera's motion over the chunks of one stream."""

    _before_hw: Tensor | None = field(default=None, init=False)

    def watch(self, pixels_TCHW: Tensor, config: SteadyConfig, *, wanted: bool = True) -> Motion | None:
        """Motion of a chunk's frames, RGB in [-1, 1]; None where none is wanted or nothing like it came before.

        Green stands for brightness. Sides are multiples of 8.
        """
        green = pixels_TCHW[:, 1].float()
        quarters = (green[:, row::2, column::2] for row in (0, 1) for column in (0, 1))
        grey_Thw = sum(quarters, torch.zeros((), device=green.device)) * (127.5 / 4)
        before, self._before_hw = self._before_hw, grey_Thw[-1]
        if not wanted or before is None or before.shape != grey_Thw.shape[1:]:
            return None
        flow_T2IJ, error_TYX = optical_flow(torch.cat((before[None], grey_Thw[:-1])), grey_Thw)
        low, high = config.trusted_levels
        speed_TYX = _length(functional.interpolate(flow_T2IJ, error_TYX.shape[1:], mode="bilinear"))[:, 0]
        return Motion(
            place=_places(flow_T2IJ, pixels_TCHW.shape[2:], 2),
            trust=((high - error_TYX) / (high - low)).clamp_(0, 1),
            still=(1 - 2 * speed_TYX / STILL_PX[1]).clamp_(0, 1),
        )


def optical_flow(before_Nhw: Tensor, now_Nhw: Tensor) -> tuple[Tensor, Tensor]:
    """Dense flow from each frame back to the one before, by least squares in overlapping windows, coarse to fine.

    Args:
        before_Nhw, now_Nhw: brightness, 0 to 255, sides multiples of 4.

    Returns: flow [N, 2, h / 4, w / 4] in pixels of these frames, and what is left of the mean absolute difference of
        a frame to its moved predecessor, [N, h / 2, w / 2].
    Source: Lucas and Kanade 1981; inverse search in overlapping patches as in Kroeger et al. 2016.
    """
    pyramid = [(before_Nhw[:, None], now_Nhw[:, None])]
    while len(pyramid) < len(ROUNDS) and min(pyramid[-1][0].shape[2:]) >= 8 * CELL:
        before, now = pyramid[-1]
        pyramid.append((functional.avg_pool2d(before, 2), functional.avg_pool2d(now, 2)))
    coarsest = [side // CELL for side in pyramid[-1][0].shape[2:]]
    flow = now_Nhw.new_zeros(len(now_Nhw), 2, *coarsest)
    for (before, now), rounds in zip(reversed(pyramid), ROUNDS[-len(pyramid) :], strict=True):
        cells = (now.shape[2] // CELL, now.shape[3] // CELL)
        if flow.shape[2:] != cells:
            flow = 2 * functional.interpolate(flow, cells, mode="bilinear")
        slope = _slopes(now)
        xx, yy = _windows(slope * slope).add_(FLATNESS).unbind(1)
        xy = _windows(slope[:, :1] * slope[:, 1:])[:, 0]
        inverse = 1 / (xx * yy - xy * xy)
        for _ in range(rounds):
            x, y = _windows(slope * (_moved(before, flow) - now)).unbind(1)
            step = torch.stack((yy * x - xy * y, xx * y - xy * x), 1) * inverse[:, None]
            flow = _smooth(flow - step.clamp_(-2, 2))
    low, high = STILL_PX
    flow = flow * ((_length(flow) - low) / (high - low)).clamp_(0, 1)
    before, now = pyramid[0]
    error = (_moved(before, flow) - now).abs_()
    return flow, functional.avg_pool2d(error, 4, 2, padding=1, count_include_pad=False)[:, 0]


def steady(
    frames_TCHW: Tensor,
    before_CHW: Tensor | None,
    motion: Motion | None,
    carried: float,
    config: SteadyConfig,
    *,
    first: int = 0,
) -> Tensor:
    """Frames of a chunk, each drawn towards the one shown before it.

    A change d loses `carried` of itself where all agrees, and what is left is damped by d^3 / (d^2 + threshold^2): a
    tenth of a small flicker stays, a change of three thresholds loses a tenth, and what lasts arrives in the end.
    Chunks are made one by one, so what changes by little from one to the next is more often an error than motion:
    there the threshold is another. What is left of the change at such a seam is spread over two frames, see `_ease`.

    Args:
        frames_TCHW: about [-1, 1].
        before_CHW: the last frame that was returned; None at the start of a stream, whose first frame stays as it is.
        motion: of the camera, for frames to be carried along.
        carried: share of the carried frame, 0 to 1; 0 damps alone.
        first: number of the first frame in its chunk; `FRAMES_PER_LATENT` make one latent frame.

    Returns: float32.
    """
    last_CHW, shown_TCHW = before_CHW, torch.empty_like(frames_TCHW, dtype=torch.float32)
    for number, frame in enumerate(frames_TCHW.float().unbind(0)):
        at_seam = (first + number) % FRAMES_PER_LATENT == 0
        threshold = (config.seam_levels if at_seam else config.damped_levels) / 127.5
        if before_CHW is None:
            shown_TCHW[number] = frame
        elif motion is None or not carried:
            shown_TCHW[number] = before_CHW + _damped(frame - before_CHW, threshold**2 + 1e-9)
        else:
            aim_CHW = _carried(before_CHW, motion, number)
            shown_TCHW[number] = _drawn_to(aim_CHW, frame, motion, number, carried, threshold, config)
        before_CHW = shown_TCHW[number]
    for seam in range(-first % FRAMES_PER_LATENT, len(shown_TCHW) - FRAMES_PER_LATENT + 1, FRAMES_PER_LATENT):
        before_CHW = shown_TCHW[seam - 1] if seam else last_CHW
        if before_CHW is not None:
            aim_CHW = before_CHW
            if motion is not None and carried:
                aim_CHW = torch.lerp(before_CHW, _carried(before_CHW, motion, seam), carried)
            _ease(shown_TCHW[seam : seam + FRAMES_PER_LATENT], before_CHW, aim_CHW, config)
    return shown_TCHW


def _ease(chunk_TCHW: Tensor, before_CHW: Tensor, aim_CHW: Tensor, config: SteadyConfig) -> None:
    """Spread a chunk's change at its seam over two frames, in place, so far as it is more than changes within.

    A change of energy E at the seam, with e the mean of those within, gives up the share 1 - sqrt(`seam_energy` e / E)
    of its difference to `aim_CHW`, the last frame shown as far as it is to be carried along: the first frame all of it,
    the second half. Another scene comes as it is.
    """
    levels = 127.5 * (chunk_TCHW[0] - before_CHW).square_().mean().sqrt_()
    within = 127.5 * (chunk_TCHW[1:] - chunk_TCHW[:-1]).square_().mean().sqrt_()
    low, high = config.scene_levels
    share = (1 - config.seam_energy**0.5 * within / (levels + 1e-6)).clamp_(0, config.eased_most)
    given_CHW = (chunk_TCHW[0] - aim_CHW).mul_(share * ((high - levels) / (high - low)).clamp_(0, 1))
    chunk_TCHW[0].sub_(given_CHW)
    chunk_TCHW[1].sub_(given_CHW.mul_(0.5))


def _carried(before_CHW: Tensor, motion: Motion, number: int) -> Tensor:
    places = motion.place[number][None]
    return functional.grid_sample(before_CHW[None], places, padding_mode="border", align_corners=False)[0]


def _drawn_to(
    aim_CHW: Tensor,
    frame_CHW: Tensor,
    motion: Motion,
    number: int,
    carried: float,
    threshold: float,
    config: SteadyConfig,
) -> Tensor:
    trust_YX, still_YX = motion.trust[number], motion.still[number]
    change = frame_CHW - aim_CHW
    around = functional.avg_pool2d(change.abs()[None], COARSE).mean(1, keepdim=True)
    low, high = config.alike_levels
    alike_YX = ((high - 127.5 * _smooth(around)) / (high - low)).clamp_(0, 1)[0, 0]
    kept = 1 - carried * trust_YX * alike_YX
    limit = threshold * trust_YX * (config.damped_in_motion + (1 - config.damped_in_motion) * still_YX)
    maps = torch.stack((kept, limit.square().add_(1e-9)))[None]
    kept_HW, square_HW = functional.interpolate(maps, change.shape[1:], mode="bilinear")[0].unbind(0)
    return aim_CHW.add_(_damped(change.mul_(kept_HW), square_HW))


def _damped(change_CHW: Tensor, squared_threshold: Tensor | float) -> Tensor:
    square = change_CHW.square()
    return change_CHW.mul_(square).div_(square.add_(squared_threshold))


def _smooth(x_NCHW: Tensor) -> Tensor:
    return functional.avg_pool2d(x_NCHW, 3, 1, padding=1, count_include_pad=False)


def _windows(x_NChw: Tensor) -> Tensor:
    """Means over windows two cells wide, around each cell."""
    return functional.avg_pool2d(x_NChw, 2 * CELL, CELL, padding=CELL // 2, count_include_pad=False)


def _slopes(x_N1hw: Tensor) -> Tensor:
    """Central differences along x and y, [N, 2, h, w]."""
    padded = functional.pad(x_N1hw, (1, 1, 1, 1), mode="replicate")
    across = padded[:, :, 1:-1, 2:] - padded[:, :, 1:-1, :-2]
    down = padded[:, :, 2:, 1:-1] - padded[:, :, :-2, 1:-1]
    return torch.cat((across, down), 1).mul_(0.5)


def _moved(before_N1hw: Tensor, flow_N2IJ: Tensor) -> Tensor:
    places = _places(flow_N2IJ, before_N1hw.shape[2:])
    return functional.grid_sample(before_N1hw, places, padding_mode="border", align_corners=False)


def _length(flow_N2YX: Tensor) -> Tensor:
    return (flow_N2YX * flow_N2YX).sum(1, keepdim=True).sqrt_()


def _places(flow_N2IJ: Tensor, size: Sequence[int], pixels: float = 1.0) -> Tensor:
    """Where the pixels of a frame of `size` were, from -1 to 1 across it [N, H, W, 2].

    Bilinear interpolation as two products of matrices, written where `grid_sample` reads: a quarter of the time.

    Args:
        pixels: of that frame, to one of the flow.
    """
    height, width = size
    down = _stretch(flow_N2IJ.shape[2], height, flow_N2IJ.device)
    across = _stretch(flow_N2IJ.shape[3], width, flow_N2IJ.device)
    flow_N2HW = torch.matmul(torch.matmul(down, flow_N2IJ), across.T)
    x, y = _centres(width, flow_N2IJ.device), _centres(height, flow_N2IJ.device)[:, None]
    places = flow_N2HW.new_empty(len(flow_N2HW), height, width, 2)
    torch.add(x, flow_N2HW[:, 0], alpha=2 * pixels / width, out=places[..., 0])
    torch.add(y, flow_N2HW[:, 1], alpha=2 * pixels / height, out=places[..., 1])
    return places


@lru_cache(maxsize=64)
def _stretch(few: int, many: int, device: torch.device) -> Tensor:
    """The matrix [many, few] of linear interpolation between the middles of cells."""
    unit = torch.eye(few, device=device)[None]
    return functional.interpolate(unit, many, mode="linear")[0].T.contiguous()


@lru_cache(maxsize=64)
def _centres(count: int, device: torch.device) -> Tensor:
    """The middles of so many pixels, from -1 to 1."""
    return (torch.arange(count, device=device) + 0.5) * (2 / count) - 1
