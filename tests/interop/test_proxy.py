"""deploy/nginx.conf in front of `livebrush serve`: HTTPS, WHIP, clients told apart, a WebSocket. Skipped without
nginx, which scripts/setup does not install: Debian's starts by itself."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import ssl
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import pytest

from tests.e2e.serving import Server
from tests.interop.asking import SDP
from tests.interop.offers import obs_offer
from tests.server.test_tls import made

CONF = Path(__file__).parents[2] / "deploy" / "nginx.conf"
NGINX = shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin")
TOKEN = "a-token-of-the-tests"
START_TIMEOUT_S = 30.0
SURROUNDING = """
daemon off; worker_processes 1; error_log stderr; pid {folder}/pid;
events {{}}
http {{ access_log off; client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy;
fastcgi_temp_path {folder}/f;
uwsgi_temp_path {folder}/u; scgi_temp_path {folder}/s; include {folder}/livebrush.conf; }}
"""

pytestmark = pytest.mark.skipif(NGINX is None, reason="nginx is not installed")


@dataclass(frozen=True)
class Proxied:
    url: str
    trusting: ssl.SSLContext


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port


@pytest.fixture(scope="module")
def proxied(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxied]:
    """The example as it is, but for its name, port and files."""
    folder, port = tmp_path_factory.mktemp("nginx"), free_port()
    cert, key = made(folder)
    with Server(
        folder / "log",
        engine="fake",
        patient=True,
        LIVEBRUSH_TRUSTED_PROXIES=json.dumps(["127.0.0.1"]),
        LIVEBRUSH_TOKENS__PUBLISH=TOKEN,
    ) as server:
        conf = CONF.read_text().replace("listen 443 ssl", f"listen 127.0.0.1:{port} ssl")
        conf = conf.replace("live.example;", "localhost;").replace("http://127.0.0.1:8080", server.url)
        conf = conf.replace("/etc/letsencrypt/live/live.example/fullchain.pem", str(cert))
        conf = conf.replace("/etc/letsencrypt/live/live.example/privkey.pem", str(key))
        (folder / "livebrush.conf").write_text(conf)
        (folder / "nginx.conf").write_text(SURROUNDING.format(folder=folder))
        assert NGINX is not None
        nginx = subprocess.Popen([NGINX, "-e", "stderr", "-c", folder / "nginx.conf", "-p", folder])
        try:
            wait_for(port)
            yield Proxied(f"https://localhost:{port}", ssl.create_default_context(cafile=cert))
        finally:
            nginx.send_signal(signal.SIGTERM)
            nginx.wait(timeout=START_TIMEOUT_S)


def wait_for(port: int) -> None:
    until = time.monotonic() + START_TIMEOUT_S
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            assert time.monotonic() < until, "nginx did not start"
            time.sleep(0.1)


async def test_the_page_whip_and_whep_come_through(proxied: Proxied) -> None:
    bearer = {"Authorization": f"Bearer {TOKEN}", "Origin": proxied.url}
    async with aiohttp.ClientSession(proxied.url, headers=bearer) as http:
        async with http.get("/", ssl=proxied.trusting) as page:
            assert page.status == 200 and "Livebrush" in await page.text()
        locations = []
        for path, offer in (("/whip/a", obs_offer()), ("/whep/a", obs_offer(direction="recvonly"))):
            async with http.post(path, data=offer, headers={"Content-Type": SDP}, ssl=proxied.trusting) as made_here:
                assert made_here.status == 201, await made_here.text()
                assert made_here.headers["ETag"] and made_here.content_type == SDP
                locations.append(made_here.headers["Location"])
        for location in reversed(locations):
            async with http.delete(location, ssl=proxied.trusting) as deleted:
                assert deleted.status == 200


async def test_a_websocket_comes_through(proxied: Proxied) -> None:
    bearer = {"Authorization": f"Bearer {TOKEN}", "Origin": proxied.url}
    async with (
        aiohttp.ClientSession(proxied.url, headers=bearer) as http,
        http.ws_connect("/api/v1/socket", ssl=proxied.trusting, protocols=["livebrush"]) as line,
    ):
        assert line.protocol == "livebrush"


async def test_a_client_cannot_name_another_address(proxied: Proxied) -> None:
    # Last: it uses up what this address may ask.
    bearer = {"Authorization": f"Bearer {TOKEN}", "Content-Type": SDP}
    statuses = []
    async with aiohttp.ClientSession(proxied.url, headers=bearer) as http:
        for number in range(45):
            told = {"X-Forwarded-For": f"192.0.2.{number}"}
            async with http.post("/whip/a", data="v=0", headers=told, ssl=proxied.trusting) as response:
                statuses.append(response.status)
    assert 429 in statuses
