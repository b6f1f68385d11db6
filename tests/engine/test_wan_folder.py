"""A Wan model's folder: what is written comes back, mapped and checked; what is wrong or not there is said."""

import json
from pathlib import Path

import pytest
import torch

from engine.api import EngineError
from engine.config import WAN_SAMPLING
from engine.wan.checkpoints import WeightsError
from engine.wan.save import save_model
from engine.wan.untrained import (
    SMALL_SERVING,
    SMALL_TAEHV,
    SMALL_WAN,
    SMALL_WAN_VAE,
    STYLES,
    untrained_wan_model,
    write_untrained_wan,
)
from engine.wan.vae import VAEState
from engine.wan.wan_vae import WanVAE
from engine.wan.weights import Model, ModelConfig, load_model, read_config, verify_model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_untrained_wan(tmp_path / "wan")
    return tmp_path / "wan"


def load(folder: Path, **options: object) -> Model:
    """Load and let the text encoder go at once."""
    model = load_model(folder, "cpu", **options)  # type: ignore[arg-type]
    model.text.close()
    return model


def test_the_same_seed_in_memory_and_on_disk_is_the_same_model(folder: Path) -> None:
    loaded, made = load(folder), untrained_wan_model()
    assert loaded.config.transformer == SMALL_WAN
    assert loaded.config.vae == SMALL_WAN_VAE
    assert (loaded.config.sampling, loaded.config.serving) == (WAN_SAMPLING, SMALL_SERVING)
    assert loaded.styles.styles == STYLES
    assert loaded.styles.nearest("Water Colour") == ("watercolor", 1.0)
    assert loaded.styles.nearest("a boat") is None
    for mine, theirs in ((made.transformer, loaded.transformer), (made.vae, loaded.vae)):
        assert all(torch.equal(theirs.state_dict()[key], tensor) for key, tensor in mine.state_dict().items())
        assert not theirs.training
        assert not any(parameter.requires_grad for parameter in theirs.parameters())


def test_a_loaded_model_computes(folder: Path) -> None:
    model = load(folder, dtype=torch.bfloat16)
    with torch.inference_mode():
        frames = torch.rand(1, 5, 3, 64, 64, dtype=torch.bfloat16) * 2 - 1
        latent, _ = model.vae.encode(frames, VAEState())
        prompt = model.transformer.prompt_context(torch.randn(1, 32, 32, dtype=torch.bfloat16))
        flow = model.transformer.forward_clip(latent, None, torch.tensor([700.0]), prompt)
        shown, _ = model.vae.decode(model.vae.normalise(latent), VAEState())
    assert flow.shape == latent.shape == (1, 2, 16, 8, 8)
    assert shown.shape == frames.shape
    assert shown.float().std() > 0.1
    assert flow.dtype == shown.dtype == torch.bfloat16
    assert flow.isfinite().all()


def test_progress_rises_from_file_to_file(folder: Path) -> None:
    told: list[tuple[float, str]] = []
    load(folder, progress=lambda share, what: told.append((share, what)))
    shares = [share for share, _ in told]
    assert shares == sorted(shares)
    assert shares[0] == 0
    assert 0.9 < shares[-1] <= 1
    assert list(dict.fromkeys(what for _, what in told)) == [
        "loading transformer.safetensors",
        "loading vae.safetensors",
    ]


def test_the_transformer_is_stored_in_bfloat16_unless_asked_otherwise(tmp_path: Path) -> None:
    config = write_untrained_wan(tmp_path / "half", dtype=torch.bfloat16)
    full = write_untrained_wan(tmp_path / "full")
    sizes = [c.files["transformer.safetensors"].size_bytes for c in (config, full)]
    assert 1.8 < sizes[1] / sizes[0] < 2
    made = untrained_wan_model().transformer.state_dict()
    for key, tensor in load(tmp_path / "half").transformer.state_dict().items():
        assert torch.equal(tensor, made[key].bfloat16().float())


def test_the_light_vae_is_taken_where_it_is_and_missed_where_not(folder: Path, tmp_path: Path) -> None:
    assert isinstance(load(folder).vae, WanVAE)
    with pytest.raises(WeightsError, match=r"has no taehv\.safetensors: choose vae full"):
        load_model(folder, "cpu", vae="light")
    write_untrained_wan(tmp_path / "both", light_vae=SMALL_TAEHV)
    verify_model(tmp_path / "both")
    assert not isinstance(load(tmp_path / "both").vae, WanVAE)
    assert isinstance(load(tmp_path / "both", vae="full").vae, WanVAE)


@pytest.mark.parametrize("name", ["transformer.safetensors", "vae.safetensors", "config.json", "styles.json"])
def test_a_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(WeightsError, match=f"cannot read .*{name}"):
        load_model(folder, "cpu")


def test_keys_that_do_not_fit_are_named(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["transformer"]["layers"] = 3
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(WeightsError, match=r"transformer\.safetensors does not fit .* missing blocks\.2\.cross_attn"):
        load_model(folder, "cpu")


def test_a_configuration_whose_parts_do_not_fit_is_refused(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["transformer"]["latent_channels"] = 8
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(WeightsError, match="the VAE has 16 latent channels, the transformer 8"):
        read_config(folder)
    with pytest.raises(ValueError, match="either sha256"):
        ModelConfig(name="x", transformer=SMALL_WAN, vae=SMALL_WAN_VAE)


def test_float8_without_a_gpu_is_refused_before_anything_is_loaded(folder: Path) -> None:
    with pytest.raises(EngineError, match="fp8 needs an NVIDIA GPU; the device is cpu"):
        load_model(folder, "cpu", fp8=True)


def test_a_wan_model_is_not_saved_as_one_file(tmp_path: Path) -> None:
    model = untrained_wan_model()
    with pytest.raises(TypeError, match="save_wan_model"):
        save_model(
            tmp_path, name="x", transformer=model.transformer, vae=model.vae, text=model.text, styles=(), card=""
        )
