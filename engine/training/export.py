"""The trained parts as a model folder: weights in float16, configuration, styles and the model card.

python -m engine.training.export --work .work/tiny --out engine/models/livebrush-tiny
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from engine.config import ServingProfile, SteadyConfig
from engine.training.budget import load_checkpoint
from engine.training.card import model_card
from engine.training.phrases import STYLES
from engine.training.phrases import Style as TrainingStyle
from engine.training.text_table import build as build_text_table
from engine.training.train_transformer import STAGES, trained_parts
from engine.wan.save import save_model
from engine.wan.text_encoder import Style
from engine.wan.weights import ModelConfig

MODEL_NAME = "livebrush-tiny"
# What the seed changes cannot be seen: one noise sample lasts a stream, and all of the picture comes from the camera.
SERVING = ServingProfile(seed=False, sizes=((256, 256), (384, 224), (224, 384), (320, 320), (192, 192)))
# Shares of a picture that may be carried along with the camera's motion. Styles with a pattern fixed to the frame
# (screens, tiles, strokes, paper) have none, or little where the pattern is faint.
CARRIED = {
    "photo": 0.25,
    "comic": 0.8,
    "neon": 0.8,
    "ukiyo": 0.85,
    "thermal": 0.85,
    "popart": 0.85,
    "vintage": 0.8,
    "marble": 0.75,
    "watercolor": 0.5,
    "clay": 0.65,
    "blueprint": 0.5,
    "pencil": 0.2,
}
MODEL_FOLDER = Path(__file__).parent.parent / "models" / MODEL_NAME


def last_stage(work: Path) -> int:
    """The furthest stage with a checkpoint: what export takes."""
    return max((stage for stage in STAGES if (work / f"transformer_{stage}.pt").exists()), default=1)


def export(work: Path, folder: Path) -> ModelConfig:
    """Write the model folder from the checkpoints in `work`; the card takes its figures from evaluation.json there.

    Raises: FileNotFoundError naming the stage that has not been trained.
    """
    transformer, vae = trained_parts(work, last_stage(work))
    return save_model(
        folder,
        name=MODEL_NAME,
        transformer=transformer,
        vae=vae,
        text=build_text_table(work),
        styles=[_listed(style) for style in STYLES],
        steady=SteadyConfig(),
        serving=SERVING,
        card=model_card(read_evaluation(work), training_minutes(work), read_notes(work)),
    )


def _listed(style: TrainingStyle) -> Style:
    return Style(
        id=style.id,
        name=style.name,
        prompt=style.prompt,
        phrases=style.phrases[1:],
        carried=CARRIED.get(style.id, 0.0),
        thumbnail=f"/styles/{style.id}.jpg",
    )


def read_evaluation(work: Path) -> dict[str, dict[str, float]]:
    """What engine.training.evaluate measured last; empty before the first time."""
    path = work / "evaluation.json"
    figures: dict[str, dict[str, float]] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return figures


def read_notes(work: Path) -> str:
    """notes.md of the working folder: what the person who trained has to say about this run; may be missing."""
    path = work / "notes.md"
    return f"\n{path.read_text(encoding='utf-8').strip()}\n" if path.exists() else ""


def training_minutes(work: Path) -> dict[str, tuple[float, int]]:
    """Wall-clock minutes and steps that each trained stage has really taken so far."""
    stages = {
        "decoder": "vae.pt",
        "transformer, stage 1": "transformer_1.pt",
        "transformer, stage 2": "transformer_2.pt",
        "transformer, stage 3": "transformer_3.pt",
    }
    found = {name: load_checkpoint(work / file) for name, file in stages.items()}
    return {name: (float(state["spent_s"]) / 60, int(state["step"])) for name, state in found.items() if state}


def main() -> None:
    """Command line of this stage."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path(".work/tiny"))
    parser.add_argument("--out", type=Path, default=MODEL_FOLDER)
    args = parser.parse_args()
    torch.set_num_threads(1)
    config = export(args.work, args.out)
    print(f"{args.out}: {config.name}, SHA-256 {config.sha256}")


if __name__ == "__main__":
    main()
