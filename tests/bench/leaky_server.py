"""`livebrush` with a leak: 100 kB stay with every peer. What drill_soak.py must not let pass, or it sees nothing."""

from __future__ import annotations

import os
import sys
from typing import Any

from server import cli
from server.peer import Peer

LEAK_BYTES = 100_000

kept: list[bytes] = []
begin = Peer.__init__


def leaking(self: Peer, *args: Any, **options: Any) -> None:
    """As before, and something stays."""
    begin(self, *args, **options)
    kept.append(os.urandom(LEAK_BYTES))


if __name__ == "__main__":
    Peer.__init__ = leaking  # type: ignore[method-assign]
    sys.exit(cli.main())
