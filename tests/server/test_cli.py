"""The console script: what it prints, its exit status, and what it leaves behind when it is stopped."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from importlib.metadata import version
from pathlib import Path

import av
import numpy as np
import pytest

from server.cli import main
from server.configure import SettingsError, load_settings, parse_size

TIMEOUT_S = 60
COMMAND = [sys.executable, "-P", "-m", "server.cli"]
Livebrush = Callable[..., "Ended"]


@dataclass(frozen=True)
class Ended:
    """What a command left: its exit status and both streams."""

    status: int
    stdout: str
    stderr: str


@pytest.fixture
def livebrush(capsys: pytest.CaptureFixture[str]) -> Callable[..., Ended]:
    """Run a command in this process, as the console script does."""

    def run(*arguments: str | Path) -> Ended:
        try:
            status = main([str(argument) for argument in arguments])
        except SystemExit as leaving:  # argparse leaves by itself
            status = int(leaving.code or 0)
        return Ended(status, *capsys.readouterr())

    return run


def make_clip(path: Path, frames: int) -> Path:
    with av.open(str(path), "w") as output:
        video = output.add_stream("libx264", rate=30)
        assert isinstance(video, av.VideoStream)
        video.width, video.height, video.pix_fmt = 160, 96, "yuv420p"
        for index in range(frames):
            picture = av.VideoFrame.from_ndarray(np.full((96, 160, 3), index % 256, np.uint8), "rgb24")
            picture.pts, picture.time_base = index, Fraction(1, 30)
            output.mux(video.encode(picture))
        output.mux(video.encode(None))
    return path


def test_the_version_is_the_package_version(livebrush: Livebrush) -> None:
    assert livebrush("--version").stdout == f"livebrush {version('livebrush')}\n"


def test_the_console_script_is_this_module() -> None:
    script = Path(sys.executable).parent / "livebrush"
    assert subprocess.run([script, "--version"], capture_output=True, timeout=TIMEOUT_S).returncode == 0


@pytest.mark.parametrize("command", [[], ["serve"], ["restyle"], ["doctor"], ["models"]])
def test_every_command_has_help(livebrush: Livebrush, command: list[str]) -> None:
    result = livebrush(*command, "--help")
    assert (result.status, result.stderr) == (0, "")
    assert "usage: livebrush" in result.stdout


@pytest.mark.parametrize("arguments", [[], ["paint"], ["restyle", "in.mp4"], ["serve", "--size", "big"]])
def test_misuse_ends_with_2_and_the_usage(livebrush: Livebrush, arguments: list[str]) -> None:
    result = livebrush(*arguments)
    assert result.status == 2
    assert "usage:" in result.stderr


def test_a_command_line_loads_neither_torch_nor_the_server() -> None:
    code = "import sys, server.cli; sys.exit(any(name in sys.modules for name in ('torch', 'aiohttp', 'av')))"
    assert subprocess.run([sys.executable, "-P", "-c", code], timeout=TIMEOUT_S).returncode == 0


def test_restyle_does_not_load_torch() -> None:
    code = "import sys, server.restyle, server.doctor, server.configure; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-P", "-c", code], timeout=TIMEOUT_S).returncode == 0


def test_restyle_prints_a_summary_for_people_and_one_for_machines(livebrush: Livebrush, tmp_path: Path) -> None:
    clip = make_clip(tmp_path / "in.mp4", 9)
    people = livebrush("restyle", clip, tmp_path / "a.mp4", "--prompt", "ink", "--engine", "fake")
    assert people.status == 0, people.stderr
    assert "a.mp4: 9 frames, 160x96 at 30 fps" in people.stdout
    machines = livebrush("restyle", clip, tmp_path / "b.mp4", "--prompt", "ink", "--engine", "fake", "--json")
    summary = json.loads(machines.stdout)
    assert (summary["frames"], summary["size"], summary["target"]) == (9, "160x96", str(tmp_path / "b.mp4"))


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["--steps", "5"], "steps: 5 is refused: input should be less than or equal to 4"),
        (["--strength", "-1"], "strength: -1.0 is refused: input should be greater than or equal to 0"),
        (["--size", "16x16"], "size 16x16 is outside the engine's range"),
        (["--model", "nope", "--engine", "local"], "no model 'nope'"),
    ],
)
def test_restyle_says_what_it_refuses_in_one_line(
    livebrush: Livebrush, tmp_path: Path, flags: list[str], text: str
) -> None:
    clip = make_clip(tmp_path / "in.mp4", 2)
    result = livebrush("restyle", clip, tmp_path / "out.mp4", "--prompt", "ink", "--engine", "fake", *flags)
    assert result.status == 1
    assert text in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "out.mp4").exists()


def test_a_prompt_over_the_bound_is_refused_with_the_bound(livebrush: Livebrush, tmp_path: Path) -> None:
    result = livebrush("restyle", tmp_path / "in.mp4", tmp_path / "out.mp4", "--prompt", "x" * 10_000)
    assert result.status == 1
    assert "1000 characters" in result.stderr
    assert len(result.stderr) < 500


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopping_restyle_leaves_no_half_file(tmp_path: Path, number: int) -> None:
    clip = make_clip(tmp_path / "in.mp4", 6000)
    command = [*COMMAND, "restyle", str(clip), str(tmp_path / "out.mp4"), "--prompt", "ink", "--engine", "fake"]
    # The progress bar shows on a terminal only, and tells when frames are being written.
    terminal, child_end = pty.openpty()
    process = subprocess.Popen(command, stderr=child_end, env=os.environ | {"TERM": "xterm"})
    os.close(child_end)
    try:
        shown = b""
        while b"restyling" not in shown:
            shown += os.read(terminal, 4096)
        assert (tmp_path / "out.mp4.part").exists()
        process.send_signal(number)
        while b"livebrush: stopped" not in shown:
            shown += os.read(terminal, 4096)
        assert process.wait(TIMEOUT_S) == 130
    finally:
        process.kill()
        process.wait()
        os.close(terminal)
    assert [path.name for path in tmp_path.iterdir()] == ["in.mp4"]


def test_serve_says_where_it_is_and_stops_when_told() -> None:
    command = [*COMMAND, "serve", "--engine", "fake", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        try:
            assert process.stdout
            assert process.stdout.readline().startswith(b"Livebrush is at http://127.0.0.1:")
            process.send_signal(signal.SIGTERM)
            assert process.wait(TIMEOUT_S) == 0
        finally:
            process.kill()


@pytest.mark.parametrize(
    ("arguments", "environment", "text"),
    [
        (["--port", "99999"], {}, "port: 99999 is refused: input should be less than or equal to 65535 (from --port)"),
        ([], {"LIVEBRUSH_PORT": "web"}, "(from LIVEBRUSH_PORT)"),
        (["--size", "250x256"], {}, "width 250 is not a multiple of 16; use 256"),
        ([], {"LIVEBRUSH_TOKENS__PUBLISH": "short"}, "tokens: publish must have at least 16 characters"),
        (["--fps", "2"], {}, "min_fps 8.0 must not be above max_fps 2.0"),
        (["--model", "nope"], {}, "no model 'nope'"),
        ([], {"LIVEBRUSH_PROT": "1"}, "prot: there is no such setting (from LIVEBRUSH_PROT)"),
        (["--config", "/nowhere.toml"], {}, "/nowhere.toml: cannot be read (No such file or directory)"),
    ],
)
def test_serve_refuses_a_wrong_setting_before_anything_starts(
    livebrush: Livebrush, monkeypatch: pytest.MonkeyPatch, arguments: list[str], environment: dict[str, str], text: str
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    result = livebrush("serve", *arguments)
    assert result.status == 1
    assert text in result.stderr
    assert "Traceback" not in result.stderr


def test_flags_win_over_the_environment_and_that_over_the_file(tmp_path: Path) -> None:
    config = tmp_path / "livebrush.toml"
    config.write_text("port = 1000\nmax_fps = 12.0\n[engine]\nwidth = 128\nheight = 128\n[media]\naudio = false\n")
    environment = {
        "LIVEBRUSH_PORT": "2000",
        "LIVEBRUSH_ENGINE__WIDTH": "192",
        "LIVEBRUSH_MEDIA__ICE_SERVERS": '["stun:a", "stun:b"]',
        "LIVEBRUSH_CHROMIUM": "/usr/bin/chromium",
        "HOME": "/root",
    }
    settings = load_settings(config, environment, {("port",): ("--port", 3000)})
    assert (settings.port, settings.max_fps) == (3000, 12.0)
    assert (settings.engine.width, settings.engine.height) == (192, 128)
    assert (settings.media.audio, settings.media.ice_servers) == (False, ("stun:a", "stun:b"))


@pytest.mark.parametrize(
    ("toml", "environment", "text"),
    [
        ("port = ", {}, "not a TOML file"),
        ("engine = 3", {}, "engine: 3 is refused"),
        ("engine = 3", {"LIVEBRUSH_ENGINE__WIDTH": "64"}, "engine is a setting, not a group"),
        ("[engine]\ncolour = 1", {}, "engine.colour: there is no such setting"),
        ("", {"LIVEBRUSH_MEDIA__ICE_SERVERS": "[stun"}, "is no list"),
    ],
)
def test_a_wrong_file_is_named_with_its_fault(
    tmp_path: Path, toml: str, environment: dict[str, str], text: str
) -> None:
    config = tmp_path / "livebrush.toml"
    config.write_text(toml)
    with pytest.raises(SettingsError, match=text):
        load_settings(config, environment, {})


def test_all_faults_are_told_at_once() -> None:
    flags: dict[tuple[str, ...], tuple[str, object]] = {
        ("port",): ("--port", -1),
        ("engine", "width"): ("--size", 0),
    }
    with pytest.raises(SettingsError) as refusal:
        load_settings(None, {}, flags)
    assert len(str(refusal.value).splitlines()) == 2


@pytest.mark.parametrize("text", ["256", "x256", "256x", "-1x5", "256x256x2", "\u0663x3", ""])
def test_a_size_in_another_form_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="write WIDTHxHEIGHT"):
        parse_size(text)


def test_a_size_is_width_by_height() -> None:
    assert parse_size("832x480") == parse_size("832X480") == (832, 480)
