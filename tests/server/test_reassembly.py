"""Packets to frames: order, repair, deadlines. Time is an argument."""

from __future__ import annotations

import itertools
from collections import Counter

from aiortc.jitterbuffer import JitterBuffer
from aiortc.rtp import RtpPacket
from hypothesis import given, settings
from hypothesis import strategies as st

from server.reassembly import (
    AUDIO_HOLE_S,
    MAX_TRIES,
    REORDER_S,
    EncodedFrame,
    FrameOrder,
    PacketOrder,
    RtpPiece,
    is_h264_key_frame,
    is_vp8_key_frame,
)

DEADLINE_S = 0.15
KEY = b"\x10\x00\x00\x9d\x01\x2a\x40\x01\xf0\x00"
DELTA = b"\x11" + bytes(9)


def frame_order(counters: Counter[str] | None = None) -> FrameOrder:
    return FrameOrder(is_vp8_key_frame, DEADLINE_S, Counter() if counters is None else counters)


def pieces(frame: int, parts: int, *, key: bool = False) -> list[tuple[int, bool, bytes]]:
    """Timestamp, marker and data of each packet of a frame."""
    head = KEY if key else DELTA
    data = [(head if part == 0 else b"") + bytes([frame & 0xFF, part]) for part in range(parts)]
    return [(frame * 3000, part == parts - 1, data[part]) for part in range(parts)]


def push(order: FrameOrder, sequence: int, piece: tuple[int, bool, bytes], now: float) -> list[EncodedFrame]:
    timestamp, marker, data = piece
    order.push(sequence & 0xFFFF, RtpPiece(timestamp & 0xFFFFFFFF, marker, data, now))
    return order.take(now)


def test_frame_leaves_at_its_marker_with_the_arrival_of_its_last_packet() -> None:
    order = frame_order()
    first, second = pieces(0, 2, key=True)
    assert push(order, 7, first, 1.0) == []
    assert push(order, 8, second, 1.25) == [EncodedFrame(first[2] + second[2], 0, 1.25)]
    assert not order.troubled


def test_one_packet_releases_the_whole_backlog_where_stock_keeps_it() -> None:
    order, stock = frame_order(), JitterBuffer(capacity=512, is_video=True)
    frames = [pieces(number, 1, key=number == 0)[0] for number in range(6)]
    arrival = [0, 2, 3, 4, 5, 1]
    released = [len(push(order, number, frames[number], 0.0)) for number in arrival]
    assert released == [1, 0, 0, 0, 0, 5]

    stock_released = 0
    for number in arrival:
        packet = RtpPacket(sequence_number=number, timestamp=frames[number][0], marker=1)
        packet._data = frames[number][2]  # type: ignore[attr-defined]
        stock_released += stock.add(packet)[1] is not None
    assert stock_released == 1


def test_reordering_asks_for_nothing() -> None:
    counters: Counter[str] = Counter()
    order = frame_order(counters)
    push(order, 0, pieces(0, 1, key=True)[0], 0.0)
    push(order, 2, pieces(2, 1)[0], 0.0)
    assert order.due(REORDER_S / 2) == []
    assert [frame.timestamp for frame in push(order, 1, pieces(1, 1)[0], REORDER_S / 2)] == [3000, 6000]
    assert order.due(1.0) == [] and counters["packets_asked"] == 0


def test_missing_packet_is_asked_for_again_but_not_for_ever() -> None:
    order = FrameOrder(is_vp8_key_frame, 1e9, Counter())
    push(order, 65535, pieces(0, 1, key=True)[0], 0.0)
    push(order, 2, pieces(3, 1)[0], 0.0)
    asked = [lost for step in range(1000) if (lost := order.due(step * 0.008))]
    assert asked == [[0, 1]] * MAX_TRIES


def test_who_loses_many_packets_asks_twice() -> None:
    order = frame_order()
    told = []
    for begin, lost_of_ten in ((0, 0), (400, 3), (800, 0)):
        for sequence in range(begin, begin + 400):
            if sequence % 10 >= lost_of_ten:
                push(order, sequence, pieces(sequence, 1, key=sequence == 0)[0], sequence / 60)
        told.append(order.asks_twice)
    assert told == [False, True, False]


def test_questions_follow_the_round_trip() -> None:
    order = FrameOrder(is_vp8_key_frame, 1e9, Counter())
    push(order, 0, pieces(0, 1, key=True)[0], 0.0)
    now, sequence = 0.0, 1
    for _ in range(40):  # each hole is filled 20 ms after it was asked for
        push(order, sequence + 1, pieces(sequence + 1, 1)[0], now)
        assert order.due(now + 0.01) == [sequence]
        push(order, sequence, pieces(sequence, 1)[0], now + 0.03)
        now, sequence = now + 0.1, sequence + 2
    push(order, sequence + 1, pieces(sequence + 1, 1)[0], now)
    assert order.due(now + 0.01) == [sequence]
    assert order.due(now + 0.03) == []
    assert order.due(now + 0.037) == [sequence]


def test_hole_is_given_up_at_its_deadline_and_only_a_key_frame_goes_on() -> None:
    counters: Counter[str] = Counter()
    order = frame_order(counters)
    assert push(order, 0, pieces(0, 1, key=True)[0], 0.0)
    assert push(order, 2, pieces(2, 1)[0], 0.1) == []
    assert order.take(0.1 + DEADLINE_S) == [] and not order.key_frame_due(0.1 + DEADLINE_S)
    late = 0.1 + DEADLINE_S + 0.001
    assert order.take(late) == []
    assert order.key_frame_due(late) and not order.key_frame_due(late + 0.1) and order.key_frame_due(late + 0.2)
    assert push(order, 3, pieces(3, 1)[0], late) == []
    assert [frame.timestamp for frame in push(order, 4, pieces(4, 1, key=True)[0], late)] == [12000]
    assert [frame.timestamp for frame in push(order, 5, pieces(5, 1)[0], late)] == [15000]
    assert (counters["holes_given_up"], counters["frames_skipped"]) == (1, 2)
    assert not order.troubled


def test_hole_inside_a_frame_has_the_same_deadline() -> None:
    order = frame_order()
    push(order, 0, pieces(0, 1, key=True)[0], 0.0)
    broken = pieces(1, 3)
    push(order, 1, broken[0], 0.1)
    push(order, 3, broken[2], 0.1)
    assert order.take(0.1 + DEADLINE_S + 0.001) == []
    assert order.key_frame_due(1.0)


def test_one_lost_packet_freezes_stock_for_five_hundred_frames_and_this_one_until_the_next_key_frame() -> None:
    """One packet a frame, 30 fps, packet 1 never comes; the sender answers a request after 100 ms."""
    order, stock = frame_order(), JitterBuffer(capacity=512, is_video=True)
    answer_at, longest, last, stock_after = None, 0, 0, []
    for number in range(400):
        now = number / 30
        assert order.take(now) == []
        if order.key_frame_due(now):
            answer_at = now + 0.1
        key = number == 0 or (answer_at is not None and now >= answer_at)
        answer_at = None if key else answer_at
        if number == 1:
            continue
        piece = pieces(number, 1, key=key)[0]
        packet = RtpPacket(sequence_number=number, timestamp=piece[0], marker=1)
        packet._data = piece[2]  # type: ignore[attr-defined]
        if stock.add(packet)[1] is not None:
            stock_after.append(number)
        if push(order, number, piece, now):
            longest, last = max(longest, number - last), number
    assert stock_after == []
    assert longest <= 12  # 0.15 s deadline, 0.1 s answer, and the frame grid around both
    assert last == 399


def test_key_frame_behind_a_second_hole_is_found() -> None:
    order = frame_order()
    push(order, 0, pieces(0, 1, key=True)[0], 0.0)
    for sequence in (2, 4, 6):
        push(order, sequence, pieces(sequence, 1, key=sequence == 6)[0], 0.01)
    released = order.take(0.01 + DEADLINE_S + 0.001)
    assert [frame.timestamp for frame in released] == [18000]


def test_stream_taken_up_in_the_middle_waits_for_a_key_frame_and_asks_for_one() -> None:
    order = frame_order()
    assert push(order, 40, pieces(40, 1)[0], 5.0) == []
    assert not order.key_frame_due(5.0)
    assert order.key_frame_due(5.2)
    assert len(push(order, 41, pieces(41, 1, key=True)[0], 5.3)) == 1


def test_far_jump_of_the_numbers_begins_anew() -> None:
    counters: Counter[str] = Counter()
    order = frame_order(counters)
    push(order, 0, pieces(0, 1, key=True)[0], 0.0)
    assert len(push(order, 20000, pieces(1, 1, key=True)[0], 0.1)) == 1
    assert (counters["sequence_jumps"], counters["packets_lost"]) == (1, 0)


def test_padding_makes_no_frame() -> None:
    order = frame_order()
    push(order, 0, pieces(0, 1, key=True)[0], 0.0)
    assert push(order, 1, (0, False, b""), 0.0) == []
    assert [frame.timestamp for frame in push(order, 2, pieces(1, 1)[0], 0.0)] == [3000]


@settings(max_examples=150, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 4), min_size=2, max_size=30),
    start=st.integers(0, 65535),
    lost=st.sets(st.integers(1, 60)),
    swaps=st.lists(st.integers(0, 60), max_size=20),
)
def test_whatever_is_lost_or_swapped_frames_are_whole_and_in_order(
    sizes: list[int], start: int, lost: set[int], swaps: list[int]
) -> None:
    frames = [pieces(number, size, key=number % 5 == 0) for number, size in enumerate(sizes)]
    packets = [piece for frame in frames for piece in frame]
    arrival = list(range(len(packets)))
    for place in swaps:
        if 0 < place < len(arrival) - 1:
            arrival[place], arrival[place + 1] = arrival[place + 1], arrival[place]
    order, released = frame_order(), []
    for step, number in enumerate(arrival):
        if number not in lost:
            released += push(order, start + number, packets[number], step * 0.02)
    whole = {frame[0][0]: b"".join(piece[2] for piece in frame) for frame in frames}
    assert all(whole[frame.timestamp] == frame.data for frame in released)
    times = [frame.timestamp // 3000 for frame in released]
    assert times == sorted(set(times))
    # After a gap comes a key frame.
    assert all(after == before + 1 or after % 5 == 0 for before, after in itertools.pairwise(times))


def test_key_frames_are_known_by_more_than_one_bit() -> None:
    assert is_vp8_key_frame(KEY) and not is_vp8_key_frame(DELTA)
    assert not is_vp8_key_frame(bytes(20)) and not is_vp8_key_frame(b"")
    start = b"\x00\x00\x00\x01"
    assert is_h264_key_frame(start + b"\x67\x42\xe0\x1f" + start + b"\x68\xce" + start + b"\x65\x88")
    assert is_h264_key_frame(start + b"\x65\x88\x80")
    assert not is_h264_key_frame(start + b"\x65\x20\x80"), "a later slice of a picture whose first one is missing"
    assert not is_h264_key_frame(start + b"\x41\x9a") and not is_h264_key_frame(b"")


def test_sound_passes_over_a_gap_instead_of_waiting() -> None:
    counters: Counter[str] = Counter()
    order = PacketOrder(counters)
    released = []
    for sequence, now in ((65534, 0.0), (65535, 0.02), (1, 0.06), (2, 0.08)):
        order.push(sequence, RtpPiece(sequence * 960, True, bytes([sequence & 0xFF]), now))
        released += [frame.data[0] for frame in order.take(now)]
    assert released == [0xFE, 0xFF] and order.troubled
    assert [frame.data[0] for frame in order.take(0.06 + AUDIO_HOLE_S + 0.001)] == [1, 2]
    assert counters["audio_lost"] == 1 and not order.troubled


def test_a_key_frame_in_arrival_is_waited_for_longer_and_not_asked_for_again() -> None:
    """Nothing can be shown without it, and another one would take longer still."""
    order = FrameOrder(is_vp8_key_frame, 0.15, Counter())
    delta, key = b"\x01" + bytes(20), b"\x00\x00\x00\x9d\x01\x2a" + bytes(20)
    order.push(1, RtpPiece(0, True, delta, 0.0))
    assert order.take(0.0) == [] and order.key_frame_due(0.2)
    order.push(3, RtpPiece(3000, False, key, 0.2))  # 2 is lost: what went before the key frame is no matter now
    order.push(5, RtpPiece(3000, True, b"end", 0.2))
    assert order.take(0.2) == [] and order.due(0.3) == [4]
    assert order.take(0.5) == [] and not order.key_frame_due(0.5)
    order.push(4, RtpPiece(3000, False, b"middle", 0.55))
    (frame,) = order.take(0.55)
    assert frame.timestamp == 3000 and frame.data == key + b"middle" + b"end"
