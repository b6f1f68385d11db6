"""`livebrush plan`: what it predicts, for people and machines, and how it fails."""

import argparse
import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from engine.cost_model import CostModel, Work
from server.admission import LIMITS
from server.doctor import Report, to_json
from server.doctor_measure import Cost, Measured
from server.ladder import rungs
from server.plan_command import add_plan_parser
from server.session_terms import rung_name
from server.settings import ServerSettings


def livebrush(*arguments: str) -> int:
    parser = argparse.ArgumentParser(prog="livebrush")
    add_plan_parser(parser.add_subparsers(required=True))
    options = parser.parse_args(["plan", *arguments])
    status: int = options.command(options)
    return status


def planned(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert livebrush(*arguments, "--json") == 0
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    return result


WAN = ("--model", "wan2.1-1.3b", "--size", "832x480", "--steps", "1")


def test_as_published_gives_the_paper_s_figures(capsys: pytest.CaptureFixture[str]) -> None:
    plan = planned(capsys, "--devices", "h100:4", *WAN, "--as-published")
    assert plan["fps"] == pytest.approx(44.38, rel=0.1)
    assert plan["server"] is None
    assert plan["system"] == "as published" and plan["groups"] == [4] and len(plan["utilisation"]) == 4
    assert plan["bottleneck"].startswith("VAE decode on device 4")
    two = planned(capsys, "--devices", "h100", *WAN[:4], "--steps", "2", "--as-published")
    assert two["ttff_s"] == pytest.approx(0.47, rel=0.1)
    assert two["ttff_first_chunk_s"] > two["ttff_s"]


def test_ours_is_the_default_and_marked_as_a_prediction(capsys: pytest.CaptureFixture[str]) -> None:
    plan = planned(capsys, "--devices", "h100:4", *WAN)
    assert plan["prediction"] is True and "prediction" in plan["note"]
    assert plan["system"] == "livebrush" and plan["fps"] > 44.38
    assert plan["sessions_held"] >= 4 and plan["sessions"] == 1 and plan["dmr"] == 0
    assert 0 < plan["latency_s"] < plan["latency_p95_s"] < plan["ttff_s"] < 1


def test_given_sessions_are_simulated_together(capsys: pytest.CaptureFixture[str]) -> None:
    alone = planned(capsys, "--sessions", "2", "--fps", "15")
    assert alone["fps"] == pytest.approx(15, rel=0.05) and alone["fps_total"] == pytest.approx(30, rel=0.05)
    assert alone["sessions_held"] == 2
    crowd = planned(capsys, "--sessions", "12", "--fps", "15", "--arrivals", "poisson", "--no-ladder")
    assert crowd["dmr"] > 0.3 and crowd["fps"] < 10 and crowd["sessions_held"] is None and crowd["server"] is None
    assert crowd["utilisation"][0] > 0.9 and "ms a chunk" in crowd["bottleneck"]
    assert len(crowd["per_session"]) == 12 and all(session["dmr"] > 0.1 for session in crowd["per_session"])


def test_a_crowd_before_a_server_is_let_in_as_far_as_there_are_seats(capsys: pytest.CaptureFixture[str]) -> None:
    crowd = planned(capsys, "--sessions", "12", "--fps", "24")
    server, sessions = crowd["server"], crowd["per_session"]
    assert server["seats"] == server["admitted"] == len(sessions) == 12 - server["refused"] < 12
    assert "no time" in server["limit"] and crowd["sessions_held"] is None
    # They stand on one rung, at its rate, and each has its frames in time.
    assert 8 <= server["rung"]["fps"] < 24 and server["rung"]["small"] and not server["rung"]["camera"]
    assert all(session["fps"] == pytest.approx(server["rung"]["fps"], rel=0.1) for session in sessions)
    assert crowd["worst_dmr"] < 0.01 and server["rungs_down"] > 0
    assert livebrush("--sessions", "12", "--fps", "24") == 0
    text = capsys.readouterr().out
    for part in (server["rung"]["name"], f"{server['refused']} of 12 are refused", "session 1 ", "needs"):
        assert part in text


def test_slower_devices_stand_lower_down_to_the_camera_by_the_server_s_own_rungs(
    capsys: pytest.CaptureFixture[str],
) -> None:
    ladder = rungs(ServerSettings(), steps_max=1, has_small=True)
    depths = []
    for slower in ("1", "2", "3", "5", "30"):
        plan = planned(capsys, "--sessions", "1", "--fps", "24", "--slower", slower)
        server, (session,) = plan["server"], plan["per_session"]
        depths.append(server["rungs_down"])
        assert server["rung"]["name"] == rung_name(ladder[server["rungs_down"]])
        assert session["fps"] <= 1.1 * server["rung"]["fps"]
        assert all(later["at_s"] - move["at_s"] >= 3 for move, later in pairwise(server["moves"]))
    assert depths == sorted(depths) and depths[0] == 0 and 0 < depths[1] < depths[3]
    assert server["rung"]["camera"] or server["moves"][-1]["to"] != "camera"
    assert session["by_camera"] > 0.5 > session["dmr"]
    assert (server["seats"], server["limit"]) == (1, LIMITS["engine"])


@pytest.mark.parametrize(("vae", "light"), [("auto", True), ("full", False), ("light", False)])
def test_the_light_vae_is_a_rung_where_both_are_there(
    capsys: pytest.CaptureFixture[str], vae: str, light: bool
) -> None:
    arguments = ("--devices", "rtx4090", "--size", "832x480", "--steps", "2", "--sessions", "1", "--vae", vae)
    plan = planned(capsys, *arguments)
    assert plan["server"]["rung"]["light"] is light and not plan["server"]["rung"]["small"]
    # The light one alone is no rung, and quick enough from the beginning.
    assert (plan["server"]["rungs_down"] == 0) is (vae == "light")
    # Two steps in a ring: neither size nor VAE is changed there.
    ring = planned(capsys, "--devices", "h100:2", "--model", "wan2.1-14b", "--steps", "2", "--sessions", "1")
    assert ring["groups"] == [2] and not ring["server"]["rung"]["light"]


def test_a_slower_device_renders_as_much_less(capsys: pytest.CaptureFixture[str]) -> None:
    alone, slower = planned(capsys), planned(capsys, "--slower", "1.5")
    assert slower["throughput_fps"] == pytest.approx(alone["throughput_fps"] / 1.5, rel=0.03)
    assert slower["sessions_held"] < alone["sessions_held"] and slower["basis"].startswith("1.5 times: measured")


def test_the_table_names_the_figures(capsys: pytest.CaptureFixture[str]) -> None:
    assert livebrush("--devices", "rtx4090:2", "--size", "512x512") == 0
    text = capsys.readouterr().out
    for part in ("rtx4090, rtx4090", "sessions held", "first frame", "bottleneck", "fitted to the paper", "prediction"):
        assert part in text


def test_a_measured_profile_takes_the_place_of_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = CostModel()
    for _ in range(30):
        model.observe(Work.of_chunk(1, window=3), 0.170)
    costs = tuple(Cost(steps, False, 170.0 * steps, 200.0 * steps) for steps in (1, 2, 4))
    report = Report((), Measured(170.0, 1.0, 16.0, 1, costs))
    for profile in (json.dumps(model.snapshot()), to_json(report)):
        file = tmp_path / "profile.json"
        file.write_text(profile)
        plan = planned(capsys, "--profile", str(file), "--sessions", "1")
        assert plan["throughput_fps"] == pytest.approx(4 / 0.170, rel=0.1)
        assert plan["basis"] == "measured: profile.json"


def test_the_plot_is_an_svg_with_both_panels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "plan.svg"
    planned(capsys, "--plot", str(file), "--seconds", "5")
    lines = ElementTree.fromstring(file.read_text()).findall(".//{*}polyline")
    assert len(lines) == 2 and all(len(line.attrib["points"].split()) >= 8 for line in lines)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--devices", "tpu:4"), "device 'tpu' is not known; known are cpu, h100"),
        (("--devices", "h100:0"), "whole number from 1 to 64"),
        (("--devices", "h100", "--model", "wan3"), "model 'wan3' is not known; known are wan2.1-1.3b"),
        (("--devices", "h100", "--size", "500x300"), "multiple of 16 from 64 to 2048"),
        (("--devices", "h100", "--size", "big"), "must be WIDTHxHEIGHT"),
        (("--devices", "h100", "--steps", "9"), "steps must be 1 to 4, not 9"),
        (("--sessions", "0"), "sessions must be 1 to"),
        (("--fps", "0"), "fps must be 1 to 240"),
        (("--micro-batch", "99"), "micro-batch must be 1 to 16"),
        (("--slower", "0"), "slower must be 0.1 to 100"),
        (("--budget", "nan"), "budget must be 0.01 to 60 s"),
        (("--devices", "cpu", "--model", "wan2.1-14b"), "no times of wan2.1-14b on cpu"),
        (("--devices", "h100", "--model", "livebrush-tiny"), "--profile"),
        (("--as-published",), "--as-published is known for Wan models"),
        (("--devices", "rtx4090", "--model", "wan2.1-14b"), "do not fit into the memory of 1 devices"),
        (("--devices", "l4", "--model", "wan2.1-14b", "--as-published"), "does not fit into one"),
        (("--plot", "plan.png"), "only .svg is drawn"),
        (("--profile", "missing.json"), "missing.json"),
    ],
)
def test_bad_values_are_refused(arguments: tuple[str, ...], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert livebrush(*arguments) == 1
    assert words in capsys.readouterr().err
    assert livebrush(*arguments, "--json") == 1
    assert words in json.loads(capsys.readouterr().out)["error"]


def test_what_is_no_profile_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "profile.json"
    for text, words in (
        ("{", "is not JSON"),
        ("[]", "expected an object"),
        ('{"measured": null}', "expected an object"),
        ("{}", "no profile"),
    ):
        file.write_text(text)
        assert livebrush("--profile", str(file)) == 1
        assert words in capsys.readouterr().err


def test_planning_loads_no_torch() -> None:
    code = "import sys, server.plan_command, engine.simulator, engine.memory; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
