"""The contract between the server and the engine: frames in, restyled frames out, and nothing about how.

Everything here is plain data or a Protocol, so that the server process never loads torch and the engine can be
faked (`engine.fake`), run as local processes (`engine.client`) or placed elsewhere, with nobody above noticing.

Axes: T frames of a chunk, H height, W width, 3 RGB channels. Instants are seconds on the machine's monotonic clock.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

Frames = NDArray[np.uint8]

MAX_PROMPT_CHARS = 1000
MAX_BLEND = 4
MAX_TRANSITION_CHUNKS = 240


class WeightedPrompt(BaseModel):
    """One prompt of a blend."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    text: str = Field(max_length=MAX_PROMPT_CHARS)
    weight: float = Field(default=1.0, gt=0, le=100, description="shares are weights over their sum")


class StreamParams(BaseModel):
    """What a person can set on a running stream. A live change is a new object, taken up at a chunk border."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    prompt: str = Field(default="", max_length=MAX_PROMPT_CHARS, description="free text; empty means unstyled")
    blend: tuple[WeightedPrompt, ...] = Field(
        default=(), max_length=MAX_BLEND, description="prompts mixed by weight, in place of `prompt` when given"
    )
    transition_chunks: int = Field(
        default=0, ge=0, le=MAX_TRANSITION_CHUNKS, description="chunks over which new prompts take over; 0: at once"
    )
    recache: bool = Field(
        default=False, description="let new prompts also rewrite what the cache keeps of earlier frames"
    )
    strength: float = Field(default=1.0, ge=0.0, le=1.0, description="0 returns the camera, 1 the full style")
    steps: int = Field(default=1, ge=1, le=4, description="denoising steps per chunk")
    seed: int = Field(default=0, ge=0, le=2**31 - 1, description="of the sampling noise")
    small: bool = Field(
        default=False, description="render at the engine's smaller size, scaled back: a rung of the ladder, no wish"
    )
    light: bool = Field(default=False, description="encode and decode by the light VAE: a rung of the ladder, no wish")

    @property
    def prompts(self) -> tuple[WeightedPrompt, ...]:
        """The prompts in force with their weights."""
        return self.blend or (WeightedPrompt(text=self.prompt),)


class Understood(BaseModel):
    """What a model that knows a number of styles made of one prompt.

    styles: ids and shares, the greatest first. score: 0 to 1, how near the prompt is to them; a low one means that
    they are only the nearest there are. modifiers: colours and moods that lie over the picture.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    styles: tuple[tuple[str, float], ...] = Field(min_length=1)
    score: float
    modifiers: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class FrameChunk:
    """Consecutive camera frames, the unit the engine takes.

    frames: [T, H, W, 3] uint8 RGB; T is `Capacity.chunk_frames`, in the first chunk of a stream
    `Capacity.first_chunk_frames`. deadline: when the oldest frame is due for playout.
    """

    index: int
    frames: Frames
    frame_indices: tuple[int, ...]
    captured_at: tuple[float, ...]
    deadline: float


@dataclass(frozen=True, slots=True)
class RenderedChunk:
    """The restyled frames of one chunk: same T, H, W and identities as went in.

    revision: the newest `EngineStream.update` that shaped these frames (0: the parameters at opening).
    fault: empty; or why the model's picture was withheld ("nan", "black", "frozen", "text_pending"): frames are then
        the camera's own, as they came.
    understood: what each prompt in force was taken for, in their order; empty where any words are understood.
    engine_started_at, engine_finished_at: when the engine took the chunk up and was done with it.
    """

    index: int
    frames: Frames
    frame_indices: tuple[int, ...]
    captured_at: tuple[float, ...]
    revision: int
    engine_started_at: float
    engine_finished_at: float
    fault: str = ""
    understood: tuple[Understood, ...] = ()


class EngineState(StrEnum):
    """Where the engine stands; `ready` is the only state in which streams render."""

    STARTING = "starting"
    LOADING = "loading"
    WARMING = "warming"
    READY = "ready"
    FAILED = "failed"
    CLOSED = "closed"


@dataclass(frozen=True, slots=True)
class EngineStatus:
    """State with its progress, for `/readyz` and the page. percent: 0 to 100 over the whole start."""

    state: EngineState
    percent: int
    detail: str = ""


@dataclass(frozen=True, slots=True)
class ChunkCostAt:
    """Engine seconds of one chunk alone in a pass, at a number of steps, full or small size, with either VAE.

    mean_s: what it takes. upper_s: what it stays below nearly always (the cost model's upper quantile).
    """

    steps: int
    small: bool
    mean_s: float
    upper_s: float
    light: bool = False


@dataclass(frozen=True, slots=True)
class Capacity:
    """What rank 0 can carry: the snapshot that admission, the ladder and rate agreement are computed from.

    chunk_cost_s: measured seconds of engine time for one chunk at the engine's size and steps (0 while
        unknown). max_streams: streams that have memory. open_streams: streams open now. chunk_frames: T.
        first_chunk_frames: T of a stream's first chunk. costs: the cost of a chunk by steps and size, from the cost
        model; empty while unknown. Where it holds no small size or no light VAE to change to, the engine has none.
        state_bytes: of one stream.
        groups: engines side by side, over which the streams are spread; a chunk takes the time of one of them.
        transit_s: by which a chunk comes back later than its cost, on its way round a ring of ranks.
    """

    chunk_cost_s: float
    max_streams: int
    open_streams: int
    chunk_frames: int
    first_chunk_frames: int = 1
    costs: tuple[ChunkCostAt, ...] = ()
    state_bytes: int = 0
    groups: int = 1
    transit_s: float = 0.0

    @property
    def has_small(self) -> bool:
        """Whether streams can be rendered at a smaller size."""
        return any(cost.small for cost in self.costs)

    @property
    def has_light(self) -> bool:
        """Whether streams can change to a lighter VAE and back."""
        return any(cost.light for cost in self.costs)

    def mean_s(self, steps: int, *, small: bool = False, light: bool = False) -> float:
        """Mean cost of a chunk at `steps`; the one number there is where the model has none for that."""
        wanted = (steps, small, light)
        return next((c.mean_s for c in self.costs if (c.steps, c.small, c.light) == wanted), self.chunk_cost_s)


@dataclass(slots=True)
class StreamCounters:
    """Every chunk that did not come back, by reason; in chunks. `frames_dropped` is the same in frames.

    faults: chunks that came back as the camera's own frames, by `RenderedChunk.fault`. reanchored: times the stream
    had drifted and its cache was begun anew.
    """

    submitted: int = 0
    rendered: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    frames_dropped: int = 0
    faults: dict[str, int] = field(default_factory=dict)
    reanchored: int = 0

    def drop(self, reason: str, frames: int) -> None:
        """Count one whole chunk lost for `reason`."""
        self.dropped[reason] = self.dropped.get(reason, 0) + 1
        self.frames_dropped += frames


class EngineError(Exception):
    """The engine cannot do what was asked; the text says what, the bound and the cure."""


class EngineNotReady(EngineError):
    """No stream can be opened now: the model is loading or the engine is restarting."""


class EngineFull(EngineError):
    """Every stream the engine has memory for is open."""


class RankLost(EngineError):
    """The process that held the stream died; its state is gone. Open a new stream when the engine is ready."""


class EngineStream(Protocol):
    """One open stream. Not for use from two tasks at once, except that `submit` and `update` may run beside
    the one task that iterates over the results."""

    @property
    def counters(self) -> StreamCounters:
        """Chunks in, out and lost, live."""
        ...

    def submit(self, chunk: FrameChunk) -> None:
        """Hand over a chunk without waiting. When the engine is behind, the oldest waiting chunk is dropped
        whole and counted. Raises RankLost once the engine is gone, ValueError for frames of a wrong shape."""
        ...

    def update(self, params: StreamParams) -> int:
        """Change the parameters at the next chunk border; returns the revision that `RenderedChunk` will name."""
        ...

    def __aiter__(self) -> AsyncIterator[RenderedChunk]:
        """Rendered chunks in order. Raises RankLost when the engine dies; never hangs on a dead one."""
        ...


class Engine(Protocol):
    """The engine as the server sees it."""

    @property
    def status(self) -> EngineStatus:
        """Never blocks."""
        ...

    @property
    def capacity(self) -> Capacity:
        """Never blocks."""
        ...

    @property
    def frame_size(self) -> tuple[int, int]:
        """(width, height) in pixels of every frame in and out."""
        ...

    async def start(self) -> None:
        """Begin loading and return at once; watch `status`."""
        ...

    async def close(self) -> None:
        """Stop every rank; bounded; idempotent."""
        ...

    async def wait_ready(self) -> None:
        """Return when streams render. Raises EngineError if the engine failed for good or was closed."""
        ...

    def open_stream(self, stream_id: str, params: StreamParams) -> AbstractAsyncContextManager[EngineStream]:
        """Open a stream for the length of the context. Raises EngineNotReady, EngineFull or RankLost."""
        ...
