"""HTTP for probes, Prometheus and people: reads what the application shows, changes nothing.

`/livez` says that the event loop turns. `/readyz` says whether the documents can be trusted right now, with a
reason for each doubt. `/` is a page for people, `/metrics` is for Prometheus, `/api/nodes` and `/api/changes`
(server-sent events) are for programs. Read-only, no authentication: it listens on loopback unless told otherwise.
"""

from __future__ import annotations

import asyncio
import errno
import json
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from aiohttp import web
from loguru import logger
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from eventwatch.errors import ConfigError
from eventwatch.metrics import Metrics
from eventwatch.reconciler import Written

STATIC: Final = Path(__file__).parent / "static"
#: The page brings all that it needs; nothing from elsewhere runs in it or frames it.
POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
#: Changes kept for those who connect later, and those that may wait for a slow reader before it is cut off.
KEPT_CHANGES: Final = 200
SLOW_READER: Final = 1000


class ChangeFeed:
    """The last changes, and everyone who wants to hear of the next."""

    def __init__(self) -> None:
        self.recent: deque[dict[str, Any]] = deque(maxlen=KEPT_CHANGES)
        self._readers: set[asyncio.Queue[dict[str, Any] | None]] = set()

    def publish(self, written: Written) -> None:
        """Take one acknowledged change; a reader that is too slow is told to go."""
        change = {**asdict(written), "cause": str(written.cause)}
        self.recent.append(change)
        for reader in list(self._readers):
            if reader.qsize() >= SLOW_READER:
                self._readers.discard(reader)
                reader.put_nowait(None)
            else:
                reader.put_nowait(change)

    def recall(self, changes: list[dict[str, Any]]) -> None:
        """Put changes, newest first, before those that are known; readers are ended, to come back for them."""
        if changes:
            self.recent.extendleft(changes[: KEPT_CHANGES - len(self.recent)])
            self.close()

    def close(self) -> None:
        """End every reader's stream."""
        for reader in self._readers:
            reader.put_nowait(None)
        self._readers.clear()

    async def follow(self) -> AsyncIterator[dict[str, Any]]:
        """The recent changes, then each new one, until `close`."""
        queue: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()
        for change in self.recent:
            queue.put_nowait(change)
        self._readers.add(queue)
        try:
            while (change := await queue.get()) is not None:  # type: ignore[assignment]
                yield change
        finally:
            self._readers.discard(queue)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pages:
    """What is served, and from where it is read."""

    metrics: Metrics
    feed: ChangeFeed
    nodes: Callable[[], Iterable[Mapping[str, Any]]]
    doubts: Callable[[], list[str]]
    notes: Callable[[], list[str]]

    def application(self) -> web.Application:
        """The routes."""
        application = web.Application()
        application.on_response_prepare.append(_harden)
        application.add_routes(
            [
                web.get("/", self.page),
                web.static("/static", STATIC),
                web.get("/livez", self.livez),
                web.get("/readyz", self.readyz),
                web.get("/metrics", self.show_metrics),
                web.get("/api/nodes", self.show_nodes),
                web.get("/api/changes", self.follow_changes),
            ]
        )
        return application

    async def page(self, _: web.Request) -> web.FileResponse:
        """The status page, for people."""
        return web.FileResponse(STATIC / "index.html")

    async def livez(self, _: web.Request) -> web.Response:
        """The event loop turns."""
        return web.Response(text="ok\n")

    async def readyz(self, _: web.Request) -> web.Response:
        """Whether the documents can be trusted: 503 with the reasons why not, else 200 with notes."""
        reasons = self.doubts()
        return web.json_response([*reasons, *self.notes()], status=503 if reasons else 200)

    async def show_metrics(self, _: web.Request) -> web.Response:
        """For Prometheus."""
        self.metrics.show_nodes(node["status"] for node in self.nodes())
        body = generate_latest(self.metrics.registry)
        return web.Response(body=body, headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def show_nodes(self, _: web.Request) -> web.Response:
        """The documents, as last read or written, and the idle time that is left to each (s)."""
        return web.json_response(list(self.nodes()), dumps=_dumps)

    async def follow_changes(self, request: web.Request) -> web.StreamResponse:
        """Server-sent events: the recent changes, then each new one."""
        response = web.StreamResponse(
            headers={"Content-Type": "text/event-stream", "Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        )
        await response.prepare(request)
        await response.write(b"retry: 500\n: changes of node documents\n\n")
        try:
            async for change in self.feed.follow():
                await response.write(f"data: {_dumps(change)}\n\n".encode())
        except ConnectionError:
            pass  # the reader left
        return response


@asynccontextmanager
async def serve(host: str, port: int, pages: Pages) -> AsyncIterator[None]:
    """Serve for the duration of the block.

    An address in use is a warning. Raises ConfigError for one that can never be listened on.
    """
    listen = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    runner = web.AppRunner(pages.application(), access_log=None, shutdown_timeout=1.0)
    await runner.setup()
    try:
        try:
            await web.TCPSite(runner, host, port).start()
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise ConfigError(f"EVENTWATCH_HTTP_LISTEN: cannot listen on {listen}: {error}") from None
            # A standby on the same host, as a rule: watching is worth more than showing it.
            logger.warning("EVENTWATCH_HTTP_LISTEN: {} is in use, going on without HTTP", listen)
        else:
            logger.info("Status page on http://{}/ (and /livez /readyz /metrics /api/nodes /api/changes)", listen)
        yield
    finally:
        pages.feed.close()
        await runner.cleanup()


async def _harden(_: web.Request, response: web.StreamResponse) -> None:
    response.headers["Content-Security-Policy"] = POLICY
    response.headers["X-Content-Type-Options"] = "nosniff"
    response.headers["Referrer-Policy"] = "no-referrer"


def _dumps(value: Any) -> str:
    return json.dumps(value, default=str)
