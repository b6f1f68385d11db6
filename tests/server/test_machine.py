"""What is found on a machine, and settings resolved by it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from engine.choose import GIB, Device, Machine, Model, Need
from engine.config import DEFAULT_MODEL, EngineSettings, ServingProfile
from engine.wan.vae_config import TAEHVConfig, WanVAEConfig
from server.configure import SettingsError, resolve
from server.machine import GpuError, find_gpus, find_machine, installed_models, need_of, parse_gpus, visible
from server.settings import ServerSettings

SMI = "0, NVIDIA GeForce RTX 4090, 23500\n1, NVIDIA H100, 80GB, 81000\n2, NVIDIA GB10, [N/A]\n"
HOST = Device("cpu", "Some CPU", 64 * GIB)


def write_wan(folder: Path, **serving: object) -> Path:
    """As much of a Wan model folder as is read without torch."""
    folder.mkdir(parents=True)
    (folder / "transformer.safetensors").write_bytes(b"0" * 1000)
    config = {
        "name": folder.name,
        "transformer": {"dim": 48, "ffn_dim": 96, "heads": 4, "layers": 2, "text_dim": 32, "text_len": 32},
        "vae": {"z_dim": 16, "dim": 8},
        "files": {"text_encoder/model.safetensors": {"size_bytes": 5_000_000, "sha256": "0" * 64}},
        "serving": {"fps": 16, "sizes": [[96, 64], [64, 64]], "first_chunk_frames": 5, "steps": 2} | serving,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


Flags = dict[tuple[str, ...], tuple[str, object]]


def with_flags(look: Callable[[], Machine] = lambda: Machine((HOST,), ()), **flags: object) -> ServerSettings:
    """Settings by flags of `serve`, named as in EngineSettings and ServerSettings."""
    paths: Flags = {
        (("engine", name) if name in EngineSettings.model_fields else (name,)): (f"--{name}", value)
        for name, value in flags.items()
    }
    return resolve(None, {}, paths, look=look).settings


def test_nvidia_smi_is_read_with_names_that_hold_commas_and_memory_that_is_unknown() -> None:
    assert parse_gpus(SMI) == [
        Device("cuda:0", "NVIDIA GeForce RTX 4090", 23500 << 20),
        Device("cuda:1", "NVIDIA H100, 80GB", 81000 << 20),
        Device("cuda:2", "NVIDIA GB10", None),
    ]
    with pytest.raises(GpuError, match="says 'Failed"):
        parse_gpus("Failed to initialise NVML: driver/library version mismatch")


def test_gpus_are_numbered_as_torch_will_see_them() -> None:
    gpus = parse_gpus(SMI)
    assert visible(gpus, {}) == gpus
    assert [(gpu.name, gpu.title) for gpu in visible(gpus, {"CUDA_VISIBLE_DEVICES": "1,0"})] == [
        ("cuda:0", "NVIDIA H100, 80GB"),
        ("cuda:1", "NVIDIA GeForce RTX 4090"),
    ]
    assert visible(gpus, {"CUDA_VISIBLE_DEVICES": ""}) == visible(gpus, {"CUDA_VISIBLE_DEVICES": "-1"}) == []
    assert visible(gpus, {"CUDA_VISIBLE_DEVICES": "GPU-1234"}) == gpus


def test_a_gpu_tool_is_asked_and_a_broken_one_means_no_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "nvidia-smi"
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    tool.write_text(f"#!/bin/sh\nprintf '%s' '{SMI}'\n")
    tool.chmod(0o755)
    assert [gpu.name for gpu in find_gpus()] == ["cuda:0", "cuda:1", "cuda:2"]
    assert [device.name for device in find_machine().devices] == ["cpu", "cuda:0", "cuda:1", "cuda:2"]
    tool.write_text("#!/bin/sh\nexit 9\n")
    with pytest.raises(GpuError):
        find_gpus()
    assert [device.name for device in find_machine().devices] == ["cpu"]


def test_without_the_tool_the_device_files_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr("server.machine.DEV", tmp_path)
    assert find_gpus() == []
    for name in ("nvidia0", "nvidia1", "nvidiactl"):
        (tmp_path / name).touch()
    assert find_gpus() == [Device("cuda:0", "NVIDIA GPU", None), Device("cuda:1", "NVIDIA GPU", None)]


def test_models_are_those_shipped_and_those_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIVEBRUSH_MODELS_DIR", str(tmp_path))
    write_wan(tmp_path / "wan-small")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    found = {model.name: model for model in installed_models()}
    assert set(found) == {DEFAULT_MODEL, "wan-small"}
    assert found["wan-small"].profile.first_chunk_frames == 5 and found["wan-small"].weights_bytes == 1000


def test_the_need_counts_the_text_encoder_where_it_lives(tmp_path: Path) -> None:
    folder = str(write_wan(tmp_path / "wan-small"))
    here = need_of(EngineSettings(model=folder, width=96, height=64))
    assert here.device["text encoder"] == 5_000_000 and here.host == {}
    apart = need_of(EngineSettings(model=folder, width=96, height=64, device="cuda:0"))
    assert "text encoder" not in apart.device and apart.host == {"text encoder": 5_000_000}
    batch = need_of(EngineSettings(model=folder, width=96, height=64, mode="batch"))
    assert batch.device["KV cache"] == 4 * here.device["KV cache"]


def test_the_need_is_of_both_vaes_where_they_fit_and_else_of_the_light_one(tmp_path: Path) -> None:
    folder = write_wan(tmp_path / "wan-small")
    config = json.loads((folder / "config.json").read_text())
    vaes = {"vae": WanVAEConfig().model_dump(), "light_vae": TAEHVConfig().model_dump()}
    (folder / "config.json").write_text(json.dumps(config | vaes))
    settings = EngineSettings(model=str(folder), width=96, height=64, device="cuda:0", max_streams=1)
    both = need_of(settings)
    assert {"VAE", "light VAE"} <= both.device.keys()
    assert need_of(settings, both.device_bytes) == both
    light = need_of(settings, both.device_bytes - 1)
    assert "VAE" not in light.device and light.device_bytes < both.device_bytes
    assert need_of(settings.model_copy(update={"vae": "light"}), both.device_bytes) == light

    def chosen(free: int) -> Need:
        machine = Machine((HOST, Device("cuda:0", "Some GPU", free)), ())
        flags: Flags = {("engine", "model"): ("--model", str(folder))}
        choice = resolve(None, {}, flags, look=lambda: machine).choice
        assert choice is not None and choice.settings.max_streams == 4
        return choice.need

    # What is told is what will be loaded.
    four = settings.model_copy(update={"max_streams": 4})
    assert chosen(need_of(four).device_bytes) == need_of(four)
    assert chosen(need_of(four).device_bytes - 1) == need_of(four, 0)


# --- settings


def test_the_embedded_model_is_served_as_ever() -> None:
    settings = resolve(None, {}, {}).settings
    assert settings == ServerSettings()


def test_a_model_says_how_it_is_served_unless_it_is_told(tmp_path: Path) -> None:
    folder = str(write_wan(tmp_path / "wan-small"))
    own = with_flags(model=folder)
    assert (own.engine.width, own.engine.height, own.max_fps, own.steps, own.min_fps) == (96, 64, 16, 2, 8)
    assert own.latency_budget_s == 0.5
    told = with_flags(model=folder, width=64, height=64, max_fps=10, steps=3)
    assert (told.engine.width, told.engine.height, told.max_fps, told.steps) == (64, 64, 10, 3)
    assert with_flags(model=folder, width=128).engine.height == 64
    slow = with_flags(model=str(write_wan(tmp_path / "slow", fps=4)))
    assert (slow.max_fps, slow.min_fps) == (4, 4)


def test_a_stream_batch_is_given_the_time_its_steps_take(tmp_path: Path) -> None:
    folder = str(write_wan(tmp_path / "wan-small"))
    assert with_flags(model=folder, mode="batch").latency_budget_s == 0.75
    assert with_flags(model=folder, mode="batch", steps=4).latency_budget_s == 1.25
    assert with_flags(model=folder, mode="batch", latency_budget_s=0.4).latency_budget_s == 0.4


def test_flags_win_over_the_environment_over_the_file_over_the_model(tmp_path: Path) -> None:
    folder = write_wan(tmp_path / "wan-small")
    config = tmp_path / "livebrush.toml"
    config.write_text(f'steps = 1\nmax_fps = 12.0\n[engine]\nmodel = "{folder}"\nwidth = 32\nheight = 32\n')
    environment = {"LIVEBRUSH_MAX_FPS": "11", "LIVEBRUSH_ENGINE__WIDTH": "48"}
    settings = resolve(config, environment, {("engine", "width"): ("--size", 64)}).settings
    assert (settings.steps, settings.max_fps, settings.engine.width, settings.engine.height) == (1, 11.0, 64, 32)


def test_auto_chooses_by_the_machine_and_what_is_told_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIVEBRUSH_MODELS_DIR", str(tmp_path))
    write_wan(tmp_path / "wan-small")
    models = (Model(DEFAULT_MODEL, ServingProfile(), 1), *installed_models())
    gpu = Machine((HOST, Device("cuda:0", "Some GPU", 24 * GIB)), models)
    for flags in ({}, {"model": "auto", "device": "auto"}):
        chosen = with_flags(lambda: gpu, **flags)
        assert (chosen.engine.model, chosen.engine.device, chosen.engine.width) == ("wan-small", "cuda:0", 96)
        assert (chosen.max_fps, chosen.steps) == (16, 2)
    assert with_flags(lambda: gpu, device="cpu").engine.model == DEFAULT_MODEL
    assert with_flags(lambda: Machine((HOST,), models)).engine.model == DEFAULT_MODEL


def test_less_memory_means_fewer_sessions_and_none_a_refusal(tmp_path: Path) -> None:
    folder = str(write_wan(tmp_path / "wan-small"))
    need = need_of(EngineSettings(model=folder, width=96, height=64, device="cuda:0", max_streams=1)).device_bytes

    def machine(free: int) -> Machine:
        return Machine((HOST, Device("cuda:0", "Some GPU", free)), ())

    few = with_flags(lambda: machine(need + 1), model=folder)
    assert (few.engine.max_streams, few.max_sessions) == (1, 1)
    with pytest.raises(SettingsError, match=r"wan-small at 64x64, 1 session needs .* choose a smaller --model"):
        with_flags(lambda: machine(1000), model=folder)


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        ({"device": "cuda:0"}, r"nvidia-smi finds no GPU; give cpu or auto \(from --device\)"),
        ({"device": "cuda:0,cuda:1"}, "names 2 devices: one process on one device serves for now"),
        ({"device": "tpu"}, "write cpu, cuda:N"),
        ({"model": "nope"}, "no model 'nope'"),
        ({"steps": 5}, "steps: 5 is refused"),
        ({"steps": "many", "mode": "batch"}, "steps: 'many' is refused"),
        ({"width": 250}, "width 250 is not a multiple of 16; use 256"),
    ],
)
def test_what_cannot_be_is_refused_with_the_bound(flags: dict[str, object], text: str) -> None:
    with pytest.raises(SettingsError, match=text):
        with_flags(**flags)  # type: ignore[arg-type]


def test_the_stand_in_asks_nothing_of_the_machine() -> None:
    def look() -> Machine:
        raise AssertionError("the machine was asked")

    assert with_flags(look, engine_kind="fake", model="nothing-like-it").engine.width == 256
