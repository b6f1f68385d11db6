"""A publisher in a Chromium: its fake camera to /whip/{stream}, as any page could do it."""

from __future__ import annotations

from playwright.sync_api import Browser, Page

from tests.e2e.serving import Server

PUBLISH = """async ([path, token]) => {
  const camera = await navigator.mediaDevices.getUserMedia({ video: { width: 640, height: 480 } });
  const pc = new RTCPeerConnection();
  window.publishing = pc;
  pc.addTransceiver(camera.getVideoTracks()[0], { direction: "sendonly" });
  await pc.setLocalDescription();
  const headers = { "Content-Type": "application/sdp", ...(token && { Authorization: `Bearer ${token}` }) };
  const response = await fetch(path, { method: "POST", headers, body: pc.localDescription.sdp });
  const text = await response.text();
  if (response.status !== 201) throw new Error(text);
  await pc.setRemoteDescription({ type: "answer", sdp: text });
}"""


def publish(browser: Browser, server: Server, path: str, *, token: str = "") -> Page:
    """Publish until the page is closed."""
    page = browser.new_context(permissions=["camera"]).new_page()
    page.goto(f"{server.url}/icon.svg")  # of this server, and without a page of its own
    page.evaluate(PUBLISH, [path, token])
    return page
