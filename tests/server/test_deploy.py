"""What lies in docker/ and deploy/ fits the program: settings, commands, paths and ports. No image is built here."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]

from server.cli import main
from server.configure import load_settings

ROOT = Path(__file__).parents[2]
DOCKER, DEPLOY = ROOT / "docker", ROOT / "deploy"
DOCKERFILE = (DOCKER / "Dockerfile").read_text()
UNIT = (DEPLOY / "livebrush.service").read_text()
COMPOSE = ("compose.yaml", "compose.cuda.yaml", "compose.relay.yaml")
GIVEN = {"TURN_SECRET": "a-secret", "RELAY_HOST": "relay.example"}


def compose(name: str) -> Any:
    return yaml.safe_load((DOCKER / name).read_text())


def filled(value: str) -> str:
    """With the variables that compose puts in."""
    return re.sub(r"\$\{(\w+)[^}]*\}", lambda match: GIVEN[match[1]], value)


def test_every_setting_that_is_named_is_one_and_its_value_is_taken() -> None:
    relay = compose("compose.relay.yaml")["services"]["livebrush"]["environment"]
    sources = [
        dict(re.findall(r"(LIVEBRUSH_\w+)=(\S+)", DOCKERFILE)),
        dict(re.findall(r"^Environment=(LIVEBRUSH_\w+)=(\S+)", UNIT, re.MULTILINE)),
        {name: filled(value) for name, value in relay.items()},
    ]
    for environment in sources:
        assert environment
        settings = load_settings(None, environment | {"LIVEBRUSH_ENGINE_KIND": "fake"}, {})
    assert settings.media.turn_urls == ("turn:relay.example:3478",)


def test_both_images_run_as_nobody_in_particular_and_ask_readyz_where_it_is() -> None:
    stages = re.split(r"^FROM ", DOCKERFILE, flags=re.MULTILINE)[2:]
    assert [re.match(r"base AS (\w+)", stage)[1] for stage in stages] == ["cuda", "cpu"]  # type: ignore[index]
    for stage in stages:
        assert "\nUSER livebrush\n" in stage
        (port,) = re.findall(r"LIVEBRUSH_ADMIN_PORT=(\d+)", stage)
        assert f"http://127.0.0.1:{port}/readyz" in stage
        assert 'CMD ["livebrush", "serve"]' in stage


def test_what_is_copied_is_there_and_not_ignored() -> None:
    kept = re.findall(r"^!(\S+)", (DOCKER / "Dockerfile.dockerignore").read_text(), re.MULTILINE)
    for line in re.findall(r"^COPY (.+) \S+$", DOCKERFILE, re.MULTILINE):
        for source in line.split():
            assert (ROOT / source).exists() and source in kept
    torch = re.findall(r"torch==[\d.]+", DOCKERFILE)
    assert torch and all(one in (ROOT / "pyproject.toml").read_text() for one in torch)


@pytest.mark.parametrize("name", COMPOSE)
def test_compose_files_agree_with_the_dockerfile(name: str) -> None:
    service = compose(name)["services"]["livebrush"]
    if target := service.get("build", {}).get("target"):
        assert f"AS {target}\n" in DOCKERFILE and service["image"] == f"livebrush:{target}"
    volumes = [volume.split(":") for volume in service.get("volumes", ())]
    for volume, path in volumes:
        assert volume in compose(name)["volumes"] and f'"{path}"' in DOCKERFILE


def test_the_unit_starts_a_command_that_there_is() -> None:
    (command,) = re.findall(r"^ExecStart=\S+/livebrush (.+)$", UNIT, re.MULTILINE)
    with pytest.raises(SystemExit) as left:
        main([*command.split(), "--help"])
    assert left.value.code == 0


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
def test_systemd_takes_the_unit(tmp_path: Path) -> None:
    script = str(Path(sys.executable).with_name("livebrush"))
    unit = tmp_path / "livebrush.service"
    unit.write_text(UNIT.replace("/opt/livebrush/.venv/bin/livebrush", script))
    checked = subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, text=True, timeout=60)
    assert "livebrush.service" not in checked.stderr and checked.returncode == 0, checked.stderr


@pytest.mark.skipif(shutil.which("caddy") is None, reason="caddy is not installed")
def test_caddy_takes_its_file() -> None:
    command = ["caddy", "adapt", "--config", str(DEPLOY / "Caddyfile"), "--adapter", "caddyfile"]
    checked = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert checked.returncode == 0, checked.stderr
    assert '"127.0.0.1:8080"' in checked.stdout
