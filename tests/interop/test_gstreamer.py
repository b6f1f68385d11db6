"""A foreign client: GStreamer publishes and plays. Needs python3-gi, gstreamer1.0-nice and the base, good, bad and
ugly plugins with their introspection data (gir1.2-gst-plugins-bad-1.0), which scripts/setup installs; skipped
without them."""

from __future__ import annotations

import functools
import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.serving import Server

CLIENT = Path(__file__).parent / "gstreamer_client.py"
PYTHONS = ("/usr/bin/python3", "python3")
PROBE = """
import gi
gi.require_version("Gst", "1.0"); gi.require_version("GstWebRTC", "1.0"); gi.require_version("GstSdp", "1.0")
from gi.repository import Gst, GstSdp, GstWebRTC
Gst.init(None)
names = "webrtcbin nicesrc vp8enc vp8dec x264enc h264parse openh264dec opusenc opusdec rtph264pay".split()
assert all(Gst.ElementFactory.find(name) for name in names)
"""
TIMEOUT_S = 90.0


@functools.cache
def python_with_gstreamer() -> str | None:
    """The system's Python, where packages of the distribution live."""
    for name in PYTHONS:
        if (path := shutil.which(name)) and subprocess.run([path, "-c", PROBE], capture_output=True).returncode == 0:
            return path
    return None


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server(tmp_path_factory.mktemp("server") / "log", engine="fake", patient=True) as running:
        yield running


@pytest.mark.parametrize(
    ("codec", "profile"), [("VP8", ""), ("H264", "constrained-baseline"), ("H264", "main"), ("H264", "high")]
)
def test_gstreamer_publishes_and_plays(server: Server, codec: str, profile: str) -> None:
    python = python_with_gstreamer()
    if python is None:
        pytest.skip("GStreamer's webrtcbin with Python bindings is not installed")
    command = [python, str(CLIENT), server.url, codec, profile]
    client = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S)
    assert client.returncode == 0, client.stderr[-2000:]
    told = json.loads(client.stdout.splitlines()[-1])
    assert told["deleted"] == [200, 200]
    assert told["decoded"]["video"] >= 30 and told["decoded"]["audio"] >= 50
