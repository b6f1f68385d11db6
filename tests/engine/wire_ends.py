"""Both ends of a wire, each in a process of its own, for test_transport."""

import platform
from multiprocessing.connection import Connection
from typing import Any

import torch

from engine.shared_pieces import SharedPieces
from engine.transport import Inbox, Outbox, WireShape, meet, open_wire

SHAPE = WireShape(words=3, values=10, largest=25, dtype=torch.float32, device=torch.device("cpu"))
LIMIT_S = 60.0
# Elsewhere no memory is shared, see `engine.shared_pieces`.
X86 = platform.machine() in ("x86_64", "AMD64")


def messages() -> list[list[torch.Tensor]]:
    """Payloads of every kind: none, within a piece, over its borders, exactly one, far more than the buffers hold."""
    torch.manual_seed(5)
    sizes: list[list[tuple[int, ...]]] = [
        [],
        [(4,)],
        [(3, 2), (1, 1, 7)],
        [(10,)],
        [(2, 5), (10, 1)],
        [(5, 31)],
        [(2, 3), (3, 2, 2), (1,), (13, 4)],
        [],
    ]
    return [[torch.randn(size) for size in message] for message in sizes]


def end(rank: int, port: int, way: str, pipe: Connection) -> None:
    """Rank 0 sends all messages three times over; rank 1 takes them and tells what came, and how.

    way: "shared", "tcp" (no memory is offered), or "refused" (rank 1 cannot reach what is offered).
    """
    torch.set_num_threads(1)
    if way == "refused":
        SharedPieces.join = classmethod(lambda *_: None)  # type: ignore[method-assign,assignment]
    meet(rank, 2, port)
    wire = open_wire(SHAPE)
    if rank == 0:
        outbox = Outbox(wire, 1, timeout_s=LIMIT_S, share=way != "tcp")
        for number, tensors in enumerate(3 * messages()):
            outbox.send([float(number), 0.5, -1.0], tensors)
        outbox.flush()
        pipe.send((outbox.shares, outbox.traffic.bytes))
        # As a rank that is told to stop: the other has what it needs.
        pipe.recv()
        return
    inbox = Inbox(wire, 0, timeout_s=LIMIT_S)
    taken: list[tuple[list[float], Any]] = []
    for _ in 3 * messages():
        message = inbox.receive()
        taken.append((message.words, [tensor.clone().numpy() for tensor in message.tensors]))
    pipe.send((taken, inbox.traffic.bytes))
    pipe.recv()
