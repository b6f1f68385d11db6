"""Costs kept between runs: what comes back is what was kept, and whatever else lies there is ignored with one line."""

import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.config import EngineSettings
from engine.cost_file import MAX_AGE_S, MAX_BYTES, MAX_FILES, CostFile, cost_file
from engine.cost_model import CostModel, Work, chunk_costs
from engine.devices import measured_costs

KIND = {"model": "some-model", "width": 256, "device_title": "Some CPU"}
WORK = Work.of_chunk(1, window=3)


def learned_model(seconds: float = 0.1) -> CostModel:
    model = CostModel()
    for passed in range(30):
        model.observe(Work.of_chunk(1 + passed % 2, window=3), seconds * (1 + passed % 2) * (1 + 0.01 * (passed % 5)))
    return model


def kept(folder: Path, seconds: float = 0.1) -> CostFile:
    model, file = learned_model(seconds), CostFile(folder, KIND)
    assert file.save(model, model.mean_s(WORK), chunk_costs(model, (1, 2), window=3))
    return file


def test_what_was_kept_comes_back(tmp_path: Path) -> None:
    file, model = kept(tmp_path / "deep" / "costs"), learned_model()
    learned = CostFile(file.path.parent, dict(reversed(KIND.items()))).load()
    assert learned is not None
    assert learned.costs.snapshot() == model.snapshot()
    assert (learned.chunk_cost_s, learned.chunks) == (model.mean_s(WORK), chunk_costs(model, (1, 2), window=3))
    assert file.path.stat().st_size < MAX_BYTES / 4
    assert [path.name for path in file.path.parent.iterdir()] == [file.path.name]
    assert CostFile(tmp_path, KIND | {"width": 128}).load() is None
    # It is a measured profile as `livebrush plan` takes one.
    costs = measured_costs(json.loads(file.path.read_text())["measured"], window=3)
    assert costs.mean_s(WORK) == pytest.approx(model.mean_s(WORK))


def changed(**fields: object) -> Callable[[bytes], bytes]:
    return lambda data: json.dumps(json.loads(data) | fields).encode()


def nested(name: str, value: Any) -> Callable[[bytes], bytes]:
    def change(data: bytes) -> bytes:
        stored = json.loads(data)
        stored["measured"][name] = value
        return json.dumps(stored).encode()

    return change


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda data: b"", "Invalid JSON|validation error"),
        (lambda data: data[: len(data) // 2], "Invalid JSON|validation error"),
        (lambda data: b"[" * 10_000, "Invalid JSON|validation error"),
        (lambda data: data + b" " * MAX_BYTES, "over 65536 bytes"),
        (lambda data: b"\xff\x00" * 100, "validation error"),
        (changed(format=2), "validation error"),
        (changed(kind=KIND | {"torch": "9.9"}), "of another kind"),
        (changed(saved_at=1.0), "days old, over 90"),
        (changed(chunk_cost_s=-1), "validation error"),
        (changed(chunks=[]), "validation error"),
        (changed(chunks=[{"steps": 1, "small": False, "mean_s": 0.2, "upper_s": 0.1}]), "must be above 0"),
        (changed(measured={}), "no snapshot of a cost model"),
        (nested("coefficients_s", [1.0]), "no snapshot of a cost model"),
        (nested("ratios", [float("nan")]), "validation error|must be positive"),
        (changed(extra=1), "validation error"),
    ],
)
def test_a_file_that_is_no_such_record_is_ignored_with_one_line(
    change: Callable[[bytes], bytes], said: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = kept(tmp_path)
    file.path.write_bytes(change(file.path.read_bytes()))
    with pytest.raises(ValueError, match=said):
        file.read()
    with caplog.at_level(logging.INFO):
        assert file.load() is None
    (record,) = caplog.records
    assert str(file.path) in record.message and "\n" not in record.message


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.integers(0, 10_000), byte=st.integers(0, 255))
def test_a_byte_that_has_changed_never_stops_a_start(at: int, byte: int, tmp_path: Path) -> None:
    file = kept(tmp_path)
    data = bytearray(file.path.read_bytes())
    data[at % len(data)] = byte
    file.path.write_bytes(data)
    learned = file.load()
    # Where it still reads as a record it is one that a warm-up can be blended with.
    if learned is not None:
        model = CostModel()
        model.profile([(WORK, 0.1), (Work.of_chunk(2, window=3), 0.2)], learned.costs)
        assert 0.04 < model.mean_s(WORK) < 0.25
        assert model.upper_s(WORK) >= model.mean_s(WORK)


def test_age_is_judged_at_the_time_of_reading(tmp_path: Path) -> None:
    file = kept(tmp_path)
    saved_at = json.loads(file.path.read_text())["saved_at"]
    assert file.read(saved_at + MAX_AGE_S - 1) is not None
    with pytest.raises(ValueError, match="90 days old"):
        file.read(saved_at + MAX_AGE_S + 3600)


def test_a_folder_that_cannot_be_written_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").touch()
    model, file = learned_model(), CostFile(tmp_path / "file" / "costs", KIND)
    with caplog.at_level(logging.INFO):
        for _ in range(3):
            assert not file.save(model, 0.1, chunk_costs(model, (1,)))
    (record,) = caplog.records
    assert "set engine.costs_dir" in record.message
    assert file.load() is None


def test_only_so_many_files_are_kept_the_newest_and_none_of_others(tmp_path: Path) -> None:
    (tmp_path / "notes.json").write_text("{}")
    for number in range(MAX_FILES + 5):
        old = tmp_path / f"costs-{number:016x}.{'tmp' if number % 2 else 'json'}"
        old.touch()
        os.utime(old, (number, number))
    file = kept(tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert len(names) == MAX_FILES + 1
    assert {file.path.name, "notes.json", f"costs-{MAX_FILES + 4:016x}.json"} <= names
    assert f"costs-{0:016x}.json" not in names


def test_a_kind_is_all_that_a_pass_depends_on(model_dir: Path, tmp_path: Path) -> None:
    base = EngineSettings(model=str(model_dir), costs_dir=tmp_path)

    def path(title: str = "Some CPU", vae: str = "full", **update: object) -> Path:
        file = cost_file(EngineSettings.model_validate(base.model_dump() | update), title, vae)
        assert file is not None
        return file.path

    assert path() == path(max_streams=2) == path(start_timeout_s=5.0) == path(dtype=base.precision) == path(ranks=1)
    others = [
        path(width=128),
        path(mode="batch"),
        path(micro_batch=2),
        path(threads=2),
        path(ranks=2),
        path("Other CPU"),
        path(vae="both"),
        path(dtype="bfloat16" if base.precision == "float32" else "float32"),
    ]
    assert len({path(), *others}) == len(others) + 1
    assert path().parent == tmp_path


def test_the_folder_is_the_users_cache_another_or_none(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert EngineSettings().costs_folder == Path("/somewhere/livebrush/costs")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/me")
    assert EngineSettings().costs_folder == Path("/home/me/.cache/livebrush/costs")
    off = EngineSettings(model=str(model_dir), costs_dir="off")
    assert off.costs_folder is None and cost_file(off, "Some CPU", "full") is None
    for chosen in (off, EngineSettings(costs_dir=Path("/data/costs")), EngineSettings()):
        assert EngineSettings.model_validate_json(chosen.model_dump_json()).costs_folder == chosen.costs_folder
