"""A foreign client: GStreamer publishes and plays. Needs python3-gi, gstreamer1.0-nice and the base, good, bad and
ugly plugins with their introspection data (gir1.2-gst-plugins-bad-1.0); skipped without them."""

from __future__ import annotations

import asyncio
import functools
import json
import shutil
import subprocess
from pathlib import Path

import pytest

from engine.config import EngineSettings
from engine.fake import FakeEngine
from server.app import running_server
from server.settings import ServerSettings

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


@pytest.mark.parametrize(
    ("codec", "profile"), [("VP8", ""), ("H264", "constrained-baseline"), ("H264", "main"), ("H264", "high")]
)
async def test_gstreamer_publishes_and_plays(codec: str, profile: str) -> None:
    python = python_with_gstreamer()
    if python is None:
        pytest.skip("GStreamer's webrtcbin with Python bindings is not installed")
    settings = ServerSettings(port=0, engine_kind="fake", engine=EngineSettings(width=128, height=128))
    async with running_server(settings, FakeEngine(128, 128, delay_s=0.02)) as (_, port):
        url = f"http://127.0.0.1:{port}"
        client = await asyncio.create_subprocess_exec(
            python, str(CLIENT), url, codec, profile, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        try:
            async with asyncio.timeout(TIMEOUT_S):
                out, errors = await client.communicate()
        finally:
            if client.returncode is None:
                client.kill()
    assert client.returncode == 0, errors.decode()[-2000:]
    told = json.loads(out.decode().splitlines()[-1])
    assert told["deleted"] == [200, 200]
    assert told["decoded"]["video"] >= 30 and told["decoded"]["audio"] >= 50
