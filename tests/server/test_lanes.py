"""Who gets which encoder's pictures, and what one viewer's network costs the others. Its policy is scripted."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from aiortc.codecs import CODECS
from aiortc.mediastreams import MediaStreamError

from server.encoding import BitratePolicy
from server.frames import OutgoingFrame
from server.lanes import Lanes
from server.live_encoder import KEY_FRAME_INTERVAL_S
from server.settings import MediaSettings
from server.viewers import MAX_PICTURES, Encoded, Pictures, Sound, Subscription

VP8 = next(codec for codec in CODECS["video"] if codec.name == "VP8")
PATIENCE_S = 30.0


class Network(BitratePolicy):
    """What a viewer's network is said to take."""

    def __init__(self) -> None:
        super().__init__(1_500_000, 150_000, 4_000_000)
        self.takes: int | None = None
        self.room = True
        self.sent_bits = 0

    def says(self, takes: int) -> None:
        self.takes = takes

    @property
    def has_heard(self) -> bool:
        return self.takes is not None

    @property
    def target(self) -> int:
        return self._current if self.takes is None else self.takes

    def is_limited(self, now: float) -> bool:
        return self.takes is not None and self.takes < 1_000_000

    def has_room(self, now: float) -> bool:
        return self.room

    def bitrate(self, now: float) -> int:
        return self.target

    def sent(self, bits: int, now: float) -> None:
        self.sent_bits += bits


class Viewer(Pictures):
    """One with a scripted network."""

    def __init__(self, counters: Counter[str], on_stop: Callable[[Subscription], None]) -> None:
        super().__init__(MediaSettings(), counters, on_stop)
        self.policy = self.network = Network()


class Stream:
    """Lanes and their viewers."""

    def __init__(self, pool: ThreadPoolExecutor) -> None:
        self.counters: Counter[str] = Counter()
        self.lanes = Lanes(VP8, MediaSettings(), pool, self.counters, 0.0)
        self.index = 0
        self._noise = np.random.default_rng(0)

    def viewer(self, takes: int | None = None) -> Viewer:
        made = Viewer(self.counters, self.lanes.discard)
        made.network.takes = takes
        self.lanes.add(made)
        return made

    def push(self) -> None:
        picture = self._noise.integers(0, 255, (64, 64, 3), np.uint8)
        now = asyncio.get_running_loop().time()
        self.lanes.push(OutgoingFrame(self.index, now, picture, 1), now)
        self.index += 1

    async def next(self, *viewers: Pictures) -> list[Encoded]:
        """One picture more, as each of them gets it."""
        self.push()
        async with asyncio.timeout(PATIENCE_S):
            return [await viewer.next() for viewer in viewers]


@pytest.fixture
async def stream() -> AsyncIterator[Stream]:
    with ThreadPoolExecutor(1) as pool:
        made = Stream(pool)
        yield made
        made.lanes.stop()


async def test_key_frames_are_made_on_demand_once_for_all_who_ask(stream: Stream) -> None:
    viewers = [stream.viewer() for _ in range(3)]
    for _ in range(12):
        for viewer in viewers:
            viewer.ask_key_frame()
        frames = await stream.next(*viewers)
        assert frames[0] is frames[1] is frames[2]
    assert stream.counters["frames_encoded"] == 12
    assert 1 <= stream.counters["key_frames_asked"] < 12


async def test_narrow_viewers_share_an_encoder_and_the_others_keep_theirs(stream: Stream) -> None:
    poor, good, other = (stream.viewer(4_000_000) for _ in range(3))
    await stream.next(poor, good, other)
    poor.network.says(400_000)
    one, two, three = await stream.next(poor, good, other)
    assert two is three is not one and one.key_frame and not two.key_frame
    assert one.ticks == two.ticks
    assert stream.counters["frames_encoded"] == 3 and stream.counters["viewers_to_narrow"] == 1
    other.network.says(350_000)
    await asyncio.sleep(KEY_FRAME_INTERVAL_S)
    one, two, three = await stream.next(poor, good, other)
    assert one is three is not two and stream.counters["frames_encoded"] == 5
    sent = [viewer.network.sent_bits for viewer in (poor, good, other)]
    assert min(sent) > 0 and sent[1] != sent[0]


async def test_who_takes_less_without_complaint_stays(stream: Stream) -> None:
    slow, good = stream.viewer(1_500_000), stream.viewer(4_000_000)
    one, two = await stream.next(slow, good)
    assert one is two


async def test_a_viewer_comes_back_when_its_network_is_good_and_the_second_encoder_ends(stream: Stream) -> None:
    poor, good = stream.viewer(200_000), stream.viewer(1_500_000)
    await stream.next(poor, good)
    poor.network.says(1_000_000)  # not yet: it would go to and fro
    one, two = await stream.next(poor, good)
    assert one is not two
    await asyncio.sleep(KEY_FRAME_INTERVAL_S)
    poor.network.says(1_200_000)
    encoded = stream.counters["frames_encoded"]
    one, two = await stream.next(poor, good)
    assert one is two and one.key_frame
    assert stream.counters["viewers_to_good"] == 1 and stream.counters["frames_encoded"] == encoded + 1


async def test_a_lone_narrow_viewer_needs_no_second_encoder(stream: Stream) -> None:
    poor, good = stream.viewer(200_000), stream.viewer(4_000_000)
    await stream.next(poor, good)
    good.stop()
    await asyncio.sleep(KEY_FRAME_INTERVAL_S)
    await stream.next(poor)
    before = stream.counters["frames_encoded"]
    await stream.next(poor)
    assert stream.counters["frames_encoded"] == before + 1


async def test_the_bitrate_is_what_the_slowest_takes_and_who_says_nothing_is_not_asked(stream: Stream) -> None:
    silent, slow, quick = (stream.viewer(takes) for takes in (None, 2_000_000, 3_000_000))
    lane = stream.lanes._good
    assert [lane._next_bitrate(now) for now in (10.0, 20.0)] == [2_000_000] * 2
    quick.network.says(1_900_000)
    assert lane._next_bitrate(30.0) == 2_000_000  # each change is a key frame
    quick.network.says(3_000_000)
    slow.stop()
    assert [lane._next_bitrate(now) for now in (40.0, 50.0)] == [3_000_000] * 2
    # Who comes now begins there, and does not pull it down with the bitrate that every network begins with.
    assert stream.viewer().policy.target == 3_000_000 and not silent.policy.has_heard


async def test_pictures_are_left_out_before_they_are_encoded_where_most_have_no_room(stream: Stream) -> None:
    viewers = [stream.viewer() for _ in range(3)]
    await stream.next(*viewers)
    for viewer in viewers[:2]:
        viewer.network.room = False
    stream.push()
    async with asyncio.timeout(PATIENCE_S):
        while not stream.counters["network_behind"]:
            await asyncio.sleep(0.01)
    for viewer in viewers[:2]:
        viewer.network.room = True
    frames = await stream.next(*viewers)
    # Nobody missed anything that was encoded, so nobody needs a key frame.
    assert frames[0] is frames[1] is frames[2] and not frames[0].key_frame
    assert stream.counters["frames_encoded"] == 2


async def test_one_of_three_without_room_misses_pictures_alone(stream: Stream) -> None:
    poor, *rest = (stream.viewer() for _ in range(3))
    await stream.next(poor, *rest)
    poor.network.room = False
    for _ in range(3):
        one, two = await stream.next(*rest)
        # Nor does it ask for a key frame, for which all would pay, while it could not take it.
        assert one is two and not one.key_frame
    assert stream.counters["viewer_network_behind"] == 3 and stream.counters["network_behind"] == 0
    poor.network.room = True
    await stream.next(*rest)
    await asyncio.sleep(KEY_FRAME_INTERVAL_S)
    one, two, three = await stream.next(poor, *rest)
    assert one is two is three and one.key_frame


async def test_a_viewer_who_is_behind_goes_on_from_a_key_frame() -> None:
    counters: Counter[str] = Counter()
    stopped: list[Subscription] = []
    asked: list[int] = []
    viewer = Pictures(MediaSettings(), counters, stopped.append)
    viewer.ask_key_frame = lambda: asked.append(1)

    def push(ticks: int, *, key_frame: bool = False) -> None:
        viewer.push(Encoded([b""], ticks, key_frame=key_frame), 0.0)

    push(0)  # nothing to build upon
    push(1, key_frame=True)
    assert len(asked) == 1
    for ticks in range(2, MAX_PICTURES + 1):
        push(ticks)
    assert len(asked) == 1
    push(98)
    push(99)
    assert len(asked) == 3
    push(100, key_frame=True)
    assert (await viewer.next()).ticks == 100
    assert counters == {"viewer_frames_skipped": 2, "viewer_frames_dropped": MAX_PICTURES + 1}
    viewer.stop()
    with pytest.raises(MediaStreamError):
        await viewer.next()
    assert stopped == [viewer]


async def test_sound_that_nobody_fetches_loses_its_oldest() -> None:
    counters: Counter[str] = Counter()
    sound = Sound(counters, lambda _: None)
    for ticks in range(27):
        sound.push(Encoded([b""], ticks))
    assert (await sound.next()).ticks == 2 and counters == {"viewer_sound_dropped": 2}
