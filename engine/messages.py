"""What the server and an engine rank say to each other: typed messages, one JSON object a line, over an inherited
socket. No pickle: a line that does not parse is a fault of ours and ends the connection.

Frames do not travel here: they lie in `engine.frame_memory`, and a message names the slot. A slot has one owner at a
time: the server until `Submit`, the rank until `Done` or `Dropped`, then the server again. The rank writes the
restyled frames over the camera frames, so one ring a stream serves both directions.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from engine.api import ChunkCostAt, EngineState, StreamParams, Understood

MAX_LINE_BYTES = 64 * 1024


class _Message(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Open(_Message):
    """Server to rank: make the state of a stream in memory region `stream`."""

    kind: Literal["open"] = "open"
    stream: int
    params: StreamParams


class Submit(_Message):
    """Server to rank: slot `slot` of the stream holds `frames` camera frames, due at `deadline`."""

    kind: Literal["submit"] = "submit"
    stream: int
    chunk: int
    slot: int
    frames: int
    deadline: float


class Update(_Message):
    """Server to rank: parameters from the next chunk border on."""

    kind: Literal["update"] = "update"
    stream: int
    revision: int
    params: StreamParams


class Close(_Message):
    """Server to rank: forget the stream; `Closed` gives its memory region back."""

    kind: Literal["close"] = "close"
    stream: int


class Status(_Message):
    """Rank to server: progress of the start."""

    kind: Literal["status"] = "status"
    state: EngineState
    percent: int
    detail: str = ""
    chunk_frames: int = 0


class Costs(_Message):
    """Rank to server: what chunks cost by now, see `Capacity`. Once before `ready`, then as it moves."""

    kind: Literal["costs"] = "costs"
    chunk_cost_s: float
    costs: tuple[ChunkCostAt, ...]
    state_bytes: int
    transit_s: float = 0.0


class Done(_Message):
    """Rank to server: the slot holds the restyled frames of the chunk.

    understood: see `RenderedChunk`; None: as in the chunk before.
    """

    kind: Literal["done"] = "done"
    stream: int
    chunk: int
    slot: int
    revision: int
    started_at: float
    finished_at: float
    fault: str = ""
    reanchored: bool = False
    understood: tuple[Understood, ...] | None = None


class Dropped(_Message):
    """Rank to server: the chunk was given up before encode; its slot is free."""

    kind: Literal["dropped"] = "dropped"
    stream: int
    chunk: int
    slot: int
    reason: str


class StreamFailed(_Message):
    """Rank to server: this stream cannot go on; the others do."""

    kind: Literal["stream_failed"] = "stream_failed"
    stream: int
    message: str


class Closed(_Message):
    """Rank to server: nothing of the stream is left in the rank."""

    kind: Literal["closed"] = "closed"
    stream: int


ToRank = Open | Submit | Update | Close
FromRank = Status | Costs | Done | Dropped | StreamFailed | Closed

_to_rank: TypeAdapter[ToRank] = TypeAdapter(Annotated[ToRank, Field(discriminator="kind")])
_from_rank: TypeAdapter[FromRank] = TypeAdapter(Annotated[FromRank, Field(discriminator="kind")])


def encode(message: ToRank | FromRank) -> bytes:
    """One message as one line, newline included."""
    return message.model_dump_json().encode() + b"\n"


def decode_to_rank(line: bytes) -> ToRank:
    """Raises pydantic.ValidationError for anything that is not a server message."""
    return _to_rank.validate_json(line)


def decode_from_rank(line: bytes) -> FromRank:
    """Raises pydantic.ValidationError for anything that is not a rank message."""
    return _from_rank.validate_json(line)
