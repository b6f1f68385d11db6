"""Downloads from a hub on loopback: whole, resumed, checked, and refused in words that help."""

import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import pytest

from engine import hub as hub_module
from engine.hub import HubError, RemoteFile, check_space, fetch, find
from tests.engine.loopback_hub import COMMIT, LoopbackHub

CONTENT = bytes(range(256)) * 12000
FILE = RemoteFile("owner/weights", "folder/model.pt")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackHub]:
    hub = LoopbackHub({(FILE.repo, FILE.path): CONTENT, (FILE.repo, "config.json"): b'{"a": 1}'})
    with hub.running() as url:
        monkeypatch.setenv("HF_ENDPOINT", url)
        yield hub


def test_a_file_comes_whole_with_progress_and_is_not_fetched_twice(hub: LoopbackHub, tmp_path: Path) -> None:
    found = find(FILE)
    assert (found.commit, found.size_bytes) == (COMMIT, len(CONTENT))
    told: list[tuple[int, int]] = []
    path = fetch(found, tmp_path, lambda done, total: told.append((done, total)))
    assert path == tmp_path / "folder" / "model.pt"
    assert path.read_bytes() == CONTENT
    assert told[-1] == (len(CONTENT), len(CONTENT))
    assert fetch(found, tmp_path) == path
    assert hub.ranges == [None]


def test_small_files_are_checked_by_their_git_hash(hub: LoopbackHub, tmp_path: Path) -> None:
    small = RemoteFile(FILE.repo, "config.json", revision=COMMIT)
    assert fetch(find(small), tmp_path).read_bytes() == b'{"a": 1}'
    hub.wrong.add("config.json")
    with pytest.raises(HubError, match="it was removed"):
        fetch(find(small), tmp_path / "again")


def test_a_transfer_that_breaks_off_goes_on_where_it_was(hub: LoopbackHub, tmp_path: Path) -> None:
    hub.cut = [1_000_000, 500_000]
    path = fetch(find(FILE), tmp_path, pause_s=0.01)
    assert path.read_bytes() == CONTENT
    assert hub.ranges[0] is None
    assert len(hub.ranges) == 3
    assert all(wanted is not None and int(wanted[6:-1]) > 0 for wanted in hub.ranges[1:])


def test_an_interrupted_command_goes_on_the_next_time(hub: LoopbackHub, tmp_path: Path) -> None:
    hub.cut = [1_000_000] + [0] * hub_module.ATTEMPTS
    with pytest.raises(HubError, match=rf"broke off at \d+ of {len(CONTENT)} bytes, 5 times .* run the same command"):
        fetch(find(FILE), tmp_path, pause_s=0.001)
    assert not (tmp_path / FILE.path).exists()
    hub.ranges.clear()
    assert fetch(find(FILE), tmp_path).read_bytes() == CONTENT
    assert len(hub.ranges) == 1
    assert hub.ranges[0] is not None


def test_a_hub_without_ranges_is_read_from_the_start(hub: LoopbackHub, tmp_path: Path) -> None:
    hub.cut, hub.ignores_ranges = [1_000_000], True
    assert fetch(find(FILE), tmp_path, pause_s=0.01).read_bytes() == CONTENT


def test_content_with_another_hash_is_refused_and_removed(hub: LoopbackHub, tmp_path: Path) -> None:
    hub.wrong.add(FILE.path)
    with pytest.raises(HubError, match=r"SHA-256 .*, must be .* do not trust this source"):
        fetch(find(FILE), tmp_path)
    assert not [file for file in tmp_path.rglob("*") if file.is_file()]
    hub.wrong.clear()
    pinned = RemoteFile(FILE.repo, FILE.path, sha256="0" * 64)
    with pytest.raises(HubError, match="0" * 64):
        fetch(find(pinned), tmp_path)


@pytest.mark.parametrize(
    ("remote", "said"),
    [
        (RemoteFile("nobody/nothing", "a.pt"), "no such repository, or it is private; set HF_TOKEN"),
        (RemoteFile(FILE.repo, FILE.path, "v9"), "no such revision"),
        (RemoteFile(FILE.repo, "b.pt"), "no such file in the repository"),
    ],
)
def test_what_the_hub_does_not_know_is_named(hub: LoopbackHub, remote: RemoteFile, said: str) -> None:
    with pytest.raises(HubError) as caught:
        find(remote)
    assert said in str(caught.value)
    assert str(remote) in str(caught.value)


def test_a_hub_that_cannot_be_reached_is_said_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(HubError, match=r"cannot be reached: .*check the network or HF_ENDPOINT, .*models convert"):
        find(FILE)


def test_a_full_disk_is_told_before_and_during(
    hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(HubError, match=r"model needs 1000000\.0 GB .* LIVEBRUSH_MODELS_DIR"):
        check_space(tmp_path / "not" / "there", 10**15, "model")
    found = find(FILE)
    real = Path.open

    def full(path: Path, mode: str = "r", *rest: Any, **named: Any) -> IO[Any]:
        if path.suffix == ".part":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(path, mode, *rest, **named)

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(HubError, match="No space left"):
        fetch(found, tmp_path)


def test_what_another_tool_has_in_the_hub_s_cache_is_used(
    hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(library.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    there = library.hf_hub_download(FILE.repo, FILE.path, endpoint=hub.url, cache_dir=tmp_path / "cache")
    hub.ranges.clear()
    assert fetch(find(FILE), tmp_path / "models") == Path(there)
    assert hub.ranges == []
    Path(there).write_bytes(b"damaged")
    with pytest.raises(HubError, match="what came is 7 bytes"):
        fetch(find(FILE), tmp_path / "models")
    # It is not ours to remove.
    assert Path(there).exists()


def test_files_over_the_hub_s_limit_go_through_its_own_transfer(
    hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(hub_module, "MAX_PLAIN_BYTES", 1000)
    assert fetch(find(FILE), tmp_path).read_bytes() == CONTENT
    hub.wrong.add(FILE.path)
    with pytest.raises(HubError, match="do not trust this source"):
        fetch(find(FILE), tmp_path / "again")
