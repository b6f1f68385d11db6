"""The HTTP side: offers, what the server has, and steering by REST."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self
from urllib.parse import quote

import aiohttp

OFFER_PATH = "/api/v1/webrtc/offer"
TIMEOUT_S = 30.0


class Refused(Exception):
    """The server said no. `code` is for programs, the text for people; retry_after_s: None where none was named."""

    def __init__(self, status: int, code: str, message: str, *, retryable: bool, retry_after_s: float | None) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.retryable = retryable
        self.retry_after_s = retry_after_s


@dataclass(frozen=True, slots=True)
class Answer:
    """What an offer was answered with.

    url: of the session on the server; fps: the rate agreed. resume: token to come back with; resumed: it is the session
    of the token that was sent. params, bypass: with which it begins.
    """

    sdp: str
    session: str
    url: str
    fps: float
    size: str
    resume: str = ""
    resumed: bool = False
    params: dict[str, Any] = field(default_factory=dict)
    bypass: bool = False


class Api:
    """One server. Use as an async context manager, or hand it an aiohttp session of your own."""

    def __init__(self, url: str, *, token: str | None = None, http: aiohttp.ClientSession | None = None) -> None:
        """url: say http://127.0.0.1:8080. token: sent as bearer token with every call."""
        self._url = url.rstrip("/")
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._given = http
        self._http = http

    async def __aenter__(self) -> Self:
        if self._http is None:
            self._http = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=TIMEOUT_S))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        if self._http is not None and self._given is None:
            await self._http.close()
            self._http = None

    async def call(self, method: str, path: str, body: object = None) -> Any:
        """One call; returns the JSON of the answer, None where it has no body.

        Raises: Refused; what aiohttp raises where nobody answers; ValueError for an answer that is no JSON.
        """
        if self._http is None:
            raise RuntimeError("use the Api as a context manager: async with Api(url) as api")
        async with self._http.request(method, self._url + path, json=body, headers=self._headers) as response:
            if response.status >= 400:
                raise await _refusal(response)
            return None if response.status == 204 else await response.json(content_type=None)

    async def version(self) -> str:
        """Of the server."""
        return str((await self.call("GET", "/api/v1/version"))["version"])

    async def models(self) -> list[dict[str, Any]]:
        """What is served, with its styles."""
        return list((await self.call("GET", "/api/v1/models"))["models"])

    async def sessions(self) -> list[dict[str, Any]]:
        """Every open session."""
        return list((await self.call("GET", "/api/v1/sessions"))["sessions"])

    async def streams(self) -> list[dict[str, Any]]:
        """Every published stream."""
        return list((await self.call("GET", "/api/v1/streams"))["streams"])

    async def ice_servers(self) -> list[dict[str, Any]]:
        """What to give an RTCPeerConnection, in the browser's form."""
        return list((await self.call("GET", "/api/v1/ice-servers"))["iceServers"])

    def session(self, session_id: str) -> Steered:
        """A session by its id."""
        return Steered(self, f"/api/v1/sessions/{quote(session_id, safe='')}")

    def stream(self, name: str) -> Steered:
        """A published stream by its name."""
        return Steered(self, f"/api/v1/streams/{quote(name, safe='')}")

    async def offer(self, sdp: str, params: dict[str, Any], *, bypass: bool = False, resume: str = "") -> Answer:
        """Open a session, or go on with that of a `resume` token, by these settings; where it is no more, another.

        Raises: Refused, or KeyError, TypeError and ValueError for an answer that is none.
        """
        body: dict[str, Any] = {"type": "offer", "sdp": sdp, "params": params, "bypass": bypass}
        if resume:
            body["resume"] = {"token": resume}
        answer = await self.call("POST", OFFER_PATH, body)
        return Answer(
            answer["sdp"],
            answer["session"],
            answer["url"],
            float(answer["fps"]),
            answer["size"],
            str(answer.get("resume", "")),
            bool(answer.get("resumed", False)),
            dict(answer.get("params", {})),
            bool(answer.get("bypass", False)),
        )

    async def close(self, url: str) -> None:
        """End a session by the URL of its answer, which frees its seat. Raises Refused, status 404 where it is over."""
        await self.call("DELETE", url)


class Steered:
    """A session or a stream, steered by REST."""

    def __init__(self, api: Api, path: str) -> None:
        self._api = api
        self._path = path

    async def get(self) -> dict[str, Any]:
        """Parameters, scene and figures as they are. Raises Refused with status 404 when it is over."""
        return dict(await self._api.call("GET", self._path))

    async def set(self, **change: Any) -> dict[str, Any]:
        """Change what is given (prompt, blend, strength, bypass, ...); returns what `get` does."""
        return dict(await self._api.call("PATCH", self._path, change))

    async def end(self) -> None:
        """End it."""
        await self._api.call("DELETE", self._path)

    async def load_scenes(
        self, scenes: Sequence[dict[str, Any]], *, loop: bool = False, begin: int = 0
    ) -> dict[str, Any]:
        """Load a scene list and begin one of its scenes; returns what `get` does."""
        body = {"scenes": list(scenes), "loop": loop, "begin": begin}
        return dict(await self._api.call("PUT", self._path + "/scenes", body))

    async def go(self, where: int | str) -> dict[str, Any]:
        """Go to a scene: its number from 0, next, previous, play or stop; returns what `get` does."""
        return dict(await self._api.call("POST", self._path + "/scenes/go", {"go": where}))


async def _refusal(response: aiohttp.ClientResponse) -> Refused:
    try:
        problem = await response.json(content_type=None)
    except ValueError:
        problem = None
    problem = problem if isinstance(problem, dict) else {}
    retry_after = response.headers.get("Retry-After", "")
    return Refused(
        response.status,
        str(problem.get("code", f"http_{response.status}")),
        str(problem.get("message", response.reason or "")),
        retryable=bool(problem.get("retryable", response.status >= 500)),
        retry_after_s=float(retry_after) if retry_after.isdigit() else None,
    )
