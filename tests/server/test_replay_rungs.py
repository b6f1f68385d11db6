"""A session that the ladder moves to every rung and back, recorded and replayed: the same pictures, bit for bit."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest

from engine.api import Capacity
from engine.client import LocalEngine
from engine.config import EngineSettings
from livebrush_client import Api, connect
from server.app import running_server
from server.cli import main
from server.ladder import Ladder, Move, Rung, Signals
from server.settings import RecordingSettings, ServerSettings
from tests.server.test_recording import Grey

PATIENCE_S = 120.0
WIDTH, HEIGHT = 96, 64
# In a process of its own, so that torch is not loaded beside the server.
WRITE = f"""
import sys
from pathlib import Path
from engine.config import ServingProfile
from engine.wan.untrained import SMALL_TAEHV, write_untrained_wan
serving = ServingProfile(fps=16, sizes=(({WIDTH}, {HEIGHT}), (48, 32)), first_chunk_frames=5, steps=2)
write_untrained_wan(Path(sys.argv[1]), name="wan-small", light_vae=SMALL_TAEHV, serving=serving)
"""


class LedLadder(Ladder):
    """A ladder that goes where the test says and nowhere else: an engine's speed on a busy machine is no script."""

    wanted: ClassVar[Callable[[Rung], bool]]

    def __init__(self, settings: ServerSettings, capacity: Capacity, **given: Any) -> None:
        super().__init__(settings, capacity, **given)
        self._rung = self._rungs(capacity)[0]

    def decide(self, now: float, signals: Signals) -> Move | None:
        ladder = self._rungs(signals.capacity)
        found = next((rung for rung in ladder if type(self).wanted(rung)), None)
        if found is None or found == self._rung:
            return None
        return self._move(now, ladder, found, "the test says so")


@pytest.fixture(autouse=True)
def led(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aioice.ice.get_host_addresses", lambda use_ipv4, use_ipv6: ["127.0.0.1"])
    monkeypatch.setattr("server.registry.Ladder", LedLadder)
    LedLadder.wanted = staticmethod(lambda rung: rung.steps == 2)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "wan-small"
    subprocess.run([sys.executable, "-c", WRITE, str(folder)], check=True, timeout=PATIENCE_S)
    return folder


async def until(condition: Callable[[], object], what: str) -> None:
    try:
        async with asyncio.timeout(PATIENCE_S):
            while not condition():
                await asyncio.sleep(0.05)
    except TimeoutError:
        raise AssertionError(f"waited {PATIENCE_S:.0f} s in vain for {what}") from None


Made = tuple[int, bool, bool]


def shaped(folder: Path) -> list[Made]:
    """Steps, size and VAE of every chunk that came back, as far as the record has been written."""
    path = folder / "session.jsonl"
    text = path.read_text() if path.exists() else ""
    lines = [json.loads(line) for line in text.splitlines()[: text.count("\n")]]
    updates = {line["revision"]: line["params"] for line in lines if line["kind"] == "updated"}
    params = [updates.get(line["revision"], lines[0]["params"]) for line in lines if line["kind"] == "returned"]
    return [(each["steps"], each["small"], each["light"]) for each in params]


async def until_shaped(folder: Path, made: Made, what: str) -> None:
    """Three chunks more of this kind are in the record."""
    before = len(shaped(folder))
    await until(lambda: shaped(folder)[before:].count(made) > 2, what)


# Down every rung, the camera too, and up in other steps; with what chunks are made there.
WAY: tuple[tuple[str, Callable[[Rung], bool], Made | None], ...] = (
    ("fewer steps", lambda rung: rung.steps == 1 and not rung.light, (1, False, False)),
    ("the light VAE", lambda rung: rung.light and not rung.small, (1, False, True)),
    ("the smaller size", lambda rung: rung.light and rung.small, (1, True, True)),
    ("fewer frames", lambda rung: rung.fps == 10, (1, True, True)),
    ("the camera", lambda rung: rung.camera, None),
    ("the light VAE again", lambda rung: rung.light and not rung.small, (1, False, True)),
    ("the wish", lambda rung: rung.steps == 2, (2, False, False)),
)


async def record(model: Path, folder: Path) -> Path:
    """A session that is led along `WAY`, recorded."""
    engine_settings = EngineSettings(model=str(model), width=WIDTH, height=HEIGHT, max_streams=1, costs_dir="off")
    settings = ServerSettings(
        port=0,
        steps=2,
        max_fps=12,
        min_fps=0.5,
        max_sessions=1,
        latency_budget_s=20,
        engine=engine_settings,
        recordings=RecordingSettings(dir=folder, min_free_bytes=0),
    )
    engine = LocalEngine(engine_settings)
    async with running_server(settings, engine) as (_, port):
        async with asyncio.timeout(PATIENCE_S):
            await engine.wait_ready()
        base = f"http://127.0.0.1:{port}"
        async with Api(base) as api, connect(base, Grey(), timeout_s=PATIENCE_S, prompt="neon") as live:
            stats: list[dict[str, Any]] = []
            live.on("stats", stats.append)
            await until(lambda: stats and stats[-1]["state"] == "restyled", "restyled pictures")
            path = f"/api/v1/sessions/{live.answer.session}/recording"
            begun = await api.call("POST", path, {"what": ["session"]})
            inside = folder / str(begun["name"])
            await until_shaped(inside, (2, False, False), "recorded chunks")
            for name, wanted, made in WAY:
                LedLadder.wanted = staticmethod(wanted)
                if made is None:
                    await until(lambda: stats[-1]["rung"]["camera"] and stats[-1]["state"] == "withheld", name)
                else:
                    await until_shaped(inside, made, name)
            ended = await api.call("DELETE", path)
            assert (ended["end"], ended["tape_ended"]) == ("stopped", None)
    return inside


def test_a_session_that_was_on_every_rung_is_replayed_bit_for_bit(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = asyncio.run(record(model, tmp_path / "recordings"))
    moves = shaped(folder)
    assert set(moves) == {made for _, _, made in WAY if made is not None}
    assert main(["replay", str(folder), "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["exact"] and summary["chunks"] >= len(moves) > 15
    # A replay that leaves out one of the moves would have been told.
    lines = [json.loads(line) for line in (folder / "session.jsonl").read_text().splitlines()]
    for line in lines:
        if line["kind"] == "updated":
            line["params"]["light"] = False
    (folder / "session.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert main(["replay", str(folder), "--json"]) == 1
    assert not json.loads(capsys.readouterr().out)["exact"]
