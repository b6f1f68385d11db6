"""A ring as its user holds it: one process a rank, started, fed and ended together.

This process keeps no part of the model and is in no process group of torch, so a rank that dies takes nothing with it:
the group ends as a unit with `RankLost`, whatever the rest of it was doing, and a new one can be made at once.
"""

import contextlib
import multiprocessing
import pickle
import queue
import statistics
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, Self

import torch
from torch import Tensor

from engine.api import EngineError, RankLost, StreamParams
from engine.ring import RingHead
from engine.ring_flow import Done
from engine.ring_rank import Events, Loader, RingSpec, follow, make_head, run_rank
from engine.ring_start import LOOPBACK, PEER_GONE
from engine.session import NoiseSource
from engine.transport import Inbox, PeerGone, Traffic, open_store

BLAME_S = 0.5
TELL_S = 1.0
STOP_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class RingResult:
    """A chunk that is done. frames: uint8 [T, H, W, 3]; or, of a raw ring, latent [T, C, H, W] and pixels [T, 3, H, W],
    not clamped, and the share of noise and the timestep of its first step. All None where no prompt was known yet."""

    stream: str
    chunk: int
    frames: Tensor | None
    latent: Tensor | None = None
    pixels: Tensor | None = None
    first_step: tuple[float, float] | None = None


@dataclass(frozen=True)
class RingStats:
    """bounds, epoch: the plan in force. kinds: of the units. passes: so far. Medians, seconds: rank_s, what each rank
    takes for its part of one pass; unit_s, each unit when it runs; home_s, rank 0 for a chunk beside its units. In all
    so far: wire_s, what each rank has spent on messages (`Traffic`); wire_bytes, what it has sent and received.
    """

    bounds: tuple[int, ...]
    epoch: int
    kinds: tuple[str, ...]
    rank_s: tuple[float, ...]
    unit_s: tuple[float, ...]
    home_s: float
    passes: int
    wire_s: tuple[float, ...]
    wire_bytes: tuple[float, ...]

    def total_s(self, kind: str) -> float:
        """What the units of a kind take together, or all that encode or decode."""
        named = zip(self.kinds, self.unit_s, strict=True)
        return sum(time_s for name, time_s in named if name == kind or name.startswith(f"{kind} "))


class RingGroup:
    """Handle of a ring. For one thread; a context manager."""

    def __init__(self, load: Loader, spec: RingSpec, *, start_timeout_s: float = 120.0) -> None:
        """Start a process for every rank and wait until all hold the model.

        Args:
            load: called in each process with its rank; must be picklable. Only rank 0 asks the model for text.

        Raises: RankLost, when a rank ends before; EngineError after start_timeout_s.
        """
        self.spec = spec
        self._results: deque[RingResult] = deque()
        self._pending: dict[str, int] = {}
        self._answer: tuple[str, Any] | None = None
        self._failure: EngineError | None = None
        # Hosted here, so that no rank is needed for the others to meet.
        self._store = open_store(LOOPBACK, timeout_s=start_timeout_s)
        ours, theirs = multiprocessing.get_context("spawn").Pipe()
        self._pipe: Connection = ours
        self._ranks = [
            rank_process(load, spec, rank, self._store.port, theirs if rank == 0 else None)
            for rank in range(spec.ranks)
        ]
        try:
            for rank in self._ranks:
                rank.start()
            theirs.close()
            self._ask(None, timeout_s=start_timeout_s)
        except BaseException:
            self._end()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def pids(self) -> list[int]:
        """Process of every rank."""
        return [rank.pid or 0 for rank in self._ranks]

    def open(self, stream: str, params: StreamParams, noise: NoiseSource | None = None) -> None:
        """Open a stream. Raises EngineError for a name in use, parameters the model cannot follow, or a full ring."""
        self._ask(("open", stream, params, noise))
        self._pending[stream] = 0

    def update(self, stream: str, params: StreamParams) -> None:
        """Change a stream from its next chunk on. Raises EngineError."""
        self._ask(("update", stream, params))

    def close_stream(self, stream: str) -> None:
        """Close a stream; what it has under way gives no result. Raises EngineError for one that is not open."""
        self._ask(("close", stream))
        del self._pending[stream]
        self._results = deque(result for result in self._results if result.stream != stream)

    def submit(self, stream: str, frames: Tensor, *, timeout_s: float = 60.0) -> None:
        """Give a stream its next chunk; waits while it has `RingSpec.waiting` unanswered.

        Args:
            frames: uint8 [T, H, W, 3], or pixels [T, 3, H, W] in [-1, 1] where motion is measured on them exactly.

        Raises: EngineError, after timeout_s or for a stream that is not open; RankLost.
        """
        if stream not in self._pending:
            raise EngineError(f"stream {stream!r} is not open: open it first")
        until = time.monotonic() + timeout_s
        while self._pending[stream] >= self.spec.waiting:
            self._pump(until, f"stream {stream!r} has {self.spec.waiting} chunks unanswered")
        self._pending[stream] += 1
        self._send(("submit", stream, frames.clone()))

    def collect(self, *, timeout_s: float = 60.0) -> list[RingResult]:
        """Chunks that are done since the last call, each stream's in order; waits for one while any is due.

        Raises: EngineError after timeout_s; RankLost.
        """
        until = time.monotonic() + timeout_s
        while not self._results and any(self._pending.values()):
            self._pump(until, "no chunk was done")
        results = list(self._results)
        self._results.clear()
        return results

    def finish(self, *, timeout_s: float = 60.0) -> list[RingResult]:
        """All that is due, and what was not collected. Raises as `collect`."""
        until = time.monotonic() + timeout_s
        while any(self._pending.values()):
            self._pump(until, f"{sum(self._pending.values())} chunks were not done")
        return self.collect()

    def move(self, bounds: Sequence[int]) -> None:
        """Go over to another plan, with keys and values, while passes are under way. Raises EngineError."""
        self._ask(("move", tuple(bounds)))

    def stats(self) -> RingStats:
        """How the ring fares."""
        answer = self._ask(("stats",))
        assert isinstance(answer, RingStats)
        return answer

    def close(self) -> None:
        """End all ranks: asked first, then made to. Idempotent."""
        if self._failure is None and self._ranks[0].is_alive():
            with contextlib.suppress(OSError):
                self._pipe.send_bytes(pickle.dumps(("stop",)))
            deadline = time.monotonic() + STOP_TIMEOUT_S
            for rank in self._ranks:
                rank.join(max(0.0, deadline - time.monotonic()))
        self._end()

    # --- parts

    def _ask(self, command: tuple[Any, ...] | None, timeout_s: float = 60.0) -> Any:
        if command is not None:
            self._send(command)
        until, self._answer = time.monotonic() + timeout_s, None
        what = "the ranks did not start" if command is None else f"{command[0]!r} was not answered"
        while self._answer is None:
            self._pump(until, what)
        kind, value = self._answer
        if kind == "refused":
            raise EngineError(str(value))
        return value

    def _send(self, command: tuple[Any, ...]) -> None:
        if self._failure is not None:
            raise self._failure
        try:
            self._pipe.send_bytes(pickle.dumps(command))
        except OSError:
            self._lose("rank 0 closed its connection")

    def _pump(self, until: float, what: str) -> None:
        """Take in one message of rank 0. Raises EngineError when `until` has come, RankLost when a rank has died."""
        if self._failure is not None:
            raise self._failure
        left_s = until - time.monotonic()
        ready = wait([self._pipe, *(rank.sentinel for rank in self._ranks)], max(0.0, left_s))
        if not ready:
            self._failure = EngineError(f"{what} within the time allowed: the group was ended")
            self._end()
            raise self._failure
        if self._pipe not in ready:
            self._lose("")
        try:
            kind, value = pickle.loads(self._pipe.recv_bytes())
        except (EOFError, OSError):
            self._lose("rank 0 closed its connection")
        if kind == "lost":
            self._lose(value)
        elif kind == "result":
            # One of a stream that was closed meanwhile is nobody's.
            if value.stream in self._pending:
                self._pending[value.stream] -= 1
                self._results.append(value)
        else:
            self._answer = kind, value

    def _lose(self, why: str) -> None:
        """End the group and raise RankLost, naming the rank that went first."""
        deadline = time.monotonic() + BLAME_S
        while not (guilty := self._guilty()) and time.monotonic() < deadline:
            wait([rank.sentinel for rank in self._ranks if rank.is_alive()] or [self._ranks[0].sentinel], 0.05)
        names = ", ".join(f"rank {rank} ended with {code}" for rank, code in guilty) or why or "a rank ended"
        detail = f" ({why})" if why and guilty else ""
        self._failure = RankLost(f"{names}{detail}: the group has ended as a whole; make a new one")
        self._end()
        raise self._failure

    def _guilty(self) -> list[tuple[int, int]]:
        codes = ((number, rank.exitcode) for number, rank in enumerate(self._ranks))
        return [(number, code) for number, code in codes if code is not None and code != PEER_GONE]

    def _end(self) -> None:
        self._pipe.close()
        started = [rank for rank in self._ranks if rank.pid is not None]
        for rank in started:
            if rank.is_alive():
                rank.kill()
        for rank in started:
            rank.join(STOP_TIMEOUT_S)


def rank_process(load: Loader, spec: RingSpec, rank: int, port: int, pipe: Connection | None = None) -> BaseProcess:
    """The process of a rank, not yet started. port: of the store where the ranks meet; pipe: rank 0's user."""
    return multiprocessing.get_context("spawn").Process(
        target=_rank_main, args=(load, spec, rank, port, pipe), name=f"ring rank {rank}", daemon=True
    )


def _rank_main(load: Loader, spec: RingSpec, rank: int, port: int, pipe: Connection | None) -> None:
    teller = None if pipe is None else _Teller(pipe)

    def work() -> None:
        if pipe is None or teller is None:
            follow(load, spec, rank, port)
        else:
            head, inboxes = make_head(load(rank), spec, port)
            _lead(head, spec, pipe, teller, inboxes)

    def lost(why: str) -> None:
        if teller is not None:
            teller.tell("lost", why)
            teller.close()

    run_rank(rank, work, threads=spec.threads, lost=lost)


class _Teller:
    """Tells rank 0's user, who takes it when it comes to it: the ring does not wait for that.

    Bounded by what streams may have unanswered.
    """

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe
        self._queue: queue.SimpleQueue[tuple[str, Any] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._write, daemon=True)
        self._thread.start()

    def tell(self, kind: str, value: Any) -> None:
        self._queue.put((kind, value))

    def close(self) -> None:
        """Wait until all is told, at most `TELL_S`."""
        self._queue.put(None)
        self._thread.join(TELL_S)

    def _write(self) -> None:
        with contextlib.suppress(OSError):  # the user is gone, which `_read_commands` sees too
            while (message := self._queue.get()) is not None:
                self._pipe.send_bytes(pickle.dumps(message))


def _lead(
    head: RingHead, spec: RingSpec, pipe: Connection, teller: _Teller, inboxes: Sequence[tuple[str, Inbox]]
) -> None:
    """Rank 0's loop: commands of the group and answers of the ring, in the order they come."""
    events = Events(inboxes, spec.reply_timeout_s)
    threading.Thread(target=_read_commands, args=(pipe, events), daemon=True).start()
    teller.tell("ready", None)
    while True:
        name, value = events.next(busy=head.busy)
        if name == "stop":
            head.stop()
            return
        if name == "answer":
            head.take(value.words, value.tensors)
        else:
            _obey(head, value, teller, inboxes)
        head.fill()
        for stream, error in head.failed:
            raise PeerGone(f"stream {stream!r}: a text could not be encoded: {error}") from error
        while head.done:
            teller.tell("result", _result(head.done.popleft()))


def _result(done: Done) -> RingResult:
    if done.item is None or done.pixels is None:
        frames = None if done.rendered is None or done.rendered.frames is None else done.rendered.frames.cpu()
        return RingResult(done.key, done.chunk, frames)
    schedule = done.item.schedule
    first = (float(schedule.mix), float(schedule.timesteps[0])) if schedule.steps else None
    latent, pixels = (tensor.cpu().clone() for tensor in (done.item.clean[0], done.pixels))
    return RingResult(done.key, done.chunk, None, latent, pixels, first)


def _obey(head: RingHead, command: tuple[Any, ...], teller: _Teller, inboxes: Sequence[tuple[str, Inbox]]) -> None:
    name, *rest = command
    if name == "submit":
        head.submit(*rest)
        return
    answer: Any = None
    try:
        if name == "open":
            head.join(*rest)
        elif name == "update":
            head.update(*rest)
        elif name == "close":
            head.leave(rest[0])
        elif name == "move":
            head.move(rest[0])
        else:
            answer = _stats(head, inboxes)
    except KeyError:
        teller.tell("refused", f"stream {rest[0]!r} is not open: open it first")
    except (ValueError, MemoryError) as error:
        teller.tell("refused", str(error))
    else:
        teller.tell("answer", answer)


def _stats(head: RingHead, inboxes: Sequence[tuple[str, Inbox]]) -> RingStats:
    own = sum((inbox.traffic for _, inbox in inboxes), head.traffic)
    seconds, count = own.since(Traffic())
    times = torch.tensor(list(head.times) or [[0.0] * head.ranks])
    return RingStats(
        bounds=tuple(head.stage.bounds),
        epoch=head.stage.epoch,
        kinds=head.chain.kinds,
        rank_s=tuple(times.median(0).values.tolist()),
        unit_s=tuple(statistics.median(seen) if seen else 0.0 for seen in head.unit_times),
        home_s=statistics.median(head.home_times) if head.home_times else 0.0,
        passes=head.passes,
        wire_s=(seconds, *head.wire_s[1:]),
        wire_bytes=(count, *head.wire_bytes[1:]),
    )


def _read_commands(pipe: Connection, events: Events) -> None:
    with contextlib.suppress(EOFError, OSError):
        while True:
            command = pickle.loads(pipe.recv_bytes())
            name = "stop" if command[0] == "stop" else "command"
            events.put(name, command)
    # The user is gone: nothing is left to do.
    events.put("stop", None)
