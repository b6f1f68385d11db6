"""Files from the Hugging Face hub: found, resumed, and checked against the hub's own hash.

huggingface_hub says what a file is (size, hash, commit) and brings session, token and errors; `HF_ENDPOINT`,
`HF_TOKEN` and `HF_HUB_OFFLINE` are honoured. The bytes are fetched here, since its own download starts anew when it
was interrupted: an 11 GB file would never arrive over a line that drops every hour. What a hub tool has put into the
shared cache is used from there. Files over 50 GB, which the hub gives by its own transfer alone, go through it.

Free of torch. The real hub was never reached by us: the tests run against one on loopback.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.api import EngineError

DEFAULT_ENDPOINT = "https://huggingface.co"
MAX_PLAIN_BYTES = 50_000_000_000
ATTEMPTS = 5  # without a single new byte
TIMEOUT_S = 30.0
Progress = Callable[[int, int], None]


class HubError(EngineError):
    """A file that cannot be had from the hub; the text says why and what to do."""


@dataclass(frozen=True)
class RemoteFile:
    """One file of a repository. sha256: what it must be, where known beforehand."""

    repo: str
    path: str
    revision: str = "main"
    sha256: str = ""

    def __str__(self) -> str:
        return f"{self.repo}/{self.path} at {self.revision}"


@dataclass(frozen=True)
class FoundFile:
    """What the hub says of a file. etag: SHA-256 of a large file, the git blob hash of a small one."""

    remote: RemoteFile
    url: str
    commit: str
    etag: str
    size_bytes: int
    cached: Path | None = None


def endpoint() -> str:
    """Address of the hub in use."""
    return (os.environ.get("HF_ENDPOINT") or DEFAULT_ENDPOINT).rstrip("/")


def _library() -> Any:
    try:
        return importlib.import_module("huggingface_hub")
    except ImportError as error:
        raise HubError(
            "downloading needs huggingface_hub: install it with `pip install 'livebrush[wan]'`, or fetch the files by "
            "other means and run `livebrush models convert`"
        ) from error


def find(remote: RemoteFile) -> FoundFile:
    """Ask the hub for a file.

    Raises: HubError, naming what is unknown (repository, revision or file), or that the hub cannot be reached.
    """
    hub = _library()
    errors = importlib.import_module("huggingface_hub.errors")
    where = f"{remote} ({endpoint()})"
    url = hub.hf_hub_url(remote.repo, remote.path, revision=remote.revision, endpoint=endpoint())
    try:
        found = hub.get_hf_file_metadata(url, timeout=TIMEOUT_S, endpoint=endpoint())
    except errors.OfflineModeIsEnabled as error:
        raise HubError(
            f"{where}: HF_HUB_OFFLINE is set; unset it to download, or `livebrush models convert`"
        ) from error
    except errors.GatedRepoError as error:
        raise HubError(
            f"{where}: access must be granted first; accept the licence on the repository's page, then set HF_TOKEN"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise HubError(f"{where}: no such revision; give a branch, tag or commit with --source") from error
    except errors.EntryNotFoundError as error:
        raise HubError(f"{where}: no such file in the repository") from error
    except errors.RepositoryNotFoundError as error:
        raise HubError(f"{where}: no such repository, or it is private; set HF_TOKEN for a private one") from error
    except errors.HfHubHTTPError as error:
        raise HubError(f"{where}: the hub refused: {_line(error)}; try again later") from error
    except (errors.HTTPError, OSError) as error:
        raise HubError(
            f"{where}: the hub cannot be reached: {_line(error)}; check the network or HF_ENDPOINT, or fetch the files "
            "by other means and run `livebrush models convert`"
        ) from error
    if found.size is None or not found.etag:
        raise HubError(f"{where}: the hub gave no size or no hash; {endpoint()} is not a Hugging Face hub")
    cached = hub.try_to_load_from_cache(remote.repo, remote.path, revision=found.commit_hash)
    return FoundFile(
        remote,
        found.location or url,
        found.commit_hash or remote.revision,
        found.etag,
        found.size,
        Path(cached) if isinstance(cached, str) else None,
    )


def fetch(found: FoundFile, folder: Path, progress: Progress | None = None, *, pause_s: float = 1.0) -> Path:
    """Download a file to `folder`/its path, going on where an earlier call was interrupted.

    Args:
        folder: for one repository and commit; what is there already, whole, is only checked.
        progress: told the bytes there and the bytes in all.
        pause_s: before the second attempt; it doubles with each that brought nothing.

    Raises: HubError, if the transfer breaks off for good, the disk is full, or the file is not what the hub says.
    """
    if found.cached is not None:
        return _checked(found.cached, found)
    path = folder / found.remote.path
    if path.is_file():
        return _checked(path, found)
    path.parent.mkdir(parents=True, exist_ok=True)
    if found.size_bytes > MAX_PLAIN_BYTES:
        return _by_library(found, folder)
    # Named after the content, so that a file that changed on the hub is not continued with the old one's beginning.
    part = path.with_name(f"{path.name}.{found.etag[:16]}.part")
    have = part.stat().st_size if part.exists() else 0
    check_space(folder, found.size_bytes - have, f"{found.remote}")
    failures = 0
    while have < found.size_bytes:
        before = have
        reason = _transfer(found, part, have, progress)
        have = part.stat().st_size if part.exists() else 0
        if have >= found.size_bytes:
            break
        failures = 0 if have > before else failures + 1
        if failures >= ATTEMPTS:
            raise HubError(
                f"{found.remote}: broke off at {have} of {found.size_bytes} bytes, {failures} times without progress: "
                f"{reason}; run the same command again, it goes on from there"
            )
        time.sleep(pause_s * 2**failures / 2)
    checked = _checked(part, found)
    checked.replace(path)
    return path


def _transfer(found: FoundFile, part: Path, have: int, progress: Progress | None) -> str:
    """Append what comes until the transfer ends; returns why it ended before the end."""
    hub = _library()
    errors = importlib.import_module("huggingface_hub.errors")
    headers = {"Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
    if found.url.startswith(endpoint()):
        # Where the hub sends us on, to its storage, the address itself is the permission.
        headers |= hub.utils.build_hf_headers()
    try:
        with hub.get_session().stream(
            "GET", found.url, headers=headers, follow_redirects=True, timeout=TIMEOUT_S
        ) as response:
            if response.status_code >= 400:
                return f"HTTP status {response.status_code}"
            # A server that does not know ranges answers 200 and starts anew.
            with part.open("ab" if response.status_code == 206 else "wb") as file:
                done = file.tell()
                for block in response.iter_raw():
                    file.write(block)
                    done += len(block)
                    if progress is not None:
                        progress(done, found.size_bytes)
    except (errors.HTTPError, ConnectionError, TimeoutError) as error:
        return _line(error)
    except OSError as error:
        raise HubError(f"{found.remote}: cannot write {part}: {error.strerror}; free some space") from error
    return "the connection ended early"


def _by_library(found: FoundFile, folder: Path) -> Path:
    hub = _library()
    remote = found.remote
    check_space(folder, found.size_bytes, f"{remote}")
    where = hub.hf_hub_download(remote.repo, remote.path, revision=found.commit, local_dir=folder, endpoint=endpoint())
    return _checked(Path(where), found)


def _checked(path: Path, found: FoundFile) -> Path:
    """The path, if its content is what the hub and the registry say; else the file is removed and HubError raised."""
    size = path.stat().st_size
    wanted = {found.remote.sha256, found.etag if len(found.etag) == 64 else ""} - {""}
    if size == found.size_bytes and (not wanted or wanted == {_sha256(path)}) and _git_blob_fits(path, found.etag):
        return path
    what = f"{size} bytes, SHA-256 {_sha256(path)}"
    if path != found.cached:
        path.unlink()
    raise HubError(
        f"{found.remote}: what came is {what}, must be {found.size_bytes} bytes, SHA-256 "
        f"{' and '.join(sorted(wanted)) or found.etag}; it was removed: download it again, and if that fails too, "
        "do not trust this source"
    )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _git_blob_fits(path: Path, etag: str) -> bool:
    """Small files are kept in git itself, whose hash includes a header."""
    if not re.fullmatch(r"[0-9a-f]{40}", etag):
        return True
    digest = hashlib.sha1(f"blob {path.stat().st_size}\0".encode(), usedforsecurity=False)
    digest.update(path.read_bytes())
    return digest.hexdigest() == etag


def check_space(folder: Path, needed_bytes: int, what: str) -> None:
    """Refuse to begin what the disk cannot hold.

    Raises: HubError with what is needed and what is free.
    """
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if needed_bytes > free:
        raise HubError(
            f"{what} needs {needed_bytes / 1e9:.1f} GB in {folder}, {free / 1e9:.1f} GB are free: free some, or set "
            "LIVEBRUSH_MODELS_DIR to a folder on a larger disk"
        )


def _line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
