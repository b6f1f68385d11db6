"""Groups on the nodes of a Ray cluster, behind the same `Cluster` and `LocalEngine` as on one machine.

Ray decides where a group goes and says when there is room; it carries no frames. Each start of a group asks for a
placement group of what its ranks need (which is also what Ray's autoscaler looks at), puts a `RankActor` into it for
each, and connects to the `engine.remote_rank.RankHost` of rank 0. The ranks of a ring lie on one node where that has
room for them, else on several. A rank, an actor or a node that dies ends the whole group and closes that connection:
from then on it is a lost rank like any other, and the next start is placed wherever there is room by then.

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
import socket
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

from engine.client import LocalEngine
from engine.cluster import Cluster
from engine.config import EngineSettings
from engine.frame_memory import FrameMemory
from engine.remote_rank import RankHost, RemoteRank, interface_of, start_follower
from engine.ring_start import Place, end_with_parent

log = logging.getLogger(__name__)

T = TypeVar("T")

NAMESPACE = "livebrush"
CONTROLLER = "controller"
# The least that Ray takes. Frames do not go through its store.
STORE_BYTES = 80_000_000
CONNECT_TIMEOUT_S = 5.0
JOIN_TIMEOUT_S = 60.0
CALL_TIMEOUT_S = 15.0
ACTOR_TIMEOUT_S = 60.0
REPORT_PERIOD_S = 2.0
# A server that has reported nothing for so long is gone.
FORGET_S = 10.0


def import_ray() -> Any:
    """The module. Raises OSError where it is not installed. Usage statistics are off unless asked for."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Its core would put a handler of its own over that of SIGTERM, which prints stack traces and ends the process.
    os.environ.setdefault("RAY_DISABLE_FAILURE_SIGNAL_HANDLER", "1")
    # A node's actors, ranks with them, would be niced by 15: a thirtieth of a core beside anything else that wants it.
    os.environ.setdefault("RAY_worker_niceness", "0")
    try:
        import ray
        import ray._private.services
        import ray.util.scheduling_strategies
        from ray._private.authentication.authentication_token_setup import maybe_enable_token_auth_if_token_available
    except ImportError as error:
        raise OSError("Ray is not installed: pip install 'livebrush[cluster]'") from error
    # Where the user has a token the first node asks for it; those that join would not show theirs unless told to.
    maybe_enable_token_auth_if_token_available(warn_if_disabled=False)
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
        if _answers(ray):
            ray.init("auto", **common)
            return ray
        log.info("no Ray cluster runs here: starting one of this machine")
        ray.init("local", include_dashboard=False, object_store_memory=STORE_BYTES, **common)
    except (RuntimeError, ValueError, ray.exceptions.RayError) as error:
        raise ConnectionError(f"no Ray cluster at {address}: {error}") from error
    return ray


def _answers(ray: Any) -> bool:
    """Whether the cluster that this machine is in is there; Ray itself would try for a quarter of an hour.

    Raises: ConnectionError where RAY_ADDRESS names it and it is not.
    """
    try:
        address: str = ray._private.services.canonicalize_bootstrap_address("auto")
    except ConnectionError:
        return False
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_TIMEOUT_S).close()
    except OSError as error:
        if os.environ.get("RAY_ADDRESS"):
            raise ConnectionError(f"RAY_ADDRESS: {error}") from error
        log.warning("the Ray cluster that this machine was in does not answer at %s: %s", address, error)
        return False
    return True


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


@dataclass(frozen=True)
class Home:
    """Where an actor is. node: its id. precision: the dtype that `auto` stands for there."""

    node: str
    address: str
    precision: str


class RankActor:
    """Holds a rank on its node (an actor): the rank's process is its child, and ends when the server goes."""

    async def look(self, settings: str) -> Home:
        """Where this is. Raises FileNotFoundError where the node lacks the model, ValueError."""
        # Ray itself looks once a second whether the node's raylet, which has started this process, is still there.
        end_with_parent()
        ray = import_ray()
        self._settings = EngineSettings.model_validate_json(settings)
        _ = self._settings.model_dir
        self._address = ray.util.get_node_ip_address()
        return Home(ray.get_runtime_context().get_node_id(), self._address, self._settings.precision)

    async def lead(self, precision: str, sharing: int) -> tuple[int, str]:
        """Be ready to start rank 0; returns port and secret of its host. sharing: see `Place`. Raises OSError."""
        settings = self._settings.model_copy(update={"dtype": precision})
        place = self._place(self._address, sharing) if settings.rank_count > 1 else None
        self._host = RankHost(settings, place)
        return await self._host.open(self._address)

    async def follow(self, rank: int, precision: str, sharing: int, host: str, port: int, secret: str) -> None:
        """Start another rank than the first, whose host is at host:port. Raises OSError."""
        settings = self._settings.model_copy(update={"dtype": precision})
        self._process = await start_follower(settings, rank, self._place(host, sharing), port, secret)

    def _place(self, host: str, sharing: int) -> Place:
        return Place(host, interface_of(self._address), sharing, apart=True)


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
        self._calls: set[asyncio.Future[Any]] = set()
        # Of each group: the nodes it is on, and rank 0.
        self._ranks: dict[int, tuple[frozenset[str], RemoteRank]] = {}
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
        if not self._joining.done():
            self._joining.cancel()
        await asyncio.gather(self._reporting, *self._releases, return_exceptions=True)
        with contextlib.suppress(OSError, asyncio.CancelledError):
            ray = await self._joining
            # Ray ends the whole process, with status 1, when a thread asks it for something after its shutdown.
            if self._calls and (await asyncio.wait(self._calls, timeout=CALL_TIMEOUT_S))[1]:
                log.warning("Ray did not answer %d calls: its connection ends with this process", len(self._calls))
            else:
                await asyncio.to_thread(ray.shutdown)
        self._joining = None

    async def _call(self, function: Callable[..., T], *arguments: Any) -> T:
        """Of Ray, in a thread. `close` waits for it also where nobody else does any more."""
        call = asyncio.get_running_loop().run_in_executor(None, partial(function, *arguments))
        self._calls.add(call)
        call.add_done_callback(self._done)
        return await asyncio.shield(call)

    def _done(self, call: asyncio.Future[Any]) -> None:
        self._calls.discard(call)
        if not call.cancelled():
            call.exception()  # looked at, or asyncio would tell of it where nobody waits

    # --- one group

    async def _launch(self, number: int, settings: EngineSettings, memory: FrameMemory) -> RemoteRank:
        """Place a group and connect to it (`engine.launch.Launcher`). Raises OSError."""
        assert self._joining is not None
        try:
            async with asyncio.timeout(JOIN_TIMEOUT_S):
                ray = await asyncio.shield(self._joining)
        except TimeoutError:
            raise TimeoutError(
                f"no answer from the Ray cluster at {self._address} in {JOIN_TIMEOUT_S:.0f} s: does its head listen on"
                " the address that it is known by? (livebrush cluster up --host)"
            ) from None
        on_gpu = settings.device != "cpu"
        # Ray shows an actor the GPUs that are its own, counted from 0.
        settings = settings.model_copy(update={"device": "cuda:0" if on_gpu else "cpu"})
        kind, count = ("GPU", 1) if on_gpu else ("CPU", settings.threads)
        place = await self._call(self._ask, ray, [{kind: count}] * settings.rank_count, number)
        actors: list[Any] = []
        try:
            await self._room(place, number, settings.rank_count, f"{count} {kind}", settings.start_timeout_s)
            for bundle in range(settings.rank_count):
                strategy = ray.util.scheduling_strategies.PlacementGroupSchedulingStrategy(place, bundle)
                options = {"num_gpus" if on_gpu else "num_cpus": count, "scheduling_strategy": strategy}
                actors.append(ray.remote(RankActor).options(**options).remote())
            homes, (port, secret) = await self._call(_begin, ray, actors, settings)
            release = partial(self._release, ray, place, actors)
            rank = await RemoteRank.connect(homes[0].address, port, secret, memory, on_stop=release)
        except BaseException as error:
            self._release(ray, place, actors)
            if isinstance(error, ray.exceptions.RayError):
                raise OSError(f"group {number}: {getattr(error, 'cause', None) or error}") from error
            raise
        places = (f"rank {rank} on {home.node[:12]} ({home.address})" for rank, home in enumerate(homes))
        log.info("group %d: %s", number, ", ".join(places))
        self._ranks[number] = (frozenset(home.node for home in homes), rank)
        return rank

    def _ask(self, ray: Any, needs: list[dict[str, int]], number: int) -> Any:
        """A placement group, on as few nodes as there is room, and none of those that are drained."""
        avoid = [{"ray.io/node-id": f"!in({','.join(self._drained)})"}] * len(needs) if self._drained else None
        name = f"{self._name}/group-{number}"
        return ray.util.placement_group(needs, strategy="PACK", name=name, bundle_label_selector=avoid)

    async def _room(self, place: Any, number: int, ranks: int, need: str, timeout_s: float) -> None:
        """Wait until the nodes have room. Raises TimeoutError."""
        wanted = need if ranks == 1 else f"{ranks} x {need}"
        for second in range(int(timeout_s)):
            if await self._call(place.wait, 1):
                return
            if second == 0:
                log.warning("group %d waits until nodes have %s free", number, wanted)
        raise TimeoutError(
            f"no nodes of the Ray cluster had {wanted} free in {timeout_s:.0f} s: add one (livebrush cluster up"
            " --join), or use fewer --ranks or --replicas"
        )

    def _release(self, ray: Any, place: Any, actors: Sequence[Any]) -> None:
        """Give back what a group had, beside everything else: nobody waits for a dead node."""

        def release() -> None:
            for actor in actors:
                with contextlib.suppress(Exception):
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
                "node": node,
                "state": str(group.status.state),
                "streams": group.capacity.open_streams,
            }
            for number, group in enumerate(self.groups)
            for node in sorted(self._ranks[number][0] if number in self._ranks else [""])
        ]

        def report() -> Any:
            call = controller(ray).report.remote(self._name, groups, self._life, self._drained)
            return ray.get(call, timeout=CALL_TIMEOUT_S)

        self._life, self._drained = await self._call(report)
        for nodes, rank in list(self._ranks.values()):
            if not nodes.isdisjoint(self._drained):
                rank.leave("its node is drained")


def _begin(ray: Any, actors: Sequence[Any], settings: EngineSettings) -> tuple[list[Home], tuple[int, str]]:
    """Have actors start the ranks of one group; returns their homes, rank 0's first, and port and secret of its host.

    Which actor has which rank is settled here. Raises RayError.
    """

    def answers(calls: list[Any]) -> list[Any]:
        found: list[Any] = ray.get(calls, timeout=ACTOR_TIMEOUT_S)
        return found

    text = settings.model_dump_json()
    found = zip(answers([actor.look.remote(text) for actor in actors]), actors, strict=True)
    # Rank 0, which has the frames, near this server where it can be, and neighbours in the ring on one node.
    here = ray.util.get_node_ip_address()
    ordered = sorted(found, key=lambda pair: (pair[0].address != here, pair[0].node))
    (first, leader), *others = ordered
    homes = [home for home, _ in ordered]
    # What `auto` stands for may differ from node to node, and the ranks must agree.
    precision = "float32" if any(home.precision == "float32" for home in homes) else "bfloat16"
    sharing = Counter(home.node for home in homes)
    (host,) = answers([leader.lead.remote(precision, sharing[first.node])])
    begun = [
        actor.follow.remote(rank, precision, sharing[home.node], first.address, *host)
        for rank, (home, actor) in enumerate(others, start=1)
    ]
    answers(begun)
    return homes, host
