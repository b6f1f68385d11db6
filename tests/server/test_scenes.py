"""Scene lists: what stands when, as pure decisions and beside a clock."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.control import ControlError, Scene, SceneList
from server.scenes import ScenePlayer, Show


def scenes(*holds: float | None, loop: bool = False) -> SceneList:
    return SceneList(scenes=[Scene(prompt=f"style {n}", hold_s=hold) for n, hold in enumerate(holds)], loop=loop)


def test_scenes_follow_by_their_own_time_and_the_last_one_stays() -> None:
    player = ScenePlayer()
    assert player.load(scenes(10, 5, 2), now=100.0).prompt == "style 0"
    assert player.advance(109.9) is None and player.due_at == 110.0
    scene = player.advance(110.2)
    assert scene is not None and scene.prompt == "style 1"
    # Late by 0.2 s once is not late for ever.
    assert player.due_at == 115.0
    assert (player.advance(116.0), player.index) == (player.list.scenes[2], 2)  # type: ignore[union-attr]
    assert player.advance(500.0) is None and player.due_at is None and player.index == 2


def test_a_clock_that_stood_still_skips_to_where_the_list_would_be() -> None:
    player = ScenePlayer()
    player.load(scenes(10, 10, 10, loop=True), now=0.0)
    player.advance(45.0)
    assert (player.index, player.due_at) == (1, 50.0)


def test_moves_by_hand() -> None:
    player = ScenePlayer()
    player.load(scenes(None, 4, None), now=0.0)
    assert player.due_at is None
    with pytest.raises(ControlError, match="previous scene at scene 0"):
        player.move("previous", 0.0)
    assert player.move("next", 1.0) is player.list.scenes[1]  # type: ignore[union-attr]
    assert player.move("stop", 2.0) is None and player.due_at is None
    assert player.move("play", 3.0) is None and player.due_at == 7.0
    player.move(2, 4.0)
    assert player.due_at is None
    with pytest.raises(ControlError, match="0 to 2"):
        player.move(3, 5.0)
    assert player.index == 2
    player.clear()
    with pytest.raises(ControlError, match="no scene list"):
        player.move("next", 6.0)


def test_a_loop_goes_round_both_ways() -> None:
    player = ScenePlayer()
    player.load(scenes(None, None, loop=True), now=0.0)
    player.move("previous", 0.0)
    assert player.index == 1
    player.move("next", 0.0)
    assert player.index == 0


@given(st.lists(st.floats(0.5, 50), min_size=1, max_size=8), st.booleans(), st.lists(st.floats(0, 30), max_size=20))
def test_looking_often_or_seldom_comes_to_the_same(holds: list[float], loop: bool, waits: list[float]) -> None:
    often, seldom, now = ScenePlayer(), ScenePlayer(), 0.0
    for player in (often, seldom):
        player.load(scenes(*holds, loop=loop), now)
    for wait in waits:
        now += wait
        often.advance(now)
    seldom.advance(now)
    assert (often.index, often.due_at) == (seldom.index, seldom.due_at)


async def test_a_show_begins_each_scene_once_and_wakes_for_a_new_list() -> None:
    begun: list[str | None] = []
    changed = asyncio.Event()

    def follow(scene: Scene) -> int:
        begun.append(scene.prompt)
        changed.set()
        return len(begun)

    now = 0.0
    show = Show(lambda: now, follow, steps_max=2)
    running = asyncio.create_task(show.run())
    try:
        await asyncio.sleep(0)
        assert show.load(scenes(5, None)) == 1
        now = 5.0
        assert show.move("play") == 0  # wakes it; the scene's time begins anew
        await asyncio.sleep(0)
        assert begun == ["style 0"]
        changed.clear()
        now = 10.0
        show.load(scenes(None))
        assert begun == ["style 0", "style 0"]
        with pytest.raises(ControlError, match="steps: 3"):
            show.load(SceneList(scenes=[Scene(prompt="a", steps=3)]))
        assert show.shown() == {"index": 0, "name": "", "count": 1, "loop": False, "left_s": None}
    finally:
        running.cancel()
