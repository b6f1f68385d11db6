"""Memory that two ranks share: what is written is read, in order, and nobody else comes to it."""

import os
import threading
from pathlib import Path

import pytest
import torch

from engine.shared_pieces import OFFER_NUMBERS, Late, SharedPieces
from tests.engine.wire_ends import X86

PIECES, VALUES = 3, 5
pytestmark = pytest.mark.skipif(not X86, reason="ranks share memory on x86 alone")


def both() -> tuple[SharedPieces, SharedPieces]:
    """The writer's and the reader's, settled."""
    writer, offer = SharedPieces.create(PIECES, VALUES, torch.float32)
    assert writer is not None
    reader = SharedPieces.join(offer, PIECES, VALUES, torch.float32)
    assert reader is not None
    writer.settle()
    return writer, reader


def row(number: int, length: int = VALUES) -> torch.Tensor:
    return torch.arange(length, dtype=torch.float32) + 100 * number


def test_pieces_are_read_as_they_were_written_round_and_round() -> None:
    writer, reader = both()
    written = taken = 0
    for more, fewer in ((3, 1), (1, 2), (2, 3), (1, 1), (3, 3)):
        for _ in range(more):
            # Of two rows, the last piece of a message shorter than the others.
            writer.put([row(written)[:2], row(written)[2 : 4 + written % 2]], 1.0)
            written += 1
        assert writer.free == reader.free == PIECES - (written - taken)
        for _ in range(fewer):
            into = torch.zeros(4 + taken % 2)
            reader.take(into, 1.0)
            assert torch.equal(into, row(taken)[: 4 + taken % 2])
            taken += 1
    assert written == taken == 10


def test_a_full_ring_waits_for_its_reader_and_an_empty_one_for_its_writer() -> None:
    writer, reader = both()
    for number in range(PIECES):
        assert writer.put([row(number)], 1.0) == 0.0
    with pytest.raises(Late, match=r"0\.05 s"):
        writer.put([row(3)], 0.05)
    thread = threading.Timer(0.1, lambda: reader.take(torch.zeros(VALUES), 1.0))
    thread.start()
    assert writer.put([row(3)], 30.0) > 0.0
    thread.join()
    into = torch.zeros(VALUES)
    for number in (1, 2, 3):
        reader.take(into, 1.0)
        assert torch.equal(into, row(number))
    with pytest.raises(Late):
        reader.take(into, 0.05)
    assert torch.equal(into, row(3))


def test_a_writer_does_not_wait_for_a_reader_that_has_ended() -> None:
    writer, offer = SharedPieces.create(PIECES, VALUES, torch.float32)
    assert writer is not None
    read, write = os.pipe()
    reader = os.fork()
    if not reader:
        joined = SharedPieces.join(offer, PIECES, VALUES, torch.float32)
        os.write(write, b"y" if joined else b"n")
        os._exit(0)
    assert os.read(read, 1) == b"y"
    os.waitpid(reader, 0)
    for number in range(PIECES):
        writer.put([row(number)], 1.0)
    with pytest.raises(Late, match=f"process {reader} has ended"):
        writer.put([row(PIECES)], 600.0)
    for end in (read, write):
        os.close(end)


def test_only_the_offer_as_it_was_made_is_joined() -> None:
    writer, offer = SharedPieces.create(PIECES, VALUES, torch.float32)
    assert writer is not None
    assert len(offer) == OFFER_NUMBERS
    # Of another boot of the machine, of a process or file there is not, of another memory at the same place.
    for place, by in enumerate((1, 1, 1 << 30, 1 << 20, 1)):
        wrong = [number + by * (place == other) for other, number in enumerate(offer)]
        assert SharedPieces.join(wrong, PIECES, VALUES, torch.float32) is None
    assert SharedPieces.join(offer, PIECES + 1, VALUES, torch.float32) is None
    assert SharedPieces.join([0] * OFFER_NUMBERS, PIECES, VALUES, torch.float32) is None
    assert SharedPieces.join(offer, PIECES, VALUES, torch.float32) is not None
    # Settled, the offer stands no longer.
    writer.settle()
    assert SharedPieces.join(offer, PIECES, VALUES, torch.float32) is None


def test_nothing_is_offered_where_stores_may_be_seen_in_another_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    assert SharedPieces.create(PIECES, VALUES, torch.float32) == (None, [0] * OFFER_NUMBERS)


def test_files_do_not_stay_open() -> None:
    both()
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(20):
        both()
    assert len(list(Path("/proc/self/fd").iterdir())) == before
