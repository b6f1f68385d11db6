"""What a rank's process does in a ring: it meets the others, opens its wires, and follows rank 0 or is it."""

import itertools
import math
import os
import queue
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from engine.chain import Chain, chain_of, latents_carried
from engine.partition import even_split, partition
from engine.pipeline import Mode
from engine.ring import RingHead
from engine.ring_orders import Layout
from engine.ring_stage import Stage, StagePool, serve
from engine.ring_start import PEER_GONE, end_with_parent
from engine.transport import HOST, Inbox, Message, Outbox, PeerGone, WireShape, meet, open_wire
from engine.wan.vae import FRAMES_PER_LATENT, PIXELS_PER_LATENT
from engine.wan.weights import Model

Loader = Callable[[int], Model]
Room = Callable[[], float]
"""Bytes that a rank has for what units keep of streams."""


@dataclass(frozen=True)
class RingSpec:
    """What a ring is made of.

    streams: as many at once. span: latent frames of the usual chunk, which the buffers are made for; longer ones go in
    pieces. bounds: first unit of every rank, and the end (`engine.chain`); even where left out. balance: units move by
    measured times; capacity_bytes: of each rank for what units keep of streams; where left out, what each rank says it
    has room for. raw: results
    are latents and pixels as the decoder made them. waiting: chunks a stream may have unanswered. reply_timeout_s:
    after which a rank that does not answer is lost.
    """

    ranks: int
    width: int
    height: int
    streams: int = 4
    mode: Mode = "batch"
    span: int = 1
    bounds: tuple[int, ...] | None = None
    balance: bool = False
    capacity_bytes: tuple[float, ...] | None = None
    raw: bool = False
    threads: int = 1
    waiting: int = 16
    reply_timeout_s: float = 60.0
    pool_type: type[StagePool] = StagePool

    def __post_init__(self) -> None:
        """Raises ValueError."""
        if self.ranks < 1 or self.streams < 1 or self.span < 1 or self.waiting < 1:
            raise ValueError(
                f"ranks {self.ranks}, streams {self.streams}, span {self.span} and waiting {self.waiting} "
                "must be 1 or more"
            )


def unlimited() -> float:
    """Room without a bound."""
    return math.inf


def run_rank(rank: int, work: Callable[[], None], *, threads: int, lost: Callable[[str], None]) -> NoReturn:
    """A rank's process: do `work`, and end without Python's own end, for torch's groups may hold threads that wait for
    ever. lost: told why it was not done."""
    code = 1
    try:
        end_with_parent()
        torch.set_num_threads(threads)
        with torch.inference_mode():
            work()
        code = 0
    except PeerGone as gone:
        code = PEER_GONE
        lost(str(gone))
    except Exception as error:  # noqa: BLE001 - the process ends with it, and the group names it
        traceback.print_exc()
        lost(f"rank {rank}: {error!r}")
    finally:
        os._exit(code)


def follow(
    load: Loader,
    spec: RingSpec,
    rank: int,
    port: int,
    room: Room = unlimited,
    *,
    host: str = HOST,
    interface: str = "lo",
) -> None:
    """Be a rank after the first, until rank 0 says stop.

    port, host, interface: where the ranks meet, see `engine.transport.meet`. room: asked for once the model is loaded.
    Raises PeerGone.
    """
    model = load(rank)
    meet(rank, spec.ranks, port, host=host, interface=interface)
    shapes = _shapes(model, spec, rooms_of(spec, rank, room))
    forward, back = (open_wire(shape) for shape in shapes.wires)
    moving = dist.new_group(backend="gloo")
    onward = Outbox(forward, rank + 1, timeout_s=spec.reply_timeout_s) if rank + 1 < spec.ranks else None
    answers = Outbox(back, 0, timeout_s=spec.reply_timeout_s)
    config = model.config.transformer
    pool = spec.pool_type(
        config, shapes.grid, shapes.rows, cache=model.config.cache, device=model.device, dtype=model.dtype
    )
    stage = Stage(model, pool, rank, shapes.bounds, spec.streams, shapes.chain)
    serve(stage, shapes.layout, Inbox(forward, rank - 1, timeout_s=spec.reply_timeout_s), onward, answers, moving)


def make_head(
    model: Model, spec: RingSpec, port: int, room: Room = unlimited, *, host: str = HOST, interface: str = "lo"
) -> "tuple[RingHead, list[tuple[str, Inbox]]]":
    """Rank 0 of a ring, met with the others, and its wires, see `Events`.

    Raises: ValueError for wrong bounds, and where the ranks have no room for what units keep of streams.
    """
    if spec.ranks > 1:
        meet(0, spec.ranks, port, host=host, interface=interface)
    capacity_bytes = rooms_of(spec, 0, room)
    shapes = _shapes(model, spec, capacity_bytes)
    options: dict[str, Any] = {
        "streams": spec.streams,
        "mode": spec.mode,
        "raw": spec.raw,
        "balance": spec.balance,
        "capacity_bytes": capacity_bytes,
        "pool_type": spec.pool_type,
    }
    if spec.ranks > 1:
        forward, back = (open_wire(shape) for shape in shapes.wires)
        options["group"] = dist.new_group(backend="gloo")
        options["onward"] = Outbox(forward, 1, timeout_s=spec.reply_timeout_s)
    head = RingHead(model, spec.width, spec.height, shapes.bounds, shapes.chain, **options)
    return head, [("answer", Inbox(back, rank, timeout_s=spec.reply_timeout_s)) for rank in range(1, spec.ranks)]


@dataclass(frozen=True)
class _Shapes:
    """What every rank works out alike: the chain and its first bounds, rows of the cache and tokens of a latent frame
    across and down, and the wires: from rank to rank, and back to rank 0."""

    chain: Chain
    bounds: Sequence[int]
    layout: Layout
    rows: int
    grid: tuple[int, int]
    wires: tuple[WireShape, WireShape]


def first_bounds(chain: Chain, capacity_bytes: Sequence[float]) -> tuple[int, ...]:
    """Where units lie before anything is measured: as many on each rank as on the others, where memory allows that.

    Raises: PartitionError, where they fit nowhere.
    """
    even = even_split(len(capacity_bytes), chain.units)
    held = (sum(chain.unit_bytes[begin:end]) for begin, end in itertools.pairwise(even))
    if all(size <= room for size, room in zip(held, capacity_bytes, strict=True)):
        return even
    return partition([[1.0] * chain.units] * len(capacity_bytes), chain.unit_bytes, capacity_bytes).bounds


def rooms_of(spec: RingSpec, rank: int, room: Room) -> tuple[float, ...]:
    """What every rank has room for; each tells all others. Raises PeerGone."""
    own = room() if spec.capacity_bytes is None else spec.capacity_bytes[rank]
    if spec.ranks == 1:
        return (own,)
    told = [torch.zeros(1, dtype=torch.float64) for _ in range(spec.ranks)]
    try:
        dist.all_gather(told, torch.tensor([own], dtype=torch.float64))
    except RuntimeError as error:
        raise PeerGone(f"a rank ended as the ring began: {error}") from error
    return tuple(float(each) for each in told)


def _shapes(model: Model, spec: RingSpec, capacity_bytes: Sequence[float]) -> _Shapes:
    """Raises ValueError for bounds that are none of this chain, and where units fit nowhere."""
    config = model.config.transformer
    steps = 4 if model.config.sampling.timesteps is None else len(model.config.sampling.timesteps)
    rows = spec.streams * (steps if spec.mode == "batch" else 1)
    chain = chain_of(model, spec.width, spec.height, span=spec.span, streams=spec.streams, rows=rows)
    bounds = spec.bounds or first_bounds(chain, capacity_bytes)
    chain.check(bounds, spec.ranks)
    size = spec.height // PIXELS_PER_LATENT, spec.width // PIXELS_PER_LATENT
    grid = size[0] // config.patch[1], size[1] // config.patch[2]
    layout = Layout(spec.ranks, config.window_frames, chain.units)
    latent = spec.span * config.latent_channels * size[0] * size[1]
    # A pass between two blocks is one piece, and so is a latent on its way back; the rest goes in several.
    tokens = spec.span * grid[0] * grid[1] * config.dim + latents_carried(config) * latent
    text = (config.text_len + 1) * config.text_dim
    pixels = spec.span * FRAMES_PER_LATENT * 3 * spec.height * spec.width
    wires = (
        WireShape(layout.words, tokens, max(chain.carried, text), model.dtype, model.device),
        WireShape(layout.words, latent, max(latent, pixels), model.dtype, model.device),
    )
    return _Shapes(chain, bounds, layout, rows, grid, wires)


Event = tuple[str, Any]


class Events:
    """What comes to rank 0, in the order it comes: messages of its wires, and what others put in.

    Bounded by the passes under way and by what whoever puts in may have unanswered.
    """

    def __init__(self, inboxes: Sequence[tuple[str, Inbox]], reply_timeout_s: float) -> None:
        """Listen to wires. Their messages come as (name, `Message`), a broken one as ("gone", PeerGone)."""
        self.reply_timeout_s = reply_timeout_s
        self._queue: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._heard_at = time.monotonic()
        for name, inbox in inboxes:
            threading.Thread(target=self._read_wire, args=(name, inbox), daemon=True).start()

    def put(self, name: str, value: Any) -> None:
        """Add an event; from any thread."""
        self._queue.put((name, value))

    def next(self, *, busy: bool) -> Event:
        """The next event. Raises PeerGone when a wire broke, or when no rank answered for `reply_timeout_s` while busy,
        whatever else came meanwhile."""
        if not busy:
            event = self._queue.get()
            self._heard_at = time.monotonic()
        else:
            try:
                event = self._queue.get(timeout=max(0.0, self._heard_at + self.reply_timeout_s - time.monotonic()))
            except queue.Empty:
                raise self._hung() from None
            if event[0] != "answer" and time.monotonic() > self._heard_at + self.reply_timeout_s:
                raise self._hung()
        if event[0] == "gone":
            raise PeerGone(str(event[1]))
        return event

    def _hung(self) -> PeerGone:
        return PeerGone(f"no rank answered for {self.reply_timeout_s:g} s: one of them hangs")

    def _read_wire(self, name: str, inbox: Inbox) -> None:
        try:
            while True:
                message: Message = inbox.receive()
                self._heard_at = time.monotonic()
                self._queue.put((name, message))
        except PeerGone as gone:
            self._queue.put(("gone", gone))
