"""Pictures of the evaluation for people's eyes: a contact sheet and a strip of consecutive frames.

Cells are [H, W, 3] RGB uint8. Layout only: what is shown is made elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

Picture = NDArray[np.uint8]

LABEL_PX, GAP_PX = 18, 4
PAPER, TEXT, MARK = (255, 255, 255), (40, 40, 40), (220, 40, 40)
LARGEST_BYTES = 600_000


def contact_sheet(
    people: Sequence[Picture], rows: Mapping[str, Sequence[tuple[Picture, Picture]]], *, cell_px: int, blocks: int = 1
) -> Picture:
    """Styles down, people across.

    Args:
        people: each person's source, shown on top over two cells' width.
        rows: by style, for each person the teacher's frame and the model's, side by side.
        cell_px: height of a cell.
        blocks: lay the styles out in as many blocks side by side.
    """
    names = list(rows)
    share = -(-len(names) // blocks)
    parts = []
    for first in range(0, len(names), share):
        lines = [_row([cell for person in people for cell in (person, _blank(person))], "source", cell_px)]
        for name in names[first : first + share]:
            label = f"{name}: teacher, model"
            lines.append(_row([cell for pair in rows[name] for cell in pair], label, cell_px))
        parts.append(np.concatenate(lines))
    tallest = max(len(part) for part in parts)
    padded = [np.pad(part, ((0, tallest - len(part)), (0, 4 * GAP_PX), (0, 0)), constant_values=255) for part in parts]
    return np.concatenate(padded, axis=1)


def motion_strip(rows: Mapping[str, Picture], *, cell_px: int, borders: Sequence[int]) -> Picture:
    """Consecutive frames across, one clip a row; a red rule stands before each frame that begins a chunk.

    Args:
        rows: clips [T, H, W, 3] of one length, by label.
        borders: frames that begin a chunk; those outside are ignored.
    """
    lines = []
    for label, clip in rows.items():
        line = _row(list(clip), label, cell_px)
        width = line.shape[1] // len(clip)
        for border in borders:
            if 0 < border < len(clip):
                line[LABEL_PX:, border * width - GAP_PX + 1 : border * width - 1] = MARK
        lines.append(line)
    return np.concatenate(lines)


def _row(cells: Sequence[Picture], label: str, cell_px: int) -> Picture:
    resized = [_cell(cell, cell_px) for cell in cells]
    line = np.concatenate(resized, axis=1)
    heading = np.full((LABEL_PX, line.shape[1], 3), PAPER, np.uint8)
    cv2.putText(heading, label, (2, LABEL_PX - 5), cv2.FONT_HERSHEY_SIMPLEX, 0.42, TEXT, 1, cv2.LINE_AA)
    return np.concatenate([heading, line])


def _cell(picture: Picture, height_px: int) -> Picture:
    width_px = round(picture.shape[1] * height_px / picture.shape[0])
    shown = picture
    if height_px != picture.shape[0]:
        shown = np.asarray(cv2.resize(picture, (width_px, height_px), interpolation=cv2.INTER_AREA), np.uint8)
    return np.pad(shown, ((0, GAP_PX), (0, GAP_PX), (0, 0)), constant_values=255)


def _blank(like: Picture) -> Picture:
    return np.full_like(like, 255)


def save_jpeg(path: Path, picture: Picture, largest_bytes: int = LARGEST_BYTES) -> int:
    """Write a JPEG at the best quality, and if need be at the largest size, that stays below the limit.

    Returns: its bytes.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for scale in (1.0, 0.85, 0.7, 0.55, 0.4):
        shown = picture if scale == 1 else cv2.resize(picture, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
        for quality in (90, 82, 74):
            data = cv2.imencode(".jpg", np.ascontiguousarray(shown[..., ::-1]), [cv2.IMWRITE_JPEG_QUALITY, quality])[1]
            if len(data) < largest_bytes:
                path.write_bytes(data.tobytes())
                return len(data)
    size = f"{picture.shape[1]}x{picture.shape[0]}"
    raise ValueError(f"{path.name}: a picture of {size} does not fit {largest_bytes} bytes: show fewer cells")


def save_png(path: Path, picture: Picture) -> None:
    """Write a lossless picture."""
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), np.ascontiguousarray(picture[..., ::-1]))
