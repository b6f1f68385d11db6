"""What the server raises for its callers, and the one table from error to HTTP status."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from http import HTTPStatus

from aiohttp import web


class ServerError(Exception):
    """A refusal that a client is told: `code` for programs, the text for people (what, the bound, the cure).

    details: more fields of the answer, for programs.
    """

    status = 500
    code = "internal"
    retryable = False
    headers: Mapping[str, str] = {}

    def __init__(
        self,
        message: str,
        *,
        code: str | None = None,
        status: int | None = None,
        retry_after_s: float | None = None,
        details: Mapping[str, object] | None = None,
    ) -> None:
        super().__init__(message)
        self.code = code or type(self).code
        self.status = status or type(self).status
        self.retry_after_s = retry_after_s
        self.details = dict(details or {})


class BadRequest(ServerError):
    """The request is broken."""

    status, code = 400, "bad_request"


class Unauthorized(ServerError):
    """The token is missing or wrong."""

    status, code = 401, "unauthorized"
    headers = {"WWW-Authenticate": "Bearer"}  # noqa: RUF012


class Forbidden(ServerError):
    """The request comes from where none is accepted."""

    status, code = 403, "forbidden"


class NotFound(ServerError):
    """No such thing, or no longer."""

    status, code = 404, "not_found"


class Conflict(ServerError):
    """Somebody else has it."""

    status, code, retryable = 409, "conflict", True


class PreconditionFailed(ServerError):
    """The request is about a state that is no more (If-Match)."""

    status, code = 412, "precondition_failed"


class TooLarge(ServerError):
    """A size is over its bound."""

    status, code = 413, "too_large"


class WrongMediaType(ServerError):
    """The body is of another type than the endpoint takes."""

    status, code = 415, "wrong_media_type"


class Unsupported(ServerError):
    """Well formed, but nothing this server can do."""

    status, code = 422, "unsupported"


class TooManyRequests(ServerError):
    """The client asks faster than its share."""

    status, code, retryable = 429, "too_many_requests", True


class Full(ServerError):
    """Every seat is taken; come back after `retry_after_s`."""

    status, code, retryable = 503, "full", True


class ShuttingDown(ServerError):
    """The server takes no new sessions."""

    status, code, retryable = 503, "shutting_down", True


def problem(error: ServerError) -> web.Response:
    """The `application/problem+json` answer of an error (RFC 9457), with Retry-After where one is known.

    Beside the RFC's own members stand `code` and `message`, which the page reads.
    """
    body: dict[str, object] = {
        "title": HTTPStatus(error.status).phrase,
        "status": error.status,
        "detail": str(error),
        "code": error.code,
        "message": str(error),
        "retryable": error.retryable,
    }
    body |= error.details
    headers = dict(error.headers)
    if error.retry_after_s is not None:
        body["retry_after_s"] = round(error.retry_after_s, 1)
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after_s)))
    return web.Response(
        text=json.dumps(body), status=error.status, content_type="application/problem+json", headers=headers
    )
