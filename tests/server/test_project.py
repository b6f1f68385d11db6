"""What a fresh machine meets first: the set-up behind `make`, the CI command, and the README's word.

The set-up runs in a folder of its own with a Python, an apt-get and a Chromium that only say what they were asked,
so that nothing is downloaded.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from server.cli import main

ROOT = Path(__file__).parents[2]
TOOLS = ("bash", "env", "cat", "dirname", "sha256sum", "cut", "rm", "mkdir", "cp", "chmod")
LOCK = Path("tests/interop/clients/package-lock.json")

PYTHON = """#!/bin/bash
# Stands for python3: makes a virtual environment of itself, notes what pip is asked.
case "$*" in
    "-m venv"*) [ -e "$FAKE/no-venv" ] && exit 1
        mkdir -p .venv/bin; cp "$0" .venv/bin/python; chmod +x .venv/bin/python
        echo venv >>"$FAKE/log" ;;
    *"pip install"*) echo "pip ${!#}" >>"$FAKE/log"; [ ! -e "$FAKE/no-network" ] ;;
    *version_info.major*) echo 3.11 ;;
    *"< (3, 11)"*) [ ! -e "$FAKE/old" ] ;;
esac
"""
APT = """#!/bin/bash
echo "apt ${!#}" >>"$FAKE/log"
[ "$1" = install ] || exit 0
case "${!#}" in chromium | npm) cp "$FAKE/bin/id" "$FAKE/bin/${!#}" ;; *venv) rm -f "$FAKE/no-venv" ;; esac
"""


@dataclass
class Machine:
    """A checkout with nothing but the set-up, and the commands that it finds."""

    checkout: Path
    fake: Path

    def command(self, name: str, script: str) -> None:
        path = self.fake / "bin" / name
        path.write_text(script)
        path.chmod(0o755)

    def break_(self, what: str) -> None:
        (self.fake / what).touch()

    def mend(self, what: str) -> None:
        (self.fake / what).unlink()

    def setup(self, level: str) -> subprocess.CompletedProcess[str]:
        """Run the set-up; `did` then says what it did."""
        (self.fake / "log").write_text("")
        environment = {"PATH": str(self.fake / "bin"), "FAKE": str(self.fake)}
        command = [str(self.checkout / "scripts" / "setup"), level]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)

    @property
    def did(self) -> list[str]:
        return (self.fake / "log").read_text().splitlines()


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    checkout, fake = tmp_path / "checkout", tmp_path / "fake"
    (checkout / "scripts").mkdir(parents=True)
    (fake / "bin").mkdir(parents=True)
    shutil.copy2(ROOT / "scripts" / "setup", checkout / "scripts" / "setup")
    shutil.copy2(ROOT / "pyproject.toml", checkout / "pyproject.toml")
    (checkout / LOCK).parent.mkdir(parents=True)
    shutil.copy2(ROOT / LOCK, checkout / LOCK)
    for tool in TOOLS:
        path = shutil.which(tool)
        assert path
        (fake / "bin" / tool).symlink_to(path)
    machine = Machine(checkout, fake)
    machine.command("python3", PYTHON)
    machine.command("id", "#!/bin/bash\necho 0\n")
    return machine


def test_the_first_run_installs_and_the_second_does_nothing(machine: Machine) -> None:
    first = machine.setup("run")
    assert first.returncode == 0, first.stderr
    assert machine.did == ["venv", "pip ."]
    assert "installing Livebrush" in first.stdout
    second = machine.setup("run")
    assert (second.returncode, second.stdout, machine.did) == (0, "", [])


def test_tests_bring_their_tools_chromium_and_foreign_clients(machine: Machine) -> None:
    machine.command("apt-get", APT)
    assert machine.setup("test").returncode == 0
    assert machine.did == ["venv", "pip .[dev]", "apt -qq", "apt chromium", "apt -qq", "apt npm"]
    assert machine.setup("test").returncode == 0
    assert machine.setup("run").returncode == 0
    assert machine.did == []


def test_more_is_added_where_less_was_installed(machine: Machine) -> None:
    machine.command("chromium", "#!/bin/bash\n")
    machine.setup("run")
    assert machine.setup("test").returncode == 0
    assert machine.did == ["pip .[dev]"]
    assert machine.setup("train").returncode == 0
    assert machine.did == ["pip .[dev,train]"]


def test_a_changed_pyproject_installs_again(machine: Machine) -> None:
    machine.setup("run")
    with (machine.checkout / "pyproject.toml").open("a") as file:
        file.write("# another dependency\n")
    machine.setup("run")
    assert machine.did == ["pip ."]


def test_a_failed_installation_is_no_success_and_is_tried_again(machine: Machine) -> None:
    machine.break_("no-network")
    assert machine.setup("run").returncode != 0
    machine.mend("no-network")
    assert machine.setup("run").returncode == 0
    assert machine.did == ["pip ."]


def test_an_old_python_is_refused_with_what_is_needed(machine: Machine) -> None:
    machine.break_("old")
    result = machine.setup("run")
    assert result.returncode == 1
    assert "Python 3.11 or newer is needed" in result.stderr
    assert "apt-get install python3" in result.stderr


def test_the_venv_part_is_installed_where_it_is_missing(machine: Machine) -> None:
    machine.break_("no-venv")
    machine.command("apt-get", APT)
    assert machine.setup("run").returncode == 0
    assert machine.did == ["apt -qq", "apt python3.11-venv", "venv", "pip ."]


def test_a_missing_venv_part_that_cannot_be_installed_is_named(machine: Machine) -> None:
    machine.break_("no-venv")
    machine.command("apt-get", APT)
    machine.command("id", "#!/bin/bash\necho 1000\n")
    result = machine.setup("run")
    assert result.returncode == 1
    assert "sudo apt-get install python3-venv" in result.stderr
    assert not (machine.checkout / ".venv").exists()


def test_missing_chromium_that_cannot_be_installed_is_named(machine: Machine) -> None:
    result = machine.setup("test")
    assert result.returncode == 1
    assert "sudo apt-get install chromium" in result.stderr
    assert machine.setup("run").returncode == 0


def test_sudo_is_used_by_people_who_are_not_root(machine: Machine) -> None:
    machine.command("apt-get", APT)
    machine.command("id", "#!/bin/bash\necho 1000\n")
    machine.command("sudo", '#!/bin/bash\necho sudo >>"$FAKE/log"\nexec "$@"\n')
    assert machine.setup("test").returncode == 0
    assert machine.did[2:6] == ["sudo", "apt -qq", "sudo", "apt chromium"]
    assert machine.did[6:] == ["sudo", "apt -qq", "sudo", "apt npm"]


def test_the_npm_clients_are_installed_by_their_lock_file_and_again_when_it_changes(machine: Machine) -> None:
    machine.command("chromium", "#!/bin/bash\n")
    machine.command("npm", '#!/bin/bash\necho "npm $1 $3" >>"$FAKE/log"\n')
    for expected in (["venv", "pip .[dev]", f"npm ci {LOCK.parent}"], []):
        assert machine.setup("test").returncode == 0
        assert machine.did == expected
    with (machine.checkout / LOCK).open("a") as file:
        file.write("\n")
    machine.setup("test")
    assert machine.did == [f"npm ci {LOCK.parent}"]


def test_without_foreign_clients_the_tests_are_set_up_all_the_same(machine: Machine) -> None:
    machine.command("chromium", "#!/bin/bash\n")
    result = machine.setup("test")
    assert result.returncode == 0
    assert "are skipped: python3-gi" in result.stdout and "coturn" in result.stdout


@pytest.mark.parametrize("path", [".ci/run", "scripts/setup"])
def test_scripts_are_executable_and_sound(path: str) -> None:
    assert os.access(ROOT / path, os.X_OK)
    assert "set -euo pipefail" in (ROOT / path).read_text()
    assert subprocess.run(["bash", "-n", ROOT / path], timeout=60).returncode == 0


def test_ci_runs_what_the_readme_says() -> None:
    readme = (ROOT / "README.md").read_text()
    assert re.search(r"^make test\b", readme, re.MULTILINE)
    assert (ROOT / ".ci" / "run").read_text().splitlines()[-2:] == ["make lint", "make test"]


def test_make_lists_every_target() -> None:
    shown = subprocess.run(["make", "-C", ROOT, "help"], capture_output=True, text=True, timeout=60).stdout
    for target in ("run", "test", "lint", "bench", "train", "doctor", "clean"):
        assert re.search(rf"^{target} ", shown, re.MULTILINE), target


def test_the_readme_names_only_files_and_commands_that_exist(capsys: pytest.CaptureFixture[str]) -> None:
    readme = (ROOT / "README.md").read_text()
    for path in re.findall(r"\]\(([\w./-]+)\)", readme):
        assert (ROOT / path).is_file(), path
    with pytest.raises(SystemExit):
        main(["serve", "--help"])
    known = set(re.findall(r"--[a-z-]+", capsys.readouterr().out))
    (serve,) = re.findall(r"^\| `livebrush serve` \|.*\(`(.*)`\)", readme, re.MULTILINE)
    assert set(serve.split()) <= known
