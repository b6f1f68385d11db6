"""Messages of the control channel (docs/protocol.md), their limits, and their answers."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from engine.api import MAX_PROMPT_CHARS, StreamParams

PROTOCOL_VERSION = 1
MESSAGES_PER_S = 20.0
MESSAGES_BURST = 40
# Fifty broken messages are no mistake any more.
MAX_BAD_MESSAGES = 50


class _Message(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, strict=True)

    v: Literal[1]
    id: int


class Params(_Message):
    """Change what is given; the rest stays."""

    type: Literal["params"]
    prompt: str | None = Field(default=None, max_length=MAX_PROMPT_CHARS)
    strength: float | None = Field(default=None, ge=0.0, le=1.0)
    steps: int | None = Field(default=None, ge=1, le=4)
    seed: int | None = Field(default=None, ge=0, le=2**31 - 1)

    def applied_to(self, params: StreamParams) -> StreamParams:
        """The parameters with this change made."""
        given = self.model_dump(include={"prompt", "strength", "steps", "seed"}, exclude_none=True)
        return params.model_copy(update=given)


class Bypass(_Message):
    """Show the camera instead of the restyled picture, or stop doing so."""

    type: Literal["bypass"]
    on: bool


class Ping(_Message):
    """Ask for the server's clock."""

    type: Literal["ping"]
    t_ms: float


class Bye(_Message):
    """The page leaves."""

    type: Literal["bye"]


ControlMessage = Params | Bypass | Ping | Bye
_adapter: TypeAdapter[ControlMessage] = TypeAdapter(Annotated[ControlMessage, Field(discriminator="type")])


class ControlError(Exception):
    """A message that is not followed. `reply` is the JSON text that says so."""

    def __init__(self, code: str, message: str, request_id: int | None = None) -> None:
        super().__init__(message)
        self.reply = encode("error", code=code, message=message, id=request_id)


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
    """One message to the page; fields that are None are left out, except `first_frame`."""
    kept = {name: value for name, value in fields.items() if value is not None or name == "first_frame"}
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
    path = [str(part) for part in error["loc"] if part not in ("params", "bypass", "ping", "bye")]
    where = ".".join(path) or "message"
    value = str(error.get("input", ""))
    shown = value if len(value) <= 40 else f"{value[:40]}… ({len(value)} characters)"
    return f"{where}: {error['msg']}; got {shown}"
