"""Programs of a Debian newer than this one, unpacked beside it: nothing is installed and nobody needs to be root.

apt resolves and checks as ever, with state and lists of its own in a folder, and fetches from the mirror that this
machine uses; the packages are unpacked there and a program runs by the loader and the libraries that came with it.
FFmpeg of forky: 99 MB are fetched and 250 MB stay, in .work/debian; 19 s on two busy cores with a mirror nearby.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from pathlib import Path

SUITE = "forky"
FOLDER = Path(__file__).parents[2] / ".work" / "debian"
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
MAX_FETCHED_BYTES = 200_000_000
# For lists, packages and unpacking together.
TIMEOUT_S = 150.0
MIRROR = ("Created-By: Packages", "Origin: Debian", "Label: Debian", "Component: main")


class Unavailable(Exception):
    """The program cannot be had here; the text says why."""


def command_of(program: str, package: str) -> list[str]:
    """What to put before a program's arguments to run it; fetches and unpacks its package the first time.

    Raises: Unavailable, on a machine that is not Debian, without its mirror, or when the package has grown too large.
    """
    root = FOLDER / f"{package}-{SUITE}"
    if not (root / "complete").exists():
        _unpack(package, root)
    libraries = sorted({path.parent for path in root.glob("usr/lib/*-linux-gnu*/**/lib*.so*")})
    loader = next(iter(sorted(root.glob("usr/lib*/**/ld-linux*.so.*"))), None)
    if loader is None:
        raise Unavailable(f"{root} has no loader for this machine's programs; delete the folder to fetch it anew")
    # No environment for it: what it starts by itself is this machine's.
    return [str(loader), "--library-path", ":".join(map(str, libraries)), str(root / "usr/bin" / program)]


def _unpack(package: str, root: Path) -> None:
    if not (shutil.which("apt-get") and shutil.which("dpkg-deb") and KEYRING.exists()):
        raise Unavailable("this machine is no Debian: apt-get, dpkg-deb or Debian's keyring is missing")
    deadline = time.monotonic() + TIMEOUT_S
    shutil.rmtree(root, ignore_errors=True)
    apt = root / "apt"
    for place in ("lists/partial", "lists-here/partial", "cache/archives/partial"):
        (apt / place).mkdir(parents=True)
    mirror = _mirror(apt / "lists-here", deadline)
    (apt / "status").touch()
    (apt / "sources.list").write_text(f"deb [signed-by={KEYRING}] {mirror} {SUITE} main\n")
    options = {
        "Dir::State": apt,
        "Dir::State::lists": apt / "lists",
        "Dir::State::status": apt / "status",  # nothing is installed there: everything down to libc comes along
        "Dir::Cache": apt / "cache",
        "Dir::Etc::sourcelist": apt / "sources.list",
        "Dir::Etc::sourceparts": "/dev/null",
        "Dir::Etc::preferences": "/dev/null",
        "Dir::Etc::preferencesparts": "/dev/null",
        "Acquire::Languages": "none",
        "Acquire::Check-Valid-Until": "false",  # a mirror may be a snapshot
        "Acquire::Retries": "2",
        "Acquire::http::Timeout": "20",
        "APT::Sandbox::User": "",
        "APT::Update::Post-Invoke-Success": "",
        "APT::Update::Error-Mode": "any",
        "Debug::NoLocking": "true",
    }
    get = ["apt-get", "-q", *(f"-o{name}={value}" for name, value in options.items())]
    install = [*get, "install", "-y", "--no-install-recommends", package]
    try:
        _run([*get, "update"], deadline)
        size = sum(
            int(found) for found in re.findall(r"^'\S+' \S+ (\d+) ", _run([*install, "--print-uris"], deadline), re.M)
        )
        if size > MAX_FETCHED_BYTES:
            raise Unavailable(
                f"{package} of {SUITE} has grown to {size / 1e6:.0f} MB, over {MAX_FETCHED_BYTES / 1e6:.0f}"
            )
        _run([*install, "--download-only"], deadline)
        for archive in sorted((apt / "cache/archives").glob("*.deb")):
            _run(["dpkg-deb", "--extract", str(archive), str(root)], deadline)
    except Unavailable:
        shutil.rmtree(root, ignore_errors=True)
        raise
    for folder in (apt, root / "usr/share", root / "usr/include"):
        shutil.rmtree(folder, ignore_errors=True)
    (root / "complete").touch()


def _mirror(lists: Path, deadline: float) -> str:
    """The URL from which this machine has Debian; fetches this machine's lists where it has none, as fresh images."""
    targets = ["indextargets", "--format", "$(REPO_URI)", *MIRROR]
    found = _run(["apt-get", *targets], deadline).split()
    if not found:
        own = f"-oDir::State::lists={lists}"
        _run(["apt-get", "-q", own, "-oDebug::NoLocking=true", "-oAPT::Sandbox::User=", "update"], deadline)
        found = _run(["apt-get", own, *targets], deadline).split()
    if not found:
        raise Unavailable("apt has no source of Debian's main among its sources")
    return found[0]


def _run(command: list[str], deadline: float) -> str:
    """Its output. Raises Unavailable, with the end of what it said, when it fails or the time is up."""
    environment = {**os.environ, "LC_ALL": "C", "DEBIAN_FRONTEND": "noninteractive"}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, env=environment, timeout=max(1.0, deadline - time.monotonic())
        )
    except subprocess.TimeoutExpired as late:
        raise Unavailable(f"{command[0]} was not done after {TIMEOUT_S:.0f} s") from late
    if done.returncode != 0:
        said = (done.stderr or done.stdout).strip()[-300:]
        raise Unavailable(f"{command[0]} {command[-1]} failed (is the mirror out of reach?): {said}")
    return done.stdout
