"""A hub on loopback with the few answers that a download needs, and the faults it must live with."""

import asyncio
import hashlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from aiohttp import web

COMMIT = "c0ffee" * 6 + "abcd"


@dataclass
class LoopbackHub:
    """files: content by repository and path. It serves them at `main` and at COMMIT.

    cut: bytes after which the next transfers break off, one each. ranges: the Range headers seen. wrong: paths whose
    content has a flipped byte. Only JSON is served directly; a HEAD of the rest leads to the storage.
    """

    files: dict[tuple[str, str], bytes] = field(default_factory=dict)
    cut: list[int] = field(default_factory=list)
    ranges: list[str | None] = field(default_factory=list)
    wrong: set[str] = field(default_factory=set)
    ignores_ranges: bool = False
    url: str = ""

    def etag(self, path: str, content: bytes) -> str:
        if path.endswith(".json"):
            return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()
        return hashlib.sha256(content).hexdigest()

    async def resolve(self, request: web.Request) -> web.StreamResponse:
        repo = f"{request.match_info['owner']}/{request.match_info['name']}"
        path, revision = request.match_info["path"], request.match_info["revision"]
        if repo not in {known for known, _ in self.files}:
            return web.Response(status=404, headers={"X-Error-Code": "RepoNotFound"})
        if revision not in ("main", COMMIT):
            return web.Response(status=404, headers={"X-Error-Code": "RevisionNotFound"})
        content = self.files.get((repo, path))
        if content is None:
            return web.Response(status=404, headers={"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{self.etag(path, content)}"'}
        if not path.endswith(".json"):
            headers["X-Linked-Etag"] = headers["ETag"]
            headers["X-Linked-Size"] = str(len(content))
            # Another host, as the hub's storage is: the library follows redirects within the hub by itself.
            headers["Location"] = f"{self.url.replace('127.0.0.1', 'localhost')}/storage/{repo}/{path}"
            return web.Response(status=302, headers=headers)
        return await self._send(request, path, content, headers)

    async def storage(self, request: web.Request) -> web.StreamResponse:
        repo = f"{request.match_info['owner']}/{request.match_info['name']}"
        path = request.match_info["path"]
        return await self._send(request, path, self.files[repo, path], {})

    async def _send(
        self, request: web.Request, path: str, content: bytes, headers: dict[str, str]
    ) -> web.StreamResponse:
        if path in self.wrong:
            content = content[:-1] + bytes([content[-1] ^ 1])
        start = 0
        wanted = request.headers.get("Range")
        if request.method == "GET":
            self.ranges.append(wanted)
        if wanted is not None and not self.ignores_ranges:
            start = int(wanted.removeprefix("bytes=").rstrip("-"))
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        response = web.StreamResponse(status=206 if start else 200, headers=headers)
        response.content_length = len(content) - start
        await response.prepare(request)
        if request.method == "GET":
            body = content[start:]
            if self.cut:
                await response.write(body[: self.cut.pop(0)])
                assert request.transport is not None
                request.transport.close()
                return response
            await response.write(body)
        await response.write_eof()
        return response

    def app(self) -> web.Application:
        app = web.Application()
        app.router.add_get("/{owner}/{name}/resolve/{revision}/{path:.+}", self.resolve)
        app.router.add_get("/storage/{owner}/{name}/{path:.+}", self.storage)
        return app

    @contextmanager
    def running(self) -> Iterator[str]:
        """Serve in a thread of its own; gives the address."""
        loop = asyncio.new_event_loop()
        runner = web.AppRunner(self.app(), access_log=None)

        async def start() -> None:
            await runner.setup()
            site = web.TCPSite(runner, "127.0.0.1", 0)
            await site.start()
            self.url = f"http://127.0.0.1:{runner.addresses[0][1]}"

        thread = threading.Thread(target=loop.run_forever, daemon=True)
        thread.start()
        asyncio.run_coroutine_threadsafe(start(), loop).result(10)
        try:
            yield self.url
        finally:
            asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result(10)
            loop.call_soon_threadsafe(loop.stop)
            thread.join(10)
            loop.close()
