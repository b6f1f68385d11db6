"""The text encoder's process: ask and come back later; crashes, hangs and restarts are bounded and counted."""

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from engine import text_service
from engine.api import EngineError
from engine.text_service import PromptStore, TextService
from engine.wan.untrained import write_untrained_wan
from engine.wan.weights import load_model

CHILD = Path(__file__).parent / "text_child.py"
Start = Callable[..., TextService]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start a service whose process is the stand-in."""
    running: list[TextService] = []

    def begin(how: str = "works", encode_timeout_s: float = 20.0) -> TextService:
        service = TextService(
            tmp_path, 6, 4, command=(sys.executable, str(CHILD), how), encode_timeout_s=encode_timeout_s
        )
        running.append(service)
        return service

    yield begin
    for service in running:
        service.close()


def test_a_prompt_is_ordered_at_once_and_there_later(start: Start) -> None:
    service = start()
    began = time.monotonic()
    assert service.request("neon") is None
    assert time.monotonic() - began < 0.5
    encoded = service.encode("  neon ")
    assert encoded.states.shape == (6, 4)
    assert encoded.states.dtype == torch.float32
    assert encoded.states[:, 0].tolist() == [4, 4, 4, 4, 0, 0]
    assert (encoded.pieces, encoded.mean.tolist()) == (4, [4, 4, 4, 4])
    assert service.request("neon") is not None
    # Longer than the model's positions: cut, the mean over all.
    assert service.encode("watercolour").states[:, 0].tolist() == [11] * 6
    assert service.restarts == 0


def test_a_restarted_service_knows_the_prompts_of_before(start: Start) -> None:
    first = start().encode("neon")
    second = start("broken")
    again = second.request("neon")
    assert again is not None
    assert torch.equal(again.states, first.states)
    with pytest.raises(EngineError, match="cannot be loaded: the file is damaged"):
        second.encode("other")
    # Gone for good, but what it knew it still knows.
    assert second.request("neon") is not None


def test_a_crash_is_survived_and_the_prompt_that_causes_it_is_refused(start: Start) -> None:
    service = start()
    with pytest.raises(EngineError, match="failed 2 times on this prompt: its process ended; try other words"):
        service.encode("crash")
    assert service.restarts == 2
    assert service.encode("neon").pieces == 4
    with pytest.raises(EngineError, match="on this prompt"):
        service.request("crash")


def test_a_hanging_encoder_is_started_anew(start: Start) -> None:
    service = start(encode_timeout_s=0.5)
    with pytest.raises(EngineError, match=r"no answer within 0\.5 s"):
        service.encode("hang")
    assert service.restarts == 2


def test_states_that_are_no_numbers_never_arrive(start: Start) -> None:
    with pytest.raises(EngineError, match="not finite"):
        start().encode("nan")


def test_states_of_another_width_end_it(start: Start) -> None:
    with pytest.raises(EngineError, match=r"gives states \[2, 9\], the transformer takes width 4"):
        start().encode("wide")


def test_a_process_that_never_starts_is_given_up_after_a_bound(start: Start) -> None:
    service = start("dies")
    with pytest.raises(EngineError, match="failed 4 times in a row: its process ended"):
        service.encode("neon")
    assert service.restarts == text_service.MAX_FAILURES


def test_without_an_encoder_only_known_prompts_are_had(tmp_path: Path) -> None:
    PromptStore(tmp_path / "prompts").write("neon", torch.ones(3, 4))
    service = TextService(tmp_path, 6, 4)
    known = service.request("neon")
    assert known is not None
    assert known.pieces == 3
    with pytest.raises(EngineError, match="has no text_encoder: `livebrush models"):
        service.request("other")
    service.close()


def test_closing_ends_the_process_and_those_who_wait(start: Start) -> None:
    service = start()
    service.encode("neon")
    process = service._process
    assert process is not None
    began = time.monotonic()
    service.close()
    assert time.monotonic() - began < 5
    assert process.poll() is not None
    with pytest.raises(EngineError, match="closed"):
        service.request("other")


def test_the_process_ends_when_its_rank_is_killed(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from engine.text_service import TextService\n"
        f"service = TextService(Path({str(tmp_path)!r}), 6, 4, command=(sys.executable, {str(CHILD)!r}, 'works'))\n"
        "service.encode('neon'); print(service._process.pid, flush=True); time.sleep(60)"
    )
    rank = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert rank.stdout is not None
    child = Path(f"/proc/{int(rank.stdout.readline())}/stat")
    assert child.exists()
    rank.kill()
    rank.wait()
    rank.stdout.close()
    deadline = time.monotonic() + 20
    # A zombie without a parent to collect it has ended too.
    while child.exists() and child.read_text().rpartition(")")[2].split()[0] != "Z":
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_the_store_is_bounded_and_takes_faults_of_the_disk_as_misses(tmp_path: Path) -> None:
    store = PromptStore(tmp_path / "prompts", limit=3)
    for number in range(5):
        store.write(f"prompt {number}", torch.full((2, 4), float(number)))
        time.sleep(0.01)
    assert len(list((tmp_path / "prompts").iterdir())) == 3
    assert store.read("prompt 0", 4) is None
    kept = store.read("prompt 4", 4)
    assert kept is not None
    assert kept.tolist() == [[4.0] * 4] * 2
    assert store.read("prompt 4", 5) is None
    for file in (tmp_path / "prompts").iterdir():
        file.write_bytes(b"?")
    assert store.read("prompt 4", 4) is None
    PromptStore(tmp_path / "no" / "such").write("neon", torch.ones(1, 4))


def test_many_waiting_prompts_drop_the_oldest(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_service, "MAX_WAITING", 3)
    service = start(encode_timeout_s=30)
    service.encode("warm")
    with service._changed:
        for number in range(9):
            service._waiting[f"old {number}"] = 0
        service.request("new")
        assert len(service._waiting) == 3
        assert "new" in service._waiting


def test_a_model_folder_s_own_encoder_answers_and_the_rank_loads_no_transformers(tmp_path: Path) -> None:
    write_untrained_wan(tmp_path / "wan")
    code = (
        "import sys; from pathlib import Path; from engine.wan.weights import load_model\n"
        f"model = load_model(Path({str(tmp_path / 'wan')!r}), 'cpu')\n"
        "states = model.text.encode('neon &amp; chrome').states; model.text.close()\n"
        "assert states.shape == (32, 32) and states[12:].abs().max() == 0 and states[11].abs().max() > 0\n"
        "sys.exit(any(name in sys.modules for name in ('transformers', 'tokenizers', 'huggingface_hub')))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    assert len(list((tmp_path / "wan" / "prompts").iterdir())) == 1
    model = load_model(tmp_path / "wan", "cpu")
    try:
        assert model.text.request("neon & chrome") is not None
    finally:
        model.text.close()
