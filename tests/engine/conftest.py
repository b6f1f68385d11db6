from pathlib import Path

import pytest

from engine.wan.presets import LIVEBRUSH_TINY
from engine.wan.save import save_model
from engine.wan.untrained import STYLES, untrained_model


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with random weights, of the embedded model's shape but smaller."""
    folder = tmp_path_factory.mktemp("model")
    model = untrained_model(LIVEBRUSH_TINY.model_copy(update={"dim": 96, "ffn_dim": 192, "layers": 2}))
    save_model(
        folder,
        name="untrained",
        transformer=model.transformer,
        vae=model.vae,
        text=model.text,
        styles=STYLES,
        card="Random weights, for tests.\n",
    )
    return folder
