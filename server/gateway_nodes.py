"""The servers behind a gateway: what each last said of itself, which is out, and which one a session goes to.

All that is known of a node is its answer to GET /api/v1/capacity, with its age. Nothing is kept that a gateway started
anew would miss: sessions and tokens name their node, and where a stream is, the nodes are asked.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import aiohttp
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from server.node_name import NAMED

log = logging.getLogger(__name__)

CAPACITY = "/api/v1/capacity"
POLL_S = 1.0
ASK_TIMEOUT_S = 1.0
# A node that has not answered so many polls in a row is out, until it answers again.
OUT_AFTER = 3
# Whoever needs to know better than the last poll asks at most so often.
FRESH_S = 0.2
# Where a publisher was sent who has not arrived yet: a second one with the same stream must meet it there.
SENT_S = 5.0
MAX_SENT = 256


class Report(BaseModel):
    """What a node says of itself (docs/protocol.md). streams: by name, whether one is published now."""

    model_config = ConfigDict(frozen=True)

    node: str = Field(pattern=f"^{NAMED.pattern}$")
    ready: bool
    draining: bool
    streams: dict[str, bool]
    open: int
    seats: int
    load: float
    retry_after_s: float


@dataclass(eq=False, slots=True)
class Node:
    """One server. url: as the gateway reaches it, public_url: as its clients do.

    missed: polls in a row without an answer; refusal: why it is not used though it answers; placed: sessions sent there
    since its last report.
    """

    url: str
    public_url: str
    report: Report | None = None
    answered_at: float = 0.0
    missed: int = 0
    refusal: str = ""
    placed: int = 0
    polls_failed: int = 0

    @property
    def is_up(self) -> bool:
        """Whether it is used."""
        return self.report is not None and self.missed < OUT_AFTER and not self.refusal

    @property
    def takes_new(self) -> bool:
        """Whether it is used for new sessions, if it has room."""
        return self.is_up and self.report is not None and not self.report.draining

    @property
    def room(self) -> int:
        """Free seats, as far as known."""
        return 0 if self.report is None else self.report.seats - self.report.open - self.placed


@dataclass(slots=True)
class _Sent:
    """Where publishers were sent lately, by stream."""

    nodes: OrderedDict[str, tuple[Node, float]] = field(default_factory=OrderedDict)

    def note(self, stream: str, node: Node, now: float) -> None:
        self.nodes.pop(stream, None)
        self.nodes[stream] = (node, now + SENT_S)
        if len(self.nodes) > MAX_SENT:
            self.nodes.popitem(last=False)

    def find(self, stream: str, now: float) -> Node | None:
        node, until = self.nodes.get(stream, (None, 0.0))
        return node if now < until else None


def by_room(nodes: Sequence[Node]) -> list[Node]:
    """Those that take one more session, the one with most room first: ready before loading, free seats, load. Pure.

    Where all are full, the one alone that expects a seat first: its refusal is everybody's. Where all are being
    emptied, the first of them, which says so.
    """
    taking = [node for node in nodes if node.takes_new]

    def rank(node: Node) -> tuple[bool, int, float]:
        assert node.report is not None
        return (not node.report.ready, -node.room, node.report.load)

    free = sorted((node for node in taking if node.room > 0), key=rank)
    if free:
        return free
    if taking:
        return [min(taking, key=_retry_after_s)]
    return [node for node in nodes if node.is_up][:1]


def _retry_after_s(node: Node) -> float:
    assert node.report is not None
    return node.report.retry_after_s


class Nodes:
    """All nodes, asked once a second. `run` as a task; everything else answers from what is known."""

    def __init__(
        self,
        nodes: Sequence[Node],
        http: aiohttp.ClientSession,
        *,
        token: str = "",
        needs_tokens: bool,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """token: for who asks nodes with tokens; the view role is enough.

        needs_tokens: the gateway is reached from elsewhere, so a node that asks nobody for a token is not used.
        """
        self.all = tuple(nodes)
        self._http = http
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._needs_tokens = needs_tokens
        self._clock = clock
        self._sent = _Sent()
        self._refreshed_at = float("-inf")
        self._refreshing = asyncio.Lock()

    async def run(self) -> None:
        """Ask every node once a second, until cancelled. One that is slow holds up no other."""
        async with asyncio.TaskGroup() as tasks:
            for node in self.all:
                tasks.create_task(self._follow(node), name=f"gateway/{node.url}")

    async def _follow(self, node: Node) -> None:
        while True:
            try:
                await self._ask(node)
            except Exception:
                # The wall: whatever one answer does, the next is asked for.
                log.exception("node %s could not be asked", node.url)
                self._miss(node, "it could not be asked", missed=node.missed + 1)
            await asyncio.sleep(POLL_S)

    async def refresh(self) -> None:
        """Ask all nodes that are up, or else all, unless that was done FRESH_S ago. Takes ASK_TIMEOUT_S at most."""
        async with self._refreshing:
            if self._clock() - self._refreshed_at < FRESH_S:
                return
            await asyncio.gather(*(self._ask(node) for node in self.up or self.all))
            self._refreshed_at = self._clock()

    # --- which one

    @property
    def up(self) -> list[Node]:
        """Those that are used, in the order of the command line."""
        return [node for node in self.all if node.is_up]

    def named(self, name: str) -> Node | None:
        """The node whose sessions and tokens begin with this name, also one that does not answer just now."""
        return next((node for node in self.all if node.report is not None and name == node.report.node), None)

    def for_offer(self, first: Node | None = None) -> list[Node]:
        """Whom to ask for a seat, in turn. first: has the caller's own seat, or its stream."""
        own = [first] if first is not None and first.is_up else []
        return own + [node for node in by_room(self.all) if node is not first]

    def with_stream(self, stream: str, *, returns: bool = False) -> Node | None:
        """The node that a stream is published on, or was a moment ago.

        returns: for its publisher, who does not go back to a node that is being emptied.
        """
        having = [(node, node.report) for node in self.up if node.report and stream in node.report.streams]
        having.sort(key=lambda one: one[1].draining)
        live = [node for node, report in having if report.streams[stream]]
        sent = self._sent.find(stream, self._clock())
        # A stream that is on its way counts for more than one that ended.
        others = [sent] if sent is not None and sent.is_up else []
        others += [node for node, _ in having]
        found = live + [node for node in others if node.takes_new or not returns]
        return found[0] if found else None

    def note_publisher(self, stream: str, node: Node) -> None:
        """A publisher was sent there."""
        self._sent.note(stream, node, self._clock())

    def lost(self, node: Node, why: str) -> None:
        """Nobody listens at a node: it is out until it answers a poll."""
        self._miss(node, why, missed=OUT_AFTER)

    # --- asking

    async def _ask(self, node: Node) -> None:
        try:
            async with asyncio.timeout(ASK_TIMEOUT_S):
                report, refusal = await self._report_of(node)
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            node.polls_failed += 1
            self._miss(node, f"{error or type(error).__name__}", missed=node.missed + 1)
            return
        was_up, before = node.is_up, node.refusal
        if report is not None:
            node.report = report
        node.answered_at, node.missed, node.refusal, node.placed = self._clock(), 0, refusal, 0
        if refusal and refusal != before:
            log.warning("node %s is not used: %s", node.url, refusal)
        elif node.is_up and not was_up and report is not None:
            log.info("node %s is up: %s, %d of %d seats taken", node.url, report.node, report.open, report.seats)

    async def _report_of(self, node: Node) -> tuple[Report | None, str]:
        """What a node says, and why it is not used nevertheless."""
        async with self._http.get(node.url + CAPACITY, headers=self._headers) as response:
            body = await response.read()
        if response.status == 401:
            return None, "it asks for a token: set LIVEBRUSH_TOKEN to one for the view role"
        if response.status != 200:
            return None, f"it answers {response.status}: {_words(body)}"
        try:
            report = Report.model_validate_json(body)
        except ValidationError:
            return None, "it does not answer as a Livebrush server of this version"
        known = node.report is not None and node.report.node == report.node and not node.refusal
        if self._needs_tokens and not known and await self._is_open(node):
            return report, "it asks nobody for a token, and this gateway is reached from elsewhere (docs/security.md)"
        return report, ""

    async def _is_open(self, node: Node) -> bool:
        async with self._http.get(node.url + CAPACITY) as response:
            return response.status == 200

    def _miss(self, node: Node, why: str, *, missed: int) -> None:
        was_up, node.missed = node.is_up, missed
        if was_up and not node.is_up:
            log.warning("node %s is out: %s", node.url, why)


def _words(body: bytes) -> str:
    try:
        return str(json.loads(body)["detail"])[:300]
    except (ValueError, KeyError, TypeError):
        return "nothing that can be read"
