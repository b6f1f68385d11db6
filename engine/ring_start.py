"""The start of a ring behind the server: rank 0's process starts those of the other ranks before any loads torch.

So all of them import it at the same time, each on a core of its own, and not one after the other: with the model's
loading that is most of what a group needs to come back after a loss. They are told where to meet once rank 0 knows, and
load nothing before.
"""

from __future__ import annotations

import logging
import multiprocessing
import sys
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

from engine.config import EngineSettings


@dataclass(frozen=True)
class Follower:
    """A rank after the first. pipe: takes the port of the store where the ranks meet."""

    process: BaseProcess
    pipe: Connection

    @classmethod
    def start(cls, settings: EngineSettings, rank: int) -> Follower:
        """Start its process, which waits for the port."""
        context = multiprocessing.get_context("spawn")
        theirs, ours = context.Pipe(duplex=False)
        process = context.Process(target=_follow, args=(settings, rank, theirs), name=f"ring rank {rank}", daemon=True)
        process.start()
        theirs.close()
        return cls(process, ours)


def _follow(settings: EngineSettings, rank: int, pipe: Connection) -> None:
    from engine.ring_worker import follow_worker  # torch: here, where it is wanted

    follow_worker(settings, rank, pipe)


def main(control_fd: int, memory_fd: int, settings: EngineSettings) -> None:
    """Start the other ranks, then be rank 0."""
    followers = [Follower.start(settings, rank) for rank in range(1, settings.rank_count)]
    from engine.ring_worker import main as lead  # torch: after they have begun

    lead(control_fd, memory_fd, settings, followers)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s rank %(levelname)s %(message)s")
    main(int(sys.argv[1]), int(sys.argv[2]), EngineSettings.model_validate_json(sys.argv[3]))
