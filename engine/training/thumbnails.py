"""Pictures of the styles for the page: the exported model's output on a held-out portrait.

python -m engine.training.thumbnails --people ../shared/data --out web/styles
"""

from __future__ import annotations

import argparse
from pathlib import Path

import cv2
import numpy as np
import torch

from engine.training.data import held_out_portraits
from engine.training.export import MODEL_FOLDER
from engine.training.playback import restyle_clip
from engine.wan.weights import Model, load_model

SIZE_PX = 256
FOLDER = Path(__file__).parents[2] / "web" / "styles"
PORTRAIT = 1  # of the held-out ones: large clear shapes before a plain wall, so that a small tile still reads


def write_thumbnails(model: Model, portrait: Path, folder: Path) -> list[Path]:
    """One JPEG of 256x256 per style the model lists, named by its id, from the ninth frame of the still portrait."""
    picture = cv2.imread(str(portrait), cv2.IMREAD_COLOR)
    assert picture is not None, portrait
    square = cv2.resize(picture, (SIZE_PX, SIZE_PX), interpolation=cv2.INTER_AREA)[..., ::-1]
    clip = np.repeat(np.asarray(square, np.uint8)[None], 9, axis=0)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for style in model.styles.styles:
        path = folder / f"{style.id}.jpg"
        out = restyle_clip(model, clip, style.prompt)[-1]
        cv2.imwrite(str(path), out[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 88])
        paths.append(path)
    return paths


def main() -> None:
    """Command line of this stage."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--people", type=Path, default=Path("../shared/data"))
    parser.add_argument("--model", type=Path, default=MODEL_FOLDER)
    parser.add_argument("--out", type=Path, default=FOLDER)
    args = parser.parse_args()
    torch.set_num_threads(1)
    portrait = held_out_portraits(args.people)[PORTRAIT]
    print(f"{len(write_thumbnails(load_model(args.model, 'cpu'), portrait, args.out))} thumbnails of {portrait.name}")


if __name__ == "__main__":
    main()
