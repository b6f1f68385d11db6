"""Rank 0 of a ring as the server knows it: the same messages as `engine.worker`, over several processes.

This process schedules and holds the first units; it was begun together with the other ranks (`engine.ring_start`) and
ends with any of them, so that a group is lost as a unit: the server sees its connection close, within milliseconds of a
death, and starts another. A rank that hangs is one that has not answered for `HANG_S`, or for `HANG_CHUNKS` times what
a chunk took in the warm-up.

Scheduler, cost model and health are those of one rank. What a chunk costs is what the slowest rank spends on it, for
that is its share of a full ring; what it takes longer to come round is taken off its deadline. Units move between
ranks by measured times (`engine.ring_pace`). A ring has no smaller size to fall back to.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import wait

import numpy as np
import torch

from engine.api import EngineError, EngineState, Frames, StreamParams
from engine.config import CacheConfig, EngineSettings, SamplingConfig, ServingProfile
from engine.cost_book import Kinds
from engine.cost_model import Work
from engine.frame_memory import RING_SLOTS_PER_RANK, FrameLayout, FrameMemory
from engine.health import Verdict
from engine.memory import check, plan_of, pool_streams
from engine.messages import Open, Status, StreamFailed, Submit, ToRank
from engine.ring import RingHead
from engine.ring_flow import Done
from engine.ring_pace import WINDOW_PASSES
from engine.ring_rank import Events, RingSpec, follow, make_head, run_rank
from engine.ring_start import PEER_GONE, Follower, Place
from engine.scheduler import Item, Scheduler
from engine.transport import Message, PeerGone, open_store
from engine.wan.checkpoints import Progress
from engine.wan.weights import Model, load_model
from engine.warm_up import WARM_UP_CHUNKS, WARM_UP_PROMPT, Passes
from engine.worker import (
    TEXT_POLL_S,
    Connection,
    Disconnected,
    Entered,
    Result,
    Stream,
    Worker,
    check_fits,
    dtype_of,
    free_bytes,
)

log = logging.getLogger(__name__)

HANG_S = 8.0
HANG_CHUNKS = 10
# Nothing is known of a chunk's time before the warm-up.
WARM_UP_HANG_S = 60.0
# Of what a chunk takes to come round, in the mean.
TRANSIT_SMOOTHING = 0.2


@dataclass(frozen=True)
class RankLoader:
    """Loads the model in a rank's process; what settings say about sampling and cache is then the model's own. apart:
    see `Place`."""

    settings: EngineSettings
    apart: bool = False

    def __call__(self, rank: int) -> Model:
        """See `engine.ring_rank.Loader`. Only rank 0 keeps a text encoder."""
        model = self.load(rank, lambda share, what: None)
        model.text.close()
        return model

    def load(self, rank: int, progress: Progress) -> Model:
        """Load for a rank. Raises as `load_model`."""
        settings = self.settings
        device = rank_device(settings, rank, apart=self.apart)
        model = load_model(
            settings.model_dir,
            device,
            dtype_of(settings),
            vae=settings.vae,
            loras=settings.loras,
            fp8=settings.fp8,
            text_device=settings.text_device,
            progress=progress,
        )
        config = model.config
        update = {
            "sampling": SamplingConfig.model_validate(config.sampling.model_dump() | settings.sampling),
            "cache": CacheConfig.model_validate(config.cache.model_dump() | settings.cache),
        }
        return replace(model, config=config.model_copy(update=update))


def rank_device(settings: EngineSettings, rank: int, *, apart: bool = False) -> torch.device:
    """Where a rank lives: the CPU for all, or the GPUs from the one named on. apart: see `Place`."""
    device = torch.device(settings.device)
    return device if device.index is None or apart else torch.device(device.type, device.index + rank)


def room_of(settings: EngineSettings, rank: int, place: Place) -> float:
    """Bytes that a rank has for what units keep of streams, now that its weights are loaded. Ranks on a CPU share one
    memory, and take no heed of each other's part of it."""
    device = rank_device(settings, rank, apart=place.apart)
    sharing = place.sharing if device.type == "cpu" else 1
    free = free_bytes(device)
    return max(0, free // sharing - plan_of(settings, free).beside_bytes)


def spec_of(settings: EngineSettings) -> RingSpec:
    """The ring that settings ask for, alike on all of its ranks."""
    return RingSpec(
        settings.rank_count,
        settings.width,
        settings.height,
        streams=pool_streams(settings),
        mode=settings.mode,
        balance=True,
        threads=settings.threads,
        reply_timeout_s=WARM_UP_HANG_S,
    )


def follow_worker(settings: EngineSettings, rank: int, place: Place, wait_for_port: Callable[[], int]) -> None:
    """Be a rank after the first, as soon as rank 0 says where to meet. Ends the process.

    wait_for_port: returns what rank 0 says, or raises EOFError or OSError when that has ended.
    """

    def work() -> None:
        try:
            port = wait_for_port()
        except (EOFError, OSError):
            raise PeerGone("rank 0 ended before it said where to meet") from None
        load, room = RankLoader(settings, place.apart), lambda: room_of(settings, rank, place)
        follow(load, spec_of(settings), rank, port, room, host=place.host, interface=place.interface)

    run_rank(rank, work, threads=settings.threads, lost=lambda why: log.debug("rank %d ends: %s", rank, why))


class RingWorker(Worker):
    """Holds the first rank, the streams, and the other ranks."""

    _pipeline: RingHead

    def __init__(
        self,
        connection: Connection,
        memory: FrameMemory,
        settings: EngineSettings,
        followers: Sequence[Follower],
        place: Place,
    ) -> None:
        """followers: the other ranks, which wait to be told where to meet. place: of this one."""
        super().__init__(connection, memory, settings)
        self._followers = tuple(followers)
        self._place = place
        self._events: Events

    def load(self) -> None:
        """See `Worker.load`. Raises also PeerGone when a rank ends or does not come."""
        settings, profile, place = self._settings, self._settings.profile, self._place
        self._tell(EngineState.LOADING, 1, f"loading {settings.model} on {settings.rank_count} ranks")
        device = rank_device(settings, 0)
        plan = check_fits(settings, device)
        if device.type == "cpu":
            # All of them hold all weights, those of one machine in one memory.
            check(plan, free_bytes(device) // place.sharing)
        self._recall(device, plan)
        store = open_store(place.host, timeout_s=WARM_UP_HANG_S)
        threading.Thread(target=self._watch, daemon=True).start()
        for follower in self._followers:
            with contextlib.suppress(OSError):  # one that has ended: `_watch` sees to it
                follower.tell(store.port)
        loader = RankLoader(settings, place.apart)
        model = loader.load(0, lambda share, what: self._tell(EngineState.LOADING, 1 + round(49 * share), what))
        try:
            self._pipeline, inboxes = make_head(
                model,
                spec_of(settings),
                store.port,
                lambda: room_of(settings, 0, place),
                host=place.host,
                interface=place.interface,
            )
        except ValueError as error:
            raise EngineError(f"{settings.model}: {error}") from error
        except RuntimeError as error:
            raise PeerGone(f"the ranks did not meet: {error}") from error
        self._events = Events(inboxes, WARM_UP_HANG_S)
        while model.text.request(WARM_UP_PROMPT) is None:
            self._tell(EngineState.WARMING, 50, "loading the text encoder")
            time.sleep(TEXT_POLL_S)
        passes = self._warm_up_ring(profile)
        window = self._pipeline.pool.window
        self._book.begin(passes, Kinds(profile.steps, self._pipeline.max_steps, window), time.monotonic())
        self._scheduler = Scheduler(self._book.model, window=window)
        self._connection.send(Status(state=EngineState.READY, percent=100, chunk_frames=profile.chunk_frames))

    def close(self) -> None:
        """End the other ranks, which hold nothing that outlasts them, and the text encoder."""
        followers, self._followers = self._followers, ()
        for follower in followers:
            follower.end()
        super().close()

    def run(self) -> None:
        """See `Worker.run`. Raises also PeerGone when the group is lost."""
        threading.Thread(target=self._read_messages, daemon=True).start()
        while True:
            self._offer()
            if self._hand_over():
                continue  # which made room
            name, value = self._events.next(busy=self._pipeline.busy)
            if name == "disconnected":
                raise Disconnected
            if name == "message":
                self._handle(value)
            else:
                self._take(value)

    # --- the loop's parts

    def _offer(self) -> None:
        """Let chunks into the ring while one could begin at once: what waits here can still be dropped."""
        head = self._pipeline
        head.fill()
        while head.has_room:
            picked = self._scheduler.pick(time.monotonic(), self._busy())
            self._report(picked.drops)
            if not picked.items:
                return
            (item,) = picked.items
            stream = self._streams[item.stream]
            self._take_up_change(item.stream, stream)
            stream.entered.append(Entered((item,), time.monotonic()))
            frames = self._memory.slot(item.stream, item.slot, item.frames)
            head.submit(str(item.stream), head.upload(frames))
            head.fill()

    def _busy(self) -> set[int]:
        most = RING_SLOTS_PER_RANK * self._settings.rank_count
        return {
            number
            for number, stream in self._streams.items()
            if not self._pipeline.takes(str(number)) or len(stream.entered) >= most
        }

    def _take(self, message: Message) -> None:
        self._pipeline.take(message.words, message.tensors)

    def _hand_over(self) -> bool:
        """Send what the ring has made; returns whether there was anything."""
        head = self._pipeline
        handed = bool(head.done or head.failed)
        while head.done:
            self._hand_over_one(head.done.popleft())
        while head.failed:
            key, error = head.failed.popleft()
            self._fail(int(key), error)
        return handed

    def _hand_over_one(self, done: Done) -> None:
        number = int(done.key)
        stream = self._streams[number]
        rendered, state = done.rendered, stream.state
        self._learn(done, stream)
        if rendered is None:
            self._send(Result(number, state, state.revision, None, None, ()), stream, None, None)
            return
        frames = None if rendered.frames is None else rendered.frames.cpu().numpy()
        figures = None if rendered.figures is None else rendered.figures.tolist()
        self._send(Result(number, state, rendered.revision, None, None, rendered.understood), stream, frames, figures)

    def _learn(self, done: Done, stream: Stream) -> None:
        """What a chunk costs of the ring, and how much longer it took to come round."""
        window = self._pipeline.pool.window
        if done.item is None or done.cost_s <= 0 or done.chunk < window:
            return
        now = time.monotonic()
        longer_s = max(0.0, now - stream.entered[0].started_at - done.cost_s)
        book = self._book
        book.transit_s += TRANSIT_SMOOTHING * (longer_s - book.transit_s)
        book.observe(Work.of_chunk(done.item.schedule.steps, window=window), done.cost_s, now)

    # --- messages

    def _read_messages(self) -> None:
        try:
            while True:
                for message in self._connection.receive(wait=True):
                    self._events.put("message", message)
        except Disconnected:
            self._events.put("disconnected", None)
        except ValueError as error:  # not a message of ours
            self._events.put("gone", error)

    def _handle(self, message: ToRank) -> None:
        if isinstance(message, Submit):
            item = Item(
                message.stream, message.chunk, message.slot, message.frames, message.deadline - self._book.transit_s
            )
            self._report(self._scheduler.push(item))
        else:
            super()._handle(message)

    def _open(self, message: Open) -> None:
        head, key = self._pipeline, str(message.stream)
        try:
            head.join(key, message.params)
        except (ValueError, MemoryError) as error:
            self._connection.send(StreamFailed(stream=message.stream, message=f"cannot open: {error}"))
            return
        self._streams[message.stream] = Stream(head, head.flows[key].state)
        self._scheduler.open(message.stream)
        self._plan(message.stream, message.params)

    def _forget(self, number: int) -> None:
        self._scheduler.close(number)
        if self._streams.pop(number, None) and str(number) in self._pipeline.flows:
            self._pipeline.leave(str(number))

    def _reset(self, result: Result, stream: Stream, verdict: Verdict) -> None:
        """See `Worker._reset`."""
        head, key = self._pipeline, str(result.stream)
        # What is done has been handed over, but for this stream's own.
        kept = [done for done in head.done if done.key == key]
        for done in kept:
            head.done.remove(done)
        head.restart(key)
        for _ in range(len(stream.entered) - len(head.flows[key].waiting)):
            self._done(result, stream, stream.entered.popleft(), verdict)

    # --- start and end

    def _watch(self) -> None:
        """End with the first rank that ends: nothing here is worth saving, and the server starts another group."""
        ranks = [follower.sentinel for follower in self._followers]
        gone = wait(ranks)
        if self._followers:
            numbers = [number for number, sentinel in enumerate(ranks, start=1) if sentinel in gone]
            log.error("rank %s of %d ended: the group ends with it", numbers[0], len(ranks) + 1)
            self.close()
            os._exit(PEER_GONE)

    def _warm_up_ring(self, profile: ServingProfile) -> Passes | None:
        """Render until everything runs at its usual speed; returns what chunks of each number of steps cost then.

        None where a chunk costs what an earlier run has learned: then units move to where they belong in service.
        """
        settings, head, key = self._settings, self._pipeline, "warm-up"
        params = StreamParams(prompt=WARM_UP_PROMPT, steps=profile.steps)
        frames = [
            np.zeros((count, settings.height, settings.width, 3), np.uint8)
            for count in (profile.first_chunk_frames, profile.chunk_frames)
        ]
        usual = Work.of_chunk(profile.steps, window=head.pool.window)
        # Enough for units to move to where they belong before anything is measured.
        chunks = max(WARM_UP_CHUNKS, head.pool.window + 2, WINDOW_PASSES + 2)
        taken: list[float] = []
        head.join(key, params)
        try:
            for done in range(chunks):
                self._tell(EngineState.WARMING, 55 + 40 * done // chunks, "warming up")
                taken.append(self._play(key, frames[min(done, 1)]))
                if done + 1 == WARM_UP_CHUNKS and self._book.stands(usual, statistics.median(taken[2:])):
                    # What a chunk costs is the slowest rank's share.
                    longest = Work.of_chunk(head.max_steps, window=head.pool.window)
                    self._allow(settings.rank_count * self._book.longest_s(longest))
                    return None
            return self._measure_steps(key, params, frames[1])
        finally:
            head.leave(key)

    def _measure_steps(self, key: str, params: StreamParams, frames: Frames) -> Passes:
        head, slowest_s = self._pipeline, 0.0
        costs: Passes = []
        for steps in sorted({1, params.steps, head.max_steps}):
            self._tell(EngineState.WARMING, 95, f"measuring {steps} steps")
            head.set_params(head.flows[key].state, params.model_copy(update={"steps": steps}))
            began = time.monotonic()
            taken = [self._play(key, frames) for _ in range(WARM_UP_CHUNKS)]
            slowest_s = max(slowest_s, (time.monotonic() - began) / WARM_UP_CHUNKS)
            # The first may still wait for those of other steps.
            costs.append((Work.of_chunk(steps, window=head.pool.window), statistics.median(taken[1:])))
        self._allow(slowest_s)
        return costs

    def _allow(self, chunk_s: float) -> None:
        """From now on a rank hangs that does not answer for so many times what the slowest chunk takes."""
        self._events.reply_timeout_s = max(HANG_S, HANG_CHUNKS * chunk_s)

    def _play(self, key: str, frames: Frames) -> float:
        """One chunk alone through the ring; returns what it cost."""
        head = self._pipeline
        head.submit(key, head.upload(frames))
        head.fill()
        while not head.done:
            self._take(self._events.next(busy=True)[1])
            head.fill()
        return head.done.popleft().cost_s


def main(
    control_fd: int, memory_fd: int, settings: EngineSettings, followers: Sequence[Follower], place: Place
) -> None:
    """Load, then serve until the server lets go or the group is lost. Ends the process: torch's groups may hold
    threads that wait for ever."""
    torch.set_num_threads(settings.threads)
    connection = Connection(socket.socket(fileno=control_fd))
    worker = RingWorker(connection, FrameMemory(memory_fd, FrameLayout.of(settings)), settings, followers, place)
    code = 1
    try:
        worker.load()
        worker.run()
    except Disconnected:
        log.debug("rank stops: the server closed the connection")
        worker.keep_costs()
        code = 0
    except PeerGone as gone:
        log.error("the group ends: %s", gone)
        code = PEER_GONE
    except (EngineError, FileNotFoundError) as error:
        # Starting again would not help: the model folder or the settings must be put right first.
        connection.send(Status(state=EngineState.FAILED, percent=0, detail=str(error)))
        code = 0
    except Exception:
        log.exception("the group ends")
    finally:
        worker.close()
        os._exit(code)
