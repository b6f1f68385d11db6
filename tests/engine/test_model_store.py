"""Published parts, from a hub or from disk and in every layout, become one and the same folder that loads."""

import hashlib
import io
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from engine import model_store
from engine.api import EngineError
from engine.config import user_models_dir
from engine.hub import HubError, RemoteFile
from engine.model_store import (
    KNOWN,
    DownloadOptions,
    KnownModel,
    ModelStoreError,
    Source,
    convert,
    download,
    find_folder,
    installed,
    parse_source,
    verify,
)
from engine.wan.checkpoints import transformer_name_to_diffusers, transformer_to_original
from engine.wan.taehv import TAEHV
from engine.wan.transformer import CausalTransformer
from engine.wan.umt5 import umt5_names
from engine.wan.untrained import SMALL_SERVING, SMALL_TAEHV, SMALL_WAN, SMALL_WAN_VAE, randomise, untrained_text
from engine.wan.wan_vae import WanVAE
from engine.wan.weights import WeightsError, load_model
from tests.engine.loopback_hub import COMMIT, LoopbackHub

BASE, V2V = "base/wan", "people/v2v"


class Published:
    """Random weights under their published names."""

    def __init__(self) -> None:
        random = torch.Generator().manual_seed(0)
        self.network, self.autoencoder, light = CausalTransformer(SMALL_WAN), WanVAE(SMALL_WAN_VAE), TAEHV(SMALL_TAEHV)
        for module in (self.network, self.autoencoder, light):
            randomise(module, random)
        self.transformer = transformer_to_original(self.network.state_dict(), SMALL_WAN)
        self.vae: dict[str, Tensor] = dict(self.autoencoder.state_dict())
        self.light: dict[str, Tensor] = dict(light.state_dict())
        self.text = untrained_text(SMALL_WAN.text_dim, random)
        names = umt5_names(self.text.config)
        self.wan_text = {source.key: self.text.tensors[key] for key, source in names.items()}

    @property
    def model(self) -> KnownModel:
        sources = {
            "transformer": Source(RemoteFile(V2V, "wan_causal/model.pt"), "Apache-2.0"),
            "vae": Source(RemoteFile(BASE, "Wan2.1_VAE.pth"), "Apache-2.0"),
            "text": Source(RemoteFile(BASE, "models_t5.pth"), "Apache-2.0"),
            "tokenizer": Source(RemoteFile(BASE, "google/umt5-xxl/tokenizer.json"), "Apache-2.0"),
        }
        return KnownModel(
            "wan-small",
            "Random weights",
            sources,
            SMALL_WAN,
            SMALL_WAN_VAE,
            SMALL_TAEHV,
            serving=SMALL_SERVING,
            text=self.text.config,
        )


@pytest.fixture(scope="module")
def published() -> Published:
    return Published()


@pytest.fixture(autouse=True)
def models_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LIVEBRUSH_MODELS_DIR", str(tmp_path / "models"))
    return tmp_path / "models"


def pickled(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


@pytest.fixture
def hub(published: Published, monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackHub]:
    generator = {f"model.{key}": tensor for key, tensor in published.transformer.items()}
    hub = LoopbackHub(
        {
            (V2V, "wan_causal/model.pt"): pickled({"generator": generator}),
            (BASE, "Wan2.1_VAE.pth"): pickled(published.vae),
            (BASE, "models_t5.pth"): pickled({key: tensor.bfloat16() for key, tensor in published.wan_text.items()}),
            (BASE, "google/umt5-xxl/tokenizer.json"): published.text.tokenizer,
        }
    )
    with hub.running() as url:
        monkeypatch.setenv("HF_ENDPOINT", url)
        yield hub


def assert_holds(folder: Path, published: Published) -> None:
    """The folder verifies, and loads as what was published."""
    verify(folder)
    model = load_model(folder, "cpu")
    try:
        for mine, theirs in ((published.network, model.transformer), (published.autoencoder, model.vae)):
            loaded = theirs.state_dict()
            for key, tensor in mine.state_dict().items():
                exact = tensor if mine is published.autoencoder else tensor.bfloat16().float()
                assert torch.equal(loaded[key], exact), key
        assert model.config.sampling.latents == "raw"
        assert model.styles.styles
    finally:
        model.text.close()


def test_a_model_is_downloaded_converted_verified_and_loads(
    hub: LoopbackHub, published: Published, models_dir: Path
) -> None:
    told: list[tuple[str, int, int]] = []
    folder = download(published.model, progress=lambda *step: told.append(step))
    assert folder == models_dir / "wan-small"
    assert_holds(folder, published)
    stages = list(dict.fromkeys(what for what, _, _ in told))
    assert stages[:2] == ["asking the hub", "downloading model.pt"]
    assert stages[-1] == "writing text_encoder/model.safetensors"
    assert all(0 <= done <= total for _, done, total in told)
    assert {path.name for path in models_dir.iterdir()} == {"wan-small", ".lock", ".downloads"}
    assert not [path for path in (models_dir / ".downloads").rglob("*") if path.is_file()]
    config = json.loads((folder / "config.json").read_text())
    assert config["source"]["transformer"] == f"{V2V}/wan_causal/model.pt at {COMMIT}"
    assert config["files"]["vae.safetensors"]["sha256"] == hashlib.sha256(
        (folder / "vae.safetensors").read_bytes()
    ).hexdigest()  # fmt: skip
    assert "people/v2v" in (folder / "README.md").read_text()
    assert [model.name for model in installed()] == ["livebrush-tiny", "wan-small"]
    assert find_folder("wan-small") == folder


def test_a_download_that_was_cut_short_goes_on_and_what_is_there_stays(
    hub: LoopbackHub, published: Published, models_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.hub.time.sleep", lambda _: None)
    hub.cut = [200_000, *[0] * 5]
    with pytest.raises(HubError, match="it goes on from there"):
        download(published.model)
    assert not (models_dir / "wan-small").exists()
    hub.ranges.clear()
    assert_holds(download(published.model, DownloadOptions(keep=True)), published)
    assert hub.ranges[0] is not None
    with pytest.raises(ModelStoreError, match="is there already; --force replaces it"):
        download(published.model)
    # Kept files are checked, not fetched.
    hub.ranges.clear()
    download(published.model, DownloadOptions(force=True))
    assert hub.ranges == []


def test_parts_can_come_from_another_place_and_revision(hub: LoopbackHub, published: Published) -> None:
    hub.files["mirror/v2v", "other.pt"] = hub.files.pop((V2V, "wan_causal/model.pt"))
    with pytest.raises(HubError, match="no such repository"):
        download(published.model)
    part, remote = parse_source(f"transformer=mirror/v2v:other.pt@{COMMIT}")
    assert_holds(download(published.model, DownloadOptions({part: remote})), published)
    assert parse_source("vae=a/b:c/d.pth")[1] == RemoteFile("a/b", "c/d.pth")
    with pytest.raises(ValueError, match="PART=OWNER/NAME:PATH"):
        parse_source("vea=a/b:c")


def test_a_wrong_file_leaves_no_model_behind(hub: LoopbackHub, published: Published, models_dir: Path) -> None:
    hub.wrong.add("Wan2.1_VAE.pth")
    with pytest.raises(HubError, match="do not trust this source"):
        download(published.model)
    hub.wrong.clear()
    del (vae := dict(published.vae))["conv1.bias"]
    hub.files[BASE, "Wan2.1_VAE.pth"] = pickled(vae)
    with pytest.raises(WeightsError, match=r"the VAE for vae\.safetensors .*missing conv1\.bias"):
        download(published.model)
    assert not (models_dir / "wan-small").exists()
    assert not (models_dir / ".wan-small.part").exists()


def below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + key: tensor for key, tensor in tensors.items()}


LAYOUTS: dict[str, Callable[[Published], dict[str, Any]]] = {
    "bare.pth": lambda p: p.transformer,
    "ema.pt": lambda p: {"generator_ema": below("model.", p.transformer)},
    "state.pt": lambda p: {"state_dict": below("model.", p.transformer)},
    "fsdp.pt": lambda p: {"generator": below("model._fsdp_wrapped_module.", p.transformer)},
    "bare.safetensors": lambda p: p.transformer,
    "diffusers.safetensors": lambda p: {transformer_name_to_diffusers(k): v for k, v in p.transformer.items()},
}


@pytest.fixture
def parts(published: Published, tmp_path: Path) -> dict[str, list[Path]]:
    """The other parts, as files."""
    tmp_path.joinpath("vae.pth").write_bytes(pickled(published.vae))
    tmp_path.joinpath("t5.pth").write_bytes(pickled(published.wan_text))
    tmp_path.joinpath("tokenizer.json").write_bytes(published.text.tokenizer)
    return {
        "vae": [tmp_path / "vae.pth"],
        "text": [tmp_path / "t5.pth"],
        "tokenizer": [tmp_path / "tokenizer.json"],
    }


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_converts_to_the_same_folder(
    name: str, published: Published, parts: dict[str, list[Path]], tmp_path: Path
) -> None:
    content = LAYOUTS[name](published)
    if name.endswith(".safetensors"):
        save_file({key: tensor.contiguous() for key, tensor in content.items()}, tmp_path / name)
    else:
        torch.save(content, tmp_path / name)
    folder = convert(published.model, {"transformer": [tmp_path / name], **parts}, name="mine")
    assert folder.name == "mine"
    assert_holds(folder, published)


def test_folders_of_shards_and_the_light_vae_are_taken(published: Published, tmp_path: Path) -> None:
    for part, tensors in (("transformer", published.transformer), ("text", dict(published.text.tensors))):
        (tmp_path / part).mkdir()
        keys = sorted(tensors)
        for number, chosen in enumerate((keys[::2], keys[1::2])):
            save_file({key: tensors[key].contiguous() for key in chosen}, tmp_path / part / f"{number}.safetensors")
    (tmp_path / "text" / "tokenizer.json").write_bytes(published.text.tokenizer)
    torch.save(published.vae, tmp_path / "vae.pth")
    torch.save(published.light, tmp_path / "taew2_1.pth")
    files = {
        "transformer": [tmp_path / "transformer"],
        "vae": [tmp_path / "vae.pth"],
        "text": [tmp_path / "text"],
        "tokenizer": [tmp_path / "text"],
        "taehv": [tmp_path / "taew2_1.pth"],
    }
    folder = convert(published.model, files)
    verify(folder)
    model = load_model(folder, "cpu")
    assert isinstance(model.vae, TAEHV)
    assert all(torch.equal(model.vae.state_dict()[key], tensor) for key, tensor in published.light.items())
    model.text.close()
    full = load_model(folder, "cpu", vae="full")
    assert isinstance(full.vae, WanVAE)
    full.text.close()


def test_what_cannot_be_converted_is_said(published: Published, parts: dict[str, list[Path]], tmp_path: Path) -> None:
    transformer = tmp_path / "dit.pth"
    torch.save(published.transformer, transformer)
    model = published.model
    with pytest.raises(ModelStoreError, match="give --transformer"):
        convert(model, parts)
    with pytest.raises(ModelStoreError, match="give --tokenizer"):
        convert(model, {"transformer": [transformer], "vae": parts["vae"], "text": parts["text"]})
    with pytest.raises(WeightsError, match="holds a vae, not a transformer: were two files swapped"):
        convert(model, {**parts, "transformer": parts["vae"]})
    with pytest.raises(ModelStoreError, match=r"is no tokenizer\.json"):
        convert(model, {**parts, "transformer": [transformer], "tokenizer": [transformer]})
    with pytest.raises(WeightsError, match="is in another of the files too"):
        convert(model, {**parts, "transformer": [transformer, transformer]})
    with pytest.raises(WeightsError, match="holds no safetensors files"):
        convert(model, {**parts, "transformer": [tmp_path]})
    with pytest.raises(ModelStoreError, match="cannot name a folder"):
        convert(model, {**parts, "transformer": [transformer]}, name="../up")
    wider = replace(model, transformer=SMALL_WAN.model_copy(update={"dim": 96}))
    with pytest.raises(WeightsError, match=r"head\.head\.weight is \(64, 48\), must be \(64, 96\)"):
        convert(wider, {**parts, "transformer": [transformer]})


def test_too_small_a_disk_is_told_before_anything_is_fetched(
    hub: LoopbackHub, published: Published, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type("Usage", (), {"free": 10_000})
    monkeypatch.setattr("engine.hub.shutil.disk_usage", lambda _: usage)
    with pytest.raises(EngineError, match=r"wan-small with its downloads needs .* GB are free"):
        download(published.model)
    assert hub.ranges == []


def test_two_commands_do_not_write_the_same_folder(published: Published, parts: dict[str, list[Path]]) -> None:
    with model_store._locked(user_models_dir()), pytest.raises(ModelStoreError, match="wait until it is done"):
        convert(published.model, {**parts, "transformer": parts["vae"]})


def test_verify_finds_a_flipped_byte_a_short_file_and_a_missing_one(
    published: Published, parts: dict[str, list[Path]], tmp_path: Path
) -> None:
    torch.save(published.transformer, tmp_path / "dit.pth")
    folder = convert(published.model, {"transformer": [tmp_path / "dit.pth"], **parts})
    path = folder / "transformer.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(WeightsError, match=r"transformer\.safetensors has \d+ bytes and SHA-256"):
        verify(folder)
    # Loading does not read it all, and says nothing.
    load_model(folder, "cpu").text.close()
    path.write_bytes(content[:-8])
    for check in (verify, lambda folder: load_model(folder, "cpu")):
        with pytest.raises(WeightsError, match=rf"has {len(content) - 8} bytes, config\.json says {len(content)}"):
            check(folder)
    path.unlink()
    with pytest.raises(WeightsError, match=r"cannot read .*transformer\.safetensors"):
        verify(folder)


def test_known_models_say_where_they_come_from_and_what_they_take() -> None:
    small, large = KNOWN["wan2.1-1.3b"], KNOWN["wan2.1-14b"]
    assert small.sources["transformer"].remote == RemoteFile(
        "jerryfeng/StreamDiffusionV2", "wan_causal_dmd_v2v/model.pt"
    )
    assert "not verified" in large.sources["transformer"].licence
    assert small.folder_bytes == pytest.approx(14.7e9, rel=0.02)
    assert large.folder_bytes == pytest.approx(40.4e9, rel=0.02)
    with pytest.raises(ModelStoreError, match=r"there are wan2\.1-1\.3b, wan2\.1-14b"):
        model_store.known_model("wan3")
    with pytest.raises(ModelStoreError, match="models download"):
        find_folder("nothing")
