"""One HTTP request, as plain as it goes on the line."""

from __future__ import annotations

import http.client
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

TIMEOUT_S = 30.0
SDP = "application/sdp"
FRAGMENT = "application/trickle-ice-sdpfrag"


@dataclass(frozen=True, slots=True)
class Reply:
    """What came back."""

    status: int
    headers: http.client.HTTPMessage
    text: str

    def json(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.text)
        return found


def ask(method: str, url: str, body: str | bytes = "", headers: Mapping[str, str] | None = None) -> Reply:
    """Send it and read all of the answer. Raises OSError or HTTPException where none comes in TIMEOUT_S."""
    place = urlsplit(url)
    connection = http.client.HTTPConnection(place.netloc, timeout=TIMEOUT_S)
    try:
        target = place.path + (f"?{place.query}" if place.query else "")
        raw = body.encode() if isinstance(body, str) else body
        connection.request(method, target, raw or None, dict(headers or {}))
        response = connection.getresponse()
        return Reply(response.status, response.headers, response.read().decode())
    finally:
        connection.close()
