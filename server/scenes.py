"""A scene list on a session: what is painted when, by the clock or by hand (docs/steering.md).

`ScenePlayer` decides and knows no clock; `Show` runs it beside a session.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable

from server.control import ControlError, Scene, SceneList, SceneMove, check_steps


class ScenePlayer:
    """Which scene stands, and when the next one is due. Pure: instants are passed in, in monotonic seconds."""

    def __init__(self) -> None:
        self.list: SceneList | None = None
        self.index = 0
        self.due_at: float | None = None
        """When the next scene begins by itself; None: only when told."""

    def load(self, scenes: SceneList, now: float) -> Scene:
        """Take the place of what was there, and begin the scene that the list names."""
        self.list = scenes
        return self._begin(scenes, scenes.begin, now)

    def clear(self) -> None:
        """Forget the list; what it has set last stays."""
        self.list, self.index, self.due_at = None, 0, None

    def move(self, where: SceneMove, now: float) -> Scene | None:
        """Go to a scene; returns it, or None where the scene stays: `play` begins its time anew, `stop` ends it.

        Raises: ControlError where there is no list or no such scene; nothing is changed then.
        """
        if self.list is None:
            raise ControlError("no_scenes", "there is no scene list: load one first")
        if where == "stop":
            self.due_at = None
            return None
        if where == "play":
            self._begin(self.list, self.index, now)
            return None
        index = where if isinstance(where, int) else self._neighbour(self.list, 1 if where == "next" else -1)
        count = len(self.list.scenes)
        if index is None or index >= count:
            wanted = f"scene {where}" if isinstance(where, int) else f"{where} scene"
            text = f"there is no {wanted} at scene {self.index}: this list has 0 to {count - 1}, and does not loop"
            raise ControlError("no_such_scene", text)
        return self._begin(self.list, index, now)

    def advance(self, now: float) -> Scene | None:
        """The scene that is due by now, if the one that stands is not. Keeps the list's own time, however late."""
        scene = None
        while self.list is not None and self.due_at is not None and self.due_at <= now:
            index = self._neighbour(self.list, 1)
            if index is None:
                self.due_at = None  # the last one stays
                break
            scene = self._begin(self.list, index, self.due_at)
        return scene

    def shown(self, now: float) -> dict[str, object] | None:
        """Where the list stands as the page and REST show it; None without one. left_s: to the next scene."""
        if self.list is None:
            return None
        return {
            "index": self.index,
            "name": self.list.scenes[self.index].name,
            "count": len(self.list.scenes),
            "loop": self.list.loop,
            "left_s": None if self.due_at is None else round(max(0.0, self.due_at - now), 1),
        }

    def _neighbour(self, scenes: SceneList, step: int) -> int | None:
        index = self.index + step
        if scenes.loop:
            return index % len(scenes.scenes)
        return index if 0 <= index < len(scenes.scenes) else None

    def _begin(self, scenes: SceneList, index: int, at: float) -> Scene:
        scene = scenes.scenes[index]
        self.index = index
        self.due_at = None if scene.hold_s is None else at + scene.hold_s
        return scene


class Show:
    """The scenes of one session. `follow` makes a scene's change and returns the revision that shows it, if any."""

    def __init__(self, clock: Callable[[], float], follow: Callable[[Scene], int | None], steps_max: int) -> None:
        self._clock = clock
        self._follow = follow
        self._steps_max = steps_max
        self._player = ScenePlayer()
        self._moved = asyncio.Event()

    @property
    def list(self) -> SceneList | None:
        """The scenes that are loaded."""
        return self._player.list

    @property
    def index(self) -> int:
        """The scene that stands, from 0."""
        return self._player.index

    def load(self, scenes: SceneList, request_id: int | None = None) -> int | None:
        """Begin a list; returns the revision that shows it. Raises ControlError for too many steps."""
        for scene in scenes.scenes:
            check_steps(scene, self._steps_max, request_id)
        plain = SceneList(scenes=scenes.scenes, loop=scenes.loop, begin=scenes.begin)
        return self._moved_to(self._player.load(plain, self._clock()))

    def move(self, where: SceneMove, request_id: int | None = None) -> int | None:
        """Move within the list; returns the revision that shows it, 0 where the scene stays. Raises ControlError."""
        try:
            return self._moved_to(self._player.move(where, self._clock()))
        except ControlError as error:
            raise ControlError(error.code, str(error), request_id) from error

    def clear(self) -> None:
        """Forget the list."""
        self._player.clear()
        self._moved.set()

    def shown(self) -> dict[str, object] | None:
        """See ScenePlayer.shown."""
        return self._player.shown(self._clock())

    async def run(self) -> None:
        """Begin every scene when it is due; until cancelled."""
        while True:
            self._moved.clear()
            due_at = self._player.due_at
            wait_s = None if due_at is None else due_at - self._clock()
            if wait_s is not None and wait_s <= 0:
                if (scene := self._player.advance(self._clock())) is not None:
                    self._follow(scene)
                continue
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait_s):
                    await self._moved.wait()

    def _moved_to(self, scene: Scene | None) -> int | None:
        self._moved.set()
        return 0 if scene is None else self._follow(scene)
