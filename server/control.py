"""Messages of the control channel (docs/protocol.md), their limits, and their answers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from engine.api import MAX_BLEND, MAX_PROMPT_CHARS, MAX_TRANSITION_CHUNKS, StreamParams, Understood, WeightedPrompt
from engine.config import MAX_STEPS

PROTOCOL_VERSION = 1
MESSAGES_PER_S = 20.0
MESSAGES_BURST = 40
# Fifty broken messages are no mistake any more.
MAX_BAD_MESSAGES = 50
MAX_TRANSITION_S = 30.0
MAX_SCENES = 64
MAX_SCENE_NAME_CHARS = 80
MIN_HOLD_S = 0.5
MAX_HOLD_S = 86_400.0


# What of a session can be recorded; "session" is all that a replay needs.
Recorded = Literal["input", "output", "session"]


class _Message(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, strict=True)

    v: Literal[1]
    id: int


class ParamsChange(BaseModel):
    """What a page may set, in its units: what is given changes, the rest stays."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, strict=True)

    prompt: str | None = Field(
        default=None, max_length=MAX_PROMPT_CHARS, description="the style in words; takes the place of a blend"
    )
    blend: list[WeightedPrompt] | None = Field(
        default=None, max_length=MAX_BLEND, description="prompts mixed by weight; [] ends the mix"
    )
    transition_s: float | None = Field(
        default=None, ge=0.0, le=MAX_TRANSITION_S, description="seconds over which new prompts take over; 0 at once"
    )
    recache: bool | None = Field(default=None, description="new prompts also rewrite what is remembered of old frames")
    strength: float | None = Field(default=None, ge=0.0, le=1.0, description="0 is the camera, 1 the full style")
    steps: int | None = Field(default=None, ge=1, le=MAX_STEPS, description="denoising steps of a chunk")
    seed: int | None = Field(default=None, ge=0, le=2**31 - 1, description="of the sampling noise")

    def applied_to(self, params: StreamParams) -> StreamParams:
        """The parameters with this change made. `transition_s` depends on the agreed rate: see `transition_chunks`."""
        given = self.model_dump(include={"prompt", "recache", "strength", "steps", "seed"}, exclude_none=True)
        if self.blend is not None:
            given["blend"] = tuple(self.blend)
        elif self.prompt is not None:
            given["blend"] = ()  # one style asked for: it replaces the mix
        return params.model_copy(update=given)


class SessionChange(ParamsChange):
    """What can be set on a session from outside its data channel: by REST, OSC, or in the URL of a publisher."""

    bypass: bool | None = Field(default=None, description="show the camera instead of the restyled picture")


class Scene(ParamsChange):
    """One entry of a scene list: what it sets when it begins, and how long it stays."""

    name: str = Field(default="", max_length=MAX_SCENE_NAME_CHARS)
    hold_s: float | None = Field(
        default=None,
        ge=MIN_HOLD_S,
        le=MAX_HOLD_S,
        description="seconds from its beginning, the transition included, to the next scene; null: until told",
    )


class SceneList(BaseModel):
    """Scenes in their order. Loading a list begins one of them."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    scenes: list[Scene] = Field(min_length=1, max_length=MAX_SCENES)
    loop: bool = Field(default=False, description="the first scene follows the last")
    begin: int = Field(default=0, ge=0, description="number of the scene that stands first, from 0")

    @model_validator(mode="after")
    def _begins_within(self) -> Self:
        if self.begin >= len(self.scenes):
            raise ValueError(f"begin {self.begin} must be below the {len(self.scenes)} scenes there are")
        return self


SceneMove = Annotated[int, Field(ge=0, lt=MAX_SCENES)] | Literal["next", "previous", "play", "stop"]


class SceneGo(BaseModel):
    """A move within the scene list: to a scene by its number from 0, to a neighbour, or on and off with its clock."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    go: SceneMove


class RecordingWish(BaseModel):
    """What to record."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    what: list[Recorded] = Field(
        default=["output"],
        min_length=1,
        max_length=3,
        description="the camera's picture, the painted one, and what a replay needs",
    )


class Params(_Message, ParamsChange):
    """Change what is given; the rest stays."""

    type: Literal["params"]


class Bypass(_Message):
    """Show the camera instead of the restyled picture, or stop doing so."""

    type: Literal["bypass"]
    on: bool


class Scenes(_Message, SceneList):
    """Load a scene list and begin it."""

    type: Literal["scenes"]


class SceneMoved(_Message, SceneGo):
    """Move within the scene list."""

    type: Literal["scene"]


class Record(_Message, RecordingWish):
    """Begin to record, or end it."""

    type: Literal["record"]
    on: bool


class Ping(_Message):
    """Ask for the server's clock."""

    type: Literal["ping"]
    t_ms: float


class Bye(_Message):
    """The page leaves."""

    type: Literal["bye"]


ControlMessage = Params | Bypass | Scenes | SceneMoved | Record | Ping | Bye
MESSAGE_TYPES = ("params", "bypass", "scenes", "scene", "record", "ping", "bye")
_adapter: TypeAdapter[ControlMessage] = TypeAdapter(Annotated[ControlMessage, Field(discriminator="type")])


def transition_chunks(transition_s: float, fps: float, chunk_frames: int) -> int:
    """Seconds as chunks at the agreed rate, at least one for any time above zero."""
    chunks = round(transition_s * fps / chunk_frames)
    return min(MAX_TRANSITION_CHUNKS, max(1, chunks)) if transition_s > 0 else 0


def shown_params(params: StreamParams, transition_s: float) -> dict[str, object]:
    """The parameters as the page knows and wishes them; what the ladder leaves of them is told beside."""
    shown = params.model_dump(exclude={"transition_chunks", "small", "light"})
    return shown | {"blend": [prompt.model_dump() for prompt in params.blend], "transition_s": transition_s}


def shown_style(understood: Understood, names: Mapping[str, str]) -> dict[str, object]:
    """What a prompt was taken for as the page knows it: the style, the second of a mixture, colours and moods."""

    def named(style: str) -> dict[str, object]:
        return {"id": style, "name": names.get(style, style)}

    (first, _), *others = understood.styles
    shown = named(first) | {"score": round(understood.score, 3), "modifiers": list(understood.modifiers)}
    if others:
        second, share = others[0]
        shown["second"] = named(second) | {"share": round(share, 3)}
    return shown


class ControlError(Exception):
    """A message that is not followed. `reply` is the JSON text that says so."""

    def __init__(self, code: str, message: str, request_id: int | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.reply = encode("error", code=code, message=message, id=request_id)


def check_steps(change: ParamsChange, most: int, request_id: int | None = None) -> None:
    """Raises ControlError for more steps than the model has timesteps for."""
    if change.steps is not None and change.steps > most:
        text = f"steps: {change.steps} is refused: this model has timesteps for {most} at most"
        raise ControlError("bad_message", text, request_id)


class TokenBucket:
    """A rate limit: `rate` a second with bursts of `burst`. Pure: instants are passed in."""

    def __init__(self, rate: float, burst: int) -> None:
        self._rate = rate
        self._burst = burst
        self._tokens = float(burst)
        self._at = float("-inf")

    def take(self, now: float) -> bool:
        """Whether one more is within the limit now; if so it is counted."""
        if self._at != float("-inf"):
            self._tokens = min(self._burst, self._tokens + (now - self._at) * self._rate)
        self._at = now
        if self._tokens < 1:
            return False
        self._tokens -= 1
        return True


def encode(kind: str, **fields: object) -> str:
    """One message to the page; fields that are None are left out, except `first_frame` and `first_chunk`."""
    kept = {
        name: value for name, value in fields.items() if value is not None or name in ("first_frame", "first_chunk")
    }
    return json.dumps({"v": PROTOCOL_VERSION, "type": kind, **kept})


def parse(text: str) -> ControlMessage:
    """Raises ControlError, naming the field, its bound and the value, for anything but a message of the protocol."""
    try:
        raw = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ControlError("bad_message", f"not JSON: {error}") from error
    request_id = raw.get("id") if isinstance(raw, dict) and isinstance(raw.get("id"), int) else None
    try:
        return _adapter.validate_python(raw)
    except ValidationError as error:
        raise ControlError("bad_message", _explain(error.errors()[0]), request_id) from error


def _explain(error: Any) -> str:
    """One pydantic error as a sentence for people: where, what, the bound and a cut of the value."""
    path = [str(part) for part in error["loc"] if part not in MESSAGE_TYPES]
    where = ".".join(path) or "message"
    value = str(error.get("input", ""))
    shown = value if len(value) <= 40 else f"{value[:40]}… ({len(value)} characters)"
    return f"{where}: {error['msg']}; got {shown}"
