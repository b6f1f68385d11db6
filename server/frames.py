"""The frames that pass between a peer and its session, each with its own identity."""

from __future__ import annotations

from dataclasses import dataclass

import av
import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class CameraFrame:
    """A decoded frame of the remote track."""

    index: int
    """0, 1, 2 ... per session, counting decoded frames."""
    arrived_at: float
    """Monotonic seconds: the frame's last packet reached the server."""
    picture: av.VideoFrame


@dataclass(frozen=True, slots=True)
class OutgoingFrame:
    """A picture for the outgoing track."""

    index: int
    """Index of the camera frame it shows."""
    arrived_at: float
    """`arrived_at` of that camera frame."""
    rgb: NDArray[np.uint8]
    """[H, W, 3]; not written to again by its giver."""
    kind: int
    """0 camera, 1 restyled."""
    camera: NDArray[np.uint8] | None = None
    """What the camera saw, of the same size, where `rgb` is a painting of it."""


@dataclass(frozen=True, slots=True)
class FrameMark:
    """Which frame left under which RTP timestamp."""

    rtp_timestamp: int
    """uint32 as on the wire; a browser reports it as `rtpTimestamp`."""
    index: int
    arrived_at: float
    released_at: float
    """Monotonic seconds: `Peer.send_frame` was called."""
    kind: int
