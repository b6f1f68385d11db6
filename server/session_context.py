"""What sessions are given: the parts that all of a server share, and where their pictures may go instead."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import Protocol

from engine.api import Engine
from engine.config import MAX_STEPS
from server.frames import OutgoingFrame
from server.metrics import ServerMetrics
from server.node_name import new_node_name
from server.peer import Peer
from server.recording import Recordings
from server.settings import ServerSettings


@dataclass(frozen=True, slots=True)
class SessionContext:
    """What every session of a server shares."""

    engine: Engine
    settings: ServerSettings
    metrics: ServerMetrics
    executor: Executor
    clock: Callable[[], float] = time.monotonic
    steps_max: int = MAX_STEPS
    seed: bool = True
    style_names: Mapping[str, str] = field(default_factory=dict)
    recordings: Recordings | None = None
    node: str = field(default_factory=new_node_name)
    """This run's name, for who stands before several servers."""


class Outlet(Protocol):
    """Where the pictures of a session go that are not for its own peer."""

    def push(self, frame: OutgoingFrame) -> None:
        """Release a picture; never waits, never raises."""
        ...

    async def serve(self, peer: Peer) -> None:
        """Runs beside the session's tasks, for what else there is to carry; cancelled at the session's end."""
        ...
