"""The motion-aware noise controller: a chunk's motion sets its noise level, and that the first timestep.

Fast motion lowers the level, so that the picture follows the input; a still scene is repainted more freely. All on the
device and in float64, because float32 turns a first timestep of 700 into 699; nothing is read back.

Axes in names: T frames, C channels, H and W rows and columns.
Source: StreamDiffusionV2, arXiv:2511.07399, section 4.3; constants and rounding of its public code.
"""

from collections import deque
from dataclasses import dataclass, field

import torch
from torch import Tensor

from engine.config import MotionConfig


@dataclass
class MotionState:
    """What the controller remembers of a stream: its newest frame, recent motions, and the level it set last."""

    before: Tensor | None = None
    level: Tensor | None = None
    recent: deque[Tensor] = field(default_factory=lambda: deque(maxlen=16))


def largest_motion(frames_TCHW: Tensor, before_CHW: Tensor | None) -> Tensor:
    """Largest root mean square difference between successive frames, [] in their dtype.

    Args:
        frames_TCHW: pixels in [-1, 1], or latents; float32, except where the public code is matched, which measures
            in the model's own precision.
        before_CHW: the frame before the first; None where there is none.
    """
    earlier = frames_TCHW[:-1]
    later = frames_TCHW[1:]
    if before_CHW is not None:
        earlier, later = torch.cat((before_CHW[None], earlier)), frames_TCHW
    if not later.shape[0]:
        return torch.zeros((), device=frames_TCHW.device)
    return (later - earlier).square().mean(dim=(1, 2, 3)).sqrt().amax()


def remember(state: MotionState, frames_TCHW: Tensor) -> None:
    """Keep the last frame of a chunk whose level is given."""
    state.before = frames_TCHW[-1]


def next_level(state: MotionState, frames_TCHW: Tensor, initial: Tensor, config: MotionConfig) -> Tensor:
    """The noise level of the next chunk, float64 []; updates `state`.

    Args:
        frames_TCHW: the chunk, in what `MotionConfig.source` names.
        initial: level of a still scene, float64 []: the paper's s_max.

    s_t = smoothing * (initial - span * motion) + (1 - smoothing) * s_(t-1), with motion from 0 to 1.
    """
    state.recent.append(largest_motion(frames_TCHW, state.before))
    state.before = frames_TCHW[-1]
    recent = list(state.recent)[-config.window :]
    largest = recent[0] if len(recent) == 1 else torch.stack(recent).amax()
    motion = (largest / config.scale).clamp(0, 1).double()
    previous = initial if state.level is None else state.level
    # Rounded, because 1 - 0.9 is not 0.1, and a first timestep is truncated.
    kept = round(1 - config.smoothing, 12)
    state.level = (initial - config.span * motion) * config.smoothing + previous * kept
    return state.level
