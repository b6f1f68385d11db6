"""What the page is told of the model being served: its name, steps and styles."""

from __future__ import annotations

import json
from pathlib import Path

from engine.config import CONFIG_FILE, DEFAULT_MODEL, MAX_STEPS, MODELS_DIR, EngineSettings

STYLES_FILE = "styles.json"


def load_styles(model_dir: Path) -> list[dict[str, str]]:
    """The style tiles of a model: id, name, prompt, thumbnail.

    A model without styles.json knows any words: it is offered the styles of the embedded one to begin with.
    """
    path = model_dir / STYLES_FILE
    if not path.is_file():
        path = MODELS_DIR / DEFAULT_MODEL / STYLES_FILE
    shown = ("id", "name", "prompt", "thumbnail")
    return [{key: style[key] for key in shown if key in style} for style in json.loads(path.read_text())]


def model_name(settings: EngineSettings) -> str:
    """How people know the model: the last part where a path was given."""
    return Path(settings.model).name or settings.model


def steps_max(settings: EngineSettings) -> int:
    """The most steps a session may ask for: MAX_STEPS, or as many as the model has timesteps for.

    Raises: FileNotFoundError for an unknown model.
    """
    sampling = json.loads((settings.model_dir / CONFIG_FILE).read_bytes()).get("sampling") or {}
    timesteps = settings.sampling.get("timesteps", sampling.get("timesteps"))
    return min(MAX_STEPS, len(timesteps)) if timesteps else MAX_STEPS
