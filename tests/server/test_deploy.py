"""What lies in docker/ and deploy/ fits the program: settings, commands, paths and ports. No image is built here."""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
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
UNITS = ("livebrush.service", "livebrush-gateway.service")
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


@pytest.mark.parametrize("name", UNITS)
def test_the_unit_starts_a_command_that_there_is(name: str) -> None:
    (command,) = re.findall(r"^ExecStart=\S+/livebrush (.+)$", (DEPLOY / name).read_text(), re.MULTILINE)
    with pytest.raises(SystemExit) as left:
        main([*command.split(), "--help"])
    assert left.value.code == 0


COMMAND = re.compile(r"(?<![\w/-])livebrush ([a-z]+)((?: +(?:--?[\w-]+(?:=\S+)?|[^\s`|#&;)]+))*)")
FLAG = re.compile(r"(?<=\s)--[a-z][\w-]*")


def commands() -> list[tuple[str, str, tuple[str, ...]]]:
    """Every command line of ours in docs, docker/ and deploy/: file, command, flags."""
    paths = [ROOT / "README.md", *ROOT.glob("docs/*.md"), *DOCKER.iterdir(), *DEPLOY.iterdir()]
    found = []
    for path in paths:
        text = path.read_text().replace("\\\n", " ")
        for command, rest in COMMAND.findall(text):
            action = next(iter(rest.split()), "") if command in ("models", "cluster") else ""
            found.append((path.name, f"{command} {action}".strip(), tuple(FLAG.findall(rest))))
    return found


def test_every_command_and_flag_that_is_written_down_exists(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    names = set(re.findall(r"^    ([a-z]+) ", capsys.readouterr().out, re.MULTILINE))
    helps: dict[str, str] = {}
    seen = 0
    for path, command, flags in commands():
        if command.split()[0] not in names:
            continue  # the word in a sentence
        if command not in helps:
            with pytest.raises(SystemExit):
                main([*command.split(), "--help"])
            helps[command] = capsys.readouterr().out
        for flag in flags:
            seen += 1
            assert re.search(rf"{flag}\b", helps[command]), f"{path}: livebrush {command} has no {flag}"
    assert seen > 20 and {"serve", "gateway", "camera", "link"} <= set(helps)


@pytest.mark.parametrize("stage", ["cpu", "cuda"])
def test_what_an_image_holds_is_enough_to_serve_the_page_and_be_healthy(stage: str, tmp_path: Path) -> None:
    """Only what is copied, in the image's environment, from a folder that is not the checkout; and its HEALTHCHECK."""
    text = next(
        one for one in re.split(r"^FROM ", DOCKERFILE, flags=re.MULTILINE) if one.startswith(f"base AS {stage}")
    )
    for line in re.findall(r"^COPY (.+) \S+$", text, re.MULTILINE):
        for source in line.split():
            if (ROOT / source).is_dir():
                shutil.copytree(ROOT / source, tmp_path / source, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(ROOT / source, tmp_path / source)
    port, admin = free_ports(2)
    environment = dict(re.findall(r"(LIVEBRUSH_\w+)=(\S+)", text)) | {
        "LIVEBRUSH_MODELS_DIR": str(tmp_path / "models"),
        "LIVEBRUSH_ENGINE__COSTS_DIR": str(tmp_path / "models" / "costs"),
        "LIVEBRUSH_RECORDINGS__DIR": str(tmp_path / "recordings"),
        "LIVEBRUSH_ADMIN_PORT": str(admin),
        "LIVEBRUSH_PORT": str(port),
        "LIVEBRUSH_ENGINE_KIND": "fake",
        "PYTHONPATH": str(tmp_path),
        "HOME": str(tmp_path),
        "PATH": "/usr/bin:/bin",
    }
    command = [sys.executable, "-c", "import sys, server.cli; sys.exit(server.cli.main(['serve']))"]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=log, stderr=log)
    (check,) = re.findall(r'CMD \["python", "-c", "(.+)"\]\n', text)
    try:
        for _ in range(120):
            code = check.replace(":8081/", f":{admin}/")
            healthy = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60).returncode == 0
            if healthy or process.poll() is not None:
                break
            time.sleep(0.5)
        assert healthy and code != check, (tmp_path / "log").read_text()
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=30) as page:
            assert b"Livebrush" in page.read()
        assert (tmp_path / "engine" / "models" / "livebrush-tiny" / "model.safetensors").stat().st_size > 10**5
    finally:
        process.terminate()
        process.wait(30)


def free_ports(count: int) -> list[int]:
    """TCP ports that were free a moment ago."""
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [int(one.getsockname()[1]) for one in sockets]
    for one in sockets:
        one.close()
    return ports


@pytest.mark.skipif(shutil.which("turnserver") is None, reason="coturn is not installed")
def test_coturn_takes_the_command_of_the_compose_file(tmp_path: Path) -> None:
    flags = [filled(flag) for flag in compose("compose.relay.yaml")["services"]["relay"]["command"]]
    (port,) = free_ports(1)
    own = [f"--listening-port={port}", "--listening-ip=127.0.0.1", "--relay-ip=127.0.0.1", "--no-tls", "--no-dtls"]
    own += [f"--pidfile={tmp_path / 'pid'}", f"--userdb={tmp_path / 'db'}"]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(["turnserver", "-n", *flags, *own], stdout=log, stderr=log)
    try:
        answer = b""
        with socket.socket(type=socket.SOCK_DGRAM) as client:
            client.settimeout(0.5)
            for _ in range(60):
                # A STUN binding request (RFC 8489).
                client.sendto(b"\0\1\0\0\x21\x12\xa4\x42" + bytes(12), ("127.0.0.1", port))
                try:
                    answer = client.recv(2048)
                    break
                except OSError:
                    assert process.poll() is None, (tmp_path / "log").read_text()
        said = (tmp_path / "log").read_text()
        assert answer[:2] == b"\1\1", said
        assert "unrecognized option" not in said.lower() and "unknown" not in said.lower(), said
        # The secret is there, and quotas, and no peers that a relay has no business with.
        for words in (
            "--use-auth-secret",
            "--total-quota=",
            "--user-quota=",
            "--denied-peer-ip=169.254.0.0-169.254.255.255",
        ):
            assert any(flag.startswith(words) for flag in flags), words
    finally:
        process.terminate()
        process.wait(30)


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
@pytest.mark.parametrize("name", UNITS)
def test_systemd_takes_the_unit(name: str, tmp_path: Path) -> None:
    script = str(Path(sys.executable).with_name("livebrush"))
    unit = tmp_path / name
    unit.write_text((DEPLOY / name).read_text().replace("/opt/livebrush/.venv/bin/livebrush", script))
    checked = subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, text=True, timeout=60)
    assert name not in checked.stderr and checked.returncode == 0, checked.stderr


@pytest.mark.skipif(shutil.which("caddy") is None, reason="caddy is not installed")
def test_caddy_takes_its_file() -> None:
    command = ["caddy", "adapt", "--config", str(DEPLOY / "Caddyfile"), "--adapter", "caddyfile"]
    checked = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert checked.returncode == 0, checked.stderr
    assert '"127.0.0.1:8080"' in checked.stdout
