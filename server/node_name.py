"""A server's name among several: the first characters of every session id and resume token that it makes.

So whoever stands before several servers (server/gateway.py) finds the one that holds a session by its URL or token
alone, and needs to remember nothing. A name is good for one run, as sessions and tokens are.
"""

from __future__ import annotations

import re
import secrets

NAME_CHARS = 8
NAMED = re.compile(rf"[0-9a-f]{{{NAME_CHARS}}}")
SESSION_BYTES, TOKEN_BYTES = 16, 24


def new_node_name() -> str:
    """A name for one run of a server; it is no secret."""
    return secrets.token_hex(NAME_CHARS // 2)


def new_session_id(node: str) -> str:
    """An id of 128 random bits that begins with the node's name."""
    return node + secrets.token_urlsafe(SESSION_BYTES)


def new_resume_token(node: str) -> str:
    """A token of 192 random bits that begins with the node's name."""
    return node + secrets.token_urlsafe(TOKEN_BYTES)


def node_of(text: str) -> str:
    """The node's name in a session's id or a resume token; "" where none can stand there."""
    found = NAMED.match(text)
    return found[0] if found else ""
