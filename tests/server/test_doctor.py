"""`doctor`: each fault is found, named and given a cure; the measurement turns into a promise."""

from __future__ import annotations

import hashlib
import json
import socket
from dataclasses import replace
from pathlib import Path

import pytest

from engine.api import Capacity, ChunkCostAt, EngineError
from engine.choose import Choice, Need
from engine.config import EngineSettings
from engine.cost_file import cost_file, cpu_title
from engine.cost_model import CostModel, Work, chunk_costs
from engine.fake import FakeEngine
from server.cli import main
from server.doctor import Report, examine, to_json, to_text
from server.doctor_checks import (
    Finding,
    Level,
    check_browser,
    check_choice,
    check_codecs,
    check_frame_memory,
    check_gpu,
    check_learned,
    check_memory,
    check_model,
    check_port,
    check_torch,
    check_versions,
)
from server.settings import ServerSettings


@pytest.fixture
def settings(tmp_path: Path) -> ServerSettings:
    """Settings with a well-formed model folder, for all that doctor looks at, on a free port."""
    weights = b"weights" * 1000
    folder = tmp_path / "some-model"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(weights)
    (folder / "config.json").write_text(json.dumps({"sha256": hashlib.sha256(weights).hexdigest()}))
    return ServerSettings(port=0, engine=EngineSettings(model=str(folder)))


async def measured(settings: ServerSettings, delay_s: float) -> Report:
    return await examine(settings, make_engine=lambda s: FakeEngine(s.engine.width, s.engine.height, delay_s=delay_s))


async def test_a_sound_machine_can_serve_and_says_how_much(settings: ServerSettings) -> None:
    report = await measured(settings, 0.005)
    assert report.can_serve, to_text(report)
    assert report.measured
    assert report.measured.fps == settings.max_fps
    assert report.measured.sessions == settings.max_sessions
    text = to_text(report)
    assert text.endswith("This machine can serve.")
    assert "24 fps for one session, 4 sessions at 8 fps" in text
    assert len(text.splitlines()) < 40
    assert {finding.name for finding in report.findings} >= {"cpu", "memory", "torch", "gpu", "model", "port", "codecs"}


async def test_a_slow_engine_is_promised_less_and_given_a_cure(settings: ServerSettings) -> None:
    report = await measured(settings, 0.3)
    speed = report.findings[-1]
    assert report.measured
    assert report.measured.fps < settings.max_fps
    assert (speed.name, speed.level, report.measured.sessions) == ("speed", Level.WARNING, 1)
    assert "--size" in speed.cure
    assert report.can_serve


async def test_the_cost_model_is_shown_by_steps_and_size_with_the_state_of_a_session(settings: ServerSettings) -> None:
    costs = tuple(
        ChunkCostAt(steps, small, mean_s=0.1 * steps * (0.5 if small else 1), upper_s=0.15 * steps)
        for small in (False, True)
        for steps in (1, 2)
    )

    class Measured(FakeEngine):
        @property
        def capacity(self) -> Capacity:
            return replace(super().capacity, costs=costs, state_bytes=12 << 20)

    report = await examine(settings, make_engine=lambda s: Measured(s.engine.width, s.engine.height, delay_s=0.005))
    shown = [finding.text for finding in report.findings if finding.name in ("chunk cost", "state")]
    assert shown == [
        "full size, ms in the mean (nearly always below): 1 step 100 (150), 2 steps 200 (300)",
        "smaller size, ms: 1 step 50 (150), 2 steps 100 (300)",
        "12 MiB a session",
    ]
    found = json.loads(to_json(report))["measured"]
    assert found["costs"][1] == {"steps": 2, "small": False, "light": False, "mean_ms": 200, "upper_ms": 300}
    assert found["state_bytes"] == 12 << 20
    # The promise is the cost model's too: the smaller size lets four in, at a rate that keeps the latency budget.
    assert found["sessions"] == 4


async def test_an_engine_that_does_not_start_is_a_problem(settings: ServerSettings) -> None:
    class Broken(FakeEngine):
        async def wait_ready(self) -> None:
            raise EngineError("engine failed: no such kernel")

    report = await examine(settings, make_engine=lambda _: Broken())
    assert not report.can_serve
    assert "no such kernel" in report.findings[-1].text


async def test_with_a_problem_nothing_is_started(settings: ServerSettings) -> None:
    def no_engine(settings: ServerSettings) -> FakeEngine:
        raise AssertionError("the engine was asked for")

    nowhere = settings.model_copy(update={"engine": EngineSettings(model="nowhere")})
    report = await examine(nowhere, make_engine=no_engine)
    assert not report.can_serve
    assert "cannot serve" in to_text(report)
    assert json.loads(to_json(report))["measured"] is None


def test_a_damaged_model_is_found_by_its_hash(settings: ServerSettings) -> None:
    assert check_model(settings).level is Level.OK
    (settings.engine.model_dir / "model.safetensors").write_bytes(b"half a file")
    damaged = check_model(settings)
    assert damaged.level is Level.PROBLEM
    assert "git checkout" in damaged.cure


def test_learned_costs_are_shown_with_their_file(tmp_path: Path) -> None:
    engine = EngineSettings(costs_dir=tmp_path)
    settings = ServerSettings(port=0, engine=engine)
    assert check_learned(settings).text == f"no costs of such an engine yet in {tmp_path}"
    file, costs = cost_file(engine, cpu_title(), "full"), CostModel()
    assert file is not None
    for _ in range(25):
        costs.observe(Work.of_chunk(1), 0.12)
    assert file.save(costs, 0.12, chunk_costs(costs, (1, 2)))
    found = check_learned(settings)
    assert found.level is Level.OK
    assert found.text.startswith("120 ms a chunk in service, 25 passes until 2")
    assert found.text.endswith(f": {file.path}")
    file.path.write_text("{")
    assert check_learned(settings).level is Level.WARNING
    off = engine.model_copy(update={"costs_dir": "off"})
    assert "engine.costs_dir is off" in check_learned(settings.model_copy(update={"engine": off})).text


@pytest.mark.parametrize("config", ["", "{", "{}"])
def test_a_broken_model_config_is_a_problem(settings: ServerSettings, config: str) -> None:
    (settings.engine.model_dir / "config.json").write_text(config)
    assert check_model(settings).level is Level.PROBLEM


def write_files(folder: Path, **files: bytes) -> ServerSettings:
    """A model of several files, as Wan's are."""
    folder.mkdir()
    records = {}
    for name, content in files.items():
        (folder / f"{name}.safetensors").write_bytes(content)
        record = {"size_bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        records[f"{name}.safetensors"] = record
    (folder / "config.json").write_text(json.dumps({"files": records}))
    return ServerSettings(port=0, engine=EngineSettings(model=str(folder)))


def test_a_model_of_several_files_is_checked_file_by_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = write_files(tmp_path / "wan", transformer=b"a" * 100, vae=b"b" * 50)
    assert check_model(settings) == Finding("model", Level.OK, "wan, 0 MiB in 2 files")
    (tmp_path / "wan" / "vae.safetensors").write_bytes(b"c" * 50)
    changed = check_model(settings)
    assert changed.level is Level.PROBLEM and "vae.safetensors has another SHA-256" in changed.text
    assert "livebrush models download" in changed.cure
    # Large ones are not read through at every look.
    monkeypatch.setattr("server.doctor_checks.MAX_HASHED_BYTES", 10)
    assert "2 of them by size alone" in check_model(settings).text
    (tmp_path / "wan" / "transformer.safetensors").unlink()
    assert "transformer.safetensors has 0 bytes, not 100" in check_model(settings).text


def test_the_choice_is_shown_with_its_reason_and_its_parts() -> None:
    need = Need({"transformer": 3 << 30, "KV cache": 500 << 20}, {"text encoder": 11 << 30})
    choice = Choice(EngineSettings(device="cuda:0"), 2, need, "wan at 832x480, since it fits")
    shown = [finding.text for finding in check_choice(choice)]
    assert shown == [
        "wan at 832x480, since it fits",
        "3.5 GiB on cuda:0: transformer 3.0 GiB, KV cache 500 MiB",
        "11.0 GiB on main memory: text encoder 11.0 GiB",
    ]
    (refused,) = check_choice(None, "wan needs 9 GiB")
    assert refused.level is Level.PROBLEM and "--model auto" in refused.cure


async def test_a_stream_batch_is_measured_by_its_passes(settings: ServerSettings) -> None:
    batch = settings.model_copy(update={"steps": 3, "engine": settings.engine.model_copy(update={"mode": "batch"})})
    report = await examine(
        batch, make_engine=lambda s: FakeEngine(64, 64, delay_s=0.02, held_chunks=2, first_chunk_frames=5)
    )
    # A pass holds three steps, each of another chunk: 48 ms, and not the 144 ms until a chunk comes back.
    assert report.measured is not None and 45 < report.measured.chunk_ms < 90
    assert "with 3 steps" in report.findings[-1].text


def test_a_taken_port_is_a_warning_with_another_one() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        finding = check_port("127.0.0.1", server.getsockname()[1])
    assert finding.level is Level.WARNING
    assert "--port" in finding.cure


@pytest.mark.parametrize(("available_gb", "level"), [(0.5, Level.PROBLEM), (1.5, Level.WARNING), (16, Level.OK)])
def test_memory_is_judged_by_what_the_engine_needs(available_gb: float, level: Level) -> None:
    finding = check_memory(round(available_gb * 1e9))
    assert finding.level is level
    assert bool(finding.cure) is (level is not Level.OK)


def test_this_environment_is_what_the_project_asks_for(settings: ServerSettings) -> None:
    findings = [*check_versions(), check_torch("cpu"), check_codecs(), check_frame_memory(settings)]
    assert [finding for finding in findings if finding.level is Level.PROBLEM] == []


def test_a_gpu_that_is_not_there_is_a_problem_only_where_it_is_asked_for() -> None:
    finding = check_torch("cuda:0")
    assert finding.level is Level.PROBLEM or "no GPU" not in finding.text


def test_missing_tools_are_said_without_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert check_gpu().level is Level.OK
    browser = check_browser()
    assert (browser.level, browser.cure) == (Level.WARNING, "apt-get install chromium")


def test_a_gpu_tool_that_fails_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\nexit 9\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    assert check_gpu().level is Level.WARNING


def test_every_fault_on_the_screen_has_its_cure_below_it() -> None:
    report = Report((Finding("a", Level.OK, "fine"), Finding("b", Level.PROBLEM, "broken", "mend it")), None)
    assert to_text(report).splitlines()[1:3] == ["problem  b  broken", "            -> mend it"]


def test_the_command_shows_what_serve_would_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--quick", "--json"]) == 0
    found = {finding["name"]: finding["text"] for finding in json.loads(capsys.readouterr().out)["findings"]}
    assert found["choice"].startswith("livebrush-tiny at 256x256, 1 step, on the CPU")
    assert "transformer" in found["needs"]
    assert main(["doctor", "--quick", "--json", "--devices", "cuda:7"]) == 1
    findings = json.loads(capsys.readouterr().out)["findings"]
    assert [f["name"] for f in findings if f["level"] == "problem"] == ["choice"]


def test_the_command_ends_with_1_where_it_cannot_serve(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--quick", "--json", "--model", "nowhere"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["can_serve"] is False
    assert [f["name"] for f in found["findings"] if f["level"] == "problem"] == ["model"]
