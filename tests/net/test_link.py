"""The bad network itself: what it does is what it says, and the same for a seed."""

from __future__ import annotations

import pytest

from tests.net.client import Journal, demo_pictures, read_stamp, stamp
from tests.net.link import Impairment, Way

COUNT = 20_000
PACKET = bytes(1000)


def carried(how: Impairment, *, seed: int = 1, period_s: float = 0.001) -> tuple[Way, list[list[tuple[float, bytes]]]]:
    way = Way(seed)
    way.impairment = how
    return way, [way.carry(PACKET, number * period_s) for number in range(COUNT)]


@pytest.mark.parametrize("how", [Impairment(loss=0.05), Impairment(loss=0.05, burst=5)])
def test_loss_is_the_share_asked_for_and_bursts_are_as_long(how: Impairment) -> None:
    way, found = carried(how)
    lost = [not arrivals for arrivals in found]
    assert way.counters["lost"] == sum(lost) and 0.04 < sum(lost) / COUNT < 0.06
    runs = sum(now and not before for before, now in zip([False, *lost], lost, strict=False))
    assert abs(sum(lost) / runs - how.burst) < 0.15 * how.burst
    assert carried(how)[1] == found != carried(how, seed=2)[1]


def test_a_narrow_way_carries_its_rate_and_drops_what_finds_the_queue_full() -> None:
    way, found = carried(Impairment(rate_bps=1e6, queue_s=0.4))  # 8 Mbit/s are sent for 20 s
    arrivals = [at for each in found for at, _ in each]
    assert len(arrivals) == way.counters["carried"] == COUNT - way.counters["queue_full"]
    assert abs(len(arrivals) * 8000 / arrivals[-1] - 1e6) < 1e4
    assert max(each[0][0] - number * 0.001 for number, each in enumerate(found) if each) < 0.42


def test_delay_jitter_reordering_corruption_duplication_and_a_black_hole() -> None:
    how = Impairment(delay_s=0.04, jitter_s=0.02, reorder=0.1, corruption=0.1, duplication=0.1)
    way, found = carried(how)
    delays = [each[0][0] - number * 0.001 for number, each in enumerate(found)]
    assert min(delays) >= 0.02 and max(delays) <= 0.0751
    assert way.counters["corrupted"] == sum(each[0][1] != PACKET for each in found) > COUNT / 20
    assert way.counters["duplicated"] == sum(len(each) == 2 for each in found) > COUNT / 20
    assert [each[0][0] for each in found] != sorted(each[0][0] for each in found)
    way.impairment = Impairment(down=True)
    assert way.carry(PACKET, 100.0) == []


def test_a_number_is_read_from_its_picture_and_from_nothing_else() -> None:
    picture = demo_pictures()[0]
    for number in (0, 1, 77, 4095, 4096 + 5):
        assert read_stamp(stamp(picture, number)[:, :, 1]) == number % 4096
    assert read_stamp(stamp(picture, 0)[:, :, 1] * 0 + 255) is None


def test_the_journal_tells_shares_gaps_and_ages_of_the_frames_sent_in_a_time() -> None:
    journal = Journal()
    for number in range(100):
        journal.on_sent(number / 10)
        if number % 2 and not 50 <= number < 60:
            journal.on_seen(number % 4096, number / 10 + 0.3)
    seen = journal.between(2.0, 4.0, 0.2)
    assert (seen.sent, seen.shown, seen.late) == (20, 0.5, 1.0) and seen.age_p95_s == pytest.approx(0.3)
    assert journal.between(4.0, 7.0, 0.5).gap_s == pytest.approx(1.2)
    # Seen every 0.2 s but for the gap, which ends at 6.4: five in a second are a third of 15.
    assert journal.back_s(5.3, 0.3) == pytest.approx(1.1) and journal.back_s(5.3, 0.8) is None
