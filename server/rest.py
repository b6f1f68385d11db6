"""REST for everything that the data channel can set, on sessions and on published streams alike (docs/steering.md).

    /api/v1/sessions/{id}          a session by the id that its offer was answered with
    /api/v1/streams/{stream}       the session that publishes a stream, by the stream's name

Both have the same methods, and scenes below them: one set of handlers, told apart by how the session is found.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from aiohttp import web

from server.bodies import read_json
from server.control import ControlError, RecordingWish, SceneGo, SceneList, SessionChange
from server.errors import BadRequest, NotFound
from server.openapi import document, page
from server.recording import STOP_TIMEOUT_S
from server.session import Session
from server.session_context import SessionContext
from server.steering import Steering
from server.stills import answer_still

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

SESSION = "/api/v1/sessions/{id}"
STREAM = "/api/v1/streams/{stream}"


class Rest:
    """The handlers; who may ask what is decided before them, in server/guard.py."""

    def __init__(self, context: SessionContext, steering: Steering) -> None:
        self._context = context
        self._steering = steering

    def add_to(self, app: web.Application) -> None:
        """Add the routes."""
        app.add_routes(
            [
                web.get("/api", self._page),
                web.get("/api/v1/openapi.json", self._document),
                web.get("/api/v1/models/{id:.+}/schema", self._schema),
                web.get("/api/v1/sessions", self._checked(self._sessions)),
                web.get("/api/v1/streams", self._checked(self._streams)),
                web.options("/api/v1/streams/{stream}{below:.*}", self._preflight),
            ]
        )
        for path in (SESSION, STREAM):
            app.add_routes(
                [
                    web.get(path, self._checked(self._get)),
                    web.patch(path, self._checked(self._patch)),
                    web.delete(path, self._checked(self._delete)),
                    web.get(path + "/scenes", self._checked(self._get_scenes)),
                    web.put(path + "/scenes", self._checked(self._put_scenes)),
                    web.delete(path + "/scenes", self._checked(self._delete_scenes)),
                    web.post(path + "/scenes/go", self._checked(self._go)),
                    web.get(path + "/still", self._still),
                    web.get(path + "/recording", self._get_recording),
                    web.post(path + "/recording", self._record),
                    web.delete(path + "/recording", self._stop_recording),
                ]
            )

    def _checked(self, handler: Handler) -> Handler:
        async def handle(request: web.Request) -> web.StreamResponse:
            try:
                return await handler(request)
            except ControlError as error:
                raise BadRequest(str(error), code=error.code) from error

        return handle

    def _find(self, request: web.Request) -> Session:
        """Raises NotFound."""
        if "stream" in request.match_info:
            return self._steering.stream(request.match_info["stream"])
        return self._steering.session(request.match_info["id"])

    def _shown(self, request: web.Request) -> web.Response:
        if "stream" in request.match_info:
            return web.json_response(self._steering.shown_stream(request.match_info["stream"]))
        return web.json_response(self._steering.shown(self._find(request)))

    # --- what there is

    async def _page(self, request: web.Request) -> web.Response:
        return web.Response(text=page(), content_type="text/html")

    async def _document(self, request: web.Request) -> web.Response:
        return web.json_response(document())

    async def _schema(self, request: web.Request) -> web.Response:
        model = self._context.settings.engine.model
        if request.match_info["id"] != model:
            raise NotFound(f"{request.match_info['id'][:64]!r} is not served here; there is {model!r}")
        schema = SessionChange.model_json_schema()
        schema["title"] = f"What can be set on a session with {model}"
        for form in schema["properties"]["steps"]["anyOf"]:
            if form["type"] == "integer":
                form["maximum"] = self._context.steps_max
        return web.json_response(schema)

    async def _sessions(self, request: web.Request) -> web.Response:
        return web.json_response({"sessions": self._steering.sessions()})

    async def _streams(self, request: web.Request) -> web.Response:
        return web.json_response({"streams": self._steering.streams()})

    async def _preflight(self, request: web.Request) -> web.Response:
        return web.Response(headers={"Allow": "OPTIONS, GET, PUT, POST, PATCH, DELETE"})

    # --- one session

    async def _get(self, request: web.Request) -> web.Response:
        return self._shown(request)

    async def _patch(self, request: web.Request) -> web.Response:
        session = self._find(request)
        change = await read_json(request, SessionChange)
        session.controls.restyle(change, by="rest")
        return self._shown(request)

    async def _delete(self, request: web.Request) -> web.Response:
        await self._steering.close(self._find(request))
        return web.Response(status=204)

    # --- its scenes

    async def _get_scenes(self, request: web.Request) -> web.Response:
        scenes = self._find(request).controls.scenes
        if scenes.list is None:
            raise NotFound("no scene list is loaded; PUT one here", code="no_scenes")
        return web.json_response(scenes.list.model_dump(exclude_none=True) | {"scene": scenes.shown()})

    async def _put_scenes(self, request: web.Request) -> web.Response:
        session = self._find(request)
        session.controls.scenes.load(await read_json(request, SceneList))
        return self._shown(request)

    async def _delete_scenes(self, request: web.Request) -> web.Response:
        self._find(request).controls.scenes.clear()
        return web.Response(status=204)

    async def _go(self, request: web.Request) -> web.Response:
        session = self._find(request)
        session.controls.scenes.move((await read_json(request, SceneGo)).go)
        return self._shown(request)

    # --- its pictures

    async def _still(self, request: web.Request) -> web.Response:
        return await answer_still(request, self._find(request), self._context.executor)

    async def _get_recording(self, request: web.Request) -> web.Response:
        recording = self._find(request).recorder.current
        if recording is None:
            raise NotFound("this session was not recorded; POST here to begin", code="no_recording")
        return web.json_response(recording.shown())

    async def _record(self, request: web.Request) -> web.Response:
        session = self._find(request)
        recording = session.recorder.start((await read_json(request, RecordingWish)).what)
        await asyncio.shield(recording.begun)
        return web.json_response(recording.shown(), status=201)

    async def _stop_recording(self, request: web.Request) -> web.Response:
        recording = self._find(request).recorder.stop()
        # Answered once the files are whole.
        await asyncio.wait([recording.task], timeout=STOP_TIMEOUT_S)
        return web.json_response(recording.shown())
