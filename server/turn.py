"""The ICE servers that a client is told of, with TURN credentials made for it and good for ten minutes.

The scheme is the one that coturn calls `use-auth-secret` (draft-uberti-behave-turn-rest): server and relay share a
secret, the user name holds the time of expiry, the password is its HMAC. So nothing has to be stored, and what a page
leaks is worthless soon. A relay asks for them when a client allocates; a session that runs goes on after they expired.

This server needs no relay itself: relay and server meet over plain UDP.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import secrets
import time
from dataclasses import dataclass

from server.settings import MediaSettings

LIFETIME_S = 600


@dataclass(frozen=True, slots=True)
class IceServer:
    """One STUN or TURN server; username and credential are empty for STUN."""

    url: str
    username: str = ""
    credential: str = ""

    def as_json(self) -> dict[str, str]:
        """As RTCIceServer of a browser."""
        if not self.username:
            return {"urls": self.url}
        return {"urls": self.url, "username": self.username, "credential": self.credential}

    def as_link(self) -> str:
        """As the Link header of RFC 9725, section 4.6."""
        link = f'<{self.url}>; rel="ice-server"'
        if self.username:
            link += f'; username="{self.username}"; credential="{self.credential}"; credential-type="password"'
        return link


def credentials(secret: str, name: str, expires_at_s: int) -> tuple[str, str]:
    """User name and password, for the relay that shares the secret.

    Args:
        name: tells clients apart in the relay's log and quotas.
        expires_at_s: seconds since 1970.
    """
    username = f"{expires_at_s}:{name}"
    digest = hmac.new(secret.encode(), username.encode(), hashlib.sha1).digest()
    return username, base64.b64encode(digest).decode()


def ice_servers(settings: MediaSettings, now_s: float | None = None) -> list[IceServer]:
    """What one client is told, TURN credentials of its own included. now_s: seconds since 1970, now by default."""
    servers = [IceServer(url) for url in settings.ice_servers]
    if settings.turn_urls and settings.turn_secret is not None:
        expires_at_s = int(time.time() if now_s is None else now_s) + LIFETIME_S
        username, password = credentials(settings.turn_secret.get_secret_value(), secrets.token_hex(4), expires_at_s)
        servers += [IceServer(url, username, password) for url in settings.turn_urls]
    return servers
