"""A wire between two processes: what is sent comes out, by TCP and by shared memory alike."""

import multiprocessing
from typing import Any

import numpy as np
import pytest

from engine.transport import HOST, open_store
from tests.engine.wire_ends import LIMIT_S, X86, end, messages


def both_ends(way: str) -> list[Any]:
    """What rank 0 and rank 1 tell."""
    context = multiprocessing.get_context("spawn")
    store = open_store(HOST, timeout_s=LIMIT_S)
    pipes = [context.Pipe() for _ in range(2)]
    ranks = [
        context.Process(target=end, args=(rank, store.port, way, far), daemon=True)
        for rank, (_, far) in enumerate(pipes)
    ]
    try:
        for rank in ranks:
            rank.start()
        told = []
        for near, _ in pipes:
            assert near.poll(LIMIT_S)
            told.append(near.recv())
        for near, _ in pipes:
            near.send(None)
        for rank in ranks:
            rank.join(LIMIT_S)
            assert rank.exitcode == 0
    finally:
        for rank in ranks:
            rank.kill()
    return told


@pytest.mark.parametrize("way", ["shared", "tcp", "refused"])
def test_messages_come_out_as_they_went_in(way: str) -> None:
    (shares, sent), (taken, received) = both_ends(way)
    assert shares is (way == "shared" and X86)
    wanted = 3 * messages()
    assert [words for words, _ in taken] == [[float(number), 0.5, -1.0] for number in range(len(wanted))]
    for (_, found), tensors in zip(taken, wanted, strict=True):
        assert len(found) == len(tensors)
        assert all(np.array_equal(a, b.numpy()) for a, b in zip(found, tensors, strict=True))
    assert sent >= sum(tensor.nbytes for message in wanted for tensor in message)
    assert received >= sum(tensor.nbytes for message in wanted for tensor in message)
