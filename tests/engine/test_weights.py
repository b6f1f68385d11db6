"""A model folder: what is saved comes back, and whatever is wrong with one is named."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine.api import EngineError, StreamParams
from engine.pipeline import Pipeline
from engine.wan.presets import LIVEBRUSH_TINY
from engine.wan.save import save_model
from engine.wan.untrained import STYLES, untrained_model
from engine.wan.weights import Model, WeightsError, load_model

SMALL = LIVEBRUSH_TINY.model_copy(update={"dim": 48, "ffn_dim": 64, "heads": 2, "layers": 2, "refine_channels": 8})


@pytest.fixture
def model() -> Model:
    return untrained_model(SMALL)


@pytest.fixture
def folder(model: Model, tmp_path: Path) -> Path:
    save_model(
        tmp_path / "small",
        name="small",
        transformer=model.transformer,
        vae=model.vae,
        text=model.text,
        styles=STYLES,
        card="# small\n",
    )
    return tmp_path / "small"


def test_what_is_saved_comes_back(model: Model, folder: Path) -> None:
    loaded = load_model(folder, "cpu", torch.float32)
    assert loaded.config.transformer == SMALL
    assert loaded.config.name == "small"
    assert loaded.styles.styles == STYLES
    assert {file.name for file in folder.iterdir()} == {"config.json", "model.safetensors", "styles.json", "README.md"}
    for mine, theirs in ((model.transformer, loaded.transformer), (model.vae, loaded.vae)):
        for key, tensor in mine.state_dict().items():
            torch.testing.assert_close(theirs.state_dict()[key], tensor.half().float(), atol=0, rtol=0)
    frames = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)
    shown = []
    for which in (model, loaded):
        pipeline = Pipeline(which, 32, 32)
        shown.append(pipeline.render(pipeline.open(StreamParams(prompt="neon")), frames).astype(int))
    # float16 on disk moves the picture by a level or two.
    assert np.abs(shown[0] - shown[1]).mean() < 1


def test_weights_are_stored_small_and_latent_statistics_exactly(folder: Path) -> None:
    stored = load_file(folder / "model.safetensors")
    assert stored["transformer.head.weight"].dtype == torch.float16
    assert stored["vae.latent_std"].dtype == torch.float32
    assert stored["text.table_int8"].dtype == torch.int8
    assert stored["text.vocab"].dtype == torch.uint8


def test_loading_takes_the_dtype_asked_for_and_trains_nothing(folder: Path) -> None:
    loaded = load_model(folder, "cpu", torch.bfloat16)
    for module in (loaded.transformer, loaded.vae):
        assert not module.training
        assert all(p.dtype == torch.bfloat16 and not p.requires_grad for p in module.parameters())


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    """Change the weights file and keep its hash right."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    rehash(folder)


def rehash(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["sha256"] = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    (folder / "config.json").write_text(json.dumps(config))


def test_every_wrong_key_is_named_at_once(folder: Path) -> None:
    def spoil(tensors: dict[str, Tensor]) -> None:
        del tensors["transformer.head.bias"], tensors["text.vocab"]
        tensors["vae.extra"] = torch.zeros(1)
        tensors["transformer.head.weight"] = torch.zeros(3, 3)
        tensors["text.table_int8"] = torch.zeros(11, 5, dtype=torch.int8)

    rewrite(folder, spoil)
    with pytest.raises(WeightsError) as caught:
        load_model(folder, "cpu")
    for said in (
        "missing transformer.head.bias",
        "missing text.vocab",
        "unexpected vae.extra",
        "transformer.head.weight is (3, 3), must be (384, 48)",
        "text.table_int8 is torch.int8 (11, 5), must be int8 (V, 64)",
    ):
        assert said in str(caught.value)


def test_a_changed_file_is_refused_by_its_hash(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(WeightsError, match="SHA-256"):
        load_model(folder, "cpu")


def test_a_file_that_is_none_is_refused(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"version https://example.org/pointer")
    rehash(folder)
    with pytest.raises(WeightsError, match="no safetensors file"):
        load_model(folder, "cpu")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "styles.json"])
def test_a_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(EngineError, match=f"cannot read .*{name}"):
        load_model(folder, "cpu")


@pytest.mark.parametrize("text", ["{", "{}", '{"format": 2}'])
def test_a_broken_configuration_is_named(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text)
    with pytest.raises(WeightsError, match=r"config\.json is not valid"):
        load_model(folder, "cpu")


def test_a_table_that_does_not_fit_its_vocabulary_is_refused(folder: Path) -> None:
    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors["text.scale_fp16"] = torch.ones(5, 1, dtype=torch.float16)

    rewrite(folder, spoil)
    with pytest.raises(WeightsError, match="5 scales"):
        load_model(folder, "cpu")
