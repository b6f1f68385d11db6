"""`livebrush models`: what it prints, for people and machines, and how it fails."""

import argparse
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from engine import model_store
from engine.model_store import KnownModel
from engine.wan.checkpoints import transformer_to_original
from engine.wan.umt5 import umt5_names
from engine.wan.untrained import SMALL_SERVING, SMALL_WAN, SMALL_WAN_VAE, untrained_text, untrained_wan_model
from server.models_command import add_models_parser
from tests.engine.loopback_hub import LoopbackHub


def livebrush(*arguments: str) -> int:
    parser = argparse.ArgumentParser(prog="livebrush")
    add_models_parser(parser.add_subparsers(required=True))
    options = parser.parse_args(["models", *arguments])
    status: int = options.command(options)
    return status


@pytest.fixture(autouse=True)
def models_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LIVEBRUSH_MODELS_DIR", str(tmp_path / "models"))
    return tmp_path / "models"


def pickled(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackHub]:
    """A hub that has wan2.1-1.3b, in small."""
    model = untrained_wan_model()
    text = untrained_text(SMALL_WAN.text_dim, torch.Generator().manual_seed(0))
    original = transformer_to_original(model.transformer.state_dict(), SMALL_WAN)
    known = model_store.KNOWN["wan2.1-1.3b"]
    small = KnownModel(
        known.name, known.summary, known.sources, SMALL_WAN, SMALL_WAN_VAE, serving=SMALL_SERVING, text=text.config
    )
    monkeypatch.setitem(model_store.KNOWN, known.name, small)
    contents = {
        "transformer": pickled({"generator": {f"model.{key}": tensor for key, tensor in original.items()}}),
        "vae": pickled(dict(model.vae.state_dict())),
        "text": pickled({source.key: text.tensors[key] for key, source in umt5_names(text.config).items()}),
        "tokenizer": text.tokenizer,
    }
    remotes = {part: source.remote for part, source in known.sources.items()}
    hub = LoopbackHub({(remotes[part].repo, remotes[part].path): content for part, content in contents.items()})
    with hub.running() as url:
        monkeypatch.setenv("HF_ENDPOINT", url)
        yield hub


def test_a_model_is_downloaded_listed_and_verified(
    hub: LoopbackHub, models_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert livebrush("download", "wan2.1-1.3b", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["ok"], told["name"], told["folder"]) == (True, "wan2.1-1.3b", str(models_dir / "wan2.1-1.3b"))
    assert told["files"].keys() >= {"transformer.safetensors", "vae.safetensors", "text_encoder/model.safetensors"}
    assert livebrush("verify", "wan2.1-1.3b") == 0
    assert "wan2.1-1.3b: ready, 5 files, " in capsys.readouterr().out
    assert livebrush("list", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert [model["name"] for model in told["installed"]] == ["livebrush-tiny", "wan2.1-1.3b"]
    assert [model["installed"] for model in told["known"]] == [True, False]
    assert livebrush("download", "wan2.1-1.3b") == 1
    assert "--force replaces it" in capsys.readouterr().err


def test_the_list_names_sources_licences_needs_and_what_was_never_done(capsys: pytest.CaptureFixture[str]) -> None:
    assert livebrush("list") == 0
    told = capsys.readouterr().out
    for said in (
        "livebrush-tiny",
        "40.4 GB  Wan 2.1, 14 billion parameters",
        "needs 9.3 GiB of GPU memory for one stream of 832x480, full VAE",
        "jerryfeng/StreamDiffusionV2/wan_causal_dmd_v2v/model.pt (Apache-2.0)",
        "not verified",
        "were never loaded",
    ):
        assert said in told


def test_local_files_are_converted(hub: LoopbackHub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = []
    for part, source in model_store.KNOWN["wan2.1-1.3b"].sources.items():
        path = tmp_path / Path(source.remote.path).name
        path.write_bytes(hub.files[source.remote.repo, source.remote.path])
        arguments += [f"--{part}", str(path)]
    assert livebrush("convert", "wan2.1-1.3b", "--name", "mine", *arguments) == 0
    assert f"{tmp_path / 'models' / 'mine'}: ready, 5 files" in capsys.readouterr().out
    assert livebrush("verify", str(tmp_path / "models" / "mine"), "--json") == 0
    assert json.loads(capsys.readouterr().out)["name"] == "mine"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("download", "wan3"), "no model 'wan3' is known; there are wan2.1-1.3b, wan2.1-14b"),
        (("verify", "wan3"), "no model 'wan3' on this machine; there are livebrush-tiny"),
        (("convert", "wan2.1-1.3b"), "give --transformer and --vae"),
        (("convert", "wan2.1-1.3b", "--transformer", "no.pt", "--vae", "no.pt"), "cannot read no.pt"),
    ],
)
def test_failures_are_one_plain_message(
    hub: LoopbackHub, arguments: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert livebrush(*arguments, "--json") == 1
    told = capsys.readouterr()
    assert said in told.err
    assert said in json.loads(told.out)["error"]


def test_no_hub_is_a_plain_message_too(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert livebrush("download", "wan2.1-14b") == 1
    told = capsys.readouterr()
    assert "40.4 GB when converted" in told.out
    assert "cannot be reached" in told.err


def test_a_wrong_source_is_misuse(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        livebrush("download", "wan2.1-1.3b", "--source", "vae=nonsense")
    assert caught.value.code == 2
    assert "PART=OWNER/NAME:PATH" in capsys.readouterr().err
