"""Who may do what: roles, bearer tokens, and signed links that expire (docs/security.md).

A role may all that a lower one may: view < publish < admin. Where no token is set, everybody may everything; such a
server listens on loopback only. No I/O: the clock is an argument, HTTP stands in server/guard.py.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass

from server.errors import Unauthorized
from server.roles import MAX_LINK_HOURS, Role

TOKEN_BYTES = 32
MAX_TOKEN_CHARS = 512
# link.ROLE.STREAM.UNIX_SECONDS.SIGNATURE; the stream may be empty.
LINK = re.compile(r"link\.(view|publish)\.([A-Za-z0-9_-]{0,64})\.(\d{1,12})\.([A-Za-z0-9_-]{43})")
# What a link's key is derived for, so that a token is never used as a key itself.
LINK_PURPOSE = b"livebrush link 1"


@dataclass(frozen=True, slots=True)
class Grant:
    """What a request may do. owner: tells holders apart without keeping what they hold; "" without a token.

    stream: the one that a link is for, "" for every one.
    """

    role: Role
    owner: str = ""
    stream: str = ""
    is_link: bool = False


EVERYTHING = Grant(Role.ADMIN)


@dataclass(frozen=True, slots=True)
class Link:
    """A token that expires. expires_at: Unix seconds."""

    token: str
    role: Role
    stream: str
    expires_at: int

    @property
    def path(self) -> str:
        """What to open or to publish to. A page's token stands in the fragment, which no browser sends."""
        if self.role is Role.PUBLISH:
            return f"/whip/{self.stream}" if self.stream else f"/#token={self.token}"
        query = f"?stream={self.stream}" if self.stream else ""
        return f"/overlay{query}#token={self.token}"


class Access:
    """The tokens of a server."""

    def __init__(self, tokens: Mapping[Role, str]) -> None:
        """tokens: at most one a role; none leaves everything open."""
        # Digests under a key of this process: equal lengths to compare, and names that tell nothing.
        self._key = secrets.token_bytes(32)
        self._digests = {role: self._digest(token) for role, token in tokens.items()}
        signer = tokens.get(Role.ADMIN) or tokens.get(Role.PUBLISH)
        self._link_key = None if signer is None else hmac.digest(_bytes(signer), LINK_PURPOSE, "sha256")

    @property
    def required(self) -> bool:
        """Whether anybody has to show a token."""
        return bool(self._digests)

    def grant(self, token: str, *, unix_now: float) -> Grant:
        """What the holder of a token or link may do. Raises Unauthorized, which never tells how near it was."""
        if len(token) > MAX_TOKEN_CHARS:
            raise Unauthorized(f"a token has at most {MAX_TOKEN_CHARS} characters")
        digest = self._digest(token)
        # No early exit: every token is compared.
        roles = [role for role, known in self._digests.items() if hmac.compare_digest(digest, known)]
        if roles:
            return Grant(max(roles), digest.hex()[:32])
        return self._grant_of_link(token, digest, unix_now)

    def link(self, role: Role, stream: str, *, hours: float, unix_now: float) -> Link:
        """A link of a role for one stream, or "" for every one.

        Raises: ValueError for the admin role, hours out of bounds, or where there is no token to sign with.
        """
        if role is Role.ADMIN:
            raise ValueError("a link is for view or publish; the admin token is not passed around")
        if not 0 < hours <= MAX_LINK_HOURS:
            raise ValueError(f"hours {hours:g} must be above 0 and at most {MAX_LINK_HOURS:g}")
        if self._link_key is None:
            raise ValueError("no token is set that could sign a link; set tokens.publish or tokens.admin")
        expires_at = int(unix_now + hours * 3600)
        signed = f"link.{role}.{stream}.{expires_at}"
        token = f"{signed}.{_signature(self._link_key, signed)}"
        if not LINK.fullmatch(token):
            raise ValueError("a stream's name has 1 to 64 letters, digits, - and _")
        return Link(token, role, stream, expires_at)

    def _grant_of_link(self, token: str, digest: bytes, unix_now: float) -> Grant:
        found = LINK.fullmatch(token)
        if found is None or self._link_key is None:
            raise Unauthorized("the bearer token is not one of this server (settings tokens.view, .publish, .admin)")
        role, stream, expires_at, signature = found.groups()
        if not hmac.compare_digest(_signature(self._link_key, token.rpartition(".")[0]), signature):
            raise Unauthorized("this link was not signed by this server, or its token has changed since")
        if unix_now >= int(expires_at):
            raise Unauthorized("this link has expired; ask for a new one", code="link_expired")
        return Grant(Role[role.upper()], digest.hex()[:32], stream, is_link=True)

    def _digest(self, token: str) -> bytes:
        return hmac.digest(self._key, _bytes(token), "sha256")


def new_token() -> str:
    """A token as good as a key: 32 random bytes."""
    return secrets.token_urlsafe(TOKEN_BYTES)


def _bytes(token: str) -> bytes:
    # A header's bytes may be no UTF-8; they come as surrogates.
    return token.encode("utf-8", "surrogateescape")


def _signature(key: bytes, text: str) -> str:
    return base64.urlsafe_b64encode(hmac.digest(key, text.encode(), hashlib.sha256)).rstrip(b"=").decode()
