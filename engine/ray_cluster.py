"""Groups on the nodes of a Ray cluster, behind the same `Cluster` and `LocalEngine` as on one machine.

Ray decides where a group goes and says when there is room; it carries no frames. Each start of a group asks for a
placement group of what it needs (which is also what Ray's autoscaler looks at), puts one `GroupActor` into it, and
connects to the `engine.remote_rank.RankHost` there. A rank, an actor or a node that dies closes that connection: from
then on it is a lost rank like any other, and the next start is placed wherever there is room by then.

One detached actor, the `Controller`, knows the groups of all servers, for `livebrush cluster status`, and the nodes
that nothing more shall be placed on. Ray starts it again wherever it can; what it forgot the servers tell it.

Ray is imported by the calls that need it: `pip install 'livebrush[cluster]'`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import signal
import socket
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from engine.client import LocalEngine
from engine.cluster import Cluster
from engine.config import EngineSettings
from engine.frame_memory import FrameMemory
from engine.remote_rank import RankHost, RemoteRank

log = logging.getLogger(__name__)

NAMESPACE = "livebrush"
CONTROLLER = "controller"
# The least that Ray takes. Frames do not go through its store.
STORE_BYTES = 80_000_000
CALL_TIMEOUT_S = 15.0
ACTOR_TIMEOUT_S = 60.0
REPORT_PERIOD_S = 2.0
# A server that has reported nothing for so long is gone.
FORGET_S = 10.0


def import_ray() -> Any:
    """The module. Raises OSError where it is not installed. Usage statistics are off unless asked for."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
        import ray.util.scheduling_strategies
    except ImportError as error:
        raise OSError("Ray is not installed: pip install 'livebrush[cluster]'") from error
    return ray


def join(address: str) -> Any:
    """Connect this process to a cluster, by `ray` (the one this machine is in, or a new one) or ray://HOST:PORT.

    Returns the module. Raises OSError where there is none.
    """
    ray = import_ray()
    common = {"namespace": NAMESPACE, "log_to_driver": False, "configure_logging": False}
    try:
        if address.startswith("ray://"):
            ray.init(address, **common)
            return ray
        with contextlib.suppress(ConnectionError):
            ray.init("auto", **common)
            return ray
        log.info("no Ray cluster runs here: starting one of this machine")
        ray.init(include_dashboard=False, object_store_memory=STORE_BYTES, **common)
    except (RuntimeError, ValueError) as error:
        raise ConnectionError(f"no Ray cluster at {address}: {error}") from error
    return ray


@dataclass(slots=True)
class Report:
    """What a server said last. groups: one mapping each, with server, group, node, state and streams."""

    at: float
    groups: list[dict[str, Any]] = field(default_factory=list)


class Controller:
    """The groups of all servers and the drained nodes (an actor). Restarted, it learns both from the reports."""

    def __init__(self) -> None:
        self._life = secrets.token_hex(8)
        self._drained: set[str] = set()
        self._reports: dict[str, Report] = {}

    def report(
        self, server: str, groups: list[dict[str, Any]], known_life: str, known_drained: list[str]
    ) -> tuple[str, list[str]]:
        """Take a server's groups; returns this life's name and the drained nodes. A former life's are taken over."""
        self._reports[server] = Report(time.monotonic(), groups)
        if known_life not in ("", self._life):
            self._drained |= set(known_drained)
        return self._life, sorted(self._drained)

    def drain(self, node: str, on: bool) -> None:
        """Place nothing more on a node and have what is there leave; or use it again."""
        if on:
            self._drained.add(node)
        else:
            self._drained.discard(node)

    def drained(self) -> list[str]:
        """Ids of the drained nodes."""
        return sorted(self._drained)

    def groups(self) -> list[dict[str, Any]]:
        """Those of the servers that still report."""
        now = time.monotonic()
        self._reports = {name: one for name, one in self._reports.items() if now - one.at < FORGET_S}
        return [group | {"server": name} for name, report in self._reports.items() for group in report.groups]


class GroupActor:
    """Holds a group on its node (an actor): the rank processes are its children, and end when the server goes."""

    async def open(self, settings: str) -> tuple[str, str, int, str]:
        """Be ready to start a group; returns node id, address, port and secret. Raises ValueError, OSError."""
        ray = import_ray()
        chosen = EngineSettings.model_validate_json(settings)
        _ = chosen.model_dir  # raises FileNotFoundError where the node lacks the model
        self._host = RankHost(chosen)
        address = ray.util.get_node_ip_address()
        return ray.get_runtime_context().get_node_id(), address, *await self._host.open(address)


def controller(ray: Any) -> Any:
    """The handle of the one controller, which is started where there is none."""
    options = {"name": CONTROLLER, "namespace": NAMESPACE, "lifetime": "detached", "get_if_exists": True}
    return ray.remote(Controller).options(num_cpus=0, max_restarts=-1, max_task_retries=-1, **options).remote()


class RayCluster(Cluster):
    """Groups placed by Ray (`engine.api.Engine`)."""

    def __init__(self, address: str, groups: Sequence[EngineSettings]) -> None:
        """address: for `join`. Nothing is started yet."""
        self._address = address
        self._name = f"{socket.gethostname()}:{os.getpid()}"
        self._joining: asyncio.Task[Any] | None = None
        self._reporting: asyncio.Task[None] | None = None
        self._releases: set[asyncio.Task[None]] = set()
        self._ranks: dict[int, tuple[str, RemoteRank]] = {}
        self._life = ""
        self._drained: list[str] = []
        super().__init__([LocalEngine(one, partial(self._launch, number)) for number, one in enumerate(groups)])

    async def start(self) -> None:
        """See `Engine.start`."""
        self._joining = asyncio.create_task(asyncio.to_thread(join, self._address), name="engine/ray")
        self._reporting = asyncio.create_task(self._report(), name="engine/ray-reports")
        await super().start()

    async def close(self) -> None:
        """See `Engine.close`. Everything placed for this server is gone with its connection to Ray."""
        await super().close()
        if self._joining is None or self._reporting is None:
            return
        self._reporting.cancel()
        await asyncio.gather(self._reporting, *self._releases, return_exceptions=True)
        with contextlib.suppress(OSError):
            ray = await self._joining
            await asyncio.to_thread(ray.shutdown)
        self._joining = None

    # --- one group

    async def _launch(self, number: int, settings: EngineSettings, memory: FrameMemory) -> RemoteRank:
        """Place a group and connect to it (`engine.launch.Launcher`). Raises OSError."""
        assert self._joining is not None
        ray = await asyncio.shield(self._joining)
        on_gpu = settings.device != "cpu"
        # Ray shows an actor the GPUs that are its own, counted from 0.
        settings = settings.model_copy(update={"device": "cuda:0" if on_gpu else "cpu"})
        count = settings.rank_count if on_gpu else settings.rank_count * settings.threads
        need = {"GPU" if on_gpu else "CPU": count}
        place = await asyncio.to_thread(self._ask, ray, need, f"{self._name}/group-{number}")
        actor = None
        try:
            await self._room(place, number, need, settings.start_timeout_s)
            strategy = ray.util.scheduling_strategies.PlacementGroupSchedulingStrategy(place, 0)
            options = {"num_gpus" if on_gpu else "num_cpus": count, "scheduling_strategy": strategy}
            actor = ray.remote(GroupActor).options(**options).remote()
            answer = await asyncio.to_thread(
                ray.get, actor.open.remote(settings.model_dump_json()), timeout=ACTOR_TIMEOUT_S
            )
            node, address, port, secret = answer
            release = partial(self._release, ray, place, actor)
            rank = await RemoteRank.connect(address, port, secret, memory, on_stop=release)
        except BaseException as error:
            self._release(ray, place, actor)
            if isinstance(error, ray.exceptions.RayError):
                raise OSError(f"group {number}: {error}") from error
            raise
        log.info("group %d is on node %s (%s)", number, node[:12], address)
        self._ranks[number] = (node, rank)
        return rank

    def _ask(self, ray: Any, need: dict[str, int], name: str) -> Any:
        """A placement group. On another node than those that are drained."""
        avoid = [{"ray.io/node-id": f"!in({','.join(self._drained)})"}] if self._drained else None
        return ray.util.placement_group([need], strategy="STRICT_PACK", name=name, bundle_label_selector=avoid)

    async def _room(self, place: Any, number: int, need: dict[str, int], timeout_s: float) -> None:
        """Wait until a node has room. Raises TimeoutError."""
        wanted = " and ".join(f"{count} {kind}" for kind, count in need.items())
        for second in range(int(timeout_s)):
            if await asyncio.to_thread(place.wait, 1):
                return
            if second == 0:
                log.warning("group %d waits for a node with %s free", number, wanted)
        raise TimeoutError(
            f"no node of the Ray cluster had {wanted} free in {timeout_s:.0f} s: add one (livebrush cluster up"
            " --join), or use fewer --ranks or --replicas"
        )

    def _release(self, ray: Any, place: Any, actor: Any) -> None:
        """Give back what a group had, beside everything else: nobody waits for a dead node."""

        def release() -> None:
            with contextlib.suppress(Exception):
                if actor is not None:
                    ray.kill(actor)
            with contextlib.suppress(Exception):
                ray.util.remove_placement_group(place)

        task = asyncio.create_task(asyncio.to_thread(release), name="engine/ray-release")
        self._releases.add(task)
        task.add_done_callback(self._releases.discard)

    # --- the controller

    async def _report(self) -> None:
        """Tell the controller of the groups, and leave the nodes it names. Without it nothing else stops."""
        assert self._joining is not None
        try:
            ray = await asyncio.shield(self._joining)
        except OSError as error:
            log.error("%s", error)
            return
        failing = False
        while True:
            try:
                await self._report_once(ray)
                failing = False
            except (ray.exceptions.RayError, ConnectionError, ValueError) as error:
                if not failing:
                    log.warning("the controller of the Ray cluster does not answer: %s", error)
                failing = True
            await asyncio.sleep(REPORT_PERIOD_S)

    async def _report_once(self, ray: Any) -> None:
        groups = [
            {
                "group": number,
                "node": self._ranks[number][0] if number in self._ranks else "",
                "state": str(group.status.state),
                "streams": group.capacity.open_streams,
            }
            for number, group in enumerate(self.groups)
        ]

        def report() -> Any:
            call = controller(ray).report.remote(self._name, groups, self._life, self._drained)
            return ray.get(call, timeout=CALL_TIMEOUT_S)

        self._life, self._drained = await asyncio.to_thread(report)
        for node, rank in list(self._ranks.values()):
            if node in self._drained:
                rank.leave("its node is drained")


def _take_signals_back() -> None:
    """Have Ctrl-C and SIGTERM do what they did before: Ray's core puts a handler of its own over them as it starts."""
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.getsignal(number))
